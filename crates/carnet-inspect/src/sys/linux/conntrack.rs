//! Connections that a NAT redirected: what its connection tracker tells.

use crate::origin::{FlowSource, Origin, Route};
use carnet::{AsSocket, Error, Operation};
use socket2::SockRef;
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// Connections that a NAT of this host redirected (`nft … redirect to`): no records, no
/// applications, and nothing that lets two such services work on one flow.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConntrackSource;

impl FlowSource for ConntrackSource {
    fn origin(&self, accepted: &TcpStream) -> Result<Origin, Error> {
        let operation = Operation::OriginalDestination;
        let local = accepted.local_addr().map_err(|source| Error::Os { operation, source })?;
        let destination = conntrack_destination(accepted, local).ok_or_else(not_redirected)?;
        // Without a NAT rule, the connection tracker tells the address of this very socket.
        if destination == local {
            return Err(not_redirected());
        }
        Ok(Origin { destination, app: None, flow: None, route: Route::Plain(destination) })
    }
}

/// What `SO_ORIGINAL_DST` says; none where the connection is not tracked.
fn conntrack_destination(accepted: &impl AsSocket, local: SocketAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(accepted);
    // A mapped connection is tracked as what it is: IPv4.
    let original = if local.ip().to_canonical().is_ipv4() {
        socket.original_dst_v4()
    } else {
        socket.original_dst_v6()
    };
    original.ok()?.as_socket()
}

fn not_redirected() -> Error {
    Error::NotRedirected { operation: Operation::OriginalDestination }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::CarnetSource;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_direct_connection_is_not_taken_for_a_redirected_one() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let origin = ConntrackSource.origin(&accepted);
            assert!(matches!(origin, Err(Error::NotRedirected { .. })), "{origin:?}");
            let origin = CarnetSource::default().origin(&accepted);
            assert!(matches!(origin, Err(Error::NoEngine { .. })), "{origin:?}");
        }
    }
}

//! Connecting onwards with tokio's sockets (feature `tokio`).
//!
//! The functions of the crate's root take tokio's sockets as they are; only connecting differs.

use crate::onwards::prepared;
use crate::{AsSocket, Error, Onwards, Operation, query_redirect_records};
use ::tokio::net::{TcpSocket, TcpStream, UdpSocket};
use socket2::{Socket, Type};
use std::io;
use std::net::{SocketAddr, TcpStream as StdStream};
use std::time::Duration;

/// Connects to the original destination of an accepted connection, with its redirect record.
///
/// # Errors
/// Those of [`connect_onwards`](crate::connect_onwards).
///
/// # Panics
/// As every connect of tokio's: outside of a runtime with I/O enabled.
pub async fn connect_onwards(accepted: &impl AsSocket) -> Result<TcpStream, Error> {
    let (socket, destination) = prepared(accepted)?;
    connect_socket(socket, destination, None).await
}

/// As [`connect_onwards`], to another destination than the original one.
///
/// # Errors
/// Those of [`connect_onwards`](crate::connect_onwards).
///
/// # Panics
/// As [`connect_onwards`].
pub async fn connect_onwards_to(
    accepted: &impl AsSocket,
    destination: SocketAddr,
) -> Result<TcpStream, Error> {
    connect(&Onwards::new(query_redirect_records(accepted)?, destination)).await
}

/// Makes a connection that was prepared: [`Onwards::connect`] without blocking.
///
/// # Errors
/// Those of [`Onwards::connect`].
///
/// # Panics
/// As [`connect_onwards`]; with a time limit also where the runtime has no timers.
pub async fn connect(onwards: &Onwards) -> Result<TcpStream, Error> {
    connect_socket(onwards.socket(Type::STREAM)?, onwards.destination(), onwards.limit()).await
}

/// A UDP socket that carries the flow's record and is connected to its original destination:
/// [`connect_onwards_datagram`](crate::connect_onwards_datagram) for tokio.
///
/// # Errors
/// Those of [`connect_onwards_datagram`](crate::connect_onwards_datagram).
///
/// # Panics
/// As [`connect_onwards`].
pub fn connect_onwards_datagram(flow: &impl AsSocket) -> Result<UdpSocket, Error> {
    let socket = crate::connect_onwards_datagram(flow)?;
    let refused = |source| Error::Os { operation: Operation::PrepareSocket, source };
    socket.set_nonblocking(true).map_err(refused)?;
    UdpSocket::from_std(socket).map_err(refused)
}

/// Connects a socket that is ready for it, and waits for at most `limit`.
async fn connect_socket(
    socket: Socket,
    destination: SocketAddr,
    limit: Option<Duration>,
) -> Result<TcpStream, Error> {
    socket
        .set_nonblocking(true)
        .map_err(|source| Error::Os { operation: Operation::PrepareSocket, source })?;
    let connecting = TcpSocket::from_std_stream(StdStream::from(socket)).connect(destination);
    let connected = match limit {
        Some(limit) => ::tokio::time::timeout(limit, connecting)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        None => connecting.await,
    };
    connected.map_err(|source| Error::from_connect(destination, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::tokio::net::TcpListener;
    use socket2::Domain;

    // Where no record can be set, no public function comes as far as this.
    #[::tokio::test]
    async fn a_prepared_socket_is_connected_or_refused() {
        for limit in [None, Some(Duration::from_secs(60))] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let destination = listener.local_addr().unwrap();
            let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let stream = connect_socket(socket(), destination, limit).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), destination);
            let (accepted, peer) = listener.accept().await.unwrap();
            assert_eq!(peer, stream.local_addr().unwrap());
            accepted.writable().await.unwrap();
            assert_eq!(accepted.try_write(b"hello").unwrap(), 5);
            stream.readable().await.unwrap();
            assert_eq!(stream.try_read(&mut [0; 8]).unwrap(), 5);

            drop(listener);
            let error = connect_socket(socket(), destination, limit).await.unwrap_err();
            assert!(
                matches!(&error, Error::Connect { source, .. }
                    if source.kind() == io::ErrorKind::ConnectionRefused),
                "{error:?}"
            );
        }
    }
}

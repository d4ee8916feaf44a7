//! Where a connection comes from and goes to: the only module that asks Carnet.

use crate::proxy_protocol::Announcement;
use carnet::{AsSocket, DatagramFlow, Error, Onwards, Operation, OriginalApp};
use std::future::{Future, ready};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdUdpSocket};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

/// Tells where accepted connections come from and go to.
pub trait FlowSource: Send + Sync + 'static {
    /// What is known of an accepted connection. It does not block.
    ///
    /// # Errors
    /// [`Error::NotRedirected`] for a connection that came here directly; others when it cannot
    /// be told.
    fn origin(&self, accepted: &TcpStream) -> Result<Origin, Error>;

    /// The same for a source that learns of a connection by what it says before all else, and waits for
    /// that, for at most `limit`.
    fn origin_in_time<'a>(&'a self, accepted: &'a TcpStream, _limit: Duration) -> OriginFuture<'a> {
        Box::pin(ready(self.origin(accepted)))
    }

    /// What is known of a flow of datagrams that come from `peer`, which is an address that stands
    /// for the flow. It does not block.
    ///
    /// # Errors
    /// [`Error::NotRedirected`] for datagrams that came here directly; others when it cannot be
    /// told. A source that knows of connections only has [`Error::Unsupported`].
    fn datagram_origin(&self, _peer: SocketAddr) -> Result<Origin, Error> {
        Err(Error::Unsupported { operation: Operation::OriginalDestination })
    }

    /// Whether datagrams from `peer` still belong to this flow. It does not block.
    fn is_current(&self, _peer: SocketAddr, _flow: FlowId) -> bool {
        true
    }

    /// Whether `peer` can stand for another flow later. The datagrams of a connected client come from
    /// its own address and port, which another socket can have after it.
    fn is_lent(&self, _peer: SocketAddr) -> bool {
        true
    }
}

/// What [`FlowSource::origin_in_time`] gives.
pub type OriginFuture<'a> = Pin<Box<dyn Future<Output = Result<Origin, Error>> + Send + 'a>>;

/// What is known of a redirected connection, or of a flow of datagrams.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Where it was going.
    pub destination: SocketAddr,
    /// The application that made it, if that is known.
    pub app: Option<App>,
    /// The flow that it belongs to, if that is known.
    pub flow: Option<FlowId>,
    /// How to get there.
    pub route: Route,
}

/// The application with which a flow began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct App {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// The executable, if it is known.
    pub executable: Option<PathBuf>,
    /// The command name.
    pub command: String,
}

impl From<OriginalApp> for App {
    fn from(app: OriginalApp) -> Self {
        Self {
            pid: app.pid,
            uid: app.uid,
            executable: app.executable,
            command: app.command.to_string_lossy().into_owned(),
        }
    }
}

/// A flow, as Carnet counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowId {
    /// The flow's number, the same in every service that it passes.
    pub id: u64,
    /// The place of this service in the flow's way, from 1.
    pub hops: u32,
}

/// How to connect onwards.
#[derive(Clone, Debug)]
pub enum Route {
    /// With the redirect record, be it this host's or one of another host.
    Recorded(Box<Onwards>),
    /// Without one.
    Plain(SocketAddr),
    /// To a service that is told first where the connection is going.
    Announced(Announced),
}

/// A connection to a service that is told where it is going by what comes first.
#[derive(Clone, Debug)]
pub struct Announced {
    /// How to connect to the service.
    pub route: Box<Route>,
    /// Where it listens.
    pub service: SocketAddr,
    /// What it is told.
    pub announcement: Announcement,
}

impl Announced {
    async fn connect(self, limit: Duration) -> Result<TcpStream, Error> {
        let mut stream = Box::pin(self.route.connect(limit)).await?;
        let failed = |source| Error::from_connect(self.service, source);
        // Only now, since it may be good for a short time.
        let header = self.announcement.header(self.service).map_err(failed)?;
        stream.write_all(&header).await.map_err(failed)?;
        Ok(stream)
    }
}

impl Route {
    /// The same way to another place.
    #[must_use]
    pub fn to(self, destination: SocketAddr) -> Self {
        match self {
            Self::Recorded(onwards) => Self::Recorded(Box::new(onwards.to(destination))),
            Self::Plain(_) => Self::Plain(destination),
            Self::Announced(announced) => Self::Announced(Announced {
                route: Box::new(announced.route.to(destination)),
                service: destination,
                ..announced
            }),
        }
    }

    /// Connects, and gives up after `limit`.
    ///
    /// # Errors
    /// Those of [`carnet::tokio::connect`].
    pub async fn connect(self, limit: Duration) -> Result<TcpStream, Error> {
        match self {
            Self::Recorded(onwards) => carnet::tokio::connect(&onwards.timeout(limit)).await,
            Self::Plain(destination) => {
                let address = destination.ip().to_canonical();
                let socket =
                    if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
                let socket = socket
                    .map_err(|source| Error::Os { operation: Operation::PrepareSocket, source })?;
                let target = SocketAddr::new(address, destination.port());
                tokio::time::timeout(limit, socket.connect(target))
                    .await
                    .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
                    .map_err(|source| Error::from_connect(target, source))
            }
            Self::Announced(announced) => announced.connect(limit).await,
        }
    }

    /// A socket for datagrams that is connected to the destination.
    ///
    /// # Errors
    /// Those of [`Onwards::connect_datagram`]; [`Error::Unsupported`] to a service that would have to be
    /// told something first.
    pub fn connect_datagram(self) -> Result<UdpSocket, Error> {
        let prepare = |source| Error::Os { operation: Operation::PrepareSocket, source };
        let socket = match self {
            Self::Recorded(onwards) => onwards.connect_datagram()?,
            Self::Plain(destination) => {
                let address = destination.ip().to_canonical();
                let any: IpAddr = if address.is_ipv4() {
                    Ipv4Addr::UNSPECIFIED.into()
                } else {
                    Ipv6Addr::UNSPECIFIED.into()
                };
                let socket = StdUdpSocket::bind((any, 0)).map_err(prepare)?;
                let target = SocketAddr::new(address, destination.port());
                socket.connect(target).map_err(|source| Error::from_connect(target, source))?;
                socket
            }
            Self::Announced(_) => {
                return Err(Error::Unsupported { operation: Operation::PrepareSocket });
            }
        };
        socket.set_nonblocking(true).map_err(prepare)?;
        UdpSocket::from_std(socket).map_err(prepare)
    }
}

/// Connections that Carnet redirected.
#[derive(Clone, Copy, Debug, Default)]
pub struct CarnetSource {
    /// Misbehave on purpose: connect onwards without the record.
    pub forget_records: bool,
}

impl FlowSource for CarnetSource {
    fn origin(&self, accepted: &TcpStream) -> Result<Origin, Error> {
        self.origin_of(accepted)
    }

    fn datagram_origin(&self, peer: SocketAddr) -> Result<Origin, Error> {
        self.origin_of(&DatagramFlow::of(peer)?)
    }

    fn is_current(&self, peer: SocketAddr, flow: FlowId) -> bool {
        match DatagramFlow::of(peer).and_then(|asked| carnet::flow(&asked)) {
            Ok(now) => now.id == flow.id,
            Err(Error::NotRedirected { .. }) => false,
            // It cannot be told: descriptors are short, for example.
            Err(_) => true,
        }
    }

    fn is_lent(&self, peer: SocketAddr) -> bool {
        !is_token(peer.ip().to_canonical())
    }
}

/// Whether this is a source token (`docs/abi.md`), which stands for one flow only.
fn is_token(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [first, second, ..] = address.octets();
            first == 127 && second & 0xc0 == 64
        }
        IpAddr::V6(address) => address.segments()[..4] == [0xfd43, 0x6172, 0x6e65, 0x74],
    }
}

impl CarnetSource {
    fn origin_of(&self, accepted: &impl AsSocket) -> Result<Origin, Error> {
        // The accepted connection is open for as long as this is.
        let onwards = Onwards::while_open(accepted)?;
        let app = if_supported(carnet::original_app(accepted))?;
        let flow = if_supported(carnet::flow(accepted))?;
        let destination = onwards.destination();
        Ok(Origin {
            destination,
            app: app.map(App::from),
            flow: flow.map(|flow| FlowId { id: flow.id, hops: flow.hops }),
            route: if self.forget_records {
                Route::Plain(destination)
            } else {
                Route::Recorded(Box::new(onwards))
            },
        })
    }
}

/// What the system tells, or nothing where it cannot.
fn if_supported<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Err(Error::Unsupported { .. }) => Ok(None),
        answer => answer.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn tokens_are_told_from_addresses() {
        for (address, expected) in [
            ("127.64.0.0", true),
            ("127.127.255.255", true),
            ("127.63.255.255", false),
            ("127.128.0.0", false),
            ("127.0.0.1", false),
            ("10.64.0.0", false),
            ("fd43:6172:6e65:74:1:2:3:4", true),
            ("fd43:6172:6e65:75::", false),
            ("::1", false),
        ] {
            assert_eq!(is_token(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[tokio::test]
    async fn a_plain_route_of_datagrams_reaches_a_mapped_address_over_ipv4() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let mapped = SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), port);
        let socket = Route::Plain(mapped).connect_datagram().unwrap();
        assert_eq!(socket.peer_addr().unwrap(), server.local_addr().unwrap());
        socket.send(b"hello").await.unwrap();
        assert_eq!(server.recv_from(&mut [0; 9]).await.unwrap(), (5, socket.local_addr().unwrap()));
    }

    #[tokio::test]
    async fn a_plain_route_reaches_a_mapped_address_over_ipv4() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mapped = SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), port);
        let stream = Route::Plain(mapped).connect(Duration::from_secs(10)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
    }
}

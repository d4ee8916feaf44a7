//! Connecting onwards: from an accepted connection to where it was going.

use crate::{
    AsSocket, Error, Operation, OriginalDestination, PortableRecord, RedirectRecords,
    import_redirect_records, original_destination, query_redirect_records, set_redirect_records,
    sys,
};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Connects to the original destination of an accepted connection, with its redirect record, and
/// waits until it is connected or the system gives up. [`Onwards`] has a time limit and more.
///
/// # Errors
/// Those of [`query_redirect_records`] about `accepted`; those of [`set_redirect_records`];
/// [`Error::Connect`], [`Error::Blocked`] and [`Error::Loop`] for the connection itself.
pub fn connect_onwards(accepted: &impl AsSocket) -> Result<TcpStream, Error> {
    let (socket, destination) = prepared(accepted)?;
    connect(socket, destination, None)
}

/// A socket that carries the record of an accepted connection, and where that was going.
pub(crate) fn prepared(accepted: &impl AsSocket) -> Result<(Socket, SocketAddr), Error> {
    let onwards = Onwards::while_open(accepted)?;
    Ok((onwards.socket(Type::STREAM)?, onwards.destination()))
}

/// As [`connect_onwards`], to another destination than the original one: for a service that sends
/// connections elsewhere, to a mirror for example.
///
/// # Errors
/// Those of [`connect_onwards`].
pub fn connect_onwards_to(
    accepted: &impl AsSocket,
    destination: SocketAddr,
) -> Result<TcpStream, Error> {
    Onwards::new(query_redirect_records(accepted)?, destination).connect()
}

/// A connection onwards that is yet to be made: the record, the destination, and how to connect.
///
/// It keeps no hold of the accepted connection, so it can be prepared in one place and used in
/// another.
#[derive(Clone, Debug)]
pub struct Onwards {
    flow: Carried,
    destination: SocketAddr,
    source: Option<SocketAddr>,
    timeout: Option<Duration>,
}

/// How the new socket comes to the record.
#[derive(Clone, Debug)]
enum Carried {
    /// It is here.
    Records(RedirectRecords),
    /// The kernel has it, with the accepted connection of this ticket.
    Ticket(u64),
    /// It is another host's, of which the kernel makes one of this host.
    Imported(PortableRecord),
}

impl Onwards {
    /// The connection from `accepted` to its original destination.
    ///
    /// # Errors
    /// Those of [`query_redirect_records`].
    pub fn of(accepted: &impl AsSocket) -> Result<Self, Error> {
        let records = query_redirect_records(accepted)?;
        let OriginalDestination(destination) = original_destination(accepted)?;
        Ok(Self::new(records, destination))
    }

    /// The same for as long as `accepted` is open: on Linux the record stays in the kernel, which takes
    /// fewer and cheaper calls. Once `accepted` is closed, connecting fails with [`Error::InvalidRecord`].
    ///
    /// # Errors
    /// Those of [`query_redirect_records`].
    pub fn while_open(accepted: &impl AsSocket) -> Result<Self, Error> {
        match sys::onwards(accepted) {
            Some((destination, ticket)) => Ok(Self::with(Carried::Ticket(ticket), destination)),
            // It tells the error, too, if there is one.
            None => Self::of(accepted),
        }
    }

    /// A connection to `destination` with records that were queried before.
    pub fn new(records: RedirectRecords, destination: SocketAddr) -> Self {
        Self::with(Carried::Records(records), destination)
    }

    /// A connection to `destination` that goes on with a flow of another host, whose record this is: see
    /// [`import_redirect_records`]. TCP only.
    pub fn import(record: PortableRecord, destination: SocketAddr) -> Self {
        Self::with(Carried::Imported(record), destination)
    }

    fn with(flow: Carried, destination: SocketAddr) -> Self {
        Self { flow, destination, source: None, timeout: None }
    }

    /// Gives up when it takes longer. Without it, the system's own limit holds: minutes.
    #[must_use]
    pub fn timeout(self, limit: Duration) -> Self {
        Self { timeout: Some(limit), ..self }
    }

    /// Binds the socket to a local address before connecting. It must be of the destination's
    /// family, where an IPv4-mapped destination counts as IPv4.
    #[must_use]
    pub fn bind(self, source: SocketAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Goes to another destination instead: to a mirror, or to a service that is told by other means where
    /// the flow is going.
    #[must_use]
    pub fn to(self, destination: SocketAddr) -> Self {
        Self { destination, ..self }
    }

    /// Where the connection goes. An IPv4-mapped destination is reached over IPv4, which also
    /// works where sockets are IPv6-only.
    pub fn destination(&self) -> SocketAddr {
        canonical(self.destination)
    }

    /// Makes the connection; blocks until it is there.
    ///
    /// # Errors
    /// Those of [`set_redirect_records`], or [`import_redirect_records`]; [`Error::Connect`], of kind
    /// [`TimedOut`](io::ErrorKind::TimedOut) when the limit has passed; [`Error::Blocked`];
    /// [`Error::Loop`]; [`Error::Os`] when no socket could be made or bound.
    pub fn connect(&self) -> Result<TcpStream, Error> {
        connect(self.socket(Type::STREAM)?, self.destination(), self.timeout)
    }

    /// The time limit.
    #[cfg(feature = "tokio")]
    pub(crate) fn limit(&self) -> Option<Duration> {
        self.timeout
    }

    /// A blocking TCP (`Type::STREAM`) or UDP (`Type::DGRAM`) socket that carries the record and is
    /// bound, ready to be connected.
    pub(crate) fn socket(&self, kind: Type) -> Result<Socket, Error> {
        let socket = new_socket(self.destination(), kind)?;
        // First of all: some systems classify a connection when its socket is bound (S58).
        match &self.flow {
            Carried::Records(records) => set_redirect_records(&socket, records)?,
            Carried::Ticket(ticket) => sys::carry_on(&socket, *ticket)?,
            Carried::Imported(record) => import_redirect_records(&socket, record)?,
        }
        if let Some(source) = self.source {
            socket.bind(&source.into()).map_err(not_prepared)?;
        }
        Ok(socket)
    }
}

/// An IPv4-mapped address as the IPv4 address that it is.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A blocking socket for connections to `destination`: TCP (`Type::STREAM`) or UDP (`Type::DGRAM`).
fn new_socket(destination: SocketAddr, kind: Type) -> Result<Socket, Error> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    Socket::new(Domain::for_address(destination), kind, Some(protocol)).map_err(not_prepared)
}

fn not_prepared(source: io::Error) -> Error {
    Error::Os { operation: Operation::PrepareSocket, source }
}

/// Connects a socket that is ready for it, and waits for at most `limit`.
fn connect(
    socket: Socket,
    destination: SocketAddr,
    limit: Option<Duration>,
) -> Result<TcpStream, Error> {
    let connected = match limit {
        Some(limit) => socket.connect_timeout(&destination.into(), limit),
        None => socket.connect(&destination.into()),
    };
    connected.map_err(|source| Error::from_connect(destination, source))?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    // Where no record can be set, no public function comes as far as this.
    #[test]
    fn a_prepared_socket_is_connected_and_blocks() {
        for limit in [None, Some(Duration::from_secs(60))] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let destination = listener.local_addr().unwrap();
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let mut stream = connect(socket, destination, limit).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), destination);
            let (mut accepted, _) = listener.accept().unwrap();
            std::thread::scope(|threads| {
                // It waits for what has not come yet.
                let reading = threads.spawn(|| {
                    let mut buffer = [0; 5];
                    stream.read_exact(&mut buffer).map(|()| buffer)
                });
                accepted.write_all(b"hello").unwrap();
                assert_eq!(&reading.join().unwrap().unwrap(), b"hello");
            });
        }
    }

    #[test]
    fn a_destination_without_a_listener_refuses() {
        for limit in [None, Some(Duration::from_secs(60))] {
            let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let error = connect(socket, nobody, limit).unwrap_err();
            assert!(
                matches!(&error, Error::Connect { destination, source }
                    if *destination == nobody && source.kind() == io::ErrorKind::ConnectionRefused),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_mapped_destination_is_reached_over_ipv4() {
        let to = |text: &str| Onwards::new(vec![].into(), text.parse().unwrap()).destination();
        assert_eq!(to("[::ffff:192.0.2.1]:80"), "192.0.2.1:80".parse().unwrap());
        assert_eq!(to("[2001:db8::1]:80"), "[2001:db8::1]:80".parse().unwrap());
        assert_eq!(to("192.0.2.1:80"), "192.0.2.1:80".parse().unwrap());
    }
}

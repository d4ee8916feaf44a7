//! UDP: the flow that a datagram's source stands for, and sending onwards.

use crate::{AsSocket, Error, Onwards, Operation, original_destination};
use socket2::Type;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// A UDP flow, as a service asks about it: what an accepted connection is for TCP.
///
/// The datagrams of each flow come to a service's registered socket from an address of the flow's own,
/// whatever clients share a port or a destination; what the socket sends to that address reaches the
/// flow's client, which sees the answer come from the destination that it asked for. So a service
/// keeps a table of flows by source address, and asks once for each:
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
/// carnet::register_listener(&socket)?;
/// let mut buffer = [0; 65_535];
/// let (length, peer) = socket.recv_from(&mut buffer)?;
/// let flow = carnet::DatagramFlow::of(peer)?;               // what accept() is for TCP
/// let app = carnet::original_app(&flow)?;                   // who sent it
/// let onward = carnet::connect_onwards_datagram(&flow)?;    // to where it was sent, with the record
/// onward.send(&buffer[..length])?;
/// let length = onward.recv(&mut buffer)?;
/// socket.send_to(&buffer[..length], peer)?;                 // the answer, through the registered socket
/// # Ok(())
/// # }
/// ```
///
/// The address of a client whose socket is connected is that of its socket, and comes to stand for another
/// flow when the socket is connected elsewhere, or is closed and another gets its port. A service that
/// keeps such a flow for long asks again now and then: another [`Flow::id`](crate::Flow::id) is another
/// flow. Source tokens (127.64.0.0/10, fd43:6172:6e65:74::/64) are drawn at random and need no such care.
///
/// All of [`query_redirect_records`](crate::query_redirect_records),
/// [`query_redirect_context`](crate::query_redirect_context), [`original_destination`],
/// [`original_app`](crate::original_app) and [`flow`](crate::flow()) take it. It holds a socket of its
/// own that is connected to the client and carries no data; what it answers stays the same until it is
/// dropped, also when the flow has ended meanwhile.
#[derive(Debug)]
pub struct DatagramFlow {
    socket: UdpSocket,
}

impl DatagramFlow {
    /// The flow whose datagrams come from `peer`, as `recvfrom` gave it on a registered socket of the
    /// calling process's service. The calling thread has to be in that socket's network namespace.
    ///
    /// # Errors
    /// [`Error::NotRedirected`] if `peer` is no flow of this service: somebody sent to the service's
    /// port directly, or the flow has ended. [`Error::NoEngine`]; [`Error::Connect`],
    /// [`Error::Blocked`] and [`Error::Loop`] if `peer` is none and cannot be connected to;
    /// [`Error::Os`] if there is no descriptor left. [`Error::Unsupported`] on Windows, where records
    /// come with the datagrams (contract U1).
    pub fn of(peer: SocketAddr) -> Result<Self, Error> {
        let operation = Operation::FindDatagramFlow;
        if cfg!(windows) {
            return Err(Error::Unsupported { operation });
        }
        let failed = |source: io::Error| Error::Os { operation, source };
        // A client of IPv4 is one to sockets of IPv6 too.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let socket = UdpSocket::bind(any_port(peer)).map_err(failed)?;
        socket.connect(peer).map_err(|source| Error::from_connect(peer, source))?;
        let flow = Self { socket };
        match original_destination(&flow) {
            Ok(_) => Ok(flow),
            Err(Error::NotRedirected { .. }) => Err(Error::NotRedirected { operation }),
            Err(error) => Err(error),
        }
    }
}

#[cfg(unix)]
impl AsSocket for DatagramFlow {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(windows)]
impl AsSocket for DatagramFlow {
    fn as_socket(&self) -> std::os::windows::io::BorrowedSocket<'_> {
        self.socket.as_socket()
    }
}

fn any_port(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// A UDP socket that carries the flow's redirect record and is connected to its original destination.
/// What is sent on it is inspected by the services that are still to come.
///
/// # Errors
/// Those of [`query_redirect_records`](crate::query_redirect_records) about `flow`; those of
/// [`set_redirect_records`](crate::set_redirect_records); [`Error::Connect`], [`Error::Blocked`] and
/// [`Error::Loop`] for the connection itself.
pub fn connect_onwards_datagram(flow: &impl AsSocket) -> Result<UdpSocket, Error> {
    Onwards::of(flow)?.connect_datagram()
}

impl Onwards {
    /// Makes the socket of a UDP flow and connects it. That never takes long: nothing is sent, and
    /// [`Onwards::timeout`] does not matter.
    ///
    /// # Errors
    /// Those of [`Onwards::connect`].
    pub fn connect_datagram(&self) -> Result<UdpSocket, Error> {
        let destination = self.destination();
        let socket: UdpSocket = self.socket(Type::DGRAM)?.into();
        socket.connect(destination).map_err(|source| Error::from_connect(destination, source))?;
        Ok(socket)
    }
}

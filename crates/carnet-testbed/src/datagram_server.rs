//! A UDP server that a test can recognise: every answer says which of its addresses was reached.

use std::{
    io,
    net::{SocketAddr, UdpSocket as StdSocket},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::{net::UdpSocket, sync::oneshot, task::JoinSet};

use crate::{Error, NetworkNamespace};

/// The receive buffer of a test's sockets, in bytes, where privilege allows: bursts of small
/// datagrams, each of which takes the kernel some 800 bytes, are not to be dropped.
const BUFFER: usize = 8 << 20;
/// The largest datagram there is.
const LARGEST: usize = 65_535;

/// A datagram that a server received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedDatagram {
    /// Who sent it, as recvfrom() reports it.
    pub peer: SocketAddr,
    /// The address that it was received on.
    pub local: SocketAddr,
    /// What it says.
    pub payload: Vec<u8>,
}

/// A UDP server that answers every datagram with the same bytes and, behind them, the address that
/// was reached (see [`answer_of`]).
///
/// It serves from the moment it is made until it is dropped.
#[derive(Debug)]
pub struct DatagramServer {
    addresses: Vec<SocketAddr>,
    journal: Arc<Journal>,
    /// Dropping the sender is the request to stop.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What the [`DatagramServer`] at an address answers to a payload.
#[must_use]
pub fn answer_of(server: SocketAddr, payload: &[u8]) -> Vec<u8> {
    [payload, b" reached ", server.to_string().as_bytes()].concat()
}

/// Gives a socket a receive buffer for bursts, as large as the caller may have it.
///
/// # Errors
/// [`Error::Io`].
pub fn widen(socket: &impl std::os::fd::AsFd) -> Result<(), Error> {
    // Without CAP_NET_ADMIN, the kernel takes the size down to what everybody may have.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, BUFFER).is_err() {
        SockRef::from(socket)
            .set_recv_buffer_size(BUFFER)
            .map_err(Error::io("widen the receive buffer of", "a socket"))?;
    }
    Ok(())
}

impl DatagramServer {
    /// Serves addresses of the calling thread's network namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// [`Error::Io`] if an address cannot be bound; [`Error::Argument`] without any address.
    pub fn start(addresses: impl IntoIterator<Item = SocketAddr>) -> Result<Self, Error> {
        Self::serve(bind(addresses)?, answer_of)
    }

    /// Serves addresses of a network namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_in(
        namespace: &NetworkNamespace,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Self, Error> {
        Self::start_with(namespace, addresses, answer_of)
    }

    /// The same, with another answer: what `answer` makes of the address that was reached and the
    /// payload.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(
        namespace: &NetworkNamespace,
        addresses: impl IntoIterator<Item = SocketAddr>,
        answer: fn(SocketAddr, &[u8]) -> Vec<u8>,
    ) -> Result<Self, Error> {
        let addresses: Vec<_> = addresses.into_iter().collect();
        Self::serve(namespace.run(|| bind(addresses))??, answer)
    }

    fn serve(
        sockets: Vec<StdSocket>,
        answer: fn(SocketAddr, &[u8]) -> Vec<u8>,
    ) -> Result<Self, Error> {
        let failed = || Error::io("start", "a test server");
        let addresses = sockets
            .iter()
            .map(StdSocket::local_addr)
            .collect::<io::Result<Vec<_>>>()
            .map_err(failed())?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed())?;
        let sockets = {
            let _context = runtime.enter();
            sockets
                .into_iter()
                .map(UdpSocket::from_std)
                .collect::<io::Result<Vec<_>>>()
                .map_err(failed())?
        };
        let journal = Arc::new(Journal::default());
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name(format!("server {}", addresses[0]))
            .spawn({
                let (addresses, journal) = (addresses.clone(), Arc::clone(&journal));
                move || {
                    runtime.block_on(async {
                        let mut serving = JoinSet::new();
                        for (socket, local) in sockets.into_iter().zip(addresses) {
                            serving.spawn(serve(socket, local, answer, Arc::clone(&journal)));
                        }
                        // The sender never sends: this is its end.
                        let _ = stopped.await;
                    });
                }
            })
            .map_err(failed())?;
        Ok(Self { addresses, journal, stop: Some(stop), thread: Some(thread) })
    }

    /// The first address that it serves, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// All addresses that it serves, with the actual ports, in the order of the call.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The datagrams received so far, in order of each address.
    #[must_use]
    pub fn datagrams(&self) -> Vec<ReceivedDatagram> {
        self.journal.lock().clone()
    }

    /// Waits until the datagrams received so far satisfy a predicate, and returns them.
    ///
    /// # Errors
    /// [`Error::TimedOut`], with `what` in its message.
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        satisfied: impl Fn(&[ReceivedDatagram]) -> bool,
    ) -> Result<Vec<ReceivedDatagram>, Error> {
        let (datagrams, _) = self
            .journal
            .changed
            .wait_timeout_while(self.journal.lock(), timeout, |datagrams| !satisfied(datagrams))
            .unwrap_or_else(PoisonError::into_inner);
        if satisfied(&datagrams) {
            return Ok(datagrams.clone());
        }
        let what = format!("{what}; there are {datagrams:?}");
        Err(Error::TimedOut { what, after: timeout })
    }
}

impl Drop for DatagramServer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed by its thread.
            let _ = thread.join();
        }
    }
}

fn bind(addresses: impl IntoIterator<Item = SocketAddr>) -> Result<Vec<StdSocket>, Error> {
    let sockets = addresses
        .into_iter()
        .map(|address| {
            let socket = bind_one(address).map_err(Error::io("bind", address))?;
            widen(&socket)?;
            Ok(socket)
        })
        .collect::<Result<Vec<_>, _>>()?;
    if sockets.is_empty() {
        return Err(Error::argument("", "an address to serve"));
    }
    Ok(sockets)
}

fn bind_one(address: SocketAddr) -> io::Result<StdSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    if address.is_ipv6() {
        // So that a server may have the same port of an IPv4 wildcard as well.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

async fn serve(
    socket: UdpSocket,
    local: SocketAddr,
    answer: fn(SocketAddr, &[u8]) -> Vec<u8>,
    journal: Arc<Journal>,
) {
    let mut buffer = vec![0; LARGEST];
    loop {
        // What recvfrom() can report is that an earlier answer found nobody.
        if let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let payload = &buffer[..length];
            let answer = answer(local, payload);
            // In the journal before the client can know.
            journal.enter(ReceivedDatagram { peer, local, payload: payload.to_vec() });
            let _ = socket.send_to(&answer, peer).await;
        }
    }
}

/// What a server has seen.
#[derive(Debug, Default)]
struct Journal {
    datagrams: Mutex<Vec<ReceivedDatagram>>,
    changed: Condvar,
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Vec<ReceivedDatagram>> {
        self.datagrams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, datagram: ReceivedDatagram) {
        self.lock().push(datagram);
        self.changed.notify_all();
    }
}

//! Servers that a test can recognise: one that echoes, and one that says its name.

use std::{
    io::{self, BufRead as _, BufReader},
    net::{Shutdown, SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::{
    Error, NetworkNamespace,
    exchange::{ConnectOptions, connect},
};

/// How many connections a server serves at a time; more wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 4096;
/// How long a connection may be idle before it is given up.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// The longest name that [`name_at`] reads, in bytes.
const LONGEST_NAME: u64 = 256;

/// How a connection that a server accepted stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// Being served.
    Open,
    /// Ended by both sides in order.
    Finished,
    /// Broken off, for example by a reset, or idle for too long.
    Failed(io::ErrorKind),
}

/// A connection that a server accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptedConnection {
    /// Who connected, as accept() reports it.
    pub peer: SocketAddr,
    /// The address that it was accepted on, as getsockname() reports it.
    pub local: SocketAddr,
    /// How many bytes have been received on it.
    pub received: u64,
    /// How it stands.
    pub state: ConnectionState,
}

/// A TCP server that sends nothing of its own accord and everything it receives, and ends its half
/// of a connection when the client has ended the other one.
///
/// It listens from the moment it is made until it is dropped, which breaks off its connections.
#[derive(Debug)]
pub struct EchoServer(Server);

/// A TCP server that greets each connection with `NAME\n`, ends its half, and waits for the other
/// end: whoever reads the name (see [`name_at`]) knows which server it has reached.
///
/// It listens from the moment it is made until it is dropped.
#[derive(Debug)]
pub struct NamedServer {
    name: String,
    server: Server,
}

impl EchoServer {
    /// Listens in the calling thread's network namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// [`Error::Io`] if an address cannot be bound; [`Error::Argument`] without any address.
    pub fn start(addresses: impl IntoIterator<Item = SocketAddr>) -> Result<Self, Error> {
        Ok(Self(Server::start(listen(addresses, Protocol::TCP)?, Behaviour::Echo)?))
    }

    /// Listens inside a network namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_in(
        namespace: &NetworkNamespace,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Self, Error> {
        let addresses: Vec<_> = addresses.into_iter().collect();
        // The listeners belong to the namespace; the thread that serves them need not be inside.
        let listeners = namespace.run(|| listen(addresses, Protocol::TCP))??;
        Ok(Self(Server::start(listeners, Behaviour::Echo)?))
    }

    /// As [`start`](Self::start), with Multipath TCP sockets, which also serve plain TCP clients.
    ///
    /// # Errors
    /// As [`start`](Self::start); [`Error::Io`] also if the kernel has no Multipath TCP.
    pub fn start_multipath(addresses: impl IntoIterator<Item = SocketAddr>) -> Result<Self, Error> {
        Ok(Self(Server::start(listen(addresses, Protocol::MPTCP)?, Behaviour::Echo)?))
    }

    /// The first address that it listens on, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.addresses[0]
    }

    /// All addresses that it listens on, with the actual ports, in the order of the call.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.0.addresses
    }

    /// The connections accepted so far, in order.
    #[must_use]
    pub fn connections(&self) -> Vec<AcceptedConnection> {
        self.0.journal.lock().clone()
    }

    /// Waits until the connections accepted so far satisfy a predicate, and returns them.
    ///
    /// # Errors
    /// [`Error::TimedOut`], with `what` in its message.
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        satisfied: impl Fn(&[AcceptedConnection]) -> bool,
    ) -> Result<Vec<AcceptedConnection>, Error> {
        self.0.journal.wait_for(what, timeout, satisfied)
    }

    /// Waits until at least `count` connections have come, and none is open any more.
    ///
    /// # Errors
    /// [`Error::TimedOut`].
    pub fn wait_for_finished(
        &self,
        count: usize,
        timeout: Duration,
    ) -> Result<Vec<AcceptedConnection>, Error> {
        self.wait_for(&format!("{count} finished connections"), timeout, |connections| {
            connections.len() >= count
                && connections.iter().all(|one| one.state != ConnectionState::Open)
        })
    }
}

impl NamedServer {
    /// Listens in the calling thread's network namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// [`Error::Argument`] if the name is empty, has more than 255 bytes or a line end, or without
    /// any address; [`Error::Io`] if an address cannot be bound.
    pub fn start(
        name: &str,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Self, Error> {
        check_name(name)?;
        Self::serve(name, listen(addresses, Protocol::TCP)?)
    }

    /// Listens inside a network namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_in(
        namespace: &NetworkNamespace,
        name: &str,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Self, Error> {
        check_name(name)?;
        let addresses: Vec<_> = addresses.into_iter().collect();
        Self::serve(name, namespace.run(|| listen(addresses, Protocol::TCP))??)
    }

    fn serve(name: &str, listeners: Vec<StdListener>) -> Result<Self, Error> {
        let greeting = format!("{name}\n").into_bytes().into();
        let server = Server::start(listeners, Behaviour::Greet(greeting))?;
        Ok(Self { name: name.into(), server })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first address that it listens on, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.addresses[0]
    }

    /// All addresses that it listens on, with the actual ports, in the order of the call.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.server.addresses
    }

    /// The connections accepted so far, in order.
    #[must_use]
    pub fn connections(&self) -> Vec<AcceptedConnection> {
        self.server.journal.lock().clone()
    }
}

/// Connects to a [`NamedServer`] from the calling thread's network namespace, and returns its name.
///
/// # Errors
/// As connect() and read() give them; `InvalidData` if what comes is not a line.
pub fn name_at(address: SocketAddr) -> io::Result<String> {
    let options = ConnectOptions { timeout: Duration::from_secs(10), ..ConnectOptions::default() };
    let stream: StdStream = connect(address, &options)?;
    let mut line = String::new();
    BufReader::new(io::Read::take(stream, LONGEST_NAME)).read_line(&mut line)?;
    match line.strip_suffix('\n') {
        Some(name) => Ok(name.into()),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{address} sent {line:?} instead of a name and a line end"),
        )),
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    if name.is_empty() || name.len() as u64 >= LONGEST_NAME || name.contains('\n') {
        return Err(Error::argument(name, "a server name (1 to 255 bytes, one line)"));
    }
    Ok(())
}

/// Binds and listens.
fn listen(
    addresses: impl IntoIterator<Item = SocketAddr>,
    protocol: Protocol,
) -> Result<Vec<StdListener>, Error> {
    let listeners = addresses
        .into_iter()
        .map(|address| listen_on(address, protocol).map_err(Error::io("listen on", address)))
        .collect::<Result<Vec<_>, _>>()?;
    if listeners.is_empty() {
        return Err(Error::argument("", "an address to listen on"));
    }
    Ok(listeners)
}

fn listen_on(address: SocketAddr, protocol: Protocol) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    // The kernel takes this down to net.core.somaxconn.
    socket.listen(i32::MAX)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// What a server does with a connection.
#[derive(Clone, Debug)]
enum Behaviour {
    Echo,
    Greet(Arc<[u8]>),
}

/// Listeners and the thread that serves them.
#[derive(Debug)]
struct Server {
    addresses: Vec<SocketAddr>,
    journal: Arc<Journal>,
    /// Dropping the sender is the request to stop.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn start(listeners: Vec<StdListener>, behaviour: Behaviour) -> Result<Self, Error> {
        let failed = || Error::io("start", "a test server");
        let addresses = listeners
            .iter()
            .map(StdListener::local_addr)
            .collect::<io::Result<Vec<_>>>()
            .map_err(failed())?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed())?;
        let journal = Arc::new(Journal::default());
        let listeners = {
            let _context = runtime.enter();
            listeners
                .into_iter()
                .map(TcpListener::from_std)
                .collect::<io::Result<Vec<_>>>()
                .map_err(failed())?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name(format!("server {}", addresses[0]))
            .spawn({
                let journal = Arc::clone(&journal);
                // When the runtime is dropped here, so are all connections.
                move || runtime.block_on(serve(listeners, behaviour, journal, stopped))
            })
            .map_err(failed())?;
        Ok(Self { addresses, journal, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed by its thread.
            let _ = thread.join();
        }
    }
}

async fn serve(
    listeners: Vec<TcpListener>,
    behaviour: Behaviour,
    journal: Arc<Journal>,
    stopped: oneshot::Receiver<()>,
) {
    let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
    let free = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut acceptors = JoinSet::new();
    for listener in listeners.iter().map(Arc::clone) {
        let (behaviour, journal, free) =
            (behaviour.clone(), Arc::clone(&journal), Arc::clone(&free));
        acceptors.spawn(accept_all(listener, behaviour, journal, free));
    }
    // The sender never sends: this is its end.
    let _ = stopped.await;
    for listener in &listeners {
        // Closing alone leaves it listening while a child that another thread is just forking still
        // has a copy. It fails only for a listener that does not listen any more.
        let _ = SockRef::from(&**listener).shutdown(Shutdown::Both);
    }
}

async fn accept_all(
    listener: Arc<TcpListener>,
    behaviour: Behaviour,
    journal: Arc<Journal>,
    free: Arc<Semaphore>,
) {
    let mut connections = JoinSet::new();
    // The semaphore is never closed, so this does not end of itself.
    while let Ok(permit) = Arc::clone(&free).acquire_owned().await {
        while connections.try_join_next().is_some() {}
        // What accept() can report is about one connection that is gone already.
        if let Ok((stream, peer)) = listener.accept().await
            && let Ok(local) = stream.local_addr()
        {
            let number = journal.open(peer, local);
            connections.spawn(attend(
                stream,
                behaviour.clone(),
                Arc::clone(&journal),
                number,
                permit,
            ));
        }
    }
}

async fn attend(
    mut stream: TcpStream,
    behaviour: Behaviour,
    journal: Arc<Journal>,
    number: usize,
    _permit: OwnedSemaphorePermit,
) {
    let result = converse(&mut stream, &behaviour, &journal, number).await;
    // Closed before it is reported as such.
    drop(stream);
    journal.change(number, |connection| {
        connection.state = match result {
            Ok(()) => ConnectionState::Finished,
            Err(error) => ConnectionState::Failed(error.kind()),
        };
    });
}

async fn converse(
    stream: &mut TcpStream,
    behaviour: &Behaviour,
    journal: &Journal,
    number: usize,
) -> io::Result<()> {
    if let Behaviour::Greet(greeting) = behaviour {
        timeout(IDLE_LIMIT, stream.write_all(greeting)).await??;
        stream.shutdown().await?;
    }
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = timeout(IDLE_LIMIT, stream.read(&mut buffer)).await??;
        if length == 0 {
            break;
        }
        journal.change(number, |connection| connection.received += length as u64);
        if let Behaviour::Echo = behaviour {
            timeout(IDLE_LIMIT, stream.write_all(&buffer[..length])).await??;
        }
    }
    if let Behaviour::Echo = behaviour {
        stream.shutdown().await?;
    }
    Ok(())
}

/// What a server has seen.
#[derive(Debug, Default)]
struct Journal {
    connections: Mutex<Vec<AcceptedConnection>>,
    changed: Condvar,
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Vec<AcceptedConnection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a new connection and returns its number.
    fn open(&self, peer: SocketAddr, local: SocketAddr) -> usize {
        let mut connections = self.lock();
        connections.push(AcceptedConnection {
            peer,
            local,
            received: 0,
            state: ConnectionState::Open,
        });
        self.changed.notify_all();
        connections.len() - 1
    }

    fn change(&self, number: usize, change: impl FnOnce(&mut AcceptedConnection)) {
        if let Some(connection) = self.lock().get_mut(number) {
            change(connection);
        }
        self.changed.notify_all();
    }

    fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        satisfied: impl Fn(&[AcceptedConnection]) -> bool,
    ) -> Result<Vec<AcceptedConnection>, Error> {
        let (connections, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, |connections| !satisfied(connections))
            .unwrap_or_else(PoisonError::into_inner);
        if satisfied(&connections) {
            return Ok(connections.clone());
        }
        let what = format!("{what}; there are {connections:?}");
        Err(Error::TimedOut { what, after: timeout })
    }
}

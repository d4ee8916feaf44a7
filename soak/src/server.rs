//! The process `server`: the destination of all flows, which judges each that arrives.

use std::cell::RefCell;
use std::io::{Read as _, stdin};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use crate::board::Board;
use crate::proof::{Arrival, Fault, HELLO_BYTES, MOST_MARKS};

/// How often it tells what it has seen.
const TELLING: Duration = Duration::from_secs(1);
/// How many faults are described.
const DESCRIBED: usize = 20;

/// How to start it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The addresses at which it serves, TCP and UDP.
    #[arg(long)]
    at: Vec<SocketAddr>,
    /// The board.
    #[arg(long)]
    board: PathBuf,
    /// The IPv4 addresses from which services connect; what comes from others has passed none.
    #[arg(long)]
    source: Vec<IpAddr>,
}

/// What the server has seen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Connections that said hello.
    pub(crate) connections: u64,
    /// Datagrams that are a hello.
    pub(crate) datagrams: u64,
    /// Connections that ended before they said anything: clients gave up.
    pub(crate) silent: u64,
    /// Flows that did not pass a service that was required, or came past all of them.
    pub(crate) uninspected: u64,
    /// Flows that passed a service twice.
    pub(crate) twice: u64,
    /// Flows that passed a service for which no filter was, and whatever else must not be.
    pub(crate) unasked: u64,
    /// The first of all that is wrong.
    pub(crate) faults: Vec<String>,
}

/// Runs it until the standard input ends. Prints "ready", and then what it has seen, again and again.
///
/// # Errors
/// When it cannot serve.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    carnet_testbed::datagrams::raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let board = Board::open(&arguments.board)?;
        let seen = RefCell::new(Seen::default());
        let server = Rc::new(Server { board, sources: arguments.source, seen });
        for address in arguments.at {
            let listener = std::net::TcpListener::bind(address)?;
            rustix::net::listen(&listener, 4096)?;
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let socket = UdpSocket::bind(address).await?;
            carnet_testbed::widen(&socket)?;
            let at_tcp = Rc::clone(&server);
            tokio::task::spawn_local(async move {
                loop {
                    if let Ok((stream, peer)) = listener.accept().await {
                        tokio::task::spawn_local(Rc::clone(&at_tcp).serve(stream, peer));
                    }
                }
            });
            tokio::task::spawn_local(Rc::clone(&server).answer(socket));
        }
        println!("ready");
        let (ended, mut end) = tokio::sync::oneshot::channel();
        thread::spawn(move || {
            // Whatever comes of it, the orchestrator has gone, or wants this process to end.
            let _ = stdin().read_to_end(&mut Vec::new());
            ended.send(())
        });
        loop {
            let ends = tokio::time::timeout(TELLING, &mut end).await.is_ok();
            println!("{}", serde_json::to_string(&*server.seen.borrow())?);
            if ends {
                return Ok(());
            }
        }
    })
}

struct Server {
    board: Board,
    sources: Vec<IpAddr>,
    seen: RefCell<Seen>,
}

impl Server {
    /// Serves a connection: judges it, answers, and echoes what follows if it is to stay.
    async fn serve(self: Rc<Self>, mut stream: TcpStream, peer: SocketAddr) {
        let direct = self.is_direct(peer);
        let mut buffer = [0; MOST_MARKS + HELLO_BYTES + 256];
        let mut filled = 0;
        let (arrival, used) = loop {
            match Arrival::read(&buffer[..filled]) {
                Ok(Some(arrival)) => break arrival,
                Ok(None) => {}
                Err(error) => return self.note(Fault::Unknown, format!("{error:#}")),
            }
            match stream.read(&mut buffer[filled..]).await {
                Ok(length) if length > 0 => filled += length,
                _ => {
                    self.seen.borrow_mut().silent += 1;
                    if direct {
                        self.note(Fault::Direct, format!("a silent connection from {peer}"));
                    }
                    return;
                }
            }
        };
        self.seen.borrow_mut().connections += 1;
        self.judge(&arrival, direct, "connection", peer);
        if stream.write_all(&arrival.answer()).await.is_err() {
            return;
        }
        if !arrival.hello.stays || stream.write_all(&buffer[used..filled]).await.is_err() {
            return;
        }
        while let Ok(length) = stream.read(&mut buffer).await {
            if length == 0 || stream.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    /// Answers datagrams, each of which is a hello.
    async fn answer(self: Rc<Self>, socket: UdpSocket) {
        let mut buffer = [0; MOST_MARKS + HELLO_BYTES];
        loop {
            // Errors are earlier answers that found nobody.
            let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
            match Arrival::read(&buffer[..length]) {
                Ok(Some((arrival, _))) => {
                    self.seen.borrow_mut().datagrams += 1;
                    self.judge(&arrival, self.is_direct(peer), "datagram", peer);
                    let _ = socket.try_send_to(&arrival.answer(), peer);
                }
                Ok(None) => self.note(Fault::Unknown, format!("{length} bytes from {peer}")),
                Err(error) => self.note(Fault::Unknown, format!("{error:#}")),
            }
        }
    }

    /// Whether a flow has passed no service. Over IPv6 services have no addresses of their own.
    fn is_direct(&self, peer: SocketAddr) -> bool {
        peer.is_ipv4() && !self.sources.contains(&peer.ip())
    }

    fn judge(&self, arrival: &Arrival, direct: bool, what: &str, peer: SocketAddr) {
        let now = match self.board.read() {
            Ok(now) => now,
            Err(error) => return self.note(Fault::Unknown, format!("{error:#}")),
        };
        let faults = arrival.faults(&now);
        for fault in faults.into_iter().chain(direct.then_some(Fault::Direct)) {
            let description =
                format!("{fault:?}: a {what} from {peer}: {arrival:?}; demanded now: {now:?}");
            self.note(fault, description);
        }
    }

    fn note(&self, fault: Fault, description: String) {
        let mut seen = self.seen.borrow_mut();
        match fault {
            Fault::Uninspected | Fault::Direct => seen.uninspected += 1,
            Fault::Twice => seen.twice += 1,
            Fault::Unasked | Fault::Unknown => seen.unasked += 1,
        }
        if seen.faults.len() < DESCRIBED {
            seen.faults.push(description);
        }
    }
}

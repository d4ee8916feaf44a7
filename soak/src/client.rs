//! The process `client`: threads that make flows as fast as they can, each of which is checked.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _, stdin};
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use crate::board::Board;
use crate::churn;
use crate::proof::{Hello, had_to_fail, may_fail};
use crate::site::REFUSED_PORT;

/// How long a connection, or an answer on it, may take.
const LIMIT: Duration = Duration::from_secs(90);
/// After how long a datagram is sent again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often a datagram is sent at most.
const TRIES: u32 = 180;
/// How often the process tells what it has done.
const TELLING: Duration = Duration::from_secs(1);
/// How many faults are described in full.
const DESCRIBED: usize = 20;
/// How long a client rests that was refused.
const REST: Duration = Duration::from_millis(2);

/// How to start it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the server is; those at the refused port among them.
    #[arg(long)]
    to: Vec<SocketAddr>,
    /// The board.
    #[arg(long)]
    board: PathBuf,
    /// What chance begins with.
    #[arg(long)]
    seed: u64,
    /// Threads that make short connections.
    #[arg(long, default_value_t = 6)]
    short: u32,
    /// Threads whose connections live for seconds.
    #[arg(long, default_value_t = 24)]
    long: u32,
    /// Threads whose connections are broken off.
    #[arg(long, default_value_t = 2)]
    aborted: u32,
    /// Threads that make UDP flows.
    #[arg(long, default_value_t = 4)]
    datagrams: u32,
}

impl Arguments {
    /// Those that say the same.
    pub(crate) fn new(to: Vec<SocketAddr>, board: PathBuf, seed: u64) -> Self {
        Self { to, board, seed, short: 6, long: 24, aborted: 2, datagrams: 4 }
    }

    /// As words of a command line.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = vec!["client".into(), "--board".into(), self.board.display().to_string()];
        words.extend(self.to.iter().flat_map(|to| ["--to".into(), to.to_string()]));
        for (name, value) in [
            ("--seed", self.seed),
            ("--short", self.short.into()),
            ("--long", self.long.into()),
            ("--aborted", self.aborted.into()),
            ("--datagrams", self.datagrams.into()),
        ] {
            words.extend([name.into(), value.to_string()]);
        }
        words
    }
}

/// What the clients have done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Short connections that were answered.
    pub(crate) short: u64,
    /// Long ones that came to their end.
    pub(crate) long: u64,
    /// Connections that were broken off.
    pub(crate) aborted: u64,
    /// UDP flows that were answered.
    pub(crate) datagrams: u64,
    /// Flows that failed since the policy refused them or a service was killed.
    pub(crate) excused: u64,
    /// Flows that failed without that.
    pub(crate) lost: u64,
    /// How many of the lost there are of each class: what they were, how they failed, what happened when
    /// they began and when they failed.
    pub(crate) losses: BTreeMap<String, u64>,
    /// Flows that were answered although they had to be refused.
    pub(crate) unrefused: u64,
    /// The first of the faults.
    pub(crate) faults: Vec<String>,
}

impl Done {
    /// All flows.
    pub(crate) fn flows(&self) -> u64 {
        self.short + self.long + self.aborted + self.datagrams + self.excused + self.lost
    }

    /// Both together.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.short += other.short;
        self.long += other.long;
        self.aborted += other.aborted;
        self.datagrams += other.datagrams;
        self.excused += other.excused;
        self.lost += other.lost;
        for (class, count) in &other.losses {
            *self.losses.entry(class.clone()).or_default() += count;
        }
        self.unrefused += other.unrefused;
        self.faults.extend(other.faults.iter().cloned());
        self
    }
}

/// Runs until the standard input ends, and lets the flows that there are then come to their ends. Prints
/// what has been done, again and again.
///
/// # Errors
/// When the board cannot be read.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let board = Board::open(&arguments.board)?;
    let clients = &Clients {
        board,
        to: arguments.to.clone(),
        ends: AtomicBool::new(false),
        next: AtomicU64::new(arguments.seed << 32),
        done: Mutex::default(),
    };
    let kinds = [
        (arguments.short, Clients::short as Kind),
        (arguments.long, Clients::long),
        (arguments.aborted, Clients::aborted),
        (arguments.datagrams, Clients::datagrams),
    ];
    thread::scope(|scope| {
        let mut chance = fastrand::Rng::with_seed(arguments.seed);
        let mut threads = Vec::new();
        for (count, kind) in kinds {
            for _ in 0..count {
                let chance = chance.fork();
                threads.push(scope.spawn(move || clients.repeat(kind, chance)));
            }
        }
        scope.spawn(|| {
            // Whatever comes of it, the orchestrator has gone, or wants this process to end.
            let _ = stdin().read_to_end(&mut Vec::new());
            clients.ends.store(true, Ordering::Relaxed);
        });
        let mut told = Instant::now();
        while !threads.iter().all(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(50));
            if told.elapsed() > TELLING {
                told = Instant::now();
                clients.tell()?;
            }
        }
        clients.tell()
    })
}

type Kind = fn(&Clients, &mut fastrand::Rng, &Flow) -> io::Result<Ended>;

/// A flow that is to be made.
struct Flow {
    to: SocketAddr,
    hello: Hello,
}

/// How a flow ended that did not fail.
enum Ended {
    Short,
    Long,
    Aborted,
    Datagrams,
}

struct Clients {
    board: Board,
    to: Vec<SocketAddr>,
    ends: AtomicBool,
    next: AtomicU64,
    done: Mutex<Done>,
}

impl Clients {
    fn tell(&self) -> Result<()> {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        println!("{}", serde_json::to_string(&*done)?);
        Ok(())
    }

    /// Makes flows of a kind until it is to end.
    fn repeat(&self, kind: Kind, mut chance: fastrand::Rng) -> Result<()> {
        while !self.ends.load(Ordering::Relaxed) {
            let demand = self.board.read()?;
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let to = *chance.choice(&self.to).context("no destination")?;
            let flow = Flow { to, hello: Hello { demand, stays: false, number } };
            let happened = self.board.happening()?;
            let began = Instant::now();
            let result = kind(self, &mut chance, &flow);
            let now = self.board.read()?;
            let refusable = to.port() == REFUSED_PORT;
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            let described = |what: &str| {
                let took = began.elapsed();
                format!(
                    "{what} after {took:?}: to {to}; demanded before: {demand:?}; after: {now:?}"
                )
            };
            match result {
                Ok(ended) => {
                    match ended {
                        Ended::Short => done.short += 1,
                        Ended::Long => done.long += 1,
                        Ended::Aborted => done.aborted += 1,
                        Ended::Datagrams => done.datagrams += 1,
                    }
                    if !matches!(ended, Ended::Aborted) && had_to_fail(&demand, &now, refusable) {
                        done.unrefused += 1;
                        if done.faults.len() < DESCRIBED {
                            done.faults.push(described("not refused"));
                        }
                    }
                }
                Err(_) if may_fail(&demand, &now, refusable) => {
                    done.excused += 1;
                    drop(done);
                    thread::sleep(REST);
                }
                Err(error) => {
                    let happens = churn::named(self.board.happening()?);
                    let began_while = churn::named(happened);
                    let class = format!("{error}, from \"{began_while}\" to \"{happens}\"");
                    done.lost += 1;
                    *done.losses.entry(class).or_default() += 1;
                    if done.faults.len() < DESCRIBED {
                        done.faults.push(described(&format!("lost ({error})")));
                    }
                }
            }
        }
        Ok(())
    }

    fn connect(flow: &Flow) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(flow.to), Type::STREAM, None)?;
        socket.connect_timeout(&flow.to.into(), LIMIT).map_err(|error| at("connecting", &error))?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.set_write_timeout(Some(LIMIT))?;
        Ok(socket)
    }

    /// A hello, its answer, and the server closes.
    fn short(&self, _chance: &mut fastrand::Rng, flow: &Flow) -> io::Result<Ended> {
        let mut socket = Self::connect(flow)?;
        socket.write_all(&flow.hello.to_bytes()).map_err(|error| at("short, hello", &error))?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).map_err(|error| at("short, answer", &error))?;
        check_answer(&answer, flow)?;
        Ok(Ended::Short)
    }

    /// A hello, and then an echo now and then for some seconds.
    fn long(&self, chance: &mut fastrand::Rng, flow: &Flow) -> io::Result<Ended> {
        let mut socket = Self::connect(flow)?;
        let hello = Hello { stays: true, ..flow.hello };
        socket.write_all(&hello.to_bytes()).map_err(|error| at("long, hello", &error))?;
        let mut count = [0];
        socket.read_exact(&mut count).map_err(|error| at("long, answer", &error))?;
        let mut rest = vec![0; usize::from(count[0]) + 8];
        socket.read_exact(&mut rest).map_err(|error| at("long, answer", &error))?;
        check_answer(&[&count[..], &rest].concat(), flow)?;
        let end = Instant::now() + Duration::from_millis(chance.u64(200..20_000));
        while Instant::now() < end && !self.ends.load(Ordering::Relaxed) {
            let mut sent = vec![0; chance.usize(1..8000)];
            chance.fill(&mut sent);
            socket.write_all(&sent).map_err(|error| at("long, sending", &error))?;
            let mut echoed = vec![0; sent.len()];
            socket.read_exact(&mut echoed).map_err(|error| at("long, echo", &error))?;
            if echoed != sent {
                return Err(io::Error::other("the echo is another one"));
            }
            thread::sleep(Duration::from_millis(chance.u64(10..200)));
        }
        Ok(Ended::Long)
    }

    /// A connection that is broken off by a reset, before or after it is there. Whatever it meets then
    /// is right.
    fn aborted(&self, chance: &mut fastrand::Rng, flow: &Flow) -> io::Result<Ended> {
        let socket = Socket::new(Domain::for_address(flow.to), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_linger(Some(Duration::ZERO))?;
        let in_progress = rustix::io::Errno::INPROGRESS.raw_os_error();
        match socket.connect(&flow.to.into()) {
            Err(error) if error.raw_os_error() != Some(in_progress) => {
                return Err(at("broken off, connecting", &error));
            }
            _ => {}
        }
        let after = chance.u64(0..2000);
        if after > 500 {
            thread::sleep(Duration::from_micros(after));
            let _ = (&socket).write_all(&flow.hello.to_bytes());
        }
        Ok(Ended::Aborted)
    }

    /// A hello in a datagram, again and again until it is answered.
    fn datagrams(&self, chance: &mut fastrand::Rng, flow: &Flow) -> io::Result<Ended> {
        let any = if flow.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(AGAIN))?;
        let connects = chance.bool();
        if connects {
            socket.connect(flow.to)?;
        }
        let hello = flow.hello.to_bytes();
        let mut buffer = [0; 64];
        for _ in 0..TRIES {
            let sent = if connects { socket.send(&hello) } else { socket.send_to(&hello, flow.to) };
            sent.map_err(|error| at("UDP, sending", &error))?;
            match socket.recv_from(&mut buffer) {
                Ok((length, from)) if from == flow.to => {
                    check_answer(&buffer[..length], flow)?;
                    return Ok(Ended::Datagrams);
                }
                Ok((_, from)) => return Err(io::Error::other(format!("an answer from {from}"))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(at("UDP, answer", &error)),
            }
        }
        Err(at("UDP, answer", &io::ErrorKind::TimedOut.into()))
    }
}

/// An error, with what the flow was about to do.
fn at(step: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{step}: {error}"))
}

/// Checks that this is the answer to a flow's hello.
fn check_answer(answer: &[u8], flow: &Flow) -> io::Result<()> {
    read_answer(answer, flow.hello.number).map_err(|error| io::Error::other(format!("{error:#}")))
}

fn read_answer(answer: &[u8], expected: u64) -> Result<()> {
    let count = usize::from(*answer.first().context("no answer")?);
    let number = answer.get(1 + count..).context("half an answer")?;
    let number = u64::from_le_bytes(number.try_into().context("half an answer")?);
    if number != expected {
        bail!("the answer to another flow");
    }
    Ok(())
}

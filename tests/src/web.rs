//! The web at both ends of a chain of proxies: a server that notes what was asked of it, and a client
//! process whose flows can be told apart wherever they are logged, by the path that each asks for.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use carnet_testbed::{NetworkNamespace, Process};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::{Lab, Must as _, PATIENCE, program};

/// Where web servers listen, and what filters look for.
pub const PORT: u16 = 80;

/// What was asked of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The path.
    pub path: String,
    /// Where it was asked.
    pub at: SocketAddr,
    /// Who asked.
    pub by: SocketAddr,
}

/// A web server that answers each request with the path that was asked for.
#[derive(Debug)]
pub struct WebServer {
    requests: Arc<Mutex<Vec<Request>>>,
}

impl WebServer {
    /// Starts one in a network namespace, at [`PORT`] of these addresses. Its threads end with the
    /// process.
    #[track_caller]
    pub fn start(namespace: &NetworkNamespace, addresses: &[IpAddr]) -> Self {
        let requests = Arc::new(Mutex::default());
        for address in addresses {
            let listener = namespace
                .run(|| TcpListener::bind((*address, PORT)))
                .must("enter a network namespace")
                .must("listen as a web server");
            let requests = Arc::clone(&requests);
            thread::spawn(move || {
                for connection in listener.incoming().flatten() {
                    let requests = Arc::clone(&requests);
                    // What goes wrong with a connection its client tells.
                    thread::spawn(move || serve(&connection, &requests));
                }
            });
        }
        Self { requests }
    }

    /// What has been asked so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.requests).clone()
    }

    /// Forgets what has been asked so far.
    pub fn forget(&self) {
        lock(&self.requests).clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(connection: &TcpStream, requests: &Mutex<Vec<Request>>) -> io::Result<()> {
    connection.set_read_timeout(Some(PATIENCE))?;
    let (at, by) = (connection.local_addr()?, connection.peer_addr()?);
    let mut reader = BufReader::new(connection);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut stays = true;
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let field = line.trim().to_ascii_lowercase();
            if field.is_empty() {
                break;
            }
            stays &= field != "connection: close";
        }
        lock(requests).push(Request { path: path.clone(), at, by });
        let end = if stays { "keep-alive" } else { "close" };
        let length = path.len();
        let mut answer = connection;
        write!(
            answer,
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
             Connection: {end}\r\n\r\n{path}"
        )?;
        if !stays {
            return Ok(());
        }
    }
}

/// What a client is to do: `count` flows, `workers` of them at a time, each of which asks for a path of
/// its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Where to: the flows take turns. An IPv4-mapped address is reached with an IPv6 socket.
    pub to: Vec<SocketAddr>,
    /// The number of the first flow.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// How many at a time.
    pub workers: u32,
    /// How long a connection may take.
    pub patience: Duration,
}

impl Plan {
    /// One flow after another, to one address.
    pub fn new(to: SocketAddr, count: u32) -> Self {
        let patience = Duration::from_secs(30);
        Self { to: vec![to], first: 0, count, workers: 1, patience }
    }
}

/// The path for which a flow asks.
pub fn path_of(flow: u32) -> String {
    format!("/flow-{flow}")
}

/// What became of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Its number.
    pub flow: u32,
    /// When it began, see [`now`].
    pub began: Duration,
    /// Why it failed, if it did.
    pub failure: Option<String>,
    /// The errno of a connect that failed.
    pub refused: Option<i32>,
}

/// Starts a client among a lab's.
#[track_caller]
pub fn start_client(lab: &Lab, plan: &Plan) -> Process {
    let mut command = Command::new(program("test-web-client"));
    command.arg(serde_json::to_string(plan).must("write a plan"));
    lab.apps().enter_command(&mut command).must("enter the clients' cgroup");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    Process::spawn(&mut command).must("start a web client")
}

/// Waits for a client's end; gives what became of its flows.
#[track_caller]
pub fn finish_client(mut client: Process, patience: Duration) -> Vec<Fetched> {
    let status = client.wait(patience).must("wait for a web client");
    assert!(status.success(), "the web client ended with {status}");
    let read = |line: &String| serde_json::from_str(line).must("read a web client's line");
    client.lines().iter().map(read).collect()
}

/// Runs a client to its end.
#[track_caller]
pub fn fetch(lab: &Lab, plan: &Plan) -> Vec<Fetched> {
    finish_client(start_client(lab, plan), PATIENCE)
}

/// Is a client.
pub fn be_client(plan: &Plan) {
    let next = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..plan.workers {
            scope.spawn(|| {
                loop {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    if place >= plan.count {
                        return;
                    }
                    let to = plan.to[place as usize % plan.to.len()];
                    let fetched = fetch_one(to, plan.first + place, plan.patience);
                    let line = serde_json::to_string(&fetched).unwrap_or_default();
                    println!("{line}");
                }
            });
        }
    });
}

/// The monotonic clock, which is the same in all processes.
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock begins at 0 and never goes back.
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn fetch_one(to: SocketAddr, flow: u32, patience: Duration) -> Fetched {
    let began = now();
    let connection = match TcpStream::connect_timeout(&to, patience) {
        Ok(connection) => connection,
        Err(error) => {
            let refused = error.raw_os_error();
            let failure = Some(format!("connect: {error}"));
            return Fetched { flow, began, failure, refused };
        }
    };
    let failure = ask(&connection, to, flow, patience).err().map(|error| error.to_string());
    Fetched { flow, began, failure, refused: None }
}

fn ask(
    mut connection: &TcpStream,
    to: SocketAddr,
    flow: u32,
    patience: Duration,
) -> io::Result<()> {
    let peer = connection.peer_addr()?;
    if peer != to {
        return Err(io::Error::other(format!("the peer is {peer} instead of {to}")));
    }
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    let host = match to.ip().to_canonical() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let path = path_of(flow);
    write!(connection, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(&format!("\r\n\r\n{path}")) {
        Ok(())
    } else {
        Err(io::Error::other(format!("the answer is {answer:?}")))
    }
}

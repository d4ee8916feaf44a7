//! `testbed-peer`: the checked client and the echo server as processes of their own, for tests in
//! which the cgroup of a process matters.

use std::{
    env, io,
    net::SocketAddr,
    num::NonZeroUsize,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::{
    Cgroup, Error, NetworkNamespace, Process,
    datagrams::{DatagramPlan, DatagramReport},
    exchange::{ConnectOptions, ExchangeError, Family, checked_exchange_over, connect},
    privilege::run_as,
};

/// The name of the helper binary.
const PEER: &str = "testbed-peer";
/// How long a server process may take to listen.
const READY_DEADLINE: Duration = Duration::from_secs(30);

/// What a client does: a number of connections to one echo server, each one checked exchange.
#[derive(Clone, Debug)]
pub struct ClientPlan {
    /// The echo server.
    pub to: SocketAddr,
    /// How many bytes each connection sends and gets back.
    pub bytes: u64,
    /// How many connections.
    pub count: u64,
    /// How many of them at a time.
    pub parallel: NonZeroUsize,
    /// The seed of the first connection's bytes; each further one has the next seed.
    pub seed: u64,
    /// How each connection is opened.
    pub options: ConnectOptions,
}

impl ClientPlan {
    /// One connection that exchanges 64 KiB.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        Self {
            to,
            bytes: 64 * 1024,
            count: 1,
            parallel: NonZeroUsize::MIN,
            seed: 1,
            options: ConnectOptions::default(),
        }
    }

    /// Carries the plan out on the calling thread and others in its network namespace, passing on
    /// each connection's report when it has ended. Reports come in the order of ending.
    ///
    /// # Errors
    /// What starting a thread gives. Failures of connections are in their reports.
    pub fn run(&self, report: impl FnMut(ConnectionReport) + Send) -> io::Result<()> {
        let next = AtomicU64::new(0);
        let report = Mutex::new(report);
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.count {
                    return;
                }
                let done = self.connect_once(number);
                report.lock().unwrap_or_else(|poisoned| poisoned.into_inner())(done);
            }
        };
        thread::scope(|scope| {
            for _ in 1..self.parallel.get() {
                thread::Builder::new().spawn_scoped(scope, work)?;
            }
            work();
            Ok(())
        })
    }

    fn connect_once(&self, number: u64) -> ConnectionReport {
        let mut report = ConnectionReport {
            number,
            to: self.to,
            peer: None,
            local: None,
            bytes: self.bytes,
            ok: false,
            stage: None,
            errno: None,
            detail: None,
        };
        let stream = match connect(self.to, &self.options) {
            Ok(stream) => stream,
            Err(source) => {
                report.fail(&ExchangeError::Connect { to: self.to, source });
                return report;
            }
        };
        // A connection that was reset already has no peer any more.
        report.peer = stream.peer_addr().ok();
        report.local = stream.local_addr().ok();
        let seed = self.seed.wrapping_add(number);
        match checked_exchange_over(&stream, self.bytes, seed) {
            Ok(()) => report.ok = true,
            Err(error) => report.fail(&error),
        }
        report
    }
}

/// The step at which a connection failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// socket(), bind() or connect().
    Connect,
    /// Sending.
    Send,
    /// Receiving.
    Receive,
    /// What came back was not what was sent: too short, too long or changed.
    Check,
}

/// How one connection of a client went. `testbed-peer client` prints one per line, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionReport {
    /// The connection's number, from 0.
    pub number: u64,
    /// The address that was asked for.
    pub to: SocketAddr,
    /// What getpeername() said once connected.
    pub peer: Option<SocketAddr>,
    /// What getsockname() said once connected.
    pub local: Option<SocketAddr>,
    /// How many bytes were to be exchanged.
    pub bytes: u64,
    /// Whether the exchange was complete and every byte right.
    pub ok: bool,
    /// Where it failed, unless `ok`.
    pub stage: Option<Stage>,
    /// The name of the errno that it failed with, such as `ECONNREFUSED`, where there is one.
    pub errno: Option<String>,
    /// Why it failed, in words, unless `ok`.
    pub detail: Option<String>,
}

impl ConnectionReport {
    fn fail(&mut self, error: &ExchangeError) {
        self.stage = Some(match error {
            ExchangeError::Connect { .. } => Stage::Connect,
            ExchangeError::Send(_) => Stage::Send,
            ExchangeError::Receive { .. } => Stage::Receive,
            _ => Stage::Check,
        });
        self.errno = error.io().and_then(io::Error::raw_os_error).map(errno_name);
        self.detail = Some(match error.io() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        });
    }
}

fn errno_name(code: i32) -> String {
    match Errno::from_raw(code) {
        Errno::UnknownErrno => format!("errno {code}"),
        errno => format!("{errno:?}"),
    }
}

/// A command that runs the helper binary `testbed-peer`, which lies in the directory of the running
/// executable (a program of the workspace) or in the one above (a test, bench or example).
///
/// # Errors
/// [`Error::PeerNotFound`] if it has not been built; its message says how to.
pub fn peer_command() -> Result<Command, Error> {
    let executable = env::current_exe().map_err(Error::io("find", "the running executable"))?;
    let looked_in: Vec<_> = executable.ancestors().skip(1).take(2).map(Into::into).collect();
    let found = looked_in
        .iter()
        .map(|directory: &std::path::PathBuf| directory.join(PEER))
        .find(|path| path.is_file());
    found.map(Command::new).ok_or(Error::PeerNotFound { looked_in })
}

/// A client process to be: what it does, and where.
#[derive(Clone, Debug)]
pub struct PeerClient<'a> {
    plan: ClientPlan,
    namespace: Option<&'a NetworkNamespace>,
    cgroup: Option<&'a Cgroup>,
    user: Option<(u32, u32)>,
}

impl<'a> PeerClient<'a> {
    /// A client that makes one connection and exchanges 64 KiB, in the caller's own namespace and
    /// cgroup.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        Self { plan: ClientPlan::new(to), namespace: None, cgroup: None, user: None }
    }

    /// How many bytes each connection sends and gets back.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.plan.bytes = bytes;
        self
    }

    /// How many connections it makes.
    #[must_use]
    pub fn count(mut self, count: u64) -> Self {
        self.plan.count = count;
        self
    }

    /// How many of them at a time; 0 counts as 1.
    #[must_use]
    pub fn parallel(mut self, parallel: usize) -> Self {
        self.plan.parallel = NonZeroUsize::new(parallel).unwrap_or(NonZeroUsize::MIN);
        self
    }

    /// The seed of the first connection's bytes.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.plan.seed = seed;
        self
    }

    /// The local address that its sockets are bound to.
    #[must_use]
    pub fn bind(mut self, address: SocketAddr) -> Self {
        self.plan.options.bind = Some(address);
        self
    }

    /// The family of its sockets.
    #[must_use]
    pub fn family(mut self, family: Family) -> Self {
        self.plan.options.family = family;
        self
    }

    /// Makes it use Multipath TCP.
    #[must_use]
    pub fn mptcp(mut self) -> Self {
        self.plan.options.mptcp = true;
        self
    }

    /// The longest that connecting, and any single send or receive, may take. Whole seconds: the
    /// rest is rounded up.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.plan.options.timeout = timeout;
        self
    }

    /// Where it runs.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &'a NetworkNamespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// The cgroup it runs in.
    #[must_use]
    pub fn in_cgroup(mut self, cgroup: &'a Cgroup) -> Self {
        self.cgroup = Some(cgroup);
        self
    }

    /// The user and group it runs as.
    #[must_use]
    pub fn as_user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        self
    }

    /// The command, for whoever wants to change it.
    ///
    /// # Errors
    /// [`Error::PeerNotFound`]; [`Error::Io`] if the namespace or cgroup cannot be opened.
    pub fn command(&self) -> Result<Command, Error> {
        let ClientPlan { to, bytes, count, parallel, seed, options } = &self.plan;
        let mut command = peer_command()?;
        command.arg("client").args(["--to", &to.to_string()]);
        command.args(["--bytes", &bytes.to_string(), "--count", &count.to_string()]);
        command.args(["--parallel", &parallel.to_string(), "--seed", &seed.to_string()]);
        command.args(["--family", options.family.name()]);
        let seconds = options.timeout.as_secs() + u64::from(options.timeout.subsec_nanos() > 0);
        command.args(["--timeout", &seconds.to_string()]);
        if let Some(address) = options.bind {
            command.args(["--bind", &address.to_string()]);
        }
        if options.mptcp {
            command.arg("--mptcp");
        }
        place(&mut command, self.namespace, self.cgroup, self.user)?;
        Ok(command)
    }

    /// Starts it.
    ///
    /// # Errors
    /// As [`command`](Self::command); [`Error::Io`] if it cannot be started.
    pub fn start(&self) -> Result<RunningClient, Error> {
        let process = Process::spawn(&mut self.command()?)?;
        Ok(RunningClient { process, expected: self.plan.count })
    }

    /// Starts it and waits until it has ended, for five minutes at most. Connections that failed
    /// are no error here: see [`ConnectionReport::ok`].
    ///
    /// # Errors
    /// As [`start`](Self::start) and [`RunningClient::finish`].
    pub fn run(&self) -> Result<Vec<ConnectionReport>, Error> {
        self.start()?.finish(Duration::from_secs(300))
    }
}

/// A client process at work; killed when dropped.
#[derive(Debug)]
pub struct RunningClient {
    process: Process,
    expected: u64,
}

impl RunningClient {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until it has ended, and returns one report per connection, sorted by number.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if it still runs after `timeout`; [`Error::ProcessEnded`] if it ended
    /// without having reported every connection.
    pub fn finish(mut self, timeout: Duration) -> Result<Vec<ConnectionReport>, Error> {
        let status = self.process.wait(timeout)?;
        let mut reports = Vec::new();
        for line in self.process.lines() {
            let report: ConnectionReport = serde_json::from_str(&line)
                .map_err(|_| self.process.ended_early(status, "a well-formed report"))?;
            reports.push(report);
        }
        reports.sort_unstable_by_key(|report| report.number);
        let all_ok = reports.iter().all(|report| report.ok);
        if reports.len() as u64 != self.expected || status.success() != all_ok {
            let expected = format!("having reported {} connections", self.expected);
            return Err(self.process.ended_early(status, &expected));
        }
        Ok(reports)
    }
}

/// UDP clients in one process, started in the background; killed when dropped.
#[derive(Debug)]
pub struct DatagramClients(Process);

impl DatagramClients {
    /// Starts them in a namespace and a cgroup, the caller's own where `None`.
    ///
    /// # Errors
    /// [`Error::PeerNotFound`]; [`Error::Io`].
    pub fn start(
        plan: &DatagramPlan,
        namespace: Option<&NetworkNamespace>,
        cgroup: Option<&Cgroup>,
    ) -> Result<Self, Error> {
        let DatagramPlan { to, clients, rounds, window, connected, timeout } = plan;
        let mut command = peer_command()?;
        command.arg("datagrams").args(["--clients", &clients.to_string()]);
        command.args(["--rounds", &rounds.to_string(), "--window", &window.to_string()]);
        command.args(["--timeout", &timeout.as_secs().max(1).to_string()]);
        for address in to {
            command.args(["--to", &address.to_string()]);
        }
        if *connected {
            command.arg("--connected");
        }
        place(&mut command, namespace, cgroup, None)?;
        Ok(Self(Process::spawn(&mut command)?))
    }

    /// Waits until they are done.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if they are not after `timeout`; [`Error::ProcessEnded`] if they end
    /// without a report.
    pub fn finish(mut self, timeout: Duration) -> Result<DatagramReport, Error> {
        let status = self.0.wait(timeout)?;
        let report = self.0.lines().first().and_then(|line| serde_json::from_str(line).ok());
        report.ok_or_else(|| self.0.ended_early(status, "a report"))
    }
}

/// An echo server as a process; killed when dropped, and it ends itself when its parent is gone.
#[derive(Debug)]
pub struct PeerServer {
    process: Process,
    addresses: Vec<SocketAddr>,
}

impl PeerServer {
    /// Starts it in the given namespace and cgroup, the caller's own where `None`. It listens on
    /// return. Port 0 takes a free port.
    ///
    /// # Errors
    /// [`Error::PeerNotFound`]; [`Error::Io`]; [`Error::ProcessEnded`] if it cannot listen (it says
    /// why on standard error); [`Error::TimedOut`].
    pub fn start(
        namespace: Option<&NetworkNamespace>,
        cgroup: Option<&Cgroup>,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Self, Error> {
        let mut command = peer_command()?;
        command.arg("server");
        for address in addresses {
            command.args(["--listen", &address.to_string()]);
        }
        place(&mut command, namespace, cgroup, None)?;
        let process = Process::spawn(&mut command)?;
        let is_ready = |line: &str| line.starts_with("ready ");
        let line = process.wait_for_line("the line \"ready\"", READY_DEADLINE, is_ready)?;
        let addresses = line
            .split_whitespace()
            .skip(1)
            .map(|word| word.parse().map_err(|_| Error::argument(word, "an address and port")))
            .collect::<Result<_, _>>()?;
        Ok(Self { process, addresses })
    }

    /// The first address that it listens on, with the actual port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// All addresses that it listens on, with the actual ports.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }
}

/// Puts a command where it belongs. The user last: entering needs root.
fn place(
    command: &mut Command,
    namespace: Option<&NetworkNamespace>,
    cgroup: Option<&Cgroup>,
    user: Option<(u32, u32)>,
) -> Result<(), Error> {
    if let Some(cgroup) = cgroup {
        cgroup.enter_command(command)?;
    }
    if let Some(namespace) = namespace {
        namespace.enter_command(command)?;
    }
    if let Some((uid, gid)) = user {
        run_as(command, uid, gid);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_their_kernel_names() {
        assert_eq!(errno_name(libc::ECONNREFUSED), "ECONNREFUSED");
        assert_eq!(errno_name(libc::ELOOP), "ELOOP");
        assert_eq!(errno_name(99_999), "errno 99999");
    }
}

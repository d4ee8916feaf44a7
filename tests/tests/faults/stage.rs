//! A lab with services at work, and the way that a new flow takes through them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use carnet_testbed::{DatagramServer, Process, Topology, answer_of};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Running, program, puppet::Puppet, service::Behaviour,
};
use serde_json::Value;

use crate::row::Row;

/// How long a flow may take to be carried; what is slower is lost.
const CARRIED: Duration = Duration::from_secs(20);

/// The lab.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    pub(crate) client: Puppet,
    pub(crate) datagrams: DatagramServer,
    services: Mutex<BTreeMap<&'static str, Running>>,
}

/// The way of a flow: the services that had it, in order.
pub(crate) type Way = Vec<String>;

/// The protocols of which a new flow is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// What commands say of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It is not up.
    Down,
    /// Its policy, without the objects' numbers.
    Up(Value),
}

impl Stage {
    /// A lab without services.
    pub(crate) fn new() -> Self {
        let lab = Lab::new();
        let addresses = [(Topology::DESTINATION_V4, 0).into()];
        let datagrams = DatagramServer::start_in(&lab.network().topology.destination, addresses)
            .must("start a datagram server");
        let client = lab.puppet();
        Self { lab, client, datagrams, services: Mutex::default() }
    }

    /// A service that is not at work any more is none that is asked.
    pub(crate) fn forget(&self, service: &str) {
        self.services().remove(service);
    }

    /// Starts a service that is in the policy, or starts it anew.
    pub(crate) fn start(&self, service: &'static str) {
        self.services().remove(service);
        let running = self.lab.start_with(service, &Behaviour::with_datagrams());
        self.services().insert(service, running);
    }

    pub(crate) fn services(&self) -> MutexGuard<'_, BTreeMap<&'static str, Running>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The command `carnet`, for the lab's instance.
    pub(crate) fn carnet(&self, arguments: &[String]) -> Command {
        self.carnet_of(self.lab.location().instance(), arguments)
    }

    /// The same, for an instance of another name.
    pub(crate) fn carnet_of(&self, instance: &str, arguments: &[String]) -> Command {
        let mut command = Command::new(program("carnet"));
        command.args(["--instance", instance]);
        command.arg("--bpffs").arg(self.lab.pins().path()).args(arguments);
        command
    }

    /// Runs it; gives whether it succeeded, and what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> (bool, String) {
        let arguments: Vec<_> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let mut command = self.carnet(&arguments);
        let mut process = Process::spawn(command.stderr(Stdio::null())).must("start the command");
        // A lock that is held for ever shows here.
        let status = process.wait(PATIENCE).must("wait for the command");
        (status.success(), process.lines().join("\n"))
    }

    /// Runs it, which has to succeed.
    #[track_caller]
    pub(crate) fn must_run(&self, arguments: &[&str]) -> String {
        let (success, output) = self.run(arguments);
        assert!(success, "carnet {arguments:?} failed: {output}");
        output
    }

    /// What the command says of the instance.
    pub(crate) fn state(&self) -> State {
        let (success, output) = self.run(&["export"]);
        if !success {
            assert!(!self.run(&["status"]).0, "export failed, but the instance is up");
            return State::Down;
        }
        let mut policy = serde_json::from_str(&output).must("read what the command prints");
        without_numbers(&mut policy);
        State::Up(policy)
    }

    /// Makes a new flow, and gives its way; or what became of it instead.
    pub(crate) fn way(&self, protocol: Protocol) -> Result<Way, String> {
        let number = match protocol {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
        };
        // What was there before is none of this flow.
        let known: BTreeMap<&str, usize> =
            self.services().iter().map(|(name, one)| (*name, one.reports(0).len())).collect();
        let echo = self.lab.network().echo();
        let (connections, datagrams) = (echo.connections().len(), self.datagrams.datagrams().len());
        let local = match protocol {
            Protocol::Tcp => self.connect(),
            Protocol::Udp => self.send(),
        }?;
        // The last service's port may happen to be the client's, on another address.
        let is_from = |peer: SocketAddr, from: SocketAddr| {
            let ip = from.ip().to_canonical();
            peer.port() == from.port() && (ip.is_unspecified() || peer.ip().to_canonical() == ip)
        };
        let arrived = |from: SocketAddr| match protocol {
            Protocol::Tcp => {
                echo.connections().iter().skip(connections).any(|one| is_from(one.peer, from))
            }
            Protocol::Udp => {
                let all = self.datagrams.datagrams();
                all.iter().skip(datagrams).any(|one| is_from(one.peer, from))
            }
        };
        let mut way = Way::new();
        let mut from = local;
        let deadline = Instant::now() + CARRIED;
        // What it says of a flow reaches us a moment after the flow.
        while !arrived(from) {
            if Instant::now() > deadline {
                return Err(format!("what left {from} after {way:?} arrived nowhere"));
            }
            let next = self.services().iter().find_map(|(name, one)| {
                let reports = one.reports(0);
                let known = known.get(name).copied().unwrap_or(0);
                let mut new = reports.into_iter().skip(known);
                new.find(|one| u32::from(one.protocol) == number && one.peer.port() == from.port())
                    .map(|report| ((*name).to_owned(), report.onward))
            });
            match next {
                Some((service, Ok(onward))) => {
                    way.push(service);
                    from = onward;
                }
                Some((service, Err(errno))) => {
                    return Err(format!("{service} could not connect onwards: errno {errno}"));
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        Ok(way)
    }

    fn connect(&self) -> Result<SocketAddr, String> {
        let failed = |what: &str, error| format!("a client could not {what}: {error}");
        let connection =
            self.client.connect(self.lab.v4()).map_err(|error| failed("connect", error))?;
        connection.receive_within(CARRIED).must("limit the wait");
        connection.send(b"word").map_err(|error| failed("send", error))?;
        match connection.receive(4) {
            Ok(word) if word == b"word" => {}
            Ok(other) => return Err(format!("a client got {other:?} back")),
            Err(error) => return Err(failed("receive", error)),
        }
        connection.local().map_err(|error| failed("ask for its address", error))
    }

    fn send(&self) -> Result<SocketAddr, String> {
        let failed = |what: &str, error| format!("a client could not {what}: {error}");
        let to = self.datagrams.address();
        let socket = self.client.udp(to);
        socket.receive_within(CARRIED).must("limit the wait");
        socket.send_to(to, b"datagram").map_err(|error| failed("send a datagram", error))?;
        let (answer, from) =
            socket.receive_from().map_err(|error| failed("receive a datagram", error))?;
        if answer != answer_of(to, b"datagram") || from != to {
            return Err(format!("a client got {answer:?} from {from:?}"));
        }
        socket.local().map_err(|error| failed("ask for its address", error))
    }

    /// Makes a new flow of each protocol, and notes in the row what is wrong with it.
    pub(crate) fn expect(&self, row: &mut Row, expected: &[&str], when: &str) {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            match self.way(protocol) {
                Ok(way) if way == expected => row.flow(),
                Ok(way) => row.uninspected(format!(
                    "{when}: a flow of {protocol:?} went through {way:?} instead of {expected:?}"
                )),
                Err(what) => row.lost(format!("{when}: {protocol:?}: {what}")),
            }
        }
    }

    /// The paths of all that is pinned.
    pub(crate) fn pins(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let parent = self.lab.pins().path().join("carnet");
        list(&parent, &parent, &mut found);
        found
    }
}

fn list(root: &Path, directory: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    found.insert(directory.strip_prefix(root).expect("below it").display().to_string());
    for entry in entries {
        let path = entry.must("list pins").path();
        if path.is_dir() {
            list(root, &path, found);
        } else {
            found.insert(path.strip_prefix(root).expect("below it").display().to_string());
        }
    }
}

/// Removes ids and handles, which are others every time that an object is added.
fn without_numbers(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let is_number = |name: &str| matches!(name, "id" | "handle" | "next_id");
            // A cgroup's id is its own.
            let is_cgroup = fields.contains_key("path");
            fields.retain(|name, _| is_cgroup || !is_number(name));
            fields.values_mut().for_each(without_numbers);
        }
        Value::Array(values) => values.iter_mut().for_each(without_numbers),
        _ => {}
    }
}

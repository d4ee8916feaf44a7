//! Two hosts, each with an engine and services of its own, and what goes from one to the other.

use std::{
    fs::{self, File, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use carnet_core::{abi, object::Conditions, record::MAX_RECORD};
use carnet_testbed::{Cgroup, NetworkNamespace, Process, Topology};
use rustix::process::Signal;

use crate::{
    Lab, Must as _, Network, PATIENCE, Plan, Running,
    contract::Scratch,
    program,
    puppet::{Hand, Puppet, Result},
    service::Behaviour,
    until,
};

/// The user as whom Carnet's own service runs.
const NOBODY: &str = "65534";

/// Two hosts with a cable between them: the clients' one, and that of the destinations. Each has a gateway.
#[derive(Debug)]
pub struct Hosts {
    /// The host on which flows begin.
    pub here: Lab,
    /// The host to which they go on.
    pub there: Lab,
    directory: Scratch,
    files: AtomicU32,
}

/// Carnet's own service at work on one of them.
#[derive(Debug)]
pub struct Inspect {
    /// Where it listens first.
    pub address: SocketAddr,
    process: Process,
    log: PathBuf,
    said: PathBuf,
}

impl Hosts {
    /// Hosts with these services, the heaviest first, which get everything.
    #[track_caller]
    pub fn new(here: &[&str], there: &[&str]) -> Self {
        let network = Arc::new(Network::new());
        let hosts = Self {
            here: Lab::beside(&network),
            there: Lab::beside(&network),
            directory: Scratch::new(),
            files: AtomicU32::new(0),
        };
        for (lab, names) in [(&hosts.here, here), (&hosts.there, there)] {
            for (weight, name) in (1..=names.len() as u16).rev().zip(names) {
                lab.service(name, weight);
            }
            let nothing =
                Conditions { ports: vec!["1".parse().must("parse")], ..Conditions::default() };
            lab.service_with(
                "gateway",
                Plan { gateway: true, conditions: nothing, ..Plan::default() },
            );
        }
        hosts
    }

    /// The network namespace of the first host.
    pub fn first(&self) -> &NetworkNamespace {
        &self.here.network().topology.client
    }

    /// The network namespace of the second host.
    pub fn second(&self) -> &NetworkNamespace {
        &self.here.network().topology.destination
    }

    /// An honest service of the second host.
    #[track_caller]
    pub fn start_there(&self, service: &str) -> Running {
        Running::start(self.second(), &self.there.cgroup_of(service), &Behaviour::default())
    }

    /// A puppet in a service's cgroup of the second host.
    #[track_caller]
    pub fn puppet_there(&self, service: &str) -> Puppet {
        Puppet::start(self.second(), &self.there.cgroup_of(service), None)
    }

    /// A file of keys, of which each is such a byte, 32 times.
    #[track_caller]
    pub fn keys(&self, bytes: &[u8]) -> PathBuf {
        let path = self.file("keys");
        write_keys(&path, bytes);
        path
    }

    /// Carnet's own service in front of the second host's gateway: what it gets goes there, sealed under the
    /// first of these keys.
    #[track_caller]
    pub fn front(&self, service: &str, gateway: SocketAddr, keys: &Path) -> Inspect {
        self.front_on(self.first(), &self.here.cgroup_of(service), gateway, keys)
    }

    /// The same on the second host, in front of the first one's gateway.
    #[track_caller]
    pub fn returning_front(&self, service: &str, gateway: SocketAddr, keys: &Path) -> Inspect {
        self.front_on(self.second(), &self.there.cgroup_of(service), gateway, keys)
    }

    #[track_caller]
    fn front_on(
        &self,
        namespace: &NetworkNamespace,
        cgroup: &Cgroup,
        gateway: SocketAddr,
        keys: &Path,
    ) -> Inspect {
        let (gateway, keys) = (gateway.to_string(), keys.display().to_string());
        self.inspect(namespace, cgroup, &["--send-proxy", &gateway, "--chain-key", &keys])
    }

    /// Carnet's own service as the gateway of the second host, at a port of this address.
    #[track_caller]
    pub fn gateway(&self, address: SocketAddr, keys: &Path, more: &[&str]) -> Inspect {
        let from = [Topology::CLIENT_V4.to_string(), Topology::CLIENT_V6.to_string()];
        let mut arguments = vec!["--proxy-from", &from[0], "--proxy-from", &from[1]];
        arguments.extend(more);
        let cgroup = self.there.cgroup_of("gateway");
        self.gateway_on(self.second(), &cgroup, address, keys, &arguments)
    }

    /// The same on the first host.
    #[track_caller]
    pub fn returning_gateway(&self, keys: &Path) -> Inspect {
        let (address, from) =
            ((Topology::CLIENT_V4, 0).into(), Topology::DESTINATION_V4.to_string());
        let cgroup = self.here.cgroup_of("gateway");
        self.gateway_on(self.first(), &cgroup, address, keys, &["--proxy-from", &from])
    }

    #[track_caller]
    fn gateway_on(
        &self,
        namespace: &NetworkNamespace,
        cgroup: &Cgroup,
        address: SocketAddr,
        keys: &Path,
        more: &[&str],
    ) -> Inspect {
        let (listen, keys) = (address.to_string(), keys.display().to_string());
        let mut arguments = vec!["--original-destination", "proxy", "--listen", &listen];
        arguments.extend(["--chain-key", &keys]);
        arguments.extend(more);
        self.inspect(namespace, cgroup, &arguments)
    }

    #[track_caller]
    fn inspect(
        &self,
        namespace: &NetworkNamespace,
        cgroup: &Cgroup,
        arguments: &[&str],
    ) -> Inspect {
        let (log, said) = (self.file("log"), self.file("said"));
        let errors = File::create(&said).must("make a file");
        let mut command = Command::new(program("carnet-inspect"));
        command.args(arguments).args(["--log", "json", "--ready-fd", "1", "--user", NOBODY]);
        command.arg("--log-file").arg(&log).stderr(errors);
        cgroup.enter_command(&mut command).must("enter the service's cgroup");
        namespace.enter_command(&mut command).must("enter the namespace");
        let process = Process::spawn(&mut command).must("start carnet-inspect");
        let is_ready = |line: &str| line.starts_with("ready ");
        let ready = process.wait_for_line("the line \"ready\"", PATIENCE, is_ready);
        let ready = ready.must("wait for the service");
        let address = ready.split(' ').nth(1).expect("an address").parse().must("parse");
        Inspect { address, process, log, said }
    }

    fn file(&self, name: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.directory.path().join(format!("{number}-{name}"))
    }
}

/// Writes keys, of which each is such a byte, 32 times, to a file that only its owner may read.
#[track_caller]
pub fn write_keys(path: &Path, bytes: &[u8]) {
    let lines: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}").repeat(32)).collect();
    fs::write(path, lines.join("\n")).must("write keys");
    fs::set_permissions(path, Permissions::from_mode(0o600)).must("set permissions");
}

impl Inspect {
    /// Has it read its keys again; gives what it says of that.
    #[track_caller]
    pub fn reload_keys(&self) -> String {
        let about_keys = || {
            let said = fs::read_to_string(&self.said).must("read what it said");
            let complete = said.rsplit_once('\n').map_or("", |(lines, _)| lines);
            complete.lines().filter(|line| line.contains("chain keys")).map(String::from).collect()
        };
        let before: Vec<String> = about_keys();
        self.process.signal(Signal::HUP).must("signal the service");
        let after = until("what it says of its keys", about_keys, |lines: &Vec<String>| {
            lines.len() > before.len()
        });
        after.last().expect("a line").clone()
    }

    /// Ends it in order; gives the lines of its log, and what it said on the standard error.
    #[track_caller]
    pub fn end(mut self) -> (Vec<serde_json::Value>, String) {
        self.process.terminate().must("end the service");
        let status = self.process.wait(PATIENCE).must("wait for the service's end");
        assert!(status.success(), "the service ended with {status}");
        let read = |line: &str| serde_json::from_str(line).must("read a line of the log");
        let log = fs::read_to_string(&self.log).must("read the log");
        let said = fs::read_to_string(&self.said).must("read what it said");
        (log.lines().map(read).collect(), said)
    }
}

/// The portable record of an accepted connection.
pub fn export(accepted: &Hand<'_>) -> Result<Vec<u8>> {
    accepted.get(abi::LEVEL, abi::EXPORT_RECORD, MAX_RECORD)
}

/// Sets a record that is made of a portable one.
pub fn import(socket: &Hand<'_>, record: &[u8]) -> Result<()> {
    socket.set(abi::LEVEL, abi::IMPORT_RECORD, record)
}

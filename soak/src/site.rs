//! Where a soak takes place: two network namespaces, a cgroup that is redirected, an instance that was
//! brought up by the command, services with a process each, and the server.

use std::env;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use carnet_core::{flow::HeldKey, guard::GuardEntry};
use carnet_engine::{Engine, Location};
use carnet_testbed::{BpfDirectory, Cgroup, NetworkNamespace, Process, Topology};
use serde::de::DeserializeOwned;

use crate::board::{Board, Entry, SERVICES};
use crate::command::{Carnet, INSTANCE};
use crate::server::Seen;

/// Where the server is.
pub(crate) const PORT: u16 = 7000;
/// The port of the server to which a filter refuses flows now and then.
pub(crate) const REFUSED_PORT: u16 = 7001;
/// How long a process may take to be ready, and to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long everything may take to come to rest.
const REST_LIMIT: Duration = Duration::from_secs(90);

/// What becomes of a service's flows while it is not there.
pub(crate) const ON_FAILURE: [&str; SERVICES.len()] = ["block", "block", "skip"];

/// The address from which a service connects onwards over IPv4. Over IPv6 it has none of its own: the
/// kernel sends no resets from a global address to ::1, where the next service listens.
fn source(place: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, 11 + place as u8)
}

/// The server's addresses.
pub(crate) fn destinations() -> Vec<SocketAddr> {
    let addresses: [IpAddr; 2] = [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
    let ports = [PORT, REFUSED_PORT];
    addresses.into_iter().flat_map(|ip| ports.map(|port| SocketAddr::new(ip, port))).collect()
}

/// The site. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Site {
    // In the order in which they are to go.
    /// The process of each service.
    pub(crate) workers: [Option<Process>; SERVICES.len()],
    pub(crate) server: Process,
    pub(crate) engine: Engine,
    pub(crate) carnet: Carnet,
    pins: BpfDirectory,
    cgroups: [Cgroup; SERVICES.len()],
    apps: Cgroup,
    scope: Cgroup,
    pub(crate) topology: Topology,
    pub(crate) board: Board,
    /// One of so many flows is not marked by gamma: the soak must find it.
    forget_mark: Option<u64>,
}

impl Site {
    /// Makes it, with all services in the policy and at work.
    ///
    /// # Errors
    /// When something of it cannot be made.
    pub(crate) fn new(forget_mark: Option<u64>) -> Result<Self> {
        let topology = Topology::client_and_destination()?;
        let link = Topology::LINK;
        for place in 0..SERVICES.len() {
            topology.client.add_address(&format!("{}/24", source(place)), link)?;
        }
        for namespace in [&topology.client, &topology.destination] {
            roomy(namespace)?;
        }
        let board = Board::create()?;
        let scope = Cgroup::create("carnet-soak")?;
        let apps = scope.child("apps")?;
        let cgroups =
            [scope.child(SERVICES[0])?, scope.child(SERVICES[1])?, scope.child(SERVICES[2])?];
        let pins = BpfDirectory::create("carnet-soak")?;
        let carnet = Carnet::new(&pins)?;
        let path = scope.path().display().to_string();
        carnet.call(&["up", "--cgroup", &path, "--udp-idle", "5"])?;
        let engine = Engine::open(&Location::new(Some(pins.path().to_owned()), INSTANCE)?)?;
        let mut server = command("server")?;
        server.args(["--board".as_ref(), board.path().as_os_str()]);
        for address in destinations() {
            server.args(["--at", &address.to_string()]);
        }
        for source in (0..SERVICES.len()).map(source) {
            server.args(["--source", &source.to_string()]);
        }
        topology.destination.enter_command(&mut server)?;
        let server = ready(server)?;
        let workers = [const { None }; SERVICES.len()];
        let mut site = Self {
            workers,
            server,
            engine,
            carnet,
            pins,
            cgroups,
            apps,
            scope,
            topology,
            board,
            forget_mark,
        };
        for (place, name) in SERVICES.iter().enumerate() {
            site.carnet.call(&["provider", "add", name])?;
            let weight = (1000 - place).to_string();
            site.carnet.call(&[
                "sublayer",
                "add",
                name,
                "--provider",
                name,
                "--weight",
                &weight,
            ])?;
            site.add_service(place)?;
            site.start(place)?;
            site.add_filter(place)?;
        }
        Ok(site)
    }

    /// Adds a service to the policy, without a filter.
    ///
    /// # Errors
    /// When the command fails.
    pub(crate) fn add_service(&self, place: usize) -> Result<()> {
        let (name, path) = (SERVICES[place], self.cgroups[place].path().display().to_string());
        let on_failure = ON_FAILURE[place];
        self.board.update(place, Entry::adding)?;
        self.carnet.call(&[
            "service",
            "add",
            name,
            "--provider",
            name,
            "--cgroup",
            &path,
            "--on-failure",
            on_failure,
        ])?;
        Ok(())
    }

    /// Has a service, which is at work, get all flows.
    ///
    /// # Errors
    /// When the command fails.
    pub(crate) fn add_filter(&self, place: usize) -> Result<()> {
        let name = SERVICES[place];
        let ports = format!("{PORT}-{REFUSED_PORT}");
        let up = self.board.read()?.0[place].up();
        self.board.update(place, |entry| entry.demanding(false, true))?;
        self.carnet.call(&[
            "filter",
            "add",
            "--sublayer",
            name,
            "--name",
            name,
            "--redirect",
            name,
            "--port",
            &ports,
        ])?;
        let required = up || ON_FAILURE[place] == "block";
        self.board.update(place, |entry| entry.demanding(required, true))
    }

    /// Has a service get no flows any more.
    ///
    /// # Errors
    /// When the command fails.
    pub(crate) fn remove_filter(&self, place: usize) -> Result<()> {
        self.board.update(place, |entry| entry.demanding(false, true))?;
        self.carnet.call(&["filter", "rm", SERVICES[place]])?;
        self.board.update(place, |entry| entry.demanding(false, false))
    }

    /// Starts a process of a service, which is there and is well afterwards.
    ///
    /// # Errors
    /// When it does not become ready.
    pub(crate) fn start(&mut self, place: usize) -> Result<()> {
        self.workers[place] = Some(self.spawn(place)?);
        self.is_back(place)
    }

    /// Kills a service's process.
    ///
    /// # Errors
    /// When it does not end.
    pub(crate) fn kill(&mut self, place: usize) -> Result<()> {
        self.lose(place)?;
        let Some(mut worker) = self.workers[place].take() else {
            return Ok(());
        };
        worker.signal(rustix::process::Signal::KILL)?;
        worker.wait(PATIENCE)?;
        Ok(())
    }

    /// Starts another process of a service, and then kills the one that was there: flows that begin
    /// meanwhile get either.
    ///
    /// # Errors
    /// When one is not ready, or the other does not end.
    pub(crate) fn replace(&mut self, place: usize) -> Result<()> {
        let new = self.spawn(place)?;
        self.kill(place)?;
        self.workers[place] = Some(new);
        self.is_back(place)
    }

    /// From now on no flow of a service is lost.
    fn is_back(&self, place: usize) -> Result<()> {
        self.board.update(place, |entry| entry.living(true))?;
        let entry = self.board.read()?.0[place];
        if entry.allowed() && !entry.required() {
            self.board.update(place, |entry| entry.demanding(true, true))?;
        }
        Ok(())
    }

    /// From now on flows of a service may be lost.
    fn lose(&self, place: usize) -> Result<()> {
        if self.board.read()?.0[place].allowed() && ON_FAILURE[place] == "skip" {
            self.board.update(place, |entry| entry.demanding(false, true))?;
        }
        self.board.update(place, |entry| entry.living(false))
    }

    fn spawn(&self, place: usize) -> Result<Process> {
        let mut command = command("relay")?;
        command.args(["--place", &place.to_string()]);
        command.args(["--source", &source(place).to_string()]);
        if let Some(every) = self.forget_mark
            && place == SERVICES.len() - 1
        {
            command.args(["--forget-mark", &every.to_string()]);
        }
        self.cgroups[place].enter_command(&mut command)?;
        self.topology.client.enter_command(&mut command)?;
        ready(command)
    }

    /// Starts the clients.
    ///
    /// # Errors
    /// When they cannot be started.
    pub(crate) fn start_clients(&self, words: &[String]) -> Result<Process> {
        let mut command = Command::new(env::current_exe()?);
        command.args(words);
        self.apps.enter_command(&mut command)?;
        self.topology.client.enter_command(&mut command)?;
        Ok(Process::spawn(&mut command)?)
    }

    /// What the server has seen until now. It tells once a second.
    pub(crate) fn seen(&self) -> Result<Seen> {
        last_line(&self.server).context("the server has told nothing yet")
    }

    /// Waits until nothing is under way: no flow is left, nor what is kept for one. Gives what stays
    /// nevertheless.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn settle(&self) -> Result<Option<String>> {
        let deadline = Instant::now() + REST_LIMIT;
        loop {
            let flows = self.engine.flows()?.len();
            let account = self.engine.account()?;
            let under_way = account.tcp.starting + account.tcp.connecting + account.udp.live;
            let lingering = self.entries("DATAGRAM_LEGS")?;
            let held = self.held()?;
            if flows == 0 && under_way == 0 && lingering == 0 && held == 0 {
                return Ok(None);
            }
            if Instant::now() > deadline {
                return Ok(Some(format!(
                    "after {REST_LIMIT:?} without load there are {flows} flows, {under_way} under way, \
                     {lingering} lingering UDP flows and {held} that services hold: {account:?}"
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// How many entries a map has.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn entries(&self, name: &str) -> Result<usize> {
        let maps = self.engine.status()?.maps;
        let map = maps.iter().find(|map| map.name == name).context("no such map")?;
        Ok(map.used)
    }

    /// How many flows the hop guard thinks that services hold.
    fn held(&self) -> Result<i64> {
        const KEY: usize = size_of::<HeldKey>();
        const VALUE: usize = size_of::<GuardEntry>();
        let pin = self.engine.location().directory().join("maps/GUARD");
        let map = MapData::from_pin(pin).context("opening the map GUARD")?;
        let map = HashMap::<_, [u8; KEY], [u8; VALUE]>::try_from(Map::LruHashMap(map))?;
        let mut held = 0;
        for entry in map.iter() {
            let (_, value) = entry.context("reading the map GUARD")?;
            let live = value.first_chunk().context("an entry of the map GUARD")?;
            held += i64::from_ne_bytes(*live);
        }
        Ok(held)
    }

    /// Removes all that it has made.
    ///
    /// # Errors
    /// When the instance cannot be taken down.
    pub(crate) fn end(mut self) -> Result<()> {
        self.workers = [const { None }; SERVICES.len()];
        self.carnet.call(&["down"])?;
        // The rest goes when it is dropped.
        drop((self.pins, self.scope));
        Ok(())
    }
}

/// Has a namespace take many connections, and keep few of those that have ended.
pub(crate) fn roomy(namespace: &NetworkNamespace) -> Result<()> {
    for (name, value) in [
        ("ipv4/ip_local_port_range", "1024 65535"),
        ("ipv4/tcp_max_tw_buckets", "1000"),
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/tcp_max_syn_backlog", "65536"),
        ("core/somaxconn", "4096"),
    ] {
        namespace.set_sysctl(name, value)?;
    }
    Ok(())
}

/// This program, with a subcommand.
pub(crate) fn command(subcommand: &str) -> Result<Command> {
    let mut command = Command::new(env::current_exe().context("finding this program")?);
    command.arg(subcommand).stderr(Stdio::inherit());
    Ok(command)
}

/// Starts a process and waits until it says that it is ready.
pub(crate) fn ready(mut command: Command) -> Result<Process> {
    let process = Process::spawn(&mut command)?;
    process.wait_for_line("the line \"ready\"", PATIENCE, |line| line.starts_with("ready"))?;
    Ok(process)
}

/// The last line of JSON that a process has printed.
pub(crate) fn last_line<T: DeserializeOwned>(process: &Process) -> Option<T> {
    process.lines().iter().rev().find_map(|line| serde_json::from_str(line).ok())
}

//! Where crowds are: two network namespaces, an instance, and *lanes*.
//!
//! A process may have only so many descriptors, and a service needs two for a connection. So there are as
//! many lanes as that takes: a port of the destination with services, a client and a server of its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use carnet_engine::{Engine, Location};
use carnet_testbed::{BpfDirectory, Cgroup, Process, Topology, interrupt};

use crate::command::{Carnet, INSTANCE};
use crate::memory::{Bytes, MemoryGroup};
use crate::sample::{Sockets, descriptors, resident};
use crate::site::{PORT, command, ready, roomy};

/// How long the connections may take altogether.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);
/// How long it may take until nothing is left of them.
const REST_LIMIT: Duration = Duration::from_secs(120);

/// The place.
pub(crate) struct Site {
    // In the order in which they are to go.
    inspects: Vec<Process>,
    servers: Vec<Process>,
    pub(crate) engine: Engine,
    pub(crate) carnet: Carnet,
    _pins: BpfDirectory,
    _cgroups: Vec<Cgroup>,
    apps: Cgroup,
    _scope: Cgroup,
    topology: Topology,
}

/// What there is at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Level {
    /// Kernel memory of all of it; `None` where it is not accounted.
    pub(crate) kernel: Option<Bytes>,
    /// Resident memory of all services.
    pub(crate) resident: Bytes,
    /// Descriptors of all services.
    pub(crate) descriptors: usize,
    /// Sockets in both namespaces.
    pub(crate) sockets: u64,
}

fn address(lane: u32) -> SocketAddr {
    (Topology::DESTINATION_V4, port(lane)).into()
}

fn port(lane: u32) -> u16 {
    PORT + lane as u16
}

impl Site {
    /// Makes it, with all services at work.
    ///
    /// # Errors
    /// When something of it cannot be made.
    pub(crate) fn new(services: usize, lanes: u32) -> Result<Self> {
        let topology = Topology::client_and_destination()?;
        roomy(&topology.client)?;
        roomy(&topology.destination)?;
        let scope = Cgroup::create("carnet-crowd")?;
        let apps = scope.child("apps")?;
        let pins = BpfDirectory::create("carnet-crowd")?;
        let carnet = Carnet::new(&pins)?;
        carnet.call(&["up", "--cgroup", &scope.path().display().to_string()])?;
        let engine = Engine::open(&Location::new(Some(pins.path().to_owned()), INSTANCE)?)?;
        let (mut servers, mut cgroups, mut inspects) = (Vec::new(), Vec::new(), Vec::new());
        for lane in 0..lanes {
            let mut server = command("crowd-server")?;
            server.args(["--at", &address(lane).to_string()]);
            topology.destination.enter_command(&mut server)?;
            servers.push(ready(server)?);
        }
        for (lane, place) in (0..lanes).flat_map(|lane| (0..services).map(move |at| (lane, at))) {
            let name = format!("inspect-{lane}-{place}");
            let cgroup = scope.child(&name)?;
            let path = cgroup.path().display().to_string();
            let weight = (1000 - place).to_string();
            carnet.call(&["provider", "add", &name])?;
            carnet.call(&["sublayer", "add", &name, "--provider", &name, "--weight", &weight])?;
            carnet.call(&["service", "add", &name, "--provider", &name, "--cgroup", &path])?;
            let mut inspect = std::process::Command::new(carnet.program());
            inspect.args(["inspect", "--ready-fd", "1", "--log-file", "/dev/null", "--no-udp"]);
            inspect.args(["--max-connections", "65000"]).stderr(std::process::Stdio::null());
            cgroup.enter_command(&mut inspect)?;
            topology.client.enter_command(&mut inspect)?;
            inspects.push(ready(inspect)?);
            let port = port(lane).to_string();
            let add = ["filter", "add", "--sublayer", &name, "--redirect", &name, "--port", &port];
            carnet.call(&add)?;
            cgroups.push(cgroup);
        }
        Ok(Self {
            inspects,
            servers,
            engine,
            carnet,
            _pins: pins,
            _cgroups: cgroups,
            apps,
            _scope: scope,
            topology,
        })
    }

    /// How many services a connection passes.
    pub(crate) fn services(&self) -> usize {
        self.inspects.len() / self.servers.len()
    }

    /// How many lanes there are.
    pub(crate) fn lanes(&self) -> u32 {
        self.servers.len() as u32
    }

    /// Starts the clients, which make so many connections altogether.
    ///
    /// # Errors
    /// When one cannot be started.
    pub(crate) fn start_clients(&self, connections: u32) -> Result<Vec<Process>> {
        let lanes = self.lanes();
        let start = |lane| {
            let count = connections / lanes + u32::from(lane < connections % lanes);
            let mut client = command("crowd-client")?;
            client.args(["--to", &address(lane).to_string(), "--count", &count.to_string()]);
            self.apps.enter_command(&mut client)?;
            self.topology.client.enter_command(&mut client)?;
            Ok(Process::spawn(&mut client)?)
        };
        (0..lanes).map(start).collect()
    }

    /// The map that has least room left: what it holds, and how many entries.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn fullest_map(&self) -> Result<String> {
        let maps = self.engine.status()?.maps;
        let fullest = maps.iter().max_by_key(|map| map.used * 1000 / map.capacity.max(1));
        let fullest = fullest.context("no maps")?;
        Ok(format!("{}: {} of {}", fullest.what, fullest.used, fullest.capacity))
    }

    /// What there is now.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn level(&self, memory: Option<&MemoryGroup>) -> Result<Level> {
        let (mut memory_of, mut open) = (0, 0);
        for inspect in &self.inspects {
            memory_of += resident(inspect.id())?;
            open += descriptors(inspect.id())?;
        }
        let [near, far] = [&self.topology.client, &self.topology.destination].map(Sockets::of);
        let (near, far) = (near?, far?);
        Ok(Level {
            kernel: memory.map(MemoryGroup::kernel).transpose()?,
            resident: memory_of,
            descriptors: open,
            sockets: near.tcp + far.tcp + near.udp + far.udp,
        })
    }

    /// Waits until as many descriptors and sockets are open as before, and gives what is there then, or
    /// in the end.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn rest(&self, before: &Level, memory: Option<&MemoryGroup>) -> Result<Level> {
        let deadline = Instant::now() + REST_LIMIT;
        loop {
            interrupt::check()?;
            let now = self.level(None)?;
            let closed = (before.descriptors, before.sockets) == (now.descriptors, now.sockets);
            if closed || Instant::now() > deadline {
                let kernel = memory.map(MemoryGroup::at_rest).transpose()?;
                return Ok(Level { kernel, ..now });
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Removes all that it has made.
    ///
    /// # Errors
    /// When the instance cannot be taken down.
    pub(crate) fn end(self) -> Result<()> {
        self.carnet.call(&["down"])?;
        Ok(())
    }
}

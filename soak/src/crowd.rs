//! Very many connections at once, through one carnet-inspect and through a chain of two.
//!
//! A process may have only so many descriptors, and a service needs two for a connection. So there are
//! *lanes*: a port of the destination with services, a client and a server of its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use carnet_engine::{Engine, Location};
use carnet_testbed::{BpfDirectory, Cgroup, Process, Topology, interrupt};
use rustix::process::{Resource, getrlimit};

use crate::Options;
use crate::command::{Carnet, INSTANCE};

use crate::memory::{Bytes, MemoryGroup};
use crate::sample::{Sockets, descriptors, resident};
use crate::site::{PORT, command, ready, roomy};

/// How long the connections may take altogether.
const LIMIT: Duration = Duration::from_secs(600);
/// How long it may take until nothing is left of them.
const REST_LIMIT: Duration = Duration::from_secs(120);
/// What kernel memory may differ by before and after.
const MARGIN: Bytes = 8 << 20;
/// Memory that is to stay free, and what a connection may take with one service and with two: what is
/// not there is not tried.
const SPARE: Bytes = 2 << 30;
const NEEDED: [Bytes; 2] = [100 << 10, 150 << 10];

/// What a crowd has shown.
#[derive(Debug)]
pub(crate) struct Crowd {
    /// How many services each connection passed.
    pub(crate) services: usize,
    /// How many lanes there were.
    pub(crate) lanes: u32,
    /// How many connections there were.
    pub(crate) connections: u32,
    /// Seconds until all were there.
    pub(crate) opening: f64,
    /// Seconds until all had echoed once more.
    pub(crate) checking: f64,
    /// Seconds of `carnet flows`, and of `carnet --json flows`.
    pub(crate) listing: [f64; 2],
    /// Seconds of `carnet status`.
    pub(crate) status: f64,
    /// Kernel memory before, with all of them, and after.
    pub(crate) kernel: Option<[Bytes; 3]>,
    /// Resident memory of all services before, with all of them, and after.
    pub(crate) resident: [Bytes; 3],
    /// Descriptors of all services before, with all of them, and after.
    pub(crate) descriptors: [usize; 3],
    /// Sockets in both namespaces before, with all of them, and after.
    pub(crate) sockets: [u64; 3],
    /// Most entries of any map that it fills, and what it holds.
    pub(crate) fullest: String,
    /// What is wrong.
    pub(crate) violations: Vec<String>,
}

/// Runs both.
///
/// # Errors
/// When one cannot be carried out. What they find is in the result.
pub(crate) fn run(options: &Options, memory: Option<&MemoryGroup>) -> Result<Vec<Crowd>> {
    let mut crowds = Vec::new();
    for (services, needed) in (1..).zip(NEEDED) {
        let wanted = needed * u64::from(options.connections) + SPARE;
        let available = available()?;
        if available < wanted {
            eprintln!(
                "    no crowd through {services}: {available} bytes of memory are free, {wanted} are \
                 wanted"
            );
            continue;
        }
        eprintln!("    {} connections through {services}", options.connections);
        let lanes = options.connections.div_ceil(lane());
        let crowd = Site::new(services, lanes)?.crowd(options.connections, memory)?;
        eprintln!("{crowd}");
        crowds.push(crowd);
        interrupt::check()?;
    }
    if crowds.is_empty() {
        bail!("there is too little memory for {} connections", options.connections);
    }
    Ok(crowds)
}

fn available() -> Result<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")).context("MemAvailable")?;
    Ok(kilobytes.trim().parse::<u64>()? * 1024)
}

/// How many connections there can be in a lane: services have two descriptors for each, and some more.
fn lane() -> u32 {
    let maximum = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    u32::try_from(maximum.saturating_sub(1000) / 2).unwrap_or(u32::MAX).max(1)
}

/// Where a crowd is.
struct Site {
    // In the order in which they are to go.
    inspects: Vec<Process>,
    servers: Vec<Process>,
    engine: Engine,
    carnet: Carnet,
    _pins: BpfDirectory,
    _cgroups: Vec<Cgroup>,
    apps: Cgroup,
    _scope: Cgroup,
    topology: Topology,
}

/// What there is at one moment.
struct Now {
    kernel: Option<Bytes>,
    resident: Bytes,
    descriptors: usize,
    sockets: u64,
}

fn address(lane: u32) -> SocketAddr {
    (Topology::DESTINATION_V4, port(lane)).into()
}

fn port(lane: u32) -> u16 {
    PORT + lane as u16
}

impl Site {
    fn new(services: usize, lanes: u32) -> Result<Self> {
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

    fn crowd(self, connections: u32, memory: Option<&MemoryGroup>) -> Result<Crowd> {
        let mut violations = Vec::new();
        let before = self.now(memory)?;
        let lanes = self.servers.len() as u32;
        let mut clients = Vec::new();
        for lane in 0..lanes {
            let count = connections / lanes + u32::from(lane < connections % lanes);
            let mut client = command("crowd-client")?;
            client.args(["--to", &address(lane).to_string(), "--count", &count.to_string()]);
            self.apps.enter_command(&mut client)?;
            self.topology.client.enter_command(&mut client)?;
            clients.push(Process::spawn(&mut client)?);
        }
        let opening = seconds(&clients, "open")?;

        let with = self.now(memory)?;
        let timed = |arguments: &[&str]| -> Result<f64> {
            let begun = Instant::now();
            self.carnet.call(arguments)?;
            Ok(begun.elapsed().as_secs_f64())
        };
        let status = timed(&["status"])?;
        let listing = [timed(&["flows"])?, timed(&["--json", "flows"])?];
        let listed = self.carnet.json(&["flows"])?;
        let listed = listed.as_array().map_or(0, Vec::len);
        if listed != connections as usize {
            violations.push(format!("carnet flows lists {listed} flows of {connections}"));
        }
        let maps = self.engine.status()?.maps;
        let fullest = maps.iter().max_by_key(|map| map.used * 1000 / map.capacity.max(1));
        let fullest = fullest.context("no maps")?;
        let fullest = format!("{}: {} of {}", fullest.what, fullest.used, fullest.capacity);

        for client in &mut clients {
            client.write_line("check")?;
        }
        let checking = seconds(&clients, "checked")?;
        for client in &mut clients {
            client.close_input();
        }
        for client in &mut clients {
            let status = client.wait(LIMIT)?;
            if !status.success() {
                violations.push(format!("a client ended with {status}"));
            }
        }
        let after = self.rest(&before, memory)?;
        let account = self.engine.account()?;
        let services = self.inspects.len() / lanes as usize;
        let legs = u64::from(connections) * services as u64;
        if account.tcp.difference() != 0 || account.tcp.delivered != legs {
            violations.push(format!("{legs} legs were to be delivered: {account:?}"));
        }
        if (before.descriptors, before.sockets) != (after.descriptors, after.sockets) {
            violations.push("not all descriptors and sockets are closed".into());
        }
        let kernel = match (before.kernel, with.kernel, after.kernel) {
            (Some(before), Some(with), Some(after)) => Some([before, with, after]),
            _ => None,
        };
        if let Some([before, _, after]) = kernel
            && after > before + MARGIN
        {
            violations.push(format!("kernel memory has grown from {before} to {after} bytes"));
        }
        let crowd = Crowd {
            services,
            lanes,
            connections,
            opening,
            checking,
            listing,
            status,
            kernel,
            resident: [before.resident, with.resident, after.resident],
            descriptors: [before.descriptors, with.descriptors, after.descriptors],
            sockets: [before.sockets, with.sockets, after.sockets],
            fullest,
            violations,
        };
        self.carnet.call(&["down"])?;
        Ok(crowd)
    }

    fn now(&self, memory: Option<&MemoryGroup>) -> Result<Now> {
        let (mut memory_of, mut open) = (0, 0);
        for inspect in &self.inspects {
            memory_of += resident(inspect.id())?;
            open += descriptors(inspect.id())?;
        }
        let [near, far] = [&self.topology.client, &self.topology.destination].map(Sockets::of);
        let (near, far) = (near?, far?);
        Ok(Now {
            kernel: memory.map(MemoryGroup::kernel).transpose()?,
            resident: memory_of,
            descriptors: open,
            sockets: near.tcp + far.tcp + near.udp + far.udp,
        })
    }

    /// Waits until as much is there as before, and gives what is there then, or in the end.
    fn rest(&self, before: &Now, memory: Option<&MemoryGroup>) -> Result<Now> {
        let deadline = Instant::now() + REST_LIMIT;
        loop {
            interrupt::check()?;
            if let Some(memory) = memory {
                memory.reclaim();
            }
            let now = self.now(memory)?;
            let closed = (before.descriptors, before.sockets) == (now.descriptors, now.sockets);
            let given_back = now.kernel <= before.kernel.map(|kernel| kernel + MARGIN);
            if closed && given_back || Instant::now() > deadline {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

/// The seconds that the slowest client says it took for what it did.
fn seconds(clients: &[Process], what: &str) -> Result<f64> {
    let mut most = 0_f64;
    for client in clients {
        let line = client.wait_for_line(what, LIMIT, |line| line.starts_with(what))?;
        let seconds: f64 = line.split(' ').nth(1).context("no seconds")?.parse()?;
        most = most.max(seconds);
    }
    Ok(most)
}

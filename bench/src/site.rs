//! Where one thing is measured: two network namespaces, a cgroup with a client in it, a server, and
//! what is to lie between them. Sites stand side by side, so that what is compared can be measured
//! in turn without changing anything.

use std::collections::BTreeMap;
use std::env;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use carnet_core::event::Counter;
use carnet_core::object::{
    CgroupRef, Conditions, FilterAction, NewFilter, NewService, Policy, Weight,
};
use carnet_engine::{Engine, Location, UpOptions};
use carnet_testbed::{BpfDirectory, Cgroup, NetworkNamespace, Process, Topology, interrupt};
use serde::Serialize;

use crate::client::{Exchange, Load, Measured};
use crate::firewall;

use crate::processor::Used;
use crate::reference::Reference;
use crate::server::Server;

/// The user as which relays run: nobody. nftables tells them from the client by it.
const RELAY_USER: u32 = 65534;
/// How long a process may take to be ready.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a load may take: a hundred times as long as the largest should.
const LOAD_DEADLINE: Duration = Duration::from_secs(600);
/// What the names of the engine's programs begin with.
const PREFIX: &str = "carnet_";
/// The provider of all services and sublayers, and the name of the instance.
const NAME: &str = "bench";

/// Time and number of runs of a BPF program.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Runs {
    /// The time of all runs.
    pub(crate) nanoseconds: u64,
    /// How many there were.
    pub(crate) count: u64,
}

/// What relays connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Relay {
    /// carnet-inspect: tokio, inspection of the first bytes, a log.
    Inspect,
    /// Blocking threads that do nothing but relay.
    Bare,
}

/// A place to measure in. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Site {
    // In the order in which they are to go.
    relays: Vec<Process>,
    server: Server,
    engine: Option<(Engine, BpfDirectory)>,
    reference: Option<Reference>,
    services: Vec<Cgroup>,
    client: Cgroup,
    scope: Cgroup,
    topology: Topology,
}

impl Site {
    /// A site whose server is in the client's namespace, at this address, and does what the
    /// exchange says.
    ///
    /// # Errors
    /// When namespaces or cgroups cannot be made.
    pub(crate) fn near(address: impl Into<IpAddr>, exchange: Exchange) -> Result<Self> {
        Self::new(|topology| &topology.client, address.into(), exchange)
    }

    /// A site whose server is in another namespace than the client, at the other end of a cable.
    ///
    /// # Errors
    /// When namespaces or cgroups cannot be made.
    pub(crate) fn far(exchange: Exchange) -> Result<Self> {
        Self::new(|topology| &topology.destination, Topology::DESTINATION_V4.into(), exchange)
    }

    fn new(
        namespace: impl FnOnce(&Topology) -> &NetworkNamespace,
        address: IpAddr,
        exchange: Exchange,
    ) -> Result<Self> {
        let topology = Topology::client_and_destination()?;
        let scope = Cgroup::create("carnet-bench")?;
        let client = scope.child("client")?;
        let server = Server::start(namespace(&topology), (address, 0).into(), exchange)?;
        Ok(Self {
            relays: Vec::new(),
            server,
            engine: None,
            reference: None,
            services: Vec::new(),
            client,
            scope,
            topology,
        })
    }

    /// Brings an engine up with an empty policy, for this site alone.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) fn bring_engine_up(&mut self) -> Result<()> {
        let pins = BpfDirectory::create("carnet-bench")?;
        let location = Location::new(Some(pins.path().to_owned()), NAME)?;
        let mut engine = Engine::up(&location, &UpOptions::new(self.scope.path()))?;
        engine.transact(|policy| -> Result<()> {
            policy.add_provider(NAME, "")?;
            Ok(())
        })?;
        self.engine = Some((engine, pins));
        Ok(())
    }

    /// Attaches a program that does nothing to this site's connect hook.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub(crate) fn attach_reference(&mut self) -> Result<()> {
        self.reference = Some(Reference::attach(self.scope.path())?);
        Ok(())
    }

    /// The runs of this site's BPF programs until now, by hook, since statistics are taken.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn runs(&self) -> Result<BTreeMap<String, Runs>> {
        let mut all = BTreeMap::new();
        if let Some(reference) = &self.reference {
            let (nanoseconds, count) = reference.runs()?;
            all.insert("connect4".to_owned(), Runs { nanoseconds, count });
        }
        if let Some((engine, _)) = &self.engine {
            for program in engine.status()?.programs {
                let hook = program.name.trim_start_matches(PREFIX).to_owned();
                let nanoseconds = program.run_time.as_nanos() as u64;
                all.insert(hook, Runs { nanoseconds, count: program.run_count });
            }
        }
        Ok(all)
    }

    /// The engine.
    fn engine(&self) -> Result<&Engine> {
        let (engine, _) = self.engine.as_ref().context("the engine is not up")?;
        Ok(engine)
    }

    /// Changes the policy of this site's engine.
    fn change(&mut self, change: impl FnOnce(&mut Policy) -> Result<()>) -> Result<()> {
        let (engine, _) = self.engine.as_mut().context("the engine is not up")?;
        engine.transact(change)
    }

    /// Adds a sublayer with a permitting filter for each of these destinations.
    ///
    /// # Errors
    /// When the engine does not take them.
    pub(crate) fn add_filters(&mut self, destinations: &[IpAddr]) -> Result<()> {
        self.change(|policy| {
            policy.add_sublayer("filters", NAME, 100)?;
            for &address in destinations {
                let destinations = vec![address.into()];
                policy.add_filter(NewFilter {
                    name: None,
                    sublayer: "filters".into(),
                    weight: Weight::Auto,
                    conditions: Conditions { destinations, ..Conditions::default() },
                    action: FilterAction::PERMIT,
                })?;
            }
            Ok(())
        })
    }

    /// Adds a service, after those that are there, with a filter that sends it every connection,
    /// and makes its cgroup.
    fn add_service(&mut self) -> Result<()> {
        let place = self.services.len() as u16;
        let name = format!("service-{}", place + 1);
        let cgroup = self.scope.child(&name)?;
        let root = carnet_engine::cgroup::mount_point()?;
        let path = cgroup.path().strip_prefix(root).context("a cgroup outside of its mount")?;
        let reference = CgroupRef { path: format!("/{}", path.display()), id: cgroup.id() };
        self.change(|policy| {
            policy.add_sublayer(&name, NAME, u16::MAX - place)?;
            policy.add_service(NewService::new(&name, NAME, reference))?;
            policy.add_filter(NewFilter {
                name: None,
                sublayer: name.clone(),
                weight: Weight::Auto,
                conditions: Conditions::default(),
                action: FilterAction::Redirect { service: name.clone(), context: None },
            })?;
            Ok(())
        })?;
        self.services.push(cgroup);
        Ok(())
    }

    /// Adds a service that accepts connections and closes them.
    ///
    /// # Errors
    /// When it cannot be set up.
    pub(crate) fn add_sink(&mut self) -> Result<()> {
        self.add_service()?;
        self.start_relay(self.services.len() - 1, &["sink"])?;
        Ok(())
    }

    /// Adds a relay with a service of its own.
    ///
    /// # Errors
    /// When it cannot be set up.
    pub(crate) fn add_relay(&mut self, relay: Relay) -> Result<()> {
        self.add_service()?;
        self.start(self.services.len() - 1, relay, false)?;
        Ok(())
    }

    /// Puts a relay behind nftables' redirection.
    ///
    /// # Errors
    /// When it cannot be set up.
    pub(crate) fn add_relay_behind_nftables(&mut self, relay: Relay) -> Result<()> {
        let SocketAddr::V4(destination) = self.server.address() else {
            bail!("the comparison with nftables is made over IPv4");
        };
        // A cgroup beside the client's, as Carnet's services have: accounting costs the same.
        self.services.push(self.scope.child("relay")?);
        let listening = self.start(self.services.len() - 1, relay, true)?;
        firewall::redirect(&self.topology.client, destination, RELAY_USER, listening.port())
    }

    /// Starts a relay in a service's cgroup; gives its first address.
    fn start(&mut self, service: usize, relay: Relay, conntrack: bool) -> Result<SocketAddr> {
        let user = RELAY_USER.to_string();
        let both = format!("{user}:{user}");
        let mut arguments = match relay {
            // The log is written, but to nowhere: no disk is measured.
            Relay::Inspect => {
                vec!["inspect", "--ready-fd", "1", "--log-file", "/dev/null", "--user", &both]
            }
            Relay::Bare => vec!["relay", "--user", &user],
        };
        match relay {
            _ if !conntrack => {}
            Relay::Inspect => {
                arguments.extend(["--original-destination", "conntrack", "--no-register"]);
            }
            Relay::Bare => arguments.push("--conntrack"),
        }
        let line = self.start_relay(service, &arguments)?;
        let address = line.split(' ').nth(1).context("the relay did not say its address")?;
        Ok(address.parse()?)
    }

    /// Starts this program in a service's cgroup; gives the line with which it says that it is
    /// ready.
    fn start_relay(&mut self, service: usize, arguments: &[&str]) -> Result<String> {
        let cgroup = self.services.get(service).context("no such service")?;
        let process = self.spawn(cgroup, arguments)?;
        let what = format!("the line \"ready\" of {}", arguments.first().unwrap_or(&""));
        let line =
            process.wait_for_line(&what, READY_DEADLINE, |line| line.starts_with("ready"))?;
        self.relays.push(process);
        Ok(line)
    }

    /// Starts this program in a cgroup, in the client's namespace.
    fn spawn(&self, cgroup: &Cgroup, arguments: &[&str]) -> Result<Process> {
        let mut command = Command::new(env::current_exe().context("finding this program")?);
        // What children have to say, they say on their output.
        command.args(arguments).stderr(Stdio::null());
        cgroup.enter_command(&mut command)?;
        self.topology.client.enter_command(&mut command)?;
        Ok(Process::spawn(&mut command)?)
    }

    /// Has the client make connections to the server.
    ///
    /// # Errors
    /// When any of them fails, or brings another response than the server's.
    pub(crate) fn load(
        &self,
        exchange: Exchange,
        connections: u32,
        threads: u32,
    ) -> Result<Measured> {
        interrupt::check()?;
        let load = Load { to: self.server.address(), connections, threads, exchange };
        let arguments = load.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut client = self.spawn(&self.client, &arguments)?;
        let status = client.wait(LOAD_DEADLINE)?;
        interrupt::check()?;
        let lines = client.lines();
        let line = lines.last().map(String::as_str).unwrap_or_default();
        if !status.success() {
            bail!("the client ended with {status}: {line}");
        }
        serde_json::from_str(line).with_context(|| format!("not a client's report: {line:?}"))
    }

    /// The processor time that client, relays, server and the kernel's threads have used until now.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn processor_time(&self) -> Result<Used> {
        Used::now(self.scope.path())
    }

    /// How many connections Carnet has redirected here.
    ///
    /// # Errors
    /// When the counters cannot be read.
    pub(crate) fn redirected_by_carnet(&self) -> Result<u64> {
        let counters = self.engine()?.counters()?;
        let found = counters.iter().find(|(counter, _)| *counter == Counter::Redirected);
        Ok(found.context("the engine does not count redirections")?.1)
    }

    /// How many connections nftables has redirected here.
    ///
    /// # Errors
    /// When nft fails.
    pub(crate) fn redirected_by_nftables(&self) -> Result<u64> {
        firewall::redirected(&self.topology.client)
    }
}

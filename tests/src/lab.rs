//! A scope of its own with an engine, and a network to use it in.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    mem::offset_of,
    net::SocketAddr,
    num::NonZeroU16,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use carnet_core::{
    adoption::HeldFlows,
    event::{Counter, Event, EventKind},
    flow::{Accepted, Handover, HeldKey, LegState, Tuple},
    object::{
        CgroupRef, Conditions, Context, FailurePolicy, FilterAction, NewFilter, NewService, Policy,
        Trust, Weight,
    },
    place::is_held,
    record::HEADER_LENGTH,
    siphash::Key,
};
use carnet_engine::{Engine, EventReader, Location, UpOptions};
use carnet_testbed::{BpfDirectory, Cgroup, EchoServer, PeerClient, Topology, require_root};
use zerocopy::FromBytes as _;

use crate::{Must as _, PATIENCE, Report, Running, puppet::Puppet, service::Behaviour, until};

/// Any error.
pub type Anything = Box<dyn Error + Send + Sync>;

/// Two namespaces, and an echo server on both addresses of the one that is called destination.
#[derive(Debug)]
pub struct Network {
    echo: EchoServer,
    /// The namespaces.
    pub topology: Topology,
}

/// A scope with an engine that is up, and services. See the crate's documentation.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they are to go.
    engine: Mutex<Option<Engine>>,
    services: Mutex<BTreeMap<String, Arc<Cgroup>>>,
    apps: Cgroup,
    scope: Cgroup,
    location: Location,
    udp_idle: Duration,
    pins: BpfDirectory,
    network: Arc<Network>,
}

/// A service that a test wants: in a sublayer of its own, with one filter that redirects.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The sublayer's weight.
    pub weight: u16,
    /// What happens while it has no listener.
    pub on_failure: FailurePolicy,
    /// Whom it trusts.
    pub trust: Trust,
    /// What the filter matches; everything unless said otherwise.
    pub conditions: Conditions,
    /// The filter's context.
    pub context: Option<Vec<u8>>,
    /// Whether the service's program knows nothing of records.
    pub unmodified: bool,
    /// The port at which it takes flows, if it does not register its listeners.
    pub listen_port: Option<NonZeroU16>,
    /// Whether it asks `getsockname()` for the destination.
    pub tproxy: bool,
    /// Whether it may take over flows of other hosts.
    pub gateway: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            weight: 100,
            on_failure: FailurePolicy::Block,
            trust: Trust::None,
            conditions: Conditions::default(),
            context: None,
            unmodified: false,
            listen_port: None,
            tproxy: false,
            gateway: false,
        }
    }
}

impl Network {
    /// Makes the namespaces and starts the server.
    #[track_caller]
    pub fn new() -> Self {
        require_root().must("test without root");
        let topology = Topology::client_and_destination().must("make a network");
        let addresses =
            [(Topology::DESTINATION_V4, 0).into(), (Topology::DESTINATION_V6, 0).into()];
        let echo =
            EchoServer::start_in(&topology.destination, addresses).must("start an echo server");
        Self { echo, topology }
    }

    /// The echo server.
    pub fn echo(&self) -> &EchoServer {
        &self.echo
    }

    /// Another echo server, at a free IPv4 port of the destination.
    #[track_caller]
    pub fn another_echo(&self) -> EchoServer {
        let address = (Topology::DESTINATION_V4, 0).into();
        EchoServer::start_in(&self.topology.destination, [address]).must("start an echo server")
    }

    /// The echo server over IPv4.
    pub fn v4(&self) -> SocketAddr {
        self.echo.addresses()[0]
    }

    /// The echo server over IPv6.
    pub fn v6(&self) -> SocketAddr {
        self.echo.addresses()[1]
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// A lab with a network of its own.
    #[track_caller]
    pub fn new() -> Self {
        Self::beside(&Arc::new(Network::new()))
    }

    /// A lab, with a scope and an engine of its own, on a network that others use as well.
    #[track_caller]
    pub fn beside(network: &Arc<Network>) -> Self {
        Self::make(network, UpOptions::DEFAULT_UDP_IDLE)
    }

    /// A lab with a network of its own, whose UDP flows end when they have been idle for so long.
    #[track_caller]
    pub fn with_udp_idle(idle: Duration) -> Self {
        Self::make(&Arc::new(Network::new()), idle)
    }

    #[track_caller]
    fn make(network: &Arc<Network>, udp_idle: Duration) -> Self {
        let pins = BpfDirectory::create("carnet-e2e").must("make a bpffs");
        let scope = Cgroup::create("carnet-e2e").must("make a cgroup");
        let apps = scope.child("apps").must("make a cgroup");
        let location = Location::new(Some(pins.path().to_owned()), "e2e").must("name a place");
        let lab = Self {
            engine: Mutex::default(),
            services: Mutex::default(),
            apps,
            scope,
            location,
            udp_idle,
            pins,
            network: Arc::clone(network),
        };
        lab.up();
        lab
    }

    /// Brings the engine up, with an empty policy. That it is already, unless it was taken down.
    #[track_caller]
    pub fn up(&self) {
        let mut options = UpOptions::new(self.scope.path());
        options.udp_idle = self.udp_idle;
        self.up_with(&options);
    }

    /// Brings the engine up, with an empty policy and these options.
    #[track_caller]
    pub fn up_with(&self, options: &UpOptions) {
        let engine = Engine::up(&self.location, options).must("bring the engine up");
        *self.own_engine() = Some(engine);
    }

    /// The network.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// The redirected cgroup.
    pub fn scope(&self) -> &Cgroup {
        &self.scope
    }

    /// The cgroup of the clients, in the scope.
    pub fn apps(&self) -> &Cgroup {
        &self.apps
    }

    /// Where the engine's pins are.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The bpffs.
    pub fn pins(&self) -> &BpfDirectory {
        &self.pins
    }

    /// The destination over IPv4.
    pub fn v4(&self) -> SocketAddr {
        self.network.v4()
    }

    /// The destination over IPv6.
    pub fn v6(&self) -> SocketAddr {
        self.network.v6()
    }

    /// Another handle of the engine.
    #[track_caller]
    pub fn engine(&self) -> Engine {
        Engine::open(&self.location).must("open the engine")
    }

    fn own_engine(&self) -> MutexGuard<'_, Option<Engine>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the engine down.
    #[track_caller]
    pub fn down(&self) {
        let engine = self.own_engine().take().expect("an engine that is up");
        engine.down().must("take the engine down");
    }

    /// Changes the policy in one transaction.
    #[track_caller]
    pub fn change<T>(&self, change: impl FnOnce(&mut Policy) -> Result<T, Anything>) -> T {
        let mut engine = self.own_engine();
        let engine = engine.as_mut().expect("an engine that is up");
        engine.transact(change).must("change the policy")
    }

    /// Adds a service that gets every connection, in a sublayer of this weight.
    #[track_caller]
    pub fn service(&self, name: &str, weight: u16) {
        self.service_with(name, Plan { weight, ..Plan::default() });
    }

    /// Adds a service with its cgroup, provider, sublayer and filter; all of them have its name.
    #[track_caller]
    pub fn service_with(&self, name: &str, plan: Plan) {
        let cgroup = self.made(name).unwrap_or_else(|| {
            Arc::new(self.scope.child(&format!("service-{name}")).must("make a cgroup"))
        });
        self.service_in(name, cgroup, plan);
    }

    /// The same, in a cgroup that the test has made.
    #[track_caller]
    pub fn service_in(&self, name: &str, cgroup: Arc<Cgroup>, plan: Plan) {
        let reference = reference_of(&cgroup);
        let Plan { weight, on_failure, trust, conditions, context, .. } = plan;
        let Plan { unmodified, listen_port, tproxy, gateway, .. } = plan;
        self.change(|policy| {
            policy.add_provider(name, "")?;
            policy.add_sublayer(name, name, weight)?;
            let new = NewService::new(name, name, reference);
            let new = NewService { on_failure, trust, ..new };
            policy.add_service(NewService { unmodified, listen_port, tproxy, gateway, ..new })?;
            let context = context.map(Context::new).transpose()?;
            policy.add_filter(NewFilter {
                name: Some(name.into()),
                sublayer: name.into(),
                weight: Weight::Auto,
                conditions,
                action: FilterAction::Redirect { service: name.into(), context },
            })?;
            Ok(())
        });
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        services.insert(name.into(), cgroup);
    }

    /// The cgroup that was made for a service, if one was: it outlives an engine.
    fn made(&self, service: &str) -> Option<Arc<Cgroup>> {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        services.get(service).map(Arc::clone)
    }

    /// A service's cgroup.
    #[track_caller]
    pub fn cgroup_of(&self, service: &str) -> Arc<Cgroup> {
        self.made(service).expect("a service that the test has added")
    }

    /// A service's redirect handle.
    #[track_caller]
    pub fn handle_of(&self, service: &str) -> u64 {
        self.policy().service(service).must("find the service").handle
    }

    /// The policy, as the kernel keeps it.
    #[track_caller]
    pub fn policy(&self) -> Policy {
        self.engine().policy().must("read the policy")
    }

    /// Starts an honest service.
    #[track_caller]
    pub fn start(&self, service: &str) -> Running {
        self.start_with(service, &Behaviour::default())
    }

    /// Starts a service.
    #[track_caller]
    pub fn start_with(&self, service: &str, behaviour: &Behaviour) -> Running {
        let cgroup = self.cgroup_of(service);
        Running::start(&self.network.topology.client, &cgroup, behaviour)
    }

    /// Adds and starts honest services, the heaviest first.
    #[track_caller]
    pub fn start_chain(&self, names: &[&str]) -> Vec<Running> {
        let start = |(weight, name): (u16, &&str)| {
            self.service(name, weight);
            self.start(name)
        };
        (1000 - names.len() as u16..1000).rev().zip(names).map(start).collect()
    }

    /// A puppet in a service's cgroup, in the clients' network namespace.
    #[track_caller]
    pub fn puppet_of(&self, service: &str) -> Puppet {
        let cgroup = self.cgroup_of(service);
        Puppet::start(&self.network.topology.client, &cgroup, None)
    }

    /// A puppet among the clients.
    #[track_caller]
    pub fn puppet(&self) -> Puppet {
        Puppet::start(&self.network.topology.client, &self.apps, None)
    }

    /// A client of the echo server, among the clients.
    pub fn client(&self, to: SocketAddr) -> PeerClient<'_> {
        PeerClient::new(to)
            .in_namespace(&self.network.topology.client)
            .in_cgroup(&self.apps)
            .timeout(PATIENCE)
    }

    /// Has a client make one connection and checks every byte.
    #[track_caller]
    pub fn exchange(&self, to: SocketAddr) {
        let reports = self.client(to).run().must("run a client");
        assert!(reports.iter().all(|report| report.ok), "{reports:?}");
    }

    /// Has a client make one connection that must fail to connect; gives the errno's name.
    #[track_caller]
    pub fn refused(&self, to: SocketAddr) -> String {
        let reports = self.client(to).run().must("run a client");
        let [report] = &reports[..] else { panic!("one report instead of {reports:?}") };
        assert!(!report.ok && report.stage == Some(carnet_testbed::Stage::Connect), "{report:?}");
        report.errno.clone().unwrap_or_default()
    }

    /// A reader of the engine's events from now on.
    #[track_caller]
    pub fn trace(&self) -> Trace {
        let engine = self.engine();
        let reader = engine.events().must("read events");
        Trace { _engine: engine, reader, events: Vec::new() }
    }

    /// A counter's value.
    #[track_caller]
    pub fn counter(&self, counter: Counter) -> u64 {
        let counters = self.engine().counters().must("read the counters");
        let found = counters.iter().find(|(candidate, _)| *candidate == counter);
        found.expect("every counter").1
    }

    /// The two keys that the kernel has, as root can read them: the one under which records are issued,
    /// and the other one.
    #[track_caller]
    pub fn keys(&self) -> [Key; 2] {
        const KEY: usize = size_of::<Key>();
        let pin = |name| {
            let path = self.location.directory().join("maps").join(name);
            Map::Array(MapData::from_pin(path).must("open a map"))
        };
        let current = Array::<_, u64>::try_from(pin("CURRENT_KEY")).must("read CURRENT_KEY");
        let place = current.get(&0, 0).must("read CURRENT_KEY") as u32;
        let keys = Array::<_, [u8; KEY]>::try_from(pin("KEYS")).must("read KEYS");
        [place, place ^ 1].map(|place| {
            let key = keys.get(&place, 0).must("read KEYS");
            Key::read_from_bytes(&key).expect("the size of a key")
        })
    }

    /// Waits until the kernel keeps nothing of any socket that connected, or tried to: once all of them
    /// are closed.
    #[track_caller]
    pub fn settle_sockets(&self) {
        self.settle();
        let engine = self.engine();
        let connecting = || held::<LEG>(&engine, "CONNECTING", COOKIE_OF_LEG);
        until("the end of all sockets' legs", connecting, |legs| *legs == 0);
    }

    /// A table of places of the kernel's.
    #[track_caller]
    pub fn places<const SIZE: usize>(&self, table: &str) -> Places<SIZE> {
        places(&self.engine(), table)
    }

    /// Has all places of a table taken, each by what is given.
    #[track_caller]
    pub fn occupy<const SIZE: usize>(&self, table: &str, by: [u8; SIZE]) -> Occupied<SIZE> {
        let mut places = self.places(table);
        for place in 0..places.len() {
            places.set(place, by, 0).must("take a place");
        }
        Occupied { places, by }
    }

    /// Waits until the kernel keeps nothing of any connection any more: no flow is listed, no leg waits to
    /// be handed over or asked about, and no service holds any.
    #[track_caller]
    pub fn settle(&self) {
        self.settle_but_for(&[]);
    }

    /// The same, but for what these processes have open.
    #[track_caller]
    pub fn settle_but_for(&self, processes: &[u32]) {
        let engine = self.engine();
        let state = || {
            let mut flows = engine.flows().must("list flows");
            flows.retain(|flow| !processes.contains(&flow.pid));
            (flows, kept(&engine))
        };
        until("the end of all flows", state, |(flows, kept)| flows.is_empty() && *kept == 0);
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

/// How much the kernel keeps apart from sockets: legs that wait to be handed over to the accepting side,
/// those that were, and destinations for which unmodified services hold flows.
#[track_caller]
fn kept(engine: &Engine) -> usize {
    held::<{ size_of::<u64>() }>(engine, "WAITING", 0)
        + entries::<{ size_of::<Tuple>() }, { size_of::<Handover>() }>(engine, "HANDOVER")
        + entries::<{ size_of::<u64>() }, LEG>(engine, "COPIES")
        + held::<{ size_of::<Accepted>() }>(engine, "ACCEPTED", offset_of!(Accepted, cookie))
        + entries::<{ size_of::<HeldKey>() }, { size_of::<HeldFlows>() }>(engine, "HELD")
}

/// Size of a leg.
const LEG: usize = size_of::<LegState>();
/// Where in it the cookie is.
const COOKIE_OF_LEG: usize = offset_of!(LegState, cookie);

/// A table of places ([`carnet_core::place`]) of the kernel's.
pub type Places<const SIZE: usize> = Array<MapData, [u8; SIZE]>;

#[track_caller]
fn places<const SIZE: usize>(engine: &Engine, table: &str) -> Places<SIZE> {
    let pin = engine.location().directory().join("maps").join(table);
    let map = Map::Array(MapData::from_pin(pin).must("open a table of places"));
    map.try_into().must("use a table of places")
}

/// How many places of a table have a holder, whose cookie is at this offset.
#[track_caller]
fn held<const SIZE: usize>(engine: &Engine, table: &str, cookie: usize) -> usize {
    let holder = |place: [u8; SIZE]| {
        let (holder, _) = u64::read_from_prefix(&place[cookie..]).expect("8 bytes");
        holder
    };
    let places = places::<SIZE>(engine, table);
    let holders = places.iter().map(|place| holder(place.must("read a place")));
    holders.filter(|holder| is_held(*holder)).count()
}

/// A table of places that are all taken. See [`Lab::occupy`].
#[expect(missing_debug_implementations, reason = "aya's maps have none")]
pub struct Occupied<const SIZE: usize> {
    places: Places<SIZE>,
    by: [u8; SIZE],
}

impl<const SIZE: usize> Occupied<SIZE> {
    /// Frees those that still are.
    #[track_caller]
    pub fn leave(mut self) {
        for place in 0..self.places.len() {
            if self.places.get(&place, 0).must("read a place") == self.by {
                self.places.set(place, [0; SIZE], 0).must("free a place");
            }
        }
    }
}

/// How many entries a map has.
#[track_caller]
fn entries<const KEY: usize, const VALUE: usize>(engine: &Engine, map: &str) -> usize {
    let pin = engine.location().directory().join("maps").join(map);
    let map = Map::HashMap(MapData::from_pin(pin).must("open a map"));
    let map = HashMap::<_, [u8; KEY], [u8; VALUE]>::try_from(map).must("read a map");
    map.keys().count()
}

/// A cgroup, as policies name it.
#[track_caller]
pub fn reference_of(cgroup: &Cgroup) -> CgroupRef {
    let root = carnet_engine::cgroup::mount_point().must("find the cgroup2 hierarchy");
    let path = cgroup.path().strip_prefix(root).must("name a cgroup");
    CgroupRef { path: format!("/{}", path.display()), id: cgroup.id() }
}

/// What the engine tells of its decisions, collected.
#[derive(Debug)]
pub struct Trace {
    reader: EventReader,
    _engine: Engine,
    events: Vec<Event>,
}

impl Trace {
    /// Reads events until there is enough; gives all since the trace began.
    #[track_caller]
    pub fn until(&mut self, what: &str, enough: impl Fn(&[Event]) -> bool) -> &[Event] {
        let deadline = Instant::now() + PATIENCE;
        while !enough(&self.events) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {PATIENCE:?} in vain for {what}: {:#?}", self.events);
            let next = self.reader.next_timeout(left.min(Duration::from_secs(1)));
            self.events.extend(next.must("read an event"));
        }
        &self.events
    }

    /// Reads events until one is of this kind, and gives the first such one.
    #[track_caller]
    pub fn first(&mut self, kind: EventKind) -> Event {
        let is_it = |event: &&Event| event.kind == kind as u32;
        let events = self.until(&format!("{kind:?}"), |events| events.iter().any(|e| is_it(&e)));
        *events.iter().find(is_it).expect("the event that was waited for")
    }

    /// Reads events as they come for as long as something goes on; then what is left.
    #[track_caller]
    pub fn collect_while(&mut self, goes_on: impl Fn() -> bool) -> &[Event] {
        while goes_on() {
            let next = self.reader.next_timeout(Duration::from_millis(50));
            self.events.extend(next.must("read an event"));
        }
        self.drain()
    }

    /// Reads what is there already, without waiting for more.
    #[track_caller]
    pub fn drain(&mut self) -> &[Event] {
        while let Some(event) = self.reader.next_timeout(Duration::ZERO).must("read an event") {
            self.events.push(event);
        }
        &self.events
    }
}

/// Checks that the services, given in the order in which they are to see every flow, have handed on
/// the same `count` flows, each exactly once, with records that name all services before; gives the
/// flows' numbers.
#[track_caller]
pub fn handed_on(chain: &[(u64, Vec<Report>)], count: usize) -> BTreeSet<u64> {
    let flows_of =
        |reports: &[Report]| -> BTreeSet<u64> { reports.iter().map(|r| r.flow).collect() };
    let flows = chain.first().map(|(_, reports)| flows_of(reports)).unwrap_or_default();
    assert_eq!(flows.len(), count, "{chain:#?}");
    let handles: Vec<u64> = chain.iter().map(|(handle, _)| *handle).collect();
    for (place, (handle, reports)) in chain.iter().enumerate() {
        assert_eq!(reports.len(), count, "the service in place {place}: {reports:#?}");
        assert_eq!(flows_of(reports), flows, "the service in place {place}");
        for report in reports {
            let hops = place + 1;
            assert_eq!(report.handle, *handle, "{report:#?}");
            assert_eq!(report.hops as usize, hops, "{report:#?}");
            assert_eq!(report.legs as usize, hops, "{report:#?}");
            assert_eq!(report.record.len(), HEADER_LENGTH + 16 * hops, "{report:#?}");
            let record = report.parsed();
            let named: Vec<u64> = record.hops[..hops].iter().map(|hop| hop.handle).collect();
            assert_eq!(named, handles[..hops], "{report:#?}");
            assert!(report.onward.is_ok(), "{report:#?}");
        }
    }
    flows
}

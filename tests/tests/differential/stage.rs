//! Where the cases take place: two network namespaces, services and applications in cgroups, an
//! engine, and records of flows that have been through services.

use std::{fs, path::PathBuf, process::Command};

use carnet_core::{
    compile::{CompiledPolicy, compile},
    explain::Process,
    object::{
        CgroupCondition, CgroupRef, Conditions, ExecutableCondition, FilterAction, NetnsCondition,
        NewFilter, NewService, Policy, Weight,
    },
    record::FileId,
};
use carnet_engine::{Engine, EventReader, Location, UpOptions};
use carnet_reference::{
    History,
    generate::{self, Choices as _, World},
};
use carnet_testbed::{BpfDirectory, Cgroup, NetworkNamespace, connect_veth, require_root};
use carnet_tests::{
    Anything, Must as _,
    caller::{Arrival, Call, Caller, Door, Order, Outcome},
    program,
};

use crate::random::Random;

/// Services of every policy.
const SERVICES: usize = 6;
/// A service that is in records, and in no policy any more.
const STRANGER: usize = SERVICES;
/// Whole chains whose records are collected.
const CHAINS: u64 = 14;
/// Every socket that a service can have: both protocols and families.
pub(crate) const DOORS: [Door; 4] = [
    Door { protocol: 6, ipv6: false },
    Door { protocol: 6, ipv6: true },
    Door { protocol: 17, ipv6: false },
    Door { protocol: 17, ipv6: true },
];
/// Addresses of a namespace's own, in a network that no case has a destination in.
const OWN_ADDRESSES: [&str; 2] = ["198.18.0.1/32", "2001:db8:ffff:ffff::1/128"];

/// A process that opens flows.
pub(crate) struct Member {
    pub(crate) caller: Caller,
    /// What filters can ask about it; the user changes from call to call.
    pub(crate) process: Process,
    /// In words.
    pub(crate) name: String,
    /// The service that it is, by its place among the services.
    pub(crate) service: Option<usize>,
    /// Whether services listen in its network namespace.
    pub(crate) at_home: bool,
}

/// A service.
pub(crate) struct Service {
    pub(crate) handle: u64,
    /// Its process, by its place among the members.
    pub(crate) member: usize,
    /// The sockets that it has registered.
    pub(crate) doors: Vec<Door>,
}

/// A record that a service was given, and can set.
pub(crate) struct Kept {
    pub(crate) history: History,
    /// The program with which the flow began.
    pub(crate) original: FileId,
    /// The service, by its place; it has the record in this place.
    pub(crate) service: usize,
    pub(crate) place: usize,
}

/// See the module.
pub(crate) struct Stage {
    // In the order in which they are to go.
    pub(crate) events: EventReader,
    engine: Engine,
    pub(crate) members: Vec<Member>,
    pub(crate) services: Vec<Service>,
    pub(crate) kept: Vec<Kept>,
    world: World,
    pub(crate) policy: Policy,
    pub(crate) compiled: CompiledPolicy,
    _programs: Programs,
    _namespaces: [NetworkNamespace; 2],
    /// Where everything goes that passes, and nobody is.
    _void: NetworkNamespace,
    _cgroups: Vec<Cgroup>,
    _pins: BpfDirectory,
}

/// Two copies of the program of callers: two programs for the kernel.
struct Programs(PathBuf);

impl Programs {
    fn new(pins: &BpfDirectory) -> Self {
        let name = pins.path().file_name().expect("a directory's name");
        let directory = std::env::temp_dir().join(name).with_extension("programs");
        fs::create_dir(&directory).must("make a directory for programs");
        let programs = Self(directory);
        for copy in programs.paths() {
            fs::copy(program("test-caller"), copy).must("copy a program");
        }
        programs
    }

    fn paths(&self) -> [PathBuf; 2] {
        ["one", "two"].map(|name| self.0.join(name))
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

impl Stage {
    pub(crate) fn new() -> Self {
        require_root().must("test without root");
        let void = NetworkNamespace::create("void").must("make a namespace");
        let namespaces = ["home", "away"].map(|label| {
            let namespace = NetworkNamespace::create(label).must("make a namespace");
            connect_veth(&namespace, "void", &void, label).must("connect namespaces");
            for address in OWN_ADDRESSES {
                namespace.add_address(address, "void").must("add an address");
            }
            namespace.route_all_to("void").must("route everything");
            namespace
        });
        let pins = BpfDirectory::create("carnet-differential").must("make a bpffs");
        let programs = Programs::new(&pins);
        let scope = Cgroup::create("carnet-differential").must("make a cgroup");
        let location =
            Location::new(Some(pins.path().to_owned()), "differential").must("name a place");
        let mut engine =
            Engine::up(&location, &UpOptions::new(scope.path())).must("bring the engine up");

        let make = |parent: &Cgroup, name: &str| parent.child(name).must("make a cgroup");
        let apps = make(&scope, "apps");
        let inner = make(&apps, "inner");
        let other = make(&scope, "other");
        let service_cgroups: Vec<Cgroup> =
            (0..=SERVICES).map(|n| make(&scope, &format!("service-{n}"))).collect();

        let mut members = Vec::new();
        let mut join = |program: usize, namespace: usize, cgroup: &Cgroup, name, service| {
            let command = Command::new(&programs.paths()[program]);
            let caller = Caller::start(command, &namespaces[namespace], cgroup);
            let process = engine.describe_process(caller.id()).must("describe a process");
            members.push(Member { caller, process, name, service, at_home: namespace == 0 });
            members.len() - 1
        };
        for program in 0..2 {
            for (cgroup, name) in [(&apps, "apps"), (&inner, "apps/inner"), (&other, "other")] {
                join(program, 0, cgroup, format!("program {program} in {name}"), None);
            }
        }
        join(0, 1, &apps, "program 0 in apps, in the namespace without services".into(), None);
        let service_members: Vec<usize> = (0..=SERVICES)
            .map(|n| join(n % 2, 0, &service_cgroups[n], format!("service s{n}"), Some(n)))
            .collect();

        let world = World {
            cgroups: [&apps, &inner, &other, &service_cgroups[0], &service_cgroups[1]]
                .map(|cgroup| {
                    let (id, level) = Engine::resolve_cgroup(cgroup.path()).must("resolve");
                    CgroupCondition { path: cgroup.path().display().to_string(), id, level }
                })
                .into(),
            executables: programs
                .paths()
                .map(|path| ExecutableCondition {
                    file: engine.resolve_executable(&path).must("resolve an executable"),
                    path: path.display().to_string(),
                })
                .into(),
            namespaces: namespaces
                .iter()
                .map(|namespace| NetnsCondition {
                    name: namespace.label().into(),
                    cookie: namespace.cookie().must("ask for a cookie"),
                })
                .collect(),
        };
        let policy = engine
            .transact(|policy| {
                policy.add_provider("p", "")?;
                for (n, cgroup) in service_cgroups.iter().enumerate() {
                    let cgroup = reference_of(cgroup)?;
                    policy.add_service(NewService::new(format!("s{n}"), "p", cgroup))?;
                }
                Ok::<_, Anything>(policy.clone())
            })
            .must("add the services");
        let services = policy
            .services()
            .iter()
            .zip(service_members)
            .map(|(service, member)| Service { handle: service.handle, member, doors: Vec::new() })
            .collect();
        let events = engine.events().must("read events");
        let compiled = compile(&policy, 1).must("compile");
        let mut cgroups = service_cgroups;
        cgroups.extend([inner, apps, other, scope]);
        Self {
            events,
            engine,
            members,
            services,
            kept: Vec::new(),
            world,
            policy,
            compiled,
            _programs: programs,
            _namespaces: namespaces,
            _void: void,
            _cgroups: cgroups,
            _pins: pins,
        }
    }

    /// Puts a policy in force.
    pub(crate) fn put_in_force(&mut self, policy: &Policy) {
        let put = |old: &mut Policy| {
            old.clone_from(policy);
            Ok::<_, Anything>(())
        };
        self.engine.transact(put).must("change the policy");
        self.policy.clone_from(policy);
        self.compiled = compile(policy, 1).must("compile the policy");
    }

    /// Puts a random policy in force, and has services open and close their sockets.
    pub(crate) fn change_policy(&mut self, random: &mut Random, most_filters: u64) {
        let mut policy = self.policy.clone();
        generate::replace(&mut policy, &self.world, most_filters, random).must("make a policy");
        self.put_in_force(&policy);
        for service in 0..SERVICES {
            let doors = match random.below(8) {
                0 | 1 => Vec::new(),
                2 => DOORS.into_iter().filter(|_| random.one_in(2)).collect(),
                _ => DOORS.to_vec(),
            };
            self.listen(service, &doors);
        }
    }

    fn listen(&mut self, service: usize, doors: &[Door]) {
        let Service { member, doors: open, .. } = &mut self.services[service];
        let caller = &mut self.members[*member].caller;
        caller.order(&Order::Listen(doors.to_vec()));
        caller.done();
        *open = doors.to_vec();
    }

    /// Whether the service with this handle can take a flow of a member.
    pub(crate) fn is_live(&self, handle: u64, member: usize, protocol: u8, ipv6: bool) -> bool {
        let door = Door { protocol, ipv6 };
        let has_it = |s: &Service| s.handle == handle && s.doors.contains(&door);
        self.members[member].at_home && self.services.iter().any(has_it)
    }

    /// Closes all flows. The clients go first.
    pub(crate) fn close(&mut self) {
        for member in &mut self.members {
            member.caller.order(&Order::Close);
            member.caller.done();
        }
    }

    /// Has flows go through chains of services, which forget the record a few times, and keeps the
    /// records that they were given; then one of the services is removed.
    pub(crate) fn collect_records(&mut self, random: &mut Random) {
        for service in 0..=SERVICES {
            self.listen(service, &DOORS);
        }
        for _ in 0..CHAINS {
            let mut order: Vec<usize> = (0..=SERVICES).collect();
            for at in (1..order.len()).rev() {
                order.swap(at, random.below(at as u64 + 1) as usize);
            }
            let mut policy = self.policy.clone();
            in_this_order(&mut policy, &order).must("make a policy");
            self.put_in_force(&policy);
            let forgotten = *random.pick(&[0, 0, 0, 1, 3, 6, 9, 12]);
            let first = random.below(6) as usize;
            self.follow(&order, first, forgotten);
            self.close();
        }
        let mut policy = self.policy.clone();
        generate::clear(&mut policy).must("empty the policy");
        policy.remove_service(&format!("s{STRANGER}")).must("remove a service");
        self.put_in_force(&policy);
        self.services.pop();
        self.members.retain(|member| member.service != Some(STRANGER));
        self.kept.retain(|kept| kept.service != STRANGER);
    }

    /// One flow of the member `first`, through the services in this order, of which the first one
    /// forgets the record so many times.
    fn follow(&mut self, order: &[usize], first: usize, forgotten: usize) {
        let mut beginner = first;
        let mut next = (first, None);
        let mut legs = 0;
        let route = std::iter::repeat_n(order[0], forgotten + 1).chain(order[1..].iter().copied());
        for service in route {
            legs += 1;
            let (member, record) = next;
            if record.is_none() {
                // To the kernel the flow begins here.
                beginner = member;
            }
            let outcome = self.open_one(member, record);
            let member = self.services[service].member;
            if matches!(outcome, Outcome::Refused(libc::ELOOP)) {
                return;
            }
            let arrival = self.arrival_at(member);
            assert_eq!((arrival.handle, arrival.legs), (self.services[service].handle, legs));
            let handles = if legs as usize <= forgotten + 1 {
                vec![arrival.handle]
            } else {
                let passed = &order[..legs as usize - forgotten];
                passed.iter().map(|service| self.services[*service].handle).collect()
            };
            let place = self.kept.iter().filter(|kept| kept.service == service).count();
            let caller = &mut self.members[member].caller;
            caller.order(&Order::Records(vec![arrival.record]));
            caller.done();
            let history = History { handles, legs, forgotten_legs: 0 };
            let original = self.members[beginner].process.executable.expect("a program");
            self.kept.push(Kept { history, original, service, place });
            next = (member, (legs as usize > forgotten).then_some(place));
        }
    }

    fn open_one(&mut self, member: usize, record: Option<usize>) -> Outcome {
        let caller = &mut self.members[member].caller;
        let to = ([203, 0, 113, 9], 9).into();
        let call = Call { number: 0, protocol: 6, to, unconnected: false, user: 0, record };
        caller.order(&Order::Open(vec![call]));
        caller.opened()[0]
    }

    fn arrival_at(&mut self, member: usize) -> Arrival {
        let caller = &mut self.members[member].caller;
        caller.order(&Order::Arrivals(1));
        let mut arrivals = caller.arrived();
        assert_eq!(arrivals.len(), 1, "{arrivals:?}");
        arrivals.remove(0)
    }
}

/// A cgroup, as policies name it.
fn reference_of(cgroup: &Cgroup) -> Result<CgroupRef, Anything> {
    let path = cgroup.path().strip_prefix(carnet_engine::cgroup::mount_point()?)?;
    Ok(CgroupRef { path: format!("/{}", path.display()), id: cgroup.id() })
}

/// Every flow goes through the services in this order.
fn in_this_order(policy: &mut Policy, order: &[usize]) -> Result<(), Anything> {
    generate::clear(policy)?;
    for (place, service) in order.iter().enumerate() {
        let sublayer = format!("layer{place}");
        policy.add_sublayer(&sublayer, "p", 100 - place as u16)?;
        policy.add_filter(NewFilter {
            name: None,
            sublayer,
            weight: Weight::Auto,
            conditions: Conditions::default(),
            action: FilterAction::Redirect { service: format!("s{service}"), context: None },
        })?;
    }
    Ok(())
}

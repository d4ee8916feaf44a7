//! What the administrator says: policies that follow each other, and what each of them means.
//!
//! The policies are made with carnet-core's objects and compiled with its compiler. What they mean is
//! declared beside them, in words that need neither: for each destination, which services are to
//! inspect a flow in which order, or that it is refused, or let through. The properties are checked
//! against the declaration.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
};

use carnet_core::{
    compile::{CompiledPolicy, compile},
    explain::HostConnection,
    object::{
        CgroupRef, Conditions, Context, FailurePolicy, FilterAction, NewFilter, NewService, Policy,
        Trust, Weight,
    },
};

/// Most redirect handles that the policies of a scene give to services, one after the other.
pub const HANDLES: usize = 6;
/// Number of destinations.
pub const DESTINATIONS: usize = 2;
/// Most processes that can be services.
pub const PROCESSES: usize = 4;

/// The names of the processes, and of the services that they are unless a policy says otherwise.
pub const NAMES: [&str; PROCESSES] = ["a", "b", "c", "d"];

/// The policies of an instance, in the order in which transactions put them in force.
#[derive(Clone, Debug, Default)]
pub struct Scene {
    /// All redirect handles that are ever given, in their order. Elsewhere they are known by their
    /// place here.
    pub handles: Vec<u64>,
    /// Which process each of them was given to.
    pub processes: Vec<usize>,
    /// The policies.
    pub generations: Vec<Generation>,
}

/// A policy.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its tables.
    pub compiled: CompiledPolicy,
    /// Its services, in the order of their slots.
    pub services: Vec<ServiceFact>,
    /// What is to become of flows, by their destination.
    pub fates: [Fate; DESTINATIONS],
}

/// A service of a policy.
#[derive(Clone, Copy, Debug)]
pub struct ServiceFact {
    /// Which handle it has.
    pub handle: usize,
    /// Which process it is.
    pub process: usize,
    /// Set of the handles that it trusts; `None` if it trusts whoever had the flow.
    pub trusts: Option<u8>,
    /// Whether flows are refused while it has no live listener.
    pub blocks: bool,
    /// Whether its program knows nothing of records.
    pub unmodified: bool,
}

/// What is to become of a flow.
#[derive(Clone, Debug, Default)]
pub struct Fate {
    /// The services with these handles inspect it, in this order.
    pub order: Vec<usize>,
    /// Then it is refused.
    pub refused: bool,
}

/// The same before the handles are known: services by their names.
#[derive(Clone, Copy, Debug)]
pub struct Intent {
    /// These inspect it, in this order.
    pub order: &'static [&'static str],
    /// Then it is refused.
    pub refused: bool,
}

impl Intent {
    /// It passes, and nobody inspects it.
    pub const PASS: Self = Self::inspect(&[]);
    /// It is refused at once.
    pub const REFUSE: Self = Self { order: &[], refused: true };

    /// These inspect it, and it passes.
    pub const fn inspect(order: &'static [&'static str]) -> Self {
        Self { order, refused: false }
    }
}

/// What the administrator thinks and types.
#[derive(Clone, Debug)]
pub struct Administrator {
    policy: Policy,
    scene: Scene,
    /// Which of the scene's handles the service of a name has.
    named: BTreeMap<String, usize>,
}

/// A flow's destination as connections name it.
pub fn connection(destination: usize) -> HostConnection {
    let to = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), port(destination)));
    HostConnection { protocol: 6, destination: to.into(), ..HostConnection::default() }
}

fn port(destination: usize) -> u16 {
    80 + destination as u16
}

/// Id of the cgroup in which a process runs.
fn cgroup(process: usize) -> u64 {
    100 + process as u64
}

/// What cannot fail in a policy that is written down here.
const SOUND: &str = "a policy of the model is sound";

impl Administrator {
    /// One who has said nothing but that there are a provider and sublayers of these weights, each
    /// named by its weight.
    pub fn new(sublayers: &[u16]) -> Self {
        let mut policy = Policy::new();
        policy.add_provider("p", "").expect(SOUND);
        for weight in sublayers {
            policy.add_sublayer(&format!("s{weight}"), "p", *weight).expect(SOUND);
        }
        Self { policy, scene: Scene::default(), named: BTreeMap::new() }
    }

    /// Adds the service `name`, which process number `process` is.
    pub fn add_service(&mut self, name: &str, process: usize, on_failure: FailurePolicy) {
        let cgroup = CgroupRef { path: format!("/{}", NAMES[process]), id: cgroup(process) };
        let new = NewService { on_failure, ..NewService::new(name, "p", cgroup) };
        let added = self.policy.add_service(new).expect(SOUND);
        self.named.insert(added.name.clone(), self.scene.handles.len());
        self.scene.handles.push(added.handle);
        self.scene.processes.push(process);
    }

    /// Says whom a service trusts.
    pub fn trust(&mut self, service: &str, trust: Trust) {
        self.policy.set_trust(service, trust).expect(SOUND);
    }

    /// Says that a service's program knows nothing of records.
    pub fn unmodified(&mut self, service: &str) {
        self.policy.set_unmodified(service, true).expect(SOUND);
    }

    /// Adds a filter to the sublayer of weight `sublayer`.
    pub fn add_filter(
        &mut self,
        name: &str,
        sublayer: u16,
        weight: u64,
        destination: usize,
        action: FilterAction,
    ) {
        let conditions =
            Conditions { ports: vec![port(destination).into()], ..Conditions::default() };
        let (name, sublayer) = (Some(name.into()), format!("s{sublayer}"));
        let weight = Weight::Exact(weight);
        let new = NewFilter { name, sublayer, weight, conditions, action };
        self.policy.add_filter(new).expect(SOUND);
    }

    /// Adds a filter that redirects to a service; its name is `service-destination`.
    pub fn redirect(&mut self, service: &str, sublayer: u16, weight: u64, destination: usize) {
        let context = Context::new(*b"context").expect(SOUND);
        let action = FilterAction::Redirect { service: service.into(), context: Some(context) };
        let name = format!("{service}-{destination}");
        self.add_filter(&name, sublayer, weight, destination, action);
    }

    /// Removes a filter.
    pub fn remove_filter(&mut self, name: &str) {
        self.policy.remove_filter(name).expect(SOUND);
    }

    /// Removes a service.
    pub fn remove_service(&mut self, name: &str) {
        self.policy.remove_service(name).expect(SOUND);
    }

    /// Ends a transaction: what was said so far is a policy, and means this.
    pub fn commit(&mut self, intents: [Intent; DESTINATIONS]) {
        let given = self.scene.handles.len();
        assert!(given <= HANDLES, "there is room for {HANDLES} handles");
        let handle_of = |name: &str| self.named[name];
        let services = self.policy.services().iter().map(|service| ServiceFact {
            handle: handle_of(&service.name),
            process: (service.cgroup.id - cgroup(0)) as usize,
            trusts: match &service.trust {
                Trust::None => Some(0),
                Trust::All => None,
                Trust::Services(names) => {
                    Some(names.iter().fold(0, |set, name| set | 1 << handle_of(name)))
                }
            },
            blocks: service.on_failure == FailurePolicy::Block,
            unmodified: service.unmodified,
        });
        let fate = |Intent { order, refused }| Fate {
            order: order.iter().map(|name| handle_of(name)).collect(),
            refused,
        };
        let number = self.scene.generations.len() as u64 + 1;
        let compiled = compile(&self.policy, number).expect(SOUND);
        let generation =
            Generation { compiled, services: services.collect(), fates: intents.map(fate) };
        self.scene.generations.push(generation);
    }

    /// The scene, if all is said.
    pub fn finish(self) -> Scene {
        self.scene
    }
}

impl Scene {
    /// The process to which a handle was given.
    pub fn process_of(&self, handle: usize) -> usize {
        self.processes[handle]
    }
}

impl Generation {
    /// The service with this handle, if the policy has it.
    pub fn service(&self, handle: usize) -> Option<&ServiceFact> {
        self.services.iter().find(|service| service.handle == handle)
    }

    /// The handle of the service that a process is.
    pub fn handle_of(&self, process: usize) -> Option<usize> {
        self.services.iter().find(|service| service.process == process).map(|found| found.handle)
    }
}

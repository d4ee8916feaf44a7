//! Instances: up, policy, upgrade, down, on the real kernel.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use carnet_core::object::{
    CgroupRef, Conditions, Context, FailurePolicy, FilterAction, NewFilter, NewService, Policy,
    PolicyError, PortRange, Trust, Weight,
};
use carnet_engine::{Engine, Error, Location, UpOptions};
use carnet_testbed::{BpfDirectory, Cgroup, require_root};

/// A scope and a bpffs of the test's own.
struct World {
    scope: Cgroup,
    bpffs: BpfDirectory,
}

impl World {
    fn new(name: &str) -> Self {
        require_root().unwrap();
        let scope = Cgroup::create(name).unwrap();
        Self { scope, bpffs: BpfDirectory::create(name).unwrap() }
    }

    fn location(&self, instance: &str) -> Location {
        Location::new(Some(self.bpffs.path().to_owned()), instance).unwrap()
    }

    fn up(&self) -> Engine {
        Engine::up(&self.location("one"), &UpOptions::new(self.scope.path())).unwrap()
    }

    /// What is pinned, but for what the kernel itself puts there.
    fn pins(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.bpffs.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".debug"))
            .collect();
        names.sort();
        names
    }
}

/// The failure of a transaction: the engine's or the policy's.
#[derive(Debug)]
enum Failure {
    Engine(Error),
    Policy(PolicyError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Self {
        Self::Policy(error)
    }
}

fn reference(cgroup: &Cgroup) -> CgroupRef {
    let root = carnet_engine::cgroup::mount_point().unwrap();
    let path = cgroup.path().strip_prefix(root).unwrap();
    CgroupRef { path: format!("/{}", path.display()), id: cgroup.id() }
}

fn service(name: &str, cgroup: CgroupRef) -> NewService {
    NewService {
        name: name.into(),
        provider: "acme".into(),
        cgroup,
        on_failure: FailurePolicy::Block,
        trust: Trust::None,
    }
}

fn filter(ports: u16, action: FilterAction) -> NewFilter {
    NewFilter {
        name: None,
        sublayer: "main".into(),
        weight: Weight::Auto,
        conditions: Conditions {
            ports: vec![PortRange::new(ports, ports).unwrap()],
            ..Conditions::default()
        },
        action,
    }
}

fn redirect(service: &str, context: &[u8]) -> FilterAction {
    let context = Some(Context::new(context).unwrap());
    FilterAction::Redirect { service: service.into(), context }
}

/// A policy with one service and one filter that sends it something.
fn fill(engine: &mut Engine, cgroup: &Cgroup) {
    let cgroup = reference(cgroup);
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        policy.add_provider("acme", "")?;
        policy.add_sublayer("main", "acme", 7)?;
        policy.add_service(service("scan", cgroup))?;
        policy.add_filter(filter(80, redirect("scan", b"hello")))?;
        Ok(())
    });
    outcome.unwrap();
}

/// The links that an instance has: the names below its `links`.
fn links(location: &Location) -> Vec<String> {
    let mut found = Vec::new();
    for cgroup in fs::read_dir(location.directory().join("links")).unwrap() {
        let cgroup = cgroup.unwrap();
        for hook in fs::read_dir(cgroup.path()).unwrap() {
            let hook = hook.unwrap().file_name().into_string().unwrap();
            found.push(format!("{}/{hook}", cgroup.file_name().into_string().unwrap()));
        }
    }
    found.sort();
    found
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn up_and_down_leave_nothing() {
    let world = World::new("carnet-engine-up");
    let location = world.location("one");
    assert!(matches!(Engine::open(&location), Err(Error::NotUp { .. })));
    let engine = world.up();
    assert_eq!(engine.scope(), world.scope.path());
    assert_eq!(mode(location.directory()), 0o700);
    assert_eq!(Location::list(Some(world.bpffs.path().into())).unwrap(), [location.clone()]);
    assert_eq!(links(&location).len(), 5);
    assert_eq!(engine.policy().unwrap(), Policy::new());
    assert!(engine.counters().unwrap().iter().all(|(_, count)| *count == 0));
    let again = Engine::up(&location, &UpOptions::new(world.scope.path()));
    assert!(matches!(again, Err(Error::AlreadyUp { .. })));
    Engine::open(&location).unwrap().down().unwrap();
    assert_eq!(world.pins(), [] as [&str; 0]);
    assert!(matches!(engine.policy(), Err(Error::NotUp { .. })));
    assert!(matches!(engine.down(), Err(Error::NotUp { .. })));
    assert_eq!(world.pins(), [] as [&str; 0]);
}

#[test]
fn the_policy_reads_back_from_the_kernel() {
    let world = World::new("carnet-engine-policy");
    let own = world.scope.child("scan").unwrap();
    let mut engine = world.up();
    fill(&mut engine, &own);
    let seen = Engine::open(engine.location()).unwrap().policy().unwrap();
    assert_eq!(seen, engine.policy().unwrap());
    assert_eq!(seen.services()[0].name, "scan");
    assert_eq!(seen.filters()[0].action, redirect("scan", b"hello"));
    assert_eq!(links(engine.location()).len(), 5 + 2);
    // Many transactions in a row use both banks in turn.
    for port in 1..20 {
        let added: Result<_, Failure> =
            engine.transact(|policy| Ok(policy.add_filter(filter(port, FilterAction::BLOCK))?.id));
        let compiled = engine.compiled().unwrap();
        assert_eq!(compiled.header().generation, u64::from(port) + 1);
        assert!(compiled.filters().iter().any(|row| Some(&row.id) == added.as_ref().ok()));
    }
    // A service that goes takes its hooks along.
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        let ids: Vec<_> = policy.filters().iter().map(|filter| filter.id.to_string()).collect();
        ids.iter().try_for_each(|id| policy.remove_filter(id).map(drop))?;
        policy.remove_service("scan")?;
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(links(engine.location()).len(), 5);
    engine.down().unwrap();
}

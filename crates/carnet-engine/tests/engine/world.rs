//! What the tests share: a scope and a bpffs of a test's own, and a small policy.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use carnet_core::object::{
    CgroupRef, Conditions, Context, FilterAction, NewFilter, NewService, PolicyError, PortRange,
    Weight,
};
use carnet_engine::{Engine, Error, Location, UpOptions};
use carnet_testbed::{BpfDirectory, Cgroup, require_root};

/// A scope and a bpffs of the test's own.
pub(crate) struct World {
    pub(crate) scope: Cgroup,
    pub(crate) bpffs: BpfDirectory,
}

impl World {
    pub(crate) fn new(name: &str) -> Self {
        require_root().unwrap();
        let scope = Cgroup::create(name).unwrap();
        Self { scope, bpffs: BpfDirectory::create(name).unwrap() }
    }

    pub(crate) fn location(&self, instance: &str) -> Location {
        Location::new(Some(self.bpffs.path().to_owned()), instance).unwrap()
    }

    pub(crate) fn up(&self) -> Engine {
        Engine::up(&self.location("one"), &UpOptions::new(self.scope.path())).unwrap()
    }

    /// What is pinned, but for what the kernel itself puts there.
    pub(crate) fn pins(&self) -> Vec<String> {
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
pub(crate) enum Failure {
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

pub(crate) fn reference(cgroup: &Cgroup) -> CgroupRef {
    let root = carnet_engine::cgroup::mount_point().unwrap();
    let path = cgroup.path().strip_prefix(root).unwrap();
    CgroupRef { path: format!("/{}", path.display()), id: cgroup.id() }
}

pub(crate) fn service(name: &str, cgroup: CgroupRef) -> NewService {
    NewService::new(name, "acme", cgroup)
}

pub(crate) fn filter(ports: u16, action: FilterAction) -> NewFilter {
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

pub(crate) fn redirect(service: &str, context: &[u8]) -> FilterAction {
    let context = Some(Context::new(context).unwrap());
    FilterAction::Redirect { service: service.into(), context }
}

/// A policy with one service and one filter that sends it something.
pub(crate) fn fill(engine: &mut Engine, cgroup: &Cgroup) {
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
pub(crate) fn links(location: &Location) -> Vec<String> {
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

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

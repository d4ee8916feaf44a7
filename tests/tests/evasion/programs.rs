//! Processes that were started so as to be hard to recognise.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown},
    process::Command,
};

use carnet_core::object::FailurePolicy;
use carnet_tests::{
    Lab, Must as _, Plan,
    contract::Scratch,
    program,
    puppet::{Errno, Puppet},
};

use crate::Scene;

/// A command that runs a puppet by way of another program.
fn by(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(program("test-puppet"));
    command
}

/// Checks that all that a puppet connects comes to the service; gives the last report.
#[track_caller]
fn redirected(scene: &Scene, puppet: &Puppet) -> carnet_tests::Report {
    let arrived = |to| scene.arrived(&puppet.connect(to).must("connect"), to);
    scene.destinations().map(arrived).into_iter().last().expect("three reports")
}

#[test]
fn a_child_of_a_child_that_executes_another_program() {
    let scene = Scene::new();
    let shell = "sh -c '\"$0\"; exit $?' \"$0\"; exit $?";
    let client = &scene.lab.network().topology.client;
    let puppet = Puppet::start_by(by(&["sh", "-c", shell]), client, scene.lab.apps(), None);
    let report = redirected(&scene, &puppet);
    assert_ne!(report.pid, puppet.id(), "it has forked");
    assert_eq!(report.executable, Some(program("test-puppet")));
}

#[test]
fn a_setuid_program() {
    const OWNER: u32 = 65533;
    const CALLER: u32 = 65534;
    let scene = Scene::new();
    let directory = Scratch::new();
    let path = directory.path().join("setuid-puppet");
    // By another process: of a file that this one has open for writing, a child of another test may
    // have a descriptor, and then it cannot be executed.
    let copied = Command::new("cp").arg(program("test-puppet")).arg(&path).status();
    assert!(copied.must("copy a program (cp)").success());
    chown(&path, Some(OWNER), Some(OWNER)).must("give a program away");
    fs::set_permissions(&path, Permissions::from_mode(0o6755)).must("make it setuid");
    let client = &scene.lab.network().topology.client;
    let apps = scene.lab.apps();
    let puppet = Puppet::start_by(Command::new(&path), client, apps, Some(CALLER));
    let status =
        fs::read_to_string(format!("/proc/{}/status", puppet.id())).must("ask for its ids");
    let ids = format!("Uid:\t{CALLER}\t{OWNER}\t");
    assert!(status.contains(&ids), "not {ids:?}: {status}");
    let report = redirected(&scene, &puppet);
    assert_eq!(report.executable, Some(path));
    assert_eq!(report.uid, CALLER, "the user who started it");
}

#[test]
fn a_container_on_a_network_with_a_service() {
    let scene = Scene::new();
    let container = scene.lab.apps().child("container").must("make a cgroup");
    let client = &scene.lab.network().topology.client;
    // All namespaces of its own but that of the network, which the lab made for it.
    let words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount", "--ipc"];
    let words = [&words[..], &["--uts", "--cgroup", "--"]].concat();
    let puppet = Puppet::start_by(by(&words), client, &container, None);
    let report = redirected(&scene, &puppet);
    assert_eq!(report.cgroup, container.id());
    assert_ne!(report.pid, puppet.id(), "it is a child in a pid namespace of its own");
}

#[test]
fn a_network_namespace_without_a_listener() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let _service = lab.start("alpha");
    let client = &lab.network().topology.client;
    let puppet = Puppet::start_by(by(&["unshare", "--net", "--"]), client, lab.apps(), None);
    // `block`: refused, and said so, before it is found out that nothing leads anywhere there.
    let mut trace = lab.trace();
    for to in [lab.v4(), lab.v6()] {
        assert_eq!(puppet.connect(to).err(), Some(Errno(libc::ECONNREFUSED)));
    }
    let refused = trace.first(carnet_core::event::EventKind::Blocked);
    assert_eq!(refused.reason, carnet_core::classify::Reason::ServiceUnavailable as u32);
    assert_eq!(refused.handle, lab.handle_of("alpha"));
    // `skip`: passed over.
    lab.change(|policy| Ok(policy.set_on_failure("alpha", FailurePolicy::Skip).map(drop)?));
    assert_eq!(puppet.connect(lab.v4()).err(), Some(Errno(libc::ENETUNREACH)));
    assert_eq!(lab.counter(carnet_core::event::Counter::Skipped), 1);
}

#[test]
fn a_root_user_of_a_user_namespace_gets_no_more_than_others() {
    let lab = Lab::new();
    lab.service_with("alpha", Plan::default());
    let client = &lab.network().topology.client;
    let words = ["unshare", "--user", "--map-root-user", "--"];
    let cgroup = lab.cgroup_of("alpha");
    // In the service's cgroup, so that the hooks answer; but what it asks for is another's.
    let puppet = Puppet::start_by(by(&words), client, &cgroup, None);
    let listener = puppet.listen("127.0.0.1:0".parse().expect("an address"));
    let another = (lab.handle_of("alpha") + 1).to_ne_bytes();
    assert_eq!(listener.register(&another), Err(Errno(libc::EACCES)));
}

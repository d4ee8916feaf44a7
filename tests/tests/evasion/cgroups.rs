//! Sockets and processes that change hands and places. The cgroup in which a socket was made counts.

use std::net::SocketAddr;

use carnet_testbed::Cgroup;
use carnet_tests::{Must as _, contract::Scratch, puppet::Puppet};

use crate::Scene;

/// A cgroup outside of the scope, and a puppet in it, among the clients.
struct Outside {
    puppet: Puppet,
    cgroup: Cgroup,
}

impl Outside {
    #[track_caller]
    fn new(scene: &Scene) -> Self {
        let cgroup = Cgroup::create("carnet-evasion-outside").must("make a cgroup");
        let namespace = &scene.lab.network().topology.client;
        Self { puppet: Puppet::start(namespace, &cgroup, None), cgroup }
    }
}

#[test]
fn a_socket_that_is_passed_out_of_the_scope() {
    let scene = Scene::new();
    let (outside, directory) = (Outside::new(&scene), Scratch::new());
    for (number, to) in (0..).zip(scene.destinations()) {
        let socket = scene.client.tcp(to);
        let mailbox = directory.path().join(format!("out-{number}"));
        let passed = scene.client.pass(&socket, &outside.puppet, &mailbox);
        passed.connect(to).must("connect");
        let report = scene.arrived(&passed, to);
        // Who connects is another matter than whose socket it is.
        assert_eq!(report.pid, outside.puppet.id());
        assert_eq!(report.cgroup, outside.cgroup.id());
    }
}

#[test]
fn a_socket_that_is_passed_into_the_scope() {
    let scene = Scene::new();
    let (outside, directory) = (Outside::new(&scene), Scratch::new());
    for (number, to) in (0..).zip(scene.destinations()) {
        let socket = outside.puppet.tcp(to);
        let mailbox = directory.path().join(format!("in-{number}"));
        let passed = outside.puppet.pass(&socket, &scene.client, &mailbox);
        passed.connect(to).must("connect");
        scene.went_straight(&passed);
    }
}

#[test]
fn a_process_that_moves_into_the_scope() {
    let scene = Scene::new();
    let outside = Outside::new(&scene);
    let before = scene.destinations().map(|to| (outside.puppet.tcp(to), to));
    scene.lab.apps().add_process(outside.puppet.id()).must("move a process");
    // What it makes from now on is the scope's; what it has brought along is not.
    for to in scene.destinations() {
        scene.arrived(&outside.puppet.connect(to).must("connect"), to);
    }
    for (socket, to) in before {
        socket.connect(to).must("connect");
        scene.went_straight(&socket);
    }
}

#[test]
fn a_process_that_moves_out_of_the_scope() {
    let scene = Scene::new();
    let before = scene.destinations().map(|to| (scene.client.tcp(to), to));
    let outside = Outside::new(&scene);
    outside.cgroup.add_process(scene.client.id()).must("move a process");
    for (socket, to) in before {
        socket.connect(to).must("connect");
        scene.arrived(&socket, to);
    }
    let after: SocketAddr = scene.lab.v4();
    scene.went_straight(&scene.client.connect(after).must("connect"));
}

#[test]
fn a_process_that_moves_between_cgroups_below_the_scope() {
    let scene = Scene::new();
    let child = scene.lab.apps().child("child").must("make a cgroup");
    let before = scene.destinations().map(|to| (scene.client.tcp(to), to));
    child.add_process(scene.client.id()).must("move a process");
    for (socket, to) in before {
        socket.connect(to).must("connect");
        scene.arrived(&socket, to);
        scene.arrived(&scene.client.connect(to).must("connect"), to);
    }
}

//! Connections that are there when the policy changes: they go on as they are, or are ended if the
//! operator says so.

use std::net::SocketAddr;

use carnet_core::{
    event::Counter,
    object::{Conditions, FilterAction, NewFilter, Weight},
};
use carnet_testbed::{Cgroup, Topology};
use carnet_tests::{
    Lab, Must as _,
    puppet::{Errno, Family, Hand, Kind, Puppet},
    until,
};

use crate::{Scene, block, echoes, udp};

const REFUSED: Errno = Errno(libc::EPERM);

/// Redirects what meets these conditions to the service `alpha`.
#[track_caller]
fn redirect(lab: &Lab, conditions: Conditions) {
    lab.change(|policy| {
        let action = FilterAction::Redirect { service: "alpha".into(), context: None };
        let (name, sublayer) = (Some("new".into()), "alpha".into());
        let weight = Weight::Auto;
        policy.add_filter(NewFilter { name, sublayer, weight, conditions, action })?;
        Ok(())
    });
}

fn port(number: u16) -> Conditions {
    Conditions { ports: vec![number.into()], ..Conditions::default() }
}

/// Checks that a connection was ended from outside.
#[track_caller]
fn ended(connection: &Hand<'_>) {
    let errno = connection.send(b"marco").expect_err("an errno").0;
    assert!([libc::ECONNABORTED, libc::EPIPE].contains(&errno), "{errno}");
}

#[test]
fn a_change_of_the_policy_leaves_tcp_connections_as_they_are() {
    let scene = Scene::with(port(1));
    let passed = scene.client.connect(scene.lab.v4()).must("connect");
    scene.went_straight(&passed);
    redirect(&scene.lab, Conditions::default());
    // From now on to the service; what is there stays where it is.
    let redirected = scene.client.connect(scene.lab.v4()).must("connect");
    let report = scene.arrived(&redirected, scene.lab.v4());
    scene.went_straight(&passed);

    block(&scene.lab, "all", Conditions::default());
    assert_eq!(scene.client.connect(scene.lab.v4()).err(), Some(REFUSED));
    echoes(&passed);
    scene.arrived(&redirected, scene.lab.v4());
    let flows = scene.lab.engine().flows().must("list the flows");
    assert!(flows.iter().all(|leg| leg.flow == report.flow), "{flows:#?}");
    scene.lab.change(|policy| {
        policy.remove_filter("all")?;
        policy.remove_filter("new")?;
        Ok(())
    });
    scene.arrived(&redirected, scene.lab.v4());
    scene.went_straight(&passed);
}

#[test]
fn a_block_ends_the_tcp_connections_that_it_refuses() {
    let scene = Scene::with(port(1));
    let lab = &scene.lab;
    let other = lab.network().another_echo();
    let passed = scene.client.connect(lab.v4()).must("connect");
    let spared = scene.client.connect(other.address()).must("connect");
    let mapped = scene.client.connect(scene.destinations()[2]).must("connect");
    // Not the instance's business.
    let cgroup = Cgroup::create("carnet-evasion-outside").must("make a cgroup");
    let outside = Puppet::start(&lab.network().topology.client, &cgroup, None);
    let foreign = outside.connect(lab.v4()).must("connect");
    redirect(lab, Conditions::default());
    let redirected = scene.client.connect(lab.v4()).must("connect");
    let spared_too = scene.client.connect(other.address()).must("connect");
    let all = [&passed, &spared, &mapped, &foreign, &redirected, &spared_too];
    all.iter().for_each(|connection| echoes(connection));
    let flow = scene.arrived(&redirected, lab.v4()).flow;

    let filter = block(lab, "all", port(lab.v4().port()));
    let mut gone = lab.engine().end_existing(filter).must("end connections");
    gone.sort_by_key(|ended| ended.flow);
    let destinations: Vec<_> = gone.iter().map(|ended| (ended.flow, ended.destination)).collect();
    let to = lab.v4();
    // The flow's legs: the application's, and that of the service.
    for expected in [(None, to), (None, scene.destinations()[2]), (Some(flow), to)] {
        assert!(destinations.contains(&expected), "{expected:?} in {destinations:?}");
    }
    assert_eq!(destinations.len(), 4, "{destinations:?}");
    assert!(gone.iter().all(|ended| ended.protocol == 6));
    [&passed, &mapped, &redirected].into_iter().for_each(ended);
    [&spared, &spared_too, &foreign].into_iter().for_each(echoes);
    // Once more there is nothing to end.
    assert_eq!(lab.engine().end_existing(filter).must("end connections"), []);
}

#[test]
fn a_block_ends_multipath_connections() {
    let scene = Scene::new();
    let connection = scene.client.open(Family::V4, Kind::Multipath).must("open");
    connection.connect(scene.lab.v4()).must("connect");
    scene.arrived(&connection, scene.lab.v4());
    let filter = block(&scene.lab, "all", Conditions::default());
    let gone = scene.lab.engine().end_existing(filter).must("end connections");
    assert!(gone.iter().any(|ended| ended.flow.is_some()), "{gone:#?}");
    // However the end shows: nothing is echoed any more.
    let _sent = connection.send(b"marco");
    assert_ne!(connection.receive(5), Ok(b"marco".to_vec()));
}

#[test]
fn a_block_ends_connections_by_who_made_them() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let user = Puppet::start(&lab.network().topology.client, lab.apps(), Some(65533));
    let theirs = user.connect(lab.v4()).must("connect");
    let ours = scene.client.connect(lab.v4()).must("connect");
    let users = vec!["65533".parse().expect("a user")];
    let filter = block(lab, "user", Conditions { users, ..Conditions::default() });
    let gone = lab.engine().end_existing(filter).must("end connections");
    assert!(!gone.is_empty());
    ended(&theirs);
    echoes(&ours);
}

#[test]
fn a_block_does_not_end_connections_that_were_accepted() {
    let scene = Scene::with(port(1));
    let lab = &scene.lab;
    let listener = scene.client.listen((Topology::CLIENT_V4, 0).into());
    let to = listener.local().must("ask for the port");
    let cgroup = Cgroup::create("carnet-evasion-outside").must("make a cgroup");
    let outside = Puppet::start(&lab.network().topology.destination, &cgroup, None);
    let caller = outside.connect(to).must("connect");
    let accepted = listener.accept().must("accept");
    let filter = block(lab, "all", Conditions::default());
    assert_eq!(lab.engine().end_existing(filter).must("end connections"), []);
    caller.send(b"marco").must("send");
    assert_eq!(accepted.receive(5), Ok(b"marco".to_vec()));
}

/// A UDP server at the destination, which knows nothing of Carnet.
struct Server {
    puppet: Puppet,
    _cgroup: Cgroup,
}

impl Server {
    #[track_caller]
    fn start(lab: &Lab) -> Self {
        let cgroup = Cgroup::create("carnet-evasion-server").must("make a cgroup");
        let puppet = Puppet::start(&lab.network().topology.destination, &cgroup, None);
        Self { puppet, _cgroup: cgroup }
    }

    #[track_caller]
    fn listen(&self, to: SocketAddr) -> Hand<'_> {
        let socket = self.puppet.open(Family::of(to), Kind::Udp).must("open");
        socket.bind(to).must("bind");
        socket
    }
}

/// Has the server echo one datagram.
#[track_caller]
fn echo(server: &Hand<'_>) {
    let (bytes, from) = server.receive_from().must("receive");
    assert_eq!(bytes, b"marco");
    server.send_to(from, b"polo").must("answer");
}

#[test]
fn a_change_of_the_policy_leaves_udp_flows_as_they_are_and_a_block_ends_them() {
    let scene = udp::Scene::with(port(1));
    let lab = &scene.lab;
    let post = scene.post();
    let [to, ..] = udp::Scene::destinations();
    let far = Server::start(lab);
    let server = far.listen(to);
    let (connected, free) = (udp::open(&scene.client, to), udp::open(&scene.client, to));
    connected.connect(to).must("connect");
    let ping_connected = || {
        connected.send(b"marco").must("send");
        echo(&server);
        assert_eq!(connected.receive_from(), Ok((b"polo".to_vec(), to)));
    };
    let ping_free = || {
        free.send_to(to, b"marco").must("send");
        echo(&server);
        assert_eq!(free.receive_from(), Ok((b"polo".to_vec(), to)));
    };
    ping_connected();
    ping_free();

    // New ones go to the service, old ones go on.
    redirect(lab, Conditions::default());
    let (late_connected, late_free) = (udp::open(&scene.client, to), udp::open(&scene.client, to));
    late_connected.connect(to).must("connect");
    late_connected.send(b"marco").must("send");
    post.exchanges(&late_connected, to);
    late_free.send_to(to, b"marco").must("send");
    post.exchanges(&late_free, to);
    ping_connected();
    ping_free();

    // A block alone changes nothing for any of them.
    let filter = block(lab, "all", port(to.port()));
    late_connected.send(b"marco").must("send");
    post.exchanges(&late_connected, to);
    late_free.send_to(to, b"marco").must("send");
    post.exchanges(&late_free, to);
    ping_connected();
    ping_free();
    assert_eq!(udp::open(&scene.client, to).send_to(to, b"marco"), Err(REFUSED));

    let gone = lab.engine().end_existing(filter).must("end flows");
    assert_eq!(gone.len(), 4, "{gone:#?}");
    assert_eq!(gone.iter().filter(|ended| ended.flow.is_some()).count(), 2, "{gone:#?}");
    assert!(gone.iter().all(|ended| ended.protocol == 17 && ended.destination == to));
    for socket in [&connected, &late_connected] {
        // It is not connected any more.
        assert_eq!(socket.send(b"marco"), Err(Errno(libc::EDESTADDRREQ)));
        assert_eq!(socket.receive_from().err(), Some(Errno(libc::ECONNABORTED)));
    }
    for socket in [&free, &late_free] {
        assert_eq!(socket.send_to(to, b"marco"), Err(REFUSED));
    }
    let blocked = || lab.counter(Counter::Blocked);
    until("three refusals", blocked, |count| *count >= 3);
}

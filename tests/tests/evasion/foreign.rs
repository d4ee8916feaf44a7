//! BPF programs of others at the same hooks, before and after Carnet's (contract L9, L10).

use std::net::SocketAddr;

use carnet_core::{
    event::{Counter, EventKind},
    object::Conditions,
    outcome::Outcome,
};
use carnet_engine::doctor::{self, State};
use carnet_testbed::{Cgroup, DatagramServer, EchoServer, Topology};
use carnet_tests::{
    Lab, Must as _, Plan,
    foreign::{Deed, Foreign, Hook},
    netfilter,
    puppet::{Errno, Family, Kind, Puppet, Ring},
};

use rustix::net::netdevice::name_to_index;
use socket2::{Domain, Socket, Type};

use crate::{Scene, block, canonical, destinations, echoes, udp};

/// Clears whatever was refused before.
const CLEAR: Deed = Deed { only: None, rewrite: None, clear: true, refuse: false };

/// The same program at the hooks for both families.
#[track_caller]
fn at_connects(cgroup: &Cgroup, deed: impl Fn(Hook) -> Deed) -> [Foreign; 2] {
    [Hook::Connect4, Hook::Connect6].map(|hook| Foreign::attach(hook, cgroup, deed(hook)))
}

/// A port of a destination that is reached past Carnet, for connects of each family.
fn way_out(echo: &EchoServer) -> impl Fn(Hook) -> Option<SocketAddr> + '_ {
    let [v4, v6] = [echo.addresses()[0], echo.addresses()[1]];
    move |hook| Some(if hook == Hook::Connect4 { v4 } else { v6 })
}

/// Another echo server, over both families.
#[track_caller]
fn other_echo(lab: &Lab) -> EchoServer {
    let addresses = [(Topology::DESTINATION_V4, 0).into(), (Topology::DESTINATION_V6, 0).into()];
    EchoServer::start_in(&lab.network().topology.destination, addresses).must("start a server")
}

/// A way for a client to connect.
type Connect = fn(&Puppet, SocketAddr) -> Result<(), Errno>;

/// Ways for a client to connect. Each connection is closed at once.
const WAYS: [(&str, Connect); 5] = [
    ("connect", |client, to| client.connect(to).map(drop)),
    ("connect without blocking", |client, to| client.tcp(to).connect_nonblocking(to)),
    ("fast open", |client, to| client.tcp(to).fast_open(to, b"early")),
    ("io_uring", |client, to| client.tcp(to).ring_connect(to, Ring::Async)),
    ("Multipath TCP", |client, to| {
        client.open(Family::of(to), Kind::Multipath).must("open").connect(to)
    }),
];

/// Has a client connect to the lab's destination in every form and way, none of which may reach anybody;
/// gives how many times it was.
#[track_caller]
fn nobody_is_reached(lab: &Lab, client: &Puppet, other: &EchoServer, errno: i32) -> u64 {
    for to in destinations(lab) {
        for (way, connect) in WAYS {
            assert_eq!(connect(client, to), Err(Errno(errno)), "{way} to {to}");
        }
    }
    for echo in [lab.network().echo(), other] {
        assert!(echo.connections().is_empty(), "{:?}", echo.connections());
    }
    3 * WAYS.len() as u64
}

#[test]
fn a_program_that_clears_a_block() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let other = other_echo(lab);
    block(lab, "closed", Conditions::default());
    let _foreign = at_connects(lab.scope(), |_| CLEAR);
    let mut trace = lab.trace();
    let tried = nobody_is_reached(lab, &scene.client, &other, libc::EHOSTUNREACH);
    assert_eq!(lab.counter(Counter::Blocked), tried);
    assert_eq!(lab.counter(Counter::RefusalsCleared), tried);
    assert_eq!(lab.counter(Counter::NotHeldBack), 0);
    assert_eq!(trace.first(EventKind::Undone).reason, Outcome::RefusalCleared as u32);
    assert!(scene.service.reports(0).is_empty());
    lab.settle_sockets();
}

#[test]
fn a_program_that_clears_the_refusal_for_want_of_a_service() {
    let lab = Lab::new();
    let other = other_echo(&lab);
    lab.service("alpha", 100);
    let client = lab.puppet();
    let _foreign = at_connects(lab.scope(), |_| CLEAR);
    let tried = nobody_is_reached(&lab, &client, &other, libc::EHOSTUNREACH);
    assert_eq!(lab.counter(Counter::ServiceUnavailable), tried);
    assert_eq!(lab.counter(Counter::RefusalsCleared), tried);
}

#[test]
fn a_program_that_clears_a_block_and_leads_elsewhere() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let other = other_echo(lab);
    block(lab, "closed", Conditions::default());
    let to = way_out(&other);
    let _foreign = at_connects(lab.scope(), |hook| Deed { rewrite: to(hook), ..CLEAR });
    let tried = nobody_is_reached(lab, &scene.client, &other, libc::EHOSTUNREACH);
    assert_eq!(lab.counter(Counter::RefusalsCleared), tried);
    assert_eq!(lab.counter(Counter::NotHeldBack), 0);
}

#[test]
fn a_program_that_leads_a_redirected_connection_elsewhere() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let other = other_echo(lab);
    let to = way_out(&other);
    let _foreign = at_connects(lab.scope(), |hook| Deed { rewrite: to(hook), ..Deed::default() });
    let mut trace = lab.trace();
    let tried = nobody_is_reached(lab, &scene.client, &other, libc::EHOSTUNREACH);
    assert_eq!(lab.counter(Counter::Diverted), tried);
    assert_eq!(lab.counter(Counter::Unsent), tried);
    let event = trace.first(EventKind::Undone);
    assert_eq!(event.reason, Outcome::Diverted as u32);
    assert_eq!(event.handle, lab.handle_of("alpha"));
    assert!(scene.service.reports(0).is_empty());
    assert_eq!(lab.engine().account().must("read the account").tcp.difference(), 0);
}

#[test]
fn a_program_that_refuses_what_was_redirected() {
    let conditions = |port: u16| Conditions { ports: vec![port.into()], ..Conditions::default() };
    let lab = Lab::new();
    let other = other_echo(&lab);
    lab.service_with("alpha", Plan { conditions: conditions(lab.v4().port()), ..Plan::default() });
    let _service = lab.start("alpha");
    let client = lab.puppet();
    let foreign = at_connects(lab.scope(), |_| Deed { refuse: true, ..Deed::default() });
    let socket = client.tcp(lab.v4());
    assert_eq!(socket.connect(lab.v4()), Err(Errno(libc::EPERM)));
    drop(foreign);
    // What it left on the socket is not of the connect that comes next, though that concerns nobody.
    socket.connect(other.address()).must("connect elsewhere");
    echoes(&socket);
    assert_eq!(lab.counter(Counter::Unsent), 1);
    assert_eq!(lab.counter(Counter::Diverted), 0);
}

#[test]
fn a_socket_that_was_refused_is_as_good_as_new() {
    let scene = Scene::with(Conditions { ports: vec![1.into()], ..Conditions::default() });
    let lab = &scene.lab;
    let port = lab.v4().port();
    block(lab, "closed", Conditions { ports: vec![port.into()], ..Conditions::default() });
    let other = other_echo(lab);
    for kind in [Kind::Tcp, Kind::Multipath] {
        let socket = scene.client.open(Family::V4, kind).must("open");
        for _ in 0..2 {
            assert_eq!(socket.connect(lab.v4()), Err(Errno(libc::EPERM)), "{kind:?}");
        }
        socket.connect(other.address()).must("connect elsewhere");
        echoes(&socket);
    }
    assert_eq!(lab.counter(Counter::RefusalsCleared), 0);
    lab.settle_sockets();
}

#[test]
fn a_program_that_comes_first() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let other = other_echo(lab);
    let to = way_out(&other);
    // Programs of cgroups below run first.
    let deed = |hook| Deed { rewrite: to(hook), ..Deed::default() };
    let below = at_connects(lab.apps(), deed);
    for to in [lab.v4(), lab.v6()] {
        let connection = scene.client.connect(to).must("connect");
        echoes(&connection);
        let led_to = if to.is_ipv4() { other.addresses()[0] } else { other.addresses()[1] };
        let report = scene.report_of(connection.local().must("ask for the local address"));
        assert_eq!(canonical(report.original), led_to);
    }
    drop(below);
    // So does what asks for it, where the kernel knows of that.
    let Ok(first) = Foreign::attach_first(Hook::Connect4, lab.scope(), deed(Hook::Connect4)) else {
        return;
    };
    let connection = scene.client.connect(lab.v4()).must("connect");
    let report = scene.report_of(connection.local().must("ask for the local address"));
    assert_eq!(report.original, other.addresses()[0]);
    drop(first);
    assert_eq!(lab.counter(Counter::Diverted), 0);
}

#[test]
fn a_program_that_comes_first_and_refuses() {
    let scene = Scene::new();
    let _first = at_connects(scene.lab.apps(), |_| Deed { refuse: true, ..Deed::default() });
    let other = other_echo(&scene.lab);
    nobody_is_reached(&scene.lab, &scene.client, &other, libc::EPERM);
    // Another that comes last and clears it all changes nothing: it is redirected as it would be.
    let _last = at_connects(scene.lab.scope(), |_| CLEAR);
    scene.redirects(|client, to| client.connect(to).must("connect"));
}

#[test]
fn a_load_balancer_at_the_end_of_a_chain() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let other = other_echo(lab);
    let only = Some(lab.v4());
    // It runs after Carnet, and sees the destination on the way out only.
    let balance = Deed { only, rewrite: Some(other.address()), ..Deed::default() };
    let _last = Foreign::attach(Hook::Connect4, lab.scope(), balance);
    let connection = scene.client.connect(lab.v4()).must("connect");
    echoes(&connection);
    assert_eq!(connection.peer(), Ok(lab.v4()));
    let report = scene.report_of(connection.local().must("ask for the local address"));
    assert_eq!(report.original, lab.v4());
    assert_eq!(other.connections().len(), 1);
    assert!(lab.network().echo().connections().is_empty());
}

/// What datagrams a server has got.
#[track_caller]
fn sink(lab: &Lab) -> DatagramServer {
    let addresses = [(Topology::DESTINATION_V4, 0).into(), (Topology::DESTINATION_V6, 0).into()];
    let namespace = &lab.network().topology.destination;
    DatagramServer::start_in(namespace, addresses).must("start a server")
}

#[test]
fn a_program_that_clears_a_block_of_datagrams() {
    let scene = udp::Scene::new();
    let lab = &scene.lab;
    let server = sink(lab);
    block(lab, "closed", Conditions::default());
    let hooks = [Hook::Connect4, Hook::Connect6, Hook::Sendmsg4, Hook::Sendmsg6];
    let _foreign = hooks.map(|hook| Foreign::attach(hook, lab.scope(), CLEAR));
    for to in server.addresses() {
        let socket = scene.client.udp(*to);
        // The kernel takes no port 0 from a program.
        assert_eq!(socket.send_to(*to, b"marco"), Err(Errno(libc::EINVAL)), "{to}");
        let connected = scene.client.udp(*to);
        connected.connect(*to).must("connect to nobody");
        // The first one is lost, the next one is told so.
        let _ = connected.send(b"marco");
        assert_eq!(connected.receive(1), Err(Errno(libc::ECONNREFUSED)), "{to}");
    }
    assert!(server.datagrams().is_empty(), "{:?}", server.datagrams());
    assert_eq!(lab.counter(Counter::BlockedByFilter), 4);
}

#[test]
fn a_program_that_leads_datagrams_elsewhere() {
    let scene = udp::Scene::new();
    let lab = &scene.lab;
    let server = sink(lab);
    block(lab, "closed", Conditions::default());
    let [v4, _] = [server.addresses()[0], server.addresses()[1]];
    let deed = Deed { rewrite: Some(v4), ..CLEAR };
    let _foreign =
        [Hook::Connect4, Hook::Sendmsg4].map(|hook| Foreign::attach(hook, lab.scope(), deed));
    let closed = SocketAddr::from((Topology::DESTINATION_V4, 9));
    let socket = scene.client.udp(closed);
    socket.send_to(closed, b"marco").must("send");
    let connected = scene.client.udp(closed);
    connected.connect(closed).must("connect");
    connected.send(b"polo").must("send");
    let both = |datagrams: &[carnet_testbed::ReceivedDatagram]| datagrams.len() == 2;
    server.wait_for("both datagrams", carnet_tests::PATIENCE, both).must("see them");
}

#[test]
fn an_ordinary_users_socket_that_is_bound_to_a_device() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let other = other_echo(lab);
    block(lab, "closed", Conditions::default());
    let to = way_out(&other);
    let _foreign = at_connects(lab.scope(), |hook| Deed { rewrite: to(hook), ..CLEAR });
    scene.client.become_user(65534);
    let socket = scene.client.tcp(lab.v4());
    socket.bind_device(Topology::LINK).must("bind to a device");
    // The kernel lets nobody else bind it elsewhere.
    socket.connect(lab.v4()).must("connect");
    assert_eq!(lab.counter(Counter::RefusalsCleared), 1);
    assert_eq!(lab.counter(Counter::NotHeldBack), 1);
}

#[test]
fn a_program_that_binds_new_sockets_to_a_device() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let number = || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        Ok::<_, std::io::Error>(name_to_index(&socket, Topology::LINK)?)
    };
    let device = lab.network().topology.client.run(number).must("enter the namespace");
    let device = device.must("ask for a device's number");
    let _foreign = Foreign::attach_to_new_sockets(lab.apps(), device, "cgroup_sock_create");
    // It is let go of, and the service connects with a socket of its own,
    scene.redirects(|client, to| client.connect(to).must("connect"));
    // but not for who may not; then nobody is reached.
    scene.client.become_user(65534);
    let so_far = lab.network().echo().connections().len();
    for to in scene.destinations() {
        assert_eq!(scene.client.connect(to).map(drop), Err(Errno(libc::EHOSTUNREACH)), "{to}");
    }
    assert_eq!(lab.counter(Counter::BoundToDevice), 3);
    assert_eq!(lab.network().echo().connections().len(), so_far);
}

#[test]
fn the_doctor_names_them() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let found = |name: &str| {
        let findings = doctor::examine(Some(lab.scope().path()));
        findings.into_iter().find(|finding| finding.name == name).expect("the finding")
    };
    let names = [
        "programs before Carnet's",
        "programs after Carnet's",
        "programs on packets",
        "programs on new sockets",
    ];
    for name in names {
        assert_eq!(found(name).state, State::Ok, "{:?}", found(name));
    }
    let _first = Foreign::attach(Hook::Connect4, lab.apps(), Deed::default());
    let _last = Foreign::attach(Hook::Sendmsg6, lab.scope(), Deed::default());
    let _packets = Foreign::attach_to_packets(lab.apps(), "sd_fw_egress");
    let sockets = Foreign::attach_to_new_sockets(lab.apps(), 0, "cgroup_sock_create");
    let [before, after, packets, new] = names.map(found);
    drop(sockets);
    for (finding, program, hook, cgroup) in [
        (&before, "foreign", "connect4", lab.apps()),
        (&after, "foreign", "sendmsg6", lab.scope()),
        (&packets, "sd_fw_egress of systemd", "egress", lab.apps()),
        (&new, "cgroup_sock_cre named as that of mitmproxy's", "sock_create", lab.apps()),
    ] {
        let detail = &finding.detail;
        let place = format!("{hook} at {})", cgroup.path().display());
        assert_eq!(finding.state, State::Warning, "{finding:?}");
        assert!(detail.starts_with(program) && detail.contains(&place), "{finding:?}");
    }
    assert!(after.advice.as_ref().is_some_and(|advice| advice.contains("cgroups above")));
    // Such programs are in nobody's way.
    scene.redirects(|client, to| client.connect(to).must("connect"));
}

#[test]
fn rules_of_nftables() {
    if !netfilter::is_there() {
        eprintln!("this kernel has no netfilter");
        return;
    }
    let scene = Scene::new();
    let lab = &scene.lab;
    let namespace = &lab.network().topology.client;
    // Another's transparent proxy, to which what goes to the destination is led.
    let proxy = lab.puppet();
    let listener = proxy.listen("127.0.0.1:0".parse().expect("an address"));
    let rule = format!(
        "add table ip other; add chain ip other away {{ type nat hook output priority -100; }}; \
         add rule ip other away tcp dport {} redirect to :{}",
        lab.v4().port(),
        listener.local().must("ask for the port").port(),
    );
    netfilter::change(namespace, &rule);
    let connection = scene.client.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    connection.send(b"marco").must("send");
    assert_eq!(accepted.receive(5), Ok(b"marco".to_vec()));
    assert_eq!(connection.peer(), Ok(lab.v4()));
    let report = scene.report_of(connection.local().must("ask for the local address"));
    assert_eq!(report.original, lab.v4());
    // The client's connection is none to the destination any more: netfilter saw the service's.
    assert_eq!(accepted.peer().map(|peer| peer.ip()), Ok(Topology::CLIENT_V4.into()));
    let findings = doctor::examine(Some(lab.scope().path()));
    let named =
        |finding: &&doctor::Finding| finding.detail.contains("away of table ip other (nat)");
    assert_eq!(findings.iter().find(named).map(|finding| finding.state), Some(State::Warning));
}

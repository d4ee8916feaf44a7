//! Programs that know nothing of Carnet: how their listeners become a service's, and how they find the
//! destination.

use std::{net::SocketAddr, num::NonZeroU16, sync::Arc};

use carnet_core::{
    abi,
    object::{Conditions, PortRange},
};
use carnet_engine::ServiceSockets;
use carnet_testbed::Cgroup;
use carnet_tests::{
    Lab, Must as _, Plan,
    puppet::{Errno, Family, Hand, Kind, Puppet},
    service::read_socket_address,
};

const REFUSED: Errno = Errno(libc::ECONNREFUSED);
/// Where the program listens.
const PORT: u16 = 15_001;

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The same port on an address of this machine.
fn at(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().expect("an address"), PORT)
}

/// The IPv4-mapped form of an IPv4 address.
fn mapped(v4: SocketAddr) -> SocketAddr {
    let SocketAddr::V4(v4) = v4 else { panic!("{v4} is not IPv4") };
    SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
}

/// A lab with a service that gets what goes to the echo server, and puppets for it and for a client.
fn scene(plan: Plan) -> (Lab, Puppet, Puppet) {
    let lab = Lab::new();
    let ports = [lab.v4(), lab.v6()].map(|to| PortRange::new(to.port(), to.port()));
    let ports = ports.into_iter().map(|range| range.expect("a range")).collect();
    let conditions = Conditions { ports, ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, unmodified: true, ..plan });
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    (lab, service, client)
}

fn by_port() -> Plan {
    Plan { listen_port: NonZeroU16::new(PORT), ..Plan::default() }
}

/// Checks that a connection arrives at a listener; gives both ends.
#[track_caller]
fn arrives<'a>(client: &'a Puppet, to: SocketAddr, listener: &Hand<'a>) -> (Hand<'a>, Hand<'a>) {
    let connection = client.connect(to).must("connect");
    let accepted = listener.accept().must("accept");
    let canonical = |address: SocketAddr| address.ip().to_canonical();
    assert_eq!(accepted.peer().map(canonical), connection.local().map(canonical));
    (connection, accepted)
}

#[test]
fn what_is_bound_to_the_services_port_is_registered() {
    let (lab, service, client) = scene(by_port());
    let other = service.listen(address("127.0.0.1:0"));
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED), "it listens elsewhere");
    let bound = service.tcp(at("127.0.0.1"));
    bound.bind(at("127.0.0.1")).must("bind");
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED), "it does not listen yet");
    bound.listen().must("listen");
    arrives(&client, lab.v4(), &bound);
    assert_eq!(client.connect(lab.v6()).err(), Some(REFUSED), "not with IPv6");
    let v6 = service.listen(at("::1"));
    arrives(&client, lab.v6(), &v6);

    let udp = service.udp(at("127.0.0.1"));
    udp.bind(at("127.0.0.1")).must("bind");
    client.udp(lab.v4()).send_to(lab.v4(), b"one").must("send");
    assert_eq!(udp.receive_from().map(|(word, _)| word), Ok(b"one".to_vec()));
    drop(other);
}

#[test]
fn a_program_is_followed_that_binds_again_and_so_are_its_workers() {
    let (lab, service, client) = scene(by_port());
    for _ in 0..3 * abi::LISTENER_SLOTS {
        let listener = service.listen(at("0.0.0.0"));
        arrives(&client, lab.v4(), &listener);
        drop(listener);
        assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    }
    // Another process, in a cgroup below the service's, as a unit's delegated ones are.
    let below = lab.cgroup_of("alpha").child("worker").must("make a cgroup");
    let worker = Puppet::start(&lab.network().topology.client, &below, None);
    let listener = worker.listen(at("127.0.0.1"));
    arrives(&client, lab.v4(), &listener);
    drop(listener);
    drop(worker);
    // One that was started anew, by another user.
    drop(service);
    let cgroup = lab.cgroup_of("alpha");
    let anew = Puppet::start(&lab.network().topology.client, &cgroup, Some(65_534));
    let listener = anew.listen(at("127.0.0.1"));
    arrives(&client, lab.v4(), &listener);
}

#[test]
fn workers_that_share_the_port_share_the_connections() {
    let (lab, service, client) = scene(by_port());
    let cgroup = lab.cgroup_of("alpha");
    let worker = Puppet::start(&lab.network().topology.client, &cgroup, None);
    let member = |puppet: &Puppet| -> SocketAddr {
        let socket = puppet.tcp(at("127.0.0.1"));
        socket.share_port().must("share the port");
        socket.bind(at("127.0.0.1")).must("bind");
        socket.listen().must("listen");
        let local = socket.local().must("ask for the address");
        // Kept until the puppet ends.
        std::mem::forget(socket);
        local
    };
    assert_eq!(member(&service), member(&worker));
    let one = client.connect(lab.v4()).must("connect");
    worker.kill();
    let other = client.connect(lab.v4()).must("connect");
    service.kill();
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    drop((one, other));
}

#[test]
fn the_port_is_the_services_alone() {
    let (lab, service, client) = scene(by_port());
    // A client's listener, one of no cgroup of Carnet's, and one of another service.
    lab.service_with("bravo", Plan { weight: 1, ..Plan::default() });
    let outside = Cgroup::create("carnet-e2e-outside").must("make a cgroup");
    let namespace = &lab.network().topology.client;
    for stranger in [lab.puppet(), Puppet::start(namespace, &outside, None), lab.puppet_of("bravo")]
    {
        let trap = stranger.listen(at("127.0.0.1"));
        assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
        drop(trap);
    }
    let listener = service.listen(at("127.0.0.1"));
    arrives(&client, lab.v4(), &listener);
}

#[test]
fn what_was_bound_before_is_registered_by_the_administrator() {
    let (lab, service, client) = scene(Plan::default());
    let other = service.listen(address("127.0.0.1:0"));
    let listener = service.listen(at("127.0.0.1"));
    let local = other.local().must("ask for the address");
    let register = |sockets: &ServiceSockets| {
        let registered = lab.engine().register_sockets_of("alpha", sockets);
        registered.map(|all| all.into_iter().map(|one| one.local).collect::<Vec<_>>())
    };
    // By its address, of whichever process of the service.
    let named = |tcp| ServiceSockets { tcp: vec![tcp], ..ServiceSockets::default() };
    assert_eq!(register(&named(at("127.0.0.1"))).must("register"), [at("127.0.0.1")]);
    arrives(&client, lab.v4(), &listener);
    let error = register(&named(at("127.0.0.2"))).expect_err("nobody listens there");
    assert!(error.to_string().contains("127.0.0.2:15001"), "{error}");

    // By the service's port.
    drop(listener);
    let listener = service.listen(at("127.0.0.1"));
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    lab.change(|policy| Ok(policy.set_listen_port("alpha", NonZeroU16::new(PORT)).map(drop)?));
    let all = ServiceSockets::default();
    assert_eq!(register(&all).must("register"), [at("127.0.0.1")]);
    arrives(&client, lab.v4(), &listener);

    // Without a port all of them are.
    lab.change(|policy| Ok(policy.set_listen_port("alpha", None).map(drop)?));
    let mut everywhere = register(&all).must("register");
    everywhere.sort_unstable();
    let mut expected = [local, at("127.0.0.1")];
    expected.sort_unstable();
    assert_eq!(everywhere, expected);
}

/// What `SO_ORIGINAL_DST` says at a level, with a buffer of the size of its address.
fn original(socket: &Hand<'_>, level: i32) -> Result<SocketAddr, Errno> {
    let room = if level == abi::SOL_IP { 16 } else { 28 };
    let bytes = socket.get(level, abi::SO_ORIGINAL_DST, room)?;
    Ok(read_socket_address(&bytes).expect("an address"))
}

#[test]
fn so_original_dst_is_asked_of_every_kind_of_socket_at_both_levels() {
    let (lab, service, client) = scene(by_port());
    let (v4, v6) = (service.listen(at("127.0.0.1")), service.listen(at("::1")));
    let dual = service.tcp(at("::"));
    let (to4, to6) = (lab.v4(), lab.v6());
    for (to, listener) in [(to4, &v4), (mapped(to4), &v4), (to6, &v6)] {
        let (_connection, accepted) = arrives(&client, to, listener);
        let at_v6 = if to.is_ipv4() { mapped(to) } else { to };
        assert_eq!(original(&accepted, abi::SOL_IPV6), Ok(at_v6));
        match to == to6 {
            // It has no such form, and the kernel answers.
            true => assert!(original(&accepted, abi::SOL_IP).is_err()),
            false => assert_eq!(original(&accepted, abi::SOL_IP), Ok(to4)),
        }
    }
    drop((v4, v6));
    // A listener for both families sees IPv4 in its mapped form, and programs ask at either level.
    dual.bind(at("::")).must("bind");
    dual.listen().must("listen");
    for (to, at_v6) in [(to4, mapped(to4)), (mapped(to4), mapped(to4)), (to6, to6)] {
        let (_connection, accepted) = arrives(&client, to, &dual);
        assert_eq!(original(&accepted, abi::SOL_IPV6), Ok(at_v6));
        if to != to6 {
            assert_eq!(original(&accepted, abi::SOL_IP), Ok(to4));
        }
    }
}

#[test]
fn who_leaves_too_little_room_is_told_as_by_netfilter() {
    let (lab, service, client) = scene(by_port());
    let listener = service.listen(at("127.0.0.1"));
    let (_connection, accepted) = arrives(&client, lab.v4(), &listener);
    for (level, size) in [(abi::SOL_IP, 16), (abi::SOL_IPV6, 28)] {
        for room in [0, 4, size - 1] {
            let answer = accepted.get(level, abi::SO_ORIGINAL_DST, room);
            assert_eq!(answer, Err(Errno(libc::EINVAL)), "{level}, {room} bytes");
        }
        let answer = accepted.get(level, abi::SO_ORIGINAL_DST, 128).must("ask");
        assert_eq!(answer.len(), size);
    }
}

#[test]
fn what_was_not_redirected_and_other_options_are_answered_by_the_kernel() {
    let (lab, service, client) = scene(by_port());
    // The twin is in no service's cgroup, so no hook of Carnet's sees its options.
    let twin = lab.puppet();
    let options = [
        (abi::SOL_IP, abi::SO_ORIGINAL_DST),
        (abi::SOL_IPV6, abi::SO_ORIGINAL_DST),
        (abi::SOL_IP, abi::SO_ORIGINAL_DST - 1),
        (abi::SOL_IPV6, abi::SO_ORIGINAL_DST + 1),
        (libc::SOL_SOCKET, abi::SO_ORIGINAL_DST),
        (libc::SOL_TCP, abi::SO_ORIGINAL_DST),
        (libc::SOL_UDP, abi::SO_ORIGINAL_DST),
        (1_000, abi::SO_ORIGINAL_DST),
    ];
    for (ours, its, redirected) in [
        (at("127.0.0.1"), address("127.0.0.1:15002"), lab.v4()),
        (at("::1"), address("[::1]:15002"), lab.v6()),
    ] {
        let (listener, other) = (service.listen(ours), twin.listen(its));
        let (_one, direct) = arrives(&client, ours, &listener);
        let (_two, beside) = arrives(&client, its, &other);
        let (_three, accepted) = arrives(&client, redirected, &listener);
        for (level, name) in options {
            for room in [4, 16, 28, 128] {
                let expected = beside.get(level, name, room);
                assert_eq!(direct.get(level, name, room), expected, "{level}, {name}, {room}");
                if !(name == abi::SO_ORIGINAL_DST
                    && (level == abi::SOL_IP || level == abi::SOL_IPV6))
                {
                    assert_eq!(accepted.get(level, name, room), expected, "{level}, {name}");
                }
            }
        }
    }
}

#[test]
fn getsockname_gives_the_destination_to_whom_the_operator_says() {
    let (lab, service, client) = scene(Plan { tproxy: true, ..by_port() });
    let (v4, v6) = (service.listen(at("127.0.0.1")), service.listen(at("::1")));
    let dual = service.tcp(at("::"));
    let (to4, to6) = (lab.v4(), lab.v6());
    for (to, listener, told) in [(to4, &v4, to4), (mapped(to4), &v4, to4), (to6, &v6, to6)] {
        let (connection, accepted) = arrives(&client, to, listener);
        assert_eq!(accepted.local(), Ok(told));
        assert_eq!(connection.peer(), Ok(to));
        // Of what is not the flow's, the program is told the truth.
        assert_eq!(listener.local().map(|local| local.port()), Ok(PORT));
        assert_ne!(connection.local().map(|local| local.ip()), Ok(to.ip()));
    }
    let (_direct, accepted) = arrives(&client, at("127.0.0.1"), &v4);
    assert_eq!(accepted.local(), Ok(at("127.0.0.1")));
    let own = service.connect(at("127.0.0.1")).must("connect");
    assert_eq!(own.local().map(|local| local.ip()), Ok(at("127.0.0.1").ip()));
    let (_connection, accepted) = arrives(&client, to4, &v4);
    accepted.disconnect().must("disconnect");
    accepted.connect(at("127.0.0.1")).must("connect");
    assert_ne!(accepted.local(), Ok(to4), "it was connected anew");
    drop((v4, v6));
    dual.bind(at("::")).must("bind");
    dual.listen().must("listen");
    for (to, told) in [(to4, mapped(to4)), (mapped(to4), mapped(to4)), (to6, to6)] {
        let (_connection, accepted) = arrives(&client, to, &dual);
        assert_eq!(accepted.local(), Ok(told));
    }
}

#[test]
fn getsockname_gives_the_destination_of_multipath_connections() {
    let (lab, service, client) = scene(Plan { tproxy: true, ..by_port() });
    let listener = service.open(Family::V4, Kind::Multipath).must("open a Multipath TCP socket");
    listener.bind(at("127.0.0.1")).must("bind");
    listener.listen().must("listen");
    let connection = client.open(Family::V4, Kind::Multipath).must("open");
    connection.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    assert_eq!(accepted.local(), Ok(lab.v4()));
}

#[test]
fn getsockname_is_left_alone_unless_the_operator_says_so() {
    let (lab, service, client) = scene(by_port());
    let listener = service.listen(at("127.0.0.1"));
    let local = |accepted: &Hand<'_>| accepted.local().must("ask for the address");
    let (_one, accepted) = arrives(&client, lab.v4(), &listener);
    assert_eq!(local(&accepted), at("127.0.0.1"));
    // It holds for the connections that there are, too.
    lab.change(|policy| Ok(policy.set_tproxy("alpha", true).map(drop)?));
    assert_eq!(local(&accepted), lab.v4());
    // A service within another's cgroup is not asked about by that one.
    lab.change(|policy| Ok(policy.remove_filter("alpha").map(drop)?));
    let below = lab.cgroup_of("alpha").child("inner").must("make a cgroup");
    lab.service_in("bravo", Arc::new(below), Plan::default());
    let inner = lab.puppet_of("bravo");
    let listener = inner.serve(address("127.0.0.1:0"));
    let (_two, accepted) = arrives(&client, lab.v4(), &listener);
    assert_eq!(accepted.local(), listener.local());
}

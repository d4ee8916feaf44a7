//! Which sockets get a service's connections: those that it has registered, as long as they listen.

use std::net::SocketAddr;

use carnet_core::abi::LISTENER_SLOTS;
use carnet_testbed::Topology;
use carnet_tests::{
    Lab, Must as _, PATIENCE,
    puppet::{Errno, Family, Hand, Kind, Puppet},
};

const REFUSED: Errno = Errno(libc::ECONNREFUSED);

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A lab with one service, and puppets for it and for a client.
fn scene() -> (Lab, Puppet, Puppet) {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    (lab, service, client)
}

/// Checks that a connection arrives at a listener, as one of the service.
#[track_caller]
fn arrives(client: &Puppet, to: SocketAddr, listener: &Hand<'_>) -> SocketAddr {
    let connection = client.connect(to).must("connect");
    let accepted = listener.accept().must("accept");
    // A dual-stack listener sees IPv4 addresses in their mapped form.
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    assert_eq!(accepted.peer().map(canonical), connection.local().map(canonical));
    assert_eq!(connection.peer(), Ok(to));
    let original = accepted.query(carnet_core::abi::ORIGINAL_DESTINATION);
    assert_eq!(original.map(|bytes| bytes.len()), Ok(24));
    accepted.local().must("ask for the local address")
}

#[test]
fn a_listener_that_moves_takes_the_connections_along() {
    let (lab, service, client) = scene();
    for _ in 0..3 * LISTENER_SLOTS {
        let listener = service.serve(address("127.0.0.1:0"));
        arrives(&client, lab.v4(), &listener);
        drop(listener);
        // Closed is unregistered.
        assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    }
}

#[test]
fn a_service_may_start_anew_as_often_as_it_likes() {
    let (lab, service, client) = scene();
    // Without a connection in between, at which the kernel could notice that a listener is gone.
    for _ in 0..3 * LISTENER_SLOTS {
        drop(service.serve(address("127.0.0.1:0")));
    }
    let listener = service.serve(address("127.0.0.1:0"));
    arrives(&client, lab.v4(), &listener);
}

#[test]
fn a_service_of_datagrams_may_start_anew_as_often_as_it_likes() {
    let (lab, service, client) = scene();
    for any in ["127.0.0.1:0", "[::1]:0"] {
        let any = address(any);
        let open = || {
            let socket = service.udp(any);
            socket.bind(any).must("bind");
            socket.register(&[]).must("register");
            socket
        };
        for _ in 0..3 * LISTENER_SLOTS {
            drop(open());
        }
        let socket = open();
        let to = if any.is_ipv4() { lab.v4() } else { lab.v6() };
        client.udp(to).send_to(to, b"one").must("send");
        assert_eq!(socket.receive_from().map(|(word, _)| word), Ok(b"one".to_vec()));
    }
}

#[test]
fn an_unregistered_listener_gets_nothing() {
    let (lab, service, client) = scene();
    let listener = service.listen(address("127.0.0.1:0"));
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    listener.register(&[]).must("register");
    arrives(&client, lab.v4(), &listener);
}

#[test]
fn nobody_can_squat_on_the_port_of_a_dead_service() {
    let (lab, service, client) = scene();
    let listener = service.serve(address("127.0.0.1:0"));
    let local = listener.local().must("ask for the address");
    arrives(&client, lab.v4(), &listener);
    drop(listener);
    drop(service);
    let squatter = lab.puppet();
    let trap = squatter.listen(local);
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    // Not even a process of the service, unless it registers.
    drop(trap);
    let service = lab.puppet_of("alpha");
    let listener = service.listen(local);
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    listener.register(&[]).must("register");
    arrives(&client, lab.v4(), &listener);
}

#[test]
fn several_listeners_stand_in_for_each_other() {
    let (lab, service, client) = scene();
    let mut listeners: Vec<_> =
        (0..LISTENER_SLOTS).map(|_| service.serve(address("127.0.0.1:0"))).collect();
    let one_too_many = service.listen(address("127.0.0.1:0"));
    assert_eq!(one_too_many.register(&[]), Err(Errno(libc::ENOSPC)));
    // To register again is no new registration.
    assert_eq!(listeners[0].register(&[]), Ok(()));
    while !listeners.is_empty() {
        arrives(&client, lab.v4(), &listeners[0]);
        drop(listeners.remove(0));
    }
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    // And their slots are free again.
    one_too_many.register(&[]).must("register");
    arrives(&client, lab.v4(), &one_too_many);
}

#[test]
fn a_group_of_sockets_shares_a_port() {
    let (lab, service, client) = scene();
    let local = service.listen(address("127.0.0.1:0")).local().must("ask for the address");
    let member = || {
        let socket = service.tcp(local);
        socket.share_port().must("share the port");
        socket.bind(local).must("bind");
        socket.listen().must("listen");
        socket.register(&[]).must("register");
        socket
    };
    let group = [member(), member(), member()];
    // Whoever of the group gets it; all of them are in it until they close.
    let clients: Vec<_> = (0..12).map(|_| client.connect(lab.v4()).must("connect")).collect();
    let [first, second, third] = group;
    drop((second, third));
    arrives_eventually(&client, lab.v4(), &first);
    drop((clients, first));
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
}

/// Connects, and accepts until the new connection comes: others may wait before it.
#[track_caller]
fn arrives_eventually(client: &Puppet, to: SocketAddr, listener: &Hand<'_>) {
    let connection = client.connect(to).must("connect");
    let local = connection.local();
    for _ in 0..13 {
        if listener.accept().must("accept").peer() == local {
            return;
        }
    }
    panic!("the connection did not come to the group's last socket");
}

#[test]
fn a_wildcard_listener_is_reached_where_the_client_is_bound() {
    let (lab, service, client) = scene();
    let v4 = service.serve(address("0.0.0.0:0"));
    let v6 = service.tcp(address("[::]:0"));
    v6.only_v6(true).must("restrict the listener to IPv6");
    v6.bind(address("[::]:0")).must("bind");
    v6.listen().must("listen");
    v6.register(&[]).must("register");
    assert_eq!(arrives(&client, lab.v4(), &v4).ip(), address("127.0.0.1:0").ip());
    assert_eq!(arrives(&client, lab.v6(), &v6).ip(), address("[::1]:0").ip());

    for (to, own, listener) in [
        (lab.v4(), SocketAddr::new(Topology::CLIENT_V4.into(), 0), &v4),
        (lab.v6(), SocketAddr::new(Topology::CLIENT_V6.into(), 0), &v6),
    ] {
        let connection = client.tcp(to);
        connection.bind(own).must("bind");
        connection.connect(to).must("connect");
        let accepted = listener.accept().must("accept");
        assert_eq!(accepted.local().map(|local| local.ip()), Ok(own.ip()));
        assert_eq!(accepted.peer(), connection.local());
        assert_eq!(connection.peer(), Ok(to));
        assert!(accepted.query(carnet_core::abi::QUERY_REDIRECT_RECORDS).is_ok());
    }
}

#[test]
fn a_dual_stack_listener_serves_both_families() {
    let (lab, service, client) = scene();
    let listener = service.serve(address("[::]:0"));
    assert_eq!(arrives(&client, lab.v4(), &listener).ip(), address("[::ffff:127.0.0.1]:0").ip());
    assert_eq!(arrives(&client, lab.v6(), &listener).ip(), address("[::1]:0").ip());
    // A client with an IPv6 socket to an IPv4 destination.
    let SocketAddr::V4(v4) = lab.v4() else { panic!("an IPv4 address") };
    let mapped = SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port());
    arrives(&client, mapped, &listener);
}

#[test]
fn an_ipv4_listener_does_not_serve_ipv6() {
    let (lab, service, client) = scene();
    let _listener = service.serve(address("127.0.0.1:0"));
    assert_eq!(client.connect(lab.v6()).err(), Some(REFUSED));
}

#[test]
fn a_multipath_listener_serves_plain_and_multipath_clients() {
    let (lab, service, client) = scene();
    let listener = service.open(Family::V4, Kind::Multipath).must("open a Multipath TCP socket");
    listener.bind(address("127.0.0.1:0")).must("bind");
    listener.listen().must("listen");
    listener.register(&[]).must("register");
    arrives(&client, lab.v4(), &listener);
    let connection = client.open(Family::V4, Kind::Multipath).must("open");
    connection.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    let original = accepted.query(carnet_core::abi::ORIGINAL_DESTINATION);
    assert_eq!(original.map(|bytes| bytes.len()), Ok(24));
    assert_eq!(connection.peer(), Ok(lab.v4()));
}

#[test]
fn the_administrator_registers_for_a_service() {
    let (lab, _service, client) = scene();
    let unaware = carnet_tests::Running::start(
        &lab.network().topology.client,
        &lab.cgroup_of("alpha"),
        &carnet_tests::service::Behaviour {
            listen: vec![address("127.0.0.1:0")],
            no_register: true,
            ..Default::default()
        },
    );
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    let registered = lab
        .engine()
        .register_listener_of("alpha", unaware.id())
        .must("register the listeners of a process");
    assert_eq!(registered, unaware.addresses());
    lab.exchange(lab.v4());
    assert_eq!(unaware.reports(1).len(), 1);
    let connections = lab.network().echo().wait_for_finished(1, PATIENCE);
    assert_eq!(connections.must("see the connection").len(), 1);
}

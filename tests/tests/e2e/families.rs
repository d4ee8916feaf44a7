//! Every way in which an application may connect, and what it sees of the redirect: nothing.

use std::{net::SocketAddr, path::Path};

use carnet_core::{abi, event::Counter, object::Conditions};
use carnet_testbed::{Topology, exchange, peer_command};
use carnet_tests::{
    Lab, Must as _, Plan, Report,
    puppet::{Family, Hand, Kind, Puppet},
    service::{Behaviour, read_socket_address},
    until,
};

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The IPv4-mapped form of an IPv4 address.
fn mapped(v4: SocketAddr) -> SocketAddr {
    let SocketAddr::V4(v4) = v4 else { panic!("{v4} is not IPv4") };
    SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port())
}

#[test]
fn ipv4_ipv6_and_mapped_arrive_and_see_whom_they_asked_for() {
    let lab = Lab::new();
    let service = lab.start_with(
        {
            lab.service("alpha", 1);
            "alpha"
        },
        &Behaviour::default(),
    );
    for (to, family, seen) in [
        (lab.v4(), exchange::Family::V4, lab.v4()),
        (lab.v6(), exchange::Family::V6, lab.v6()),
        (lab.v4(), exchange::Family::Mapped, mapped(lab.v4())),
    ] {
        let reports = lab.client(to).family(family).run().must("run a client");
        assert!(reports[0].ok, "{reports:#?}");
        assert_eq!(reports[0].peer, Some(seen));
    }
    lab.settle();
    let reports = service.finish();
    let originals: Vec<_> =
        reports.iter().map(|r| (r.original, r.so_original, r.so_original_v6.is_ok())).collect();
    let v4 = lab.v4();
    let [first, second, third] = &originals[..] else { panic!("{reports:#?}") };
    assert_eq!((first.0, first.1), (v4, Ok(v4)));
    assert_eq!((second.0, second.2), (lab.v6(), true));
    assert!(second.1.is_err(), "an IPv6 destination is no sockaddr_in");
    assert_eq!((third.0, third.1), (mapped(v4), Ok(v4)));
    assert_eq!(reports[1].so_original_v6, Ok(lab.v6()));
    assert_eq!(reports[2].so_original_v6, Ok(mapped(v4)));
}

#[test]
fn so_original_dst_has_the_size_of_its_address() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    for (to, level, size) in [(lab.v4(), abi::SOL_IP, 16_usize), (lab.v6(), abi::SOL_IPV6, 28)] {
        let any = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let listener = service.serve(address(any));
        let _connection = client.connect(to).must("connect");
        let accepted = listener.accept().must("accept");
        for room in [size, size + 1, 128, 4096] {
            let bytes = accepted.get(level, abi::SO_ORIGINAL_DST, room).must("ask");
            assert_eq!(read_socket_address(&bytes), Some(to), "with room for {room} bytes");
        }
        assert!(accepted.get(level, abi::SO_ORIGINAL_DST, size - 1).is_err());
        // What the option is not for, the kernel answers.
        assert!(listener.get(level, abi::SO_ORIGINAL_DST, 128).is_err());
    }
}

/// Sends a word and gets it back.
#[track_caller]
fn echoes(connection: &Hand<'_>) {
    connection.send(b"marco").must("send");
    assert_eq!(connection.receive(5), Ok(b"marco".to_vec()));
}

/// A lab with a service at work, and a client.
fn scene(conditions: Conditions) -> (Lab, carnet_tests::Running, Puppet) {
    let lab = Lab::new();
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.start("alpha");
    let client = lab.puppet();
    (lab, service, client)
}

#[test]
fn multipath_tcp_is_redirected() {
    let (lab, service, client) = scene(Conditions::default());
    for to in [lab.v4(), lab.v6()] {
        let connection =
            client.open(Family::of(to), Kind::Multipath).must("open a Multipath TCP socket");
        connection.connect(to).must("connect");
        assert_eq!(connection.peer(), Ok(to));
        echoes(&connection);
    }
    assert_eq!(service.reports(2).len(), 2);
    let reports = lab.client(lab.v4()).mptcp().count(4).run().must("run a client");
    assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
    lab.settle();
    assert_eq!(service.finish().len(), 6);
}

#[test]
fn a_socket_that_is_used_again_carries_nothing_over() {
    let lab = Lab::new();
    let other = lab.network().another_echo();
    let conditions = Conditions { ports: vec![lab.v4().port().into()], ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.start("alpha");
    let client = lab.puppet();
    let socket = client.tcp(lab.v4());
    socket.connect(lab.v4()).must("connect");
    echoes(&socket);
    let first = service.reports(1)[0].flow;

    socket.disconnect().must("disconnect");
    assert_eq!(socket.peer().map_err(|errno| errno.0), Err(libc::ENOTCONN));
    socket.connect(other.address()).must("connect elsewhere");
    assert_eq!(socket.peer(), Ok(other.address()));
    echoes(&socket);
    let connections = other
        .wait_for("a connection", carnet_tests::PATIENCE, |all| !all.is_empty())
        .must("see the connection");
    assert_eq!(Ok(connections[0].peer), socket.local());
    // Of the first flow the service's side may still be on its way out.
    let flows = || lab.engine().flows().must("list the flows");
    until("the end of the first flow", flows, |legs| legs.iter().all(|leg| leg.flow != first));

    // And back: a flow of its own.
    socket.disconnect().must("disconnect");
    socket.connect(lab.v4()).must("connect again");
    assert_eq!(socket.peer(), Ok(lab.v4()));
    echoes(&socket);
    let flows: Vec<_> = service.reports(2).iter().map(|report| report.flow).collect();
    assert_ne!(flows[0], flows[1]);
    drop(socket);
    lab.settle();
}

#[test]
fn a_connect_that_fails_before_its_syn_leaves_nothing() {
    let lab = Lab::new();
    let other = lab.network().another_echo();
    let conditions = Conditions { ports: vec![lab.v4().port().into()], ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.start("alpha");
    let client = lab.puppet();
    let first = client.tcp(lab.v4());
    first.share_port().must("share the port");
    first.bind(address("0.0.0.0:0")).must("bind");
    let port = first.local().must("ask for the port").port();
    first.connect(lab.v4()).must("connect");
    echoes(&first);

    // The same two ends once more: refused when the connect hook has done its part.
    let second = client.tcp(lab.v4());
    second.share_port().must("share the port");
    second.bind(address(&format!("0.0.0.0:{port}"))).must("bind to the same port");
    let refused = second.connect(lab.v4()).map_err(|errno| errno.0);
    assert_eq!(refused, Err(libc::EADDRNOTAVAIL));
    assert_eq!(lab.counter(Counter::Redirected), 2);
    second.connect(other.address()).must("connect elsewhere");
    assert_eq!(second.peer(), Ok(other.address()));
    echoes(&second);
    let flow = service.reports(1)[0].flow;
    let legs = lab.engine().flows().must("list the flows");
    assert!(legs.iter().all(|leg| leg.flow == flow), "{legs:#?}");
    drop((first, second));
    lab.settle();
    assert_eq!(service.finish().len(), 1);
}

#[test]
fn what_fails_to_connect_leaves_nothing() {
    let (lab, service, client) = scene(Conditions::default());
    // The service takes it, but nobody is there at the destination.
    let nobody = SocketAddr::new(Topology::DESTINATION_V4.into(), 1);
    let connection = client.connect(nobody).must("connect to the service");
    assert_eq!(connection.receive(1), Ok(vec![]));
    assert_eq!(service.reports(1)[0].onward, Err(libc::ECONNREFUSED));
    drop(connection);
    lab.settle();
}

#[test]
fn the_service_learns_who_the_application_is() {
    let (lab, service, _) = scene(Conditions::default());
    let client = lab.client(lab.v4()).as_user(65534, 65533).start().must("start a client");
    let pid = client.id();
    let reports = client.finish(carnet_tests::PATIENCE).must("run a client");
    assert!(reports[0].ok, "{reports:#?}");
    let reports = service.reports(1);
    let command = peer_command().must("find the client's program");
    let Report { pid: seen, uid, gid, cgroup, netns, executable, command: name, .. } = &reports[0];
    assert_eq!(*seen, pid);
    assert_eq!((*uid, *gid), (65534, 65533));
    assert_eq!(*cgroup, lab.apps().id());
    assert_eq!(*netns, lab.network().topology.client.cookie().must("ask for the cookie"));
    assert_eq!(executable.as_deref(), Some(Path::new(command.get_program())));
    assert_eq!(name, "testbed-peer");
}

#[test]
fn an_unprivileged_service_needs_nothing_but_its_cgroup() {
    let lab = Lab::new();
    lab.service("alpha", 2);
    lab.service("bravo", 1);
    let services = ["alpha", "bravo"]
        .map(|name| lab.start_with(name, &Behaviour { user: Some(65534), ..Behaviour::default() }));
    for to in [lab.v4(), lab.v6()] {
        lab.exchange(to);
    }
    lab.settle();
    let handles = ["alpha", "bravo"].map(|name| lab.handle_of(name));
    let chain: Vec<_> =
        handles.into_iter().zip(services.map(carnet_tests::Running::finish)).collect();
    carnet_tests::handed_on(&chain, 2);
}

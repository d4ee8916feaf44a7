//! UDP: what the application sees of the redirect is nothing, and datagrams never cross.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use carnet_core::{
    abi,
    chain::hop_limit,
    event::{Counter, EventKind},
    object::{Conditions, FailurePolicy, FilterAction, NewFilter, Protocol, Trust, Weight},
};
use carnet_engine::LegKind;
use carnet_testbed::{
    DatagramClients, DatagramServer, Topology, answer_of,
    datagrams::{DatagramPlan, dropped_for_want_of_room},
};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan, Report, Running, handed_on,
    puppet::{Family, Hand, Kind, Receiving},
    rounds,
    service::Behaviour,
};

const DESTINATION: [IpAddr; 2] =
    [IpAddr::V4(Topology::DESTINATION_V4), IpAddr::V6(Topology::DESTINATION_V6)];
/// How long to wait for what must not come.
const SILENCE: Duration = Duration::from_millis(300);

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The IPv4-mapped form of an IPv4 address.
fn mapped(v4: SocketAddr) -> SocketAddr {
    let IpAddr::V4(ip) = v4.ip() else { panic!("{v4} is not IPv4") };
    (ip.to_ipv6_mapped(), v4.port()).into()
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A server at the destination, over IPv4 and IPv6.
#[track_caller]
fn server(lab: &Lab) -> DatagramServer {
    servers(lab, 1)
}

/// One with several ports; those of IPv4 and IPv6 take turns.
#[track_caller]
fn servers(lab: &Lab, ports: usize) -> DatagramServer {
    let addresses = (0..ports).flat_map(|_| DESTINATION).map(|ip| SocketAddr::new(ip, 0));
    DatagramServer::start_in(&lab.network().topology.destination, addresses).must("start a server")
}

/// A lab with a server at the destination and a service that relays datagrams.
#[track_caller]
fn scene() -> (Lab, DatagramServer, Running) {
    let lab = Lab::new();
    let server = server(&lab);
    lab.service("alpha", 1);
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    (lab, server, service)
}

/// Starts services that relay datagrams, the first of which gets flows first.
#[track_caller]
fn start_chain(lab: &Lab, names: &[&str]) -> Vec<Running> {
    for (weight, name) in (1..=names.len() as u16).rev().zip(names) {
        lab.service(name, weight);
    }
    names.iter().map(|name| lab.start_with(name, &Behaviour::with_datagrams())).collect()
}

/// Sends a word and gets its answer, from where it was sent to.
#[track_caller]
fn answers(socket: &Hand<'_>, to: SocketAddr, word: &[u8]) {
    socket.send_to(to, word).must("send");
    is_answered(socket, to, word);
}

#[track_caller]
fn is_answered(socket: &Hand<'_>, to: SocketAddr, word: &[u8]) {
    let (answer, source) = socket.receive_from().must("get an answer");
    let due = answer_of(canonical(to), word);
    assert_eq!(String::from_utf8_lossy(&answer), String::from_utf8_lossy(&due));
    assert_eq!(source, to);
}

/// Nothing comes.
#[track_caller]
fn stays_silent(socket: &Hand<'_>) {
    socket.receive_within(SILENCE).must("limit the wait");
    let received = socket.receive_from();
    assert_eq!(received.map_err(|errno| errno.0), Err(libc::EAGAIN));
    socket.receive_within(PATIENCE).must("limit the wait");
}

fn originals(reports: &[Report]) -> Vec<SocketAddr> {
    reports.iter().map(|report| report.original).collect()
}

#[test]
fn every_way_to_receive_tells_the_source_that_the_application_expects() {
    let (lab, server, service) = scene();
    let client = lab.puppet();
    let (v4, v6) = (server.addresses()[0], server.addresses()[1]);
    for (family, to) in [(Family::V4, v4), (Family::V6, v6), (Family::V6, mapped(v4))] {
        for connected in [false, true] {
            let socket = client.open(family, Kind::Udp).must("open a socket");
            if connected {
                socket.connect(to).must("connect");
                assert_eq!(socket.peer(), Ok(to));
            }
            for (how, source) in [
                (Receiving::From, Some(to)),
                (Receiving::Message, Some(to)),
                (Receiving::Read, None),
                (Receiving::Peek, Some(to)),
                (Receiving::From, Some(to)),
            ] {
                let word = format!("{how:?}").into_bytes();
                if connected {
                    socket.send(&word).must("send");
                } else {
                    socket.send_to(to, &word).must("send");
                }
                let due = answer_of(canonical(to), &word);
                let received = socket.receive_by(how);
                assert_eq!(received, Ok((due.clone(), source)), "{how:?} {to} {connected}");
                if how == Receiving::Peek {
                    // It is still there.
                    assert_eq!(socket.receive_from(), Ok((due, to)));
                }
            }
        }
    }
    // One flow a socket, however many datagrams.
    let reports = service.reports(6);
    assert_eq!(originals(&reports), [v4, v4, v6, v6, mapped(v4), mapped(v4)]);
    for report in &reports {
        assert_eq!((report.hops, report.legs), (1, 1), "{report:#?}");
        assert!(report.onward.is_ok(), "{report:#?}");
    }
    assert_eq!(server.datagrams().len(), 30);
}

#[test]
fn one_socket_talks_to_many_destinations() {
    let lab = Lab::new();
    let servers = servers(&lab, 12);
    lab.service("alpha", 1);
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    let client = lab.puppet();
    // Dual-stack: half of the destinations are mapped.
    let socket = client.open(Family::V6, Kind::Udp).must("open a socket");
    let all: Vec<SocketAddr> =
        servers.addresses().iter().map(|to| if to.is_ipv4() { mapped(*to) } else { *to }).collect();
    for round in 0..3 {
        for to in &all {
            answers(&socket, *to, format!("round {round}").as_bytes());
        }
    }
    // And all at once.
    for to in &all {
        socket.send_to(*to, b"at once").must("send");
    }
    let mut sources: Vec<SocketAddr> = all
        .iter()
        .map(|_| {
            let (answer, source) = socket.receive_from().must("get an answer");
            assert_eq!(answer, answer_of(canonical(source), b"at once"));
            source
        })
        .collect();
    let mut due = all.clone();
    due.sort_unstable();
    sources.sort_unstable();
    assert_eq!(sources, due);
    assert_eq!(originals(&service.finish()), all);
}

fn plan(to: Vec<SocketAddr>) -> DatagramPlan {
    DatagramPlan { to, clients: 1, rounds: 1, window: 128, connected: false, timeout: PATIENCE }
}

#[track_caller]
fn run(lab: &Lab, plan: &DatagramPlan) {
    let namespace = &lab.network().topology.client;
    let clients = DatagramClients::start(plan, Some(namespace), Some(lab.apps()));
    let report = clients.must("start clients").finish(PATIENCE).must("run clients");
    assert!(report.is_perfect(), "{report:#?}");
    let due = u64::from(plan.clients) * u64::from(plan.rounds) * plan.to.len() as u64;
    assert_eq!(report.answered, due);
}

#[test]
fn many_sockets_to_one_destination_do_not_cross() {
    let (lab, server, service) = scene();
    for connected in [false, true] {
        for to in server.addresses() {
            run(&lab, &DatagramPlan { clients: 200, rounds: 5, connected, ..plan(vec![*to]) });
        }
    }
    assert_eq!(service.finish().len(), 800);
    assert_eq!(server.datagrams().len(), 4000);
}

/// A service asks about a flow with a socket that it binds and connects. While it does so, no
/// datagram of another client comes there, nor is one lost.
#[test]
fn flows_that_begin_all_at_once_do_not_cross() {
    let (lab, server, service) = scene();
    for connected in [true, false] {
        let to = server.addresses().to_vec();
        run(&lab, &DatagramPlan { clients: 200, rounds: 3, window: 1200, connected, ..plan(to) });
    }
    assert_eq!(service.finish().len(), 800);
}

#[test]
fn a_socket_that_is_connected_anew_carries_nothing_over() {
    let lab = Lab::new();
    let servers = servers(&lab, 3);
    lab.service("alpha", 1);
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    let client = lab.puppet();
    for family in [0, 1] {
        let to = [0, 2, 4].map(|number| servers.addresses()[number + family]);
        let [first, second, third] = to;
        let socket = client.udp(first);
        let word = |to: SocketAddr, word: &[u8]| {
            assert_eq!(socket.peer(), Ok(to));
            socket.send(word).must("send");
            is_answered(&socket, to, word);
        };
        socket.connect(first).must("connect");
        word(first, b"one");
        socket.disconnect().must("disconnect");
        assert_eq!(socket.peer().map_err(|errno| errno.0), Err(libc::ENOTCONN));
        // Unconnected for a while. (The kernel lets an IPv6 socket hear nobody then but whom it was
        // connected to: it forgets the address of IPv4 sockets alone.)
        if third.is_ipv4() {
            answers(&socket, third, b"two");
        }
        socket.connect(second).must("connect elsewhere");
        word(second, b"three");
        // Without the detour: the socket keeps its address, under which the service has known it.
        for (to, text) in [(third, "four"), (first, "five"), (first, "six")] {
            socket.connect(to).must("connect elsewhere");
            word(to, text.as_bytes());
        }
    }
    let originals = originals(&service.finish());
    assert_eq!(originals.len(), 11, "{originals:?}");
}

#[test]
fn a_connected_socket_may_send_elsewhere() {
    let lab = Lab::new();
    let servers = servers(&lab, 2);
    lab.service("alpha", 1);
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    let client = lab.puppet();
    for family in [0, 1] {
        let (to, elsewhere) = (servers.addresses()[family], servers.addresses()[2 + family]);
        let socket = client.udp(to);
        socket.connect(to).must("connect");
        socket.send(b"to the peer").must("send");
        is_answered(&socket, to, b"to the peer");
        // A connected socket hears its peer alone, as without a redirect; but the datagram goes
        // where it is to go, through the service.
        socket.send_to(elsewhere, b"elsewhere").must("send elsewhere");
        let is_there = |datagram: &carnet_testbed::ReceivedDatagram| {
            datagram.local == elsewhere && datagram.payload == b"elsewhere"
        };
        servers
            .wait_for("the datagram", PATIENCE, |all| all.iter().any(is_there))
            .must("see the datagram");
        stays_silent(&socket);
        socket.send(b"to the peer again").must("send");
        is_answered(&socket, to, b"to the peer again");
        assert_eq!(socket.peer(), Ok(to));
    }
    let found = originals(&service.finish());
    let due: Vec<_> = [0, 2, 1, 3].map(|number| servers.addresses()[number]).into();
    assert_eq!(found, due);
}

#[test]
fn a_change_of_the_policy_concerns_flows_that_begin_after_it() {
    let (lab, server, service) = scene();
    let client = lab.puppet();
    let to = server.address();
    let (before, connected) = (client.udp(to), client.udp(to));
    answers(&before, to, b"before");
    connected.connect(to).must("connect");
    connected.send(b"before").must("send");
    is_answered(&connected, to, b"before");
    assert_eq!(service.reports(2).len(), 2);

    lab.change(|policy| Ok(policy.remove_filter("alpha").map(drop)?));
    // Existing flows go on through the service; the others go directly.
    answers(&before, to, b"after");
    connected.send(b"after").must("send");
    is_answered(&connected, to, b"after");
    let direct = client.udp(to);
    answers(&direct, to, b"direct");
    let port = direct.local().must("ask for the port").port();
    let seen = server.datagrams();
    let peer_of = |word: &[u8]| -> Vec<SocketAddr> {
        seen.iter().filter(|one| one.payload == word).map(|one| one.peer).collect()
    };
    assert_eq!(peer_of(b"direct"), [(Topology::CLIENT_V4, port).into()]);
    assert_eq!(peer_of(b"before"), peer_of(b"after"));

    // And the other way round: what began directly stays direct.
    lab.change(|policy| {
        policy.add_filter(NewFilter {
            name: Some("alpha".into()),
            sublayer: "alpha".into(),
            weight: Weight::Auto,
            conditions: Conditions::default(),
            action: FilterAction::Redirect { service: "alpha".into(), context: None },
        })?;
        Ok(())
    });
    let fresh = client.udp(to);
    answers(&fresh, to, b"fresh");
    assert_eq!(service.reports(3).len(), 3);
}

/// A flow of datagrams has no end but that nothing comes any more. What comes later is another one.
#[test]
fn a_flow_that_is_idle_for_too_long_ends() {
    let idle = Duration::from_secs(2);
    let lab = Lab::with_udp_idle(idle);
    let server = server(&lab);
    lab.service("alpha", 1);
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    let client = lab.puppet();
    for (number, to) in server.addresses().iter().enumerate() {
        let socket = client.udp(*to);
        // For longer than it may be idle, but never idle for so long.
        let begun = Instant::now();
        while begun.elapsed() < idle * 3 / 2 {
            answers(&socket, *to, b"still there");
            thread::sleep(idle / 8);
        }
        assert_eq!(service.reports(2 * number + 1).len(), 2 * number + 1);
        // Nothing announces that it counts as idle. (What `carnet flows` lists may be late.)
        thread::sleep(idle * 5 / 4);
        answers(&socket, *to, b"there again");
        let reports = service.reports(2 * number + 2);
        let [.., before, after] = &reports[..] else { panic!("two flows") };
        assert!(before.flow != after.flow && before.peer != after.peer, "{reports:#?}");
    }
    assert_eq!(service.finish().len(), 4);
}

#[test]
fn a_dead_service_refuses_or_is_passed_over() {
    let lab = Lab::new();
    let server = server(&lab);
    let to = server.address();
    lab.service("alpha", 1);
    let client = lab.puppet();
    let refused = |client: &carnet_tests::puppet::Puppet| {
        let sent = client.udp(to).send_to(to, b"refused").map_err(|errno| errno.0);
        assert_eq!(sent, Err(libc::ECONNREFUSED));
        let connected = client.udp(to).connect(to).map_err(|errno| errno.0);
        assert_eq!(connected, Err(libc::ECONNREFUSED));
    };
    refused(&client);
    // One that serves TCP alone does not serve UDP.
    let service = lab.start("alpha");
    refused(&client);
    service.kill();
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    let socket = client.udp(to);
    answers(&socket, to, b"through alpha");
    service.kill();
    refused(&client);
    assert!(server.datagrams().iter().all(|one| one.payload != b"refused"));

    lab.change(|policy| Ok(policy.set_on_failure("alpha", FailurePolicy::Skip).map(drop)?));
    let direct = client.udp(to);
    answers(&direct, to, b"direct");
    let connected = client.udp(to);
    connected.connect(to).must("connect");
    connected.send(b"connected").must("send");
    is_answered(&connected, to, b"connected");
    assert!(lab.counter(Counter::Skipped) >= 2);

    // Back in its place as soon as it is back.
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    answers(&client.udp(to), to, b"through alpha again");
    assert_eq!(service.finish().len(), 1);
}

#[test]
fn two_services_get_a_flow_in_their_order() {
    let lab = Lab::new();
    let server = server(&lab);
    let services = start_chain(&lab, &["alpha", "bravo"]);
    let client = lab.puppet();
    for to in server.addresses() {
        let unconnected = client.udp(*to);
        for word in [b"one", b"two"] {
            answers(&unconnected, *to, word);
        }
        let connected = client.udp(*to);
        connected.connect(*to).must("connect");
        connected.send(b"three").must("send");
        is_answered(&connected, *to, b"three");
    }
    let handles = ["alpha", "bravo"].map(|name| lab.handle_of(name));
    let chain: Vec<_> =
        handles.into_iter().zip(services.into_iter().map(Running::finish)).collect();
    handed_on(&chain, 4);
}

#[test]
fn a_service_lets_pass_what_those_that_it_trusts_have_seen() {
    let lab = Lab::new();
    let server = server(&lab);
    for (name, weight, trust) in
        [("bravo", 2, Trust::None), ("alpha", 1, Trust::Services(vec!["bravo".into()]))]
    {
        lab.service_with(name, Plan { weight, trust, ..Plan::default() });
    }
    let services =
        ["bravo", "alpha"].map(|name| lab.start_with(name, &Behaviour::with_datagrams()));
    let client = lab.puppet();
    for to in server.addresses() {
        answers(&client.udp(*to), *to, b"trusted");
    }
    assert_eq!(services.map(|service| service.finish().len()), [2, 0]);
}

#[test]
fn a_service_that_forgets_the_records_is_stopped() {
    let lab = Lab::new();
    let server = server(&lab);
    let mut trace = lab.trace();
    lab.service("alpha", 1);
    let behaviour = Behaviour { forget_records: true, ..Behaviour::with_datagrams() };
    let alpha = lab.start_with("alpha", &behaviour);
    let client = lab.puppet();
    let limit = hop_limit(1);
    for (turn, to) in server.addresses().iter().enumerate() {
        let socket = client.udp(*to);
        socket.send_to(*to, b"round and round").must("send");
        let reports = alpha.reports((turn + 1) * limit as usize);
        let mut legs: Vec<_> = reports
            .iter()
            .filter(|report| report.original == *to)
            .map(|report| (report.legs, report.hops, report.onward.err()))
            .collect();
        legs.sort_unstable();
        let expected: Vec<_> =
            (1..=limit).map(|leg| (leg, 1, (leg == limit).then_some(libc::ELOOP))).collect();
        assert_eq!(legs, expected);
        stays_silent(&socket);
    }
    assert_eq!(trace.first(EventKind::Blocked).pid, alpha.id());
    assert_eq!(lab.counter(Counter::Loops), 2);
    assert!(server.datagrams().is_empty());
}

#[test]
fn a_filter_can_ask_for_the_protocol() {
    let lab = Lab::new();
    // Over TCP and UDP at the same port.
    let server = DatagramServer::start_in(&lab.network().topology.destination, [lab.v4()]);
    let server = server.must("start a server");
    let conditions = Conditions { protocols: vec![Protocol::UDP], ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let alpha = lab.start_with("alpha", &Behaviour::with_datagrams());
    lab.exchange(lab.v4());
    assert_eq!(lab.counter(Counter::Redirected), 0);
    let client = lab.puppet();
    answers(&client.udp(lab.v4()), lab.v4(), b"datagram");
    assert_eq!(lab.counter(Counter::Redirected), 1);
    assert_eq!(alpha.finish().len(), 1);
    assert_eq!(server.datagrams().len(), 1);
}

#[test]
fn a_block_refuses_the_datagram() {
    let lab = Lab::new();
    let server = server(&lab);
    let client = lab.puppet();
    let to = server.address();
    let socket = client.udp(to);
    lab.change(|policy| {
        policy.add_provider("warden", "")?;
        policy.add_sublayer("warden", "warden", 1)?;
        policy.add_filter(NewFilter {
            name: Some("closed".into()),
            sublayer: "warden".into(),
            weight: Weight::Auto,
            conditions: Conditions { ports: vec![to.port().into()], ..Conditions::default() },
            action: FilterAction::BLOCK,
        })?;
        Ok(())
    });
    assert_eq!(socket.send_to(to, b"blocked").map_err(|errno| errno.0), Err(libc::EPERM));
    assert_eq!(socket.connect(to).map_err(|errno| errno.0), Err(libc::EPERM));
    assert_eq!(lab.counter(Counter::Blocked), 2);
    assert!(server.datagrams().is_empty());
}

/// What a server in the scope answers belongs to the flow of its client.
#[test]
fn the_answers_of_a_server_are_not_redirected() {
    let (lab, _, service) = scene();
    let server = lab.puppet();
    let socket = server.open(Family::V4, Kind::Udp).must("open a socket");
    socket.bind((Topology::CLIENT_V4, 0).into()).must("bind");
    let at = socket.local().must("ask for the address");
    let destination = &lab.network().topology.destination;
    let peer = destination
        .run(|| {
            let peer = std::net::UdpSocket::bind((Topology::DESTINATION_V4, 0))?;
            peer.set_read_timeout(Some(PATIENCE))?;
            peer.send_to(b"question", at)?;
            std::io::Result::Ok(peer)
        })
        .must("enter the namespace")
        .must("ask the server");
    let (question, from) = socket.receive_from().must("get the question");
    assert_eq!(question, b"question");
    socket.send_to(from, b"answer").must("answer");
    let mut buffer = [0; 64];
    let (length, source) = peer.recv_from(&mut buffer).must("get the answer");
    assert_eq!((&buffer[..length], source), (&b"answer"[..], at));
    assert!(service.finish().is_empty());
}

#[test]
fn broadcast_and_multicast_are_not_redirected() {
    let (lab, _, service) = scene();
    let destination = &lab.network().topology.destination;
    let hearer = destination
        .run(|| {
            let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.join_multicast_v4(&Ipv4Addr::new(239, 1, 2, 3), &Topology::DESTINATION_V4)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            std::io::Result::Ok(socket)
        })
        .must("enter the namespace")
        .must("listen");
    let port = hearer.local_addr().must("ask for the port").port();
    let client = lab.puppet();
    let socket = client.open(Family::V4, Kind::Udp).must("open a socket");
    // Which tells the kernel over which link to send.
    socket.bind((Topology::CLIENT_V4, 0).into()).must("bind");
    socket.set(libc::SOL_SOCKET, libc::SO_BROADCAST, &1_i32.to_ne_bytes()).must("allow broadcast");
    let interface = Topology::CLIENT_V4.octets();
    socket.set(libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &interface).must("choose the interface");
    for to in [Ipv4Addr::BROADCAST, Ipv4Addr::new(239, 1, 2, 3)] {
        socket.send_to((to, port).into(), b"to everybody").must("send");
        let mut buffer = [0; 64];
        let (length, source) =
            hearer.recv_from(&mut buffer).must(&format!("hear what goes to {to}"));
        assert_eq!(&buffer[..length], b"to everybody");
        assert_eq!(source.ip(), IpAddr::V4(Topology::CLIENT_V4));
    }
    assert_eq!(lab.counter(Counter::Redirected), 0);
    assert!(service.finish().is_empty());
}

/// The control interface on a flow of datagrams, call by call.
#[test]
fn only_the_service_that_has_a_flow_may_ask_about_it() {
    let lab = Lab::new();
    let server = server(&lab);
    lab.service("alpha", 2);
    // It has no listener.
    let plan = Plan { weight: 1, on_failure: FailurePolicy::Skip, ..Plan::default() };
    lab.service_with("bravo", plan);
    let (alpha, bravo, client) = (lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet());
    for to in server.addresses() {
        let any = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let registered = alpha.udp(*to);
        registered.bind(address(any)).must("bind");
        registered.register(&[]).must("register");
        for connected in [false, true] {
            let socket = client.udp(*to);
            if connected {
                socket.connect(*to).must("connect");
                socket.send(b"whose?").must("send");
            } else {
                socket.send_to(*to, b"whose?").must("send");
            }
            let (word, source) = registered.receive_from().must("receive");
            assert_eq!(word, b"whose?");
            let asking = alpha.udp(source);
            asking.connect(source).must("take the flow");
            let record = asking.query(abi::QUERY_REDIRECT_RECORDS).must("ask for the record");
            assert_eq!(asking.query(abi::ORIGINAL_DESTINATION).map(|bytes| bytes.len()), Ok(24));
            // Again, and the same.
            assert_eq!(asking.query(abi::QUERY_REDIRECT_RECORDS), Ok(record.clone()));

            let stranger = bravo.udp(source);
            // Whether it may connect there is one thing.
            let taken = stranger.connect(source);
            assert!(stranger.query(abi::QUERY_REDIRECT_RECORDS).is_err(), "{taken:?}");
            let application = lab.puppet();
            let stranger = application.udp(source);
            let taken = stranger.connect(source);
            assert!(stranger.query(abi::QUERY_REDIRECT_RECORDS).is_err(), "{taken:?}");

            // The record comes before the connect.
            let onward = alpha.udp(*to);
            onward.set_record(&record).must("set the record");
            onward.connect(*to).must("connect onwards");
            assert_eq!(onward.set_record(&record).map_err(|errno| errno.0), Err(libc::EINVAL));

            // The answer of the service finds the application, from the destination.
            registered.send_to(source, b"yours").must("answer");
            assert_eq!(socket.receive_from(), Ok((b"yours".to_vec(), *to)));
        }
    }
}

/// Many a client sends one datagram and closes its socket at once.
#[test]
fn a_flow_can_be_asked_about_when_its_client_has_gone() {
    let lab = Lab::new();
    let server = server(&lab);
    lab.service("alpha", 1);
    let (alpha, client) = (lab.puppet_of("alpha"), lab.puppet());
    let destinations = server.addresses().iter().flat_map(|to| {
        let mapped = to.is_ipv4().then(|| mapped(*to));
        [Some(*to), mapped].into_iter().flatten()
    });
    for to in destinations {
        let any = if canonical(to).is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let registered = alpha.udp(address(any));
        registered.bind(address(any)).must("bind");
        registered.register(&[]).must("register");
        for connected in [false, true] {
            let socket = client.udp(to);
            if connected {
                socket.connect(to).must("connect");
                socket.send(b"farewell").must("send");
            } else {
                socket.send_to(to, b"farewell").must("send");
            }
            drop(socket);
            // A call that is answered after the socket has been closed.
            client.udp(to);
            let (word, source) = registered.receive_from().must("receive");
            assert_eq!(word, b"farewell");
            let asking = alpha.udp(source);
            asking.connect(source).must("take the flow");
            let destination = asking.query(abi::ORIGINAL_DESTINATION).must("ask where it goes");
            assert_eq!(destination[16..18], to.port().to_ne_bytes(), "{to}");
            let record = asking.query(abi::QUERY_REDIRECT_RECORDS).must("ask for the record");
            let onward = alpha.udp(canonical(to));
            onward.set_record(&record).must("set the record");
            onward.connect(canonical(to)).must("connect onwards");
            onward.send(&word).must("send onwards");
            let answer = onward.receive_by(Receiving::From).must("get an answer").0;
            assert_eq!(answer, answer_of(canonical(to), b"farewell"));
            // There is nobody to whom it could go. It must not come back to the service.
            let sent = registered.send_to(source, &answer).map_err(|errno| errno.0);
            if !connected {
                assert_eq!(sent, Err(libc::ECONNREFUSED), "{to}");
            }
            stays_silent(&registered);
        }
    }
    let flows = lab.engine().flows().must("list the flows");
    assert!(flows.iter().all(|flow| flow.kind == LegKind::Onward), "{flows:#?}");
}

/// 300,000 datagrams through two services. The window is chosen so that no socket's buffer, even
/// one that nobody widened, can be full.
#[test]
fn a_thousand_clients_and_three_servers_through_two_services() {
    const CLIENTS: u32 = 1000;
    let rounds = rounds(100);
    // No flow is to end meanwhile, however slow the machine is.
    let lab = Lab::with_udp_idle(Duration::from_secs(3600));
    let servers: Vec<_> = (0..3).map(|_| server(&lab)).collect();
    let services = start_chain(&lab, &["alpha", "bravo"]);
    let to: Vec<_> = servers.iter().map(DatagramServer::address).collect();
    let client = &lab.network().topology.client;
    let destination = &lab.network().topology.destination;
    let dropped = || {
        [client, destination].map(|namespace| {
            let counted = namespace.run(dropped_for_want_of_room).must("enter the namespace");
            counted.must("count what was dropped")
        })
    };
    assert_eq!(dropped(), [0, 0]);
    let plan = DatagramPlan { clients: CLIENTS, rounds, window: 256, ..plan(to) };
    let clients = DatagramClients::start(&plan, Some(client), Some(lab.apps()));
    let report = clients.must("start clients").finish(Duration::from_secs(900)).must("run clients");
    assert!(report.is_perfect(), "the kernel dropped {:?}: {report:#?}", dropped());
    assert_eq!(report.answered, u64::from(3 * CLIENTS * rounds));
    assert_eq!(dropped(), [0, 0]);

    // Every datagram came once, to its server.
    for (number, server) in servers.iter().enumerate() {
        let mut seen: Vec<_> =
            server.datagrams().into_iter().map(|datagram| datagram.payload).collect();
        assert_eq!(seen.len(), (CLIENTS * rounds) as usize);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), (CLIENTS * rounds) as usize, "some came twice");
        let number = (number as u32).to_be_bytes();
        assert!(seen.iter().all(|payload| payload[4..8] == number));
    }
    let handles = ["alpha", "bravo"].map(|name| lab.handle_of(name));
    let chain: Vec<_> =
        handles.into_iter().zip(services.into_iter().map(Running::finish)).collect();
    handed_on(&chain, 3000);
}

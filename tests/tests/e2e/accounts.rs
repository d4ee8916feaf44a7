//! Every redirect is accounted for, whatever becomes of it: each kind of end once, and after each the
//! sums are right (`docs/counters.md`).

use std::{net::SocketAddr, time::Duration};

use aya::maps::{HashMap, Map, MapData};
use carnet_core::{
    abi::{self, FlowInfo},
    address::Endpoint,
    chain::hop_limit,
    event::Counter,
    flow::{CONNECTING_SIZE, Handover, LegState, Tuple, WAITING_PLACES, WAY_BEGUN, WAY_ENDED},
    object::{Conditions, FilterAction, NewFilter, Weight},
};
use carnet_engine::{Account, Engine};
use carnet_testbed::{DatagramServer, Topology};
use carnet_tests::{
    Lab, Must as _, Running, netfilter,
    puppet::{Hand, Puppet},
    rounds,
    service::Behaviour,
    until,
};
use zerocopy::{FromBytes as _, FromZeros as _, transmute};

const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A cookie that no socket has.
const NOBODY: u64 = 1 << 62;

/// What has changed since the last look, when nothing changes any more: everything adds up then.
struct Book {
    engine: Engine,
    before: Account,
}

impl Book {
    fn new(lab: &Lab) -> Self {
        Self { engine: lab.engine(), before: Account::default() }
    }

    fn now(&self) -> Account {
        self.engine.account().must("read the account")
    }

    /// Waits until the account fits `expected`, given what it was before; and checks the sums.
    #[track_caller]
    fn after(&mut self, step: &str, expected: impl Fn(&mut Account)) -> Account {
        let mut due = self.before;
        expected(&mut due);
        let now = until(step, || self.now(), |now| *now == due);
        assert_eq!(
            (now.tcp.difference(), now.udp.difference(), now.refused.difference()),
            (0, 0, 0),
            "{step}: {now:#?}"
        );
        self.before = now;
        now
    }
}

/// Has a connect give up early, with `EINPROGRESS`.
#[track_caller]
fn hurry(hand: &Hand<'_>) {
    let limit = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
    let bytes = [limit.tv_sec.to_ne_bytes(), limit.tv_usec.to_ne_bytes()].concat();
    hand.set(libc::SOL_SOCKET, libc::SO_SNDTIMEO, &bytes).must("limit the time of a connect");
}

/// A connection that is begun and waits for its service to answer.
#[track_caller]
fn begun<'a>(client: &'a Puppet, to: SocketAddr) -> Hand<'a> {
    let hand = client.tcp(to);
    hurry(&hand);
    assert_eq!(hand.connect(to).map_err(|errno| errno.0), Err(libc::EINPROGRESS));
    hand
}

#[test]
fn every_connection_is_accounted_for() {
    let lab = Lab::new();
    let mut book = Book::new(&lab);
    lab.service("alpha", 2);

    assert_eq!(lab.refused(lab.v4()), "ECONNREFUSED");
    book.after("no service", |due| {
        due.refused.refused += 1;
        due.refused.service_unavailable += 1;
    });

    let alpha = lab.start("alpha");
    lab.exchange(lab.v4());
    lab.exchange(lab.v6());
    lab.settle();
    book.after("two that arrived", |due| {
        due.tcp.redirected += 2;
        due.tcp.delivered += 2;
    });

    lab.change(|policy| {
        policy.add_filter(NewFilter {
            name: Some("closed".into()),
            sublayer: "alpha".into(),
            weight: Weight::Exact(u64::MAX),
            conditions: Conditions { ports: vec![9.into()], ..Conditions::default() },
            action: FilterAction::BLOCK,
        })?;
        Ok(())
    });
    assert_eq!(lab.refused(SocketAddr::new(lab.v4().ip(), 9)), "EPERM");
    book.after("one that a filter refused", |due| {
        due.refused.refused += 1;
        due.refused.by_filter += 1;
    });

    // It has been with the service: that the destination is not there is another matter.
    let reports = lab.client(SocketAddr::new(lab.v4().ip(), 1)).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    lab.settle();
    book.after("one whose destination is not there", |due| {
        due.tcp.redirected += 1;
        due.tcp.delivered += 1;
    });

    alpha.kill();
    let forgetful = Behaviour { forget_records: true, ..Behaviour::default() };
    let alpha = lab.start_with("alpha", &forgetful);
    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    lab.settle();
    let legs = u64::from(hop_limit(1));
    book.after("a loop", |due| {
        due.tcp.redirected += legs;
        due.tcp.delivered += legs;
        due.refused.refused += 1;
        due.refused.loops_ended += 1;
    });
    alpha.kill();
}

#[test]
fn a_connection_that_its_service_does_not_answer_is_accounted_for() {
    let lab = Lab::new();
    let namespace = &lab.network().topology.client;
    // Two connections wait to be accepted; the SYN of a third one finds no room.
    namespace.set_sysctl("core/somaxconn", "1").must("have a short queue");
    namespace.set_sysctl("ipv4/tcp_syn_retries", "1").must("have short patience");
    lab.service("alpha", 1);
    let mut book = Book::new(&lab);
    let service = lab.puppet_of("alpha");
    let listener = service.serve(LOOPBACK);
    let client = lab.puppet();
    let waiting = [(); 2].map(|()| client.connect(lab.v4()).must("connect"));
    book.after("two that wait to be accepted", |due| {
        due.tcp.redirected += 2;
        due.tcp.delivered += 2;
    });

    let given_up = begun(&client, lab.v4());
    book.after("one without an answer", |due| {
        due.tcp.redirected += 1;
        due.tcp.connecting += 1;
    });
    drop(given_up);
    book.after("one that its client gave up", |due| {
        due.tcp.connecting -= 1;
        due.tcp.unanswered += 1;
    });

    let timed_out = begun(&client, lab.v4());
    book.after("one that waits in vain", |due| {
        due.tcp.redirected += 1;
        due.tcp.unanswered += 1;
    });
    drop(timed_out);

    let reset = begun(&client, lab.v4());
    drop(listener);
    book.after("one whose service went away", |due| {
        due.tcp.redirected += 1;
        due.tcp.unanswered += 1;
    });
    drop((reset, waiting));
    lab.settle();
    book.after("the end", |_| {});
}

/// Nothing tells it at once: it is accounted for when its socket is closed or connects anew.
#[test]
fn a_connection_that_is_reset_at_once_is_accounted_for() {
    if !netfilter::is_there() {
        eprintln!("this kernel has no netfilter");
        return;
    }
    let lab = Lab::new();
    let namespace = &lab.network().topology.client;
    lab.service("alpha", 1);
    let mut book = Book::new(&lab);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let listener = service.serve(LOOPBACK);
    let port = listener.local().must("ask for the port").port();
    netfilter::on_input(namespace, &format!("tcp dport {port} reject with tcp reset"));
    let connection = client.tcp(lab.v4());
    let refused = || connection.connect(lab.v4()).map_err(|errno| errno.0);
    assert_eq!(refused(), Err(libc::ECONNREFUSED));
    book.after("one that was reset", |due| {
        due.tcp.redirected += 1;
        due.tcp.connecting += 1;
    });
    assert_eq!(refused(), Err(libc::ECONNREFUSED));
    book.after("its socket, connected again in vain", |due| {
        due.tcp.redirected += 1;
        due.tcp.unanswered += 1;
    });
    netfilter::remove(namespace);
    connection.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    book.after("its socket, connected at last", |due| {
        due.tcp.redirected += 1;
        due.tcp.connecting -= 1;
        due.tcp.unanswered += 1;
        due.tcp.delivered += 1;
    });
    drop((connection, accepted));
    lab.settle();
    book.after("the end", |_| {});
}

/// What an earlier connection between the same ends has left is not taken for this one's.
#[test]
fn a_connection_that_died_gives_way_to_the_next_between_its_ends() {
    const LEG: usize = size_of::<LegState>();
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let listener = service.serve(LOOPBACK);
    let connection = client.tcp(lab.v4());
    connection.bind(LOOPBACK).must("bind");
    let ends = [&connection, &listener].map(|end| end.local().must("ask for an address"));
    let [local, remote] = ends.map(Endpoint::from);
    let netns = lab.network().topology.client.cookie().must("ask for the namespace's cookie");
    let key = Tuple::between(netns, &local, &remote);
    let mut legs = lab.places::<LEG>("CONNECTING");
    let place_of_leg = CONNECTING_SIZE.places(NOBODY)[1];
    let dead = LegState {
        cookie: NOBODY,
        owners: 2,
        way: WAY_BEGUN,
        home: netns,
        local,
        target: remote,
        ..LegState::new_zeroed()
    };
    let dead: [u8; LEG] = transmute!(dead);
    legs.set(place_of_leg, dead, 0).must("leave a dead connection's leg");
    let mut waiting = lab.places::<{ size_of::<u64>() }>("WAITING");
    waiting.set(key.waiting_place(), NOBODY.to_ne_bytes(), 0).must("leave it on its way");

    connection.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    accepted.query(abi::QUERY_REDIRECT_RECORDS).must("ask for the record");
    assert_eq!(lab.counter(Counter::Delivered), 1);
    assert_eq!(lab.counter(Counter::Unanswered), 1);
    let leg = legs.get(&place_of_leg, 0).must("look at the leg");
    let leg = LegState::read_from_bytes(&leg).expect("a leg's size");
    assert_eq!((leg.owners, leg.way), (1, WAY_ENDED));
    legs.set(place_of_leg, [0; LEG], 0).must("remove the leg");
    drop((connection, accepted));
    lab.settle_sockets();

    // The same, where another connection's leg has the place.
    waiting.set(key.waiting_place(), NOBODY.to_ne_bytes(), 0).must("take the place");
    let pin = lab.location().directory().join("maps/HANDOVER");
    let map = MapData::from_pin(pin).must("open the map HANDOVER");
    let mut map: HashMap<MapData, [u8; size_of::<Tuple>()], [u8; size_of::<Handover>()]> =
        Map::HashMap(map).try_into().must("use the map HANDOVER");
    let ends: [u8; size_of::<Tuple>()] = transmute!(key);
    let dead: [u8; size_of::<Handover>()] = transmute!(Handover { cookie: NOBODY, copied: 0 });
    map.insert(ends, dead, 0).must("leave a dead connection there");
    let connection = client.tcp(lab.v4());
    let bind = || connection.bind(local.into());
    until("the port to be free", bind, Result::is_ok).must("bind");
    connection.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    accepted.query(abi::QUERY_REDIRECT_RECORDS).must("ask for the record");
    assert_eq!(lab.counter(Counter::Delivered), 2);
    assert_eq!(lab.counter(Counter::Unanswered), 2);
    let left = waiting.get(&key.waiting_place(), 0).must("look at the place");
    assert_eq!(left, NOBODY.to_ne_bytes(), "it was not this connection's to free");
    waiting.set(key.waiting_place(), [0; 8], 0).must("free the place");
    drop((connection, accepted));
    lab.settle_sockets();
}

/// The cookies of both would be in one place.
#[test]
fn legs_that_are_on_their_way_at_once_are_told_apart() {
    if !netfilter::is_there() {
        eprintln!("this kernel has no netfilter");
        return;
    }
    let lab = Lab::new();
    let namespace = &lab.network().topology.client;
    lab.service("alpha", 1);
    let mut book = Book::new(&lab);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let listener = service.serve(LOOPBACK);
    let port = listener.local().must("ask for the port").port();
    // The ACK by which the service's end would be established is lost.
    netfilter::on_input(namespace, &format!("tcp dport {port} tcp flags == ack drop"));
    let (first, second) = (client.tcp(lab.v4()), client.tcp(lab.v4()));
    first.bind(LOOPBACK).must("bind");
    let own = first.local().must("ask for the port");
    let distance = WAITING_PLACES as u16;
    let other = if own.port() < 40_000 { own.port() + distance } else { own.port() - distance };
    second.bind(SocketAddr::new(own.ip(), other)).must("bind");
    first.connect(lab.v4()).must("connect");
    second.connect(lab.v4()).must("connect");
    book.after("two on their way", |due| {
        due.tcp.redirected += 2;
        due.tcp.connecting += 2;
    });
    let full = |map: &str| {
        let maps = lab.engine().status().must("ask for the status").maps;
        maps.iter().find(|status| status.name == map).map(|status| status.used)
    };
    assert_eq!((full("WAITING"), full("HANDOVER")), (Some(1), Some(1)), "one has the place");

    netfilter::remove(namespace);
    // In the other order.
    for connection in [&second, &first] {
        connection.send(b"x").must("send");
    }
    let accepted = [(); 2].map(|()| listener.accept().must("accept"));
    let mut flows: Vec<_> = accepted
        .iter()
        .map(|accepted| {
            let answer = accepted.query(abi::FLOW).must("ask for the flow");
            let flow = FlowInfo::read_from_bytes(&answer).expect("40 bytes").flow;
            (flow, accepted.peer().must("ask for the peer").port())
        })
        .collect();
    flows.sort_unstable();
    assert_eq!(flows.iter().map(|(_, port)| *port).collect::<Vec<_>>(), [own.port(), other]);
    assert_ne!(flows[0].0, flows[1].0);
    book.after("both delivered", |due| {
        due.tcp.connecting -= 2;
        due.tcp.delivered += 2;
    });
    drop((first, second, accepted));
    lab.settle_sockets();
}

#[test]
fn a_connect_that_fails_before_its_syn_is_accounted_for() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let alpha = lab.start("alpha");
    let mut book = Book::new(&lab);
    let client = lab.puppet();
    let first = client.tcp(lab.v4());
    first.bind(LOOPBACK).must("bind");
    first.connect(lab.v4()).must("connect");
    book.after("one that arrived", |due| {
        due.tcp.redirected += 1;
        due.tcp.delivered += 1;
    });

    // From the same address and port to the same listener: the kernel finds that out after the hook.
    let same_port = first.local().must("see the port");
    let fail = || {
        let second = client.tcp(lab.v4());
        second.bind(same_port).must("bind the same port");
        let error = second.connect(lab.v4()).map_err(|errno| errno.0);
        assert_eq!(error, Err(libc::EADDRNOTAVAIL));
        second
    };
    let closed = fail();
    book.after("one that failed", |due| {
        due.tcp.redirected += 1;
        due.tcp.starting += 1;
    });
    drop(closed);
    book.after("its socket was closed", |due| {
        due.tcp.starting -= 1;
        due.tcp.unsent += 1;
    });

    let again = fail();
    assert_eq!(again.connect(lab.v4()).map_err(|errno| errno.0), Err(libc::EADDRNOTAVAIL));
    book.after("its socket was connected again, in vain", |due| {
        due.tcp.redirected += 2;
        due.tcp.starting += 1;
        due.tcp.unsent += 1;
    });
    drop(first);
    lab.settle();
    // The first one may be in its last wait.
    until("the port to be free", || again.connect(lab.v4()), Result::is_ok).must("connect");
    drop(again);
    lab.settle();
    let now = book.now();
    assert_eq!(now.tcp.difference(), 0, "{now:#?}");
    assert_eq!((now.tcp.starting, now.tcp.connecting), (0, 0), "{now:#?}");
    assert_eq!(alpha.finish().len() as u64, now.tcp.delivered);
}

#[test]
fn a_connection_whose_leg_finds_no_room_is_accounted_for() {
    const KEY: usize = size_of::<Tuple>();
    const VALUE: usize = size_of::<Handover>();
    let lab = Lab::new();
    lab.service("alpha", 1);
    let alpha = lab.start("alpha");
    let mut book = Book::new(&lab);
    let taken = lab.occupy("WAITING", NOBODY.to_ne_bytes());
    let pin = lab.location().directory().join("maps/HANDOVER");
    let map = MapData::from_pin(pin).must("open the map HANDOVER");
    let room = map.info().must("ask for its size").max_entries();
    let mut map: HashMap<_, [u8; KEY], [u8; VALUE]> =
        Map::HashMap(map).try_into().must("use the map HANDOVER");
    let keys = (0..room).map(|number| {
        let mut key = [0; KEY];
        key[..4].copy_from_slice(&number.to_ne_bytes());
        key
    });
    for key in keys.clone() {
        map.insert(key, [0; VALUE], 0).must("fill the map HANDOVER");
    }
    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    for key in keys {
        map.remove(&key).must("empty the map HANDOVER");
    }
    taken.leave();
    lab.settle();
    book.after("one whose leg found no room", |due| {
        due.tcp.redirected += 1;
        due.tcp.handover_failed += 1;
    });
    // The service has refused it, since it had no record.
    let (reports, faults) = alpha.finish_with_faults();
    assert_eq!((reports.len(), faults.len()), (0, 1), "{faults:?}");
    assert!(lab.network().echo().connections().is_empty());
}

#[test]
fn every_udp_flow_is_accounted_for() {
    let lab = Lab::with_udp_idle(Duration::from_secs(1));
    let to = SocketAddr::new(Topology::DESTINATION_V4.into(), 0);
    let server = DatagramServer::start_in(&lab.network().topology.destination, [to, to])
        .must("start a server");
    let (to, other) = (server.addresses()[0], server.addresses()[1]);
    lab.service("alpha", 1);
    let alpha = lab.start_with("alpha", &Behaviour::with_datagrams());
    let mut book = Book::new(&lab);
    let client = lab.puppet();

    let unconnected = client.udp(to);
    unconnected.send_to(to, b"a").must("send");
    unconnected.receive_from().must("receive");
    let connected = client.udp(to);
    connected.connect(to).must("connect");
    book.after("two flows", |due| {
        due.udp.redirected += 2;
        due.udp.live += 2;
    });
    drop((unconnected, connected));
    book.after("their sockets were closed", |due| {
        due.udp.live -= 2;
        due.udp.ended += 2;
    });

    let moved = client.udp(to);
    moved.connect(to).must("connect");
    moved.connect(other).must("connect elsewhere");
    book.after("one that was connected elsewhere", |due| {
        due.udp.redirected += 2;
        due.udp.live += 1;
        due.udp.ended += 1;
    });
    drop(moved);
    book.after("its end", |due| {
        due.udp.live -= 1;
        due.udp.ended += 1;
    });

    let [first, second] = [(); 2].map(|()| client.udp(to));
    for hand in [&first, &second] {
        hand.share_port().must("share a port");
    }
    first.bind(LOOPBACK).must("bind");
    second.bind(first.local().must("see the port")).must("bind the same port");
    first.connect(to).must("connect");
    assert_eq!(second.connect(other).map_err(|errno| errno.0), Err(libc::EADDRINUSE));
    drop((first, second));
    book.after("one whose address was in use", |due| {
        due.udp.redirected += 1;
        due.udp.ended += 1;
        due.refused.refused += 1;
        due.refused.address_in_use += 1;
    });

    let restarted = client.udp(to);
    restarted.send_to(to, b"b").must("send");
    restarted.receive_from().must("receive");
    alpha.kill();
    assert_eq!(restarted.send_to(to, b"c").map_err(|errno| errno.0), Err(libc::ECONNREFUSED));
    book.after("one whose service is gone", |due| {
        due.udp.redirected += 1;
        due.udp.ended += 1;
        due.refused.refused += 1;
        due.refused.service_unavailable += 1;
    });
}

/// The account of a service that the kernel has killed in the middle of everything.
#[test]
fn a_killed_service_leaves_nothing_unaccounted() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let mut book = Book::new(&lab);
    let mut alpha: Option<Running> = None;
    for _ in 0..5 {
        if let Some(alpha) = alpha.replace(lab.start("alpha")) {
            drop(alpha);
        }
        let client = lab.client(lab.v4()).count(100).parallel(8).bytes(100);
        std::thread::scope(|scope| {
            let clients = scope.spawn(|| client.run().must("run the clients"));
            until("some connections", || book.now().tcp.delivered, |count| *count > 20);
            if let Some(alpha) = alpha.take() {
                alpha.kill();
            }
            clients.join().expect("the clients' thread")
        });
    }
    lab.settle();
    let now = book.now();
    let differences = (now.tcp.difference(), now.udp.difference(), now.refused.difference());
    assert_eq!(differences, (0, 0, 0), "{now:#?}");
    book.after("the end", |due| *due = now);
}

/// What is kept of a UDP flow goes a moment after its socket, also where the kernel had no memory for a
/// timer.
#[test]
fn nothing_is_kept_of_udp_flows_that_have_ended() {
    let lab = Lab::new();
    let to = SocketAddr::new(Topology::DESTINATION_V4.into(), 0);
    let server =
        DatagramServer::start_in(&lab.network().topology.destination, [to]).must("start a server");
    lab.service("alpha", 1);
    let _alpha = lab.start_with("alpha", &Behaviour::with_datagrams());
    let client = lab.puppet();
    for number in 0..rounds(2000) {
        let socket = client.udp(to);
        if number % 2 == 0 {
            socket.connect(server.addresses()[0]).must("connect");
        } else {
            socket.send_to(server.addresses()[0], b"a").must("send");
        }
    }
    let engine = lab.engine();
    let kept = || {
        let maps = engine.status().must("ask for the status").maps;
        maps.iter().find(|map| map.name == "DATAGRAM_LEGS").expect("the map").used
    };
    until("the end of all that is kept", kept, |kept| *kept == 0);
}

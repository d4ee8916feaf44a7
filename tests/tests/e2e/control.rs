//! The control interface, option by option and errno by errno, as `carnet_core::abi` has it.

use std::net::SocketAddr;

use carnet_core::{
    abi::{self, FlowInfo, OnwardsInfo},
    address::Endpoint,
    event::{Counter, Event, EventKind},
    flow::{Accepted, LegState},
    object::{Conditions, FilterAction, NewFilter, Weight},
    record::{AppIdentity, HEADER_LENGTH, RecordError},
};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan, Report,
    foreign::Foreign,
    puppet::{Errno, Family, Hand, Kind, Puppet},
    service::read_record,
    until,
};
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _, transmute};

/// Options that are got, with the length of the answer of a first hop.
const GET: [(i32, usize); 9] = [
    (abi::QUERY_REDIRECT_RECORDS, HEADER_LENGTH + 16),
    (abi::QUERY_REDIRECT_CONTEXT, 5),
    (abi::REDIRECT_RECORDS_LENGTH, 4),
    (abi::REDIRECT_CONTEXT_LENGTH, 4),
    (abi::ORIGINAL_DESTINATION, 24),
    (abi::ORIGINAL_APP, 328),
    (abi::FLOW, 40),
    (abi::ONWARDS, 32),
    (abi::EXPORT_RECORD, HEADER_LENGTH + 16),
];

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

fn fails<T>(errno: i32) -> Result<T, Errno> {
    Err(Errno(errno))
}

/// A lab with a service whose filter has a context of five bytes, and a puppet for it.
fn scene() -> (Lab, Puppet, Puppet) {
    let lab = Lab::new();
    let context = Some(b"hello".to_vec());
    lab.service_with("alpha", Plan { context, ..Plan::default() });
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    (lab, service, client)
}

/// A redirected connection: the client's socket and the accepted one.
#[track_caller]
fn redirected<'a>(client: &'a Puppet, to: SocketAddr, listener: &Hand<'a>) -> (Hand<'a>, Hand<'a>) {
    let connection = client.connect(to).must("connect");
    (connection, listener.accept().must("accept"))
}

#[test]
fn every_option_answers_and_asking_again_gives_the_same() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    for (option, length) in GET {
        let first = accepted.query(option).must("query");
        assert_eq!(first.len(), length, "option {option}");
        assert_eq!(accepted.query(option), Ok(first.clone()), "option {option}");
        // Exactly enough room is enough, a byte less is not.
        assert_eq!(accepted.get(abi::LEVEL, option, length), Ok(first), "option {option}");
        for room in [0, 1, length - 1] {
            let answer = accepted.get(abi::LEVEL, option, room);
            assert_eq!(answer, fails(libc::ERANGE), "option {option} with room for {room}");
        }
    }
    let number = |option| {
        let bytes = accepted.query(option).must("query");
        u32::from_ne_bytes(bytes.try_into().expect("four bytes"))
    };
    assert_eq!(number(abi::REDIRECT_RECORDS_LENGTH) as usize, HEADER_LENGTH + 16);
    assert_eq!(number(abi::REDIRECT_CONTEXT_LENGTH), 5);
    assert_eq!(accepted.query(abi::QUERY_REDIRECT_CONTEXT), Ok(b"hello".to_vec()));

    let handle = lab.handle_of("alpha");
    let destination = accepted.query(abi::ORIGINAL_DESTINATION).must("query");
    assert_eq!(Endpoint::read_from_bytes(&destination), Ok(Endpoint::from(lab.v4())));
    let flow = accepted.query(abi::FLOW).must("query");
    let flow = FlowInfo::read_from_bytes(&flow).expect("40 bytes");
    assert_eq!((flow.handle, flow.hops, flow.legs), (handle, 1, 1));
    let record = read_record(&accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query"));
    assert_eq!((record.flow, record.hops[0].handle), (flow.flow, handle));
    assert_eq!(record.hops[0].filter, flow.filter);
    assert_eq!(record.destination, Endpoint::from(lab.v4()));
    let app = accepted.query(abi::ORIGINAL_APP).must("query");
    let app = AppIdentity::read_from_bytes(&app).expect("328 bytes");
    assert_eq!(app, record.app);
    assert_eq!((app.pid, app.uid, app.cgroup), (client.id(), 0, lab.apps().id()));
}

/// Whatever ends first: a leg can be asked about as long as there is a socket to ask on, and then
/// nothing is left of it.
#[test]
fn a_leg_is_kept_until_its_connection_is_over_and_its_socket_closed() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let over = || {
        let flows = || lab.engine().flows().must("list the flows");
        until("the end of the connection", flows, Vec::is_empty);
    };
    let answers = |accepted: &Hand<'_>| GET.map(|(option, _)| accepted.query(option).must("query"));

    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    let before = answers(&accepted);
    accepted.end_sending().must("end");
    drop(connection);
    over();
    assert_eq!(answers(&accepted), before);
    drop(accepted);
    lab.settle_sockets();

    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    drop(accepted);
    drop(connection);
    lab.settle_sockets();

    // Reset before it was accepted.
    let connection = client.connect(lab.v4()).must("connect");
    reset(connection);
    over();
    let accepted = listener.accept().must("accept");
    assert_eq!(answers(&accepted).map(|answer| answer.len()), GET.map(|(_, length)| length));
    drop(accepted);
    lab.settle_sockets();

    // Never accepted.
    let connection = client.connect(lab.v4()).must("connect");
    drop(listener);
    drop(connection);
    lab.settle_sockets();
}

/// The service has it as long as it is there on its side, whoever is gone on the other.
#[test]
fn a_leg_ends_with_the_connection_of_the_socket_that_shares_it() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let flows = || lab.engine().flows().must("list the flows").len();

    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    drop(connection);
    assert_eq!(accepted.receive(1), Ok(vec![]));
    assert_eq!(flows(), 1);
    drop(accepted);
    until("the end of the leg", flows, |flows| *flows == 0);
    lab.settle_sockets();

    // The application still sees whom it asked for.
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    drop(accepted);
    assert_eq!(connection.receive(1), Ok(vec![]));
    until("the end of the leg", flows, |flows| *flows == 0);
    assert_eq!(connection.peer(), Ok(lab.v4()));
    // But not of another connection of the same socket to the same listener: that is the service's own address.
    let direct = listener.local().must("ask where it listens");
    connection.disconnect().must("disconnect");
    let conditions = Conditions { ports: vec![direct.port().into()], ..Conditions::default() };
    lab.change(|policy| {
        policy.add_filter(NewFilter {
            name: None,
            sublayer: "alpha".into(),
            weight: Weight::Exact(u64::MAX),
            conditions,
            action: FilterAction::PERMIT,
        })?;
        Ok(())
    });
    connection.connect(direct).must("connect to the service itself");
    assert_eq!(connection.peer(), Ok(direct));
    drop((connection, listener.accept().must("accept")));
    lab.settle_sockets();
}

/// The kernel has one set of flags for a socket, and who sets them anew takes away what others have asked for.
#[test]
fn nothing_is_left_where_another_program_sets_the_flags_of_sockets() {
    let (lab, service, client) = scene();
    let _foreign = Foreign::attach_to_flags(lab.scope());
    // Not at one address, which what it accepts would keep.
    let listener = service.serve("0.0.0.0:0".parse().expect("an address"));
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    let onward = carried_on(&service, &accepted, lab.v4());
    assert_eq!([&connection, &onward].map(Hand::peer), [Ok(lab.v4()), Ok(lab.v4())]);
    // An accepted socket that carries its own flow on.
    let (own, own_accepted) = redirected(&client, lab.v4(), &listener);
    let own_ticket = ticket(&own_accepted);
    own_accepted.disconnect().must("disconnect");
    own_accepted.set(abi::LEVEL, abi::CARRY_ON, &own_ticket).must("carry on");
    own_accepted.connect(lab.v4()).must("connect onwards");
    drop((connection, accepted, onward, own, own_accepted));
    lab.settle_sockets();
}

/// Closes a connection with a reset.
#[track_caller]
fn reset(connection: Hand<'_>) {
    // struct linger { on, 0 seconds }.
    let linger = [1_u32.to_ne_bytes(), 0_u32.to_ne_bytes()].concat();
    connection.set(libc::SOL_SOCKET, libc::SO_LINGER, &linger).must("set");
}

#[test]
fn a_redirect_without_a_context_has_none() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let listener = service.serve(loopback());
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    for option in [abi::QUERY_REDIRECT_CONTEXT, abi::REDIRECT_CONTEXT_LENGTH] {
        assert_eq!(accepted.query(option), fails(libc::ENODATA), "option {option}");
    }
    assert!(accepted.query(abi::QUERY_REDIRECT_RECORDS).is_ok());
}

#[test]
fn asking_the_wrong_socket() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let idle = service.tcp(lab.v4());
    let udp = service.open(Family::V4, Kind::Udp).must("open");
    let local = service.open(Family::Unix, Kind::Tcp).must("open");
    for (option, _) in GET {
        assert_eq!(listener.query(option), fails(libc::ENOTCONN), "option {option}");
        assert_eq!(idle.query(option), fails(libc::ENOTCONN), "option {option}");
        assert_eq!(udp.query(option), fails(libc::ENOTCONN), "option {option}");
        assert_eq!(local.query(option), fails(libc::EOPNOTSUPP), "option {option}");
    }
    // A connection that came here directly: from outside the scope.
    let port = listener.local().must("ask for the address");
    let direct = lab
        .network()
        .topology
        .client
        .run(|| std::net::TcpStream::connect(port))
        .must("enter the namespace")
        .must("connect");
    let accepted = listener.accept().must("accept");
    for (option, _) in GET {
        assert_eq!(accepted.query(option), fails(libc::ENODATA), "option {option}");
    }
    drop(direct);
    // The client's side belongs to no service: the kernel itself answers.
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    for (option, _) in GET {
        let errno = connection.query(option).expect_err("an errno").0;
        assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");
    }
    // What cannot be got.
    let set =
        [abi::SET_REDIRECT_RECORDS, abi::REGISTER_LISTENER, abi::CARRY_ON, abi::IMPORT_RECORD];
    for option in [0, 80, 219, 233, i32::MAX, -1].into_iter().chain(set) {
        assert_eq!(accepted.query(option), fails(libc::EOPNOTSUPP), "option {option}");
    }
    // What cannot be set.
    for option in GET.map(|(option, _)| option).into_iter().chain([0, 219, 233, -1]) {
        let answer = idle.set(abi::LEVEL, option, &[0; 8]);
        assert_eq!(answer, fails(libc::EOPNOTSUPP), "option {option}");
    }
}

#[test]
fn options_of_other_levels_work_as_ever() {
    let (_lab, service, _client) = scene();
    let socket = service.tcp(loopback());
    socket.set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1_u32.to_ne_bytes()).must("set");
    assert_eq!(
        socket.get(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 4),
        Ok(1_u32.to_ne_bytes().to_vec())
    );
    socket.set(libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").must("set");
    let name = socket.get(libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16).must("get");
    assert!(name.starts_with(b"reno\0"), "{name:?}");
    assert_eq!(socket.set(libc::IPPROTO_TCP, 9999, &[0; 4]), fails(libc::ENOPROTOOPT));
    // Longer than a page.
    assert_eq!(socket.set(abi::LEVEL, abi::SET_REDIRECT_RECORDS, &[0; 5000]), fails(libc::EINVAL));
}

#[test]
fn what_the_kernel_says_of_more_than_there_was_room_for_stays() {
    const SOL_NETLINK: i32 = 270;
    const ADD_MEMBERSHIP: i32 = 1;
    const LIST_MEMBERSHIPS: i32 = 9;
    let (lab, service, client) = scene();
    // How much there is, in a smaller buffer: the kernel takes that for a mistake of the hook.
    let [inside, outside] = [&service, &client].map(|puppet| {
        let kind = Kind::Other(libc::SOCK_RAW, libc::NETLINK_ROUTE);
        let socket = puppet.open(Family::Other(libc::AF_NETLINK), kind).must("open a socket");
        socket.set(SOL_NETLINK, ADD_MEMBERSHIP, &1_u32.to_ne_bytes()).must("join a group");
        socket.get(SOL_NETLINK, LIST_MEMBERSHIPS, 1)
    });
    assert_eq!(inside, outside);
    drop(lab);
}

#[test]
fn a_record_that_was_tampered_with_is_refused_and_the_one_before_stays() {
    let (lab, service, client) = scene();
    let mut trace = lab.trace();
    let listener = service.serve(loopback());
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    let onward = service.tcp(lab.v4());
    onward.set_record(&record).must("set the record");

    let refused = |bytes: &[u8], what: &str| {
        assert_eq!(onward.set_record(bytes), fails(libc::EINVAL), "{what}");
    };
    refused(&[], "nothing");
    for length in [1, 8, 16, HEADER_LENGTH - 1, HEADER_LENGTH, HEADER_LENGTH + 15] {
        refused(&record[..length], "truncated");
    }
    for more in [1, 16, 496, 497, 3000] {
        refused(&[record.clone(), vec![0; more]].concat(), "extended");
    }
    let malformed = lab.counter(Counter::RecordsMalformed);
    assert_eq!(malformed, 12);
    for bit in 0..8 * record.len() {
        let mut flipped = record.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        refused(&flipped, "a flipped bit");
    }
    let of_bits = 8 * record.len() as u64;
    let [malformed, foreign, forged] =
        [Counter::RecordsMalformed, Counter::RecordsForeign, Counter::RecordsForged]
            .map(|counter| lab.counter(counter));
    assert_eq!(malformed + foreign + forged, 12 + of_bits);
    // Magic, version, length and number of hops are looked at before the MAC, and so is the epoch.
    assert_eq!(malformed, 12 + 8 * (4 + 2 + 2 + 4));
    assert_eq!(foreign, 64);

    // A record of another instance.
    let (other_lab, other_service, other_client) = scene();
    let other_listener = other_service.serve(loopback());
    let (_other, other) = redirected(&other_client, other_lab.v4(), &other_listener);
    let foreign = other.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    refused(&foreign, "of another instance");

    let event = trace.first(EventKind::RecordRefused);
    assert_eq!(event.reason, RecordError::Malformed as u32);
    assert_eq!((event.handle, event.pid), (lab.handle_of("alpha"), service.id()));

    // The first one is still in force.
    onward.connect(lab.v4()).must("connect onwards");
    assert_eq!(lab.counter(Counter::Onward), 1);
    assert_eq!(lab.counter(Counter::RecordsSet), 1);
    onward.send(b"still").must("send");
    assert_eq!(onward.receive(5), Ok(b"still".to_vec()));
}

#[test]
fn a_record_is_set_before_the_connect_or_not_at_all() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    assert_eq!(listener.set_record(&record), fails(libc::EINVAL), "a listener");
    assert_eq!(accepted.set_record(&record), fails(libc::EINVAL), "an accepted socket");
    let onward = service.tcp(lab.v4());
    onward.bind("0.0.0.0:0".parse().expect("an address")).must("bind");
    onward.set_record(&record).must("set the record on a bound socket");
    onward.connect(lab.v4()).must("connect onwards");
    assert_eq!(onward.set_record(&record), fails(libc::EINVAL), "a connected socket");
    for family in [Family::V4, Family::V6] {
        let udp = service.open(family, Kind::Udp).must("open");
        assert_eq!(udp.register(&[]), fails(libc::EINVAL), "{family:?}, not bound");
        udp.set_record(&record).must("set the record on a UDP socket");
        udp.set_record(&[]).must("take it off");
        let any = if family == Family::V4 { lab.v4() } else { lab.v6() };
        // Without it, the flow is for the service, which has no UDP socket.
        assert_eq!(udp.connect(any), fails(libc::ECONNREFUSED), "{family:?}");
        udp.set_record(&record).must("set it again");
        udp.connect(any).must("connect it");
        assert_eq!(udp.set_record(&record), fails(libc::EINVAL), "{family:?}, connected");
        assert_eq!(udp.register(&[]), fails(libc::EINVAL), "{family:?}, connected");
    }
    let local = service.open(Family::Unix, Kind::Udp).must("open");
    assert_eq!(local.set_record(&record), fails(libc::EOPNOTSUPP));
    assert_eq!(local.register(&[]), fails(libc::EOPNOTSUPP));
    // The same record serves any number of connections: a service may try again.
    for _ in 0..3 {
        let again = service.tcp(lab.v6());
        again.set_record(&record).must("set the record again");
        again.connect(lab.v6()).must("connect onwards");
    }
    assert_eq!(lab.counter(Counter::Onward), 6);
}

/// The ticket of an accepted connection.
#[track_caller]
fn ticket(accepted: &Hand<'_>) -> [u8; 8] {
    let answer = accepted.query(abi::ONWARDS).must("query");
    let info = OnwardsInfo::read_from_bytes(&answer).expect("32 bytes");
    assert_eq!(accepted.query(abi::ORIGINAL_DESTINATION), Ok(info.destination.as_bytes().to_vec()));
    assert_ne!(info.ticket, 0);
    info.ticket.to_ne_bytes()
}

#[test]
fn a_ticket_carries_a_flow_on_as_its_record_does() {
    let (lab, service, client) = scene();
    lab.service("bravo", 1);
    let other = lab.puppet_of("bravo");
    let (listener, other_listener) = (service.serve(loopback()), other.serve(loopback()));
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    let carry_on = |socket: &Hand<'_>, ticket: &[u8]| socket.set(abi::LEVEL, abi::CARRY_ON, ticket);

    let first = ticket(&accepted);
    let onward = service.tcp(lab.v4());
    carry_on(&onward, &first).must("carry the flow on");
    onward.connect(lab.v4()).must("connect onwards");
    let second_accepted = other_listener.accept().must("accept");
    let second = ticket(&second_accepted);
    let record = second_accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    let record = read_record(&record);
    let handles: Vec<_> = record.hops.iter().take(2).map(|hop| hop.handle).collect();
    assert_eq!(handles, [lab.handle_of("alpha"), lab.handle_of("bravo")]);
    assert_eq!((record.flow, record.app.pid), (flow_of(&accepted), client.id()));
    let last = other.tcp(lab.v4());
    carry_on(&last, &second).must("carry the flow on");
    last.connect(lab.v4()).must("connect onwards");
    assert_eq!(lab.counter(Counter::Onward), 1);
    assert_eq!(lab.counter(Counter::RecordsSet), 2);

    // It serves only the service that the flow was delivered to, and only before the connect.
    assert_eq!(carry_on(&other.tcp(lab.v4()), &first), fails(libc::EACCES));
    assert_eq!(carry_on(&service.tcp(lab.v4()), &second), fails(libc::EACCES));
    assert_eq!(lab.counter(Counter::AccessDenied), 2);
    assert_eq!(carry_on(&onward, &first), fails(libc::EINVAL), "a connected socket");
    for wrong in [&[][..], &first[..7], &[0; 8], &[0xff; 8], &[first, first].concat()] {
        let answer = carry_on(&service.tcp(lab.v4()), wrong);
        assert_eq!(answer, fails(libc::EINVAL), "{wrong:?}");
    }
    // And as long as its socket is open.
    drop(second_accepted);
    drop(last);
    drop(onward);
    let again = || carry_on(&other.tcp(lab.v4()), &second);
    let _refused = until("the end of the ticket", again, |answer| *answer == fails(libc::EINVAL));
}

#[test]
fn a_flow_that_a_socket_carries_on_is_its_own_until_it_is_closed() {
    let (lab, service, client) = scene();
    let mut trace = lab.trace();
    let listener = service.serve(loopback());
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    let (another, another_accepted) = redirected(&client, lab.v4(), &listener);
    let (first, second) = (flow_of(&accepted), flow_of(&another_accepted));
    let mut expected: Vec<u64> = vec![];
    let mut went_on = |flow: u64| {
        expected.push(flow);
        let onward = |events: &[Event]| -> Vec<u64> {
            let all = events.iter().filter(|event| event.kind == EventKind::Onward as u32);
            all.map(|event| event.flow).collect()
        };
        let events = trace.until("onward legs", |events| onward(events).len() >= expected.len());
        assert_eq!(onward(events), expected);
    };

    let socket = service.tcp(lab.v4());
    socket.set(abi::LEVEL, abi::CARRY_ON, &ticket(&accepted)).must("carry the flow on");
    // A connect that fails, one that comes about, and another one after that.
    let nobody = SocketAddr::new(lab.v4().ip(), 9);
    assert_eq!(socket.connect(nobody), fails(libc::ECONNREFUSED));
    went_on(first);
    socket.connect(lab.v4()).must("connect onwards");
    went_on(first);
    socket.disconnect().must("disconnect");
    socket.connect(lab.v4()).must("connect again");
    went_on(first);
    // The flow of another ticket instead; then that of a record, but not of a bad one.
    socket.disconnect().must("disconnect");
    let other_ticket = ticket(&another_accepted);
    socket.set(abi::LEVEL, abi::CARRY_ON, &other_ticket).must("carry the other flow on");
    socket.connect(lab.v4()).must("connect onwards");
    went_on(second);
    socket.disconnect().must("disconnect");
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    assert_eq!(socket.set_record(&record[1..]), fails(libc::EINVAL));
    assert_eq!(socket.set(abi::LEVEL, abi::CARRY_ON, &[0xff; 8]), fails(libc::EINVAL));
    socket.connect(lab.v4()).must("connect onwards");
    went_on(second);
    socket.disconnect().must("disconnect");
    socket.set_record(&record).must("set the record");
    socket.connect(lab.v4()).must("connect onwards");
    went_on(first);
    socket.disconnect().must("disconnect");
    socket.set(abi::LEVEL, abi::CARRY_ON, &other_ticket).must("carry the other flow on");
    socket.connect(lab.v4()).must("connect onwards");
    went_on(second);

    // Nothing is left of sockets that were never connected, or in vain, or whose connection ends before or
    // after them.
    let carrying = || {
        let socket = service.tcp(lab.v4());
        socket.set(abi::LEVEL, abi::CARRY_ON, &other_ticket).must("carry the other flow on");
        socket
    };
    drop(carrying());
    let in_vain = carrying();
    assert_eq!(in_vain.connect(nobody), fails(libc::ECONNREFUSED));
    drop(in_vain);
    let reset = carrying();
    reset.connect(lab.v4()).must("connect onwards");
    reset.disconnect().must("disconnect");
    drop(reset);
    let closed = carrying();
    closed.connect(lab.v4()).must("connect onwards");
    drop(closed);
    drop((socket, accepted, another_accepted, connection, another));
    lab.settle_sockets();
}

#[test]
fn nothing_is_left_of_a_flow_that_was_carried_on_to_a_refusal() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    let ticket = ticket(&accepted);
    lab.change(|policy| {
        policy.add_provider("refusing", "")?;
        policy.add_sublayer("refusing", "refusing", 5000)?;
        policy.add_filter(NewFilter {
            name: None,
            sublayer: "refusing".into(),
            weight: Weight::Auto,
            conditions: Conditions {
                destinations: vec!["2001:db8::/32".parse().expect("a prefix")],
                ..Conditions::default()
            },
            action: FilterAction::BLOCK,
        })?;
        Ok(())
    });
    let refused = || {
        let socket = service.tcp(lab.v6());
        socket.set(abi::LEVEL, abi::CARRY_ON, &ticket).must("carry the flow on");
        assert_eq!(socket.connect(lab.v6()), fails(libc::EPERM));
        socket
    };
    drop(refused());
    let again = refused();
    again.set(abi::LEVEL, abi::CARRY_ON, &ticket).must("carry the flow on again");
    drop(again);
    // To where nothing is redirected, so that the connection has no leg.
    let nearby = service.listen("[::1]:0".parse().expect("an address"));
    let elsewhere = refused();
    elsewhere.connect(nearby.local().must("ask for the address")).must("connect nearby");
    drop((elsewhere, nearby, accepted, connection));
    lab.settle_sockets();
}

/// The number of the flow with which a socket was accepted.
#[track_caller]
fn flow_of(accepted: &Hand<'_>) -> u64 {
    let answer = accepted.query(abi::FLOW).must("query");
    FlowInfo::read_from_bytes(&answer).expect("40 bytes").flow
}

/// A socket of the service that carries the flow of an accepted connection on to its destination.
#[track_caller]
fn carried_on<'a>(service: &'a Puppet, accepted: &Hand<'_>, to: SocketAddr) -> Hand<'a> {
    let onward = service.tcp(to);
    onward.set(abi::LEVEL, abi::CARRY_ON, &ticket(accepted)).must("carry the flow on");
    onward.connect(to).must("connect onwards");
    onward
}

/// Has the socket connected anew to the same destination; gives what the service accepts.
#[track_caller]
fn anew<'a>(socket: &Hand<'_>, to: SocketAddr, listener: &Hand<'a>) -> Hand<'a> {
    socket.disconnect().must("disconnect");
    socket.connect(to).must("connect anew");
    assert_eq!(socket.peer(), Ok(to));
    listener.accept().must("accept")
}

#[test]
fn a_socket_that_connects_anew_leaves_its_leg_to_the_socket_that_shares_it() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let answers = |accepted: &Hand<'_>| GET.map(|(option, _)| accepted.query(option).must("query"));
    let (socket, first) = redirected(&client, lab.v4(), &listener);
    let before = (flow_of(&first), answers(&first));
    let second = anew(&socket, lab.v4(), &listener);
    let third = anew(&socket, lab.v4(), &listener);
    assert_eq!((flow_of(&first), answers(&first)), before);
    let flows = [&first, &second, &third].map(flow_of);
    assert!(flows[0] < flows[1] && flows[1] < flows[2], "{flows:?}");
    // Nobody keeps the first leg now, so there is room under the socket's cookie again.
    drop(first);
    let fourth = anew(&socket, lab.v4(), &listener);
    assert!(flow_of(&fourth) > flow_of(&third));
    drop(socket);
    assert_eq!([&second, &third].map(flow_of), flows[1..]);
    drop((second, third, fourth));
    lab.settle_sockets();
}

#[test]
fn a_socket_that_connects_anew_takes_its_record_along() {
    let (lab, service, client) = scene();
    lab.service("bravo", 1);
    let other = lab.puppet_of("bravo");
    let (listener, other_listener) = (service.serve(loopback()), other.serve(loopback()));
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    let (another, another_accepted) = redirected(&client, lab.v4(), &listener);
    let hops = |accepted: &Hand<'_>| {
        let record = read_record(&accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query"));
        let hops = record.hops.iter().take(record.hop_count as usize);
        hops.map(|hop| hop.handle).collect::<Vec<_>>()
    };
    let chain = [lab.handle_of("alpha"), lab.handle_of("bravo")];

    let onward = carried_on(&service, &accepted, lab.v4());
    let mut legs = vec![other_listener.accept().must("accept")];
    for _ in 0..3 {
        legs.push(anew(&onward, lab.v4(), &other_listener));
    }
    for leg in &legs {
        assert_eq!((flow_of(leg), hops(leg)), (flow_of(&accepted), chain.to_vec()));
    }
    // Another flow's, while the earlier legs are still asked about.
    onward.disconnect().must("disconnect");
    onward.set(abi::LEVEL, abi::CARRY_ON, &ticket(&another_accepted)).must("carry another on");
    onward.connect(lab.v4()).must("connect onwards");
    let other_leg = other_listener.accept().must("accept");
    assert_eq!(
        (flow_of(&other_leg), hops(&other_leg)),
        (flow_of(&another_accepted), chain.to_vec())
    );
    assert!(legs.iter().all(|leg| flow_of(leg) == flow_of(&accepted)));
    assert_eq!(lab.counter(Counter::Redirected), 2 + 4 + 1);
    assert_eq!(lab.counter(Counter::HandoverFailed), 0);
    drop((onward, legs, other_leg, accepted, another_accepted, connection, another));
    lab.settle_sockets();
}

#[test]
fn a_leg_that_was_copied_is_kept_while_its_socket_makes_another() {
    let (lab, service, client) = scene();
    lab.service("bravo", 1);
    let other = lab.puppet_of("bravo");
    let (listener, other_listener) = (service.serve(loopback()), other.serve(loopback()));
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    // With the record itself, not its ticket, the leg hangs on the socket.
    let onward = service.tcp(lab.v4());
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    onward.set_record(&record).must("set the record");
    onward.connect(lab.v4()).must("connect onwards");
    let second = other_listener.accept().must("accept");
    let (flow, ticket) = (flow_of(&second), ticket(&second));
    second.disconnect().must("disconnect");
    second.connect(lab.v4()).must("connect elsewhere");
    let third = listener.accept().must("accept");
    assert_ne!(flow_of(&third), flow);
    let last = other.tcp(lab.v4());
    last.set(abi::LEVEL, abi::CARRY_ON, &ticket).must("carry the first flow on");
    last.connect(lab.v4()).must("connect onwards");
    assert_eq!(lab.counter(Counter::Onward), 1);
    drop((connection, accepted, onward, second, third, last, listener));
    lab.settle_sockets();
}

#[test]
fn legs_for_which_there_is_no_room_apart_hang_on_their_sockets() {
    let (lab, service, client) = scene();
    lab.service("bravo", 1);
    let other = lab.puppet_of("bravo");
    let (listener, other_listener) = (service.serve(loopback()), other.serve(loopback()));
    let leg = LegState { cookie: NOBODY, ..LegState::new_zeroed() };
    let taken = lab.occupy::<{ size_of::<LegState>() }>("CONNECTING", transmute!(leg));
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    let onward = carried_on(&service, &accepted, lab.v4());
    let second = other_listener.accept().must("accept");
    let last = carried_on(&other, &second, lab.v4());
    assert_eq!([&connection, &onward, &last].map(Hand::peer), [(); 3].map(|()| Ok(lab.v4())));
    assert_eq!(flow_of(&accepted), flow_of(&second));
    assert_eq!(lab.engine().flows().must("list the flows").len(), 3);
    assert_eq!(lab.counter(Counter::Delivered), 2);
    assert_eq!(lab.counter(Counter::Onward), 1);
    taken.leave();
    drop((connection, accepted, onward, second, last));
    lab.settle_sockets();
}

#[test]
fn accepted_sockets_for_which_there_is_no_room_have_their_legs_on_them() {
    let (lab, service, client) = scene();
    lab.service("bravo", 1);
    let other = lab.puppet_of("bravo");
    // Not at one address, which what it accepts would keep.
    let listener = service.serve("0.0.0.0:0".parse().expect("an address"));
    let other_listener = other.serve(loopback());
    let nobodys = Accepted { cookie: NOBODY, ..Accepted::default() };
    let taken = lab.occupy::<{ size_of::<Accepted>() }>("ACCEPTED", transmute!(nobodys));
    let (connection, accepted) = redirected(&client, lab.v4(), &listener);
    // There is no ticket then; the record does.
    let answer = accepted.query(abi::ONWARDS).must("query");
    assert_eq!(OnwardsInfo::read_from_bytes(&answer).expect("32 bytes").ticket, 0);
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    let onward = service.tcp(lab.v4());
    onward.set_record(&record).must("set the record");
    onward.connect(lab.v4()).must("connect onwards");
    let second = other_listener.accept().must("accept");
    assert_eq!(flow_of(&accepted), flow_of(&second));
    assert_eq!((lab.counter(Counter::Delivered), lab.counter(Counter::HandoverFailed)), (2, 0));
    taken.leave();
    // Its leg was shared until there turned out to be no room: nobody keeps it for that.
    drop((connection, onward));
    lab.settle_sockets();
    assert_eq!(flow_of(&accepted), read_record(&record).flow);
    drop(second);
    // Connected itself, it is a client as any other.
    accepted.disconnect().must("disconnect");
    accepted.connect(lab.v4()).must("connect");
    let third = listener.accept().must("accept");
    assert_eq!(accepted.peer(), Ok(lab.v4()));
    assert!(flow_of(&third) > read_record(&record).flow);
    drop((accepted, third));
    lab.settle_sockets();
}

/// A cookie that no socket has.
const NOBODY: u64 = 1 << 62;

#[test]
fn a_socket_that_was_accepted_can_carry_a_flow_on_itself() {
    let (lab, service, client) = scene();
    // Not to one address, which what it accepts would keep.
    let listener = service.serve("0.0.0.0:0".parse().expect("an address"));
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    let ticket = ticket(&accepted);
    for way in ["with the ticket", "with the record"] {
        let (first, reused) = redirected(&client, lab.v4(), &listener);
        let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
        drop(first);
        reused.disconnect().must("disconnect");
        if way == "with the ticket" {
            reused.set(abi::LEVEL, abi::CARRY_ON, &ticket).must("carry the flow on");
        } else {
            reused.set_record(&record).must("set the record");
        }
        let before = lab.counter(Counter::Onward);
        reused.connect(lab.v4()).must("connect onwards");
        reused.send(b"here").must("send");
        assert_eq!(reused.receive(4), Ok(b"here".to_vec()), "{way}");
        assert_eq!(lab.counter(Counter::Onward), before + 1, "{way}");
        assert_eq!(reused.peer(), Ok(lab.v4()), "{way}");
        // And without either: it is redirected, and its peer is who was asked for.
        let (_connection, forgetful) = redirected(&client, lab.v4(), &listener);
        forgetful.disconnect().must("disconnect");
        forgetful.connect(lab.v4()).must("connect");
        assert_eq!(forgetful.peer(), Ok(lab.v4()), "{way}");
        let again = listener.accept().must("accept its own");
        assert_eq!(again.query(abi::ORIGINAL_DESTINATION).map(|answer| answer.len()), Ok(24));
    }
    drop((_connection, accepted, listener));
    lab.settle_sockets();
}

#[test]
fn a_record_serves_only_the_service_that_it_was_delivered_to() {
    let (lab, service, client) = scene();
    lab.service("bravo", 1);
    let other = lab.puppet_of("bravo");
    let other_listener = other.serve(loopback());
    let listener = service.serve(loopback());
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    let theft = other.tcp(lab.v4());
    assert_eq!(theft.set_record(&record), fails(libc::EACCES));
    assert_eq!(lab.counter(Counter::AccessDenied), 1);
    // Nor may a service give back the record that its successor got.
    let onward = service.tcp(lab.v4());
    onward.set_record(&record).must("set the record");
    onward.connect(lab.v4()).must("connect onwards");
    let second = other_listener.accept().must("accept");
    let second = second.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    assert_eq!(second.len(), HEADER_LENGTH + 2 * 16);
    assert_eq!(service.tcp(lab.v4()).set_record(&second), fails(libc::EACCES));
    other.tcp(lab.v4()).set_record(&second).must("set the record");
}

#[test]
fn who_is_of_no_service_may_nothing() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (_connection, accepted) = redirected(&client, lab.v4(), &listener);
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");

    // Sockets of another cgroup: no hook is there to answer.
    let outsider = lab.puppet();
    let socket = outsider.tcp(lab.v4());
    let errno = socket.set_record(&record).expect_err("an errno").0;
    assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");
    let errno = outsider.listen(loopback()).register(&[]).expect_err("an errno").0;
    assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");

    // Sockets of the service, in the hands of a process that is not in it.
    let deserter = lab.puppet_of("alpha");
    let socket = deserter.tcp(lab.v4());
    let listening = deserter.listen(loopback());
    lab.apps().add_process(deserter.id()).must("move a process");
    deserter.become_user(65534);
    assert_eq!(socket.set_record(&record), fails(libc::EACCES));
    assert_eq!(listening.register(&[]), fails(libc::EACCES));
    let handle = lab.handle_of("alpha").to_ne_bytes();
    assert_eq!(listening.register(&handle), fails(libc::EACCES));
    assert_eq!(lab.counter(Counter::AccessDenied), 3);
}

#[test]
fn only_a_listening_socket_is_registered() {
    let (lab, service, _client) = scene();
    let idle = service.tcp(loopback());
    assert_eq!(idle.register(&[]), fails(libc::EINVAL), "an idle socket");
    idle.bind(loopback()).must("bind");
    assert_eq!(idle.register(&[]), fails(libc::EINVAL), "a bound socket");
    idle.listen().must("listen");
    for length in [1, 4, 7, 9, 16] {
        assert_eq!(idle.register(&vec![0; length]), fails(libc::EINVAL), "{length} bytes");
    }
    assert_eq!(idle.register(&[]), Ok(()));
    let device = service.tcp(loopback());
    device.bind_device("lo").must("bind to a device");
    device.bind(loopback()).must("bind");
    device.listen().must("listen");
    assert_eq!(device.register(&[]), fails(libc::EINVAL), "a socket on a device");

    // A handle is for administrators, and for one's own.
    let [own, other] = [lab.handle_of("alpha"), lab.handle_of("alpha") + 1];
    service.become_user(65534);
    assert_eq!(idle.register(&own.to_ne_bytes()), Ok(()));
    assert_eq!(idle.register(&other.to_ne_bytes()), fails(libc::EACCES));
}

#[test]
fn the_library_says_the_same_in_words() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let service = lab.start("alpha");
    // A direct connection is turned away, and said so.
    let to = service.addresses()[0];
    let direct = lab
        .network()
        .topology
        .client
        .run(|| std::net::TcpStream::connect(to))
        .must("enter the namespace")
        .must("connect");
    direct.set_read_timeout(Some(PATIENCE)).must("limit the wait");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut &direct, &mut rest).must("see the end");
    assert!(rest.is_empty());
    let reports: Vec<Report> = service.finish();
    assert!(reports.is_empty());
    // Outside of every service there is no engine.
    let listener = std::net::TcpListener::bind(loopback()).must("listen");
    let error = carnet::register_listener(&listener).expect_err("an error");
    assert!(matches!(error, carnet::Error::NoEngine { .. }), "{error:?}");
}

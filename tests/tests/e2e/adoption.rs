//! Services whose programs know nothing of records: what they connect is given the record of the flow that
//! it may belong to (contract C11).

use std::net::SocketAddr;

use carnet_core::{
    abi,
    event::{Counter, EventKind},
    object::Conditions,
    record::{RECORD_ADOPTED, RECORD_HOPS_GUESSED, RECORD_IDENTITY_GUESSED, Record},
};
use carnet_testbed::{DatagramServer, Topology, answer_of};
use carnet_tests::{
    Lab, Must as _, Plan, Report, Running,
    puppet::{Errno, Hand, Puppet},
    service::{Behaviour, read_record},
};

/// A service, by its weight, whose program knows nothing of records.
fn unmodified(weight: u16) -> Plan {
    Plan { weight, unmodified: true, ..Plan::default() }
}

/// A service, by its weight, that sets the record.
fn co_operating(weight: u16) -> Plan {
    Plan { weight, ..Plan::default() }
}

/// Starts a service as its plan says: its program sets no record, or does.
fn start(lab: &Lab, name: &str, plan: Plan) -> Running {
    let behaviour = Behaviour { forget_records: plan.unmodified, ..Behaviour::default() };
    lab.service_with(name, plan);
    lab.start_with(name, &behaviour)
}

/// The handles in a record, and which of them are guessed.
fn hops(record: &Record) -> Vec<(u64, bool)> {
    let hop = |index: u32| (record.hops[index as usize].handle, record.is_guessed(index));
    (0..record.hop_count).map(hop).collect()
}

/// The same, all of them certain.
fn certain(handles: &[u64]) -> Vec<(u64, bool)> {
    handles.iter().map(|handle| (*handle, false)).collect()
}

#[test]
fn three_unmodified_services_get_every_flow_once_in_order() {
    let lab = Lab::new();
    let names = ["first", "second", "third"];
    let mut services = Vec::new();
    for (name, weight) in names.into_iter().zip([30, 20, 10]) {
        services.push(start(&lab, name, unmodified(weight)));
    }
    let handles = names.map(|name| lab.handle_of(name));
    for to in [lab.v4(), lab.v6()] {
        lab.exchange(to);
    }
    lab.settle();
    let reports: Vec<Vec<Report>> = services.into_iter().map(Running::finish).collect();
    for (place, reports) in reports.iter().enumerate() {
        assert_eq!(reports.len(), 2, "{}: {reports:#?}", names[place]);
        for (report, first) in reports.iter().zip(&reports[0..]) {
            let record = report.parsed();
            assert_eq!(hops(&record), certain(&handles[..=place]), "{report:#?}");
            assert_eq!(report.legs as usize, place + 1, "{report:#?}");
            assert_eq!(record.flags, if place == 0 { 0 } else { RECORD_ADOPTED }, "{report:#?}");
            assert_eq!((report.pid, report.flow), (first.pid, first.flow));
        }
    }
    // Alone with a destination a flow is recognised: it is the client's all along.
    let identities = |reports: &[Report]| -> Vec<(u64, u32)> {
        reports.iter().map(|report| (report.flow, report.pid)).collect()
    };
    assert_eq!(identities(&reports[0]), identities(&reports[1]));
    assert_eq!(identities(&reports[0]), identities(&reports[2]));
    let echo = lab.network().echo();
    assert_eq!(echo.connections().len(), 2);
    assert_eq!((lab.counter(Counter::Loops), lab.counter(Counter::Forgotten)), (0, 0));
}

#[test]
fn services_that_co_operate_and_services_that_do_not_share_a_flow() {
    for kinds in [[true, false, true], [false, true, false], [true, true, false]] {
        let lab = Lab::new();
        let names = ["first", "second", "third"];
        let mut services = Vec::new();
        for ((name, weight), is_unmodified) in names.into_iter().zip([30, 20, 10]).zip(kinds) {
            let plan = if is_unmodified { unmodified(weight) } else { co_operating(weight) };
            services.push(start(&lab, name, plan));
        }
        let handles = names.map(|name| lab.handle_of(name));
        lab.exchange(lab.v4());
        lab.settle();
        for (place, service) in services.into_iter().enumerate() {
            let reports = service.finish();
            let [report] = &reports[..] else { panic!("{kinds:?}, {place}: {reports:#?}") };
            assert_eq!(hops(&report.parsed()), certain(&handles[..=place]), "{kinds:?}");
        }
    }
}

/// Many flows at once to one destination: who had them is certain all the same, since all had the same.
#[test]
fn flows_that_are_alike_need_no_guesses() {
    let lab = Lab::new();
    let names = ["first", "second", "third"];
    let mut services = Vec::new();
    for ((name, weight), is_unmodified) in
        names.into_iter().zip([30, 20, 10]).zip([true, false, true])
    {
        let plan = if is_unmodified { unmodified(weight) } else { co_operating(weight) };
        services.push(start(&lab, name, plan));
    }
    let handles = names.map(|name| lab.handle_of(name));
    let reports = lab.client(lab.v4()).count(300).parallel(60).run().must("run a client");
    assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
    lab.settle();
    for (place, service) in services.into_iter().enumerate() {
        let reports = service.finish();
        assert_eq!(reports.len(), 300, "{}", names[place]);
        for report in &reports {
            assert_eq!(hops(&report.parsed()), certain(&handles[..=place]), "{report:#?}");
        }
    }
    assert_eq!(lab.network().echo().connections().len(), 300);
}

#[test]
fn udp_flows_pass_unmodified_services_once_too() {
    let lab = Lab::new();
    let addresses = [(Topology::DESTINATION_V4, 0).into(), (Topology::DESTINATION_V6, 0).into()];
    let server = DatagramServer::start_in(&lab.network().topology.destination, addresses)
        .must("start a server");
    let names = ["first", "second", "third"];
    let mut services = Vec::new();
    for (name, weight) in names.into_iter().zip([30, 20, 10]) {
        lab.service_with(name, unmodified(weight));
        let behaviour = Behaviour { forget_records: true, ..Behaviour::with_datagrams() };
        services.push(lab.start_with(name, &behaviour));
    }
    let handles = names.map(|name| lab.handle_of(name));
    let client = lab.puppet();
    // Several at a time for each destination, connected and not.
    let mut sockets = Vec::new();
    for round in 0..3 {
        for to in server.addresses() {
            for connected in [false, true] {
                let socket = client.udp(*to);
                if connected {
                    socket.connect(*to).must("connect");
                }
                let word = format!("{round} {connected}").into_bytes();
                let sent = if connected { socket.send(&word) } else { socket.send_to(*to, &word) };
                sent.must("send");
                let answer = socket.receive_from();
                assert_eq!(answer, Ok((answer_of(*to, &word), *to)));
                sockets.push(socket);
            }
        }
    }
    let flows = sockets.len();
    for (place, service) in services.iter().enumerate() {
        let reports = service.reports(flows);
        assert_eq!(reports.len(), flows, "{}", names[place]);
        for report in &reports {
            assert_eq!(hops(&report.parsed()), certain(&handles[..=place]), "{report:#?}");
        }
    }
    assert_eq!(server.datagrams().len(), flows);
    assert_eq!(lab.counter(Counter::Loops), 0);
    drop(sockets);
    drop(services);
    lab.settle();
}

/// A service whose steps the test makes: it holds connections, and connects.
struct Proxy<'a> {
    puppet: &'a Puppet,
    listener: Hand<'a>,
}

impl<'a> Proxy<'a> {
    fn of(puppet: &'a Puppet) -> Self {
        Self { puppet, listener: puppet.serve("127.0.0.1:0".parse().expect("an address")) }
    }

    /// Takes a connection; gives it with its record.
    #[track_caller]
    fn accept(&self) -> (Hand<'a>, Record) {
        let accepted = self.listener.accept().must("accept");
        let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("ask");
        (accepted, read_record(&record))
    }

    #[track_caller]
    fn connect(&self, to: SocketAddr) -> Hand<'a> {
        self.puppet.connect(to).must("connect onwards")
    }
}

/// A filter that matches the connections of one user.
fn of_user(uid: u32) -> Conditions {
    Conditions { users: vec![uid.into()], ..Conditions::default() }
}

/// Two flows for one destination, of which one has had another service: which of them goes on is a guess.
#[test]
fn flows_that_differ_are_told_apart_as_far_as_can_be() {
    for earlier_is_unmodified in [false, true] {
        let lab = Lab::new();
        let earlier = Plan { weight: 30, conditions: of_user(4321), ..Plan::default() };
        let earlier = Plan { unmodified: earlier_is_unmodified, ..earlier };
        // It looks at what the user connects, and at what the service does.
        lab.service_with("earlier", earlier);
        lab.service_with("service", unmodified(20));
        let [earlier, service] = ["earlier", "service"].map(|name| lab.puppet_of(name));
        let [earlier_handle, own] = ["earlier", "service"].map(|name| lab.handle_of(name));
        service.become_user(4321);
        let (earlier, service) = (Proxy::of(&earlier), Proxy::of(&service));
        let [plain, watched] = [lab.puppet(), lab.puppet()];
        watched.become_user(4321);

        let _one = plain.connect(lab.v4()).must("connect");
        let (_held, record) = service.accept();
        assert_eq!(hops(&record), certain(&[own]));
        // Its only flow: the other service has certainly not had it.
        let onward = service.connect(lab.v4());
        let (_seen, record) = earlier.accept();
        assert_eq!(hops(&record), certain(&[own, earlier_handle]));
        assert_eq!(record.flags, RECORD_ADOPTED);
        drop(onward);

        let _other = watched.connect(lab.v4()).must("connect");
        let (seen, record) = earlier.accept();
        assert_eq!(hops(&record), certain(&[earlier_handle]));
        let between = earlier.puppet.tcp(lab.v4());
        between.set_record(&seen.query(220).must("ask")).must("set the record");
        between.connect(lab.v4()).must("connect onwards");
        let (_also_held, record) = service.accept();
        assert_eq!(hops(&record), certain(&[earlier_handle, own]));

        // Now it holds both.
        let onward = service.connect(lab.v4());
        if earlier_is_unmodified {
            // It may have had it, and then it would have it for ever.
            let echoed = onward.send(b"x").and_then(|()| onward.receive(1));
            assert_eq!(echoed, Ok(b"x".to_vec()));
        } else {
            // Rather twice than never. After that it is certain.
            let (seen, record) = earlier.accept();
            let expected = vec![(earlier_handle, true), (own, false), (earlier_handle, false)];
            assert_eq!(hops(&record), expected);
            let guessed = RECORD_IDENTITY_GUESSED | RECORD_HOPS_GUESSED;
            assert_eq!(record.flags, RECORD_ADOPTED | guessed);
            let last = earlier.puppet.tcp(lab.v4());
            last.set_record(&seen.query(220).must("ask")).must("set the record");
            last.connect(lab.v4()).must("connect onwards");
            let echoed = last.send(b"x").and_then(|()| last.receive(1));
            assert_eq!(echoed, Ok(b"x".to_vec()));
        }
        assert_eq!(lab.counter(Counter::Loops), 0);
    }
}

/// What a service connects elsewhere is its own: it does not meet it, others do.
#[test]
fn a_service_does_not_meet_its_own_connections_elsewhere() {
    let lab = Lab::new();
    let resolver = lab.network().another_echo();
    lab.service_with("proxy", unmodified(30));
    lab.service_with("other", unmodified(20));
    let [proxy, other] = ["proxy", "other"].map(|name| lab.puppet_of(name));
    let [own, others] = ["proxy", "other"].map(|name| lab.handle_of(name));
    let (proxy, other) = (Proxy::of(&proxy), Proxy::of(&other));
    let mut trace = lab.trace();

    // Without any flow, and with one.
    for flags in [RECORD_ADOPTED, RECORD_ADOPTED | RECORD_IDENTITY_GUESSED] {
        let client = lab.puppet();
        let held = (flags != RECORD_ADOPTED).then(|| {
            let client = client.connect(lab.v4()).must("connect");
            (client, proxy.accept())
        });
        let asking = proxy.connect(resolver.address());
        let (at_other, record) = other.accept();
        assert_eq!(hops(&record), certain(&[own, others]));
        assert_eq!(record.flags, flags);
        assert_eq!(record.app.pid, proxy.puppet.id());
        let onward = other.connect(resolver.address());
        onward.send(b"?").must("ask");
        assert_eq!(onward.receive(1), Ok(b"?".to_vec()));
        drop((held, asking, at_other, onward));
    }
    let redirects = |events: &[carnet_core::event::Event]| {
        events.iter().filter(|event| event.kind == EventKind::Redirected as u32).count() >= 3
    };
    let events = trace.until("three redirects", redirects);
    let flags: Vec<u32> = events
        .iter()
        .filter(|event| event.kind == EventKind::Redirected as u32)
        .map(|event| event.flags)
        .collect();
    assert_eq!(flags, [RECORD_ADOPTED, 0, RECORD_ADOPTED | RECORD_IDENTITY_GUESSED]);
}

/// A program that knows nothing of records may have a library that does.
#[test]
fn a_record_that_is_set_stays_on_a_socket_that_had_adopted_one() {
    let lab = Lab::new();
    lab.service_with("mixed", unmodified(1));
    let (service, client) = (lab.puppet_of("mixed"), lab.puppet());
    let listener = service.serve("127.0.0.1:0".parse().expect("an address"));
    let _connection = client.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    let socket = service.tcp(lab.v4());
    let nobody = SocketAddr::new(lab.v4().ip(), 9);
    assert_eq!(socket.connect(nobody), Err(Errno(libc::ECONNREFUSED)));
    assert_eq!(lab.counter(Counter::Adopted), 1);
    socket.set_record(&record).must("set the record");
    for connects in 1..=3 {
        socket.connect(lab.v4()).must("connect onwards");
        socket.disconnect().must("disconnect");
        assert_eq!(lab.counter(Counter::Onward), 1 + connects);
        assert_eq!(lab.counter(Counter::Adopted), 1, "with the record that was set");
    }
}

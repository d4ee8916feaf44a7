//! Every flow passes every service exactly once, in the operator's order, with its record.

use carnet_core::{
    abi,
    address::Endpoint,
    chain::{Chain, RedirectState},
    event::{Counter, Event, EventKind},
    explain::{HostConnection, Process, explain},
    object::Trust,
    record::Record,
};
use carnet_engine::LegKind;
use carnet_tests::{Lab, Must as _, Plan, Running, Trace, handed_on, puppet::Hand};
use zerocopy::FromZeros as _;

/// Sends 16 flows through the services and checks all of it.
#[track_caller]
fn pass_through(lab: &Lab, names: &[&str], services: Vec<Running>) {
    for to in [lab.v4(), lab.v6()] {
        let client = lab.client(to).count(8).parallel(4).bytes(300_001);
        let reports = client.run().must("run a client");
        assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
        assert!(reports.iter().all(|report| report.peer == Some(to)), "{reports:#?}");
    }
    lab.settle();
    let chain: Vec<_> = names
        .iter()
        .zip(services)
        .map(|(name, service)| (lab.handle_of(name), service.finish()))
        .collect();
    handed_on(&chain, 16);
    let connections = lab.network().echo().connections();
    let (_, last) = chain.last().expect("a service");
    assert_eq!(connections.len(), 16);
    for report in last {
        let local = report.onward.expect("a connection onwards");
        assert!(connections.iter().any(|connection| connection.peer == local), "{report:#?}");
    }
    let length = names.len() as u64;
    for (counter, value) in [
        (Counter::Redirected, 16 * length),
        (Counter::Delivered, 16 * length),
        (Counter::RecordsSet, 16 * length),
        (Counter::Onward, 16),
        (Counter::Passed, 0),
        (Counter::Blocked, 0),
        (Counter::Loops, 0),
        (Counter::Forgotten, 0),
        (Counter::Skipped, 0),
        (Counter::HandoverFailed, 0),
        (Counter::OutOfMemory, 0),
    ] {
        assert_eq!(lab.counter(counter), value, "{counter:?}");
    }
}

#[track_caller]
fn chain_of(names: &[&str]) {
    let lab = Lab::new();
    let services = lab.start_chain(names);
    pass_through(&lab, names, services);
}

#[test]
fn one_service() {
    chain_of(&["alpha"]);
}

#[test]
fn two_services() {
    chain_of(&["alpha", "bravo"]);
}

#[test]
fn three_services() {
    chain_of(&["alpha", "bravo", "charlie"]);
}

#[test]
fn five_services() {
    chain_of(&["alpha", "bravo", "charlie", "delta", "echo"]);
}

#[test]
fn ten_services() {
    chain_of(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]);
}

#[test]
fn the_weights_say_the_order_whatever_was_added_first() {
    let lab = Lab::new();
    lab.service("first", 1);
    lab.service("second", 2);
    let names = ["second", "first"];
    let services = names.map(|name| lab.start(name)).into();
    pass_through(&lab, &names, services);
}

#[test]
fn services_of_equal_weight_come_in_the_order_of_their_age() {
    let lab = Lab::new();
    let names = ["older", "newer"];
    names.iter().for_each(|name| lab.service(name, 7));
    let services = names.map(|name| lab.start(name)).into();
    pass_through(&lab, &names, services);
}

/// Kind, service, hops and legs of the events of one flow.
fn story(events: &[Event], flow: u64) -> Vec<(EventKind, u64, u32, u32)> {
    let of_flow = events.iter().filter(|event| event.flow == flow);
    let facts = |event: &Event| {
        let kind = EventKind::from_number(event.kind).expect("a known kind");
        (kind, event.handle, event.hops, event.legs)
    };
    of_flow.map(facts).collect()
}

/// The walk-through of contract 3.2: callouts A and B, A heavier.
#[test]
fn the_walk_through_of_the_contract() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    let mut services = lab.start_chain(&["a", "b"]);
    let client = lab.puppet();
    let connection = client.connect(lab.v4()).must("connect");
    connection.send(b"ping").must("send");
    assert_eq!(connection.receive(4), Ok(b"ping".to_vec()));

    // While the flow lives: three legs, the last of which has arrived.
    let flows = lab.engine().flows().must("list the flows");
    assert_eq!(flows.len(), 3, "{flows:#?}");
    let [a, b] = ["a", "b"].map(|name| lab.handle_of(name));
    for (kind, handle, hops) in [
        (LegKind::Redirected, a, &[a][..]),
        (LegKind::Redirected, b, &[a, b]),
        (LegKind::Onward, 0, &[a, b]),
    ] {
        let legs: Vec<_> =
            flows.iter().filter(|leg| leg.kind == kind && leg.handle == handle).collect();
        let [leg] = legs[..] else { panic!("one leg to {handle} instead of {flows:#?}") };
        let named: Vec<u64> = leg.hops.iter().map(|hop| hop.handle).collect();
        assert_eq!(named, hops, "{leg:#?}");
        assert_eq!(leg.legs as usize, hops.len(), "{leg:#?}");
        assert_eq!(leg.requested, lab.v4(), "{leg:#?}");
        assert_eq!(leg.app.pid, client.id(), "{leg:#?}");
    }
    connection.end_sending().must("end");
    assert_eq!(connection.receive(1), Ok(vec![]));
    drop(connection);
    lab.settle();

    let at_b = services.pop().expect("b").finish();
    let at_a = services.pop().expect("a").finish();
    let flow = at_a[0].flow;
    handed_on(&[(a, at_a.clone()), (b, at_b.clone())], 1);

    // The states of the table, by what the record said at each step.
    let engine = lab.engine();
    let compiled = engine.compiled().must("compile the policy");
    let states = |record: &Record| {
        let chain = Chain::of_record(&compiled, record);
        [chain.state(0), chain.state(1)]
    };
    use RedirectState::{
        NotRedirected, PreviouslyRedirectedBySelf, RedirectedByOther, RedirectedBySelf,
    };
    assert_eq!(states(&Record::new_zeroed()), [NotRedirected, NotRedirected]);
    assert_eq!(states(&at_a[0].parsed()), [RedirectedBySelf, RedirectedByOther]);
    assert_eq!(states(&at_b[0].parsed()), [PreviouslyRedirectedBySelf, RedirectedBySelf]);

    // `explain` says what the kernel did.
    let policy = lab.policy();
    let asked = HostConnection {
        protocol: 6,
        destination: Endpoint::from(lab.v4()),
        ..HostConnection::default()
    };
    let legs = explain(&policy, &compiled, &asked, &|_, _| true, &|_, _| Process::default());
    let explained: Vec<_> = legs
        .iter()
        .map(|leg| {
            let states: Vec<_> = leg.services.iter().map(|service| service.state).collect();
            (leg.decision.redirects().then_some(leg.decision.handle), states)
        })
        .collect();
    assert_eq!(
        explained,
        [
            (Some(a), vec![NotRedirected, NotRedirected]),
            (Some(b), vec![RedirectedBySelf, RedirectedByOther]),
            (None, vec![PreviouslyRedirectedBySelf, RedirectedBySelf]),
        ]
    );

    // And so do the events.
    let ended = |events: &[Event]| {
        events.iter().filter(|event| event.kind == EventKind::Closed as u32).count() == 3
    };
    let told = story(trace.until("the end of three legs", ended), flow);
    assert_eq!(
        told[..3],
        [
            (EventKind::Redirected, a, 1, 1),
            (EventKind::Redirected, b, 2, 2),
            (EventKind::Onward, 0, 2, 2),
        ]
    );
    // The legs end in any order.
    let mut ends = told[3..].to_vec();
    ends.sort_unstable_by_key(|(_, handle, ..)| *handle);
    assert_eq!(
        ends,
        [(EventKind::Closed, 0, 2, 2), (EventKind::Closed, a, 1, 1), (EventKind::Closed, b, 2, 2),]
    );
    for event in trace.drain().iter().filter(|event| event.kind == EventKind::Closed as u32) {
        assert_eq!((event.bytes_sent, event.bytes_received), (4, 4), "{event:#?}");
    }
}

/// How many flows each of the services gets of two, given in the order of their weights.
#[track_caller]
fn seen(plans: &[(&str, Trust)]) -> Vec<usize> {
    let lab = Lab::new();
    // First without trust, which may be in a service that is yet to be added.
    let names: Vec<&str> = plans.iter().map(|(name, _)| *name).collect();
    let services = lab.start_chain(&names);
    for (name, trust) in plans {
        lab.change(|policy| Ok(policy.set_trust(name, trust.clone()).map(drop)?));
    }
    lab.exchange(lab.v4());
    lab.exchange(lab.v6());
    lab.settle();
    services.into_iter().map(|service| service.finish().len()).collect()
}

fn trusts(names: &[&str]) -> Trust {
    Trust::Services(names.iter().map(|name| (*name).into()).collect())
}

#[test]
fn a_service_lets_pass_what_those_that_it_trusts_have_seen() {
    assert_eq!(seen(&[("b", Trust::None), ("a", trusts(&["b"]))]), [2, 0]);
    // Before the trusted one has seen it, there is nothing to trust.
    assert_eq!(seen(&[("a", trusts(&["b"])), ("b", Trust::None)]), [2, 2]);
}

#[test]
fn trust_is_void_where_another_has_had_its_hands_on_the_flow() {
    let plans = [("c", Trust::None), ("b", Trust::None), ("a", trusts(&["b"]))];
    assert_eq!(seen(&plans), [2, 2, 2]);
    let plans = [("c", Trust::None), ("b", Trust::None), ("a", trusts(&["b", "c"]))];
    assert_eq!(seen(&plans), [2, 2, 0]);
}

#[test]
fn a_service_that_trusts_all_sees_only_fresh_flows() {
    assert_eq!(seen(&[("a", Trust::All), ("b", Trust::All)]), [2, 0]);
    assert_eq!(seen(&[("b", Trust::None), ("a", Trust::All)]), [2, 0]);
}

#[test]
fn a_context_reaches_its_service_and_no_other() {
    let lab = Lab::new();
    let context = Some((0..=255).collect::<Vec<u8>>());
    lab.service_with("with", Plan { weight: 2, context: context.clone(), ..Plan::default() });
    lab.service("without", 1);
    let services = ["with", "without"].map(|name| lab.start(name));
    lab.exchange(lab.v4());
    lab.settle();
    let [with, without] = services.map(Running::finish);
    assert_eq!(with[0].context, context);
    assert_eq!(without[0].context, None);
}

/// Sends a question and its answer over a connection, has it end, and gives the bytes that are told then of the leg.
#[track_caller]
fn bytes_of_a_leg<'a>(
    trace: &mut Trace,
    [connection, accepted]: [Hand<'a>; 2],
    end: impl FnOnce(Hand<'a>, Hand<'a>),
) -> (u64, u64) {
    connection.send(b"question").must("send");
    assert_eq!(accepted.receive(8), Ok(b"question".to_vec()));
    accepted.send(b"answer").must("send");
    assert_eq!(connection.receive(6), Ok(b"answer".to_vec()));
    let ends = |events: &[Event]| -> Vec<_> {
        let ends = events.iter().filter(|event| event.kind == EventKind::Closed as u32);
        ends.map(|event| (event.bytes_sent, event.bytes_received)).collect()
    };
    let before = ends(trace.drain()).len();
    end(connection, accepted);
    let now = ends(trace.until("the end of a leg", |events| ends(events).len() > before));
    now[before]
}

/// The ways in which a connection ends.
const ENDS: [fn(Hand<'_>, Hand<'_>); 5] = [
    |connection, accepted| {
        connection.end_sending().must("end");
        assert_eq!(accepted.receive(1), Ok(vec![]));
        drop(accepted);
        assert_eq!(connection.receive(1), Ok(vec![]));
    },
    |connection, accepted| {
        drop(connection);
        assert_eq!(accepted.receive(1), Ok(vec![]));
    },
    |connection, accepted| {
        accepted.end_sending().must("end");
        assert_eq!(connection.receive(1), Ok(vec![]));
        drop(connection);
        assert_eq!(accepted.receive(1), Ok(vec![]));
    },
    |connection, accepted| {
        drop(accepted);
        assert_eq!(connection.receive(1), Ok(vec![]));
    },
    |connection, _accepted| {
        // struct linger { on, 0 seconds }: close() resets the connection.
        let linger = [1_u32.to_ne_bytes(), 0_u32.to_ne_bytes()].concat();
        connection.set(libc::SOL_SOCKET, libc::SO_LINGER, &linger).must("set");
    },
];

/// However a connection ends, SYN and FIN are not among the bytes that are told of it.
#[test]
fn the_bytes_of_a_leg_are_those_of_its_payload() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let listener = service.serve("127.0.0.1:0".parse().expect("an address"));
    let mut trace = lab.trace();
    for end in ENDS {
        let connection = client.connect(lab.v4()).must("connect");
        let accepted = listener.accept().must("accept");
        assert_eq!(bytes_of_a_leg(&mut trace, [connection, accepted], end), (8, 6));
    }
}

/// The same of what a service connects onwards, whose other end Carnet does not see.
#[test]
fn the_bytes_of_an_onward_leg_are_those_of_its_payload() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client, server) = (lab.puppet_of("alpha"), lab.puppet(), lab.puppet());
    let loopback = "127.0.0.1:0".parse().expect("an address");
    let (listener, destination) = (service.serve(loopback), server.listen(loopback));
    let to = destination.local().must("ask where it listens");
    let mut trace = lab.trace();
    for end in ENDS {
        let connection = client.connect(to).must("connect");
        let accepted = listener.accept().must("accept");
        let info = accepted.query(abi::ONWARDS).must("ask for the ticket");
        let onward = service.tcp(to);
        let ticket = info.get(size_of::<Endpoint>()..).expect("a ticket behind the destination");
        onward.set(abi::LEVEL, abi::CARRY_ON, ticket).must("carry the flow on");
        onward.connect(to).must("connect onwards");
        let arrived = destination.accept().must("accept");
        assert_eq!(bytes_of_a_leg(&mut trace, [onward, arrived], end), (8, 6));
        drop((connection, accepted));
        lab.settle();
    }
}

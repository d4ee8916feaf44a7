//! A service that forgets the records: the kernel ends the loop, names the service, and nobody else
//! suffers.

use carnet_core::{
    chain::hop_limit,
    event::{Counter, Event, EventKind},
    object::Conditions,
};
use carnet_tests::{Lab, Must as _, Plan, service::Behaviour};

/// A service that does not set the record.
fn forgetful() -> Behaviour {
    Behaviour { forget_records: true, ..Behaviour::default() }
}

fn of_kind(events: &[Event], kind: EventKind) -> Vec<&Event> {
    events.iter().filter(|event| event.kind == kind as u32).collect()
}

#[test]
fn a_service_that_forgets_is_found_and_stopped() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    let other = lab.network().another_echo();
    lab.service("alpha", 2);
    let conditions = Conditions { ports: vec![lab.v4().port().into()], ..Conditions::default() };
    lab.service_with("bravo", Plan { weight: 1, conditions, ..Plan::default() });
    let alpha = lab.start("alpha");
    let bravo = lab.start_with("bravo", &forgetful());

    // A connection that is there before is not harmed.
    let bystander = lab.puppet();
    let before = bystander.connect(other.address()).must("connect");
    before.send(b"before").must("send");
    assert_eq!(before.receive(6), Ok(b"before".to_vec()));

    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");

    let stopped = |events: &[Event]| !of_kind(events, EventKind::Blocked).is_empty();
    let events = trace.until("a refused connection", stopped).to_vec();
    let limit = hop_limit(2);
    let [blocked] = of_kind(&events, EventKind::Blocked)[..] else { panic!("{events:#?}") };
    assert_eq!(blocked.reason, carnet_core::classify::Reason::Loop as u32);
    assert_eq!(blocked.legs, limit);
    assert_eq!(blocked.pid, bravo.id());
    let forgotten = of_kind(&events, EventKind::RecordForgotten);
    assert_eq!(forgotten.len(), (limit / 2) as usize, "{events:#?}");
    for event in forgotten {
        assert_eq!(event.handle, lab.handle_of("bravo"), "{event:#?}");
        assert_eq!(event.pid, bravo.id(), "{event:#?}");
        assert_eq!(std::net::SocketAddr::from(event.requested), lab.v4(), "{event:#?}");
    }
    assert_eq!(lab.counter(Counter::Loops), 1);
    assert_eq!(lab.counter(Counter::Blocked), 1);

    // Nothing reached the destination, and the others go on.
    assert!(lab.network().echo().connections().is_empty());
    lab.exchange(other.address());
    before.send(b"after").must("send");
    assert_eq!(before.receive(5), Ok(b"after".to_vec()));
    drop(before);

    // The guard's memory is of live flows only: an honest service has a clean slate.
    lab.settle();
    let reports = bravo.finish();
    assert_eq!(reports.iter().map(|report| report.legs).max(), Some(limit), "{reports:#?}");
    let refused: Vec<_> = reports.iter().filter(|report| report.onward.is_err()).collect();
    let [refused] = refused[..] else { panic!("one refusal instead of {reports:#?}") };
    assert_eq!((refused.onward, refused.legs), (Err(libc::ELOOP), limit));

    let bravo = lab.start("bravo");
    lab.exchange(lab.v4());
    lab.settle();
    assert_eq!(bravo.finish().len(), 1);
    assert_eq!(lab.counter(Counter::Loops), 1);
    drop(alpha);
}

#[test]
fn a_lone_service_that_forgets_gets_its_own_connections_up_to_the_limit() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let alpha = lab.start_with("alpha", &forgetful());
    for to in [lab.v4(), lab.v6()] {
        let reports = lab.client(to).run().must("run a client");
        assert!(!reports[0].ok, "{reports:#?}");
    }
    lab.settle();
    let reports = alpha.finish();
    let limit = hop_limit(1);
    for to in [lab.v4(), lab.v6()] {
        let mut legs: Vec<_> = reports
            .iter()
            .filter(|r| r.original == to)
            .map(|r| (r.legs, r.hops, r.onward.err()))
            .collect();
        legs.sort_unstable();
        let expected: Vec<_> =
            (1..=limit).map(|leg| (leg, 1, (leg == limit).then_some(libc::ELOOP))).collect();
        assert_eq!(legs, expected);
    }
    assert_eq!(lab.counter(Counter::Loops), 2);
    assert!(lab.network().echo().connections().is_empty());
}

/// Ten services, all of which match everything; the middle one forgets.
#[test]
fn one_of_ten_forgets() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    let mut services = Vec::new();
    for (weight, name) in (10..20).rev().zip(names) {
        lab.service(name, weight);
        let behaviour = if name == "e" { forgetful() } else { Behaviour::default() };
        services.push(lab.start_with(name, &behaviour));
    }
    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    let stopped = |events: &[Event]| !of_kind(events, EventKind::Blocked).is_empty();
    let events = trace.until("a refused connection", stopped).to_vec();
    let forgotten = of_kind(&events, EventKind::RecordForgotten);
    assert!(!forgotten.is_empty());
    assert!(forgotten.iter().all(|event| event.handle == lab.handle_of("e")), "{events:#?}");
    lab.settle();
    let legs = services.into_iter().flat_map(|s| s.finish()).map(|report| report.legs);
    assert!(legs.max() <= Some(hop_limit(10)));
}

#[test]
fn a_service_may_connect_on_its_own_account() {
    let lab = Lab::new();
    let other = lab.network().another_echo();
    let conditions = Conditions { ports: vec![lab.v4().port().into()], ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.puppet_of("alpha");
    let listener = service.serve("127.0.0.1:0".parse().expect("an address"));
    let client = lab.puppet();
    let held = client.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    // To fetch its rules, say: nobody redirects that, so there is nothing to forget.
    let own = service.connect(other.address()).must("connect on its own account");
    own.send(b"rules?").must("send");
    assert_eq!(own.receive(6), Ok(b"rules?".to_vec()));
    assert_eq!(lab.counter(Counter::Forgotten), 0);
    drop((held, accepted, own));
}

//! A service that dies: its connections are refused or go on without it, as the operator said.

use carnet_core::{
    event::{Counter, EventKind},
    object::FailurePolicy,
};
use carnet_tests::{Lab, Must as _, Plan};

#[test]
fn a_dead_service_refuses_or_is_passed_over() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    lab.service("alpha", 2);
    lab.service("bravo", 1);
    // Not started at all is as dead as killed.
    assert_eq!(lab.refused(lab.v4()), "ECONNREFUSED");
    let alpha = lab.start("alpha");
    let bravo = lab.start("bravo");
    lab.exchange(lab.v4());
    lab.settle();

    alpha.kill();
    for to in [lab.v4(), lab.v6()] {
        assert_eq!(lab.refused(to), "ECONNREFUSED");
    }
    let refusal = trace.first(EventKind::Blocked);
    assert_eq!(refusal.handle, lab.handle_of("alpha"), "{refusal:#?}");
    assert_eq!(refusal.reason, carnet_core::classify::Reason::ServiceUnavailable as u32);
    assert_eq!(lab.counter(Counter::ServiceUnavailable), 3);

    lab.change(|policy| Ok(policy.set_on_failure("alpha", FailurePolicy::Skip).map(drop)?));
    lab.exchange(lab.v4());
    lab.exchange(lab.v6());
    lab.settle();
    assert_eq!(bravo.reports(3).len(), 3);
    // Once for the application's connect, and once for that of bravo.
    assert_eq!(lab.counter(Counter::Skipped), 4);

    // Back in its place as soon as it is back.
    let alpha = lab.start("alpha");
    lab.exchange(lab.v4());
    lab.settle();
    let [alpha, bravo] = [alpha, bravo].map(carnet_tests::Running::finish);
    assert_eq!((alpha.len(), bravo.len()), (1, 4));
    assert_eq!((alpha[0].hops, bravo[3].hops), (1, 2));
}

#[test]
fn a_dead_second_service_makes_the_first_one_tell_its_client() {
    let lab = Lab::new();
    let mut services = lab.start_chain(&["alpha", "bravo"]);
    services.pop().expect("bravo").kill();
    // The client has been connected to alpha, so it learns by the end of that connection.
    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    lab.settle();
    let reports = services.pop().expect("alpha").finish();
    assert_eq!(reports[0].onward, Err(libc::ECONNREFUSED), "{reports:#?}");
    assert!(lab.network().echo().connections().is_empty());
}

#[test]
fn a_transfer_through_a_service_that_is_killed_ends() {
    let lab = Lab::new();
    let mut services = lab.start_chain(&["alpha", "bravo"]);
    let client = lab.puppet();
    let connection = client.connect(lab.v4()).must("connect");
    connection.send(b"half").must("send");
    assert_eq!(connection.receive(4), Ok(b"half".to_vec()));
    services.pop().expect("bravo").kill();
    // In order or by a reset, but not by waiting for ever.
    let end = connection.receive(1);
    assert!(
        matches!(&end, Ok(bytes) if bytes.is_empty())
            || end.as_ref().is_err_and(|e| e.0 == libc::ECONNRESET),
        "{end:?}"
    );
    drop(connection);
    lab.settle();
    lab.network()
        .echo()
        .wait_for_finished(1, carnet_tests::PATIENCE)
        .must("see the destination's connection end");
}

#[test]
fn the_last_service_skipped_leaves_a_direct_connection() {
    let lab = Lab::new();
    let plan = Plan { on_failure: FailurePolicy::Skip, ..Plan::default() };
    lab.service_with("alpha", plan);
    let client = lab.puppet();
    let connection = client.connect(lab.v4()).must("connect");
    assert_eq!(connection.peer(), Ok(lab.v4()));
    let connections = lab
        .network()
        .echo()
        .wait_for("a connection", carnet_tests::PATIENCE, |all| !all.is_empty())
        .must("see the connection");
    assert_eq!(Ok(connections[0].peer), connection.local());
    assert_eq!(lab.counter(Counter::Passed), 1);
    assert!(lab.engine().flows().must("list the flows").is_empty());
}

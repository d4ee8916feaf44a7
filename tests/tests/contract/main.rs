//! The contract suite: the C programs of `tests/contract` on the real kernel, with real redirected
//! sockets. One test a program; each prints what became of its rows. `cargo xtask contract` turns
//! that into a line per clause.
//!
//! The services, of which one source serves Linux and Windows, are run here too.

use std::time::Duration;

use carnet_core::{event::Counter, object::Conditions};
use carnet_testbed::{DatagramClients, DatagramServer, Process, Topology, datagrams::DatagramPlan};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan,
    contract::{Link, Program, run_rows, run_rows_in},
};

/// The context of the redirects, where the rows count on one.
const CONTEXT: Option<&[u8]> = Some(b"hello");

#[test]
fn calls() {
    run_rows("calls", Link::Shared, CONTEXT);
}

#[test]
fn calls_with_the_static_library() {
    run_rows("calls", Link::Static, CONTEXT);
}

#[test]
fn privilege() {
    run_rows("privilege", Link::Shared, CONTEXT);
}

#[test]
fn detached() {
    run_rows("detached", Link::Shared, CONTEXT);
}

#[test]
fn pointers() {
    run_rows("pointers", Link::Shared, CONTEXT);
}

#[test]
fn overlapped() {
    run_rows("overlapped", Link::Shared, CONTEXT);
}

#[test]
fn cancel() {
    run_rows("cancel", Link::Shared, CONTEXT);
}

#[test]
fn results() {
    run_rows("results", Link::Shared, CONTEXT);
}

#[test]
fn provider() {
    run_rows("provider", Link::Shared, CONTEXT);
}

#[test]
fn waits() {
    run_rows("waits", Link::Shared, CONTEXT);
}

#[test]
fn query() {
    run_rows("query", Link::Shared, CONTEXT);
}

#[test]
fn context() {
    run_rows("context", Link::Shared, None);
}

#[test]
fn messages() {
    // The program talks to itself, too, which is nothing to redirect.
    let destinations = [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
    let conditions = Conditions {
        destinations: destinations.map(std::net::IpAddr::into).into(),
        ..Conditions::default()
    };
    run_rows_in(&Lab::new(), Plan { conditions, ..Plan::default() }, "messages", Link::Shared);
}

#[test]
fn datagrams() {
    run_rows("datagrams", Link::Shared, CONTEXT);
}

#[test]
fn datagrams_with_the_static_library() {
    run_rows("datagrams", Link::Static, CONTEXT);
}

#[test]
fn idle() {
    let lab = Lab::with_udp_idle(Duration::from_secs(1));
    run_rows_in(&lab, Plan::default(), "idle", Link::Shared);
}

#[test]
fn strict() {
    run_rows("strict", Link::Shared, CONTEXT);
}

#[test]
fn stress() {
    run_rows("stress", Link::Shared, CONTEXT);
}

/// Starts the service of `tests/contract/service.c` in a cgroup; its listeners are registered for
/// it, since it knows nothing of Linux.
#[track_caller]
fn start_service(lab: &Lab, program: &Program, name: &str) -> Process {
    let process = Process::spawn(&mut program.command(lab, name)).must("start the service");
    process.wait_for_line("ready", PATIENCE, |line| line == "ready").must("see it ready");
    let registered = lab.engine().register_listener_of(name, process.id());
    assert_eq!(registered.must("register its listeners").len(), 2);
    process
}

#[track_caller]
fn add_service(lab: &Lab, name: &str, weight: u16, context: Option<&[u8]>) {
    let context = context.map(<[u8]>::to_vec);
    lab.service_with(name, Plan { weight, context, ..Plan::default() });
}

/// Has clients exchange bytes with the destination and counts what the engine saw of it.
#[track_caller]
fn exchange(lab: &Lab, services: u64) {
    for to in [lab.v4(), lab.v6()] {
        let client = lab.client(to).count(6).parallel(3).bytes(300_001);
        let reports = client.run().must("run a client");
        assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
        assert!(reports.iter().all(|report| report.peer == Some(to)), "{reports:#?}");
    }
    lab.settle();
    for (counter, value) in [
        (Counter::Redirected, 12 * services),
        (Counter::Delivered, 12 * services),
        (Counter::RecordsSet, 12 * services),
        (Counter::Onward, 12),
        (Counter::Passed, 0),
        (Counter::Forgotten, 0),
    ] {
        assert_eq!(lab.counter(counter), value, "{counter:?}");
    }
    assert_eq!(lab.network().echo().connections().len(), 12);
}

/// The flows that a service has told of.
fn flows(service: &Process, told: &str) -> usize {
    service.lines().iter().filter(|line| line.as_str() == told).count()
}

#[test]
fn the_service_for_both_systems() {
    let program = Program::compile(&["tests/contract/service.c"], Link::Shared);
    let lab = Lab::new();
    add_service(&lab, "alpha", 1, CONTEXT);
    let service = start_service(&lab, &program, "alpha");
    exchange(&lab, 1);
    assert_eq!(flows(&service, r#"flow: a record of 424 bytes, context "hello""#), 12);

    // A connection that was not redirected has no record: FWP_E_NOT_FOUND, and it is ended.
    let line = service.lines();
    assert!(!line.iter().any(|line| line.starts_with("ended")), "{line:#?}");
    let sockets = lab.engine().register_listener_of("alpha", service.id());
    let listener = sockets.must("ask for the listeners")[0];
    let direct = lab
        .network()
        .topology
        .client
        .run(|| std::net::TcpStream::connect(listener))
        .must("enter the namespace")
        .must("connect");
    direct.set_read_timeout(Some(PATIENCE)).must("limit the wait");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut &direct, &mut rest).must("see the end");
    let not_found = "ended: error -2144206840 (0x80320008)";
    service
        .wait_for_line("the refusal", PATIENCE, |line| line == not_found)
        .must("see the refusal");
}

#[test]
fn two_services_for_both_systems_in_a_chain() {
    let programs = [Link::Shared, Link::Static]
        .map(|link| Program::compile(&["tests/contract/service.c"], link));
    let lab = Lab::new();
    add_service(&lab, "alpha", 2, CONTEXT);
    add_service(&lab, "bravo", 1, None);
    let alpha = start_service(&lab, &programs[0], "alpha");
    let bravo = start_service(&lab, &programs[1], "bravo");
    exchange(&lab, 2);
    // The record grows from service to service.
    assert_eq!(flows(&alpha, r#"flow: a record of 424 bytes, context "hello""#), 12);
    assert_eq!(flows(&bravo, r#"flow: a record of 440 bytes, context """#), 12);
}

#[test]
fn two_datagram_services_in_a_chain() {
    const CLIENTS: u32 = 20;
    let programs = [Link::Shared, Link::Static]
        .map(|link| Program::compile(&["tests/contract/relay.c"], link));
    let lab = Lab::new();
    let network = &lab.network().topology;
    let both: [std::net::IpAddr; 2] =
        [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
    let addresses = both.map(|ip| (ip, 0).into());
    let server = DatagramServer::start_in(&network.destination, addresses).must("start a server");
    add_service(&lab, "alpha", 2, CONTEXT);
    add_service(&lab, "bravo", 1, None);
    let services = [("alpha", &programs[0]), ("bravo", &programs[1])].map(|(name, program)| {
        let process = Process::spawn(&mut program.command(&lab, name)).must("start the service");
        process.wait_for_line("ready", PATIENCE, |line| line == "ready").must("see it ready");
        process
    });
    for connected in [false, true] {
        let plan = DatagramPlan {
            to: server.addresses().to_vec(),
            clients: CLIENTS,
            rounds: 5,
            window: 64,
            connected,
            timeout: PATIENCE,
        };
        let clients = DatagramClients::start(&plan, Some(&network.client), Some(lab.apps()));
        let report = clients.must("start clients").finish(PATIENCE).must("run clients");
        assert!(report.is_perfect(), "{report:#?}");
    }
    // Two destinations, with sockets of both kinds.
    let count = 4 * u64::from(CLIENTS);
    for (counter, value) in [
        (Counter::Redirected, 2 * count),
        (Counter::RecordsSet, 2 * count),
        (Counter::Onward, count),
        (Counter::Forgotten, 0),
    ] {
        assert_eq!(lab.counter(counter), value, "{counter:?}");
    }
    for (service, length) in services.iter().zip([424, 440]) {
        let lines = service.lines();
        assert_eq!(lines.len() as u64, 1 + count, "{lines:#?}");
        assert_eq!(flows(service, &format!("flow: a record of {length} bytes")) as u64, count);
    }
}

//! The keys of the records: rotated while flows are under way, and never half written.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use carnet_core::{
    abi,
    address::Endpoint,
    event::{Counter, EventKind},
    record::mac_of,
};
use carnet_engine::{Engine, Error, KeyStatus};
use carnet_tests::{
    Lab, Must as _, PATIENCE, handed_on,
    puppet::{Errno, Hand, Puppet},
    rounds,
    service::read_record,
};

/// Long enough for anything that is to come before its end.
const LONG: Duration = Duration::from_secs(3600);

/// A lab with a service.
fn scene() -> (Lab, Puppet, Puppet) {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    (lab, service, client)
}

/// A connection that the service has accepted, and the client's side of it.
#[track_caller]
fn delivered<'a>(lab: &Lab, client: &'a Puppet, listener: &Hand<'a>) -> (Hand<'a>, Hand<'a>) {
    let connection = client.connect(lab.v4()).must("connect");
    (listener.accept().must("accept"), connection)
}

fn record_of(accepted: &Hand<'_>) -> Vec<u8> {
    accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query the record")
}

#[track_caller]
fn rotate(lab: &Lab, overlap: Duration) -> KeyStatus {
    lab.engine().rotate_key(overlap).must("rotate the key")
}

fn loopback() -> std::net::SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

const REFUSED: Result<(), Errno> = Err(Errno(libc::EINVAL));

#[test]
fn a_record_of_the_key_before_serves_within_the_overlap_one_of_an_older_key_does_not() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (accepted, _connection) = delivered(&lab, &client, &listener);
    let fresh = || service.tcp(lab.v4());
    let first = record_of(&accepted);

    let key = rotate(&lab, LONG);
    assert_eq!(key.generation, 2);
    assert!(key.predecessor.is_some_and(|left| left <= LONG && left > LONG / 2), "{key:?}");
    assert_eq!(fresh().set_record(&first), Ok(()));
    // The same connection, asked again, has a record under the new key; nothing else differs.
    let second = record_of(&accepted);
    assert_eq!((&second[..8], &second[16..]), (&first[..8], &first[16..]));
    assert_ne!(second[8..16], first[8..16]);
    let parsed = read_record(&second);
    assert_eq!(parsed.mac, mac_of(&parsed, &lab.keys()[0]));
    assert_eq!(fresh().set_record(&second), Ok(()));

    // A rotation within the overlap: two keys count, never three.
    assert_eq!(rotate(&lab, LONG).generation, 3);
    assert_eq!(fresh().set_record(&first), REFUSED);
    assert_eq!(fresh().set_record(&second), Ok(()));
    assert_eq!(lab.counter(Counter::RecordsForged), 1);
    let third = record_of(&accepted);
    let onward = fresh();
    assert_eq!(onward.set_record(&third), Ok(()));
    onward.connect(lab.v4()).must("connect onwards");
    onward.send(b"marco").must("send");
    assert_eq!(onward.receive(5), Ok(b"marco".to_vec()));
}

#[test]
fn without_an_overlap_the_key_before_is_refused_at_once() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (accepted, _connection) = delivered(&lab, &client, &listener);
    let before = record_of(&accepted);
    let set = service.tcp(lab.v4());
    set.set_record(&before).must("set the record");
    let [old_key, _] = lab.keys();

    let key = rotate(&lab, Duration::ZERO);
    assert_eq!((key.generation, key.predecessor), (2, None));
    assert!(!lab.keys().contains(&old_key), "it is nowhere any more");
    assert_eq!(service.tcp(lab.v4()).set_record(&before), REFUSED);
    // What was set before was verified then, and goes on.
    set.connect(lab.v4()).must("connect onwards");
    assert_eq!(lab.counter(Counter::Onward), 1);
    // A service that asks again is served again.
    assert_eq!(service.tcp(lab.v4()).set_record(&record_of(&accepted)), Ok(()));
}

#[test]
fn the_overlap_ends_by_itself() {
    const OVERLAP: Duration = Duration::from_secs(5);
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (accepted, _connection) = delivered(&lab, &client, &listener);
    let before = record_of(&accepted);
    let start = Instant::now();
    rotate(&lab, OVERLAP);
    let socket = service.tcp(lab.v4());
    assert_eq!(socket.set_record(&before), Ok(()));
    while socket.set_record(&before) == Ok(()) {
        assert!(start.elapsed() < PATIENCE, "the key is still accepted");
        thread::sleep(Duration::from_millis(50));
    }
    assert!(start.elapsed() >= OVERLAP, "after {:?}", start.elapsed());
    assert_eq!(socket.set_record(&before), REFUSED);
    assert_eq!(lab.engine().status().must("ask").key.predecessor, None);
    assert_eq!(socket.set_record(&record_of(&accepted)), Ok(()));
}

#[test]
fn an_overlap_is_not_longer_than_records_live() {
    let (lab, ..) = scene();
    let mut engine = lab.engine();
    let error = engine.rotate_key(LONG + Duration::from_nanos(1)).expect_err("an error");
    assert!(matches!(error, Error::BadOverlap { .. }), "{error}");
    assert_eq!(engine.status().must("ask").key.generation, 1);
    assert_eq!(Engine::MAX_KEY_OVERLAP, LONG);
}

#[test]
fn an_upgrade_keeps_the_keys() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (accepted, _connection) = delivered(&lab, &client, &listener);
    let first = record_of(&accepted);
    rotate(&lab, LONG);
    let keys = lab.keys();
    lab.engine().upgrade().must("upgrade");
    assert_eq!(lab.keys(), keys);
    for record in [first, record_of(&accepted)] {
        assert_eq!(service.tcp(lab.v4()).set_record(&record), Ok(()));
    }
    assert_eq!(lab.engine().status().must("ask").key.generation, 2);
}

#[test]
fn rotations_under_load_lose_no_flow() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let wave = u64::from(40 * rounds(10));
    let rotated = AtomicUsize::new(0);
    let count = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let client = lab.client(lab.v4()).count(wave).parallel(8);
            let mut reports = Vec::new();
            // Until there was a rotation within the load, however fast the machine.
            while rotated.load(Ordering::Acquire) < 3 {
                reports.extend(client.run().must("run a client"));
            }
            reports
        });
        // Far apart for a service that queries and sets a record, close for everything else.
        while !load.is_finished() {
            rotate(&lab, LONG);
            rotated.fetch_add(1, Ordering::Release);
            thread::sleep(Duration::from_millis(300));
        }
        let reports = load.join().expect("a client");
        assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
        reports.len()
    });
    lab.settle();
    let chain: Vec<_> = ["alpha", "bravo"]
        .iter()
        .zip(services)
        .map(|(name, service)| (lab.handle_of(name), service.finish()))
        .collect();
    handed_on(&chain, count);
    assert_eq!(lab.counter(Counter::Onward), count as u64);
    for counter in [Counter::RecordsForged, Counter::RecordsMalformed, Counter::Forgotten] {
        assert_eq!(lab.counter(counter), 0, "{counter:?}");
    }
}

/// Rotations without a pause, against a service that does nothing but query and set: a record is
/// refused only when the key was replaced twice meanwhile, and never issued under half a key.
#[test]
fn no_record_is_ever_issued_under_half_a_key() {
    let (lab, service, client) = scene();
    let listener = service.serve(loopback());
    let (accepted, _connection) = delivered(&lab, &client, &listener);
    let socket = service.tcp(lab.v4());
    let done = AtomicBool::new(false);
    let mut refused = 0;
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    rotate(&lab, LONG);
                }
            });
        }
        let generation = || lab.engine().status().must("ask").key.generation;
        for _ in 0..rounds(100) {
            let before = generation();
            let record = record_of(&accepted);
            match socket.set_record(&record) {
                Ok(()) => {}
                Err(Errno(libc::EINVAL)) => {
                    // The key that issued it is at least the one of before; it takes the beginning
                    // of a second rotation to refuse it.
                    let after = generation();
                    assert!(after > before, "refused under key {before}, now {after}");
                    refused += 1;
                }
                Err(errno) => panic!("{errno}"),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    // Now that it is calm, all is well.
    assert_eq!(socket.set_record(&record_of(&accepted)), Ok(()));
    assert_eq!(lab.counter(Counter::RecordsForged), refused);
}

#[test]
fn a_udp_leg_that_was_dissolved_has_ended_when_a_record_is_set() {
    let (lab, service, client) = scene();
    lab.service("bravo", 0);
    let listener = service.serve(loopback());
    let (accepted, _connection) = delivered(&lab, &client, &listener);
    let record = record_of(&accepted);
    let bravo = lab.puppet_of("bravo");
    let datagrams = bravo.udp(loopback());
    datagrams.bind(loopback()).must("bind");
    datagrams.register(&[]).must("register the UDP socket");
    let mut trace = lab.trace();
    let onward = service.udp(lab.v4());
    onward.set_record(&record).must("set the record");
    onward.connect(lab.v4()).must("connect onwards");
    onward.disconnect().must("dissolve the connection");
    // No hook has seen that; this one does.
    onward.set_record(&record).must("set the record again");
    let event = trace.first(EventKind::Closed);
    assert_eq!(event.handle, lab.handle_of("bravo"));
    assert_eq!(event.requested, Endpoint::from(lab.v4()));
}

//! Records that the kernel did not make, or not so.

use carnet_core::{
    event::{Counter, Event, EventKind},
    record::{Hop, LIFETIME_NS, MAX_HOPS, MAX_RECORD, Record, RecordError, mac_of},
    siphash::Key,
};
use carnet_tests::{Lab, puppet::Kind, service::read_record};
use rustix::time::{ClockId, clock_gettime};
use zerocopy::IntoBytes as _;

use crate::{PROTOCOLS, Service, accepts, fails, lab_of};

/// What of a record goes over the wire.
fn wire(record: &Record) -> Vec<u8> {
    record.as_bytes()[..record.length.into()].to_vec()
}

/// A record with the MAC that it has under this key.
fn signed(mut record: Record, key: &Key) -> Vec<u8> {
    record.mac = mac_of(&record, key);
    wire(&record)
}

/// Sets the records one by one, as the service that holds a genuine one: each must be refused as
/// malformed, forged, foreign or expired, be counted so, and leave nothing behind.
#[track_caller]
fn are_refused(forge: impl Fn(&Lab, &[u8], Kind) -> Vec<Vec<u8>>) {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let delivery = service.deliver(&client, lab.v4(), kind);
        let refusals = || {
            [
                Counter::RecordsMalformed,
                Counter::RecordsForged,
                Counter::RecordsForeign,
                Counter::RecordsExpired,
            ]
            .map(|counter| lab.counter(counter))
            .iter()
            .sum::<u64>()
        };
        let forgeries = forge(&lab, &delivery.record, kind);
        assert!(!forgeries.is_empty());
        let socket = service.fresh(kind);
        for forged in &forgeries {
            assert_eq!(socket.set_record(forged), fails(libc::EINVAL), "{kind:?} {forged:02x?}");
        }
        assert_eq!(refusals(), forgeries.len() as u64, "{kind:?}");
        assert_eq!(lab.counter(Counter::RecordsSet), 0, "{kind:?}");

        // What the socket begins now is a flow of its own, of which nobody has had anything.
        let own = service.accept(socket, lab.v4(), kind);
        let (own, genuine) = (read_record(&own.record), read_record(&delivery.record));
        assert_eq!(own.hop_count, 1, "{kind:?}");
        assert_eq!(own.hops[0].handle, lab.handle_of("alpha"), "{kind:?}");
        assert!(own.flow > genuine.flow, "{kind:?}");
        assert_eq!(own.app.pid, puppet.id(), "{kind:?}");
        // And the genuine one serves as before.
        accepts(&service.fresh(kind), &delivery.record);
    }
}

#[test]
fn every_flipped_bit() {
    are_refused(|_, record, _| {
        let flip = |bit: usize| {
            let mut flipped = record.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        };
        (0..8 * record.len()).map(flip).collect()
    });
}

#[test]
fn truncated_at_every_length() {
    are_refused(|_, record, kind| {
        // Of UDP, nothing takes a record off.
        let least = usize::from(kind == Kind::Udp);
        (least..record.len()).map(|length| record[..length].to_vec()).collect()
    });
}

#[test]
fn extended_to_every_length() {
    are_refused(|_, record, _| {
        let lengths = (record.len() + 1..=MAX_RECORD + 16).chain([2048, 4096, 4097, 9000]);
        let extended = |length| {
            let mut extended = record.to_vec();
            extended.resize(length, 0);
            extended
        };
        lengths.map(extended).collect()
    });
}

#[test]
fn a_hop_more_and_a_hop_less() {
    are_refused(|lab, record, _| {
        let record = read_record(record);
        let mut forgeries = Vec::new();
        // As if others had had the flow too: services that there are, or not.
        let mut longer = record;
        while longer.push(Hop { handle: lab.handle_of("alpha") + 1, filter: 1 }) {
            forgeries.push(wire(&longer));
        }
        assert_eq!(forgeries.len(), MAX_HOPS - 1);
        let mut shorter = record;
        shorter.take_back(0);
        forgeries.push(wire(&shorter));
        let mut other = record;
        other.hops[0].handle += 1;
        forgeries.push(wire(&other));
        forgeries
    });
}

#[test]
fn a_mac_under_another_key() {
    are_refused(|lab, record, _| {
        let record = read_record(record);
        // The place of the predecessor has a key from the beginning, which does not count.
        let [key, other] = lab.keys();
        assert_ne!(other, [0, 0]);
        let wrong =
            [[0, 0], [u64::MAX; 2], [key[1], key[0]], [key[0], !key[1]], [key[0] ^ 1, key[1]]];
        wrong.iter().map(|key| signed(record, key)).collect()
    });
}

#[test]
fn the_mac_of_another_record() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let [one, two] = [(); 2]
            .map(|()| service.deliver(&client, lab.v4(), kind))
            .map(|delivery| delivery.record);
        let mut mixed = one.clone();
        mixed[8..16].copy_from_slice(&two[8..16]);
        assert_ne!(one[8..16], two[8..16]);
        assert_eq!(service.fresh(kind).set_record(&mixed), fails(libc::EINVAL), "{kind:?}");
        // Nor half of each: they differ in flow and time.
        let half = [&one[..32], &two[32..]].concat();
        assert!(half != one && half != two);
        assert_eq!(service.fresh(kind).set_record(&half), fails(libc::EINVAL), "{kind:?}");
        assert_eq!(lab.counter(Counter::RecordsForged), 2);
    }
}

#[test]
fn noise_that_looks_like_a_record() {
    are_refused(|_, record, _| {
        // Well formed, and else what a simple generator gives.
        let mut state = 1_u64;
        let mut noise = || {
            let mut forged = record.to_vec();
            for byte in &mut forged[8..16] {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            forged
        };
        (0..2000).map(|_| noise()).collect()
    });
}

#[test]
fn an_expired_record() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let delivery = service.deliver(&client, lab.v4(), kind);
        // Root, who can read the key, makes one that is genuine but for its age.
        let [key, _] = lab.keys();
        let aged = |age_ns: i64| {
            let now = clock_gettime(ClockId::Boottime);
            let now = now.tv_sec * 1_000_000_000 + now.tv_nsec;
            // The machine may not have been up for that long: the clock wraps, as in the kernel.
            let issued_ns = (now as u64).wrapping_sub(age_ns as u64);
            signed(Record { issued_ns, ..read_record(&delivery.record) }, &key)
        };
        let socket = service.fresh(kind);
        let minute = 60_000_000_000;
        for age in [LIFETIME_NS as i64 + 1, LIFETIME_NS as i64 + minute, i64::MAX, -minute] {
            assert_eq!(socket.set_record(&aged(age)), fails(libc::EINVAL), "{kind:?}, {age}");
        }
        assert_eq!(lab.counter(Counter::RecordsExpired), 4, "{kind:?}");
        accepts(&socket, &aged(0));
        let young_enough = LIFETIME_NS as i64 - 10 * minute;
        accepts(&socket, &aged(young_enough));
    }
}

#[test]
fn every_refusal_is_counted_and_told() {
    let lab = lab_of(&["alpha"]);
    let mut trace = lab.trace();
    let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
    let service = Service::at_work(&puppet);
    let delivery = service.deliver(&client, lab.v4(), Kind::Tcp);
    let socket = service.fresh(Kind::Tcp);
    let mut forged = delivery.record.clone();
    forged[8] ^= 1;
    for _ in 0..50 {
        assert_eq!(socket.set_record(&forged), fails(libc::EINVAL));
    }
    let refused = |event: &&Event| event.kind == EventKind::RecordRefused as u32;
    let events = trace.until("fifty refusals", |all| all.iter().filter(refused).count() >= 50);
    for event in events.iter().filter(refused) {
        assert_eq!(event.reason, RecordError::Forged as u32, "{event:?}");
        assert_eq!((event.handle, event.pid), (lab.handle_of("alpha"), puppet.id()), "{event:?}");
    }
    // However many there are: what a reader misses is counted.
    let many = || {
        for _ in 0..5000 {
            assert_eq!(socket.set_record(&forged), fails(libc::EINVAL));
        }
    };
    many();
    assert_eq!(lab.counter(Counter::RecordsForged), 5050);
    let missed = lab.counter(Counter::EventsLost);
    assert!(missed > 0);
    // Where nobody reads, nothing is missed; and who begins to hears what happens from then on.
    drop(trace);
    many();
    assert_eq!(lab.counter(Counter::RecordsForged), 10_050);
    assert_eq!(lab.counter(Counter::EventsLost), missed);
    let mut trace = lab.trace();
    assert_eq!(socket.set_record(&forged), fails(libc::EINVAL));
    let events = trace.until("a refusal", |all| all.iter().any(|event| refused(&event)));
    assert_eq!(events.iter().filter(refused).count(), 1);
}

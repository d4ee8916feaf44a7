//! Records that go to other hosts and come from them.

use std::mem::offset_of;

use carnet_core::{
    address::Endpoint,
    chain::{Chain, hop_limit},
    compile::{CompiledPolicy, compile},
    explain::HostConnection,
    object::{Conditions, ExecutableCondition, FailurePolicy, NewService, Policy, Trust},
    portable::{NO_IDENTITY, PortableRecord, identity},
    record::{
        FileId, Hop, MAGIC, MAX_HOPS, MAX_RECORD, RECORD_ADOPTED, RECORD_IMPORTED, Record,
        RecordError, VERSION,
    },
    table::{NO_SLOT, Tables as _},
};
use proptest::{prelude::*, sample::subsequence};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::support::{connection_to, decide, new_filter, new_service, policy, record, redirect};

/// The services of a host: each name is one of provider "p".
fn host(names: &[&str]) -> (Policy, CompiledPolicy) {
    let policy = policy(&[("s", 0)], names);
    let compiled = compile(&policy, 1).unwrap();
    (policy, compiled)
}

fn handle(policy: &Policy, name: &str) -> u64 {
    policy.service(name).unwrap().handle
}

/// A record of a flow that has had these services of a host.
fn flow(policy: &Policy, names: &[&str]) -> Record {
    let handles: Vec<u64> = names.iter().map(|name| handle(policy, name)).collect();
    let mut record = record(&handles, handles.len() as u32);
    (record.magic, record.version, record.flow) = (MAGIC, VERSION, 17);
    record.destination = Endpoint::from("192.0.2.1:80".parse::<std::net::SocketAddr>().unwrap());
    record.app.pid = 4321;
    record.app.uid = 1000;
    record.app.executable = FileId { device: 1, inode: 2 };
    (record.app.cgroup, record.app.netns, record.app.started_ns) = (7, 8, 9);
    (record.mac, record.epoch, record.issued_ns) = (1, 2, 3);
    record
}

fn export(tables: &CompiledPolicy, record: &Record) -> PortableRecord {
    let mut portable = *record;
    portable.export(tables);
    PortableRecord::read(&portable.as_bytes()[..portable.length.into()]).unwrap()
}

fn import(tables: &CompiledPolicy, bytes: &[u8], own: u64) -> Result<Record, RecordError> {
    let mut whole = [0; MAX_RECORD];
    whole[..bytes.len().min(MAX_RECORD)].copy_from_slice(&bytes[..bytes.len().min(MAX_RECORD)]);
    let mut record = Record::read_from_bytes(&whole).unwrap();
    record.import(tables, bytes.len(), own)?;
    Ok(record)
}

fn hops(record: &Record) -> Vec<(u64, u64)> {
    let hops = record.hops.iter().take(record.hop_count as usize);
    hops.map(|hop| (hop.handle, hop.filter)).collect()
}

#[test]
fn a_service_is_the_same_on_every_host_and_no_other_one_is() {
    // What docs/proxy-protocol.md says, computed apart from this code: a change would part old hosts from
    // new ones.
    assert_eq!(identity("acme", "one"), 0xefde_87c2_893a_1d3d);
    let all = [("a", "bc"), ("ab", "c"), ("a", "b"), ("", "abc"), ("abc", ""), ("b", "a")];
    for (at, (provider, name)) in all.iter().enumerate() {
        assert_ne!(identity(provider, name), NO_IDENTITY);
        for (other, another) in &all[..at] {
            assert_ne!(identity(provider, name), identity(other, another));
        }
    }
}

#[test]
fn a_chain_goes_on_at_another_host() {
    let (here, tables) = host(&["one", "only-here"]);
    // In another order, with other handles.
    let (there, other_tables) = host(&["two", "gate", "one"]);
    let record = flow(&here, &["only-here", "one"]);
    let portable = export(&tables, &record);
    let names = [identity("p", "only-here"), identity("p", "one")];
    assert_eq!(portable.identities().collect::<Vec<_>>(), names);
    assert_eq!((portable.flow(), portable.legs(), portable.app().pid), (17, 2, 4321));
    assert_eq!(portable.destination(), &record.destination);

    let gate = handle(&there, "gate");
    let imported = import(&other_tables, portable.as_bytes(), gate).unwrap();
    let expected = [(0, names[0]), (handle(&there, "one"), 0), (gate, 0)];
    assert_eq!(hops(&imported), expected);
    assert_eq!((imported.legs, imported.flags), (3, RECORD_IMPORTED));
    assert_eq!((imported.magic, imported.version, imported.mac), (MAGIC, VERSION, 0));
    assert!(imported.well_formed(imported.length.into()));
    // What of the application means something here.
    let app = imported.app;
    assert_eq!((app.pid, app.uid, app.executable), (4321, 1000, FileId::default()));
    assert_eq!((app.cgroup, app.netns, app.started_ns), (0, 0, 0));

    let chain = Chain::of_record(&other_tables, &imported);
    assert_eq!(chain.strangers, 1);
    for (name, may) in [("one", false), ("two", true), ("gate", false)] {
        let slot = other_tables.slot_of(handle(&there, name));
        let service = other_tables.service(slot).unwrap();
        assert_eq!(chain.may_redirect(slot, service), may, "{name}");
    }

    // And back, where the stranger is none.
    let back = import(&tables, export(&other_tables, &imported).as_bytes(), 0).unwrap();
    let expected =
        [(handle(&here, "only-here"), 0), (handle(&here, "one"), 0), (0, identity("p", "gate"))];
    assert_eq!(hops(&back), expected);
    assert_eq!(back.legs, 4);
}

#[test]
fn who_trusts_by_name_trusts_no_stranger() {
    let (here, tables) = host(&["one", "unknown"]);
    for (names, stands_aside) in [(&["one"][..], true), (&["one", "unknown"], false)] {
        let (mut there, _) = host(&["one", "two"]);
        there.set_trust("two", Trust::Services(vec!["one".into()])).unwrap();
        let compiled = compile(&there, 1).unwrap();
        let portable = export(&tables, &flow(&here, names));
        let imported = import(&compiled, portable.as_bytes(), 0).unwrap();
        let chain = Chain::of_record(&compiled, &imported);
        let slot = compiled.slot_of(handle(&there, "two"));
        let may = chain.may_redirect(slot, compiled.service(slot).unwrap());
        assert_eq!(may, !stands_aside, "{names:?}");
    }
}

#[test]
fn no_filter_means_a_file_of_another_host() {
    let (mut there, _) = host(&["one"]);
    let file = FileId { device: 1, inode: 2 };
    let original_executables = vec![ExecutableCondition { path: "/x".into(), file }];
    let conditions = Conditions { original_executables, ..Conditions::default() };
    there.add_filter(new_filter("s", conditions, redirect("one"))).unwrap();
    let compiled = compile(&there, 1).unwrap();
    let (here, tables) = host(&["a"]);
    let record = flow(&here, &["a"]);
    assert_eq!(record.app.executable, file);
    let imported = import(&compiled, export(&tables, &record).as_bytes(), 0).unwrap();
    let chain = Chain::of_record(&compiled, &imported);
    for (original, redirects) in [(record.app.executable, true), (imported.app.executable, false)] {
        let original_executable = Some(original);
        let connection = HostConnection { original_executable, ..connection_to("192.0.2.1:80") };
        assert_eq!(decide(&compiled, &connection, &chain).redirects(), redirects);
    }
}

#[test]
fn a_service_that_has_had_the_flow_is_not_in_it_a_second_time() {
    let (there, tables) = host(&["gate", "one"]);
    let gate = handle(&there, "gate");
    let portable = export(&tables, &flow(&there, &["gate", "one"]));
    let imported = import(&tables, portable.as_bytes(), gate).unwrap();
    assert_eq!(hops(&imported), [(gate, 0), (handle(&there, "one"), 0)]);
    assert_eq!(imported.legs, 3, "it has had it a second time all the same");
    // A guess is no proof.
    let mut doubtful = flow(&there, &["gate", "one"]);
    doubtful.guess(0);
    let portable = export(&tables, &doubtful);
    let imported = import(&tables, portable.as_bytes(), gate).unwrap();
    assert_eq!(hops(&imported), [(gate, 0), (handle(&there, "one"), 0), (gate, 0)]);
    assert!(imported.is_guessed(0) && !imported.is_guessed(2));
}

#[test]
fn a_service_that_was_removed_is_nobody_elsewhere() {
    let (mut here, _) = host(&["one", "two"]);
    let record = flow(&here, &["one", "two"]);
    here.remove_service("one").unwrap();
    let compiled = compile(&here, 2).unwrap();
    let portable = export(&compiled, &record);
    let identities: Vec<u64> = portable.identities().collect();
    assert_eq!(identities, [NO_IDENTITY, identity("p", "two")]);
    let imported = import(&compiled, portable.as_bytes(), 0).unwrap();
    assert_eq!(hops(&imported), [(0, 0), (handle(&here, "two"), 0)]);
    assert_eq!(Chain::of_record(&compiled, &imported).strangers, 1);
}

/// Two hosts send a flow to each other, and each forgets who has had it, but for the number of legs.
#[test]
fn a_circle_of_hosts_that_forget_ends() {
    let hosts = [host(&["a", "gate"]), host(&["b", "c", "gate"])];
    let mut record = flow(&hosts[0].0, &["a"]);
    let mut legs = Vec::new();
    let error = loop {
        let (policy, tables) = &hosts[legs.len() % 2];
        let portable = export(tables, &record);
        let (_, tables) = &hosts[(legs.len() + 1) % 2];
        match import(tables, portable.as_bytes(), 0) {
            Ok(imported) => record = Record { hop_count: 0, ..imported },
            Err(error) => break error,
        }
        assert!(record.push(Hop { handle: policy.services()[0].handle, filter: 0 }));
        legs.push(record.legs);
        assert!(legs.len() < 40, "{legs:?}");
    };
    assert_eq!(error, RecordError::Endless);
    assert!(legs.is_sorted_by(|one, next| one < next), "{legs:?}");
    assert!(*legs.last().unwrap() < hop_limit(4) + 1, "{legs:?}");
}

/// The guard counts the services of all hosts that the flow has had.
#[test]
fn a_long_honest_chain_is_no_circle() {
    const NAMES: [&str; 20] = [
        "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r",
        "s", "t",
    ];
    let (here, tables) = host(&NAMES);
    let (mut there, _) = host(&["gate", "other"]);
    there.add_filter(new_filter("s", Conditions::default(), redirect("other"))).unwrap();
    let compiled = compile(&there, 1).unwrap();
    let portable = export(&tables, &flow(&here, &NAMES));
    assert!(portable.legs() > hop_limit(2));
    let gate = handle(&there, "gate");
    let imported = import(&compiled, portable.as_bytes(), gate).unwrap();
    let chain = Chain::of_record(&compiled, &imported);
    assert_eq!((chain.strangers, chain.legs), (20, 21));
    let decision = decide(&compiled, &connection_to("192.0.2.1:80"), &chain);
    assert_eq!(decision.handle, handle(&there, "other"), "{decision:?}");
    assert!(decision.redirects());
}

#[test]
fn a_full_record_is_refused() {
    let (there, tables) = host(&["gate"]);
    let mut full = flow(&there, &["gate"]);
    full.hops = [Hop { handle: 0, filter: 5 }; MAX_HOPS];
    full.hop_count = MAX_HOPS as u32 - 1;
    assert!(full.push(Hop { handle: 0, filter: 5 }));
    full.legs = MAX_HOPS as u32;
    let portable = export(&tables, &full);
    for own in [0, handle(&there, "gate")] {
        assert_eq!(import(&tables, portable.as_bytes(), own), Err(RecordError::Endless));
    }
}

#[test]
fn services_that_other_hosts_cannot_tell_apart_do_not_come_into_being() {
    // The names of two providers' services are part of what they are.
    let mut policy = policy(&[], &["a"]);
    policy.add_provider("q", "").unwrap();
    let new = new_service("b", FailurePolicy::Block);
    policy.add_service(NewService { provider: "q".into(), ..new }).unwrap();
    let compiled = compile(&policy, 1).unwrap();
    for (row, (provider, name)) in compiled.services().iter().zip([("p", "a"), ("q", "b")]) {
        assert_eq!(row.identity, identity(provider, name));
        assert_eq!(compiled.handle_of(row.identity), row.handle);
    }
    assert_eq!(compiled.handle_of(identity("p", "b")), 0);
    assert_eq!(compiled.slot_of(0), NO_SLOT);
}

#[test]
fn every_field_has_to_be_as_a_host_gives_it_out() {
    let (policy, tables) = host(&["gate", "a", "b"]);
    let good = export(&tables, &flow(&policy, &["a", "b"])).as_bytes().to_vec();
    assert!(import(&tables, &good, 0).is_ok());
    let bad: &[(usize, &[u8])] = &[
        (offset_of!(Record, magic), b"CRNT"),
        (offset_of!(Record, version), &[2]),
        (offset_of!(Record, length), &[0xff]),
        (offset_of!(Record, mac), &[1]),
        (offset_of!(Record, epoch), &[1]),
        (offset_of!(Record, issued_ns), &[1]),
        (offset_of!(Record, hop_count), &[0]),
        (offset_of!(Record, hop_count), &[1]),
        (offset_of!(Record, hop_count), &[3]),
        (offset_of!(Record, legs), &[1]),
        (offset_of!(Record, legs), &[33]),
        (offset_of!(Record, destination.family), &[3]),
        (offset_of!(Record, destination.address), &[1]),
        (offset_of!(Record, destination.zero), &[1]),
        (offset_of!(Record, app.path_length), &[1, 1]),
        (offset_of!(Record, guessed), &[4]),
        (offset_of!(Record, guessed), &[0, 0, 0, 0x80]),
        (offset_of!(Record, flags), &[16]),
    ];
    for (at, bytes) in bad {
        let mut changed = good.clone();
        changed[*at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(import(&tables, &changed, 0), Err(RecordError::Malformed), "{at} {bytes:?}");
    }
    for (at, bytes) in [(offset_of!(Record, guessed), [3]), (offset_of!(Record, flags), [15])] {
        let mut changed = good.clone();
        changed[at..=at].copy_from_slice(&bytes);
        assert!(import(&tables, &changed, 0).is_ok(), "{at}");
    }
}

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A host with some of eight services.
fn hosts() -> impl Strategy<Value = Vec<&'static str>> {
    subsequence(&NAMES[..], 1..=NAMES.len()).prop_shuffle()
}

proptest! {
    /// Between two hosts of the same services nothing changes but the numbers.
    #[test]
    fn export_and_import_give_the_same_chain(
        names in subsequence(&NAMES[..], 1..=NAMES.len()).prop_shuffle(),
        guessed: u32,
        forgotten in 0_u32..4,
    ) {
        let (here, tables) = host(&NAMES);
        let (there, other_tables) = host(&NAMES);
        let mut record = flow(&here, &names);
        for index in (0..record.hop_count).filter(|index| guessed & 1 << index != 0) {
            record.guess(index);
        }
        record.legs += forgotten;
        record.flags |= RECORD_ADOPTED;
        let imported = import(&other_tables, export(&tables, &record).as_bytes(), 0).unwrap();
        let (before, after) =
            (Chain::of_record(&tables, &record), Chain::of_record(&other_tables, &imported));
        prop_assert_eq!(after, Chain { legs: before.legs + 1, ..before });
        prop_assert_eq!(imported.guessed, record.guessed);
        prop_assert_eq!(imported.flags, record.flags | RECORD_IMPORTED);
        prop_assert_eq!(imported.destination, record.destination);
        prop_assert!(there.services().len() == NAMES.len());
    }

    /// Over any hosts, whatever services they have: who has had the flow stays known, nobody is taken for
    /// another one, who is not here is a stranger, and the legs only grow.
    #[test]
    fn over_any_hosts_everybody_stays_who_it_is(
        first in hosts(),
        others in prop::collection::vec((hosts(), any::<prop::sample::Index>()), 1..4),
    ) {
        let (policy, mut tables) = host(&first);
        let mut record = flow(&policy, &first);
        let mut had: Vec<u64> = first.iter().map(|name| identity("p", name)).collect();
        for (names, gate) in &others {
            let (policy, other_tables) = host(names);
            let gate = gate.get(names);
            let before = record.legs;
            let portable = export(&tables, &record);
            let own = handle(&policy, gate);
            let imported = import(&other_tables, portable.as_bytes(), own);
            let imported = imported.map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            if !had.contains(&identity("p", gate)) {
                had.push(identity("p", gate));
            }
            let found: Vec<u64> = export(&other_tables, &imported).identities().collect();
            prop_assert_eq!(&found, &had);
            for (hop, identity) in hops(&imported).into_iter().zip(&had) {
                let name = names.iter().find(|name| identity == &self::identity("p", name));
                let expected = name.map_or((0, *identity), |name| (handle(&policy, name), 0));
                prop_assert_eq!(hop, expected);
            }
            prop_assert_eq!(imported.legs, before + 1);
            (record, tables) = (imported, other_tables);
        }
    }

    /// What is no portable record is refused; what is one becomes a record that the host would issue.
    #[test]
    fn arbitrary_bytes_are_refused_or_become_a_sound_record(
        bytes in prop::collection::vec(any::<u8>(), 0..1000),
        changes in prop::collection::vec((0_usize..1000, any::<u8>()), 0..4),
        given in 0_usize..1000,
    ) {
        let (policy, tables) = host(&["gate", "a"]);
        prop_assert_eq!(import(&tables, &bytes, 0), Err(RecordError::Malformed));
        let portable = export(&tables, &flow(&policy, &["a"]));
        let mut changed = portable.as_bytes().to_vec();
        for (at, byte) in changes {
            let length = changed.len();
            changed[at % length] = byte;
        }
        let own = handle(&policy, "gate");
        match import(&tables, &changed, own) {
            Ok(imported) => {
                prop_assert!(imported.well_formed(imported.length.into()));
                prop_assert!(imported.legs >= imported.hop_count);
                prop_assert!(imported.legs <= MAX_HOPS as u32);
                prop_assert_eq!(imported.hops[imported.hop_count as usize - 1].handle, own);
                prop_assert!(imported.app.path_length <= 256);
                prop_assert!(PortableRecord::read(&changed).is_some());
            }
            Err(error) => prop_assert!(
                error == RecordError::Malformed || error == RecordError::Endless
            ),
        }
        if given != portable.as_bytes().len() {
            let mut cut = portable.as_bytes().to_vec();
            cut.resize(given, 0);
            prop_assert_eq!(import(&tables, &cut, own), Err(RecordError::Malformed));
        }
    }
}

//! The policy changes, and the programs are replaced, while connections are made.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use carnet_core::{
    abi::{self, FlowInfo},
    event::{Counter, Event, EventKind},
    object::{Conditions, FilterAction, NewFilter, Policy, Weight},
};
use carnet_tests::{Anything, Lab, Must as _, PATIENCE, Plan, Running, handed_on, puppet::Puppet};
use zerocopy::FromBytes as _;

/// How many waves of clients there are at most: far more than fit into [`PATIENCE`].
const MOST_WAVES: usize = 2000;

/// Has 8 clients at a time make connections, 200 in a wave, until `change` has been called
/// `times` meanwhile; gives how many connections were made.
#[track_caller]
fn under_load(lab: &Lab, times: usize, mut change: impl FnMut()) -> usize {
    let client = lab.client(lab.v4()).count(200).parallel(8).bytes(4000);
    let changed = AtomicUsize::new(0);
    // How many connections fit into the time that a change takes depends on the machine and on
    // who else is busy on it: the load goes on for as long as the changes do.
    let deadline = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let mut reports = Vec::new();
            for _wave in 0..MOST_WAVES {
                reports.extend(client.run().must("run the clients"));
                if changed.load(Ordering::Acquire) >= times {
                    return reports;
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            panic!("only {} changes under load", changed.load(Ordering::Acquire))
        });
        while !clients.is_finished() {
            change();
            changed.fetch_add(1, Ordering::Release);
        }
        let reports = clients.join().expect("the clients' thread");
        let failed: Vec<_> = reports.iter().filter(|report| !report.ok).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        reports.len()
    })
}

/// Lets every service see every connection, in the order of its place in `order`.
fn redirect_in_order(policy: &mut Policy, order: [&str; 2]) -> Result<(), Anything> {
    let old: Vec<_> = policy.filters().iter().map(|filter| filter.id.to_string()).collect();
    for filter in old {
        policy.remove_filter(&filter)?;
    }
    for (sublayer, service) in ["heavy", "light"].into_iter().zip(order) {
        policy.add_filter(NewFilter {
            name: None,
            sublayer: sublayer.into(),
            weight: Weight::Auto,
            conditions: Conditions::default(),
            action: FilterAction::Redirect { service: service.into(), context: None },
        })?;
    }
    Ok(())
}

/// The order of two services is turned round under load: every connection is decided by one version
/// of the policy, so every flow passes both services, each once.
#[test]
fn every_connection_is_decided_by_one_version_of_the_policy() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    lab.change(|policy| {
        policy.add_sublayer("heavy", "alpha", 2)?;
        policy.add_sublayer("light", "alpha", 1)?;
        redirect_in_order(policy, ["alpha", "bravo"])
    });
    let engine = lab.engine();
    let generation = || engine.status().must("ask for the status").generation;
    let mut first_of = BTreeMap::from([(generation(), "alpha")]);
    let mut trace = lab.trace();
    let mut turned = false;
    let mut change = || {
        turned = !turned;
        let order = if turned { ["bravo", "alpha"] } else { ["alpha", "bravo"] };
        lab.change(|policy| redirect_in_order(policy, order));
        first_of.insert(generation(), order[0]);
    };
    let count = thread::scope(|scope| {
        let load = scope.spawn(|| under_load(&lab, 12, &mut change));
        // A change can take long on a busy machine: the events are read meanwhile.
        trace.collect_while(|| !load.is_finished());
        load.join().expect("the load's thread")
    });
    lab.settle();
    trace.drain();

    let reports: Vec<_> = services.into_iter().map(Running::finish).collect();
    let flows: BTreeSet<_> = reports[0].iter().map(|report| report.flow).collect();
    assert_eq!(flows.len(), count);
    for of_service in &reports {
        assert_eq!(of_service.len(), count);
        assert_eq!(of_service.iter().map(|report| report.flow).collect::<BTreeSet<_>>(), flows);
    }
    assert_eq!(lab.counter(Counter::Redirected), 2 * count as u64);
    assert_eq!(lab.counter(Counter::Onward), count as u64);

    // The first leg went where the generation that decided it sends it.
    assert_eq!(lab.counter(Counter::EventsLost), 0);
    let is_first = |event: &&Event| event.kind == EventKind::Redirected as u32 && event.hops == 1;
    let first: Vec<_> = trace.drain().iter().filter(is_first).collect();
    assert_eq!(first.len(), count);
    for event in first {
        let service = first_of.get(&event.generation).expect("a generation that there was");
        assert_eq!(event.handle, lab.handle_of(service), "{event:#?}");
    }
    let generations: BTreeSet<_> = trace.drain().iter().map(|event| event.generation).collect();
    assert!(generations.len() > 3, "{generations:?}");
}

/// A service comes and goes: each flow passes it or not, and arrives.
#[test]
fn filters_come_and_go_under_load() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let bravo = lab.policy().filter("bravo").must("find the filter").clone();
    let again = || NewFilter {
        name: bravo.name.clone(),
        sublayer: bravo.sublayer.clone(),
        weight: bravo.weight,
        conditions: bravo.conditions.clone(),
        action: bravo.action.clone(),
    };
    let mut present = true;
    let count = under_load(&lab, 12, || {
        present = !present;
        lab.change(|policy| {
            if present {
                policy.add_filter(again())?;
            } else {
                policy.remove_filter("bravo")?;
            }
            Ok(())
        });
    });
    lab.settle();
    let [alpha, bravo] = &services.into_iter().map(Running::finish).collect::<Vec<_>>()[..] else {
        panic!("two services")
    };
    let flows = |reports: &[carnet_tests::Report]| -> BTreeSet<u64> {
        reports.iter().map(|report| report.flow).collect()
    };
    assert_eq!((alpha.len(), flows(alpha).len()), (count, count));
    assert_eq!(flows(bravo).len(), bravo.len());
    assert!(flows(bravo).is_subset(&flows(alpha)));
    assert!(alpha.iter().all(|report| report.hops == 1));
    assert!(bravo.iter().all(|report| report.hops == 2));
    assert_eq!(lab.counter(Counter::Onward), count as u64);
    assert_eq!(lab.counter(Counter::Passed), 0);
}

#[test]
fn an_upgrade_under_load_loses_nothing() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let mut engine = lab.engine();
    let before = engine.status().must("ask for the status");
    let count = under_load(&lab, 2, || {
        engine.upgrade().must("upgrade");
    });
    lab.settle();
    let after = engine.status().must("ask for the status");
    assert_eq!(after.epoch, before.epoch);
    assert_eq!(after.generation, before.generation);
    let handles = ["alpha", "bravo"].map(|name| lab.handle_of(name));
    let chain: Vec<_> =
        handles.into_iter().zip(services.into_iter().map(Running::finish)).collect();
    handed_on(&chain, count);
    // And the new programs are there to stay.
    let services = ["alpha", "bravo"].map(|name| lab.start(name));
    lab.exchange(lab.v4());
    drop(services);
}

#[test]
fn two_hundred_clients_at_a_time_through_two_services() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let client = lab.client(lab.v4()).count(400).parallel(200).bytes(50_000);
    let reports = client.run().must("run the clients");
    let failed: Vec<_> = reports.iter().filter(|report| !report.ok).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    lab.settle();
    let handles = ["alpha", "bravo"].map(|name| lab.handle_of(name));
    let chain: Vec<_> =
        handles.into_iter().zip(services.into_iter().map(Running::finish)).collect();
    handed_on(&chain, 400);
    let finished =
        lab.network().echo().wait_for_finished(400, PATIENCE).must("see all connections end");
    assert_eq!(finished.len(), 400);
    assert!(finished.iter().all(|connection| connection.received == 50_000));
    assert_eq!(lab.counter(Counter::HandoverFailed), 0);
}

#[test]
fn a_flow_goes_on_under_the_policy_that_it_met() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let client = lab.puppet();
    let connection = client.connect(lab.v4()).must("connect");
    let word = |connection: &carnet_tests::puppet::Hand<'_>| {
        connection.send(b"word").must("send");
        assert_eq!(connection.receive(4), Ok(b"word".to_vec()));
    };
    word(&connection);
    // All gone, filters, services and all: what is established stays (contract C42).
    lab.change(|policy| {
        for name in ["alpha", "bravo"] {
            policy.remove_filter(name)?;
            policy.remove_service(name)?;
        }
        Ok(())
    });
    word(&connection);
    let direct = client.connect(lab.v4()).must("connect");
    word(&direct);
    assert_eq!(lab.counter(Counter::Passed), 1);
    drop((connection, direct));
    lab.settle();
    drop(services);
}

/// To which service a process belongs is asked anew under each policy, whatever was found before.
#[test]
fn a_process_whose_cgroup_becomes_a_services_is_of_that_service() {
    let lab = Lab::new();
    let alpha = lab.start_chain(&["alpha"]);
    let parent = Arc::new(lab.apps().child("parent").must("make a cgroup"));
    let nested = parent.child("nested").must("make a cgroup");
    let process = Puppet::start(&lab.network().topology.client, &nested, None);
    for name in ["bravo", "charlie"] {
        // Nobody's, and more than once.
        for _ in 0..2 {
            drop(process.connect(lab.v4()).must("connect"));
        }
        lab.service_in(name, Arc::clone(&parent), Plan::default());
        let listener = process.serve((Ipv4Addr::LOCALHOST, 0).into());
        let client = lab.puppet();
        let connection = client.connect(lab.v4()).must("connect");
        let accepted = listener.accept().must("accept");
        let answer = accepted.query(abi::FLOW).must("ask for the flow");
        let flow = FlowInfo::read_from_bytes(&answer).expect("40 bytes");
        assert_eq!(flow.handle, lab.handle_of(name));
        drop((connection, accepted, listener));
        lab.change(|policy| {
            policy.remove_filter(name)?;
            policy.remove_service(name)?;
            Ok(())
        });
    }
    drop(process);
    lab.settle();
    drop(alpha);
}

#[test]
fn a_transaction_that_fails_changes_nothing() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let before = (lab.policy(), lab.engine().status().must("ask for the status").generation);
    let mut engine = lab.engine();
    let result = engine.transact(|policy| {
        policy.remove_filter("alpha")?;
        policy.remove_service("alpha")?;
        Err::<(), Anything>("never mind".into())
    });
    assert_eq!(result.expect_err("an error").to_string(), "never mind");
    let after = (lab.policy(), lab.engine().status().must("ask for the status").generation);
    assert_eq!(before, after);
    assert_eq!(lab.refused(lab.v4()), "ECONNREFUSED");
}

//! The redirect states, and that every flow ends.

use carnet_core::{
    chain::{Chain, RedirectState, hop_limit},
    classify::{Reason, Unobserved, classify},
    compile::{CompiledPolicy, compile},
    explain::{Process, explain},
    object::{Conditions, NewFilter, Policy, Trust, Weight},
    table::Tables as _,
};
use proptest::prelude::*;

use crate::support::{
    Host, connection_to, connections, new_filter, policies, policy, record, redirect,
};

const NAMES: [&str; 10] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];

/// All orders of all subsets of `items`.
fn arrangements(items: &[u64]) -> Vec<Vec<u64>> {
    let mut all = vec![Vec::new()];
    for (at, first) in items.iter().enumerate() {
        let mut rest = items.to_vec();
        rest.remove(at);
        for mut arrangement in arrangements(&rest) {
            arrangement.insert(0, *first);
            all.push(arrangement);
        }
    }
    all
}

/// A policy of `count` services that get everything, in the order `order` (a service's number for
/// each turn), where `trusts` holds for each service the set of those that it trusts.
fn everything_to_everyone(count: usize, order: &[usize], trusts: &[usize]) -> Policy {
    let mut policy = policy(&[("s", 0)], &NAMES[..count]);
    for (at, service) in order.iter().enumerate() {
        let weight = Weight::Exact(100 - at as u64);
        let filter = new_filter("s", Conditions::default(), redirect(NAMES[*service]));
        policy.add_filter(NewFilter { weight, ..filter }).unwrap();
    }
    for (at, trusts) in trusts.iter().enumerate() {
        let names = (0..count).filter(|other| trusts & 1 << other != 0 && *other != at);
        let names = names.map(|other| NAMES[other].into()).collect();
        policy.set_trust(NAMES[at], Trust::Services(names)).unwrap();
    }
    policy
}

/// Follows a flow whose services all set the record; gives the numbers of the services that it
/// met, after checking that it ended well.
fn follow(policy: &Policy, compiled: &CompiledPolicy) -> Vec<usize> {
    let connection = connection_to("192.0.2.1:80");
    let legs = explain(policy, compiled, &connection, &|_, _| true, &|_, _| Process::default());
    let (last, redirected) = legs.split_last().unwrap();
    assert!(!last.decision.redirects() && !last.decision.blocks());
    let slots = redirected.iter().map(|leg| leg.decision.slot as usize);
    slots.collect()
}

#[test]
fn the_state_is_that_of_the_rule_over_lists_for_all_records_of_four_handles() {
    for count in 0..=4 {
        let policy = everything_to_everyone(count, &[], &[]);
        let compiled = compile(&policy, 1).unwrap();
        // One handle more than the policy has: a service that was removed.
        let mut handles: Vec<u64> = policy.services().iter().map(|s| s.handle).collect();
        handles.push(u64::MAX);
        for list in arrangements(&handles) {
            let chain = Chain::of_record(&compiled, &record(&list, list.len() as u32));
            assert_eq!(chain.hops as usize, list.len());
            for me in policy.services().iter().map(|s| s.handle) {
                // C10, word by word.
                let expected = if list.is_empty() {
                    RedirectState::NotRedirected
                } else if list.last() == Some(&me) {
                    RedirectState::RedirectedBySelf
                } else if list.contains(&me) {
                    RedirectState::PreviouslyRedirectedBySelf
                } else {
                    RedirectState::RedirectedByOther
                };
                assert_eq!(chain.state(compiled.slot_of(me)), expected, "{me} in {list:?}");
            }
        }
    }
}

#[test]
fn a_service_stands_aside_only_where_it_trusts_everyone_before_it() {
    for mask in 0..8_usize {
        // Service d, number 3, trusts the set `mask` of a, b and c.
        let policy = everything_to_everyone(4, &[], &[0, 0, 0, mask]);
        let compiled = compile(&policy, 1).unwrap();
        let handles: Vec<u64> = policy.services().iter().map(|s| s.handle).collect();
        let mut others = handles[..3].to_vec();
        others.push(u64::MAX);
        for list in arrangements(&others) {
            let chain = Chain::of_record(&compiled, &record(&list, list.len() as u32));
            let trusted = |handle: &u64| {
                handles.iter().position(|h| h == handle).is_some_and(|n| mask & 1 << n != 0)
            };
            let expected = list.is_empty() || !list.iter().all(trusted);
            let service = compiled.service(3).unwrap();
            assert_eq!(chain.may_redirect(3, service), expected, "{mask:03b} {list:?}");
        }
    }
}

/// All records of four handles, each hop certain or guessed; the service co-operates or is unmodified.
#[test]
fn a_guess_stops_only_a_service_that_is_unmodified() {
    for (mask, unmodified) in (0..8_usize).flat_map(|mask| [(mask, false), (mask, true)]) {
        // Service d trusts the set `mask` of a, b and c.
        let mut policy = everything_to_everyone(4, &[], &[0, 0, 0, mask]);
        let handles: Vec<u64> = policy.services().iter().map(|s| s.handle).collect();
        let name = policy.services()[3].name.clone();
        policy.set_unmodified(&name, unmodified).unwrap();
        let compiled = compile(&policy, 1).unwrap();
        let service = compiled.service(3).unwrap();
        for list in arrangements(&handles) {
            for guessed in 0..1_u32 << list.len() {
                let mut record = record(&list, list.len() as u32);
                let is_guessed = |index: usize| guessed >> index & 1 != 0;
                (0..list.len()).filter(|i| is_guessed(*i)).for_each(|i| record.guess(i as u32));
                let own = list.iter().position(|handle| *handle == handles[3]);
                let trusted = |handle: &u64| {
                    let number = handles.iter().position(|h| h == handle);
                    number.is_some_and(|n| n == 3 || mask & 1 << n != 0)
                };
                let stands_aside = !list.is_empty() && list.iter().all(trusted);
                let expected = match own {
                    None => !stands_aside,
                    Some(index) => is_guessed(index) && !unmodified && !stands_aside,
                };
                let found = Chain::of_record(&compiled, &record).may_redirect(3, service);
                assert_eq!(found, expected, "{mask:03b} {unmodified} {list:?} {guessed:04b}");
            }
        }
    }
}

#[test]
fn where_nobody_trusts_every_flow_meets_every_service_once_in_the_operators_order() {
    for count in 0..=4_usize {
        let numbers: Vec<u64> = (0..count as u64).collect();
        for order in arrangements(&numbers) {
            let order: Vec<usize> = order.into_iter().map(|n| n as usize).collect();
            let policy = everything_to_everyone(count, &order, &[]);
            assert_eq!(follow(&policy, &compile(&policy, 1).unwrap()), order);
        }
    }
}

#[test]
fn whoever_trusts_whom_no_flow_meets_a_service_twice() {
    for count in 1..=4_usize {
        let order: Vec<usize> = (0..count).collect();
        for masks in 0..1_usize << (count * count) {
            let trusts: Vec<usize> =
                (0..count).map(|n| masks >> (n * count) & ((1 << count) - 1)).collect();
            // A service's trust in itself says nothing.
            if trusts.iter().enumerate().any(|(n, trusts)| trusts & 1 << n != 0) {
                continue;
            }
            let policy = everything_to_everyone(count, &order, &trusts);
            let met = follow(&policy, &compile(&policy, 1).unwrap());
            // The first leg is nobody's work, so the heaviest service always gets it. Each later
            // one gets the flow unless it trusts all before it: checked here by a model of its own.
            let mut expected: Vec<usize> = Vec::new();
            loop {
                let next = order.iter().find(|service| {
                    let trusts = |before: &usize| trusts[**service] & 1 << before != 0;
                    !expected.contains(service)
                        && (expected.is_empty() || !expected.iter().all(trusts))
                });
                match next {
                    Some(service) => expected.push(*service),
                    None => break,
                }
            }
            assert_eq!(met, expected, "trust {trusts:?}");
        }
    }
}

#[test]
fn services_that_forget_the_record_are_ended_by_the_hop_limit() {
    for count in 1..=10 {
        let order: Vec<usize> = (0..count).collect();
        let policy = everything_to_everyone(count, &order, &[]);
        let compiled = compile(&policy, 1).unwrap();
        let connection = connection_to("192.0.2.1:80");
        for forgetful in 1..count.pow(2).min(1 << count) {
            let forgets = |slot: u32| forgetful & 1 << slot != 0;
            let mut handles = Vec::new();
            let mut legs = 0;
            let last = loop {
                let record = record(&handles, if handles.is_empty() { 0 } else { legs });
                let chain = Chain::of_record(&compiled, &record);
                let mut host = Host { live: &|_| true, forgotten_legs: legs };
                let decision = classify(&compiled, &connection, &chain, &mut host, &mut Unobserved);
                if !decision.redirects() {
                    break decision;
                }
                assert_eq!(decision.legs, legs);
                legs += 1;
                assert!(legs <= hop_limit(count as u32));
                handles.push(decision.handle);
                if forgets(decision.slot) {
                    handles.clear();
                }
            };
            assert_eq!((last.reason, last.blocks()), (Reason::Loop, true), "{forgetful:b}");
            assert_eq!(legs, hop_limit(count as u32));
        }
    }
}

#[test]
fn the_hop_limit_leaves_room_for_every_service_that_a_record_can_hold() {
    assert_eq!([0, 1, 8, 23, 24, 25, 32].map(hop_limit), [8, 9, 16, 31, 32, 32, 32]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_flow_of_every_policy_ends_and_meets_no_service_twice(
        policy in policies(),
        connection in connections(),
        alive: u8,
    ) {
        let compiled = compile(&policy, 1).unwrap();
        let live = |handle, _| {
            let at = policy.services().iter().position(|s| s.handle == handle);
            at.is_some_and(|at| alive & 1 << at != 0)
        };
        let process = connection.process.clone();
        let legs = explain(&policy, &compiled, &connection, &live, &|_, _| process.clone());
        prop_assert!(legs.len() <= policy.services().len() + 1);
        let redirects = legs.iter().filter(|leg| leg.decision.redirects());
        let mut met: Vec<u64> = redirects.map(|leg| leg.decision.handle).collect();
        prop_assert_eq!(met.len() + 1, legs.len());
        met.sort_unstable();
        prop_assert!(met.is_sorted_by(|a, b| a < b));
        prop_assert!(legs.iter().all(|leg| leg.decision.reason != Reason::Loop));
    }
}

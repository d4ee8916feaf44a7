//! The decision against a naive model of it.
//!
//! The model is written from the contract (C5..C10, C20, C26, C44..C47) and from the documented
//! rules of trust, failure and the hop guard. It reads the administrator's objects: there are no
//! rows, no tree and no slots, and it shares no code with the core but the automatic weights.

use std::{cmp::Reverse, net::SocketAddr};

use carnet_core::{
    arbitration::Verdict,
    chain::Chain,
    classify::{Reason, Unobserved, classify},
    compile::compile,
    explain::HostConnection,
    object::{Conditions, FailurePolicy, Filter, FilterAction, Policy, Prefix, Service, Trust},
};
use proptest::prelude::*;

use crate::support::{Host, check_bounds, connections, policies, record};

/// What happens to a connection, in words of the contract.
#[derive(Debug, PartialEq)]
struct Expected {
    verdict: Verdict,
    reason: Reason,
    /// The service that gets the connection.
    redirected_to: Option<u64>,
    /// The service that gets it, is missing, or would have had it once too often.
    concerned: u64,
    filter: u64,
    passed_over: Vec<u64>,
}

/// The record of a flow: handles, newest last (C10); and how many legs it has made.
#[derive(Clone, Debug)]
struct History {
    handles: Vec<u64>,
    legs: u32,
    forgotten_legs: u32,
}

/// A service counts as dead when the connection would be sent to it and it has no listener.
fn reference(
    policy: &Policy,
    connection: &HostConnection,
    history: &History,
    live: &dyn Fn(u64) -> bool,
) -> Expected {
    let mut dead = Vec::new();
    let mut expected = loop {
        let expected = arbitrate(policy, connection, history, &dead);
        match expected.redirected_to {
            Some(handle) if !live(handle) => dead.push(handle),
            _ => break expected,
        }
    };
    if expected.redirected_to.is_some() {
        let forgotten = if history.handles.is_empty() { history.forgotten_legs } else { 0 };
        let limit = (policy.services().len() + 8).min(32);
        if history.legs.max(forgotten) as usize >= limit {
            expected.redirected_to = None;
            expected.verdict = Verdict::HardBlock;
            expected.reason = Reason::Loop;
        }
    }
    expected
}

/// What the sublayers say together if just the services in `dead` have no listener.
fn arbitrate(
    policy: &Policy,
    connection: &HostConnection,
    history: &History,
    dead: &[u64],
) -> Expected {
    let mut expected = Expected {
        verdict: Verdict::None,
        reason: Reason::NoFilter,
        redirected_to: None,
        concerned: 0,
        filter: 0,
        passed_over: Vec::new(),
    };
    let mut redirecting_filter = 0;

    // C44: the heaviest sublayer first, in it the heaviest filter first.
    let mut sublayers: Vec<_> = policy.sublayers().iter().collect();
    sublayers.sort_by_key(|sublayer| (Reverse(sublayer.weight), sublayer.id));
    for sublayer in sublayers {
        let mut filters: Vec<&Filter> =
            policy.filters().iter().filter(|filter| filter.sublayer == sublayer.name).collect();
        filters.sort_by_key(|filter| (Reverse(filter.effective_weight()), filter.id));
        for filter in filters {
            if !matches(&filter.conditions, connection) {
                continue;
            }
            let mut reason = Reason::Filter;
            let earlier = expected.verdict;
            let verdict = match &filter.action {
                FilterAction::Permit { hard } => after_permit(earlier, *hard),
                FilterAction::Block { hard, veto } => after_block(earlier, *hard, *veto),
                FilterAction::Redirect { service, .. } => {
                    let service = policy.service(service).unwrap();
                    // C26: the matter is closed.
                    if matches!(earlier, Verdict::HardPermit | Verdict::HardBlock) {
                        continue;
                    }
                    if !wants(policy, service, &history.handles) {
                        continue;
                    }
                    if expected.redirected_to.is_some() {
                        // C20: another one has it; permit.
                        after_permit(earlier, false)
                    } else if !dead.contains(&service.handle) {
                        expected.redirected_to = Some(service.handle);
                        expected.concerned = service.handle;
                        redirecting_filter = filter.id;
                        after_permit(earlier, false)
                    } else if service.on_failure == FailurePolicy::Skip {
                        if !expected.passed_over.contains(&service.handle) {
                            expected.passed_over.push(service.handle);
                        }
                        continue;
                    } else {
                        expected.concerned = service.handle;
                        reason = Reason::ServiceUnavailable;
                        Verdict::HardBlock
                    }
                }
            };
            if verdict != earlier {
                expected.verdict = verdict;
                expected.reason = reason;
                expected.filter = filter.id;
            }
            // C44: a sublayer ends with its first decision; the next is evaluated nevertheless.
            break;
        }
    }

    if matches!(expected.verdict, Verdict::SoftBlock | Verdict::HardBlock) {
        if expected.redirected_to.take().is_some() {
            expected.concerned = 0;
        }
    } else if expected.redirected_to.is_some() {
        expected.filter = redirecting_filter;
    }
    expected.passed_over.sort_unstable();
    expected
}

/// The rows "none", "soft permit", … of C45's table, column "later permit".
fn after_permit(earlier: Verdict, hard: bool) -> Verdict {
    match (earlier, hard) {
        (Verdict::HardBlock, _) => Verdict::HardBlock,
        (Verdict::HardPermit, _) | (_, true) => Verdict::HardPermit,
        (_, false) => Verdict::SoftPermit,
    }
}

/// Column "later block".
fn after_block(earlier: Verdict, hard: bool, veto: bool) -> Verdict {
    match (earlier, hard, veto) {
        (_, _, true) | (Verdict::HardBlock, ..) => Verdict::HardBlock,
        (Verdict::HardPermit, ..) => Verdict::HardPermit,
        (_, true, _) => Verdict::HardBlock,
        (_, false, _) => Verdict::SoftBlock,
    }
}

/// Whether the state of the record, and the service's trust, let it redirect (C5..C10).
fn wants(policy: &Policy, me: &Service, handles: &[u64]) -> bool {
    if handles.is_empty() {
        return true;
    }
    if handles.contains(&me.handle) {
        return false;
    }
    match &me.trust {
        Trust::None => true,
        Trust::All => false,
        Trust::Services(names) => !handles.iter().all(|handle| {
            policy.services().iter().any(|s| s.handle == *handle && names.contains(&s.name))
        }),
    }
}

fn matches(conditions: &Conditions, connection: &HostConnection) -> bool {
    fn any<T>(values: &[T], test: impl Fn(&T) -> bool) -> bool {
        values.is_empty() || values.iter().any(test)
    }
    let process = &connection.process;
    let user = process.user.unwrap();
    let port = connection.destination.port;
    any(&conditions.protocols, |p| p.0 == connection.protocol)
        && any(&conditions.destinations, |prefix| contains(prefix, connection))
        && any(&conditions.ports, |ports| ports.first() <= port && port <= ports.last())
        && any(&conditions.users, |users| users.first() <= user && user <= users.last())
        && any(&conditions.cgroups, |cgroup| {
            process.cgroups.as_ref().unwrap().get(cgroup.level as usize) == Some(&cgroup.id)
        })
        && any(&conditions.executables, |e| process.executable == Some(e.file))
        && any(&conditions.original_executables, |e| connection.original_executable == Some(e.file))
        && any(&conditions.network_namespaces, |n| process.network_namespace == Some(n.cookie))
}

fn contains(prefix: &Prefix, connection: &HostConnection) -> bool {
    use std::net::IpAddr::{V4, V6};
    let length = u32::from(prefix.length());
    let ip = SocketAddr::from(connection.destination).ip().to_canonical();
    let differing = match (prefix.address(), ip) {
        (V4(network), V4(ip)) => 32 - (network.to_bits() ^ ip.to_bits()).leading_zeros().min(32),
        (V6(network), V6(ip)) => 128 - (network.to_bits() ^ ip.to_bits()).leading_zeros(),
        _ => return false,
    };
    let width = if ip.is_ipv4() { 32 } else { 128 };
    differing <= width - length
}

/// Handles of the policy's services, by their number in it, and some that it does not have.
fn history(policy: &Policy, picks: &[usize], extra_legs: u32, forgotten_legs: u32) -> History {
    let handle = |pick: &usize| {
        policy.services().get(*pick).map_or(1 << 40 | *pick as u64, |service| service.handle)
    };
    let handles: Vec<u64> = picks.iter().map(handle).collect();
    let legs = handles.len() as u32 + extra_legs;
    History { handles, legs, forgotten_legs }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn the_decision_is_that_of_the_reference_model(
        policy in policies(),
        questions in prop::collection::vec(
            (
                connections(),
                prop::collection::vec(0_usize..9, 0..6),
                prop_oneof![3 => Just(0_u32), 1 => 0_u32..18],
                prop_oneof![2 => Just(0_u32), 1 => 0_u32..18],
                prop_oneof![Just(u8::MAX), any::<u8>()],
            ),
            24,
        ),
    ) {
        let compiled = compile(&policy, 1).unwrap();
        check_bounds(&compiled);
        for (connection, picks, extra_legs, forgotten_legs, alive) in questions {
            let history = history(&policy, &picks, extra_legs, forgotten_legs);
            let live = |handle| {
                let at = policy.services().iter().position(|s| s.handle == handle);
                alive & 1 << at.unwrap() != 0
            };
            let expected = reference(&policy, &connection, &history, &live);

            let record = record(&history.handles, history.legs);
            let chain = Chain::of_record(&compiled, &record);
            let mut host = Host { live: &live, forgotten_legs };
            let decision = classify(&compiled, &connection, &chain, &mut host, &mut Unobserved);
            let handle_in = |slot: usize| policy.services()[slot].handle;
            let redirected_to = decision.redirects().then(|| handle_in(decision.slot as usize));
            let skipped = (0..64).filter(|slot| decision.skipped & 1 << slot != 0).map(handle_in);
            let given = Expected {
                verdict: decision.verdict,
                reason: decision.reason,
                redirected_to,
                concerned: decision.handle,
                filter: decision.filter,
                passed_over: skipped.collect(),
            };
            prop_assert_eq!(given, expected, "{:?} after {:?}", connection, history);
        }
    }
}

//! A naive model of the decision, and random cases to ask it and others about.
//!
//! The model is written from the contract (C5..C10, C20, C26, C44..C47) and from the documented
//! rules of trust, failure, groups and the hop guard. It reads the administrator's objects: there are
//! no rows, no tree and no slots, and it shares no code with the core but the automatic weights.
//!
//! Three tests compare with it: carnet-core's own (the decision function over the host's tables),
//! the differential test in `tests/` (the kernel's decisions through real sockets), and the fuzz
//! target `decision`. Nothing that is shipped depends on it.

#![expect(
    clippy::unwrap_used,
    reason = "cases that the model cannot read are mistakes of its user"
)]

pub mod generate;

use std::{cmp::Reverse, net::SocketAddr};

use carnet_core::{
    Decision,
    arbitration::Verdict,
    classify::Reason,
    explain::HostConnection,
    object::{Conditions, FailurePolicy, Filter, FilterAction, Policy, Prefix, Service, Trust},
};

/// What happens to a connection, in words of the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the sublayers say together.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The service that gets the connection, by redirect handle.
    pub redirected_to: Option<u64>,
    /// The service that gets it, is missing, or would have had it once too often; else 0.
    pub concerned: u64,
    /// The filter that redirects; if none does, the one that brought the verdict, else 0.
    pub filter: u64,
    /// The services that were passed over because they had no live listener, by handle, sorted.
    pub passed_over: Vec<u64>,
}

/// The record of a flow: handles, newest last (C10); and how many legs it has made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The services that had the flow, the newest last.
    pub handles: Vec<u64>,
    /// Redirected legs that the record counts: never less than there are handles.
    pub legs: u32,
    /// Legs of a connection without a record, as far as the hop guard knows them.
    pub forgotten_legs: u32,
}

impl Answer {
    /// What the core decided, in the same words.
    pub fn of_core(policy: &Policy, decision: &Decision) -> Self {
        let handle_in = |slot: usize| policy.services()[slot].handle;
        let mut passed_over: Vec<_> =
            (0..64).filter(|slot| decision.skipped & 1 << slot != 0).map(handle_in).collect();
        passed_over.sort_unstable();
        Self {
            verdict: decision.verdict,
            reason: decision.reason,
            redirected_to: decision.redirects().then(|| handle_in(decision.slot as usize)),
            concerned: decision.handle,
            filter: decision.filter,
            passed_over,
        }
    }

    /// Whether the connection is refused.
    pub fn blocks(&self) -> bool {
        matches!(self.verdict, Verdict::SoftBlock | Verdict::HardBlock)
    }
}

/// What happens to `connection` under `policy` after `history`. All fields of the process are known.
///
/// A service counts as dead when the connection would be sent to it and `live` says that it has no
/// listener.
pub fn answer(
    policy: &Policy,
    connection: &HostConnection,
    history: &History,
    live: &dyn Fn(u64) -> bool,
) -> Answer {
    let mut dead = Vec::new();
    let mut answer = loop {
        let answer = arbitrate(policy, connection, history, &dead);
        match answer.redirected_to {
            Some(handle) if !live(handle) => dead.push(handle),
            _ => break answer,
        }
    };
    if answer.redirected_to.is_some() && legs(history) as usize >= hop_limit(policy, history) {
        answer.redirected_to = None;
        answer.verdict = Verdict::HardBlock;
        answer.reason = Reason::Loop;
    }
    answer
}

/// Redirected legs that a flow has made (C11).
pub fn legs(history: &History) -> u32 {
    let forgotten = if history.handles.is_empty() { history.forgotten_legs } else { 0 };
    history.legs.max(forgotten)
}

/// Every service may have a flow once: those of the policy, and those of the record that it does not have.
fn hop_limit(policy: &Policy, history: &History) -> usize {
    let is_stranger = |handle: &&u64| policy.services().iter().all(|s| s.handle != **handle);
    let strangers = history.handles.iter().filter(is_stranger).count();
    (policy.services().len() + strangers + 8).min(32)
}

/// What the sublayers say together if just the services in `dead` have no listener.
fn arbitrate(
    policy: &Policy,
    connection: &HostConnection,
    history: &History,
    dead: &[u64],
) -> Answer {
    let mut answer = Answer {
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
            let earlier = answer.verdict;
            let verdict = match &filter.action {
                FilterAction::Permit { hard } => after_permit(earlier, *hard),
                FilterAction::Block { hard, veto } => after_block(earlier, *hard, *veto),
                FilterAction::Redirect { service, .. } => {
                    let service = policy.service(service).unwrap();
                    // C26: the matter is closed.
                    if matches!(earlier, Verdict::HardPermit | Verdict::HardBlock) {
                        continue;
                    }
                    if is_for_many(connection) || !wants(policy, service, &history.handles) {
                        continue;
                    }
                    if answer.redirected_to.is_some() {
                        // C20: another one has it; permit.
                        after_permit(earlier, false)
                    } else if !dead.contains(&service.handle) {
                        answer.redirected_to = Some(service.handle);
                        answer.concerned = service.handle;
                        redirecting_filter = filter.id;
                        after_permit(earlier, false)
                    } else if service.on_failure == FailurePolicy::Skip {
                        if !answer.passed_over.contains(&service.handle) {
                            answer.passed_over.push(service.handle);
                        }
                        continue;
                    } else {
                        answer.concerned = service.handle;
                        reason = Reason::ServiceUnavailable;
                        Verdict::HardBlock
                    }
                }
            };
            if verdict != earlier {
                answer.verdict = verdict;
                answer.reason = reason;
                answer.filter = filter.id;
            }
            // C44: a sublayer ends with its first decision; the next is evaluated nevertheless.
            break;
        }
    }

    if answer.blocks() {
        if answer.redirected_to.take().is_some() {
            answer.concerned = 0;
        }
    } else if answer.redirected_to.is_some() {
        answer.filter = redirecting_filter;
    }
    answer.passed_over.sort_unstable();
    answer
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

/// Whether it is a datagram to many receivers, for whom no service can stand.
fn is_for_many(connection: &HostConnection) -> bool {
    let ip = SocketAddr::from(connection.destination).ip().to_canonical();
    let broadcast = std::net::IpAddr::from([255; 4]);
    connection.protocol != 6 && (ip.is_multicast() || ip == broadcast)
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

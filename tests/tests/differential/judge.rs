//! What was seen of a case, in words of the decision, and whether all three agree.

use std::{fmt, net::SocketAddr};

use carnet_core::{
    abi::errno,
    arbitration::Verdict,
    classify::Reason,
    event::Event,
    object::{FilterAction, Policy},
    record::Record,
};
use carnet_reference::Answer;
use carnet_tests::caller::{Arrival, Outcome};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::{
    case::{Case, Expected},
    stage::Stage,
};

/// What the callers, the services and the engine's events tell of a case.
pub(crate) struct Evidence {
    pub(crate) outcome: Outcome,
    pub(crate) event: Option<Event>,
    pub(crate) arrival: Option<Arrival>,
}

/// What becomes of a connection, as it can be seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    Passes,
    Blocked,
    ServiceUnavailable,
    Loop,
    Redirected(u64),
}

/// A decision, as far as it can be seen: `None` is for what nothing tells.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    fate: Fate,
    concerned: Option<u64>,
    filter: Option<u64>,
    passed_over: Option<Vec<u64>>,
}

/// A case that has been carried out.
pub(crate) struct Judged {
    pub(crate) expected: Expected,
    pub(crate) kernel: Option<Seen>,
    /// What is wrong, in words.
    pub(crate) problem: Option<String>,
}

impl Judged {
    pub(crate) fn agrees(&self) -> bool {
        self.problem.is_none()
    }
}

/// What becomes of a connection by an answer.
pub(crate) fn fate(answer: &Answer) -> Fate {
    match (answer.redirected_to, answer.blocks(), answer.reason) {
        (Some(handle), ..) => Fate::Redirected(handle),
        (None, false, _) => Fate::Passes,
        (None, true, Reason::Loop) => Fate::Loop,
        (None, true, Reason::ServiceUnavailable) => Fate::ServiceUnavailable,
        (None, true, _) => Fate::Blocked,
    }
}

pub(crate) fn judge(stage: &Stage, case: &Case, expected: Expected, evidence: Evidence) -> Judged {
    let (kernel, mut problem) = match read(stage, case, &expected, &evidence) {
        Ok(seen) => (Some(seen), None),
        Err(problem) => (None, Some(problem)),
    };
    let legs_matter = matches!(fate(&expected.core), Fate::Redirected(_) | Fate::Loop);
    if expected.core != expected.reference {
        problem = Some("the core and the reference differ".into());
    } else if legs_matter && expected.core_legs != expected.legs {
        problem = Some(format!(
            "the core counts {} legs, the reference {}",
            expected.core_legs, expected.legs
        ));
    } else if let Some(seen) = &kernel
        && !seen.agrees_with(&expected.core)
    {
        problem = Some("the kernel and the core differ".into());
    }
    Judged { expected, kernel, problem }
}

impl Seen {
    fn agrees_with(&self, answer: &Answer) -> bool {
        fn known<T: PartialEq>(seen: &Option<T>, said: &T) -> bool {
            seen.as_ref().is_none_or(|seen| seen == said)
        }
        self.fate == fate(answer)
            && known(&self.concerned, &answer.concerned)
            && known(&self.filter, &answer.filter)
            && known(&self.passed_over, &answer.passed_over)
    }
}

/// The kernel's decision, from evidence that has to agree with itself.
fn read(
    stage: &Stage,
    case: &Case,
    expected: &Expected,
    evidence: &Evidence,
) -> Result<Seen, String> {
    let Evidence { outcome, event, arrival } = evidence;
    let fate = match (outcome, arrival) {
        (Outcome::NoRecord(errno), _) => {
            return Err(format!("the record was refused with errno {errno}"));
        }
        (Outcome::Refused(errno::EPERM), _) => Fate::Blocked,
        (Outcome::Refused(errno::ECONNREFUSED), _) => Fate::ServiceUnavailable,
        (Outcome::Refused(errno::ELOOP), _) => Fate::Loop,
        (Outcome::Refused(errno), _) => return Err(format!("it failed with errno {errno}")),
        (Outcome::Out { peer, .. }, Some(arrival)) => {
            check_arrival(stage, case, expected, *peer, arrival)?;
            Fate::Redirected(arrival.handle)
        }
        (Outcome::Out { local, .. }, None) => {
            if local.ip().to_canonical().is_loopback() {
                return Err(format!("it left from {local}, and no service has seen it"));
            }
            Fate::Passes
        }
    };
    let Some(event) = event else {
        // Only what passes may pass without a word.
        return if fate == Fate::Passes {
            Ok(Seen { fate, concerned: None, filter: None, passed_over: None })
        } else {
            Err(format!("{fate:?}, and there is no event"))
        };
    };
    if let (Fate::Redirected(_), Some(arrival)) = (fate, arrival)
        && (event.handle, event.filter, event.legs)
            != (arrival.handle, arrival.filter, arrival.legs)
    {
        return Err(format!("the event and the service were told different things: {event:?}"));
    }
    let handle_in = |slot: usize| stage.policy.services().get(slot).map_or(0, |s| s.handle);
    let mut passed_over: Vec<u64> =
        (0..64).filter(|slot| event.skipped & 1 << slot != 0).map(handle_in).collect();
    passed_over.sort_unstable();
    let concerned = (fate != Fate::Passes).then_some(event.handle);
    Ok(Seen { fate, concerned, filter: Some(event.filter), passed_over: Some(passed_over) })
}

/// What the service was told has to be what the flow is.
fn check_arrival(
    stage: &Stage,
    case: &Case,
    expected: &Expected,
    peer: Option<SocketAddr>,
    arrival: &Arrival,
) -> Result<(), String> {
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    if canonical(arrival.destination) != canonical(case.call.to) {
        return Err(format!("the service was told another destination: {}", arrival.destination));
    }
    if !case.call.unconnected && peer != Some(case.call.to) {
        return Err(format!("the application sees the peer {peer:?}"));
    }
    if arrival.legs != expected.legs + 1 {
        return Err(format!(
            "the service was told of {} legs, which should be {}",
            arrival.legs,
            expected.legs + 1
        ));
    }
    if arrival.context != context_of(&stage.policy, arrival.filter) {
        return Err(format!("the service was given the context {:?}", arrival.context));
    }
    let mut record = Record::new_zeroed();
    let whole = record.as_mut_bytes();
    let length = arrival.record.len();
    let place = whole.get_mut(..length).ok_or("the record is longer than one can be")?;
    place.copy_from_slice(&arrival.record);
    if !record.well_formed(length) {
        return Err("the record is malformed".into());
    }
    let handles: Vec<u64> =
        record.hops[..record.hop_count as usize].iter().map(|hop| hop.handle).collect();
    let mut right = expected.history.handles.clone();
    right.push(arrival.handle);
    if handles != right || arrival.hops as usize != right.len() {
        return Err(format!("the record names {handles:?} instead of {right:?}"));
    }
    let original = case.kept.map_or(stage.members[case.member].process.executable, |kept| {
        Some(stage.kept[kept].original)
    });
    if Some(record.app.executable) != original {
        return Err(format!("the record names another program: {:?}", record.app.executable));
    }
    Ok(())
}

fn context_of(policy: &Policy, filter: u64) -> &[u8] {
    match policy.filter_by_id(filter).map(|filter| &filter.action) {
        Some(FilterAction::Redirect { context: Some(context), .. }) => context.as_bytes(),
        _ => &[],
    }
}

/// A decision in words.
pub(crate) struct InWords<'a> {
    pub(crate) policy: &'a Policy,
    pub(crate) answer: &'a Answer,
}

impl fmt::Display for InWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, answer } = self;
        write_fate(f, policy, fate(answer))?;
        write!(f, " (verdict {:?})", answer.verdict)?;
        write_details(f, policy, answer.filter, &answer.passed_over)?;
        if answer.verdict == Verdict::None { write!(f, ", nothing decided") } else { Ok(()) }
    }
}

/// What was seen of the kernel's decision, in words.
pub(crate) struct SeenInWords<'a> {
    pub(crate) policy: &'a Policy,
    pub(crate) seen: &'a Seen,
}

impl fmt::Display for SeenInWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, seen } = self;
        write_fate(f, policy, seen.fate)?;
        match (seen.filter, &seen.passed_over) {
            (Some(filter), Some(passed_over)) => write_details(f, policy, filter, passed_over),
            _ => write!(f, ", without a word"),
        }
    }
}

fn write_fate(f: &mut fmt::Formatter<'_>, policy: &Policy, fate: Fate) -> fmt::Result {
    match fate {
        Fate::Passes => write!(f, "it passes"),
        Fate::Blocked => write!(f, "it is blocked"),
        Fate::ServiceUnavailable => write!(f, "it is refused, since the service is not there"),
        Fate::Loop => write!(f, "it is refused as a loop"),
        Fate::Redirected(handle) => write!(f, "it goes to service {}", name_of(policy, handle)),
    }
}

fn write_details(
    f: &mut fmt::Formatter<'_>,
    policy: &Policy,
    filter: u64,
    passed_over: &[u64],
) -> fmt::Result {
    write!(f, ", by filter {filter}")?;
    for handle in passed_over {
        write!(f, ", {} passed over", name_of(policy, *handle))?;
    }
    Ok(())
}

/// A service's name, or what there is for one that the policy does not have.
pub(crate) fn name_of(policy: &Policy, handle: u64) -> String {
    policy.service_by_handle(handle).map_or_else(|| format!("#{handle}"), |s| s.name.clone())
}

//! Carrying out a batch with real sockets, and putting together what was seen of each case.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use carnet_core::event::{Event, EventKind};
use carnet_tests::{
    Must as _,
    caller::{Arrival, Order, Outcome},
};

use crate::{
    case::{Case, Held, expect},
    judge::{Evidence, Judged, judge},
    stage::Stage,
};

/// Carries out the cases, which come member by member, and judges each.
pub(crate) fn carry_out(stage: &mut Stage, batch: &[Case]) -> Vec<Judged> {
    drain(stage);
    let outcomes = open(stage, batch);
    let mut events: HashMap<u32, VecDeque<Event>> = HashMap::new();
    let mut redirected: HashMap<u64, usize> = HashMap::new();
    for event in drain(stage) {
        match EventKind::from_number(event.kind) {
            Some(EventKind::Redirected) => *redirected.entry(event.handle).or_default() += 1,
            Some(EventKind::Onward | EventKind::Blocked) => {}
            _ => continue,
        }
        events.entry(event.pid).or_default().push_back(event);
    }
    let mut arrivals = arrivals(stage, &redirected);
    let mut held = Held::default();
    let mut judged = Vec::new();
    for (case, outcome) in batch.iter().zip(outcomes) {
        let arrival = came(stage, &mut arrivals, case, outcome);
        let pid = stage.members[case.member].caller.id();
        let event = told(events.entry(pid).or_default(), case, outcome, arrival.is_some());
        let expected = expect(stage, &mut held, case);
        judged.push(judge(stage, case, expected, Evidence { outcome, event, arrival }));
    }
    let left = events.into_values().flatten().map(|event| format!("{event:?}"));
    let left: Vec<_> = left.chain(arrivals.iter().map(|left| format!("{left:?}"))).collect();
    if let (false, Some(last)) = (left.is_empty(), judged.last_mut()) {
        last.problem.get_or_insert_with(|| format!("nobody caused this: {left:#?}"));
    }
    stage.close();
    judged
}

/// All events that there are.
fn drain(stage: &mut Stage) -> Vec<Event> {
    let mut next = || stage.events.next_timeout(Duration::ZERO).must("read events");
    std::iter::from_fn(&mut next).collect()
}

/// Has the members open their flows: the applications side by side, then the services, each when the
/// one before is done.
fn open(stage: &mut Stage, batch: &[Case]) -> Vec<Outcome> {
    let of_members: Vec<&[Case]> = batch.chunk_by(|a, b| a.member == b.member).collect();
    let order = |cases: &[Case]| Order::Open(cases.iter().map(|case| case.call.clone()).collect());
    let is_app = |cases: &&[Case]| stage.members[cases[0].member].service.is_none();
    let (apps, services): (Vec<_>, Vec<_>) = of_members.into_iter().partition(is_app);
    let mut outcomes = Vec::new();
    for cases in &apps {
        stage.members[cases[0].member].caller.order(&order(cases));
    }
    for cases in &apps {
        outcomes.extend(stage.members[cases[0].member].caller.opened());
    }
    for cases in &services {
        let caller = &mut stage.members[cases[0].member].caller;
        caller.order(&order(cases));
        outcomes.extend(caller.opened());
    }
    outcomes
}

/// What has come to the services, of which the kernel says how much it has sent to each.
fn arrivals(stage: &mut Stage, redirected: &HashMap<u64, usize>) -> Vec<Arrival> {
    let mut all = Vec::new();
    for service in &stage.services {
        let expected = redirected.get(&service.handle).copied().unwrap_or(0);
        let caller = &mut stage.members[service.member].caller;
        caller.order(&Order::Arrivals(expected));
        let arrivals = caller.arrived();
        for arrival in &arrivals {
            // A service is told of its own flows alone.
            assert_eq!(arrival.handle, service.handle, "{arrival:?}");
        }
        all.extend(arrivals);
    }
    all
}

/// Takes the arrival of this case, if it has arrived anywhere.
fn came(
    stage: &Stage,
    arrivals: &mut Vec<Arrival>,
    case: &Case,
    outcome: Outcome,
) -> Option<Arrival> {
    let Outcome::Out { local, .. } = outcome else { return None };
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let at = arrivals.iter().position(|arrival| match arrival.number {
        Some(number) => case.call.protocol != 6 && number == case.call.number,
        None => {
            case.call.protocol == 6
                && stage.members[case.member].at_home
                && canonical(arrival.from) == canonical(local)
        }
    })?;
    Some(arrivals.remove(at))
}

/// Takes the event of this case out of those of its process, if the next one is of the kind that there
/// is for such an outcome.
fn told(
    events: &mut VecDeque<Event>,
    case: &Case,
    outcome: Outcome,
    arrived: bool,
) -> Option<Event> {
    let event = events.front()?;
    let kind = EventKind::from_number(event.kind)?;
    let fits = match outcome {
        Outcome::Refused(_) => kind == EventKind::Blocked,
        Outcome::Out { .. } if arrived => kind == EventKind::Redirected,
        Outcome::Out { .. } => kind == EventKind::Onward && case.kept.is_some(),
        Outcome::NoRecord(_) => false,
    };
    let requested = SocketAddr::from(event.requested);
    let canonical = (requested.ip().to_canonical(), requested.port());
    let fits = fits
        && canonical == (case.call.to.ip().to_canonical(), case.call.to.port())
        && event.uid == case.call.user
        && event.protocol == u32::from(case.call.protocol);
    if fits { events.pop_front() } else { None }
}

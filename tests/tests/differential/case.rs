//! The cases, and what core and reference decide about each.

use std::collections::HashMap;

use carnet_core::{
    Decision,
    address::Endpoint,
    chain::Chain,
    classify::{Listeners, Unobserved, classify},
    explain::{HostConnection, Process},
    record::{Hop, Record},
};
use carnet_reference::{
    Answer, History, answer,
    generate::{self, Choices as _, USERS},
    legs,
};
use carnet_tests::caller::Call;
use zerocopy::FromZeros as _;

use crate::{
    random::Random,
    stage::{Kept, Stage},
};

/// Longest run of connects of a service that forgets the record: more than any policy here allows.
const RUN: usize = 16;

/// A flow that is opened.
#[derive(Clone)]
pub(crate) struct Case {
    /// Who opens it, by its place among the members.
    pub(crate) member: usize,
    pub(crate) call: Call,
    /// The record that is set before, by its place among those that are kept.
    pub(crate) kept: Option<usize>,
}

/// What core and reference say of a case.
pub(crate) struct Expected {
    pub(crate) reference: Answer,
    pub(crate) core: Answer,
    /// Redirected legs so far, as the reference counts them.
    pub(crate) legs: u32,
    /// The same by the core; it tells only of flows that are redirected or end as loops.
    pub(crate) core_legs: u32,
    /// The record before, in words of the model.
    pub(crate) history: History,
}

/// Flows that services hold: what the hop guard knows, in the model's words. By service, address and
/// port, and protocol; the most legs that one of them has made.
#[derive(Default)]
pub(crate) struct Held(HashMap<(u64, Endpoint, u8), u32>);

impl Held {
    fn key(handle: u64, case: &Case) -> (u64, Endpoint, u8) {
        let canonical = (case.call.to.ip().to_canonical(), case.call.to.port());
        (handle, std::net::SocketAddr::from(canonical).into(), case.call.protocol)
    }

    fn legs(&self, handle: u64, case: &Case) -> u32 {
        self.0.get(&Self::key(handle, case)).copied().unwrap_or(0)
    }

    fn add(&mut self, handle: u64, case: &Case, legs: u32) {
        let most = self.0.entry(Self::key(handle, case)).or_default();
        *most = legs.max(*most);
    }
}

/// Random cases, those of applications first, then those of the services, one service after another:
/// the order in which they are carried out.
pub(crate) fn batch(stage: &Stage, random: &mut Random, count: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut held = Held::default();
    let add = |cases: &mut Vec<Case>, held: &mut Held, mut case: Case| {
        case.call.number = cases.len() as u32;
        expect(stage, held, &case);
        cases.push(case);
    };
    let apps: Vec<usize> =
        (0..stage.members.len()).filter(|n| stage.members[*n].service.is_none()).collect();
    let mut members: Vec<usize> = (0..count / 2).map(|_| *random.pick(&apps)).collect();
    members.sort_unstable();
    for member in members {
        add(&mut cases, &mut held, Case { member, call: call(stage, random), kept: None });
    }
    let services = stage.services.len();
    for (place, service) in stage.services.iter().enumerate() {
        let until = count / 2 + (count - count / 2) * (place + 1) / services;
        let own: Vec<usize> =
            (0..stage.kept.len()).filter(|n| stage.kept[*n].service == place).collect();
        while cases.len() < until {
            let mut call = call(stage, random);
            let mut kept = None;
            let mut times = 1;
            if !own.is_empty() && !random.one_in(3) {
                kept = Some(*random.pick(&own));
                call.record = kept.map(|kept: usize| stage.kept[kept].place);
            } else if let Some(earlier) = to_where_it_holds(&cases, &held, service.handle, random) {
                // It forgets the record.
                call.to = earlier.call.to;
                call.protocol = earlier.call.protocol;
                call.unconnected &= call.protocol != 6;
                if random.one_in(4) {
                    times = RUN;
                }
            }
            for _ in 0..times {
                let case = Case { member: service.member, call: call.clone(), kept };
                add(&mut cases, &mut held, case);
            }
        }
    }
    cases
}

fn call(stage: &Stage, random: &mut Random) -> Call {
    let (protocol, to) = generate::destination(&stage.policy, random);
    Call {
        number: 0,
        protocol: protocol.0,
        to,
        unconnected: protocol.0 != 6 && random.one_in(2),
        user: *random.pick(&USERS),
        record: None,
    }
}

/// An earlier case to a destination for which the service holds a flow.
fn to_where_it_holds<'a>(
    cases: &'a [Case],
    held: &Held,
    handle: u64,
    random: &mut Random,
) -> Option<&'a Case> {
    let candidates: Vec<&Case> = cases.iter().filter(|case| held.legs(handle, case) != 0).collect();
    if candidates.is_empty() { None } else { Some(*random.pick(&candidates)) }
}

/// What core and reference decide, and what services hold from then on.
pub(crate) fn expect(stage: &Stage, held: &mut Held, case: &Case) -> Expected {
    let member = &stage.members[case.member];
    let kept = case.kept.map(|kept| &stage.kept[kept]);
    let mut history = kept.map_or_else(History::default, |kept| kept.history.clone());
    if kept.is_none()
        && let Some(service) = member.service
    {
        history.forgotten_legs = held.legs(stage.services[service].handle, case);
    }
    let connection = HostConnection {
        protocol: case.call.protocol,
        destination: case.call.to.into(),
        process: Process { user: Some(case.call.user), ..member.process.clone() },
        original_executable: kept.map_or(member.process.executable, |kept| Some(kept.original)),
    };
    let ipv6 = case.call.to.ip().to_canonical().is_ipv6();
    let live = |handle| stage.is_live(handle, case.member, case.call.protocol, ipv6);
    let reference = answer(&stage.policy, &connection, &history, &live);
    let decision = ask_core(stage, &connection, kept, history.forgotten_legs, &live);
    let legs = legs(&history);
    if let Some(handle) = reference.redirected_to {
        held.add(handle, case, legs + 1);
    }
    let core = Answer::of_core(&stage.policy, &decision);
    Expected { reference, core, legs, core_legs: decision.legs, history }
}

fn ask_core(
    stage: &Stage,
    connection: &HostConnection,
    kept: Option<&Kept>,
    forgotten_legs: u32,
    live: &dyn Fn(u64) -> bool,
) -> Decision {
    let mut record = Record::new_zeroed();
    if let Some(kept) = kept {
        for handle in &kept.history.handles {
            record.push(Hop { handle: *handle, filter: 0 });
        }
        record.legs = kept.history.legs;
    }
    let chain = Chain::of_record(&stage.compiled, &record);
    let mut listeners = Told { live, forgotten_legs };
    classify(&stage.compiled, connection, &chain, &mut listeners, &mut Unobserved)
}

struct Told<'a> {
    live: &'a dyn Fn(u64) -> bool,
    forgotten_legs: u32,
}

impl Listeners for Told<'_> {
    fn is_live(&mut self, handle: u64) -> bool {
        (self.live)(handle)
    }

    fn forgotten_legs(&mut self) -> u32 {
        self.forgotten_legs
    }
}

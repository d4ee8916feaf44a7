//! What must not happen, said of what really happened and of what the administrator means.
//!
//! Nothing here asks carnet-core, and nothing looks at a record, but for flows whose record was
//! forgotten: of those the kernel cannot know more.

use carnet_core::{Decision, chain::RedirectState, classify::Reason};

use super::{
    kernel::Connect,
    state::{Flow, State},
};
use crate::scene::{Generation, ServiceFact};

/// A fault that a connect or a call showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A service got a flow that it had before, though nobody forgot the record.
    Twice,
    /// A flow made more legs than there are services, and the guard's margin.
    Endless,
    /// A flow arrived past a live service that should have seen it.
    PassedBy,
    /// A flow arrived, or went on, past a dead service with the failure policy `block`.
    Unguarded,
    /// A service got a flow though another one comes first, or though it is not to have it at all.
    Disorder,
    /// A service got a flow though it trusts all that had it.
    Distrust,
    /// A state was not that of the services that really had the flow, or a leg went to another process
    /// than its service's.
    Confused,
    /// A flow that is to be refused was not, or one was that is not.
    Misfiltered,
    /// A flow was refused for a service's failure, and none had failed.
    Unwarranted,
    /// The guard refused a flow whose services all set the record.
    FalseAlarm,
    /// The guard refused the only flow that there is, before it had made as many legs as it may.
    EarlyAlarm,
    /// A record was taken that was never issued to the service.
    Deceived,
    /// A record was refused that was issued to the service.
    Rebuffed,
    /// An adopted record says for certain of a service that it had the flow, and it had not.
    Presumed,
    /// An adopted record lacks a service that had the flow.
    Overlooked,
    /// An unmodified service got a flow twice.
    Again,
}

/// The room that the guard leaves beyond the number of services.
const MARGIN: usize = 8;

/// Judges what the hook decided of a connect of `flow`, which may be the only one that there is.
pub(super) fn judge(
    connect: &Connect<'_>,
    flow: &Flow,
    alone: bool,
    decision: &Decision,
    state: &mut State,
) {
    let generation = connect.generation();
    let fate = &generation.fates[connect.destination];
    let honest = !flow.lied && !flow.forgot && !flow.doubted;
    let view = View { connect, flow, generation };
    let limit = generation.services.len() + view.strangers() + MARGIN;
    if honest {
        state.note(Fault::Confused, view.is_confused());
    }
    if decision.redirects() {
        let to = connect.scene.handles.iter().position(|given| *given == decision.handle);
        let to = to.and_then(|handle| generation.service(handle));
        let Some(to) = to else {
            return state.note(Fault::Confused, true);
        };
        let listener = connect.state.listener_of(to.handle);
        state.note(Fault::Confused, listener != Some(to.process));
        state.note(Fault::Endless, usize::from(flow.legs) >= limit);
        state.note(Fault::Misfiltered, fate.refused && fate.order.is_empty());
        let had_it = flow.seen & 1 << to.handle != 0;
        state.note(Fault::Again, to.unmodified && had_it && !flow.lied && !flow.forgot);
        if honest {
            state.note(Fault::Twice, flow.seen & 1 << to.handle != 0);
            state.note(Fault::Distrust, view.trusts_all(to));
            state.note(Fault::Disorder, !view.is_next(to.handle));
            state.note(Fault::Unguarded, view.failed_before(Some(to.handle)));
        }
    } else if decision.blocks() {
        match decision.reason {
            Reason::Loop => {
                state.note(Fault::FalseAlarm, honest);
                state.note(Fault::EarlyAlarm, alone && usize::from(flow.legs) < limit);
            }
            Reason::ServiceUnavailable => {
                state.note(Fault::Unwarranted, honest && !view.failed_before(None));
            }
            Reason::NoFilter | Reason::Filter => {
                let due = fate.refused && (!honest || view.wanting().next().is_none());
                state.note(Fault::Misfiltered, !due);
            }
        }
    } else {
        state.note(Fault::Misfiltered, fate.refused);
        if !flow.lied {
            let due = || view.wanting().filter(|service| !view.is_passed_over(service));
            state.note(Fault::PassedBy, due().any(|service| view.is_live(service)));
            state.note(Fault::Unguarded, due().any(|service| view.has_failed(service)));
        }
    }
}

struct View<'a> {
    connect: &'a Connect<'a>,
    flow: &'a Flow,
    generation: &'a Generation,
}

impl View<'_> {
    /// Set of the services that had the flow, as far as anybody can know.
    fn before(&self) -> u8 {
        match &self.flow.set {
            Some(set) if self.flow.forgot => set.handles(),
            None if self.flow.forgot => 0,
            _ => self.flow.seen,
        }
    }

    /// How many of those the administrator has removed.
    fn strangers(&self) -> usize {
        let before = self.before();
        let had = (0..u8::BITS as usize).filter(|handle| before & 1 << handle != 0);
        had.filter(|handle| self.generation.service(*handle).is_none()).count()
    }

    fn trusts_all(&self, service: &ServiceFact) -> bool {
        let before = self.before();
        before != 0 && service.trusts.is_none_or(|trusted| before & !trusted == 0)
    }

    fn is_live(&self, service: &ServiceFact) -> bool {
        self.connect.state.listener_of(service.handle).is_some()
    }

    fn has_failed(&self, service: &ServiceFact) -> bool {
        service.blocks && !self.is_live(service)
    }

    /// The services that are still to see the flow, in their order.
    fn wanting(&self) -> impl Iterator<Item = &ServiceFact> {
        let order = &self.generation.fates[self.connect.destination].order;
        let services = order.iter().filter_map(|handle| self.generation.service(*handle));
        services.filter(|service| {
            self.flow.seen & 1 << service.handle == 0 && !self.trusts_all(service)
        })
    }

    /// Whether the service is unmodified and guessed to have had the flow: whom a guess may cost it.
    fn is_passed_over(&self, service: &ServiceFact) -> bool {
        let guessed = self.connect.record.map_or(0, |record| record.handles() & !record.certain());
        service.unmodified && guessed & 1 << service.handle != 0
    }

    /// Whether the service with this handle is the first live one that is still to see the flow.
    fn is_next(&self, handle: usize) -> bool {
        self.wanting().find(|service| self.is_live(service)).is_some_and(|s| s.handle == handle)
    }

    /// Whether a service that is to see the flow before `to`, or before any live one, has failed.
    fn failed_before(&self, to: Option<usize>) -> bool {
        let reached = |service: &&ServiceFact| match to {
            Some(handle) => service.handle == handle,
            None => self.is_live(service),
        };
        self.wanting().take_while(|service| !reached(service)).any(|s| self.has_failed(s))
    }

    /// Whether the record's chain says another thing of a service than what really happened
    /// (contract C10).
    fn is_confused(&self) -> bool {
        let chain = self.connect.chain();
        let last = self.flow.set.and_then(|set| set.hops().next_back());
        (0..).zip(&self.generation.services).any(|(slot, service)| {
            let had = self.flow.seen & 1 << service.handle != 0;
            let expected = match (self.flow.seen, had) {
                (0, _) => RedirectState::NotRedirected,
                (_, false) => RedirectState::RedirectedByOther,
                (_, true) if last == Some(service.handle) => RedirectState::RedirectedBySelf,
                (_, true) => RedirectState::PreviouslyRedirectedBySelf,
            };
            chain.state(slot) != expected
        })
    }
}

//! Legs of flows: what follows from a connect.

use carnet_core::classify::Reason;

use super::{
    Carried, Defect, Fault, Place, Protocol, Refusal, State,
    judge::judge,
    kernel::{Connect, guard_begins},
};
use crate::scene::{DESTINATIONS, HANDLES};

impl Protocol {
    /// Runs the connect hook for a flow, and what follows at once from what it decides.
    pub(super) fn connect(&self, state: &mut State, number: usize, caller: Option<usize>) {
        let scene = self.scene(state);
        let flow = state.flows[number];
        let before = state.clone();
        let set = if self.defect == Some(Defect::RecordUnseen) { None } else { flow.set };
        let connect = Connect {
            scene,
            state: &before,
            record: set.as_ref(),
            destination: flow.destination.into(),
            caller,
        };
        let decision = connect.decide();
        let alone = self.flows.len() == 1;
        judge(&connect, &flow, alone, &decision, state);
        if decision.redirects() {
            self.deliver(state, number, set, decision.handle, decision.legs);
        } else if decision.blocks() {
            let refusal = match decision.reason {
                Reason::Loop => Refusal::Loop,
                Reason::ServiceUnavailable => Refusal::Unavailable,
                Reason::NoFilter | Reason::Filter => Refusal::Filter,
            };
            end(state, number, Place::Refused(refusal));
        } else {
            end(state, number, Place::Arrived(flow.seen.count_ones() as u8));
        }
    }

    /// The leg reaches the listener of the service, with its record.
    fn deliver(
        &self,
        state: &mut State,
        number: usize,
        set: Option<Carried>,
        handle: u64,
        legs: u32,
    ) {
        let scene = self.scene(state);
        let handle = scene.handles.iter().position(|given| *given == handle).unwrap_or(0);
        let listener = if self.defect == Some(Defect::AnyListener) {
            state.listens.iter().position(|listens| *listens != 0)
        } else {
            state.listener_of(handle)
        };
        let set = set.unwrap_or_default();
        let record = Carried { key: state.key, rotation: state.rotations, ..set };
        let longer = match self.defect {
            Some(Defect::HopLeftOut) => Some(record),
            _ => record.with_hop(handle, legs),
        };
        let (Some(process), Some(record)) = (listener, longer) else {
            return end(state, number, Place::Broken);
        };
        state.note(Fault::Confused, scene.process_of(handle) != process);
        let destination = usize::from(state.flows[number].destination);
        if self.guards() && self.defect != Some(Defect::GuardUntold) {
            let live = state.live(handle, destination);
            let remembered = &mut state.guard[handle][destination];
            *remembered = guard_begins(*remembered, live, record.legs);
        }
        let guards = self.guards();
        let hour = state.hour;
        let unmodified =
            self.generation(state).service(handle).is_some_and(|service| service.unmodified);
        let flow = &mut state.flows[number];
        flow.place = Place::Held(process as u8);
        flow.delivered = handle as u8;
        flow.record = Carried { hour, ..record };
        flow.set = None;
        if unmodified {
            flow.kept[handle] = Some((flow.record, flow.destination));
        }
        flow.seen |= 1 << handle;
        flow.legs = flow.legs.saturating_add(1);
        flow.held[handle][destination] += u8::from(guards);
    }
}

/// Ends a flow; all its connections are closed.
pub(super) fn end(state: &mut State, number: usize, place: Place) {
    state.flows[number].end(place);
    for handle in 0..HANDLES {
        for destination in 0..DESTINATIONS {
            if state.live(handle, destination) == 0 {
                // What is remembered of no flows does not matter: see `guard_begins`.
                state.guard[handle][destination] = 0;
            }
        }
    }
}

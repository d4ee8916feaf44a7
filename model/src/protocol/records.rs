//! What services give the kernel for records.

use carnet_core::record::{Record, mac_of};

use super::{
    Action, Carried, Defect, Fault, Flow, Given, Place, Protocol, Refusal, State,
    kernel::{EPOCH, NO_KEY, key, query, takes},
    legs::end,
};
use crate::scene::HANDLES;

impl Protocol {
    /// A service gives the kernel something for a record. `None` if nothing comes of it.
    pub(super) fn set(
        &self,
        state: &mut State,
        number: usize,
        process: usize,
        given: Given,
    ) -> Option<()> {
        let scene = self.scene(state);
        let flow = state.flows[number];
        let own = self.service_of(state, process);
        let setter = own.map(|handle| scene.handles[handle]);
        let (carried, record) = self.record(state, number, own, given)?;
        let taken = self.defect == Some(Defect::NothingVerified) || takes(state, &record, setter);
        // The truth about it, but for whose it is.
        let lasting = carried.hour == state.hour && state.rotations - carried.rotation <= 1;
        let fresh = given == Given::Own || lasting;
        match given {
            Given::Own | Given::Kept => {
                let due = fresh && own == Some(flow.delivered.into());
                state.note(Fault::Rebuffed, due && !taken);
                state.note(Fault::Deceived, taken && !due);
                if taken {
                    state.flows[number].set = Some(carried);
                    return Some(());
                }
                // One that can set no record at all refuses the connection; a stale one it asks for anew.
                return (given == Given::Own)
                    .then(|| end(state, number, Place::Refused(Refusal::Record)));
            }
            // What was issued to it is taken: it could as well have mixed up the flows.
            Given::Replayed(_) => state.note(Fault::Deceived, taken && !fresh),
            Given::Stolen(_)
            | Given::Forged
            | Given::Extended
            | Given::Altered
            | Given::Foreign => {
                state.note(Fault::Deceived, taken);
            }
        }
        if !taken || state.lies >= self.lies {
            return None;
        }
        state.lies += 1;
        state.flows[number] = Flow { set: Some(carried), lied: true, legs: 0, ..flow };
        Some(())
    }

    /// What the service gives: what it says, and its bytes.
    fn record(
        &self,
        state: &State,
        number: usize,
        own: Option<usize>,
        given: Given,
    ) -> Option<(Carried, Record)> {
        let scene = self.scene(state);
        let carried = state.flows[number].record;
        let genuine = |carried: Carried| (carried, carried.write(scene));
        Some(match given {
            Given::Own => query(state, &carried, scene),
            Given::Kept => genuine(carried),
            Given::Stolen(other) => {
                let stolen = state.flows[other].record;
                if stolen.length == 0 || stolen.hops().next_back() == own {
                    return None;
                }
                genuine(stolen)
            }
            Given::Replayed(other) => {
                let replayed = state.flows[other].record.when_delivered_to(own?)?;
                if replayed == carried {
                    return None;
                }
                genuine(replayed)
            }
            Given::Forged => {
                let others = self.generation(state).services.iter().map(|service| service.handle);
                let others = others.filter(|handle| Some(*handle) != own).chain(own);
                let nothing = Carried { length: 0, hops: [0; HANDLES], ..carried };
                let all = others.fold(nothing, |all, handle| {
                    all.with_hop(handle, all.legs.into()).unwrap_or(all)
                });
                let mut record = all.write_without_mac(scene);
                // It does not know the key.
                record.mac = mac_of(&record, &key(NO_KEY));
                (all, record)
            }
            Given::Extended => {
                let another =
                    (0..scene.handles.len()).find(|handle| carried.handles() & 1 << handle == 0)?;
                // The newest hop stays its own, as the option wants it.
                let mut longer = carried.with_hop(another, carried.legs.into())?;
                let length = usize::from(longer.length);
                longer.hops.swap(length - 1, length - 2);
                let mut record = longer.write_without_mac(scene);
                record.mac = carried.write(scene).mac;
                (longer, record)
            }
            Given::Altered => {
                let another =
                    (0..scene.handles.len()).find(|handle| carried.handles() & 1 << handle == 0)?;
                let mut altered = carried;
                if altered.length < 2 {
                    return None;
                }
                altered.hops[0] = another as u8;
                let mut record = altered.write_without_mac(scene);
                record.mac = carried.write(scene).mac;
                (altered, record)
            }
            Given::Foreign => {
                // Even if it knew the key.
                let mut record = carried.write_without_mac(scene);
                record.epoch = EPOCH + 1;
                record.mac = mac_of(&record, &key(state.key));
                (carried, record)
            }
        })
    }

    /// What a service may give for the record of a flow, other than that.
    pub(super) fn lies_of(&self, state: &State, number: usize, actions: &mut Vec<Action>) {
        let given = [Given::Forged, Given::Extended, Given::Altered, Given::Foreign];
        actions.extend(given.map(|given| Action::Set(number, given)));
        for other in 0..self.flows.len() {
            if matches!(state.flows[other].place, Place::Held(_)) {
                actions.push(Action::Set(number, Given::Replayed(other)));
                if other != number {
                    actions.push(Action::Set(number, Given::Stolen(other)));
                }
            }
        }
    }
}

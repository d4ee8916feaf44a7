//! What an unmodified service connects, and the record that it adopts.

use carnet_core::{
    adoption::{Candidates, HeldFlows, adopt},
    compile::CompiledPolicy,
    record::Record,
};

use super::{Carried, Fault, Protocol, State};
use crate::scene::{HANDLES, Scene};

impl Protocol {
    /// The flows whose records the kernel may take for that of a connection of the service `own` to
    /// `destination`: those that the service holds for it.
    pub(super) fn candidates(&self, state: &State, own: usize, destination: u8) -> Vec<usize> {
        let flows = 0..self.flows.len();
        let is_held = |number: &usize| {
            state.flows[*number].kept[own].is_some_and(|(_, to)| to == destination)
        };
        flows.filter(is_held).collect()
    }

    /// The service `own` connects the flow onwards, to where it goes now, without a record. The kernel
    /// gives it one: it takes `likeliest` for the flow that it belongs to, or none.
    pub(super) fn adopt(
        &self,
        state: &mut State,
        number: usize,
        own: usize,
        likeliest: Option<usize>,
    ) {
        let scene = self.scene(state);
        let destination = state.flows[number].destination;
        let kept = likeliest.and_then(|flow| state.flows[flow].kept[own]);
        let mut record = kept.map_or_else(
            || Carried::default().write_without_mac(scene),
            |(carried, _)| carried.write_without_mac(scene),
        );
        let candidates = Candidates {
            for_destination: Some(&held(state, scene, own, Some(destination))),
            all: Some(&held(state, scene, own, None)),
            known: kept.is_some(),
        };
        let compiled = &self.generation(state).compiled;
        let complete = adopt(compiled, candidates, scene.handles[own], &mut record);
        assert!(complete, "a record has room for all services");
        let adopted = read(scene, &record, state);
        let flow = &mut state.flows[number];
        let exact = adopted.certain() == flow.seen && adopted.guessed == 0;
        flow.doubted |= !exact;
        let (seen, lied) = (flow.seen, flow.lied);
        flow.set = Some(adopted);
        state.note(Fault::Presumed, !lied && adopted.certain() & !seen != 0);
        state.note(Fault::Overlooked, !lied && seen & !adopted.handles() != 0);
    }
}

/// The flows that a service holds, for a destination or altogether, as the kernel counts them.
fn held(state: &State, scene: &Scene, own: usize, destination: Option<u8>) -> HeldFlows {
    let mut held = HeldFlows::default();
    for flow in &state.flows {
        if let Some((carried, to)) = flow.kept[own]
            && destination.is_none_or(|destination| destination == to)
        {
            let record = carried.write_without_mac(scene);
            assert!(held.enter::<CompiledPolicy>(&record, 1), "nothing was removed");
            held.count::<CompiledPolicy>(&record, false);
        }
    }
    held
}

fn read(scene: &Scene, record: &Record, state: &State) -> Carried {
    let mut carried = Carried {
        length: record.hop_count as u8,
        legs: record.legs as u8,
        guessed: record.guessed as u8,
        hour: state.hour,
        key: state.key,
        rotation: state.rotations,
        hops: [0; HANDLES],
    };
    for (index, place) in (0..record.hop_count).zip(&mut carried.hops) {
        let hop = record.hop(index).map_or(0, |hop| hop.handle);
        let known = scene.handles.iter().position(|handle| *handle == hop);
        *place = known.expect("a hop of a service of the scene") as u8;
    }
    carried
}

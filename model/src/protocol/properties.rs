//! The properties of the protocol, and what has to be reached so that they are about something.

use stateright::Property;

use super::{
    Fault, Protocol,
    state::{Place, Refusal, State},
};

/// Something that a configuration has to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// A flow arrives after four services.
    ThroughFour,
    /// A flow arrives after fewer services, since one was passed over or trusts.
    ThroughFewer,
    /// A flow is refused by the guard.
    Loop,
    /// A flow is refused since a service with `block` is dead.
    Unavailable,
    /// A flow is refused by a filter.
    Blocked,
    /// A flow passes that nobody inspects.
    Untouched,
    /// A flow ends since a service dies.
    Broken,
    /// A policy comes into force while a service holds a flow.
    MidFlow,
    /// A service holds a flow that its predecessor of the same name had.
    Successor,
    /// A service cannot set the record that it got, since it is no longer that service, or since it is
    /// too late.
    TooLate,
    /// A service's lie is believed: it gives a record that it got with another flow.
    Believed,
    /// The programs are replaced while a service holds a flow that afterwards goes on.
    Upgraded,
    /// A flow makes more legs than there are services.
    Circling,
    /// What an unmodified service connects adopts a record of which something is guessed.
    Guessed,
}

/// The properties of a configuration.
pub(super) fn of(protocol: &Protocol) -> Vec<Property<Protocol>> {
    let mut properties = vec![
        Property::always(name(Fault::Twice), |_, state| !has(state, Fault::Twice)),
        Property::always(name(Fault::Endless), |_, state| !has(state, Fault::Endless)),
        Property::always(name(Fault::PassedBy), |_, state| !has(state, Fault::PassedBy)),
        Property::always(name(Fault::Unguarded), |_, state| !has(state, Fault::Unguarded)),
        Property::always(name(Fault::Disorder), |_, state| !has(state, Fault::Disorder)),
        Property::always(name(Fault::Distrust), |_, state| !has(state, Fault::Distrust)),
        Property::always(name(Fault::Confused), |_, state| !has(state, Fault::Confused)),
        Property::always(name(Fault::Misfiltered), |_, state| !has(state, Fault::Misfiltered)),
        Property::always(name(Fault::Unwarranted), |_, state| !has(state, Fault::Unwarranted)),
        Property::always(name(Fault::FalseAlarm), |_, state| !has(state, Fault::FalseAlarm)),
        Property::always(name(Fault::EarlyAlarm), |_, state| !has(state, Fault::EarlyAlarm)),
        Property::always(name(Fault::Deceived), |_, state| !has(state, Fault::Deceived)),
        Property::always(name(Fault::Rebuffed), |_, state| !has(state, Fault::Rebuffed)),
        Property::always(name(Fault::Presumed), |_, state| !has(state, Fault::Presumed)),
        Property::always(name(Fault::Overlooked), |_, state| !has(state, Fault::Overlooked)),
        Property::always(name(Fault::Again), |_, state| !has(state, Fault::Again)),
    ];
    properties.extend(protocol.witnesses.iter().map(|witness| witness.property()));
    properties
}

/// The property that a fault breaks.
const fn name(fault: Fault) -> &'static str {
    match fault {
        Fault::Twice => "a1 no service gets a flow twice",
        Fault::Endless => "a2 no flow makes more legs than the guard allows",
        Fault::PassedBy => "b1 no flow arrives past a live service that is to see it",
        Fault::Disorder => "b2 the first service that is to see a flow gets it",
        Fault::Distrust => "b3 no service gets a flow that only those had whom it trusts",
        Fault::Unguarded => "c1 no flow goes past a dead service that blocks",
        Fault::Unwarranted => "c2 no flow is refused for a failure that is none",
        Fault::Confused => "d1 states and deliveries are those of the services that had the flow",
        Fault::Misfiltered => "f1 what filters block is refused, and nothing else",
        Fault::FalseAlarm => "g1 the guard refuses no flow whose services co-operate",
        Fault::EarlyAlarm => "g2 the guard does not refuse a flow sooner than it has to",
        Fault::Deceived => "r1 no record is taken that was not issued to the service",
        Fault::Rebuffed => "r2 every record is taken that was issued to the service",
        Fault::Presumed => "h1 no adopted record makes certain what is not so",
        Fault::Overlooked => "h2 no adopted record lacks a service that had the flow",
        Fault::Again => "h3 no unmodified service gets a flow twice",
    }
}

fn has(state: &State, fault: Fault) -> bool {
    state.faults & 1 << fault as u16 != 0
}

fn any(state: &State, test: impl Fn(Place) -> bool) -> bool {
    state.flows.iter().any(|flow| test(flow.place))
}

impl Witness {
    fn property(self) -> Property<Protocol> {
        let condition: fn(&Protocol, &State) -> bool = match self {
            Self::ThroughFour => |_, state| any(state, |place| place == Place::Arrived(4)),
            Self::ThroughFewer => {
                |_, state| any(state, |place| matches!(place, Place::Arrived(1..4)))
            }
            Self::Loop => |_, state| any(state, |place| place == Place::Refused(Refusal::Loop)),
            Self::Unavailable => {
                |_, state| any(state, |place| place == Place::Refused(Refusal::Unavailable))
            }
            Self::Blocked => {
                |_, state| any(state, |place| place == Place::Refused(Refusal::Filter))
            }
            Self::Untouched => |_, state| any(state, |place| place == Place::Arrived(0)),
            Self::Broken => |protocol, state| {
                let flows = &state.flows[..protocol.flows.len()];
                flows.iter().any(|flow| flow.place == Place::Broken)
            },
            Self::MidFlow => |protocol, state| {
                let first = &protocol.scene(state).generations[0];
                let held = state.flows.iter().filter(|f| matches!(f.place, Place::Held(_)));
                let known = |flow: &super::Flow| {
                    flow.record.hops().all(|handle| first.service(handle).is_some())
                };
                state.generation > 0 && held.clone().any(known)
            },
            Self::Successor => |protocol, state| {
                let scene = protocol.scene(state);
                state.flows.iter().any(|flow| {
                    let processes = flow.record.hops().map(|handle| scene.process_of(handle));
                    let mut processes: Vec<_> = processes.collect();
                    processes.sort_unstable();
                    processes.windows(2).any(|pair| pair[0] == pair[1])
                })
            },
            Self::TooLate => {
                |_, state| any(state, |place| place == Place::Refused(Refusal::Record))
            }
            Self::Believed => {
                |_, state| state.flows.iter().any(|flow| flow.lied && flow.set.is_some())
            }
            Self::Upgraded => |_, state| {
                state.upgraded && any(state, |place| matches!(place, Place::Arrived(1..)))
            },
            Self::Circling => |protocol, state| {
                let services = protocol.generation(state).services.len();
                state.flows.iter().any(|flow| usize::from(flow.legs) > services)
            },
            Self::Guessed => |_, state| {
                let guesses = |flow: &super::Flow| flow.record.guessed != 0 || flow.doubted;
                state.flows.iter().any(guesses)
            },
        };
        Property::sometimes(self.name(), condition)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::ThroughFour => "reached: a flow arrives after four services",
            Self::ThroughFewer => "reached: a flow arrives after one to three services",
            Self::Loop => "reached: the guard refuses a flow",
            Self::Unavailable => "reached: a dead service that blocks refuses a flow",
            Self::Blocked => "reached: a filter refuses a flow",
            Self::Untouched => "reached: a flow passes that nobody inspects",
            Self::Broken => "reached: a flow ends with a service that dies",
            Self::MidFlow => "reached: a policy comes into force in mid-flow",
            Self::Successor => "reached: a flow goes to the successor of a service that had it",
            Self::TooLate => "reached: a service may no longer set what it got",
            Self::Believed => "reached: a lie is believed",
            Self::Upgraded => "reached: a flow arrives after an upgrade",
            Self::Circling => "reached: a flow makes more legs than there are services",
            Self::Guessed => "reached: services that had a flow are guessed",
        }
    }
}

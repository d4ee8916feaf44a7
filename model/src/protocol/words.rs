//! What happened, in words: a counterexample is read, not decoded.

use stateright::Model as _;

use super::{
    Action, Given, Protocol, STEPS, State, name_of,
    state::{Place, Refusal},
};
use crate::{explore::Tell, scene::NAMES};

impl Tell for Protocol {
    fn tell(&self, before: &State, action: Action) -> String {
        let what = self.what(before, action);
        let Some(after) = self.next_state(before, action) else {
            return what;
        };
        let became = (0..self.flows.len()).filter_map(|number| {
            let (old, new) = (&before.flows[number], &after.flows[number]);
            (old.place != new.place || old.legs != new.legs)
                .then(|| format!("flow {} {}", number + 1, self.place(&after, number)))
        });
        let became: Vec<String> = became.collect();
        if became.is_empty() { what } else { format!("{what}: {}", became.join("; ")) }
    }
}

impl Protocol {
    fn what(&self, state: &State, action: Action) -> String {
        let flow = |number: usize| number + 1;
        let holder = |number: usize| match state.flows[number].place {
            Place::Held(process) => NAMES[usize::from(process)],
            _ => "nobody",
        };
        match action {
            Action::Begin(number) => {
                let destination = state.flows[number].destination;
                format!(
                    "the application of flow {} connects to destination {destination}",
                    flow(number)
                )
            }
            Action::Set(number, given) => {
                let record = match given {
                    Given::Own => "the record of that flow".to_owned(),
                    Given::Kept => "the record of that flow as it was at first".to_owned(),
                    Given::Stolen(other) => {
                        format!("the record that {} got with flow {}", holder(other), flow(other))
                    }
                    Given::Replayed(other) => {
                        format!("the record that it got with flow {}", flow(other))
                    }
                    Given::Forged => "a forged record".to_owned(),
                    Given::Extended => "the record of that flow with a hop added".to_owned(),
                    Given::Altered => "the record of that flow with another first hop".to_owned(),
                    Given::Foreign => "the record of that flow with another epoch".to_owned(),
                };
                format!("{} sets on flow {}'s socket {record}", holder(number), flow(number))
            }
            Action::Onwards(number) => {
                let without =
                    if state.flows[number].set.is_none() { " without a record" } else { "" };
                format!("{} connects flow {} onwards{without}", holder(number), flow(number))
            }
            Action::Adopt(number, likeliest) => {
                let taken = match likeliest {
                    Some(other) => format!("taken for flow {}", flow(other)),
                    None => "of which no record is found".to_owned(),
                };
                let (who, number) = (holder(number), flow(number));
                format!("{who}, which is unmodified, connects flow {number} onwards, {taken}")
            }
            Action::Elsewhere(number) => {
                format!("{} connects flow {} elsewhere", holder(number), flow(number))
            }
            Action::Die(process) => format!("{} dies", NAMES[process]),
            Action::Listen(process) => format!("{} registers a listener", NAMES[process]),
            Action::Transact => {
                let step = STEPS.get(usize::from(state.step));
                format!("the transaction goes on after {} steps (next: {step:?})", state.step)
            }
            Action::Upgrade => "the programs are replaced".to_owned(),
            Action::Rotate => "the key is rotated".to_owned(),
            Action::Hour => "an hour passes".to_owned(),
        }
    }

    fn place(&self, state: &State, number: usize) -> String {
        let flow = &state.flows[number];
        let scene = self.scene(state);
        match flow.place {
            Place::Waiting => "waits".to_owned(),
            Place::Held(process) => {
                let hops = flow.record.hops().map(|handle| name_of(scene, handle));
                let hops: Vec<String> = hops.collect();
                let (name, legs) = (NAMES[usize::from(process)], flow.record.legs);
                format!("goes to {name}, record {{{}}}, leg {legs}", hops.join(", "))
            }
            Place::Arrived(0) => "reaches its destination, inspected by nobody".to_owned(),
            Place::Arrived(services) => {
                format!("reaches its destination after {services} services")
            }
            Place::Refused(refusal) => match refusal {
                Refusal::Filter => "is refused by a filter",
                Refusal::Unavailable => "is refused: a service has no live listener",
                Refusal::Loop => "is refused by the guard",
                Refusal::Record => "is refused by its service, from which no record was taken",
            }
            .to_owned(),
            Place::Broken => "breaks".to_owned(),
        }
    }
}

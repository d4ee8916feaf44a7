//! What happened, in words.

use stateright::Model as _;

use super::{Action, Banks, State, hook::Hook};
use crate::explore::Tell;

impl Tell for Banks {
    fn tell(&self, before: &State, action: Action) -> String {
        match action {
            Action::Hook(number) => {
                let hook = |state: &State| match state.hooks[number] {
                    Hook::Idle => "it is done".to_owned(),
                    Hook::Gated { .. } => "it has passed the outer gate".to_owned(),
                    Hook::Begun { bank, .. } => format!("it has its leaf of bank {bank}"),
                    Hook::Read { .. } => "it has read the chain".to_owned(),
                    Hook::Decided { filter, .. } => format!("it has decided, by filter {filter}"),
                };
                let after = self.next_state(before, action);
                let became = after.as_ref().map(hook).unwrap_or_default();
                format!("hook {} goes on: {became}", number + 1)
            }
            Action::Command => {
                let (before, taken) = match state_of(before) {
                    Some((policy, taken)) => (policy, taken),
                    None => (Self::in_force(before), 0),
                };
                let step = self.steps().get(taken).map(|step| format!("{step:?}"));
                let step = step.unwrap_or_default();
                format!("the command that installs policy {} takes the step {step}", before + 1)
            }
            Action::Fail => "the command fails and takes back what it did".to_owned(),
            Action::Kill => "the command is killed".to_owned(),
        }
    }
}

fn state_of(state: &State) -> Option<(u8, usize)> {
    state.command.map(|command| (command.before, command.taken.into()))
}

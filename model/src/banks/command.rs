//! The administrator's command.

use carnet_core::transaction::{AFTERWARDS, Step, UNTIL_IN_FORCE};

use super::{
    Banks, Defect, Fault, State,
    hook::Hook,
    store::{NOTHING, TABLES, Table},
};

/// A command that changes the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Command {
    /// The policy that it found in force.
    pub(super) before: u8,
    /// The bank in which that is.
    pub(super) bank: u8,
    /// How many of its steps it has taken.
    pub(super) taken: u8,
    /// Set of the hooks for whose end it waits; 0 if it does not wait.
    pub(super) awaited: u8,
}

/// A step of a command, as small as one call that changes a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Micro {
    Wait,
    AddContexts,
    Write(Table),
    ClearSlots,
    Flip,
    RemoveSlots,
    RemoveContexts,
}

impl Banks {
    /// The steps of a command.
    pub(super) fn steps(&self) -> Vec<Micro> {
        let steps = UNTIL_IN_FORCE.into_iter().chain(AFTERWARDS);
        let micro = |step| match step {
            Step::Wait if self.defect == Some(Defect::WaitSkipped) => vec![],
            Step::Wait => vec![Micro::Wait],
            Step::Prepare => vec![Micro::AddContexts],
            Step::Write => TABLES
                .into_iter()
                .flat_map(|table| match table {
                    Table::Slots => vec![Micro::ClearSlots, Micro::Write(table)],
                    _ => vec![Micro::Write(table)],
                })
                .collect(),
            Step::Flip => vec![Micro::Flip],
            Step::Tidy => vec![Micro::RemoveSlots, Micro::RemoveContexts],
        };
        steps.flat_map(micro).collect()
    }

    /// The command takes its next step. `None` if it waits.
    pub(super) fn step(&self, state: &mut State) -> Option<()> {
        let steps = self.steps();
        let begins =
            Command { before: Self::in_force(state), bank: state.active ^ 1, taken: 0, awaited: 0 };
        let mut command = state.command.unwrap_or(begins);
        if self.defect == Some(Defect::SameBank) {
            command.bank = state.active;
        }
        let after = command.before + 1;
        let bank = usize::from(command.bank);
        match steps[usize::from(command.taken)] {
            Micro::Wait if command.awaited == 0 => {
                // The hooks that run now; if none does, it is over at once.
                let running = |(_, hook): &(usize, &Hook)| **hook != Hook::Idle;
                let running = state.hooks.iter().enumerate().filter(running);
                command.awaited = running.fold(0, |set, (number, _)| set | 1 << number);
            }
            // It goes on with the last one's end: see `next_state`.
            Micro::Wait => return None,
            Micro::AddContexts => state.contexts |= 1 << after,
            Micro::Write(table) => {
                self.overwrite(state, bank);
                state.banks[bank].write(table, after);
            }
            Micro::ClearSlots => {
                self.overwrite(state, bank);
                state.banks[bank].write(Table::Slots, NOTHING);
            }
            Micro::Flip => state.active = command.bank,
            Micro::RemoveSlots => {
                self.overwrite(state, bank ^ 1);
                state.banks[bank ^ 1].write(Table::Slots, NOTHING);
            }
            Micro::RemoveContexts => state.contexts = 1 << after,
        }
        if command.awaited == 0 {
            command.taken += 1;
        }
        let done = usize::from(command.taken) == steps.len();
        state.command = (!done).then_some(command);
        Some(())
    }

    /// Something in a bank is about to be written.
    pub(super) fn overwrite(&self, state: &mut State, bank: usize) {
        let reads = |hook: &Hook| match hook {
            Hook::Begun { bank: read, .. }
            | Hook::Read { bank: read, .. }
            | Hook::Decided { bank: read, .. } => usize::from(*read) == bank,
            Hook::Idle | Hook::Gated { .. } => false,
        };
        if state.hooks.iter().any(reads) {
            state.note(Fault::Overwritten);
        }
    }
}

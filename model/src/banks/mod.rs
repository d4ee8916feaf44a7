//! A transaction, and the hooks that run meanwhile.
//!
//! Hooks and the administrator's commands take steps in any order: a hook finds out which bank is in
//! force, walks to a leaf, reads the record's chain, decides, takes the filter's context; a command
//! writes table after table. A command may fail at each step, or be killed; then another one begins.

mod command;
mod hook;
mod store;
mod words;

use carnet_core::{
    compile::CompiledPolicy,
    record::{Hop, Record},
};
use stateright::{Model, Property};
use zerocopy::FromZeros as _;

use self::{
    command::{Command, Micro},
    hook::Hook,
    store::{Bank, NOTHING, Rows, TABLES, Table},
};
use crate::scene::Scene;

/// Number of hooks that run at once.
const HOOKS: usize = 3;

/// Hooks and transactions.
#[derive(Clone, Debug)]
pub struct Banks {
    /// The policies, in the order in which transactions put them in force.
    policies: Vec<CompiledPolicy>,
    /// The records of the connections for which the hooks run; they are without one at first.
    records: [Record; HOOKS],
    /// What is broken on purpose.
    defect: Option<Defect>,
}

/// A part of the model itself that can be broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Defect {
    /// Each of a hook's functions asks which bank is in force.
    BankAskedTwice,
    /// A wait does not wait for hooks.
    WaitSkipped,
    /// The transaction writes the bank that is in force.
    SameBank,
}

/// All there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The bank that is in force.
    active: u8,
    banks: [Bank; 2],
    /// Set of the policies whose filters' contexts are there.
    contexts: u8,
    command: Option<Command>,
    hooks: [Hook; HOOKS],
    /// Whether a command has been killed.
    killed: bool,
    faults: u8,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A hook takes its next step.
    Hook(usize),
    /// The command takes its next step; a new one begins if there is none.
    Command,
    /// The command fails, and takes back what it did.
    Fail,
    /// The command is killed.
    Kill,
}

/// A fault.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A hook's answer is not that of any one policy that was in force while it ran.
    Mixed,
    /// A hook found no context where every policy has one.
    ContextGone,
    /// A table was written that a hook may read.
    Overwritten,
}

impl Banks {
    /// The hooks of three connections, of which the second has a record that says that the first service of the
    /// scene had the flow, and a transaction for each of the scene's policies but the first.
    pub fn new(scene: &Scene, defect: Option<Defect>) -> Self {
        let policies = scene.generations.iter().map(|generation| generation.compiled.clone());
        let mut second = Record::new_zeroed();
        second.push(Hop { handle: scene.handles[0], filter: 1 });
        second.legs = 1;
        let records = [Record::new_zeroed(), second, Record::new_zeroed()];
        Self { policies: policies.collect(), records, defect }
    }

    fn rows(&self, bank: Bank) -> Rows<'_> {
        Rows { bank, policies: &self.policies }
    }

    /// The policy that is in force.
    fn in_force(state: &State) -> u8 {
        state.banks[usize::from(state.active)].holds(Table::Header)
    }
}

impl State {
    fn note(&mut self, fault: Fault) {
        self.faults |= 1 << fault as u8;
    }

    fn has(&self, fault: Fault) -> bool {
        self.faults & 1 << fault as u8 != 0
    }
}

impl Model for Banks {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            active: 0,
            banks: [Bank::of(0), Bank([NOTHING; TABLES.len()])],
            contexts: 1,
            command: None,
            hooks: [Hook::Idle; HOOKS],
            killed: false,
            faults: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.faults != 0 {
            return;
        }
        actions.extend((0..HOOKS).map(Action::Hook));
        let last = self.policies.len() - 1;
        if state.command.is_some() || usize::from(Self::in_force(state)) < last {
            actions.push(Action::Command);
        }
        if let Some(command) = state.command {
            actions.push(Action::Kill);
            let steps = self.steps();
            let rest = &steps[usize::from(command.taken)..];
            // Before the first step that changes anything there is nothing to take back.
            if rest.contains(&Micro::Flip) && command.taken > 0 {
                actions.push(Action::Fail);
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Hook(number) => {
                let waited = state.command.is_some_and(|command| command.awaited != 0);
                self.run(&mut state, number);
                if let Some(command) = &mut state.command
                    && waited
                    && command.awaited == 0
                {
                    command.taken += 1;
                }
            }
            Action::Command => self.step(&mut state)?,
            Action::Fail => {
                let Command { before, bank, .. } = state.command?;
                self.overwrite(&mut state, bank.into());
                state.banks[usize::from(bank)].write(Table::Slots, NOTHING);
                state.contexts = 1 << before;
                state.command = None;
            }
            Action::Kill => {
                state.command = None;
                state.killed = true;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("e1 every hook's answer is that of one policy", |_, state: &State| {
                !state.has(Fault::Mixed)
            }),
            Property::always("e2 every redirect finds its context", |_, state: &State| {
                !state.has(Fault::ContextGone)
            }),
            Property::always("e3 no bank is written that a hook reads", |_, state: &State| {
                !state.has(Fault::Overwritten)
            }),
            Property::sometimes(
                "reached: a policy comes into force while hooks decide by the one before",
                |_, state: &State| {
                    let old = |hook: &Hook| match hook {
                        Hook::Read { bank, .. } => *bank != state.active,
                        _ => false,
                    };
                    state.hooks.iter().all(old)
                },
            ),
            Property::sometimes(
                "reached: a command is killed and all policies come into force",
                |banks: &Self, state: &State| {
                    state.killed
                        && state.command.is_none()
                        && usize::from(Self::in_force(state)) == banks.policies.len() - 1
                },
            ),
            Property::sometimes("reached: a command waits for a hook", |_, state: &State| {
                state.command.is_some_and(|command| command.awaited != 0)
            }),
        ]
    }
}

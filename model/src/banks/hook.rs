//! A hook.

use carnet_core::{
    Decision,
    chain::Chain,
    classify::{
        Listeners, Pending, Unobserved, concerns_somebody, decide, destination_concerns_somebody,
        leaf_of, settle,
    },
    table::{LeafRow, Tables as _},
};

use super::{
    Banks, Defect, Fault, State,
    store::{Bank, Rows},
};
use crate::scene::connection;

/// A hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Hook {
    /// None runs.
    Idle,
    /// It has passed the outer gate of the policy that was in force.
    Gated { since: u8 },
    /// It has found out which bank is in force, and its leaf.
    Begun { since: u8, bank: u8, leaf: [u32; 2] },
    /// It has read the chain.
    Read { since: u8, bank: u8, leaf: [u32; 2], chain: Seen },
    /// It has decided.
    Decided { since: u8, bank: u8, slot: u32, handle: u64, filter: u64, blocks: bool },
}

/// A chain, as far as it can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    visited: u32,
    guessed: u32,
    last: u32,
    hops: u32,
    strangers: u32,
    legs: u32,
}

/// What a hook did with its connection: the handle of the service that gets it, the filter, whether it
/// is refused.
type Answer = (u64, u64, bool);

impl Banks {
    /// What a policy alone says of the connection of a hook.
    fn answer(&self, policy: u8, hook: usize) -> Answer {
        let rows = self.rows(Bank::of(policy));
        let to = connection(0);
        let leaf = leaf_of(&rows, &to);
        let chain = Chain::of_record(&rows, &self.records[hook]);
        let decision = self.decide(&rows, leaf, &chain);
        (decision.handle, decision.filter, decision.blocks())
    }

    fn decide(&self, rows: &Rows<'_>, leaf: LeafRow, chain: &Chain) -> Decision {
        let services = rows.header().map_or(0, |header| header.services);
        let mut pending = Undecided { rows, leaf, chain, decision: Decision::PASS };
        settle(chain.hops != 0, chain.legs, services, &mut pending);
        pending.decision
    }

    /// A hook takes its next step.
    pub(super) fn run(&self, state: &mut State, number: usize) {
        let to = connection(0);
        let now = Self::in_force(state);
        let active = state.active;
        let bank_of = |bank: u8| {
            let asked = self.defect == Some(Defect::BankAskedTwice);
            self.rows(state.banks[usize::from(if asked { active } else { bank })])
        };
        let next = match state.hooks[number] {
            Hook::Idle => {
                if destination_concerns_somebody(&bank_of(active), &to) {
                    Hook::Gated { since: now }
                } else {
                    return self.end(state, number, now, (0, 0, false));
                }
            }
            Hook::Gated { since } => {
                let rows = bank_of(active);
                let blank = self.records[number].hop_count == 0;
                if blank && !concerns_somebody(&rows, &to) {
                    return self.end(state, number, since, (0, 0, false));
                }
                let LeafRow { first, count } = leaf_of(&rows, &to);
                Hook::Begun { since, bank: active, leaf: [first, count] }
            }
            Hook::Begun { since, bank, leaf } => {
                let chain = Chain::of_record(&bank_of(bank), &self.records[number]);
                Hook::Read { since, bank, leaf, chain: chain.into() }
            }
            Hook::Read { since, bank, leaf: [first, count], chain } => {
                let leaf = LeafRow { first, count };
                let decision = self.decide(&bank_of(bank), leaf, &chain.into());
                let Decision { slot, handle, filter, .. } = decision;
                Hook::Decided { since, bank, slot, handle, filter, blocks: decision.blocks() }
            }
            Hook::Decided { since, handle, filter, blocks, .. } => {
                if handle != 0 && !self.has_context(state, filter) {
                    state.note(Fault::ContextGone);
                }
                return self.end(state, number, since, (handle, filter, blocks));
            }
        };
        state.hooks[number] = next;
    }

    /// Whether the context of a filter is there. Every redirecting filter has one.
    fn has_context(&self, state: &State, filter: u64) -> bool {
        (0..).zip(&self.policies).any(|(number, policy)| {
            state.contexts & 1 << number != 0 && policy.context(filter).is_some()
        })
    }

    /// A hook ends with an answer. It began when policy `since` was in force.
    fn end(&self, state: &mut State, number: usize, since: u8, answer: Answer) {
        let mut possible = since..=Self::in_force(state);
        if !possible.any(|policy| self.answer(policy, number) == answer) {
            state.note(Fault::Mixed);
        }
        state.hooks[number] = Hook::Idle;
        if let Some(command) = &mut state.command {
            command.awaited &= !(1 << number);
        }
    }
}

struct Undecided<'a> {
    rows: &'a Rows<'a>,
    leaf: LeafRow,
    chain: &'a Chain,
    decision: Decision,
}

impl Listeners for Undecided<'_> {
    fn is_live(&mut self, _handle: u64) -> bool {
        true
    }
}

impl Pending for Undecided<'_> {
    fn decide(&mut self, dead: u64) {
        let to = connection(0);
        self.decision = decide(self.rows, &self.leaf, &to, self.chain, dead, &mut Unobserved);
    }

    fn decision(&mut self) -> &mut Decision {
        &mut self.decision
    }
}

impl From<Chain> for Seen {
    fn from(chain: Chain) -> Self {
        let Chain { visited, guessed, last, hops, strangers, legs } = chain;
        Self { visited, guessed, last, hops, strangers, legs }
    }
}

impl From<Seen> for Chain {
    fn from(seen: Seen) -> Self {
        let Seen { visited, guessed, last, hops, strangers, legs } = seen;
        Self { visited, guessed, last, hops, strangers, legs }
    }
}

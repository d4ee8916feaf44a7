//! The maps of the policy, with both banks: what user mode writes and the hooks read.

use carnet_core::{
    compile::CompiledPolicy,
    table::{
        ConditionRow, FilterRow, HeaderRow, LeafRow, NO_SLOT, NodeRow, Repeat, ServiceRow,
        Step as Turn, Tables,
    },
};

/// A table of a bank. User mode writes one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum Table {
    /// Nodes and leaves, with the candidates.
    Tree,
    /// Filters.
    Filters,
    /// Conditions.
    Conditions,
    /// Services.
    Services,
    /// Slots by handle.
    Slots,
    /// The head.
    Header,
}

/// All of them, in the order in which `write_bank` writes them.
pub(super) const TABLES: [Table; 6] =
    [Table::Tree, Table::Filters, Table::Conditions, Table::Services, Table::Slots, Table::Header];

/// What the tables of a bank hold: the number of the policy of which each is, and [`NOTHING`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Bank(pub(super) [u8; TABLES.len()]);

/// A table that holds nothing.
pub(super) const NOTHING: u8 = u8::MAX;

impl Bank {
    /// A bank that holds a policy.
    pub(super) fn of(policy: u8) -> Self {
        Self([policy; TABLES.len()])
    }

    /// The policy of which a table is.
    pub(super) fn holds(&self, table: Table) -> u8 {
        self.0[table as usize]
    }

    /// Writes a table.
    pub(super) fn write(&mut self, table: Table, policy: u8) {
        self.0[table as usize] = policy;
    }
}

/// A bank as core reads it: every table is that of the policy which it holds, torn or not.
pub(super) struct Rows<'a> {
    /// The bank.
    pub(super) bank: Bank,
    /// The policies, compiled.
    pub(super) policies: &'a [CompiledPolicy],
}

impl<'a> Rows<'a> {
    fn of(&self, table: Table) -> Option<&'a CompiledPolicy> {
        self.policies.get(usize::from(self.bank.holds(table)))
    }
}

impl Repeat for Rows<'_> {
    fn repeat<S: Turn>(count: u32, step: &mut S) {
        CompiledPolicy::repeat(count, step);
    }
}

impl Tables for Rows<'_> {
    fn header(&self) -> Option<&HeaderRow> {
        self.of(Table::Header).map(CompiledPolicy::header)
    }

    fn node(&self, index: u32) -> Option<&NodeRow> {
        self.of(Table::Tree)?.node(index)
    }

    fn leaf(&self, index: u32) -> Option<&LeafRow> {
        self.of(Table::Tree)?.leaf(index)
    }

    fn candidate(&self, index: u32) -> Option<&u32> {
        self.of(Table::Tree)?.candidate(index)
    }

    fn filter(&self, index: u32) -> Option<&FilterRow> {
        self.of(Table::Filters)?.filter(index)
    }

    fn condition(&self, index: u32) -> Option<&ConditionRow> {
        self.of(Table::Conditions)?.condition(index)
    }

    fn service(&self, slot: u32) -> Option<&ServiceRow> {
        self.of(Table::Services)?.service(slot)
    }

    fn slot_of(&self, handle: u64) -> u32 {
        self.of(Table::Slots).map_or(NO_SLOT, |policy| policy.slot_of(handle))
    }

    /// Nothing that runs at a connect asks for it.
    fn handle_of(&self, identity: u64) -> u64 {
        self.of(Table::Slots).map_or(0, |policy| policy.handle_of(identity))
    }
}

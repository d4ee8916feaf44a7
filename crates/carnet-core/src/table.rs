//! The compiled policy: its rows, and the trait over the tables that hold them.
//!
//! # How 100,000 filters are classified in logarithmic time
//!
//! Every condition is a closed range of one field's 128-bit value, so a filter is a box in the
//! space of the [`Field`]s. The compiler cuts that space into a binary tree: a [`NodeRow`] compares
//! one field with one value and goes left (below) or right. A leaf names a short run of the
//! candidate list: the filters whose boxes touch that part of the space, in the order of
//! arbitration (heaviest sublayer first, heaviest filter first). The classifier walks to one leaf
//! and checks only its candidates, exactly. How well the tree is cut changes the cost, never the
//! answer: one leaf with all filters is a valid policy too.
//!
//! Worked example: two filters, `A: port 80` and `B: any port`, give one node
//! `port < 80 ? leaf(B) : node(port < 81 ? leaf(A, B) : leaf(B))`.
//!
//! Most connections concern nobody. The head has two gates for them: ranges of one field each,
//! outside of which no filter matches, so that they are through after a comparison or two.
//!
//! # Transactions
//!
//! All tables exist twice ("banks"). A transaction writes the idle bank and then flips one number,
//! so a decision sees one policy, whole.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{address::Wide, record::MAX_HOPS};

/// Most services that a policy can have: each of them once is as much as a record holds.
pub const MAX_SERVICES: u32 = MAX_HOPS as u32;
/// "No service": not a slot.
pub const NO_SLOT: u32 = u32::MAX;
/// Set in a child reference: the rest is the index of a [`LeafRow`], not of a [`NodeRow`].
pub const LEAF: u32 = 1 << 31;
/// A child reference to the leaf without candidates, which is in no table.
pub const EMPTY_LEAF: u32 = u32::MAX;
/// Deepest tree that the classifier walks. The compiler stops cutting before.
pub const MAX_DEPTH: u32 = 48;
/// Most candidates that the classifier checks in one leaf: the largest table there may be.
pub const MAX_CANDIDATES: u32 = 1 << 20;
/// Most conditions of one filter row: each field once.
pub const MAX_CONDITIONS: u32 = 8;
/// Deepest cgroup level that a condition can name (the root is level 0).
pub const MAX_CGROUP_LEVEL: u32 = 31;

/// A property of a connection that filters can test. The numbers are part of the table layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Field {
    /// IP protocol number: 6, TCP; 17, UDP.
    Protocol = 0,
    /// Destination address, IPv4 as IPv4-mapped IPv6.
    DestinationAddress = 1,
    /// Destination port.
    DestinationPort = 2,
    /// User id of the calling process, in the initial user namespace.
    User = 3,
    /// Id of the calling process's ancestor cgroup at the level that the condition's argument
    /// names; 0 where the process's cgroup is not that deep.
    Cgroup = 4,
    /// The calling process's executable: device in the upper, inode in the lower word.
    Executable = 5,
    /// The executable with which the flow began (contract C38); where no record says otherwise it
    /// is the calling process's.
    OriginalExecutable = 6,
    /// Cookie of the socket's network namespace.
    NetworkNamespace = 7,
}

impl Field {
    /// All fields, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Protocol,
        Self::DestinationAddress,
        Self::DestinationPort,
        Self::User,
        Self::Cgroup,
        Self::Executable,
        Self::OriginalExecutable,
        Self::NetworkNamespace,
    ];

    /// Whether it is a field of the destination: the same for all connections of a flow.
    pub const fn is_of_destination(self) -> bool {
        matches!(self, Self::Protocol | Self::DestinationAddress | Self::DestinationPort)
    }

    /// The bit of this field in [`HeaderRow::fields`].
    #[inline(always)]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// What a filter does with a connection that it matches. The numbers are part of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Action {
    /// Let it pass.
    Permit = 0,
    /// Refuse it.
    Block = 1,
    /// Send it to a service, where the redirect state allows.
    Redirect = 2,
}

/// [`FilterRow::flags`]: later sublayers cannot override the action (contract C45).
pub const FILTER_HARD: u32 = 1;
/// [`FilterRow::flags`]: the block overrides even a hard permit (contract C47).
pub const FILTER_VETO: u32 = 2;

/// [`ServiceRow::failure`]: without a live listener, the connection is refused.
pub const FAILURE_BLOCK: u32 = 0;
/// [`ServiceRow::failure`]: without a live listener, the service is passed over.
pub const FAILURE_SKIP: u32 = 1;

/// The head of a bank. What every connect reads comes first.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HeaderRow {
    /// The outer gate, a range of a field of the destination: only connections in it are looked at
    /// further. All connections of a flow have the same destination, so those that carry a record
    /// come through too.
    pub outer_gate: ConditionRow,
    /// The inner gate, a range of any field: only connections in it, or with a record, are looked
    /// at further.
    pub inner_gate: ConditionRow,
    /// Root of the tree: a node, or with [`LEAF`] a leaf.
    pub root: u32,
    /// Number of services in the policy.
    pub services: u32,
    /// Number of the transaction that wrote this bank; the first is 1.
    pub generation: u64,
    /// Set of the [`Field`]s that any condition tests: what the kernel has to find out of a
    /// connection before it can decide.
    pub fields: u32,
    /// Length in bytes of the administrator's document, from which the bank was compiled.
    pub document_length: u32,
    /// Not 0: some service is unmodified.
    pub unmodified: u32,
    /// Always zero.
    pub zero: u32,
}

/// A cut through the space of connections.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NodeRow {
    /// The field to compare, a [`Field`] as number.
    pub field: u32,
    /// The field's argument: the level, for [`Field::Cgroup`]; else 0.
    pub argument: u32,
    /// Values below go to `left`, this one and those above to `right`.
    pub split: Wide,
    /// A node, or with [`LEAF`] a leaf.
    pub left: u32,
    /// A node, or with [`LEAF`] a leaf.
    pub right: u32,
}

/// A run of the candidate list.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct LeafRow {
    /// Index of the first candidate.
    pub first: u32,
    /// Number of candidates.
    pub count: u32,
}

/// A closed range of one field's values.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ConditionRow {
    /// The field, a [`Field`] as number.
    pub field: u32,
    /// The field's argument: the level, for [`Field::Cgroup`]; else 0.
    pub argument: u32,
    /// Smallest value that matches.
    pub first: Wide,
    /// Largest value that matches.
    pub last: Wide,
}

/// A filter with one range for each field that it tests. An administrator's filter that names
/// several values of one field becomes several rows with one id.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FilterRow {
    /// The filter's id, never reused.
    pub id: u64,
    /// Rank of its sublayer, 0 the heaviest.
    pub sublayer: u32,
    /// An [`Action`] as number.
    pub action: u32,
    /// [`FILTER_HARD`], [`FILTER_VETO`].
    pub flags: u32,
    /// Slot of the service to redirect to; [`NO_SLOT`] for other actions.
    pub slot: u32,
    /// Index of the first condition.
    pub first_condition: u32,
    /// Number of conditions, at most [`MAX_CONDITIONS`].
    pub condition_count: u32,
}

/// A service as the decision needs it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ServiceRow {
    /// The redirect handle, never reused.
    pub handle: u64,
    /// Set of the slots whose results the service trusts.
    pub trusts: u64,
    /// Not 0: the service trusts whoever redirected before it.
    pub trusts_all: u32,
    /// [`FAILURE_BLOCK`] or [`FAILURE_SKIP`].
    pub failure: u32,
    /// Not 0: the service's program knows nothing of records. Its connections without a record are
    /// given that of the flow that they may belong to (adoption); services that co-operate stay under
    /// the hop guard.
    pub unmodified: u32,
    /// The port at whose binding a socket of the service is registered; 0: none.
    pub listen_port: u16,
    /// Not 0: `getsockname()` on its accepted sockets gives the requested destination.
    pub tproxy: u16,
    /// What the service is on every host, see [`identity`](crate::portable::identity).
    pub identity: u64,
    /// Not 0: the service may take over flows of other hosts.
    pub gateway: u32,
    /// Always zero.
    pub zero: u32,
}

const _: () = {
    // A set of services is one 64-bit word.
    assert!(MAX_SERVICES <= 64);
    assert!(size_of::<HeaderRow>() == 112);
    assert!(size_of::<NodeRow>() == 32);
    assert!(size_of::<LeafRow>() == 8);
    assert!(size_of::<ConditionRow>() == 40);
    assert!(size_of::<FilterRow>() == 32);
    assert!(size_of::<ServiceRow>() == 48);
};

/// One step of a bounded loop, with its state.
pub trait Step {
    /// Does step number `index`; gives whether to go on.
    fn step(&mut self, index: u32) -> bool;
}

/// The loop of this crate.
///
/// The host loops with `for`; the kernel with `bpf_loop`, whose body the verifier reads once
/// instead of once per turn.
pub trait Repeat {
    /// Calls `step` with 0, 1, … up to `count - 1`, until it gives `false`.
    fn repeat<S: Step>(count: u32, step: &mut S);

    /// Gives `value` back.
    ///
    /// What goes through here is a number of which the BPF verifier knows nothing. It has to, for
    /// every number in a loop's state on which the body's branches depend:
    ///
    /// - Before Linux 6.7 the verifier looks at one turn of a loop only, and removes branches that
    ///   it has not seen taken: with a start value that it knows, the body would keep the branches
    ///   of its first turn alone.
    /// - It follows every constant that a body leaves in the state, and the combinations of a few of
    ///   them are more than it is willing to look at.
    #[inline(always)]
    fn forget(value: u32) -> u32 {
        value
    }
}

/// The tables of one bank. The two implementations are the BPF maps and the host's vectors.
///
/// An index outside its table gives `None`; the classifier then stops looking, which never happens
/// with tables that the compiler made.
pub trait Tables: Repeat {
    /// The head.
    fn header(&self) -> Option<&HeaderRow>;
    /// A node of the tree.
    fn node(&self, index: u32) -> Option<&NodeRow>;
    /// A leaf of the tree.
    fn leaf(&self, index: u32) -> Option<&LeafRow>;
    /// An entry of the candidate list: the index of a filter.
    fn candidate(&self, index: u32) -> Option<&u32>;
    /// A filter.
    fn filter(&self, index: u32) -> Option<&FilterRow>;
    /// A condition.
    fn condition(&self, index: u32) -> Option<&ConditionRow>;
    /// The service in a slot.
    fn service(&self, slot: u32) -> Option<&ServiceRow>;
    /// The slot of the service with this redirect handle; [`NO_SLOT`] if the policy has none.
    fn slot_of(&self, handle: u64) -> u32;
    /// The redirect handle of the service with this [identity](crate::portable::identity); 0 if the policy
    /// has none.
    fn handle_of(&self, identity: u64) -> u64;
}

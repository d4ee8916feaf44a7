//! The steps by which a policy comes into force, in their order.
//!
//! The engine takes them one after the other, the model checker lets connects happen between them, and
//! lets the command be killed after each.

/// A step of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Wait until every hook that runs now has ended.
    Wait,
    /// Add what the new policy needs of what both banks share: hooks of services' cgroups, contexts.
    Prepare,
    /// Write the idle bank.
    Write,
    /// Put that bank in force, with a single store.
    Flip,
    /// Remove what only the old policy needed.
    Tidy,
}

/// Up to the moment at which the new policy is in force. What fails here is taken back.
///
/// The wait is for a transaction that was killed after its flip: hooks may still read what was in
/// force before that.
pub const UNTIL_IN_FORCE: [Step; 4] = [Step::Wait, Step::Prepare, Step::Write, Step::Flip];

/// Afterwards. What fails here is left to the next transaction.
pub const AFTERWARDS: [Step; 2] = [Step::Wait, Step::Tidy];

//! How the decisions of several sublayers combine (contract C44..C47).
//!
//! | earlier | later permit | later block |
//! |---|---|---|
//! | none | permit | block |
//! | soft permit | permit | block |
//! | hard permit | stays | only a veto blocks |
//! | soft block | permit | block |
//! | hard block | stays | stays |
//!
//! The later decision brings its own strength; a permit after a permit and a block after a block
//! keep the harder of the two. A redirect counts as a soft permit (a callout's permit, C46). All
//! sublayers are evaluated, whatever the first ones said.

use crate::table::{Action, FILTER_HARD, FILTER_VETO, FilterRow};

/// The answer so far. The numbers are part of the layout of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Verdict {
    /// No filter has decided: the connection passes.
    None = 0,
    /// Permitted; a later sublayer may block.
    SoftPermit = 1,
    /// Permitted; only a veto blocks.
    HardPermit = 2,
    /// Blocked; a later sublayer may permit.
    SoftBlock = 3,
    /// Blocked for good.
    HardBlock = 4,
}

impl Verdict {
    /// The answer with this number; one that the layout does not know is a hard block.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::None,
            1 => Self::SoftPermit,
            2 => Self::HardPermit,
            3 => Self::SoftBlock,
            _ => Self::HardBlock,
        }
    }

    /// Whether the connection is refused.
    #[inline(always)]
    pub const fn blocks(self) -> bool {
        matches!(self, Self::SoftBlock | Self::HardBlock)
    }

    /// The answer after a filter with `action` and `flags` has decided for its sublayer.
    #[inline(always)]
    pub const fn after(self, action: Action, flags: u32) -> Self {
        let hard = flags & FILTER_HARD != 0;
        match action {
            Action::Permit | Action::Redirect => match self {
                Self::HardBlock => Self::HardBlock,
                Self::HardPermit => Self::HardPermit,
                Self::None | Self::SoftPermit | Self::SoftBlock => {
                    if hard {
                        Self::HardPermit
                    } else {
                        Self::SoftPermit
                    }
                }
            },
            Action::Block => match self {
                Self::HardBlock => Self::HardBlock,
                Self::HardPermit => {
                    if flags & FILTER_VETO != 0 {
                        Self::HardBlock
                    } else {
                        Self::HardPermit
                    }
                }
                Self::None | Self::SoftPermit | Self::SoftBlock => {
                    if hard || flags & FILTER_VETO != 0 { Self::HardBlock } else { Self::SoftBlock }
                }
            },
        }
    }

    /// Whether a redirect may still be made: not where an earlier sublayer has closed the matter
    /// (contract C26).
    #[inline(always)]
    pub const fn allows_redirect(self) -> bool {
        !matches!(self, Self::HardPermit | Self::HardBlock)
    }
}

/// Reads a filter's action. A number that the layout does not know blocks: a policy that this
/// engine does not understand must not open anything.
#[inline(always)]
pub const fn action_of(filter: &FilterRow) -> Action {
    if filter.action == Action::Permit as u32 {
        Action::Permit
    } else if filter.action == Action::Redirect as u32 {
        Action::Redirect
    } else {
        Action::Block
    }
}

#[cfg(test)]
mod tests {
    use super::Verdict::{HardBlock, HardPermit, None, SoftBlock, SoftPermit};
    use super::*;

    /// The whole truth table: 5 earlier answers times 7 kinds of filter.
    #[test]
    fn the_truth_table_of_the_contract() {
        const HARD: u32 = FILTER_HARD;
        const VETO: u32 = FILTER_VETO;
        use Action::{Block, Permit, Redirect};
        let columns = [
            (Permit, 0),
            (Permit, HARD),
            (Block, 0),
            (Block, HARD),
            (Block, VETO),
            (Block, HARD | VETO),
            (Redirect, 0),
        ];
        let table = [
            (
                None,
                [SoftPermit, HardPermit, SoftBlock, HardBlock, HardBlock, HardBlock, SoftPermit],
            ),
            (
                SoftPermit,
                [SoftPermit, HardPermit, SoftBlock, HardBlock, HardBlock, HardBlock, SoftPermit],
            ),
            (
                HardPermit,
                [HardPermit, HardPermit, HardPermit, HardPermit, HardBlock, HardBlock, HardPermit],
            ),
            (
                SoftBlock,
                [SoftPermit, HardPermit, SoftBlock, HardBlock, HardBlock, HardBlock, SoftPermit],
            ),
            (HardBlock, [HardBlock; 7]),
        ];
        for (earlier, expected) in table {
            for ((action, flags), expected) in columns.into_iter().zip(expected) {
                assert_eq!(
                    earlier.after(action, flags),
                    expected,
                    "{earlier:?} then {action:?} with flags {flags}"
                );
            }
        }
    }
}

//! Whether a connect is still what was decided when its SYN is about to be sent (contract L9, L10).
//!
//! All programs that are attached to a hook run, one after another, and what a later one makes of the
//! destination and of the verdict counts. A service that had to have the flow would not get it, and what
//! was refused would go out. So what was decided stands on the socket, and is compared once more.

use crate::flow::{LEG_REDIRECTED, LEG_REFUSED, LEG_STARTING};

/// What has become of a connect. The numbers are part of the layout of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Outcome {
    /// Nothing was decided about it: what stands on the socket is of an earlier connect.
    Undecided = 0,
    /// It is as was decided. One that carries a record to its destination may reach it at another
    /// address: all its services have had it.
    AsDecided = 1,
    /// It was refused, and another program has cleared that.
    RefusalCleared = 2,
    /// A service was to get it, and another program has sent it elsewhere.
    Diverted = 3,
}

impl Outcome {
    /// What has become of the connect of a socket whose leg is of this
    /// [`kind`](crate::flow::LegState::kind), and which goes to that leg's target or does not.
    #[inline(always)]
    pub const fn of(kind: u32, reaches_target: bool) -> Self {
        if kind & LEG_STARTING == 0 {
            return Self::Undecided;
        }
        match kind & !LEG_STARTING {
            LEG_REFUSED => Self::RefusalCleared,
            LEG_REDIRECTED if !reaches_target => Self::Diverted,
            _ => Self::AsDecided,
        }
    }

    /// Whether the connection must not come about.
    #[inline(always)]
    pub const fn is_undone(self) -> bool {
        matches!(self, Self::RefusalCleared | Self::Diverted)
    }

    /// The outcome with this number.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Undecided,
            1 => Self::AsDecided,
            2 => Self::RefusalCleared,
            3 => Self::Diverted,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::LEG_ONWARD;

    #[test]
    fn only_a_connect_that_was_decided_can_be_undone() {
        for kind in [0, LEG_REDIRECTED, LEG_ONWARD, LEG_REFUSED] {
            for reaches_target in [false, true] {
                assert_eq!(Outcome::of(kind, reaches_target), Outcome::Undecided);
            }
        }
        assert!(!Outcome::Undecided.is_undone() && !Outcome::AsDecided.is_undone());
    }

    #[test]
    fn a_refusal_and_a_redirect_hold() {
        let of = |kind, reaches_target| Outcome::of(kind | LEG_STARTING, reaches_target);
        assert_eq!(of(LEG_REDIRECTED, true), Outcome::AsDecided);
        assert_eq!(of(LEG_REDIRECTED, false), Outcome::Diverted);
        assert_eq!(of(LEG_ONWARD, true), Outcome::AsDecided);
        assert_eq!(of(LEG_ONWARD, false), Outcome::AsDecided);
        for reaches_target in [false, true] {
            assert_eq!(of(LEG_REFUSED, reaches_target), Outcome::RefusalCleared);
        }
        assert!(Outcome::RefusalCleared.is_undone() && Outcome::Diverted.is_undone());
    }

    #[test]
    fn outcomes_are_numbered() {
        for number in 0..4 {
            assert_eq!(Outcome::from_number(number).map(|outcome| outcome as u32), Some(number));
        }
        assert_eq!(Outcome::from_number(4), None);
    }
}

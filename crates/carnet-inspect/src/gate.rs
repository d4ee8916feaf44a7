//! Which datagrams of a flow pass, which are held back, and which are refused. No I/O.
//!
//! What a rule can concern is judged before it passes: each question of DNS, each ClientHello of
//! QUIC, each datagram that is neither. Only the pieces of an incomplete ClientHello are held, few
//! of them and for a short time.

use crate::inspect::{Datagrams, LIMIT, Protocol, Seen, Told};
use crate::rules::Action;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// How many datagrams are held back in a flow, at most; their bytes are limited by [`LIMIT`].
const HELD: usize = 8;
/// How many datagrams are looked at for the log alone.
const LOOKS: u32 = 8;

/// The gate of a flow.
#[derive(Debug)]
pub(crate) struct Gate {
    standing: Standing,
    inspector: Datagrams,
    /// How many more datagrams are looked at while the flow is settled.
    looks: u32,
    /// What is held back, oldest first.
    held: VecDeque<Vec<u8>>,
    /// Since when something is.
    since: Option<Instant>,
}

/// What holds for a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// All of it passes.
    Allowed,
    /// Nothing of it passes.
    Refused,
    /// It depends on what the client asks for.
    Open {
        /// A QUIC connection was allowed, whose packets cannot be read.
        quic: bool,
    },
}

/// What is to be done with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It passes.
    Pass,
    /// What is held passes, and then this one.
    Release,
    /// It is held back; so many others gave way to it.
    Hold {
        /// How many were dropped, which were held longest.
        dropped: u64,
    },
    /// It is refused, and what is held with it.
    Refuse,
    /// It is dropped without being judged.
    Drop,
}

impl Gate {
    /// The gate of a flow about which rules have decided, or not yet.
    pub(crate) fn new(settled: Option<Action>) -> Self {
        Self {
            standing: match settled {
                Some(Action::Allow) => Standing::Allowed,
                Some(Action::Refuse) => Standing::Refused,
                None => Standing::Open { quic: false },
            },
            inspector: Datagrams::new(),
            looks: LOOKS,
            held: VecDeque::new(),
            since: None,
        }
    }

    /// Tells what to do with the next datagram. `judge` is asked about what the client asks for;
    /// where the flow is settled, its answer changes nothing.
    pub(crate) fn take(
        &mut self,
        datagram: &[u8],
        now: Instant,
        mut judge: impl FnMut(&Seen) -> Action,
    ) -> Step {
        let quic_passes = match self.standing {
            Standing::Open { quic } => quic,
            settled => {
                self.look(datagram, judge);
                return if settled == Standing::Allowed { Step::Pass } else { Step::Refuse };
            }
        };
        match self.inspector.feed(datagram) {
            Told::Asks(seen) => {
                let is_quic = seen.protocol == Protocol::Quic;
                match judge(&seen) {
                    Action::Allow if is_quic => {
                        self.standing = Standing::Open { quic: true };
                        if self.held.is_empty() { Step::Pass } else { Step::Release }
                    }
                    Action::Allow => Step::Pass,
                    Action::Refuse => {
                        // Its later packets are not told from those of other connections.
                        if is_quic {
                            self.standing = Standing::Refused;
                        }
                        Step::Refuse
                    }
                }
            }
            Told::Continues if quic_passes => Step::Pass,
            Told::Begins | Told::Continues => self.hold(datagram, now),
            Told::TooMany => Step::Drop,
        }
    }

    /// When what is held has been held long enough.
    pub(crate) fn deadline(&self, patience: Duration) -> Option<Instant> {
        self.since.map(|since| since + patience)
    }

    /// Tells what to do with what is held, now that this was long enough: it is a QUIC client's that
    /// does not say where it wants to go. The rest of its first message is judged when it comes.
    pub(crate) fn expire(&mut self, mut judge: impl FnMut(&Seen) -> Action) -> Step {
        match judge(&Seen::of(Protocol::Quic)) {
            Action::Allow => {
                self.standing = Standing::Open { quic: true };
                Step::Release
            }
            Action::Refuse => {
                self.standing = Standing::Refused;
                Step::Refuse
            }
        }
    }

    /// Gives out what is held.
    pub(crate) fn release(&mut self) -> VecDeque<Vec<u8>> {
        self.since = None;
        std::mem::take(&mut self.held)
    }

    /// Looks at a datagram of a settled flow, for the log.
    fn look(&mut self, datagram: &[u8], mut judge: impl FnMut(&Seen) -> Action) {
        if self.looks == 0 {
            return;
        }
        self.looks -= 1;
        if let Told::Asks(seen) = self.inspector.feed(datagram) {
            judge(&seen);
            if seen.host.is_some() {
                self.looks = 0;
            }
        }
        if self.looks == 0 {
            self.inspector = Datagrams::new();
        }
    }

    fn hold(&mut self, datagram: &[u8], now: Instant) -> Step {
        self.since.get_or_insert(now);
        self.held.push_back(datagram.to_vec());
        let mut bytes: usize = self.held.iter().map(Vec::len).sum();
        let mut dropped = 0;
        while self.held.len() > HELD || (bytes > LIMIT && self.held.len() > 1) {
            bytes -= self.held.pop_front().map_or(0, |oldest| oldest.len());
            dropped += 1;
        }
        Step::Hold { dropped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::test_datagrams::{hello_in_two, query};

    /// Refuses names that begin with "bad", and says what else it is told to.
    fn judge(nameless: Action) -> impl FnMut(&Seen) -> Action {
        move |seen| match &seen.host {
            Some(host) if host.starts_with("bad") => Action::Refuse,
            Some(_) => Action::Allow,
            None => nameless,
        }
    }

    #[test]
    fn settled_flows_are_looked_at_for_the_log_only() {
        for (action, step) in [(Action::Allow, Step::Pass), (Action::Refuse, Step::Refuse)] {
            let mut gate = Gate::new(Some(action));
            let mut seen = Vec::new();
            for datagram in [b"odd".to_vec(), query("bad.test"), query("other.test")] {
                let step_taken = gate.take(&datagram, Instant::now(), |asked| {
                    seen.push(asked.host.clone());
                    Action::Allow
                });
                assert_eq!(step_taken, step);
            }
            assert_eq!(seen, [None, Some("bad.test".to_owned())]);
        }
    }

    #[test]
    fn every_question_is_judged() {
        let mut gate = Gate::new(None);
        for (datagram, step) in [
            (query("good.test"), Step::Pass),
            (query("bad.test"), Step::Refuse),
            (query("good.test"), Step::Pass),
            (b"something".to_vec(), Step::Refuse),
        ] {
            assert_eq!(gate.take(&datagram, Instant::now(), judge(Action::Refuse)), step);
        }
    }

    #[test]
    fn a_hello_is_held_until_it_is_complete() {
        for (host, step) in [("good.test", Step::Release), ("bad.test", Step::Refuse)] {
            let [first, second] = hello_in_two(b"12345678", host);
            let now = Instant::now();
            let mut gate = Gate::new(None);
            let take = |gate: &mut Gate, bytes: &[u8]| gate.take(bytes, now, judge(Action::Allow));
            assert_eq!(take(&mut gate, &first), Step::Hold { dropped: 0 });
            assert_eq!(take(&mut gate, b"\x40 early"), Step::Hold { dropped: 0 });
            assert_eq!(gate.deadline(Duration::from_secs(1)), Some(now + Duration::from_secs(1)));
            assert_eq!(take(&mut gate, &second), step);
            assert_eq!(gate.release(), [first.clone(), b"\x40 early".to_vec()]);
            assert_eq!(gate.deadline(Duration::ZERO), None);
            let later = if step == Step::Release { Step::Pass } else { Step::Refuse };
            for datagram in [&first, &second, &b"\x40 later".to_vec(), &query("good.test")] {
                assert_eq!(take(&mut gate, datagram), later);
            }
        }
    }

    #[test]
    fn a_hello_that_is_late_is_judged_all_the_same() {
        let [first, second] = hello_in_two(b"12345678", "bad.test");
        let mut gate = Gate::new(None);
        gate.take(&first, Instant::now(), judge(Action::Allow));
        assert_eq!(gate.expire(judge(Action::Allow)), Step::Release);
        assert_eq!(gate.release().len(), 1);
        assert_eq!(gate.take(b"\x40", Instant::now(), judge(Action::Allow)), Step::Pass);
        assert_eq!(gate.take(&second, Instant::now(), judge(Action::Allow)), Step::Refuse);

        let mut gate = Gate::new(None);
        gate.take(&first, Instant::now(), judge(Action::Refuse));
        assert_eq!(gate.expire(judge(Action::Refuse)), Step::Refuse);
        assert_eq!(gate.take(b"\x40", Instant::now(), judge(Action::Allow)), Step::Refuse);
    }

    #[test]
    fn little_is_held_and_the_oldest_gives_way() {
        let [first, _] = hello_in_two(b"12345678", "good.test");
        let mut gate = Gate::new(None);
        let mut take = |bytes: &[u8]| gate.take(bytes, Instant::now(), judge(Action::Allow));
        take(&first);
        for _ in 1..HELD {
            assert_eq!(take(&[0x40; 100]), Step::Hold { dropped: 0 });
        }
        assert_eq!(take(&[0x41; 100]), Step::Hold { dropped: 1 });
        assert_eq!(take(&[0x42; LIMIT - 50]), Step::Hold { dropped: HELD as u64 });
        assert_eq!(take(&[0x43; 60_000]), Step::Hold { dropped: 1 });
        assert_eq!(gate.release(), [vec![0x43; 60_000]]);
    }
}

//! What a flow carries as a proof, and the judgement of it.
//!
//! A client begins with a hello: what was demanded when it began. Every service that a flow passes puts
//! a mark before all that it relays, so a server gets the marks of the services, the last one first, and
//! then the hello. The server judges; the client gets the marks in the answer.

use anyhow::{Result, bail};

use crate::board::{BYTES, Demand, ENTRIES, REFUSAL, SERVICES};

/// The first byte of a hello. Marks are less.
const HELLO: u8 = 0xff;
/// Bytes of a hello.
pub(crate) const HELLO_BYTES: usize = 1 + BYTES + 1 + 8;
/// Most marks that are read before a hello.
pub(crate) const MOST_MARKS: usize = 16;

/// The mark of a service.
pub(crate) fn mark(service: usize) -> u8 {
    service as u8 + 1
}

/// How a flow begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// What was demanded before the client connected.
    pub(crate) demand: Demand,
    /// Whether the server is to echo what follows; else it answers and closes.
    pub(crate) stays: bool,
    /// The flow's number, which the answer has.
    pub(crate) number: u64,
}

impl Hello {
    /// As it is sent.
    pub(crate) fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0] = HELLO;
        bytes[1..=BYTES].copy_from_slice(&self.demand.to_bytes());
        bytes[1 + BYTES] = self.stays.into();
        bytes[2 + BYTES..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }
}

/// A hello with the marks before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The marks, that of the last service first.
    pub(crate) marks: Vec<u8>,
    /// The hello.
    pub(crate) hello: Hello,
}

impl Arrival {
    /// Reads one from the begin of a flow's bytes: `None` if more are needed.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn read(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        let Some(begin) = bytes.iter().take(MOST_MARKS + 1).position(|byte| *byte == HELLO) else {
            if bytes.len() > MOST_MARKS {
                bail!("no hello after {MOST_MARKS} marks");
            }
            return Ok(None);
        };
        let Some(hello) = bytes.get(begin..begin + HELLO_BYTES) else {
            return Ok(None);
        };
        let mut demand = [0; BYTES];
        demand.copy_from_slice(&hello[1..=BYTES]);
        let mut number = [0; 8];
        number.copy_from_slice(&hello[2 + BYTES..]);
        let hello = Hello {
            demand: Demand::from_bytes(&demand),
            stays: hello[1 + BYTES] != 0,
            number: u64::from_le_bytes(number),
        };
        Ok(Some((Self { marks: bytes[..begin].to_vec(), hello }, begin + HELLO_BYTES)))
    }

    /// The answer to it: the marks and the number.
    pub(crate) fn answer(&self) -> Vec<u8> {
        let mut answer = vec![self.marks.len() as u8];
        answer.extend_from_slice(&self.marks);
        answer.extend_from_slice(&self.hello.number.to_le_bytes());
        answer
    }

    /// What is wrong with it, given what is demanded now that it has arrived.
    pub(crate) fn faults(&self, now: &Demand) -> Vec<Fault> {
        let mut faults = Vec::new();
        for place in 0..SERVICES.len() {
            let (before, after) = (self.hello.demand.0[place], now.0[place]);
            let times = self.marks.iter().filter(|found| **found == mark(place)).count() as u64;
            if times > 1 + before.added(after) {
                faults.push(Fault::Twice);
            }
            if !before.steady(after) {
                continue;
            }
            if before.required() && times == 0 {
                faults.push(Fault::Uninspected);
            }
            if !before.allowed() && times > 0 {
                faults.push(Fault::Unasked);
            }
        }
        if self.marks.iter().any(|mark| usize::from(*mark) > SERVICES.len() || *mark == 0) {
            faults.push(Fault::Unknown);
        }
        faults
    }
}

/// What is wrong with a flow that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It did not pass a service that was required all the time.
    Uninspected,
    /// It passed a service more than once, while that was the same one.
    Twice,
    /// It passed a service that was not allowed at any time.
    Unasked,
    /// It has a mark that is no service's.
    Unknown,
    /// It came from an address that is no service's.
    Direct,
}

/// Whether a flow that failed may fail: a service that it may have passed was not well, or the filter
/// may have refused it.
pub(crate) fn may_fail(before: &Demand, after: &Demand, to_refused_port: bool) -> bool {
    (0..ENTRIES).any(|place| {
        let (before, after) = (before.0[place], after.0[place]);
        let concerned = before.allowed() || after.allowed() || !before.steady(after);
        if place == REFUSAL {
            concerned && to_refused_port
        } else {
            concerned && !before.lived(after)
        }
    })
}

/// Whether a flow that arrived had to be refused.
pub(crate) fn had_to_fail(before: &Demand, after: &Demand, to_refused_port: bool) -> bool {
    let (before, after) = (before.0[REFUSAL], after.0[REFUSAL]);
    to_refused_port && before.required() && before.steady(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Entry;

    fn demand(required: [bool; ENTRIES]) -> Demand {
        Demand(required.map(|required| {
            let entry = Entry::default().living(true);
            if required { entry.demanding(true, true) } else { entry }
        }))
    }

    fn arrival(demand: Demand, marks: &[u8]) -> Arrival {
        Arrival { marks: marks.to_vec(), hello: Hello { demand, stays: true, number: 7 } }
    }

    #[test]
    fn an_arrival_is_read_when_it_is_whole() {
        let sent = arrival(demand([true, false, true, false]), &[3, 1]);
        let bytes = [&[3, 1][..], &sent.hello.to_bytes(), b"more"].concat();
        for length in 0..2 + HELLO_BYTES {
            assert_eq!(Arrival::read(&bytes[..length]).unwrap(), None);
        }
        assert_eq!(Arrival::read(&bytes).unwrap(), Some((sent, 2 + HELLO_BYTES)));
        assert!(Arrival::read(&[1; MOST_MARKS + 1]).is_err());
    }

    #[test]
    fn flows_are_judged_by_what_was_demanded_all_the_time() {
        let alpha_and_gamma = demand([true, false, true, false]);
        let judge = |marks: &[u8], now: &Demand| arrival(alpha_and_gamma, marks).faults(now);
        assert_eq!(judge(&[3, 1], &alpha_and_gamma), []);
        assert_eq!(judge(&[1], &alpha_and_gamma), [Fault::Uninspected]);
        assert_eq!(judge(&[3, 1, 1], &alpha_and_gamma), [Fault::Twice]);
        assert_eq!(judge(&[3, 2, 1], &alpha_and_gamma), [Fault::Unasked]);
        assert_eq!(judge(&[3, 1, 9], &alpha_and_gamma), [Fault::Unknown]);
        let mut now = alpha_and_gamma;
        now.0[2] = now.0[2].demanding(false, true);
        assert_eq!(judge(&[1], &now), []);
        // Added again it is another service, which may get what the one before has had.
        now = alpha_and_gamma;
        now.0[2] = now.0[2].demanding(false, false).adding().demanding(true, true);
        assert_eq!(judge(&[3, 3, 1], &now), []);
        assert_eq!(judge(&[3, 3, 3, 1], &now), [Fault::Twice]);
        assert_eq!(judge(&[3, 1, 1], &now), [Fault::Twice]);
    }

    #[test]
    fn a_flow_may_fail_where_a_service_was_killed_or_a_filter_refuses() {
        let before = demand([true, false, false, false]);
        assert!(!may_fail(&before, &before, true));
        let mut after = before;
        after.0[1] = after.0[1].living(false);
        assert!(!may_fail(&before, &after, true), "nobody passes beta");
        after.0[0] = after.0[0].living(false).living(true);
        assert!(may_fail(&before, &after, false));
        let refusing = demand([true, false, false, true]);
        assert!(may_fail(&refusing, &refusing, true) && !may_fail(&refusing, &refusing, false));
        assert!(had_to_fail(&refusing, &refusing, true));
        assert!(!had_to_fail(&refusing, &before, true));
    }
}

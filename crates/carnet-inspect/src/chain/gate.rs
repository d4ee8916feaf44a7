//! What is taken of the records that come from other hosts: what is fresh, was not taken before, and is for
//! this host.

use super::keyring::Keyring;
use super::tlv::{Envelope, NONCE, Refusal, open};
use crate::proxy_protocol::Header;
use carnet::PortableRecord;
use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How old a record may be, and how far in the future: by so much clocks may differ. Milliseconds.
const WINDOW_MS: u64 = 30_000;
/// For how long a record that was taken is remembered: one from the end of the window would be good until
/// then.
const REMEMBERED_MS: u64 = 2 * WINDOW_MS;
/// How many are remembered: four thousand a second.
const MEMORY: usize = 1 << 18;

/// Takes records of other hosts.
#[derive(Debug)]
pub struct Gate {
    keys: Arc<Keyring>,
    /// Whether a header without a record is one of a new flow.
    optional: bool,
    seen: Mutex<Seen>,
    taken: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
}

impl Gate {
    /// A gate with these keys, at which nothing has come yet; a header without a record begins a new flow
    /// if it is `optional`.
    pub fn new(keys: Arc<Keyring>, optional: bool) -> Self {
        Self {
            keys,
            optional,
            seen: Mutex::new(Seen::since(now_ms())),
            taken: AtomicU64::new(0),
            refused: Default::default(),
        }
    }

    /// Takes the record out of a header that came at the address `local`; none, if it is optional and not
    /// there.
    ///
    /// # Errors
    /// [`Refusal`], which is counted.
    pub fn take(
        &self,
        header: &Header<'_>,
        local: SocketAddr,
    ) -> Result<Option<PortableRecord>, Refusal> {
        let result = self.record_in(header, local);
        let counter = match &result {
            Ok(None) => return result,
            Ok(Some(_)) => Some(&self.taken),
            Err(refusal) => self.refused.get(*refusal as usize),
        };
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn record_in(
        &self,
        header: &Header<'_>,
        local: SocketAddr,
    ) -> Result<Option<PortableRecord>, Refusal> {
        let Some(value) = header.chain()? else {
            return if self.optional { Ok(None) } else { Err(Refusal::Missing) };
        };
        let audience = SocketAddr::new(local.ip().to_canonical(), local.port());
        let envelope =
            Envelope { source: header.source, destination: header.destination, audience };
        let letter = open(&self.keys.keys(), &envelope, &value)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.admit(now_ms(), letter.issued_ms, letter.nonce)?;
        Ok(Some(letter.record))
    }
}

impl fmt::Display for Gate {
    /// How many were taken, and how many refused, by reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "records of chains: {} taken", self.taken.load(Ordering::Relaxed))?;
        for (refusal, count) in Refusal::ALL.iter().zip(&self.refused) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                write!(f, ", {count} refused ({})", refusal.name())?;
            }
        }
        Ok(())
    }
}

/// The time of day: milliseconds since 1970 (UTC).
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What was taken lately. A record is taken once; of what cannot be remembered nothing is.
#[derive(Debug)]
struct Seen {
    /// When this program began: what is older may have been taken by the one before.
    began_ms: u64,
    /// The latest time that there was. A clock that is set back does not make old records good again.
    latest_ms: u64,
    nonces: HashSet<[u8; NONCE]>,
    /// The same in the order in which they came, with the time.
    queue: VecDeque<(u64, [u8; NONCE])>,
}

impl Seen {
    fn since(began_ms: u64) -> Self {
        Self { began_ms, latest_ms: began_ms, nonces: HashSet::new(), queue: VecDeque::new() }
    }

    fn admit(&mut self, now_ms: u64, issued_ms: u64, nonce: [u8; NONCE]) -> Result<(), Refusal> {
        self.latest_ms = self.latest_ms.max(now_ms);
        let now_ms = self.latest_ms;
        if issued_ms.saturating_add(WINDOW_MS) < now_ms {
            return Err(Refusal::Expired);
        }
        if issued_ms > now_ms.saturating_add(WINDOW_MS) {
            return Err(Refusal::Future);
        }
        if issued_ms < self.began_ms {
            return Err(Refusal::Earlier);
        }
        while let Some((came_ms, oldest)) = self.queue.front()
            && came_ms.saturating_add(REMEMBERED_MS) < now_ms
        {
            self.nonces.remove(oldest);
            self.queue.pop_front();
        }
        if self.nonces.contains(&nonce) {
            return Err(Refusal::Replayed);
        }
        if self.queue.len() >= MEMORY {
            return Err(Refusal::Full);
        }
        self.nonces.insert(nonce);
        self.queue.push_back((now_ms, nonce));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{keys, record};
    use super::super::tlv::{Letter, TYPE, seal};
    use super::*;
    use crate::proxy_protocol::{header_with, read_header};
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000_000;

    fn nonce(number: u64) -> [u8; NONCE] {
        let mut nonce = [0; NONCE];
        nonce[..8].copy_from_slice(&number.to_le_bytes());
        nonce
    }

    #[test]
    fn what_is_fresh_is_taken_once() {
        let mut seen = Seen::since(NOW - WINDOW_MS - 1);
        for (number, issued, expected) in [
            (1, NOW, Ok(())),
            (1, NOW, Err(Refusal::Replayed)),
            (2, NOW - WINDOW_MS, Ok(())),
            (3, NOW - WINDOW_MS - 1, Err(Refusal::Expired)),
            (4, NOW + WINDOW_MS, Ok(())),
            (5, NOW + WINDOW_MS + 1, Err(Refusal::Future)),
            (6, 0, Err(Refusal::Expired)),
            (7, u64::MAX, Err(Refusal::Future)),
            // Not used up by what was refused.
            (3, NOW, Ok(())),
        ] {
            assert_eq!(seen.admit(NOW, issued, nonce(number)), expected, "{number}");
        }
    }

    #[test]
    fn what_may_have_been_taken_by_the_program_before_is_not_taken() {
        let mut seen = Seen::since(NOW);
        assert_eq!(seen.admit(NOW, NOW - 1, nonce(1)), Err(Refusal::Earlier));
        assert_eq!(seen.admit(NOW, NOW, nonce(1)), Ok(()));
    }

    #[test]
    fn a_clock_that_is_set_back_makes_nothing_good_again() {
        let mut seen = Seen::since(NOW);
        assert_eq!(seen.admit(NOW, NOW, nonce(1)), Ok(()));
        let later = NOW + REMEMBERED_MS + 1;
        assert_eq!(seen.admit(later, later, nonce(2)), Ok(()));
        // The first one is forgotten by now.
        assert_eq!(seen.nonces.len(), 1);
        assert_eq!(seen.admit(NOW, NOW, nonce(1)), Err(Refusal::Expired));
    }

    #[test]
    fn of_what_cannot_be_remembered_nothing_is_taken() {
        let mut seen = Seen::since(NOW);
        for number in 0..MEMORY as u64 {
            assert_eq!(seen.admit(NOW, NOW, nonce(number)), Ok(()));
        }
        let one_more = nonce(MEMORY as u64);
        assert_eq!(seen.admit(NOW, NOW, one_more), Err(Refusal::Full));
        assert_eq!(seen.admit(NOW, NOW, nonce(0)), Err(Refusal::Replayed));
        let later = NOW + REMEMBERED_MS + 1;
        assert_eq!(seen.admit(later, later, one_more), Ok(()));
        assert_eq!((seen.nonces.len(), seen.queue.len()), (1, 1));
    }

    proptest! {
        /// Whatever comes when, and however the clock goes: no record is taken twice.
        #[test]
        fn nothing_is_taken_twice(
            steps in prop::collection::vec((-100_000_i64..100_000, 0_u64..4, -40_000_i64..40_000), 1..60),
        ) {
            let mut seen = Seen::since(NOW);
            let mut now = NOW;
            // The time of issue is sealed with the nonce.
            let mut letters: Vec<(u64, u64, bool)> = Vec::new();
            for (elapsed, number, issued) in steps {
                now = now.saturating_add_signed(elapsed);
                let issued = match letters.iter().find(|letter| letter.0 == number) {
                    Some(letter) => letter.1,
                    None => now.saturating_add_signed(issued),
                };
                if letters.iter().all(|letter| letter.0 != number) {
                    letters.push((number, issued, false));
                }
                let taken = seen.admit(now, issued, nonce(number)).is_ok();
                let letter = letters.iter_mut().find(|letter| letter.0 == number).unwrap();
                prop_assert!(!(taken && letter.2), "{number} a second time");
                letter.2 |= taken;
            }
        }
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A header with these values of our type.
    fn header_of(values: &[Vec<u8>]) -> Vec<u8> {
        let tlvs: Vec<_> = values.iter().map(|value| (TYPE, &value[..])).collect();
        header_with(address("127.0.0.1:1"), address("192.0.2.9:80"), &tlvs).unwrap()
    }

    fn value(byte: u8, issued_ms: u64, number: u64) -> Vec<u8> {
        let envelope = Envelope {
            source: address("127.0.0.1:1"),
            destination: address("192.0.2.9:80"),
            audience: address("192.0.2.2:15003"),
        };
        let letter = Letter { issued_ms, nonce: nonce(number), record: record(1) };
        seal(&keys(byte), &envelope, &letter)
    }

    #[test]
    fn each_refusal_is_counted_under_its_name() {
        let gate = Gate::new(Arc::new(keys(1).into()), false);
        let local = address("[::ffff:192.0.2.2]:15003");
        let now = now_ms();
        let cut = value(1, now, 2)[..20].to_vec();
        let mut forged = value(1, now, 3);
        forged[60] ^= 1;
        for (values, local, expected) in [
            (vec![], local, Err(Refusal::Missing)),
            (vec![cut], local, Err(Refusal::Malformed)),
            (vec![value(1, now, 4), value(1, now, 5)], local, Err(Refusal::Malformed)),
            (vec![value(2, now, 6)], local, Err(Refusal::UnknownKey)),
            (vec![forged], local, Err(Refusal::Forged)),
            (vec![value(1, now, 7)], address("192.0.2.2:1"), Err(Refusal::Audience)),
            (vec![value(1, now - 60_000, 8)], local, Err(Refusal::Expired)),
            (vec![value(1, now + 90_000, 9)], local, Err(Refusal::Future)),
            (vec![value(1, now - 20_000, 10)], local, Err(Refusal::Earlier)),
            (vec![value(1, now, 11)], local, Ok(true)),
            (vec![value(1, now, 11)], local, Err(Refusal::Replayed)),
        ] {
            let bytes = header_of(&values);
            let header = read_header(&bytes).unwrap();
            assert_eq!(gate.take(&header, local).map(|record| record.is_some()), expected);
        }
        assert_eq!(
            gate.to_string(),
            "records of chains: 1 taken, 1 refused (missing), 2 refused (malformed), 1 refused \
             (unknown key), 1 refused (forged), 1 refused (other audience), 1 refused (expired), 1 \
             refused (from the future), 1 refused (older than this program), 1 refused (replayed)"
        );
        let optional = Gate::new(Arc::new(keys(1).into()), true);
        let bytes = header_of(&[]);
        assert_eq!(optional.take(&read_header(&bytes).unwrap(), local), Ok(None));
    }
}

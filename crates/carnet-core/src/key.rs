//! The keys of the records' MACs: which of them count, and when.
//!
//! There are two places for keys. The key in the current place issues records; the one in the other
//! place, its predecessor, is accepted for as long as the rotation that replaced it said, so that
//! records which services hold at that moment still serve. No third key ever counts: a rotation
//! within the overlap of an earlier one ends that overlap.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::record::{LIFETIME_NS, Record, RecordError};

/// How long a replaced key is accepted unless told otherwise: ten minutes, in nanoseconds. Services
/// set a record within moments of its query; this leaves room for one that holds it for a while.
pub const DEFAULT_OVERLAP_NS: u64 = 600_000_000_000;

/// Longest overlap, in nanoseconds: after that every record of the replaced key has expired.
pub const MAX_OVERLAP_NS: u64 = LIFETIME_NS;

/// What is known of a key. The key itself is elsewhere, where nobody but the hooks reads it.
///
/// Layout (24 bytes, little-endian): three 64-bit numbers in the order of the fields.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct KeyRow {
    /// Its number: 1 for the key with which the instance was brought up.
    pub generation: u64,
    /// Since when it issues records: nanoseconds of the boot-time clock.
    pub since_ns: u64,
    /// For how long after that its predecessor is accepted, in nanoseconds; 0 for not at all.
    pub overlap_ns: u64,
}

const _: () = assert!(size_of::<KeyRow>() == 24);

/// The place of the key that is not at `place`, which is 0 or 1.
#[inline(always)]
pub const fn other(place: u32) -> u32 {
    place ^ 1
}

impl KeyRow {
    /// For how many nanoseconds from `now_ns` of the boot-time clock the predecessor of this key, which
    /// is the current one, is still accepted; 0 if it is not.
    #[inline(always)]
    pub const fn predecessor_left(&self, now_ns: u64) -> u64 {
        self.overlap_ns.saturating_sub(now_ns.wrapping_sub(self.since_ns))
    }

    /// Verifies a record as [`Record::verify`] does, under this key, which is the current one at
    /// `place`, and under its predecessor if that is still accepted. `mac` computes the record's MAC
    /// under the key at a place.
    ///
    /// # Errors
    /// As for [`Record::verify`].
    #[inline(always)]
    pub fn verify(
        &self,
        place: u32,
        record: &Record,
        given: usize,
        epoch: u64,
        now_ns: u64,
        mac: impl Fn(u32) -> u64,
    ) -> Result<(), RecordError> {
        if !record.well_formed(given) {
            return Err(RecordError::Malformed);
        }
        let result = record.verify(given, mac(place), epoch, now_ns);
        if matches!(result, Err(RecordError::Forged)) && self.predecessor_left(now_ns) != 0 {
            return record.verify(given, mac(other(place)), epoch, now_ns);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        record::{Hop, MAGIC, VERSION, mac_of},
        siphash::Key,
    };
    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    const KEYS: [Key; 2] = [[1, 2], [3, 4]];
    const SINCE: u64 = 20 * LIFETIME_NS;

    fn record_under(key: &Key, issued_ns: u64) -> Record {
        let mut record = Record::new_zeroed();
        (record.magic, record.version, record.epoch) = (MAGIC, VERSION, 9);
        record.issued_ns = issued_ns;
        assert!(record.push(Hop { handle: 5, filter: 6 }));
        record.mac = mac_of(&record, key);
        record
    }

    fn check(row: &KeyRow, place: u32, record: &Record, now: u64) -> Result<(), RecordError> {
        let mac = |place: u32| mac_of(record, &KEYS[place as usize]);
        row.verify(place, record, record.length.into(), 9, now, mac)
    }

    #[test]
    fn a_predecessor_is_accepted_for_its_overlap_and_no_longer() {
        let row = KeyRow { generation: 2, since_ns: SINCE, overlap_ns: 100 };
        for place in [0, 1] {
            let old = record_under(&KEYS[other(place) as usize], SINCE - 1);
            let new = record_under(&KEYS[place as usize], SINCE);
            assert_eq!(check(&row, place, &old, SINCE), Ok(()));
            assert_eq!(check(&row, place, &old, SINCE + 99), Ok(()));
            assert_eq!(check(&row, place, &old, SINCE + 100), Err(RecordError::Forged));
            assert_eq!(check(&row, place, &new, SINCE + 100), Ok(()));
        }
    }

    #[test]
    fn without_an_overlap_the_predecessor_is_void_at_once() {
        let row = KeyRow { generation: 2, since_ns: SINCE, overlap_ns: 0 };
        let old = record_under(&KEYS[1], SINCE - 1);
        assert_eq!(check(&row, 0, &old, SINCE), Err(RecordError::Forged));
        // A clock that is behind the rotation's accepts nothing either.
        let row = KeyRow { overlap_ns: MAX_OVERLAP_NS, ..row };
        assert_eq!(check(&row, 0, &old, SINCE - 1), Err(RecordError::Forged));
    }

    #[test]
    fn a_record_of_the_predecessor_expires_as_others_do() {
        let row = KeyRow { generation: 2, since_ns: SINCE, overlap_ns: MAX_OVERLAP_NS };
        let old = record_under(&KEYS[1], SINCE - 1);
        assert_eq!(check(&row, 0, &old, SINCE + LIFETIME_NS - 1), Ok(()));
        let older = record_under(&KEYS[1], SINCE - 2);
        let late = check(&row, 0, &older, SINCE + LIFETIME_NS - 1);
        assert_eq!(late, Err(RecordError::Expired));
    }

    proptest! {
        /// No third key counts, and at no time does one of two that is not to.
        #[test]
        fn the_overlap_alone_decides_about_the_predecessor(
            overlap_ns in 0..=MAX_OVERLAP_NS,
            after in 0..2 * MAX_OVERLAP_NS,
            place in 0_u32..2,
        ) {
            let row = KeyRow { generation: 7, since_ns: SINCE, overlap_ns };
            let now = SINCE + after;
            let of = |key| record_under(key, now);
            prop_assert_eq!(check(&row, place, &of(&KEYS[place as usize]), now), Ok(()));
            let predecessor = check(&row, place, &of(&KEYS[other(place) as usize]), now);
            prop_assert_eq!(predecessor.is_ok(), after < overlap_ns);
            prop_assert_eq!(check(&row, place, &of(&[5, 6]), now), Err(RecordError::Forged));
        }
    }
}

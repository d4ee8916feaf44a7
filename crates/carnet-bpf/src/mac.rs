//! The MACs of records, under this instance's keys.

use core::ptr;

use carnet_core::record::{MAX_RECORD, Record, RecordError, RecordMac};

use crate::{
    maps::{CONFIG, CURRENT_KEY, KEY_ROWS, KEYS},
    report::now,
};

/// The place of the key that issues records.
#[inline(always)]
fn current() -> u32 {
    CURRENT_KEY.get(0).map_or(0, |place| *place as u32 & 1)
}

/// Gives a record its MAC, under the current key.
#[inline(always)]
pub(crate) fn issue(record: &mut Record) {
    record.mac = carnet_mac(record, current());
}

/// Verifies a record of which `given` bytes were received.
#[inline(always)]
pub(crate) fn verify(record: &Record, given: u32) -> Result<(), RecordError> {
    let place = current();
    let (Some(config), Some(row)) = (CONFIG.get(0), KEY_ROWS.get(place)) else {
        return Err(RecordError::Forged);
    };
    let mac = |place| carnet_mac(record, place);
    row.verify(place, record, given as usize, config.epoch, now(), mac)
}

/// The MAC of a record under the key at a place. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_mac(record: *const Record, place: u32) -> u64 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(record) = (unsafe { record.as_ref() }) else {
        return 0;
    };
    // Whoever replaces a key first waits until nobody uses it: see `carnet-engine`'s `key.rs`.
    let Some(key) = KEYS.get(place) else {
        return 0;
    };
    let mut mac = RecordMac::new(key);
    let words = u32::from(record.length) / 8;
    // Not `repeat`: a call for each word would cost more than the word.
    for index in 0..(MAX_RECORD / 8) as u32 {
        if index >= words {
            break;
        }
        // SAFETY: `index` is within the record, whose size is a whole number of words.
        let word = unsafe { *ptr::from_ref(record).cast::<u64>().add(index as usize) };
        mac.word(index, word);
    }
    mac.finish(record.length)
}

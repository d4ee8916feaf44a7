//! The MAC of records under this instance's key.

use core::ptr;

use carnet_core::record::{MAX_RECORD, Record, RecordMac};

use crate::maps::CONFIG;

/// The MAC of a record. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_mac(record: *const Record) -> u64 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(record) = (unsafe { record.as_ref() }) else {
        return 0;
    };
    let Some(config) = CONFIG.get(0) else {
        return 0;
    };
    let mut mac = RecordMac::new(&config.key);
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

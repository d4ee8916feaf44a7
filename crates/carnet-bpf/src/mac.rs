//! The MAC of records under this instance's key.

use core::ptr;

use carnet_core::{
    record::{MAX_RECORD, Record, RecordMac},
    table::Step,
};

use crate::{bank::repeat, maps::CONFIG};

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
    let mut signing = Signing { mac: RecordMac::new(&config.key), record };
    repeat((MAX_RECORD / 8) as u32, &mut signing);
    signing.mac.finish(record.length)
}

struct Signing<'a> {
    mac: RecordMac,
    record: &'a Record,
}

impl Step for Signing<'_> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        if index as usize >= MAX_RECORD / 8 || index >= u32::from(self.record.length) / 8 {
            return false;
        }
        // SAFETY: `index` is within the record, whose size is a whole number of words.
        let word = unsafe { *ptr::from_ref(self.record).cast::<u64>().add(index as usize) };
        self.mac.word(index, word);
        true
    }
}

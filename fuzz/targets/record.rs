//! Redirect records as somebody might set them, verified as the kernel engine does.
#![no_main]

use carnet_core::{
    record::{Hop, MAX_RECORD, Record, mac_of},
    siphash::{Key, SipHash},
};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromZeros as _, IntoBytes as _};

const EPOCH: u64 = 7;
const NOW: u64 = 1 << 50;

/// A key that follows from all of the input. libFuzzer can see what is compared and put it into the next
/// input, which may not help it to a MAC.
fn key_of(input: &[u8]) -> Key {
    let mut hash = SipHash::new(&[1, 2]);
    input.iter().for_each(|byte| hash.word(u64::from(*byte)));
    [hash.finish(input.len() as u64), 3]
}

/// The record in a caller's buffer of `given` bytes, as the hook takes it.
fn taken(bytes: &[u8]) -> Record {
    let mut record = Record::new_zeroed();
    let length = bytes.len().min(MAX_RECORD);
    record.as_mut_bytes()[..length].copy_from_slice(&bytes[..length]);
    record
}

fn verify(bytes: &[u8], key: &Key) -> bool {
    let record = taken(bytes);
    // The MAC is computed only where the length is believable.
    record.well_formed(bytes.len())
        && record.verify(bytes.len(), mac_of(&record, key), EPOCH, NOW).is_ok()
}

fuzz_target!(|input: (&[u8], u16, bool)| {
    let (bytes, bit, seal) = input;
    let key = key_of(bytes);
    assert!(seal || !verify(bytes, &key), "a record was forged");
    let mut record = taken(bytes);
    while record.hop(record.hop_count.wrapping_sub(1)).is_some()
        && record.hop_count < 40
        && record.push(Hop { handle: 1, filter: 2 })
    {}
    let _any = record.hop(u32::MAX);
    if !seal {
        return;
    }
    // A record that is whole is accepted, and no longer with any one bit changed, cut or extended.
    let mut record = taken(bytes);
    record.hop_count %= 32;
    record.push(Hop { handle: 3, filter: 4 });
    record.magic = carnet_core::record::MAGIC;
    record.version = carnet_core::record::VERSION;
    (record.epoch, record.issued_ns) = (EPOCH, NOW);
    record.mac = mac_of(&record, &key);
    let length = usize::from(record.length);
    let mut whole = record.as_bytes()[..length].to_vec();
    assert!(verify(&whole, &key), "a whole record was refused");
    assert!(!verify(&whole[..length - 1], &key), "a cut record was accepted");
    let at = usize::from(bit) % (8 * length);
    whole[at / 8] ^= 1 << (at % 8);
    assert!(!verify(&whole, &key), "bit {at} can be changed");
    whole[at / 8] ^= 1 << (at % 8);
    whole.push(0);
    assert!(!verify(&whole, &key), "an extended record was accepted");
});

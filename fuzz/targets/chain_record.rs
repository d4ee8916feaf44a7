//! The value of a TLV with the record of a chain, as a stranger may send it, and as who has the key may.
#![no_main]

use carnet::PortableRecord;
use carnet_core::siphash::hash;
use carnet_inspect::chain::{
    keys::Keys,
    tlv::{Envelope, Letter, Refusal, open, seal},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // A key that follows from all of the input: libFuzzer can see what is compared and put it into the next
    // input, which may not help it to a seal.
    let mut key = [0; 32];
    key[..8].copy_from_slice(&hash(&[1, 2], bytes).to_le_bytes());
    let keys = Keys::one(&key);
    let here = ([127, 0, 0, 1], 1).into();
    let envelope = Envelope { source: here, destination: here, audience: here };
    let mut value = bytes.to_vec();
    if let Some(name) = value.get_mut(1..9) {
        name.copy_from_slice(&keys.id());
    }
    let refusal = open(&keys, &envelope, &value).expect_err("a seal was forged");
    assert!(matches!(refusal, Refusal::Malformed | Refusal::Forged));

    let Ok(record) = PortableRecord::try_from(bytes) else { return };
    assert_eq!(record.as_bytes(), bytes);
    // What is told of the application is read with care.
    let _told = (record.original_app(), record.original_destination());
    let letter = Letter { issued_ms: 0, nonce: [0; 16], record };
    assert_eq!(open(&keys, &envelope, &seal(&keys, &envelope, &letter)), Ok(letter));
});

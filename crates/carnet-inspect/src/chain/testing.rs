//! Keys and records for the tests.

use super::keys::Keys;
use carnet::PortableRecord;

/// The key of 32 such bytes.
pub(crate) fn keys(byte: u8) -> Keys {
    Keys::one(&[byte; 32])
}

/// The portable record of a flow that so many services have had.
pub(crate) fn record(hops: u16) -> PortableRecord {
    let length = 408 + 16 * hops;
    let mut bytes = vec![0; length.into()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"CRNP\x01\0");
    put(6, &length.to_le_bytes());
    put(24, &17_u64.to_le_bytes());
    put(40, &u32::from(hops).to_le_bytes());
    put(44, &u32::from(hops).to_le_bytes());
    // To 198.51.100.2:443.
    put(58, &[0xff, 0xff, 198, 51, 100, 2]);
    put(64, &443_u16.to_le_bytes());
    put(66, &2_u16.to_le_bytes());
    put(72, &4321_u32.to_le_bytes());
    for hop in 0..usize::from(hops) {
        put(408 + 16 * hop, &(hop as u64 + 1).to_le_bytes());
    }
    PortableRecord::try_from(&bytes[..]).unwrap()
}

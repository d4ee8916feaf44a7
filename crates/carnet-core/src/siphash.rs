//! SipHash-2-4 over 64-bit words.
//!
//! Written here because the kernel runs it: the published crates hash byte slices, whose bounds
//! checks the BPF verifier cannot follow, while a record is always a whole number of words. The
//! tests compare it with the `siphasher` crate.

/// A 128-bit secret key: the first and the second 64-bit word, little-endian.
pub type Key = [u64; 2];

/// SipHash-2-4 in progress.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SipHash {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl SipHash {
    /// Starts a hash under `key`.
    #[inline(always)]
    pub const fn new(key: &Key) -> Self {
        Self {
            v0: key[0] ^ 0x736f_6d65_7073_6575,
            v1: key[1] ^ 0x646f_7261_6e64_6f6d,
            v2: key[0] ^ 0x6c79_6765_6e65_7261,
            v3: key[1] ^ 0x7465_6462_7974_6573,
        }
    }

    /// Takes in the next 8 bytes of the message, as a little-endian word.
    #[inline(always)]
    pub const fn word(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.round();
        self.v0 ^= word;
    }

    /// The hash of a message of `length` bytes, all of which have been taken in; `length` is a
    /// multiple of 8.
    #[inline(always)]
    pub const fn finish(self, length: u64) -> u64 {
        self.finish_after(0, length)
    }

    /// The same of any `length`, whose last bytes, less than 8 of them, are the lower ones of `rest`.
    #[inline(always)]
    const fn finish_after(mut self, rest: u64, length: u64) -> u64 {
        self.word(rest | (length & 0xff) << 56);
        self.v2 ^= 0xff;
        self.round();
        self.round();
        self.round();
        self.round();
        self.v0 ^ self.v1 ^ self.v2 ^ self.v3
    }

    #[inline(always)]
    const fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.rotate_left(32);
    }
}

/// The hash of any bytes. The kernel knows words alone.
#[cfg(feature = "host")]
pub fn hash(key: &Key, bytes: &[u8]) -> u64 {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let mut hash = SipHash::new(key);
    let words = bytes.chunks_exact(8);
    let rest = word(words.remainder());
    words.for_each(|bytes| hash.word(word(bytes)));
    hash.finish_after(rest, bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::{SipHash, hash};
    use core::hash::Hasher as _;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_the_siphasher_crate(
            key: [u64; 2],
            words in prop::collection::vec(any::<u64>(), 0..130),
        ) {
            let mut ours = SipHash::new(&key);
            let mut theirs = siphasher::sip::SipHasher24::new_with_keys(key[0], key[1]);
            for word in &words {
                ours.word(*word);
                theirs.write(&word.to_le_bytes());
            }
            prop_assert_eq!(ours.finish(words.len() as u64 * 8), theirs.finish());
        }

        #[test]
        fn agrees_about_bytes_of_any_number(
            key: [u64; 2],
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut theirs = siphasher::sip::SipHasher24::new_with_keys(key[0], key[1]);
            theirs.write(&bytes);
            prop_assert_eq!(hash(&key, &bytes), theirs.finish());
        }
    }
}

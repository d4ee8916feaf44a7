//! The redirect record: what a flow carries from its first redirect to its destination.
//!
//! A record is self-contained and authenticated. User mode treats it as opaque bytes (contract
//! S55): a service queries it from the connection that it accepted and sets it, unchanged, on the
//! socket with which it reaches the destination. Only the kernel engine reads and appends to it.
//!
//! What a record is good for: its service may set it as often as it likes, on any socket and for any
//! destination, since services try again and try other addresses (S55); also when the connection that
//! it came with is over, since some store and forward. It is good for nothing to anybody else
//! ([`Caller::may_set`](crate::access::Caller::may_set)), in another instance or another life of this
//! one (the epoch), an hour after its issue ([`LIFETIME_NS`]), and when its key is no longer accepted
//! ([`KeyRow`](crate::key::KeyRow)).
//!
//! Layout, version 2 (little-endian; all offsets in bytes):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic, the bytes `CRNT` |
//! | 4 | 2 | version, 2 |
//! | 6 | 2 | length of the whole record: 408 + 16 * hops |
//! | 8 | 8 | MAC: SipHash-2-4 over bytes 0..8 and 16..length |
//! | 16 | 8 | epoch: the engine instance that issued the record |
//! | 24 | 8 | flow id |
//! | 32 | 8 | time of issue, nanoseconds of the boot-time clock |
//! | 40 | 4 | number of hops, at most 32 |
//! | 44 | 4 | number of legs: redirects so far, forgotten ones included |
//! | 48 | 24 | original destination, an [`Endpoint`] |
//! | 72 | 328 | original application, an [`AppIdentity`] |
//! | 400 | 4 | set of the hops that are guessed: bit `n` for hop `n` |
//! | 404 | 4 | [`RECORD_ADOPTED`], [`RECORD_IDENTITY_GUESSED`], [`RECORD_HOPS_GUESSED`], [`RECORD_IMPORTED`] |
//! | 408 | 16 * hops | the hops, newest last, each a [`Hop`] |

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    address::Endpoint,
    siphash::{Key, SipHash},
};

/// The first four bytes of a record, `CRNT`, as a little-endian number.
pub const MAGIC: u32 = u32::from_le_bytes(*b"CRNT");
/// The layout that this crate reads and writes.
pub const VERSION: u16 = 2;
/// Most hops that a record can hold.
pub const MAX_HOPS: usize = 32;
/// Longest record in bytes. The buffers of existing redirect services (2048 bytes, contract C54)
/// always hold it.
pub const MAX_RECORD: usize = size_of::<Record>();
/// Length in bytes of a record without hops.
pub const HEADER_LENGTH: usize = core::mem::offset_of!(Record, hops);
/// How long after its issue a record may be set: an hour of the boot-time clock, in nanoseconds.
/// A service sets a record within moments; a longer life would only serve replays. As long as the
/// connection is there, a query renews it ([`Record::renew`]).
pub const LIFETIME_NS: u64 = 3_600_000_000_000;

/// [`Record::flags`]: not all services that had the flow set it. The engine gave it to a connection of an
/// unmodified one ([`adoption`](crate::adoption)).
pub const RECORD_ADOPTED: u32 = 1;
/// [`Record::flags`]: flow id and original application are those of one of several flows to which the
/// connection may belong, or those of the service itself.
pub const RECORD_IDENTITY_GUESSED: u32 = 2;
/// [`Record::flags`]: some of the hops are guessed ([`Record::guessed`]).
pub const RECORD_HOPS_GUESSED: u32 = 4;

/// [`Record::flags`]: the flow began on another host, which says who began it and who had it there
/// ([`portable`](crate::portable)).
pub const RECORD_IMPORTED: u32 = 8;

/// Longest executable path kept, in bytes.
pub const MAX_PATH: usize = 256;

/// An executable, as the kernel identifies it: the device and inode of the file that is running.
///
/// The device is the kernel's own number (`s_dev`), which on some file systems is not what
/// `stat(2)` shows; the engine asks the kernel for it.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct FileId {
    /// Device number in the kernel's encoding: major in the bits from 20, minor below.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// The application with which a flow began (contract C38).
///
/// Layout (328 bytes, little-endian):
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | process id (thread group) in the initial pid namespace |
/// | 4 | 4 | user id in the initial user namespace |
/// | 8 | 4 | group id in the initial user namespace |
/// | 12 | 4 | length of the path in bytes, 0 where it could not be read |
/// | 16 | 8 | cgroup id |
/// | 24 | 8 | network namespace cookie |
/// | 32 | 16 | the executable's device and inode, a [`FileId`] |
/// | 48 | 8 | start of the process, nanoseconds of the boot-time clock |
/// | 56 | 16 | command name, zero-padded |
/// | 72 | 256 | path of the executable, zero-padded, as its own mount namespace shows it |
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AppIdentity {
    /// Process id (thread group id) in the initial pid namespace.
    pub pid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// Group id in the initial user namespace.
    pub gid: u32,
    /// Length of `path` in bytes; 0 where the path could not be read.
    pub path_length: u32,
    /// Id of the process's cgroup (the inode number of its directory).
    pub cgroup: u64,
    /// Cookie of the socket's network namespace (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// The executable.
    pub executable: FileId,
    /// When the process started: nanoseconds of the boot-time clock.
    pub started_ns: u64,
    /// Command name (`comm`), zero-padded.
    pub command: [u8; 16],
    /// Path of the executable as its own mount namespace shows it, zero-padded.
    pub path: [u8; MAX_PATH],
}

/// One redirect of a flow: which service it went to, and which filter sent it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Hop {
    /// The service's redirect handle. Handles are never reused (contract C3, C10). 0: a service of another
    /// host, which this one does not have.
    pub handle: u64,
    /// The id of the filter that redirected; 0 where that was on another host. With the handle 0: the
    /// service's [identity](crate::portable::identity), 0 if that is not known either.
    pub filter: u64,
}

/// A redirect record with room for [`MAX_HOPS`] hops. On the wire it is cut after the last hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`].
    pub version: u16,
    /// Length of the record on the wire, in bytes.
    pub length: u16,
    /// SipHash-2-4 over everything else, up to `length`.
    pub mac: u64,
    /// The engine instance that issued the record.
    pub epoch: u64,
    /// The flow.
    pub flow: u64,
    /// When it was issued: nanoseconds of the boot-time clock.
    pub issued_ns: u64,
    /// Number of hops in use.
    pub hop_count: u32,
    /// Redirected legs so far, those included after which a service forgot the record.
    pub legs: u32,
    /// Where the application wanted to go.
    pub destination: Endpoint,
    /// Who wanted to go there.
    pub app: AppIdentity,
    /// Bit `n` set: that hop `n` is the flow's is guessed.
    pub guessed: u32,
    /// [`RECORD_ADOPTED`], [`RECORD_IDENTITY_GUESSED`], [`RECORD_HOPS_GUESSED`], [`RECORD_IMPORTED`].
    pub flags: u32,
    /// The hops, oldest first.
    pub hops: [Hop; MAX_HOPS],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<FileId>() == 16);
    assert!(size_of::<AppIdentity>() == 328);
    assert!(offset_of!(AppIdentity, path) == 72);
    assert!(size_of::<Hop>() == 16);
    assert!(offset_of!(Record, mac) == 8);
    assert!(offset_of!(Record, destination) == 48);
    assert!(offset_of!(Record, app) == 72);
    assert!(offset_of!(Record, hops) == 408);
    assert!(size_of::<Record>() == 920 && size_of::<Record>() <= 1024);
    assert!(align_of::<Record>() == 8);
};

/// Why a record is refused. To the caller all of them are `EINVAL` (contract S34b), but the last two:
/// `EACCES` (S30), and `ELOOP`; the kernel counts them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RecordError {
    /// Not a record, of an unknown version, or of another length than it says.
    Malformed = 1,
    /// The MAC is wrong: forged, damaged on its way, or issued under a key that is no longer accepted.
    Forged = 2,
    /// Of another engine instance, or from before this one was brought up again, as it says itself.
    Foreign = 3,
    /// Issued longer ago than [`LIFETIME_NS`].
    Expired = 4,
    /// In order, but the caller may not set it.
    NotDelivered = 5,
    /// Of another host, and the flow has made as many legs as it may (contract C11): hosts send it in a
    /// circle. To the caller this is `ELOOP`.
    Endless = 6,
}

impl Record {
    /// Whether the fixed fields of a record of `given` bytes agree with each other. The check
    /// comes before the MAC, which needs a believable length.
    #[inline(always)]
    pub const fn well_formed(&self, given: usize) -> bool {
        self.magic == MAGIC
            && self.version == VERSION
            && self.hop_count >= 1
            && self.hop_count <= MAX_HOPS as u32
            && self.length == length_with(self.hop_count)
            && self.length as usize == given
    }

    /// Verifies a record of which `given` bytes were received, at the time `now_ns` of the
    /// boot-time clock.
    ///
    /// `mac` is what [`mac_of`] gives for it; the caller computes it, since only the caller
    /// knows how to walk memory (the kernel's walk is bounded by the verifier's rules).
    ///
    /// # Errors
    /// [`RecordError`] names the first of its conditions that holds, in its order.
    #[inline(always)]
    pub const fn verify(
        &self,
        given: usize,
        mac: u64,
        epoch: u64,
        now_ns: u64,
    ) -> Result<(), RecordError> {
        if !self.well_formed(given) {
            return Err(RecordError::Malformed);
        }
        // Before the MAC, which tells a foreign record from a forged one only under the same key.
        if self.epoch != epoch {
            return Err(RecordError::Foreign);
        }
        if !same_mac(self.mac, mac) {
            return Err(RecordError::Forged);
        }
        if self.is_expired(now_ns) {
            return Err(RecordError::Expired);
        }
        Ok(())
    }

    /// Whether the record may not be set any more at `now_ns` of the boot-time clock: because it is too
    /// old, or from the future of that clock, and so of another boot.
    #[inline(always)]
    pub const fn is_expired(&self, now_ns: u64) -> bool {
        now_ns.wrapping_sub(self.issued_ns) > LIFETIME_NS
    }

    /// The hop at `index`, if the record has that many.
    #[inline(always)]
    pub fn hop(&self, index: u32) -> Option<&Hop> {
        if index >= self.hop_count {
            return None;
        }
        self.hops.get(index as usize)
    }

    /// The same, to change it.
    #[inline(always)]
    pub(crate) fn hop_mut(&mut self, index: u32) -> Option<&mut Hop> {
        if index >= self.hop_count {
            return None;
        }
        self.hops.get_mut(index as usize)
    }

    /// A service asks for the record at `now_ns` of the boot-time clock, while the connection is there:
    /// when half of the record's life is over, it is issued anew. So a service can set the record of a
    /// connection of any age; and two queries that are close in time give the same bytes.
    #[inline(always)]
    pub const fn renew(&mut self, now_ns: u64) {
        if now_ns.wrapping_sub(self.issued_ns) > LIFETIME_NS / 2 {
            self.issued_ns = now_ns;
        }
    }

    /// Appends a hop. Gives `false`, and changes nothing, when the record is full.
    #[inline(always)]
    pub fn push(&mut self, hop: Hop) -> bool {
        let Some(slot) = self.hops.get_mut(self.hop_count as usize) else {
            return false;
        };
        *slot = hop;
        self.guessed &= !hop_bit(self.hop_count);
        self.hop_count += 1;
        self.length = length_with(self.hop_count);
        true
    }

    /// Marks the hop at `index` as guessed.
    #[inline(always)]
    pub const fn guess(&mut self, index: u32) {
        self.guessed |= hop_bit(index);
        self.flags |= RECORD_HOPS_GUESSED;
    }

    /// Whether the hop at `index` is guessed.
    #[inline(always)]
    pub const fn is_guessed(&self, index: u32) -> bool {
        self.guessed & hop_bit(index) != 0
    }

    /// Whether anything of it is a guess.
    #[inline(always)]
    pub const fn is_a_guess(&self) -> bool {
        self.flags & (RECORD_IDENTITY_GUESSED | RECORD_HOPS_GUESSED) != 0
    }

    /// Removes the newest hop if it is that of the service with this redirect handle; gives its filter, or
    /// 0.
    #[inline(always)]
    pub(crate) fn take_last(&mut self, handle: u64) -> u64 {
        let newest = self.hop_count.wrapping_sub(1);
        match self.hop(newest) {
            Some(hop) if hop.handle == handle => {
                let filter = hop.filter;
                self.hop_count = newest;
                filter
            }
            _ => 0,
        }
    }

    /// Takes back the hops, and the legs that they were, which were appended since the record had
    /// `hop_count` of them.
    #[inline(always)]
    pub const fn take_back(&mut self, hop_count: u32) {
        self.legs = self.legs.wrapping_sub(self.hop_count.wrapping_sub(hop_count));
        self.hop_count = hop_count;
        self.length = length_with(hop_count);
    }
}

/// Whether two MACs are the same, in constant time: the MAC is one 64-bit word, which BPF, and every
/// 64-bit machine that runs it, compares with one instruction, so there is no first difference at which
/// to stop. What the branch after it gives away, that the record was refused, the caller is told anyway.
#[inline(always)]
const fn same_mac(one: u64, other: u64) -> bool {
    one ^ other == 0
}

/// The bit of a hop in [`Record::guessed`].
#[inline(always)]
const fn hop_bit(index: u32) -> u32 {
    1 << (index & (MAX_HOPS as u32 - 1))
}

/// Length in bytes of a record with so many hops.
#[inline(always)]
pub(crate) const fn length_with(hop_count: u32) -> u16 {
    (HEADER_LENGTH + hop_count as usize * size_of::<Hop>()) as u16
}

/// The MAC of a record, word by word.
///
/// Words 0 and 2.. of the record are taken in order; word 1, the MAC itself, is left out. Both the
/// kernel and the tests feed the words through [`RecordMac::word`], so the rule which bytes count
/// stands here alone.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RecordMac {
    hash: SipHash,
}

impl RecordMac {
    /// Index of the word that holds the MAC.
    const MAC_WORD: u32 = 1;

    /// Starts under `key`.
    #[inline(always)]
    pub const fn new(key: &Key) -> Self {
        Self { hash: SipHash::new(key) }
    }

    /// Takes the record's word number `index`.
    #[inline(always)]
    pub const fn word(&mut self, index: u32, word: u64) {
        if index != Self::MAC_WORD {
            self.hash.word(word);
        }
    }

    /// The MAC of a record of `length` bytes, all of whose words were taken.
    #[inline(always)]
    pub const fn finish(self, length: u16) -> u64 {
        // Wrapping, since records that are too short to have a MAC come here too.
        self.hash.finish((length as u64).wrapping_sub(8))
    }
}

/// The MAC of `record` under `key`, over the bytes that its `length` names (at most
/// [`MAX_RECORD`]).
pub fn mac_of(record: &Record, key: &Key) -> u64 {
    let mut mac = RecordMac::new(key);
    let words = record.as_bytes().chunks_exact(8).take(record.length as usize / 8);
    for (index, bytes) in words.enumerate() {
        let mut word = [0; 8];
        word.copy_from_slice(bytes);
        mac.word(index as u32, u64::from_le_bytes(word));
    }
    mac.finish(record.length)
}

#[cfg(test)]
mod tests {
    use core::iter::StepBy;
    use core::ops::Range;

    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    const KEY: Key = [7, 11];
    const EPOCH: u64 = 42;
    const NOW: u64 = 10 * LIFETIME_NS;

    /// All of the range, but under Miri, to which a MAC is much work, a few of it: each `apart`-th.
    fn tried(all: Range<usize>, apart: usize) -> StepBy<Range<usize>> {
        all.step_by(if cfg!(miri) { apart } else { 1 })
    }

    fn record(hops: usize) -> Record {
        let mut record = Record::new_zeroed();
        record.magic = MAGIC;
        record.version = VERSION;
        record.epoch = EPOCH;
        record.issued_ns = NOW - 1;
        for n in 0..hops {
            assert!(record.push(Hop { handle: n as u64 + 1, filter: 9 }));
        }
        record.mac = mac_of(&record, &KEY);
        record
    }

    /// What arrives over the wire, padded to the size of the kernel's buffer.
    fn receive(bytes: &[u8]) -> Result<(), RecordError> {
        let mut buffer = [0; MAX_RECORD];
        let kept = bytes.len().min(MAX_RECORD);
        buffer[..kept].copy_from_slice(&bytes[..kept]);
        let record = Record::read_from_bytes(&buffer).unwrap();
        let mac = mac_of(&record, &KEY);
        record.verify(bytes.len(), mac, EPOCH, NOW)
    }

    #[test]
    fn every_length_of_chain_verifies_and_none_is_longer_than_1024_bytes() {
        for hops in tried(1..MAX_HOPS + 1, 31) {
            let record = record(hops);
            let wire = &record.as_bytes()[..record.length as usize];
            assert!(wire.len() <= 1024);
            assert_eq!(receive(wire), Ok(()));
        }
        let mut full = record(MAX_HOPS);
        let before = full;
        assert!(!full.push(Hop::default()));
        assert_eq!(full, before);
    }

    #[test]
    fn a_hop_that_is_taken_back_leaves_nothing() {
        let before = Record { legs: 5, ..record(2) };
        let mut changed = before;
        assert!(changed.push(Hop { handle: 9, filter: 9 }));
        changed.legs += 1;
        changed.take_back(2);
        let wire = |r: &Record| r.as_bytes()[..r.length as usize].to_vec();
        assert_eq!(wire(&changed), wire(&before));
        changed.take_back(2);
        assert_eq!(wire(&changed), wire(&before));
    }

    #[test]
    fn a_record_without_hops_is_malformed() {
        let record = record(0);
        assert_eq!(
            receive(&record.as_bytes()[..record.length as usize]),
            Err(RecordError::Malformed)
        );
    }

    #[test]
    fn every_single_flipped_bit_is_refused() {
        let record = record(3);
        let wire = record.as_bytes()[..record.length as usize].to_vec();
        for bit in tried(0..wire.len() * 8, 61) {
            let mut forged = wire.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert!(receive(&forged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_single_bit_of_the_mac_counts() {
        let record = record(1);
        for bit in tried(0..64, 13) {
            let flipped = Record { mac: record.mac ^ 1 << bit, ..record };
            let given = flipped.length as usize;
            let verdict = flipped.verify(given, mac_of(&flipped, &KEY), EPOCH, NOW);
            assert_eq!(verdict, Err(RecordError::Forged), "bit {bit}");
        }
    }

    #[test]
    fn a_record_is_renewed_in_the_second_half_of_its_life() {
        let young = record(1);
        for (age, renewed) in [
            (0, false),
            (LIFETIME_NS / 2, false),
            (LIFETIME_NS / 2 + 1, true),
            (LIFETIME_NS + 1, true),
            (9 * LIFETIME_NS, true),
        ] {
            let mut record = young;
            let now = young.issued_ns + age;
            record.renew(now);
            let due = if renewed { now } else { young.issued_ns };
            assert_eq!(record, Record { issued_ns: due, ..young }, "{age}");
        }
    }

    #[test]
    fn foreign_and_expired_records_are_told_apart() {
        let mut foreign = record(1);
        foreign.epoch += 1;
        foreign.mac = mac_of(&foreign, &KEY);
        let given = foreign.length as usize;
        let check = |r: &Record, now| r.verify(given, mac_of(r, &KEY), EPOCH, now);
        assert_eq!(check(&foreign, NOW), Err(RecordError::Foreign));
        // One of another key is told as foreign too, as real ones are.
        let mac = mac_of(&foreign, &[1, 2]);
        assert_eq!(foreign.verify(given, mac, EPOCH, NOW), Err(RecordError::Foreign));
        let fresh = record(1);
        assert_eq!(check(&fresh, fresh.issued_ns + LIFETIME_NS), Ok(()));
        assert_eq!(check(&fresh, fresh.issued_ns + LIFETIME_NS + 1), Err(RecordError::Expired));
        // A record from the future of this clock was not issued by this boot.
        assert_eq!(check(&fresh, fresh.issued_ns - 1), Err(RecordError::Expired));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_verify(
            // Miri takes long to make many.
            bytes in prop::collection::vec(any::<u8>(), 0..if cfg!(miri) { 200 } else { 2000 }),
        ) {
            prop_assert!(receive(&bytes).is_err());
        }

        #[test]
        fn a_cut_or_an_extension_is_refused(hops in 1..=MAX_HOPS, change in -64_i64..64) {
            let record = record(hops);
            let wire = &record.as_bytes()[..record.length as usize];
            let mut changed = wire.to_vec();
            changed.resize((wire.len() as i64 + change) as usize, 0);
            prop_assert_eq!(receive(&changed).is_ok(), change == 0);
        }
    }
}

//! The keys of the records' MACs: drawn with the instance, rotated on demand.
//!
//! A key comes from the kernel's random source, getrandom(2), goes into a map of the hooks, and is
//! wiped from this process's memory. Nothing here ever reads it back. A program of the kernel engine
//! could not draw it: what BPF has, `bpf_get_prandom_u32`, is a linear generator that its output gives
//! away.

use std::time::Duration;

use aya::maps::{Array, Map, MapError};
use carnet_core::{
    key::{DEFAULT_OVERLAP_NS, KeyRow, MAX_OVERLAP_NS, other},
    siphash::Key,
};
use rustix::rand::{GetRandomFlags, getrandom};
use zeroize::Zeroizing;

use crate::{
    Engine, Error,
    clock::boot_time_ns,
    sys::{GracePeriod, Wire},
    tables::Tables,
};

const KEYS: &str = "KEYS";
const KEY_ROWS: &str = "KEY_ROWS";
const CURRENT_KEY: &str = "CURRENT_KEY";

/// Where the first key is.
const FIRST: u32 = 0;

/// The key that issues records, but for the key itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyStatus {
    /// Its number: 1 for the one with which the instance was brought up.
    pub generation: u64,
    /// How long it has issued records.
    pub age: Duration,
    /// How long the key before it is still accepted, if it is.
    pub predecessor: Option<Duration>,
}

impl Engine {
    /// How long a replaced key is accepted unless told otherwise.
    pub const DEFAULT_KEY_OVERLAP: Duration = Duration::from_nanos(DEFAULT_OVERLAP_NS);
    /// The longest that a replaced key can be accepted: after that its records have expired.
    pub const MAX_KEY_OVERLAP: Duration = Duration::from_nanos(MAX_OVERLAP_NS);

    /// Has records issued under a new key. Those of the key before are accepted for `overlap`; with
    /// an overlap of zero they are refused when this returns, and services have to query them anew.
    /// A key that is older than that is accepted no longer, also if its own overlap is not over.
    ///
    /// No hook ever sees a part of a key, and there is no moment without one.
    ///
    /// # Errors
    /// [`Error::BadOverlap`], [`Error::NotUp`], [`Error::UnknownLayout`], and nothing has changed.
    /// [`Error::Io`] and [`Error::Map`] if the kernel refuses: then there is a current key as before,
    /// be it the old or the new one, and the rotation is to be repeated.
    pub fn rotate_key(&mut self, overlap: Duration) -> Result<KeyStatus, Error> {
        if overlap > Self::MAX_KEY_OVERLAP {
            return Err(Error::BadOverlap { given: overlap, longest: Self::MAX_KEY_OVERLAP });
        }
        let _lock = self.lock_to_change()?;
        self.instance()?;
        self.tables().rotate_key(overlap.as_nanos() as u64)?;
        self.tables().key_status()
    }
}

impl Tables {
    /// Gives a new instance its first key.
    pub(crate) fn create_keys(&self) -> Result<(), Error> {
        // The place of no key gets one too: that it does not count need not be relied on.
        for place in [FIRST, other(FIRST)] {
            self.write_new_key(place)?;
        }
        let row = KeyRow { generation: 1, since_ns: boot_time_ns(), overlap_ns: 0 };
        self.write_key_row(FIRST, row)?;
        self.set_first(CURRENT_KEY, u64::from(FIRST))
    }

    /// The caller holds the instance's lock.
    fn rotate_key(&self, overlap_ns: u64) -> Result<(), Error> {
        let waiting = || Error::io("wait for", "a grace period");
        let grace = GracePeriod::prepare().map_err(Error::io("prepare", "a grace period"))?;
        let (current, row) = self.current_key()?;
        let next = other(current);
        // The key that is there may still be accepted: from here on it is not, and after the wait no
        // hook is left that began to use it before.
        self.write_key_row(current, KeyRow { overlap_ns: 0, ..row })?;
        grace.wait().map_err(waiting())?;
        self.write_new_key(next)?;
        let generation = row.generation.wrapping_add(1);
        self.write_key_row(next, KeyRow { generation, since_ns: boot_time_ns(), overlap_ns })?;
        self.set_first(CURRENT_KEY, u64::from(next))?;
        if overlap_ns == 0 {
            // Hooks that are running may still issue records under it: then it goes for good.
            grace.wait().map_err(waiting())?;
            self.write_new_key(current)?;
        }
        Ok(())
    }

    /// What there is to know about the current key.
    pub(crate) fn key_status(&self) -> Result<KeyStatus, Error> {
        let (_, row) = self.current_key()?;
        let now = boot_time_ns();
        let left = row.predecessor_left(now);
        Ok(KeyStatus {
            generation: row.generation,
            age: Duration::from_nanos(now.saturating_sub(row.since_ns)),
            predecessor: (left > 0).then_some(Duration::from_nanos(left)),
        })
    }

    /// The place of the current key, and what is known of it.
    fn current_key(&self) -> Result<(u32, KeyRow), Error> {
        let place = self.first::<u64>(CURRENT_KEY)? as u32 & 1;
        let Wire(row) = self.array(KEY_ROWS)?.get(&place, 0).map_err(Error::map(KEY_ROWS))?;
        Ok((place, row))
    }

    fn write_key_row(&self, place: u32, row: KeyRow) -> Result<(), Error> {
        self.array(KEY_ROWS)?.set(place, Wire(row), 0).map_err(Error::map(KEY_ROWS))
    }

    /// Draws a key and writes it. No hook may be using the one that is there.
    fn write_new_key(&self, place: u32) -> Result<(), Error> {
        let mut drawn = Zeroizing::new([0; size_of::<Key>()]);
        draw(&mut *drawn, "a key")?;
        // A reference all the way: a copy would not be wiped.
        let key: &[u8; size_of::<Key>()] = &drawn;
        let mut keys: Array<_, [u8; size_of::<Key>()]> =
            Map::Array(self.open(KEYS)?).try_into().map_err(Error::map::<MapError>(KEYS))?;
        keys.set(place, key, 0).map_err(Error::map(KEYS))
    }
}

/// Fills a buffer from the kernel's random source.
pub(crate) fn draw(buffer: &mut [u8], what: &'static str) -> Result<(), Error> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += getrandom(rest, GetRandomFlags::empty()).map_err(Error::io("draw", what))?;
    }
    Ok(())
}

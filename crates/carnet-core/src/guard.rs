//! The hop guard's memory: which flows services hold (contract C11).
//!
//! A service that connects without a record may be going on with any flow for that destination which it holds. So it is
//! remembered how many these are, and how many legs the longest of them has made. Flows begin and end on many
//! processors at once, without a lock: their number is exact, the legs may be those of a longer flow that has ended.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::flow::HeldKey;

/// What is remembered of a service's flows for a destination.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GuardEntry {
    /// Accepted connections that are still open.
    pub live: i64,
    /// Id of the flow that was delivered last.
    pub flow: u64,
    /// Most legs among the flows that have been open since `live` was last 0.
    pub legs: u32,
    /// Always zero.
    pub zero: u32,
}

const _: () = assert!(size_of::<GuardEntry>() == 24);

impl GuardEntry {
    /// The entry for a service that holds the flow with this id and so many legs, and no other.
    #[inline(always)]
    const fn of_first(flow: u64, legs: u32) -> Self {
        Self { live: 1, flow, legs, zero: 0 }
    }

    /// Redirected legs so far of a connection that the service makes without a record, if it holds
    /// flows for the destination: it may be the longest of them (contract C11).
    #[inline(always)]
    pub const fn forgotten_legs(&self) -> Option<u32> {
        if self.live > 0 { Some(self.legs) } else { None }
    }
}

/// An entry where others may change it at the same time.
pub trait Shared {
    /// Adds to [`GuardEntry::live`], in one step; gives what was there before.
    fn add(&mut self, change: i64) -> i64;
    /// [`GuardEntry::legs`].
    fn legs(&self) -> u32;
    /// Sets [`GuardEntry::legs`].
    fn set_legs(&mut self, legs: u32);
    /// Sets [`GuardEntry::flow`].
    fn set_flow(&mut self, flow: u64);
}

/// The entries by service and destination.
pub trait Memory {
    /// Where an entry is.
    type Entry: Shared;
    /// The entry of this key.
    fn find(&mut self, key: &HeldKey) -> Option<Self::Entry>;
    /// Makes an entry of a key that has none. Gives `false` if it has one by now, or there is no room.
    fn insert_new(&mut self, key: &HeldKey, entry: &GuardEntry) -> bool;
}

/// A service has got the flow with this id, which has made so many legs.
#[inline(always)]
pub fn begins(memory: &mut impl Memory, key: &HeldKey, flow: u64, legs: u32) {
    if joins(memory, key, flow, legs) || memory.insert_new(key, &GuardEntry::of_first(flow, legs)) {
        return;
    }
    // Another processor has just counted the service's first flow for the destination.
    joins(memory, key, flow, legs);
}

/// Counts a flow, if the service has held one for the destination before.
#[inline(always)]
fn joins(memory: &mut impl Memory, key: &HeldKey, flow: u64, legs: u32) -> bool {
    let Some(mut entry) = memory.find(key) else {
        return false;
    };
    let before = entry.add(1);
    // A lost update lets a loop go on for a leg more.
    if before <= 0 || entry.legs() < legs {
        entry.set_legs(legs);
    }
    entry.set_flow(flow);
    true
}

/// A flow that [`begins`] has counted is over.
#[inline(always)]
pub fn ends(memory: &mut impl Memory, key: &HeldKey) {
    if let Some(mut entry) = memory.find(key) {
        entry.add(-1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::BTreeMap,
        sync::{Arc, Barrier, Mutex},
        thread,
    };

    type Entries = BTreeMap<u64, Arc<Mutex<GuardEntry>>>;

    /// The host's table, with a step of another processor possible wherever the kernel's has one.
    #[derive(Clone, Default)]
    struct Table(Arc<Mutex<Entries>>);

    impl Shared for Arc<Mutex<GuardEntry>> {
        fn add(&mut self, change: i64) -> i64 {
            let mut entry = self.lock().unwrap();
            entry.live += change;
            entry.live - change
        }

        fn legs(&self) -> u32 {
            self.lock().unwrap().legs
        }

        fn set_legs(&mut self, legs: u32) {
            self.lock().unwrap().legs = legs;
        }

        fn set_flow(&mut self, flow: u64) {
            self.lock().unwrap().flow = flow;
        }
    }

    impl Memory for Table {
        type Entry = Arc<Mutex<GuardEntry>>;

        fn find(&mut self, key: &HeldKey) -> Option<Self::Entry> {
            let found = self.0.lock().unwrap().get(&key.handle).map(Arc::clone);
            thread::yield_now();
            found
        }

        fn insert_new(&mut self, key: &HeldKey, entry: &GuardEntry) -> bool {
            let mut entries = self.0.lock().unwrap();
            let is_new = !entries.contains_key(&key.handle);
            if is_new {
                entries.insert(key.handle, Arc::new(Mutex::new(*entry)));
            }
            is_new
        }
    }

    impl Table {
        fn entry(&mut self, key: &HeldKey) -> GuardEntry {
            *self.find(key).unwrap().lock().unwrap()
        }
    }

    #[test]
    fn the_longest_flow_counts_until_the_last_one_ends() {
        let (mut table, key) = (Table::default(), HeldKey::of_all(7));
        let legs = |table: &mut Table| table.entry(&key).forgotten_legs();
        begins(&mut table, &key, 1, 3);
        assert_eq!(legs(&mut table), Some(3));
        begins(&mut table, &key, 2, 2);
        assert_eq!((legs(&mut table), table.entry(&key).flow), (Some(3), 2));
        begins(&mut table, &key, 3, 5);
        ends(&mut table, &key);
        ends(&mut table, &key);
        assert_eq!(legs(&mut table), Some(5));
        ends(&mut table, &key);
        assert_eq!(legs(&mut table), None);
        begins(&mut table, &key, 4, 1);
        assert_eq!(legs(&mut table), Some(1), "those before have ended");
    }

    #[test]
    fn who_holds_nothing_ends_nothing() {
        let mut table = Table::default();
        ends(&mut table, &HeldKey::of_all(7));
        assert!(table.0.lock().unwrap().is_empty());
    }

    // A service's first flows for a destination, on two processors at the same moment.
    #[test]
    fn none_of_two_first_flows_is_lost() {
        const KEYS: u64 = 2000;
        let table = Table::default();
        let together = Barrier::new(2);
        thread::scope(|threads| {
            for number in 1..=2 {
                let (mut table, together) = (table.clone(), &together);
                threads.spawn(move || {
                    for handle in 1..=KEYS {
                        together.wait();
                        begins(&mut table, &HeldKey::of_all(handle), number, 1);
                    }
                });
            }
        });
        let mut table = table;
        for handle in 1..=KEYS {
            let key = HeldKey::of_all(handle);
            assert_eq!(table.entry(&key).live, 2);
            ends(&mut table, &key);
            ends(&mut table, &key);
            assert_eq!(table.entry(&key).live, 0);
        }
    }
}

//! Places for what is kept under the cookies of sockets.
//!
//! A table of places is an array, made with room for all from the beginning. To find one takes an index and a
//! comparison, and to take or to vacate one a single atomic exchange, where a hash map hashes, follows a list, and locks
//! it to change it. In return a socket has the choice of [`WAYS`] places alone: who finds them taken keeps elsewhere
//! what is to be kept.
//!
//! The first of the two is among few, so that these stay in the processors' caches however many sockets come and go; the
//! second among many. Sockets get consecutive cookies, so those that are new are not in each other's way: only what
//! stays for long is in that of others.

/// How many places there are for one cookie.
pub const WAYS: usize = 2;
/// The holder of a place that is nobody's. No socket has this cookie.
pub const FREE: u64 = 0;
/// The holder of a place that is being prepared for somebody. The kernel counts cookies up from 1 and, rarely, down
/// from the largest number: none comes to this one.
pub const RESERVED: u64 = 1 << 63;

/// How large a table of places is. Both numbers are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// How many there are of the first kind.
    pub few: u32,
    /// How many there are of the second kind; they come after those.
    pub many: u32,
}

impl Size {
    /// How many there are.
    pub const fn all(self) -> u32 {
        self.few + self.many
    }

    /// Which places are those for a cookie.
    #[inline(always)]
    pub const fn places(self, cookie: u64) -> [u32; WAYS] {
        let cookie = cookie as u32;
        [cookie & (self.few - 1), self.few + (cookie & (self.many - 1))]
    }
}

/// One place. What lies in it belongs to its holder.
pub trait Place: Copy {
    /// The cookie of the socket that has it, or [`FREE`] or [`RESERVED`].
    fn holder(self) -> u64;
    /// Makes `new` the holder if `old` is, in one step, and not before what has been done with the place. Gives whether
    /// `old` was.
    fn replace_holder(self, old: u64, new: u64) -> bool;
}

/// Whether a holder is a socket.
#[inline(always)]
pub const fn is_held(holder: u64) -> bool {
    holder != FREE && holder != RESERVED
}

/// That of a cookie's places which it has, if it has one.
#[inline(always)]
pub fn find<P: Place>(places: [P; WAYS], cookie: u64) -> Option<P> {
    if !is_held(cookie) {
        return None;
    }
    let [first, second] = places;
    if first.holder() == cookie {
        Some(first)
    } else if second.holder() == cookie {
        Some(second)
    } else {
        None
    }
}

/// Takes a free one of a cookie's places. Nobody finds it until it has been filled, and [`settle`] gives it to its holder.
#[inline(always)]
pub fn reserve<P: Place>(places: [P; WAYS]) -> Option<P> {
    let [first, second] = places;
    if first.replace_holder(FREE, RESERVED) {
        Some(first)
    } else if second.replace_holder(FREE, RESERVED) {
        Some(second)
    } else {
        None
    }
}

/// Gives a place that was reserved to the socket with this cookie, which has no other one.
#[inline(always)]
pub fn settle(place: impl Place, cookie: u64) {
    place.replace_holder(RESERVED, cookie);
}

/// Takes the place from its holder. Gives `false` if that had lost it already: of several who try, one succeeds.
#[inline(always)]
pub fn vacate(place: impl Place, cookie: u64) -> bool {
    place.replace_holder(cookie, FREE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::{AtomicU64, Ordering};
    use proptest::prelude::*;
    use std::{collections::BTreeMap, thread, vec::Vec};

    const SIZE: Size = Size { few: 2, many: 8 };

    impl Place for &AtomicU64 {
        fn holder(self) -> u64 {
            self.load(Ordering::SeqCst)
        }

        fn replace_holder(self, old: u64, new: u64) -> bool {
            self.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        }
    }

    #[derive(Default)]
    struct Table([AtomicU64; SIZE.all() as usize]);

    impl Table {
        fn places(&self, cookie: u64) -> [&AtomicU64; WAYS] {
            SIZE.places(cookie).map(|index| &self.0[index as usize])
        }

        fn take(&self, cookie: u64) -> bool {
            let Some(place) = reserve(self.places(cookie)) else {
                return false;
            };
            settle(place, cookie);
            true
        }

        fn has(&self, cookie: u64) -> bool {
            find(self.places(cookie), cookie).is_some()
        }

        fn leave(&self, cookie: u64) -> bool {
            find(self.places(cookie), cookie).is_some_and(|place| vacate(place, cookie))
        }
    }

    #[test]
    fn what_nobody_has_is_not_found() {
        let table = Table::default();
        assert!(!table.has(FREE));
        let place = reserve(table.places(7)).unwrap();
        assert!(!table.has(RESERVED) && !table.has(7));
        settle(place, 7);
        assert!(table.has(7));
    }

    #[test]
    fn new_sockets_are_not_in_each_others_way() {
        let table = Table::default();
        assert!((1000..1000 + u64::from(SIZE.all())).all(|cookie| table.take(cookie)));
        assert!(!table.take(1000 + u64::from(SIZE.all())));
        // Nor, as long as they are not many, do they leave those few.
        let table = Table::default();
        for cookie in 1000..2000 {
            assert!(table.take(cookie) && (cookie == 1000 || table.leave(cookie - 1)));
            assert!(
                SIZE.places(cookie)[0] < SIZE.few && table.places(cookie)[0].holder() == cookie
            );
        }
    }

    // More processors than places: what one of them took nobody else has, until it leaves.
    #[test]
    fn a_place_has_one_holder() {
        let table = Table::default();
        let taken = AtomicU64::new(0);
        thread::scope(|threads| {
            for thread in 1..=4_u64 {
                let (table, taken) = (&table, &taken);
                threads.spawn(move || {
                    for round in 0..10_000 {
                        let cookie = (thread + 4 * round) * u64::from(SIZE.many);
                        if table.take(cookie) {
                            assert!(table.has(cookie));
                            assert_eq!([(); 2].map(|()| table.leave(cookie)), [true, false]);
                            taken.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(taken.into_inner() > 0);
        assert!(table.0.iter().all(|place| place.holder() == FREE));
    }

    proptest! {
        #[test]
        fn a_table_is_a_small_set(steps: Vec<(bool, u8)>) {
            let table = Table::default();
            // Where the cookies are.
            let mut naive = BTreeMap::new();
            for (takes, cookie) in steps {
                let cookie = u64::from(cookie) + 1;
                if !takes {
                    prop_assert_eq!(table.leave(cookie), naive.remove(&cookie).is_some());
                } else if !naive.contains_key(&cookie) {
                    let places = [(false, cookie % 2), (true, cookie % 8)];
                    let free = places.into_iter().find(|place| naive.values().all(|at| at != place));
                    prop_assert_eq!(table.take(cookie), free.is_some());
                    naive.extend(free.map(|place| (cookie, place)));
                }
                for cookie in 1..=256 {
                    prop_assert_eq!(table.has(cookie), naive.contains_key(&cookie));
                }
            }
        }
    }
}

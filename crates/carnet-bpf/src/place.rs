//! Core's places in array maps: what is kept for a socket, at an index that its cookie tells.

use aya_ebpf::btf_maps::Array;
use carnet_core::{
    flow::{Accepted, LegState},
    place::{self, Place, Size, WAYS},
};

use crate::ctx::compare_exchange;

/// What has a place of its own: the cookie of its holder is part of it.
pub(crate) trait Kept {
    /// Where the cookie is. It only computes an address.
    fn cookie(this: *mut Self) -> *mut u64;
}

impl Kept for LegState {
    #[inline(always)]
    fn cookie(this: *mut Self) -> *mut u64 {
        // SAFETY: by its callers, `this` is a whole value in a map.
        unsafe { &raw mut (*this).cookie }
    }
}

impl Kept for Accepted {
    #[inline(always)]
    fn cookie(this: *mut Self) -> *mut u64 {
        // SAFETY: as above.
        unsafe { &raw mut (*this).cookie }
    }
}

/// A place in a map.
pub(crate) struct At<T: 'static>(*mut T);

impl<T> Clone for At<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for At<T> {}

impl<T: Kept> Place for At<T> {
    #[inline(always)]
    fn holder(self) -> u64 {
        // SAFETY: the place is in a map value.
        unsafe { T::cookie(self.0).read_volatile() }
    }

    #[inline(always)]
    fn replace_holder(self, old: u64, new: u64) -> bool {
        // SAFETY: the place is in a map value.
        unsafe { compare_exchange(T::cookie(self.0), old, new) == old }
    }
}

impl<T: Kept> At<T> {
    /// The place of what was found, or reserved.
    #[inline(always)]
    pub(crate) fn of(kept: &mut T) -> Self {
        Self(kept)
    }

    /// What is there, for its holder.
    #[inline(always)]
    pub(crate) fn value(self) -> &'static mut T {
        // SAFETY: maps stay until the program ends. What lies in them is shared, and written only as its fields allow;
        // the kernel runs the hooks of one socket one at a time.
        unsafe { &mut *self.0 }
    }
}

/// The places in a table of this size that what is kept for the socket with this cookie may be in.
#[inline(always)]
pub(crate) fn places<T, const ALL: usize>(
    table: &Array<T, ALL>,
    size: Size,
    cookie: u64,
) -> Option<[At<T>; WAYS]> {
    let [first, second] = size.places(cookie);
    Some([At(table.get_ptr_mut(first)?), At(table.get_ptr_mut(second)?)])
}

/// That of these which it is in.
#[inline(always)]
pub(crate) fn find<T: Kept, const ALL: usize>(
    table: &Array<T, ALL>,
    size: Size,
    cookie: u64,
) -> Option<At<T>> {
    place::find(places(table, size, cookie)?, cookie)
}

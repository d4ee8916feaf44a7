//! The flows that unmodified services hold, as core counts them for adoption.
//!
//! An entry goes with its last flow. Whoever finds it on its way out makes a new one. Memory of an entry
//! that has gone is given to others at once, so a flow may enter the entry of another destination: it looks
//! again, sees that it has, and stays there as one too many, which makes guesses of what would be certain.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::generated::bpf_map_update_elem};
use carnet_core::{
    adoption::{Atomic, HeldFlows},
    flow::{HeldKey, LEG_TO_UNMODIFIED, LegState},
};

use crate::{
    bank::Bank,
    ctx::{compare_exchange, fetch_add},
    maps::{BLANK_LEG, HELD},
};

impl Atomic for Bank {
    #[inline(always)]
    fn add(number: &mut u64, change: u64) -> u64 {
        // SAFETY: core's numbers lie in map values, and are touched atomically alone where it matters.
        unsafe { fetch_add(core::ptr::from_mut(number).cast(), change as i64) as u64 }
    }

    #[inline(always)]
    fn replace(number: &mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: as above.
        unsafe { compare_exchange(number, old, new) }
    }
}

/// The entry of this key.
#[inline(always)]
pub(crate) fn find(key: &HeldKey) -> Option<&'static mut HeldFlows> {
    // SAFETY: the entry stays allocated until the program ends.
    HELD.get_ptr_mut(key).map(|held| unsafe { &mut *held })
}

/// A leg to an unmodified service begins; `ticket` is by what its record is found, or 0. A global
/// function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_hold(leg: *mut LegState, ticket: u64) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(leg) = (unsafe { leg.as_mut() }) else {
        return 0;
    };
    let mut key = HeldKey::of_all(leg.handle);
    if !enter(&key, leg, ticket) {
        // What is not counted is not known to the service's next connect, which is then its own.
        leg.flags &= !LEG_TO_UNMODIFIED;
        return 0;
    }
    key = leg.held_key();
    if !enter(&key, leg, ticket) {
        leg.flags &= !LEG_TO_UNMODIFIED;
        key = HeldKey::of_all(leg.handle);
        leave(&key, leg);
    }
    0
}

/// A leg to an unmodified service is over. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_let_go(leg: *mut LegState) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(leg) = (unsafe { leg.as_ref() }) else {
        return 0;
    };
    let mut key = leg.held_key();
    leave(&key, leg);
    key = HeldKey::of_all(leg.handle);
    leave(&key, leg);
    0
}

/// The service asks about a leg, and is likely to connect onwards next.
#[inline(always)]
pub(crate) fn asked(leg: &LegState, ticket: u64) {
    if leg.flags & LEG_TO_UNMODIFIED != 0
        && let Some(held) = find(&leg.held_key())
    {
        held.ticket = ticket;
    }
}

/// How often a new entry is tried to be made before giving up.
const TRIES: u32 = 3;

// Not inlined: it is called twice.
#[inline(never)]
fn enter(key: &HeldKey, leg: &LegState, ticket: u64) -> bool {
    for _ in 0..TRIES {
        if HELD.get_ptr(key).is_none() {
            make(key);
        }
        let Some(held) = HELD.get_ptr_mut(key) else {
            return false;
        };
        // SAFETY: the entry stays allocated until the program ends.
        let entered = unsafe { (*held).enter::<Bank>(&leg.record, ticket) };
        if entered && HELD.get_ptr_mut(key) == Some(held) {
            // SAFETY: with a flow in it the entry stays.
            unsafe { (*held).count::<Bank>(&leg.record, false) };
            return true;
        }
    }
    false
}

#[inline(always)]
fn leave(key: &HeldKey, leg: &LegState) {
    let Some(held) = find(key) else {
        return;
    };
    held.count::<Bank>(&leg.record, true);
    if held.leave::<Bank>() {
        let _absent = HELD.remove(key);
    }
}

#[inline(always)]
fn make(key: &HeldKey) {
    let Some(blank) = BLANK_LEG.get(0) else {
        return;
    };
    // SAFETY: key and value are whole and at least of the map's sizes; the value lies in another map, from
    // which the kernel copies it. If another processor has just made one, that is as good.
    unsafe {
        bpf_map_update_elem(
            (&raw const HELD).cast_mut().cast(),
            core::ptr::from_ref(key).cast(),
            blank.as_ptr().cast(),
            BPF_NOEXIST.into(),
        );
    }
}

//! The way of a leg from the connecting to the accepted socket.
//!
//! It begins before the SYN is sent, and ends once: when the other end is established, or when the connecting
//! side gives up before that. Until then the leg stays where it is. One that is kept apart from its socket is
//! owned by the way too, and by whoever ends that; of one that hangs on its socket a copy is under way, which goes
//! to whoever ends the way.

use aya_ebpf::{bindings::BPF_ANY, helpers::generated::bpf_map_update_elem};
use carnet_core::flow::{Handover, LegState, Tuple};

use crate::{
    ctx::fetch_add,
    maps::{COPIES, HANDOVER},
};

/// A leg is on its way; `is_apart`: it is kept apart from its socket. Gives `false` when out of memory.
#[inline(always)]
pub(crate) fn begin(key: &Tuple, leg: &mut LegState, is_apart: bool) -> bool {
    let handover = Handover { cookie: leg.cookie, copied: (!is_apart).into() };
    leg.delivered = 0;
    if is_apart {
        leg.owners += 1;
    } else if !copy(handover.cookie, leg) {
        return false;
    }
    if HANDOVER.insert(key, &handover, BPF_ANY.into()).is_ok() {
        return true;
    }
    come_to_nothing(leg, is_apart);
    false
}

/// The way of a leg has ended on the connecting side.
#[inline(always)]
pub(crate) fn come_to_nothing(leg: &mut LegState, is_apart: bool) {
    if is_apart {
        // Not the last owner: that is the connection.
        // SAFETY: the entry stays allocated until the program ends; the number is touched atomically.
        unsafe { fetch_add(&raw mut leg.owners, -1) };
    } else {
        remove_copy(leg.cookie);
    }
}

/// Puts a copy of a leg under a cookie.
#[inline(always)]
pub(crate) fn copy(cookie: u64, leg: *mut LegState) -> bool {
    // SAFETY: key and value are whole and of the map's types; the value lies in another map, from which the
    // kernel copies it.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const COPIES).cast_mut().cast(),
            (&raw const cookie).cast(),
            leg.cast(),
            BPF_ANY.into(),
        )
    };
    failed == 0
}

/// Whether, and where, a leg is on its way between these two ends.
#[inline(always)]
pub(crate) fn between(key: &Tuple) -> Option<Handover> {
    // SAFETY: the value is copied out at once.
    unsafe { HANDOVER.get(key) }.copied()
}

/// The copy of a leg under a cookie.
#[inline(always)]
pub(crate) fn find_copy(cookie: u64) -> Option<&'static mut LegState> {
    // SAFETY: the entry stays allocated until the program ends; what lies in maps is shared, and
    // written only as its fields allow.
    COPIES.get_ptr_mut(&cookie).map(|leg| unsafe { &mut *leg })
}

/// Removes the copy of a leg under a cookie.
#[inline(always)]
pub(crate) fn remove_copy(cookie: u64) {
    let _absent = COPIES.remove(&cookie);
}

/// The way is over. Gives `false` if it was already.
#[inline(always)]
pub(crate) fn end(key: &Tuple) -> bool {
    HANDOVER.remove(key).is_ok()
}

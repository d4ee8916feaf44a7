//! The way of a leg from the connecting to the accepted socket.
//!
//! It begins before the SYN is sent, and ends once: when the other end is established, or when the connecting
//! side gives up before that. Until then the leg stays where it is.

use core::ptr;

use aya_ebpf::{bindings::BPF_ANY, helpers::generated::bpf_map_update_elem};
use carnet_core::flow::{Handover, LegState, Tuple};

use crate::{
    connecting,
    maps::{HANDOVER, WAITING},
};

/// A leg is on its way. Gives `false` when out of memory.
#[inline(always)]
pub(crate) fn begin(key: &Tuple, leg: &mut LegState) -> bool {
    let cookie = leg.cookie;
    let is_apart = connecting::find(cookie).is_some_and(|found| ptr::eq(found, leg));
    if !is_apart && !copy(cookie, leg) {
        return false;
    }
    let handover = Handover { cookie, copied: (!is_apart).into() };
    if HANDOVER.insert(key, &handover, BPF_ANY.into()).is_ok() {
        return true;
    }
    let _absent = WAITING.remove(&cookie);
    false
}

/// Puts a copy of a leg where it is found from the other side.
#[inline(always)]
fn copy(cookie: u64, leg: &mut LegState) -> bool {
    // SAFETY: key and value are whole and of the map's types; the value lies in another map, from which the
    // kernel copies it.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const WAITING).cast_mut().cast(),
            (&raw const cookie).cast(),
            ptr::from_mut(leg).cast(),
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

/// That leg. Until [`end`] has said so, it may be another one in the same memory.
#[inline(always)]
pub(crate) fn leg(handover: &Handover) -> Option<*mut LegState> {
    if handover.copied == 0 {
        connecting::find(handover.cookie).map(ptr::from_mut)
    } else {
        WAITING.get_ptr_mut(&handover.cookie)
    }
}

/// The way is over. Gives `false` if it was already.
#[inline(always)]
pub(crate) fn end(key: &Tuple) -> bool {
    let Some(handover) = between(key) else {
        return false;
    };
    let ended = HANDOVER.remove(key).is_ok();
    if ended && handover.copied != 0 {
        let _absent = WAITING.remove(&handover.cookie);
    }
    ended
}

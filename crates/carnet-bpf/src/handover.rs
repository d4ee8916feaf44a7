//! The way of a leg from the connecting to the accepted socket.
//!
//! It leads through a place that the two ends of the connection tell. Nearly always that is free, since a way is short;
//! if it is not, and for copies, there is a map.
//!
//! It begins when the connecting end is established, and ends once: when the other end is, or when the connecting
//! side gives up before that. Until then the leg stays where it is. One that is kept apart from its socket is
//! owned by the way too, and by whoever ends that; of one that hangs on its socket a copy is under way, which goes
//! to whoever ends the way.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_map_update_elem,
};
use carnet_core::{
    address::Endpoint,
    event::Counter,
    flow::{Handover, LegState, Tuple, WAY_BEGUN, WAY_ENDED, WAY_NONE, WAY_SHARED},
    place::FREE,
};

use crate::{
    connecting,
    ctx::{compare_exchange, fetch_add},
    maps::{COPIES, HANDOVER, WAITING},
    report::count,
};

/// A leg is on its way from `local`; `is_apart`: it is kept apart from its socket.
#[inline(always)]
pub(crate) fn begin(leg: &mut LegState, local: &Endpoint, is_apart: bool) {
    leg.local = *local;
    leg.way = WAY_BEGUN;
    let handover = Handover { cookie: leg.cookie, copied: (!is_apart).into() };
    let key = leg.ends();
    if is_apart {
        leg.owners += 1;
        if wait(&key, leg.cookie) {
            return;
        }
    } else if !copy(handover.cookie, leg) {
        leg.way = WAY_ENDED;
        count(Counter::HandoverFailed);
        return;
    }
    if insert(&key, &handover) {
        return;
    }
    overtake(&key);
    if !insert(&key, &handover) {
        come_to_nothing(leg, is_apart);
        count(Counter::HandoverFailed);
    }
}

/// The leg of the socket with this cookie waits in the place for a connection between these two ends. Gives `false` if
/// that of another connection does.
#[inline(always)]
fn wait(key: &Tuple, cookie: u64) -> bool {
    let Some(place) = WAITING.get_ptr_mut(key.waiting_place()) else {
        return false;
    };
    // SAFETY: the place is in a map.
    let earlier = unsafe { compare_exchange(place, FREE, cookie) };
    if earlier == FREE {
        return true;
    }
    // A connection that was between the same ends has died, of which nothing was told as yet.
    if let Some(leg) = waiting(earlier, key)
        // SAFETY: as above.
        && unsafe { compare_exchange(place, earlier, cookie) } == earlier
    {
        count(Counter::Unanswered);
        has_died(leg);
        return true;
    }
    false
}

/// The leg of the socket with this cookie, if it is that of a connection between these two ends.
#[inline(always)]
fn waiting(cookie: u64, key: &Tuple) -> Option<&'static mut LegState> {
    connecting::find(cookie).filter(|leg| leg.way == WAY_BEGUN && leg.ends() == *key)
}

/// The leg of a connection that has died is on its way no more.
#[inline(always)]
fn has_died(leg: &mut LegState) {
    leg.way = WAY_ENDED;
    connecting::let_go(leg);
}

#[inline(always)]
fn insert(key: &Tuple, handover: &Handover) -> bool {
    HANDOVER.insert(key, handover, BPF_NOEXIST.into()).is_ok()
}

/// A connection that was between the same ends has died, of which nothing was told as yet.
#[inline(always)]
fn overtake(key: &Tuple) {
    let Some(earlier) = in_map(key) else {
        return;
    };
    if !remove(key) {
        return;
    }
    count(Counter::Unanswered);
    if earlier.copied != 0 {
        remove_copy(earlier.cookie);
    } else if let Some(leg) = connecting::find(earlier.cookie) {
        has_died(leg);
    }
}

/// The connecting side has done with a leg. Gives whether the accepted socket has it, or is about to.
#[inline(always)]
pub(crate) fn give_up(leg: &mut LegState, is_apart: bool) -> bool {
    if leg.way == WAY_BEGUN {
        if !end(&leg.ends(), leg.cookie) {
            return is_apart;
        }
        come_to_nothing(leg, is_apart);
    } else if leg.way != WAY_NONE {
        return leg.way == WAY_SHARED;
    }
    count(Counter::Unanswered);
    false
}

/// The way of a leg has ended on the connecting side.
#[inline(always)]
fn come_to_nothing(leg: &mut LegState, is_apart: bool) {
    leg.way = WAY_ENDED;
    if is_apart {
        // Not the last owner: that is the socket.
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
    if let Some(place) = WAITING.get_ptr(key.waiting_place()) {
        // SAFETY: the place is in a map.
        let cookie = unsafe { place.read_volatile() };
        if cookie != FREE && waiting(cookie, key).is_some() {
            return Some(Handover { cookie, copied: 0 });
        }
    }
    in_map(key)
}

#[inline(always)]
fn in_map(key: &Tuple) -> Option<Handover> {
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

/// The way of the leg of the socket with this cookie is over. Gives `false` if it was already.
#[inline(always)]
pub(crate) fn end(key: &Tuple, cookie: u64) -> bool {
    if let Some(place) = WAITING.get_ptr_mut(key.waiting_place())
        // SAFETY: the place is in a map.
        && unsafe { compare_exchange(place, cookie, FREE) } == cookie
    {
        return true;
    }
    remove(key)
}

#[inline(always)]
fn remove(key: &Tuple) -> bool {
    HANDOVER.remove(key).is_ok()
}

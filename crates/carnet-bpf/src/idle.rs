//! The end of a UDP flow of an unconnected socket: idle for too long, or without its service.
//!
//! The kernel's timers of BPF programs (since Linux 5.15) lie in the flow's own map entry and go with
//! it. Linux 6.18 makes them of memory that it may not wait for, so that some flows have none.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_timer},
    helpers::generated::{
        bpf_for_each_map_elem, bpf_map_delete_elem, bpf_timer_init, bpf_timer_set_callback,
        bpf_timer_start,
    },
};
use carnet_core::flow::{DATAGRAM_IDLE_NS, DATAGRAM_LINGER_NS, PeerKey};

use crate::{
    decide::netns_of,
    end::datagrams_end,
    maps::{CONFIG, DATAGRAM_LEGS, TimedLeg},
    report::now,
};

/// `CLOCK_BOOTTIME`, the clock of all times here.
const BOOT_TIME: u64 = 7;

/// How long a flow lives without a datagram, in nanoseconds.
#[inline(always)]
pub(crate) fn limit() -> u64 {
    CONFIG.get(0).map_or(DATAGRAM_IDLE_NS, |config| config.datagram_idle_ns)
}

/// Sets the timer of a flow; gives whether it is set. Without memory for it a new flow ends with its
/// socket, or in a [`sweep`].
#[inline(always)]
pub(crate) fn start(timed: &mut TimedLeg, limit: u64) -> bool {
    let timer = &raw mut timed.timer;
    let callback: extern "C" fn(*mut c_void, *mut PeerKey, *mut TimedLeg) -> i64 = ring;
    // SAFETY: the timer lies in an entry of this map; the callback is of the kind that the helper
    // calls, with the map, the key and the entry.
    unsafe {
        bpf_timer_init(timer, (&raw const DATAGRAM_LEGS).cast_mut().cast(), BOOT_TIME) == 0
            && bpf_timer_set_callback(timer, callback as *mut c_void) == 0
            && bpf_timer_start(timer, limit, 0) == 0
    }
}

/// The socket of a flow was closed: the flow ends, but can be asked about for a moment more. Gives
/// `false` if nothing would end that: it has no timer and gets none now.
#[inline(always)]
pub(crate) fn linger(timed: &mut TimedLeg) -> bool {
    datagrams_end(&mut timed.held.leg);
    // SAFETY: as in `start`.
    let started = unsafe { bpf_timer_start(&raw mut timed.timer, DATAGRAM_LINGER_NS, 0) };
    started == 0 || start(timed, DATAGRAM_LINGER_NS)
}

/// The timer of a flow has gone off: the flow ends, unless it has had a datagram since.
extern "C" fn ring(map: *mut c_void, key: *mut PeerKey, timed: *mut TimedLeg) -> i64 {
    // SAFETY: the kernel passes the entry whose timer went off, which stays allocated meanwhile.
    let timed = unsafe { &mut *timed };
    let (limit, idle) = (limit(), now().wrapping_sub(timed.held.seen_ns));
    if timed.held.leg.kind != 0 && idle < limit {
        // SAFETY: as in `start`.
        unsafe { bpf_timer_start(&raw mut timed.timer, limit - idle, 0) };
        return 0;
    }
    datagrams_end(&mut timed.held.leg);
    // SAFETY: map and key are those that the kernel passed.
    unsafe { bpf_map_delete_elem(map, key.cast()) };
    0
}

/// Ends idle flows that have no timer and forgets those that have ended, to make room: at most once
/// a second, since it looks at all flows. Gives whether it was done.
#[inline(never)]
pub(crate) fn sweep() -> bool {
    const SECOND: u64 = 1_000_000_000;
    let Some(config) = CONFIG.get_ptr_mut(0) else {
        return false;
    };
    let now = now();
    // SAFETY: the map's only element lives as long as the map; if two sweep at the same time, nothing is
    // lost.
    unsafe {
        if now.wrapping_sub((*config).swept_ns) < SECOND {
            return false;
        }
        (*config).swept_ns = now;
    }
    let callback: extern "C" fn(*mut c_void, *mut PeerKey, *mut TimedLeg, *mut c_void) -> i64 =
        end_if_idle;
    let mut unused = 0_u64;
    // SAFETY: the callback is of the kind that the helper calls, with the map, the key, the entry and
    // what is given here.
    unsafe {
        bpf_for_each_map_elem(
            (&raw const DATAGRAM_LEGS).cast_mut().cast(),
            callback as *mut c_void,
            (&raw mut unused).cast(),
            0,
        );
    }
    true
}

extern "C" fn end_if_idle(
    map: *mut c_void,
    key: *mut PeerKey,
    timed: *mut TimedLeg,
    _unused: *mut c_void,
) -> i64 {
    // SAFETY: the kernel passes an entry of the map, which stays allocated meanwhile.
    let timed = unsafe { &mut *timed };
    // One that has no handle yet is being made; one that has no kind any more has ended.
    let leg = &timed.held.leg;
    let idle = leg.kind == 0 || now().wrapping_sub(timed.held.seen_ns) > limit();
    if leg.handle != 0 && idle {
        datagrams_end(&mut timed.held.leg);
        // SAFETY: map and key are those that the kernel passed.
        unsafe { bpf_map_delete_elem(map, key.cast()) };
    }
    0
}

/// Ends a flow whose service is gone.
#[inline(always)]
pub(crate) fn end(ctx: *mut bpf_sock_addr, token: &[u32; 4], timed: &mut TimedLeg) {
    datagrams_end(&mut timed.held.leg);
    let _absent =
        DATAGRAM_LEGS.remove(&PeerKey { netns: netns_of(ctx), address: *token, port: 0, zero: 0 });
}

const _: () = assert!(size_of::<bpf_timer>() == 16);

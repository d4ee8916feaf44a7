//! The end of a UDP flow of an unconnected socket: idle for too long, or without its service.
//!
//! The kernel's timers of BPF programs (since Linux 5.15) lie in the flow's own map entry and go with
//! it.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_timer},
    helpers::generated::{
        bpf_map_delete_elem, bpf_timer_init, bpf_timer_set_callback, bpf_timer_start,
    },
};
use carnet_core::flow::{DATAGRAM_IDLE_NS, TokenKey};

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

/// Sets the timer of a new flow. Gives `false` when out of memory.
#[inline(always)]
pub(crate) fn start(timed: &mut TimedLeg) -> bool {
    let timer = &raw mut timed.timer;
    let callback: extern "C" fn(*mut c_void, *mut TokenKey, *mut TimedLeg) -> i64 = ring;
    // SAFETY: the timer lies in an entry of this map; the callback is of the kind that the helper
    // calls, with the map, the key and the entry.
    unsafe {
        bpf_timer_init(timer, (&raw const DATAGRAM_LEGS).cast_mut().cast(), BOOT_TIME) == 0
            && bpf_timer_set_callback(timer, callback as *mut c_void) == 0
            && bpf_timer_start(timer, limit(), 0) == 0
    }
}

/// The timer of a flow has gone off: the flow ends, unless it has had a datagram since.
extern "C" fn ring(map: *mut c_void, key: *mut TokenKey, timed: *mut TimedLeg) -> i64 {
    // SAFETY: the kernel passes the entry whose timer went off, which stays allocated meanwhile.
    let timed = unsafe { &mut *timed };
    let (limit, idle) = (limit(), now().wrapping_sub(timed.held.seen_ns));
    if idle < limit {
        // SAFETY: as in `start`.
        unsafe { bpf_timer_start(&raw mut timed.timer, limit - idle, 0) };
        return 0;
    }
    datagrams_end(&mut timed.held.leg);
    // SAFETY: map and key are those that the kernel passed.
    unsafe { bpf_map_delete_elem(map, key.cast()) };
    0
}

/// Ends a flow whose service is gone.
#[inline(always)]
pub(crate) fn end(ctx: *mut bpf_sock_addr, token: &[u32; 4], timed: &mut TimedLeg) {
    datagrams_end(&mut timed.held.leg);
    let _absent = DATAGRAM_LEGS.remove(&TokenKey { netns: netns_of(ctx), address: *token });
}

const _: () = assert!(size_of::<bpf_timer>() == 16);

//! Events and counters.

use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use carnet_core::{
    event::{Counter, Event, EventKind},
    flow::LegState,
};

use crate::{
    ctx::fetch_add,
    maps::{COUNTERS, EVENTS, EVENTS_READ},
    process,
};

/// The boot-time clock, in nanoseconds.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Adds one to a counter, exactly: a program that interrupts this one may count as well.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot lives as long as the map, and is touched atomically.
        unsafe { fetch_add(value.cast(), 1) };
    }
}

/// Counts what passes. Most connects pay for this, so it is not atomic.
#[inline(always)]
pub(crate) fn count_passed() {
    if let Some(value) = COUNTERS.get_ptr_mut(Counter::Passed as u32) {
        // SAFETY: the slot is this CPU's; a program that interrupts this one may make it lose a
        // count, never more.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}

/// Reports an event of the calling process, of an `EventKind` as number; the rest of it is filled in by `describe`, which finds
/// it all zero.
#[inline(always)]
pub(crate) fn event_of_caller(kind: u32, describe: impl FnOnce(&mut Event)) {
    event(kind, |event| {
        event.pid = process::pid();
        event.uid = process::uid();
        process::command(&mut event.command);
        describe(event);
    });
}

/// Reports what became of a leg, which no process caused; the rest of the event is filled in by `describe`.
#[inline(always)]
pub(crate) fn event_of_leg(kind: EventKind, leg: &LegState, describe: impl FnOnce(&mut Event)) {
    event(kind as u32, |event| {
        event.flow = leg.record.flow;
        event.handle = leg.handle;
        event.filter = leg.filter;
        event.pid = leg.pid;
        event.netns = leg.netns;
        event.requested = leg.requested;
        event.legs = leg.record.legs;
        event.hops = leg.record.hop_count;
        event.protocol = leg.protocol;
        describe(event);
    });
}

/// Reports an event that no process caused, if anybody wants to know.
#[inline(always)]
pub(crate) fn event(kind: u32, describe: impl FnOnce(&mut Event)) {
    if EVENTS_READ.get(0).is_none_or(|read| *read == 0) {
        return;
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        count(Counter::EventsLost);
        return;
    };
    let words = entry.as_mut_ptr().cast::<u64>();
    for word in 0..size_of::<Event>() / size_of::<u64>() {
        // SAFETY: within the event. Volatile, so that LLVM does not make it a call of a function that
        // clears byte by byte, for which the stack has no room.
        unsafe { words.add(word).write_volatile(0) };
    }
    // SAFETY: an event is plain numbers, for which all zero is a value.
    let event = unsafe { entry.assume_init_mut() };
    event.time_ns = now();
    event.kind = kind;
    describe(event);
    entry.submit(0);
}

const _: () = assert!(size_of::<Event>() % size_of::<u64>() == 0 && align_of::<Event>() == 8);

//! What begins and ends with a leg: the hop guard's count, the report of the end.

use aya_ebpf::bindings::BPF_NOEXIST;
use carnet_core::{
    event::{Counter, EventKind},
    flow::{HeldKey, LEG_REDIRECTED, LEG_STARTING, LEG_TO_UNMODIFIED, LegState},
    guard::{self, GuardEntry},
};

use crate::{
    ctx::{exchange, fetch_add, opaque},
    enforce::carnet_unsettled,
    held::{carnet_hold, carnet_let_go},
    maps::GUARD,
    report::{count, event_of_leg},
    socket::is_datagram,
};

/// The service holds one flow more for the destination; `ticket` is by what `accepted` finds it, or 0.
#[inline(always)]
pub(crate) fn guard_begins(leg: &mut LegState, ticket: u64) {
    if leg.flags & LEG_TO_UNMODIFIED != 0 {
        carnet_hold(leg, ticket);
    } else {
        guard(leg);
    }
}

// Not inlined: the stack of the hooks is all but full.
#[inline(never)]
fn guard(leg: &LegState) {
    guard::begins(&mut Guard, &leg.held_key(), leg.record.flow, leg.record.legs);
}

/// The service holds one flow less for the destination.
#[inline(always)]
pub(crate) fn guard_ends(leg: &mut LegState) {
    if leg.flags & LEG_TO_UNMODIFIED != 0 {
        carnet_let_go(leg);
        return;
    }
    guard::ends(&mut Guard, &leg.held_key());
}

/// The hop guard's memory in [`GUARD`].
struct Guard;

/// An entry of it.
struct Entry(*mut GuardEntry);

impl guard::Memory for Guard {
    type Entry = Entry;

    #[inline(always)]
    fn find(&mut self, key: &HeldKey) -> Option<Entry> {
        GUARD.get_ptr_mut(key).map(Entry)
    }

    #[inline(always)]
    fn insert_new(&mut self, key: &HeldKey, entry: &GuardEntry) -> bool {
        GUARD.insert(key, entry, BPF_NOEXIST.into()).is_ok()
    }
}

impl guard::Shared for Entry {
    #[inline(always)]
    fn add(&mut self, change: i64) -> i64 {
        // SAFETY: the entry stays allocated until the program ends; the number is touched atomically alone.
        unsafe { fetch_add(&raw mut (*self.0).live, change) }
    }

    #[inline(always)]
    fn legs(&self) -> u32 {
        // SAFETY: as above; the number is one word.
        unsafe { (*self.0).legs }
    }

    #[inline(always)]
    fn set_legs(&mut self, legs: u32) {
        // SAFETY: as above.
        unsafe { (*self.0).legs = legs };
    }

    #[inline(always)]
    fn set_flow(&mut self, flow: u64) {
        // SAFETY: as above.
        unsafe { (*self.0).flow = flow };
    }
}

/// What the connecting side of a connection sent and received.
pub(crate) struct Bytes {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// Reports the end of a leg.
#[inline(always)]
pub(crate) fn report_end(leg: &LegState, bytes: impl FnOnce() -> Bytes) {
    event_of_leg(EventKind::Closed, leg, |event| {
        let Bytes { sent, received } = bytes();
        event.bytes_sent = sent;
        event.bytes_received = received;
    });
}

/// Of UDP, and of a connection that was dissolved, nobody counts them.
#[inline(always)]
pub(crate) fn unknown() -> Bytes {
    // Two zeros beside each other, if LLVM knew them, would be the call of a function.
    let none = opaque(0);
    Bytes { sent: none, received: none }
}

/// A leg of a UDP flow has ended. Nothing happens if it had none.
#[inline(always)]
pub(crate) fn datagrams_end(leg: &mut LegState) {
    carnet_datagrams_end(leg);
}

/// The same as a global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_datagrams_end(leg: *mut LegState) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(leg) = (unsafe { leg.as_mut() }) else {
        return 0;
    };
    if leg.kind == 0 {
        return 0;
    }
    // Its timer, its socket and a datagram to a service that is gone may end it at the same time.
    // SAFETY: the leg is in a map value.
    let kind = unsafe { exchange(&raw mut leg.kind, 0) };
    if kind == 0 {
        return 0;
    }
    if kind == LEG_REDIRECTED {
        guard_ends(leg);
        count(Counter::DatagramFlowsEnded);
    }
    report_end(leg, unknown);
    0
}

/// What an earlier connect left on a socket ends here: of UDP a flow, of TCP a connect that failed
/// before its SYN was sent.
#[inline(always)]
pub(crate) fn abandon(leg: &mut LegState) {
    if is_datagram(leg.protocol) {
        datagrams_end(leg);
    } else {
        abandon_connect(leg);
    }
}

/// The same of a TCP socket.
#[inline(always)]
pub(crate) fn abandon_connect(leg: &mut LegState) {
    if leg.kind & LEG_STARTING != 0 {
        carnet_unsettled(-1);
    }
    if leg.kind == LEG_REDIRECTED | LEG_STARTING {
        count(Counter::Unsent);
    }
    leg.kind = 0;
}

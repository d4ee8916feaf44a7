//! What was decided about a connect holds, whatever programs that run after this one at its hook make of
//! it (contract L9, L10).
//!
//! A refusal leaves the destination at nowhere, so that whoever clears it has the connection come to
//! nobody. Of TCP there is a second chance, which needs no trust in who comes later: every connect that was
//! redirected or refused has its leg on the socket until its SYN, and there `sockops` sees what has become
//! of it. That leg must not be an earlier connect's: [`UNSETTLED`] tells, at the cost of one load, whether
//! there can be any.

use aya_ebpf::bindings::{bpf_sock_addr, bpf_sock_ops};
use carnet_core::{
    event::{Counter, EventKind},
    flow::{LEG_REFUSED, LEG_STARTING, LegState},
    outcome::Outcome,
};

use crate::{
    attempt::{Attempt, bind_to_device},
    connect::{begin, record_on},
    connecting::leg_and_place_of,
    ctx::{fetch_add, load64},
    decide::Request,
    end::abandon_connect,
    maps::{LEGS, UNSETTLED},
    report::{count, event_of_leg},
    socket::{Socket, TCP},
};

/// Counts the connects whose legs may be found at a SYN: one more, or one fewer. A global function, see
/// `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_unsettled(change: i64) -> i32 {
    if let Some(number) = UNSETTLED.get_ptr_mut(0) {
        // SAFETY: the map's only element lives as long as the map, and is touched atomically.
        unsafe { fetch_add(number, change) };
    }
    0
}

/// A TCP socket is being connected: what an earlier connect of it, which failed, has left is not this
/// one's.
#[inline(always)]
pub(crate) fn forget_earlier(ctx: *mut bpf_sock_addr) {
    // The socket's own earlier connect is counted by now: they are made under its lock.
    if UNSETTLED.get(0).is_some_and(|number| *number != 0) {
        carnet_forget(ctx);
    }
}

/// The half of it for which few connects pay. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_forget(ctx: *mut bpf_sock_addr) -> i32 {
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return 0;
    };
    if let Some((leg, _)) = leg_and_place_of(ctx.cast(), socket)
        && leg.kind & LEG_STARTING != 0
    {
        abandon_connect(leg);
        if let Some(connection) = socket.multipath()
            && let Some(copy) = connection.get(&LEGS)
        {
            copy.kind = leg.kind;
        }
    }
    0
}

/// Notes on a socket, if it is of TCP, that its connect is refused. Without memory for that, whoever clears
/// the refusal has it come to nobody all the same. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_refused(ctx: *mut bpf_sock_addr, request: *const Request) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(request) = (unsafe { request.as_ref() }) else {
        return 0;
    };
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return 0;
    };
    if request.protocol != TCP {
        return 0;
    }
    let attempt = Attempt { ctx, socket, record: record_on(ctx, socket), request };
    if let Some(leg) = begin(&attempt, LEG_REFUSED, &request.destination) {
        leg.handle = request.decision.handle;
        leg.filter = request.decision.filter;
        socket.put_on_multipath(&LEGS, leg);
    }
    0
}

/// Keeps a connection from coming about that another program has undone, when its SYN is about to be sent:
/// `connect(2)` fails with `EHOSTUNREACH`.
#[inline(always)]
pub(crate) fn hold_back(ctx: *mut bpf_sock_ops, leg: &LegState, outcome: Outcome) {
    const NO_DEVICE: i32 = i32::MAX;
    // There is no verdict here. But a socket that is bound to another device loses its route, and looks for
    // a new one before the SYN, which over this device there is not.
    if !bind_to_device(ctx.cast(), NO_DEVICE) {
        count(Counter::NotHeldBack);
    }
    count(match outcome {
        Outcome::Diverted => Counter::Diverted,
        _ => Counter::RefusalsCleared,
    });
    event_of_leg(EventKind::Undone, leg, |event| event.reason = outcome as u32);
}

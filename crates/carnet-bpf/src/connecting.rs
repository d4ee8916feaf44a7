//! The legs that sockets make.
//!
//! Most are kept apart from the socket, under its cookie, until the connection is over; if it never comes to
//! one, until the socket is closed or connects anew. One whose record a service has set by its ticket is the
//! socket's until both are over. The record that [`LEGS`] has on a socket, if it has one, goes before.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers::generated::{bpf_get_socket_cookie, bpf_map_update_elem},
};
use carnet_core::flow::{LEG_STARTING, LegState};

use crate::{
    ctx::fetch_add,
    end::abandon_connect,
    maps::{BLANK_LEG, CONNECTING, LEGS},
    socket::{Socket, TCP},
};

/// The leg of a socket that connects or is connected. `ctx` is the context of the hook, from which the
/// kernel tells the socket's cookie.
#[inline(always)]
pub(crate) fn leg_of(ctx: *mut c_void, socket: Socket) -> Option<&'static mut LegState> {
    if let Some(leg) = socket.get(&LEGS) {
        return Some(leg);
    }
    if socket.is_accepted() {
        return None;
    }
    // SAFETY: by the caller, the helper takes this context.
    find(unsafe { bpf_get_socket_cookie(ctx) })
}

/// The leg of the socket with this cookie, if it is kept apart from it.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<&'static mut LegState> {
    // SAFETY: the entry stays allocated until the program ends. The kernel runs the hooks of one
    // socket one at a time.
    CONNECTING.get_ptr_mut(&cookie).map(|leg| unsafe { &mut *leg })
}

/// The place for the leg that a socket is about to make: all zero, or with the record that was set on
/// the socket. `None`: out of memory.
#[inline(never)]
pub(crate) fn place_for(
    ctx: *mut bpf_sock_addr,
    socket: Socket,
    is_tcp: bool,
) -> Option<&'static mut LegState> {
    let is_known = socket.has_cookie();
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let earlier = if is_known { find(cookie) } else { None };
    if let Some(leg) = socket.get(&LEGS) {
        if let Some(earlier) = earlier {
            abandon_connect(earlier);
        }
        return Some(leg);
    }
    if let Some(earlier) = earlier {
        abandon_connect(earlier);
        if earlier.set_hops != 0 {
            earlier.ends = 0;
            return Some(earlier);
        }
    }
    // Socket options and addresses of Multipath TCP are asked of the connection, not of this subflow.
    if is_tcp && socket.multipath().is_none() && !socket.is_accepted() && begin(cookie) {
        return find(cookie);
    }
    socket.get_or_create(&LEGS)
}

/// The leg of a TCP socket that is to be connected, if the record that was set on it is there.
#[inline(never)]
pub(crate) fn with_record(
    ctx: *mut bpf_sock_addr,
    socket: Socket,
) -> Option<&'static mut LegState> {
    if socket.protocol() != TCP || !socket.has_cookie() {
        return None;
    }
    // SAFETY: the helper takes this context.
    let leg = find(unsafe { bpf_get_socket_cookie(ctx.cast()) })?;
    if leg.set_hops == 0 { None } else { Some(leg) }
}

/// The place for a record that is set by its ticket on the socket with this cookie, which is not connected;
/// with an earlier record, or all zero. `None`: out of memory.
#[inline(always)]
pub(crate) fn place_for_record(cookie: u64) -> Option<&'static mut LegState> {
    if let Some(earlier) = find(cookie) {
        abandon_connect(earlier);
        if earlier.set_hops != 0 {
            return Some(earlier);
        }
    }
    if !begin(cookie) {
        return None;
    }
    let leg = find(cookie)?;
    // There is no connection yet.
    leg.ends = 1;
    Some(leg)
}

/// Takes back the place for a record that came to nothing.
#[inline(always)]
pub(crate) fn give_back(cookie: u64) {
    let _absent = CONNECTING.remove(&cookie);
}

#[inline(always)]
fn begin(cookie: u64) -> bool {
    let Some(blank) = BLANK_LEG.get(0) else {
        return false;
    };
    // SAFETY: key and value are whole and at least of the map's sizes; the value lies in another map,
    // from which the kernel copies it.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const CONNECTING).cast_mut().cast(),
            (&raw const cookie).cast(),
            blank.as_ptr().cast(),
            BPF_ANY.into(),
        )
    };
    failed == 0
}

/// The connection of the socket with this cookie is over.
#[inline(always)]
pub(crate) fn connection_ends(cookie: u64) {
    if let Some(leg) = find(cookie)
        && (leg.set_hops == 0 || is_second(leg))
    {
        let _absent = CONNECTING.remove(&cookie);
    }
}

/// Of a socket with a record one of two is over, the connection or the socket: gives whether the other is too.
/// The first one to say so has nothing to do with the leg any more.
#[inline(always)]
fn is_second(leg: &mut LegState) -> bool {
    // SAFETY: the entry stays allocated until the program ends; the number is touched atomically alone.
    unsafe { fetch_add(&raw mut leg.ends, 1) != 0 }
}

/// A socket has been closed, for good: the same as [`socket_ends`] for a leg that hangs on it.
#[inline(always)]
pub(crate) fn storage_ends(socket: Socket) {
    if let Some(leg) = socket.get(&LEGS)
        && leg.kind & LEG_STARTING != 0
    {
        abandon_connect(leg);
    }
}

/// The socket with this cookie has been closed, for good. Its connection, if it came to one, may go on for a
/// while. Gives `false` if no leg is kept for it.
#[inline(always)]
pub(crate) fn socket_ends(cookie: u64) -> bool {
    let Some(leg) = find(cookie) else {
        return false;
    };
    let starts = leg.kind & LEG_STARTING != 0;
    if starts {
        abandon_connect(leg);
    }
    let is_over = if leg.set_hops == 0 { leg.kind == 0 } else { is_second(leg) };
    if starts || is_over {
        let _absent = CONNECTING.remove(&cookie);
    }
    true
}

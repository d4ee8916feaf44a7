//! The legs that sockets make.
//!
//! One that begins without a record on the socket is kept apart from it, under its cookie, until the
//! connection is over; if it never comes to one, until the socket is closed or connects anew.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers::generated::{bpf_get_socket_cookie, bpf_map_update_elem},
};
use carnet_core::flow::{LEG_STARTING, LegState};

use crate::{
    end::abandon_connect,
    maps::{BLANK_LEG, CONNECTING, LEGS},
    socket::Socket,
};

/// The leg of a socket that connects or is connected. `ctx` is the context of the hook, from which the
/// kernel tells the socket's cookie.
#[inline(always)]
pub(crate) fn leg_of(ctx: *mut c_void, socket: Socket) -> Option<&'static mut LegState> {
    if let Some(leg) = socket.get(&LEGS) {
        return Some(leg);
    }
    // SAFETY: by the caller, the helper takes this context.
    find(unsafe { bpf_get_socket_cookie(ctx) })
}

#[inline(always)]
fn find(cookie: u64) -> Option<&'static mut LegState> {
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
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    if let Some(earlier) = find(cookie) {
        abandon_connect(earlier);
    }
    if let Some(leg) = socket.get(&LEGS) {
        return Some(leg);
    }
    // Socket options and addresses of Multipath TCP are asked of the connection, not of this subflow.
    if is_tcp && socket.multipath().is_none() && begin(cookie) {
        return find(cookie);
    }
    socket.get_or_create(&LEGS)
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
    let _absent = CONNECTING.remove(&cookie);
}

/// A socket, with this cookie, has been closed, for good. Its connection, if it came to one, may go on
/// for a while.
#[inline(always)]
pub(crate) fn socket_ends(socket: Socket, cookie: u64) {
    if let Some(leg) = socket.get(&LEGS)
        && leg.kind & LEG_STARTING != 0
    {
        abandon_connect(leg);
    }
    if let Some(leg) = find(cookie)
        && (leg.kind == 0 || leg.kind & LEG_STARTING != 0)
    {
        abandon_connect(leg);
        let _absent = CONNECTING.remove(&cookie);
    }
}

//! The legs that sockets make.
//!
//! Most are kept apart from the socket, under its cookie, for all who own them: the connection until it is
//! over; the accepted socket, which shares it; the socket itself, if a service has set the record by its ticket.
//! The last owner to go removes it. One of a connect that came to nothing has no owner: it is removed when the
//! socket is closed or connects anew. What [`LEGS`] has on a socket goes before; that is also where the
//! next leg of a socket is whose earlier one an accepted socket still owns.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, bpf_sock_addr},
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
    leg_and_place_of(ctx, socket).map(|(leg, _)| leg)
}

/// The same, and whether it is kept apart from the socket.
#[inline(always)]
pub(crate) fn leg_and_place_of(
    ctx: *mut c_void,
    socket: Socket,
) -> Option<(&'static mut LegState, bool)> {
    if let Some(leg) = socket.get(&LEGS) {
        return Some((leg, false));
    }
    if socket.is_accepted() {
        return None;
    }
    // SAFETY: by the caller, the helper takes this context.
    find(unsafe { bpf_get_socket_cookie(ctx) }).map(|leg| (leg, true))
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
    let mut is_free = true;
    if let Some(earlier) = earlier {
        abandon_connect(earlier);
        if earlier.set_hops != 0 && earlier.owners == 1 {
            // The socket, and now the connection.
            earlier.owners = 2;
            return Some(earlier);
        }
        is_free = earlier.owners == 0;
    }
    // Socket options and addresses of Multipath TCP are asked of the connection, not of this subflow.
    if is_tcp && is_free && socket.multipath().is_none() && !socket.is_accepted() {
        if let Some(leg) = begin(cookie, BPF_ANY) {
            return Some(leg);
        }
    }
    socket.get_or_create(&LEGS)
}

/// The leg of a TCP socket that is to be connected, if the record that was set on it is there, and not
/// [`LEGS`]'s.
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
    if leg.set_hops == 0 {
        return None;
    }
    abandon_connect(leg);
    if leg.owners == 1 { Some(leg) } else { part(socket, leg) }
}

/// The accepted socket of an earlier connection still owns the leg: the connecting socket takes its record along,
/// to where the next leg will be. `None`: out of memory; the record is lost then.
#[inline(always)]
fn part(socket: Socket, leg: &mut LegState) -> Option<&'static mut LegState> {
    if socket.get(&LEGS).is_some() {
        return None;
    }
    let put = socket.put_on_socket(&LEGS, leg);
    leg.set_hops = 0;
    let_go(leg);
    if !put {
        return None;
    }
    let own = socket.get(&LEGS)?;
    own.owners = 0;
    Some(own)
}

/// The place for a record that is set by its ticket on the socket with this cookie, which is not connected;
/// with an earlier record, or all zero. `None`: out of memory, or an accepted socket still owns what is there.
#[inline(always)]
pub(crate) fn place_for_record(cookie: u64) -> Option<&'static mut LegState> {
    // That is nearly always so.
    if let Some(leg) = begin(cookie, BPF_NOEXIST) {
        return Some(leg);
    }
    let earlier = find(cookie)?;
    abandon_connect(earlier);
    if earlier.set_hops != 0 && earlier.owners == 1 {
        return Some(earlier);
    }
    if earlier.owners != 0 {
        return None;
    }
    begin(cookie, BPF_ANY)
}

/// Takes back the place for a record that came to nothing.
#[inline(always)]
pub(crate) fn give_back(cookie: u64) {
    let _absent = CONNECTING.remove(&cookie);
}

/// A leg with one owner, else all zero; `flags`: whether there may be an earlier one.
#[inline(always)]
fn begin(cookie: u64, flags: u32) -> Option<&'static mut LegState> {
    let blank = BLANK_LEG.get(0)?;
    // SAFETY: key and value are whole and at least of the map's sizes; the value lies in another map,
    // from which the kernel copies it.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const CONNECTING).cast_mut().cast(),
            (&raw const cookie).cast(),
            blank.as_ptr().cast(),
            flags.into(),
        )
    };
    if failed != 0 {
        return None;
    }
    let leg = find(cookie)?;
    leg.cookie = cookie;
    leg.owners = 1;
    Some(leg)
}

/// One of the owners of a leg that is kept apart, who has nothing to do with it from here on, goes.
#[inline(always)]
pub(crate) fn let_go(leg: &mut LegState) {
    let cookie = leg.cookie;
    // SAFETY: the entry stays allocated until the program ends; from its second owner on the number is touched
    // atomically alone.
    if unsafe { fetch_add(&raw mut leg.owners, -1) } == 1 {
        let _absent = CONNECTING.remove(&cookie);
    }
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
    if leg.kind & LEG_STARTING != 0 {
        abandon_connect(leg);
    }
    if leg.set_hops != 0 {
        let_go(leg);
    } else if leg.owners == 0 {
        let _absent = CONNECTING.remove(&cookie);
    }
    true
}

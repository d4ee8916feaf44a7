//! The legs that sockets make.
//!
//! Most are kept apart from the socket, in a place that its cookie tells, for the two who own them: the socket, until it
//! is closed, and the accepted one, which shares it. The last owner to go vacates it. What [`LEGS`] has on a socket goes
//! before; that is also where the next leg of a socket is whose earlier one an accepted socket still owns.
//!
//! A leg ends with the connection of the accepted socket that shares it; else when its own socket is closed or
//! connects anew, or when its connection is seen to end, which is not asked for: the kernel would tell each change of
//! a socket's state, and that costs more than all else that is done at the end.

use core::{ffi::c_void, mem::offset_of};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_socket_cookie, bpf_probe_read_kernel},
};
use carnet_core::{
    flow::{CONNECTING_SIZE, LEG_REDIRECTED, LEG_STARTING, LegState, WAY_ENDED},
    place,
    record::Record,
};

use crate::{
    accepted,
    ctx::{exchange, fetch_add},
    end::{Bytes, abandon_connect, report_end, unknown},
    handover,
    maps::{BLANK_LEG, CONNECTING, LEGS},
    place::{At, find as find_place, places},
    socket::{Socket, TCP},
};

/// The leg of a socket that connects or is connected, and whether it is kept apart from the socket. `ctx` is the
/// context of the hook, from which the kernel tells the socket's cookie.
#[inline(always)]
pub(crate) fn leg_and_place_of(
    ctx: *mut c_void,
    socket: Socket,
) -> Option<(&'static mut LegState, bool)> {
    if let Some(leg) = socket.get(&LEGS) {
        return Some((leg, false));
    }
    // SAFETY: by the caller, the helper takes this context.
    apart(unsafe { bpf_get_socket_cookie(ctx) }).map(|leg| (leg, true))
}

/// The leg that the socket with this cookie keeps apart.
#[inline(always)]
pub(crate) fn apart(cookie: u64) -> Option<&'static mut LegState> {
    find(cookie).filter(|leg| leg.left == 0)
}

/// The leg of the socket with this cookie, if it is kept apart from it.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<&'static mut LegState> {
    find_place(&CONNECTING, CONNECTING_SIZE, cookie).map(At::value)
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
    let mut is_free = true;
    let on_socket = socket.get(&LEGS);
    if is_known {
        if let Some(earlier) = find(cookie) {
            connects_anew(earlier);
            if !earlier.is_the_sockets_alone() {
                leave(earlier);
                is_free = false;
            } else if earlier.set_hops != 0 && on_socket.is_none() {
                return Some(earlier);
            }
        } else {
            is_free = !accepted::is_kept(cookie);
        }
    }
    if on_socket.is_some() {
        return on_socket;
    }
    // Socket options and addresses of Multipath TCP are asked of the connection, not of this subflow. And of a
    // socket that no process has a descriptor of, nobody tells when it is closed.
    if is_tcp && is_free && socket.multipath().is_none() && socket.has_file() {
        let leg = if is_known { find(cookie).map(blank) } else { None };
        if let Some(leg) = leg.or_else(|| begin(cookie)) {
            return Some(without_record(leg));
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
    connects_anew(leg);
    if leg.is_the_sockets_alone() { Some(leg) } else { part(socket, leg) }
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
    leave(leg);
    if !put {
        return None;
    }
    let own = socket.get(&LEGS)?;
    // Nobody asks, but whether there is a leg is asked here, and not after LLVM has computed where its record is.
    own.owners = 0;
    Some(own)
}

/// The place for a record that is set by its ticket on the socket with this cookie, which is not connected.
/// `None`: out of memory, or an accepted socket still owns what is there.
#[inline(always)]
pub(crate) fn place_for_record(cookie: u64) -> Option<&'static mut LegState> {
    let Some(earlier) = find(cookie) else {
        return begin(cookie);
    };
    connects_anew(earlier);
    if !earlier.is_the_sockets_alone() {
        return None;
    }
    Some(blank(earlier))
}

/// Takes back the place for a record that came to nothing.
#[inline(always)]
pub(crate) fn give_back(cookie: u64) {
    if let Some(leg) = find(cookie) {
        vacate(leg);
    }
}

/// A leg with one owner, its socket, which has no other one; else all zero but for context and record. `None`: its
/// places are taken.
#[inline(always)]
fn begin(cookie: u64) -> Option<&'static mut LegState> {
    let place = place::reserve(places(&CONNECTING, CONNECTING_SIZE, cookie)?)?;
    let leg = blank(place.value());
    place::settle(place, cookie);
    Some(leg)
}

/// Makes it a leg with one owner, its socket, else all zero but for context and record.
#[inline(always)]
fn blank(leg: &'static mut LegState) -> &'static mut LegState {
    let netns = offset_of!(LegState, netns);
    zero((&raw mut leg.netns).cast(), offset_of!(LegState, context) - netns);
    leg.kind = 0;
    leg.context_length = 0;
    leg.handle = 0;
    leg.filter = 0;
    leg.owners = 1;
    leg
}

/// The same, and its record is all zero.
#[inline(always)]
fn without_record(leg: &'static mut LegState) -> &'static mut LegState {
    zero((&raw mut leg.record).cast(), size_of::<Record>());
    leg
}

/// Zeros so many bytes of a leg in a map: many times faster than the loop that LLVM would make.
#[inline(always)]
fn zero(part: *mut c_void, length: usize) {
    if let Some(zeros) = BLANK_LEG.get(0) {
        // SAFETY: by the caller, what is written is part of a map value; what is read is at least as long as a leg.
        unsafe { bpf_probe_read_kernel(part, length as u32, zeros.as_ptr().cast()) };
    }
}

/// Nobody has the leg any more.
#[inline(always)]
fn vacate(leg: &mut LegState) {
    let cookie = leg.cookie;
    place::vacate(At::of(leg), cookie);
}

/// One of the owners of a leg that is kept apart, who has nothing to do with it from here on, goes.
#[inline(always)]
pub(crate) fn let_go(leg: &mut LegState) {
    // SAFETY: the leg is in a map value; from when it may have two owners on the number is touched atomically alone.
    if unsafe { fetch_add(&raw mut leg.owners, -1) } == 1 {
        vacate(leg);
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
pub(crate) fn socket_ends(cookie: u64, bytes: impl FnOnce() -> Bytes) -> bool {
    let Some(leg) = find(cookie) else {
        return false;
    };
    connection_ends(leg, bytes);
    leave(leg);
    true
}

/// The connection of a leg that is kept apart is over, or the attempt at one, or nobody has its socket any more. The
/// leg ends, unless that is left to the accepted socket.
#[inline(always)]
pub(crate) fn connection_ends(leg: &mut LegState, bytes: impl FnOnce() -> Bytes) {
    let kind = leg.kind;
    if kind == 0 {
        return;
    }
    if kind & LEG_STARTING != 0 {
        abandon_connect(leg);
        return;
    }
    if kind == LEG_REDIRECTED && handover::give_up(leg, true) {
        return;
    }
    ends(leg, bytes);
}

/// The socket is connected anew: the connection before, if there was one, was dissolved.
#[inline(always)]
pub(crate) fn connects_anew(leg: &mut LegState) {
    if leg.kind != 0 {
        carnet_dissolve(leg);
    }
    leg.way = WAY_ENDED;
}

/// The half of it for which few connects pay. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_dissolve(leg: *mut LegState) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    if let Some(leg) = unsafe { leg.as_mut() } {
        connection_ends(leg, unknown);
        ends(leg, unknown);
    }
    0
}

/// A leg ends, unless it has already: both ends of its connection may see that.
#[inline(always)]
pub(crate) fn ends(leg: &mut LegState, bytes: impl FnOnce() -> Bytes) {
    // SAFETY: the leg is in a map value.
    if leg.kind != 0 && unsafe { exchange(&raw mut leg.kind, 0) } != 0 {
        report_end(leg, bytes);
    }
}

/// The socket does not keep a leg any more.
#[inline(always)]
fn leave(leg: &mut LegState) {
    if leg.left == 0 {
        leg.left = 1;
        let_go(leg);
    }
}

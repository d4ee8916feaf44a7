//! The legs of accepted sockets, for the questions of their services.
//!
//! In a place that the socket's cookie tells is kept which leg it has: the connecting socket's, of which it is an owner
//! as well, or a copy where that hangs on its socket. So it is until the connection is over and the socket is closed,
//! whichever comes last: a service may ask about a connection that was reset before it came to that.

use aya_ebpf::bindings::bpf_sockopt;
use carnet_core::{
    flow::{ACCEPTED_SIZE, Accepted, Handover, LegState, WAY_ENDED, WAY_SHARED},
    place,
};

use crate::{
    connecting,
    ctx::fetch_add,
    end::{Bytes, guard_ends, unknown},
    handover,
    maps::{ACCEPTED, DELIVERED},
    place::{At, find as find_place, places},
    process::{offset, read},
    socket::{Socket, is_watched},
};

/// The leg with which a socket was accepted.
pub(crate) struct Delivered {
    pub(crate) leg: &'static mut LegState,
    /// Whether the connection is not over.
    pub(crate) is_there: bool,
    /// By what [`find`] finds it; [`NO_TICKET`] if it does not.
    pub(crate) ticket: u64,
}

impl Delivered {
    /// What hangs on the socket itself.
    #[inline(always)]
    fn on_socket(leg: &'static mut LegState) -> Self {
        Self { is_there: leg.kind != 0, leg, ticket: NO_TICKET }
    }
}

/// Gives the socket that has just been established on the accepting side the leg that is kept under the cookie
/// of the connecting one; the caller owns it, and passes that on. `None`: out of memory.
#[inline(always)]
pub(crate) fn share(
    cookie: u64,
    socket: Socket,
    connecting_socket: u64,
) -> Option<&'static mut LegState> {
    let leg = connecting::find(connecting_socket)?;
    leg.way = WAY_SHARED;
    if insert(cookie, connecting_socket, 0) {
        return Some(leg);
    }
    leg.way = WAY_ENDED;
    let on_socket = socket.put_on_socket(&DELIVERED, leg);
    connecting::let_go(leg);
    if on_socket { socket.get(&DELIVERED).filter(|leg| leg.kind != 0) } else { None }
}

/// Gives it a copy of the leg, which may be another one in the same memory until the way is over. `None`: out of
/// memory.
#[inline(always)]
pub(crate) fn copy(
    cookie: u64,
    socket: Socket,
    handover: &Handover,
) -> Option<&'static mut LegState> {
    let leg = if handover.copied == 0 {
        connecting::find(handover.cookie)?
    } else {
        handover::find_copy(handover.cookie)?
    };
    // A service asks on the Multipath TCP connection, not on its subflow.
    let place = cookie_of_copy(cookie);
    if socket.multipath().is_none() && handover::copy(place, leg) {
        if insert(cookie, place, 1) {
            return handover::find_copy(place);
        }
        handover::remove_copy(place);
    }
    if socket.put(&DELIVERED, leg) { socket.get(&DELIVERED) } else { None }
}

/// The original of what was copied is not needed any more.
#[inline(always)]
pub(crate) fn has_copied(handover: &Handover) {
    if handover.copied != 0 {
        handover::remove_copy(handover.cookie);
    } else if let Some(leg) = connecting::find(handover.cookie) {
        leg.way = WAY_ENDED;
        connecting::let_go(leg);
    }
}

/// Takes a copy back.
#[inline(always)]
pub(crate) fn withdraw(cookie: u64, socket: Socket) {
    if let Some(place) = place_of(cookie) {
        place::vacate(place, cookie);
    }
    handover::remove_copy(cookie_of_copy(cookie));
    socket.delete(&DELIVERED);
}

/// Under which one the copy for the accepted socket with this cookie is. Under the cookie itself would be that of a leg which
/// the socket makes when it is connected elsewhere. Cookies are counted up from 1 and, rarely, down from the largest
/// number: none becomes another one's like this.
#[inline(always)]
fn cookie_of_copy(cookie: u64) -> u64 {
    cookie ^ 1 << 63
}

/// The place of the accepted socket with this cookie.
#[inline(always)]
fn place_of(cookie: u64) -> Option<At<Accepted>> {
    find_place(&ACCEPTED, ACCEPTED_SIZE, cookie)
}

#[inline(always)]
fn insert(cookie: u64, leg: u64, copied: u32) -> bool {
    let Some(place) = places(&ACCEPTED, ACCEPTED_SIZE, cookie).and_then(place::reserve) else {
        return false;
    };
    let accepted = place.value();
    accepted.leg = leg;
    accepted.copied = copied;
    accepted.is_there = 1;
    accepted.ends = 0;
    place::settle(place, cookie);
    true
}

/// The leg with which the socket of a socket-option hook was accepted.
#[inline(always)]
pub(crate) fn delivered_to(ctx: *mut bpf_sockopt, socket: Socket) -> Option<Delivered> {
    match socket.get(&DELIVERED) {
        Some(leg) => Some(Delivered::on_socket(leg)),
        None => find(cookie_of(ctx)),
    }
}

/// What stands for a leg that [`find`] does not find.
pub(crate) const NO_TICKET: u64 = 0;

/// The cookie of the socket of a socket-option hook, which no helper tells it; 0 if it has none. An accepted
/// socket has been given one, and so have those that a service makes ([`sock_create`](crate::sock_create)).
#[inline(always)]
pub(crate) fn cookie_of(ctx: *mut bpf_sockopt) -> u64 {
    // What the hook may read of its socket tells less.
    let sk: u64 = read(ctx as u64, offset!(sockopt_socket));
    read(sk, offset!(sock_cookie))
}

/// The leg of the accepted socket with this cookie. Only as long as the socket is there is it sure to be this
/// one: who does not have the socket asks [`is_kept`] afterwards.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<Delivered> {
    let accepted = entry(cookie)?;
    Some(Delivered { leg: leg_of(accepted)?, is_there: accepted.is_there != 0, ticket: cookie })
}

#[inline(always)]
fn leg_of(accepted: &Accepted) -> Option<&'static mut LegState> {
    let place = accepted.leg;
    if accepted.copied == 0 { connecting::find(place) } else { handover::find_copy(place) }
}

/// Whether the leg of the accepted socket with this cookie is still kept. A cookie is never used again, so it was
/// all the time since it was found.
#[inline(always)]
pub(crate) fn is_kept(cookie: u64) -> bool {
    place_of(cookie).is_some()
}

#[inline(always)]
fn entry(cookie: u64) -> Option<&'static mut Accepted> {
    place_of(cookie).map(At::value)
}

/// A connection has ended on the accepting side. Gives `false` if no leg was delivered to this socket.
#[inline(always)]
pub(crate) fn connection_ends(cookie: u64, socket: Socket, bytes: impl FnOnce() -> Bytes) -> bool {
    if let Some(leg) = socket.get(&DELIVERED) {
        if leg.kind != 0 {
            leg.kind = 0;
            guard_ends(leg);
        }
        return true;
    }
    let Some(accepted) = entry(cookie) else {
        return false;
    };
    if accepted.is_there == 0 {
        return true;
    }
    let leg = is_over(accepted, bytes);
    // Nothing will tell the end of a socket that nobody has accepted yet, and perhaps nobody will.
    if !socket.has_owner() && accepted.ends == 0 {
        if let Some(leg) = leg
            && socket.put_on_socket(&DELIVERED, leg)
            && let Some(copy) = socket.get(&DELIVERED)
        {
            copy.kind = 0;
        }
        forget(cookie, accepted);
    } else {
        end(cookie, accepted);
    }
    true
}

/// The socket with this cookie has been closed, for good; its connection may go on for a while. `sk` is the kernel's
/// socket.
#[inline(always)]
pub(crate) fn socket_ends(cookie: u64, sk: u64) {
    let Some(accepted) = entry(cookie) else {
        return;
    };
    // A program of others that sets the socket's flags anew has its connection end without a word.
    if !is_watched(read(sk, offset!(tcp_sockops))) && accepted.is_there != 0 {
        is_over(accepted, unknown);
        end(cookie, accepted);
    }
    end(cookie, accepted);
}

/// The connection of an accepted socket is over: its service holds the flow no longer. Gives the leg.
#[inline(always)]
fn is_over(
    accepted: &mut Accepted,
    bytes: impl FnOnce() -> Bytes,
) -> Option<&'static mut LegState> {
    accepted.is_there = 0;
    let leg = leg_of(accepted)?;
    guard_ends(leg);
    if accepted.copied == 0 {
        connecting::ends(leg, bytes);
    }
    Some(leg)
}

/// One of the two ends of an accepted socket is over; with the second one what is kept of it goes.
#[inline(always)]
fn end(cookie: u64, accepted: &mut Accepted) {
    // SAFETY: the entry stays allocated until the program ends; the number is touched atomically alone.
    if unsafe { fetch_add(&raw mut accepted.ends, 1) } != 0 {
        forget(cookie, accepted);
    }
}

#[inline(always)]
fn forget(cookie: u64, accepted: &mut Accepted) {
    let (place, copied) = (accepted.leg, accepted.copied);
    // Who vacates the place, and nobody else, has what was in it.
    if !place::vacate(At::of(accepted), cookie) {
        return;
    }
    if copied != 0 {
        handover::remove_copy(place);
    } else if let Some(leg) = connecting::find(place) {
        connecting::let_go(leg);
    }
}

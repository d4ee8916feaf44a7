//! The legs of accepted sockets, for the questions of their services.
//!
//! A leg is kept until the connection is over and the socket is closed, whichever comes last: a
//! service may ask about a connection that was reset before it came to that.

use aya_ebpf::{
    bindings::{BPF_ANY, bpf_sock_ops, bpf_sockopt},
    helpers::generated::{bpf_get_socket_cookie, bpf_map_update_elem},
};
use carnet_core::flow::LegState;

use crate::{
    ctx::fetch_add,
    end::guard_ends,
    maps::{ACCEPTED, DELIVERED},
    process::{offset, read},
    socket::{Socket, is_marked},
};

/// Gives the socket that has just been established on the accepting side its leg, which lies in a map.
/// `None`: out of memory.
#[inline(always)]
pub(crate) fn deliver(
    ctx: *mut bpf_sock_ops,
    socket: Socket,
    leg: *mut LegState,
) -> Option<&'static mut LegState> {
    // A service asks on the Multipath TCP connection, not on its subflow.
    if socket.multipath().is_none() {
        // SAFETY: the helper takes this context.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
        if insert(cookie, leg) {
            let delivered = find(cookie)?;
            // Those of the connecting socket are not this one's.
            delivered.ends = 0;
            return Some(delivered);
        }
    }
    if socket.put(&DELIVERED, leg) { socket.get(&DELIVERED) } else { None }
}

/// Takes it back.
#[inline(always)]
pub(crate) fn withdraw(ctx: *mut bpf_sock_ops, socket: Socket) {
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let _absent = ACCEPTED.remove(&cookie);
    socket.delete(&DELIVERED);
}

#[inline(always)]
fn insert(cookie: u64, leg: *mut LegState) -> bool {
    // SAFETY: key and value are whole and of the map's types; the value lies in another map, from
    // which the kernel copies it.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const ACCEPTED).cast_mut().cast(),
            (&raw const cookie).cast(),
            leg.cast(),
            BPF_ANY.into(),
        )
    };
    failed == 0
}

/// The leg with which the socket of a socket-option hook was accepted.
#[inline(always)]
pub(crate) fn delivered_to(ctx: *mut bpf_sockopt, socket: Socket) -> Option<&'static mut LegState> {
    match socket.get(&DELIVERED) {
        Some(leg) => Some(leg),
        None => find(cookie_of(ctx)),
    }
}

/// What stands for a leg that [`find`] does not find.
pub(crate) const NO_TICKET: u64 = 0;

/// By what [`find`] finds the leg of such a socket; [`NO_TICKET`] if it does not.
#[inline(always)]
pub(crate) fn ticket(ctx: *mut bpf_sockopt, socket: Socket) -> u64 {
    if socket.get(&DELIVERED).is_some() { NO_TICKET } else { cookie_of(ctx) }
}

/// The cookie of the socket of a socket-option hook, which no helper tells it; 0 if it has none. An accepted
/// socket has been given one, and so have those that a service makes ([`sock_create`](crate::sock_create)).
#[inline(always)]
pub(crate) fn cookie_of(ctx: *mut bpf_sockopt) -> u64 {
    let sk: u64 = read(ctx as u64, offset!(sockopt_socket));
    read(sk, offset!(sock_cookie))
}

/// Whether the socket of a socket-option hook is marked as accepted ([`Socket::is_accepted`]).
#[inline(always)]
pub(crate) fn is_accepted(ctx: *mut bpf_sockopt) -> bool {
    let sk: u64 = read(ctx as u64, offset!(sockopt_socket));
    is_marked(read(sk, offset!(tcp_sockops)))
}

/// The leg of the accepted socket with this cookie.
#[inline(always)]
pub(crate) fn find(cookie: u64) -> Option<&'static mut LegState> {
    // SAFETY: the entry stays allocated until the program ends; what lies in maps is shared, and
    // written only as its fields allow.
    ACCEPTED.get_ptr_mut(&cookie).map(|leg| unsafe { &mut *leg })
}

/// A connection has ended.
#[inline(always)]
pub(crate) fn connection_ends(ctx: *mut bpf_sock_ops, socket: Socket) {
    if let Some(leg) = socket.get(&DELIVERED) {
        leg_ends(leg);
        return;
    }
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let Some(leg) = find(cookie) else {
        return;
    };
    if !leg_ends(leg) {
        return;
    }
    // Nothing will tell the end of a socket that nobody has accepted yet, and perhaps nobody will.
    if !socket.has_owner() && leg.ends == 0 {
        let _without_memory = socket.put_on_socket(&DELIVERED, leg);
        let _absent = ACCEPTED.remove(&cookie);
    } else {
        end(cookie, leg);
    }
}

/// Gives `false` if the leg was over already.
#[inline(always)]
fn leg_ends(leg: &mut LegState) -> bool {
    let was_there = leg.kind != 0;
    if was_there {
        leg.kind = 0;
        guard_ends(leg);
    }
    was_there
}

/// The socket with this cookie has been closed, for good; its connection may go on for a while.
#[inline(always)]
pub(crate) fn socket_ends(cookie: u64) {
    if let Some(leg) = find(cookie) {
        end(cookie, leg);
    }
}

/// One of the two ends of a leg is over; with the second one it goes.
#[inline(always)]
fn end(cookie: u64, leg: &mut LegState) {
    // SAFETY: the entry stays allocated until the program ends; the number is touched atomically alone.
    if unsafe { fetch_add(&raw mut leg.ends, 1) } != 0 {
        let _absent = ACCEPTED.remove(&cookie);
    }
}

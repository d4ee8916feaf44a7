//! `sockops` (since Linux 4.13; full sockets' storage since 5.13): carries a leg from the
//! connecting socket to the one that the service accepts, and sees its end.
//!
//! **What it does.** When the connecting end is established, it notes under the two ends where the leg is; when the
//! other end is, it gives the leg to the accepted socket. At the end of that one's connection it reports the bytes
//! and forgets; at the end of a registered listener it marks its slot as free to take. A connect that another
//! program has undone it keeps from coming about, before its SYN.
//!
//! **Why this hook.** The connect hook does not know the local port yet, and the accepting side has
//! no hook of its own at accept. The note is in place before the ACK that establishes the other end, so there is no
//! race; with TCP Fast Open, where the SYN does that, before the SYN.
//!
//! **Fails closed**: a service that accepts a connection whose leg could not be carried over finds
//! no record and refuses it.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_RETRANS_CB, BPF_SOCK_OPS_RETRANS_CB_FLAG, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
        bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
    macros::sock_ops,
    programs::SockOpsContext,
};
use carnet_core::{
    address::{AF_INET, Endpoint},
    event::Counter,
    flow::{LEG_REDIRECTED, LEG_STARTING, LegState, Tuple, WAY_BEGUN, WAY_NONE},
    outcome::Outcome,
};

use crate::{
    accepted,
    connecting::{apart, connection_ends, connects_anew, leg_and_place_of},
    ctx::{load32, load64},
    end::{Bytes, abandon_connect, guard_begins, report_end},
    enforce::{carnet_unsettled, hold_back},
    handover,
    listener::unlisten,
    maps::LEGS,
    report::count,
    socket::{CLOSE, CLOSING, FIN_WAIT2, LAST_ACK, LISTEN, MARK_OF_ACCEPTED, Socket, TCP},
};

#[sock_ops]
pub fn carnet_sockops(ctx: SockOpsContext) -> u32 {
    let ctx = ctx.ops;
    // Most calls ask for what Carnet does not want to change: a few instructions for those.
    match load32!(ctx, 0) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => connected(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_RETRANS_CB => sends_again(ctx),
        BPF_SOCK_OPS_STATE_CB if load32!(ctx, 8) == CLOSE => closed(ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG),
        _ => {}
    }
    1
}

/// The SYN is about to be sent.
#[inline(never)]
fn connecting(ctx: *mut bpf_sock_ops) {
    let Some(socket) = socket_of(ctx) else {
        return;
    };
    let Some((leg, is_apart)) = leg_and_place_of(ctx.cast(), socket) else {
        return;
    };
    let flags = load32!(ctx, 84);
    if flags & MARK_OF_ACCEPTED != 0 {
        set_flags(ctx, flags & !MARK_OF_ACCEPTED);
    }
    let (local, remote) = ends(ctx);
    let outcome = Outcome::of(leg.kind, remote.is_same(&leg.target));
    let goes = outcome == Outcome::AsDecided;
    if goes {
        leg.kind &= !LEG_STARTING;
        carnet_unsettled(-1);
    } else {
        if outcome.is_undone() {
            hold_back(ctx, leg, outcome);
        }
        if is_apart {
            connects_anew(leg);
        } else {
            abandon_connect(leg);
        }
    }
    if !is_apart
        && let Some(connection) = socket.multipath()
        && let Some(copy) = connection.get(&LEGS)
    {
        copy.kind = leg.kind;
    }
    if !goes {
        return;
    }
    let redirected = leg.kind == LEG_REDIRECTED;
    if is_apart && !socket.opens_fast() {
        if redirected {
            watch(ctx, BPF_SOCK_OPS_RETRANS_CB_FLAG);
        }
        return;
    }
    watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
    if redirected {
        handover::begin(leg, &local, is_apart);
    }
}

/// The leg, kept apart, of a socket that is connected to a service, or is about to be.
#[inline(always)]
fn leg_to_service(ctx: *mut bpf_sock_ops) -> Option<&'static mut LegState> {
    if !socket_of(ctx)?.has_cookie() {
        return None;
    }
    // SAFETY: the helper takes this context.
    apart(unsafe { bpf_get_socket_cookie(ctx.cast()) }).filter(|leg| leg.kind == LEG_REDIRECTED)
}

/// A connection has been established on the connecting side; the other end will be when the ACK comes.
#[inline(never)]
fn connected(ctx: *mut bpf_sock_ops) {
    if let Some(leg) = leg_to_service(ctx)
        && leg.way == WAY_NONE
    {
        handover::begin(leg, &ends(ctx).0, true);
    }
}

/// A packet was not answered. A connection that is not established at its service may never be, and has its end told.
#[inline(never)]
fn sends_again(ctx: *mut bpf_sock_ops) {
    if let Some(leg) = leg_to_service(ctx)
        && (leg.way == WAY_NONE || leg.way == WAY_BEGUN)
    {
        watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
    }
}

/// A connection has been established on the accepting side.
#[inline(never)]
fn accepted(ctx: *mut bpf_sock_ops) {
    let Some(socket) = socket_of(ctx) else {
        return;
    };
    let (local, remote) = ends(ctx);
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    let key = Tuple::between(netns, &remote, &local);
    let Some(handover) = handover::between(&key) else {
        return;
    };
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let delivered = if handover.copied == 0 && socket.multipath().is_none() {
        // If it was over, the connecting side has just ended, and has counted.
        if !handover::end(&key, handover.cookie) {
            return;
        }
        accepted::share(cookie, socket, handover.cookie)
    } else {
        let delivered = accepted::copy(cookie, socket, &handover);
        if !handover::end(&key, handover.cookie) {
            // What was copied may have been another leg's already.
            accepted::withdraw(cookie, socket);
            return;
        }
        accepted::has_copied(&handover);
        delivered
    };
    match delivered {
        Some(leg) => {
            watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG | MARK_OF_ACCEPTED);
            count(Counter::Delivered);
            guard_begins(leg, cookie);
        }
        None => count(Counter::HandoverFailed),
    }
}

/// A listener is no more, or a connection, or an attempt at one.
#[inline(never)]
fn closed(ctx: *mut bpf_sock_ops) {
    let Some(socket) = socket_of(ctx) else {
        return;
    };
    let before = load32!(ctx, 4);
    if before == LISTEN {
        if let Some(registration) = socket.registration() {
            unlisten(registration, TCP, &socket.local());
        }
        return;
    }
    if let Some(leg) = socket.get(&LEGS) {
        if leg.kind & LEG_STARTING != 0 {
            // There was no port for it. This is only told of a socket that was connected before.
            abandon_connect(leg);
        } else if leg.kind != 0 {
            if leg.kind == LEG_REDIRECTED {
                handover::give_up(leg, false);
            }
            leg.kind = 0;
            report_end(leg, || bytes_of(ctx, socket, before, SYN));
        }
        return;
    }
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let mirrored = || {
        // An accepted socket is made when its SYN has been acknowledged.
        let Bytes { sent, received } = bytes_of(ctx, socket, before, 0);
        Bytes { sent: received, received: sent }
    };
    if !accepted::connection_ends(cookie, socket, mirrored)
        && let Some(leg) = apart(cookie)
    {
        connection_ends(leg, || bytes_of(ctx, socket, before, SYN));
    }
}

/// The kernel counts it as a byte.
const SYN: u64 = 1;

/// What this end of a connection has sent, as far as the other one has told that it has it, and received; `syn`: what
/// of that is the SYN.
#[inline(always)]
fn bytes_of(ctx: *mut bpf_sock_ops, socket: Socket, before: u32, syn: u64) -> Bytes {
    // The kernel counts FIN as a byte.
    let fin_acknowledged = before == FIN_WAIT2 || before == CLOSING || before == LAST_ACK;
    Bytes {
        sent: load64!(ctx, 176).saturating_sub(syn + u64::from(fin_acknowledged)),
        received: load64!(ctx, 168).saturating_sub(u64::from(socket.has_received_fin())),
    }
}

#[inline(always)]
fn socket_of(ctx: *mut bpf_sock_ops) -> Option<Socket> {
    Socket::new(load64!(ctx, 184) as *mut _)
}

/// Asks to be told more of this socket.
#[inline(always)]
fn watch(ctx: *mut bpf_sock_ops, more: u32) {
    set_flags(ctx, load32!(ctx, 84) | more);
}

#[inline(always)]
fn set_flags(ctx: *mut bpf_sock_ops, flags: u32) {
    // SAFETY: the helper takes this context.
    unsafe { bpf_sock_ops_cb_flags_set(ctx, flags as i32) };
}

/// The connection's local and remote end.
#[inline(always)]
fn ends(ctx: *mut bpf_sock_ops) -> (Endpoint, Endpoint) {
    // The local port is in host byte order, the remote one in network byte order.
    let remote_port = u32::from_be(load32!(ctx, 64)) as u16;
    let local_port = load32!(ctx, 68) as u16;
    if load32!(ctx, 20) == u32::from(AF_INET) {
        (Endpoint::v4(load32!(ctx, 28), local_port), Endpoint::v4(load32!(ctx, 24), remote_port))
    } else {
        (
            Endpoint::v6(
                [load32!(ctx, 48), load32!(ctx, 52), load32!(ctx, 56), load32!(ctx, 60)],
                local_port,
            ),
            Endpoint::v6(
                [load32!(ctx, 32), load32!(ctx, 36), load32!(ctx, 40), load32!(ctx, 44)],
                remote_port,
            ),
        )
    }
}

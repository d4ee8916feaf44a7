//! `sockops` (since Linux 4.13; full sockets' storage since 5.13): carries a leg from the
//! connecting socket to the one that the service accepts, and sees its end.
//!
//! **What it does.** Before the SYN is sent, when the connection's two ends are known, it notes under
//! them where the leg is; when the other end is established, it gives the leg to the accepted
//! socket. At the end of a connection it reports the bytes and forgets; at the end of a
//! registered listener it marks its slot as free to take. A connect that another program has undone it
//! keeps from coming about.
//!
//! **Why this hook.** The connect hook does not know the local port yet, and the accepting side has
//! no hook of its own at accept. The note is in place before the SYN, so there is no race.
//!
//! **Fails closed**: a service that accepts a connection whose leg could not be carried over finds
//! no record and refuses it.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
    macros::sock_ops,
    programs::SockOpsContext,
};
use carnet_core::{
    address::{AF_INET, Endpoint},
    event::Counter,
    flow::{LEG_REDIRECTED, LEG_STARTING, Tuple},
    outcome::Outcome,
};

use crate::{
    accepted,
    connecting::{self, leg_and_place_of},
    ctx::{load32, load64},
    end::{abandon_connect, guard_begins, report_end},
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
    let op = load32!(ctx, 0);
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
        && op != BPF_SOCK_OPS_TCP_LISTEN_CB
    {
        return 1;
    }
    let Some(socket) = Socket::new(load64!(ctx, 184) as *mut _) else {
        return 1;
    };
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        connecting(ctx, socket);
    } else if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        established(ctx, socket);
    } else if op == BPF_SOCK_OPS_TCP_LISTEN_CB {
        watch_state(ctx, 0);
    } else if load32!(ctx, 8) == CLOSE {
        let before = load32!(ctx, 4);
        if before == LISTEN {
            if let Some(registration) = socket.registration() {
                unlisten(registration, TCP, &socket.local());
            }
        } else {
            closed(ctx, socket, before);
        }
    }
    1
}

/// The SYN is about to be sent.
#[inline(always)]
fn connecting(ctx: *mut bpf_sock_ops, socket: Socket) {
    let Some((leg, is_apart)) = leg_and_place_of(ctx.cast(), socket) else {
        return;
    };
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
        abandon_connect(leg);
    }
    if let Some(connection) = socket.multipath()
        && let Some(copy) = connection.get(&LEGS)
    {
        copy.kind = leg.kind;
    }
    if !goes {
        return;
    }
    watch_state(ctx, 0);
    if leg.kind != LEG_REDIRECTED {
        return;
    }
    let key = tuple(leg.home, &local, &remote);
    if !handover::begin(&key, leg, is_apart) {
        count(Counter::HandoverFailed);
    }
}

/// A connection has been established on the accepting side.
#[inline(always)]
fn established(ctx: *mut bpf_sock_ops, socket: Socket) {
    let (local, remote) = ends(ctx);
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    let key = tuple(netns, &remote, &local);
    let Some(handover) = handover::between(&key) else {
        return;
    };
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let delivered = if handover.copied == 0 && socket.multipath().is_none() {
        // If it was over, the connecting side has just ended, and has counted.
        if !handover::end(&key) {
            return;
        }
        accepted::share(cookie, socket, handover.cookie)
    } else {
        let delivered = accepted::copy(cookie, socket, &handover);
        if !handover::end(&key) {
            // What was copied may have been another leg's already.
            accepted::withdraw(cookie, socket);
            return;
        }
        accepted::has_copied(&handover);
        delivered
    };
    match delivered {
        Some(leg) => {
            watch_state(ctx, MARK_OF_ACCEPTED);
            count(Counter::Delivered);
            guard_begins(leg, cookie);
        }
        None => count(Counter::HandoverFailed),
    }
}

/// A connection, or an attempt at one, has ended; `before` is the state that it was in.
#[inline(always)]
fn closed(ctx: *mut bpf_sock_ops, socket: Socket, before: u32) {
    let Some((leg, is_apart)) = leg_and_place_of(ctx.cast(), socket) else {
        accepted::connection_ends(ctx, socket);
        return;
    };
    if leg.kind == 0 {
        return;
    }
    if leg.kind & LEG_STARTING != 0 {
        // There was no port for it. This is only told of a socket that was connected before.
        abandon_connect(leg);
        return;
    }
    if leg.kind == LEG_REDIRECTED && leg.delivered == 0 {
        // Only a connection that was never established has still got an entry.
        let (local, remote) = ends(ctx);
        if handover::end(&tuple(leg.home, &local, &remote)) {
            handover::come_to_nothing(leg, is_apart);
            count(Counter::Unanswered);
        }
    }
    leg.kind = 0;
    // The kernel counts SYN and FIN as bytes.
    let fin_acknowledged = before == FIN_WAIT2 || before == CLOSING || before == LAST_ACK;
    let sent = load64!(ctx, 176).saturating_sub(1 + u64::from(fin_acknowledged));
    let received = load64!(ctx, 168).saturating_sub(u64::from(socket.has_received_fin()));
    report_end(leg, sent, received);
    if is_apart {
        connecting::let_go(leg);
    }
}

/// Asks to be told of this socket's changes of state, and puts a mark on it.
#[inline(always)]
fn watch_state(ctx: *mut bpf_sock_ops, mark: u32) {
    let flags = load32!(ctx, 84) | BPF_SOCK_OPS_STATE_CB_FLAG | mark;
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

#[inline(always)]
fn tuple(netns: u64, connecting: &Endpoint, accepting: &Endpoint) -> Tuple {
    Tuple {
        netns,
        local_address: connecting.address,
        remote_address: accepting.address,
        local_port: connecting.port.into(),
        remote_port: accepting.port.into(),
    }
}

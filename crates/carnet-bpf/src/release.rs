//! `cgroup/sock_release` (since Linux 5.9): the end of UDP flows, of services' UDP sockets, of connects that
//! failed, and of accepted sockets.
//!
//! **What it does.** Ends the leg of a TCP socket, unless that is left to the accepted socket; counts a redirected
//! connect that ends before its SYN was sent, or without an answer. Marks the slot of a registered UDP socket as
//! free to take, as `sockops` does for TCP.
//! Ends the flows of a UDP socket that is closed for good: the leg of a connected
//! one, and the newest of those that a socket that is not connected has; the rest end by their timers.
//! Their services can ask about them for a moment more: many a client sends one datagram and closes.
//! When an accepted socket is closed, nobody can ask about its leg any more.
//!
//! **Why this hook.** UDP knows no end of a connection, and what hangs on a socket goes without a word.
//!
//! **Returns** 1 always.

use aya_ebpf::{
    bindings::{BPF_ANY, bpf_sock},
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_map_update_elem, bpf_probe_read_kernel,
    },
    macros::cgroup_sock,
    programs::SockContext,
};
use carnet_core::{
    address::{AF_INET, Endpoint},
    flow::{DATAGRAM_LINGER_NS, LEG_REDIRECTED, LegState, PeerKey},
    table::Step,
};

use crate::{
    accepted,
    bank::repeat,
    connecting,
    end::{Bytes, datagrams_end},
    idle,
    listener::unlisten,
    maps::{BLANK_LEG, DATAGRAM_LEGS, LEGS, REGISTERED, SOCKET_TOKENS, SocketTokens, TOKENS},
    process::{offset, read},
    socket::{Socket, has_received_fin},
};

#[cgroup_sock(sock_release)]
pub fn carnet_release(ctx: SockContext) -> i32 {
    let ctx = ctx.sock;
    let Some(socket) = Socket::new(ctx) else {
        return 1;
    };
    // What this hook may read of its context says nothing of them.
    let sk = ctx as u64;
    if socket.is_tcp() {
        let cookie: u64 = read(sk, offset!(sock_cookie));
        if cookie == 0 {
            // Nothing is known of it.
            return 1;
        }
        connecting::storage_ends(socket);
        if !connecting::socket_ends(cookie, || bytes_of(sk)) {
            accepted::socket_ends(cookie, sk);
        }
        return 1;
    }
    if !socket.is_datagram() {
        return 1;
    }
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if let Some(leg) = socket.get(&LEGS) {
        let redirected = leg.kind == LEG_REDIRECTED;
        datagrams_end(leg);
        if redirected {
            keep(ctx, leg);
        }
    }
    if let Some(tokens) = socket.get(&TOKENS) {
        repeat(SOCKET_TOKENS as u32, &mut End { tokens, netns, cookie });
    }
    if let Some(registration) = socket.get(&REGISTERED) {
        unlisten(registration, socket.protocol(), &bound_to(ctx, socket.family()));
    }
    1
}

/// What a TCP socket has sent, or is still to send, and received.
#[inline(always)]
fn bytes_of(sk: u64) -> Bytes {
    let all: u64 = read(sk, offset!(tcp_bytes_sent));
    let again: u64 = read(sk, offset!(tcp_bytes_sent_again));
    let unsent = read::<u32>(sk, offset!(tcp_written)).wrapping_sub(read(sk, offset!(tcp_sent)));
    let received: u64 = read(sk, offset!(tcp_bytes_received));
    Bytes {
        sent: all.wrapping_sub(again).wrapping_add(unsent.into()),
        // The kernel counts the FIN as a byte.
        received: received.saturating_sub(has_received_fin(read(sk, offset!(sock_flags))).into()),
    }
}

/// The address and port that a socket of this family is bound to.
#[inline(always)]
fn bound_to(ctx: *mut bpf_sock, family: u16) -> Endpoint {
    // What this hook may read of its context says nothing of addresses.
    let sk = ctx as u64;
    let port = read::<u16>(sk, offset!(sock_port));
    if family == AF_INET {
        Endpoint::v4(read(sk, offset!(sock_local_v4)), port)
    } else {
        Endpoint::v6(read(sk, offset!(sock_local_v6)), port)
    }
}

/// Keeps the leg of a connected socket, under the address at which the service sees it.
#[inline(always)]
fn keep(ctx: *mut bpf_sock, leg: &LegState) {
    let client = bound_to(ctx, leg.requested.family);
    let key =
        PeerKey { netns: leg.netns, address: client.address, port: client.port.into(), zero: 0 };
    let Some(blank) = BLANK_LEG.get(0) else {
        return;
    };
    // SAFETY: key and value are whole and of the map's sizes; the value lies in another map, from which
    // the kernel copies it. A socket that had the address before gives way.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const DATAGRAM_LEGS).cast_mut().cast(),
            (&raw const key).cast(),
            blank.as_ptr().cast(),
            BPF_ANY.into(),
        )
    };
    if failed != 0 {
        return;
    }
    if let Some(timed) = DATAGRAM_LEGS.get_ptr_mut(&key) {
        // SAFETY: the entry stays allocated until the program ends. Both legs are whole and in maps; the
        // helper copies many times faster than the loop that LLVM would write.
        let timed = unsafe {
            bpf_probe_read_kernel(
                (&raw mut (*timed).held.leg).cast(),
                size_of::<LegState>() as u32,
                core::ptr::from_ref(leg).cast(),
            );
            &mut *timed
        };
        timed.held.client.address = client.address;
        timed.held.client.port = client.port;
        if !idle::start(timed, DATAGRAM_LINGER_NS) {
            let _absent = DATAGRAM_LEGS.remove(&key);
        }
    }
}

/// The way through a socket's newest flows.
struct End<'a> {
    tokens: &'a SocketTokens,
    netns: u64,
    cookie: u64,
}

impl Step for End<'_> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(token) = self.tokens.tokens.get(index as usize) else {
            return false;
        };
        let key = PeerKey { netns: self.netns, address: *token, port: 0, zero: 0 };
        if let Some(timed) = DATAGRAM_LEGS.get_ptr_mut(&key) {
            // SAFETY: the entry stays allocated until the program ends.
            let timed = unsafe { &mut *timed };
            if timed.held.leg.cookie == self.cookie && !idle::linger(timed) {
                let _absent = DATAGRAM_LEGS.remove(&key);
            }
        }
        true
    }
}

//! `cgroup/recvmsg4` and `cgroup/recvmsg6` (since Linux 5.2): the application sees whom it asked.
//!
//! **What it does.** An answer that comes from a service gets the requested destination for its
//! source. A datagram from anybody else to a socket that is not connected begins a flow of the other
//! side's, if it belongs to none: what the application answers is not an outbound flow.
//!
//! **Why this hook.** It runs whenever an application that receives a datagram asks for its source.
//! IPv4 datagrams that IPv6 sockets receive come to recvmsg6, mapped.
//!
//! **Returns** 1 always. **WFP**: answers of a redirected flow come from the original destination
//! likewise; flows that begin elsewhere are `ALE_AUTH_RECV_ACCEPT`'s, not `ALE_CONNECT_REDIRECT`'s.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use carnet_core::{address::Endpoint, flow::is_source_token};

use crate::{
    client::held,
    ctx::{load32, load64},
    datagram::{known, remember},
    getpeername::redirected,
    maps::LEGS,
    report::now,
    sock_addr::{address_v4, address_v6, set_address_v4, set_address_v6},
    socket::{CLOSE, Socket, is_datagram},
    source::is_local,
};

#[cgroup_sock_addr(recvmsg4)]
pub fn carnet_recvmsg4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let source = address_v4(ctx);
    if let Some(requested) = asked_for(ctx, &source) {
        set_address_v4(ctx, requested);
    }
    1
}

#[cgroup_sock_addr(recvmsg6)]
pub fn carnet_recvmsg6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let source = address_v6(ctx);
    if let Some(requested) = asked_for(ctx, &source) {
        set_address_v6(ctx, requested);
    }
    1
}

/// The destination that was asked for, if the datagram from `source` is an answer of a service.
#[inline(always)]
fn asked_for(ctx: *mut bpf_sock_addr, source: &Endpoint) -> Option<&'static Endpoint> {
    if !is_datagram(load32!(ctx, 36)) {
        return None;
    }
    let sk = load64!(ctx, 64);
    if is_source_token(source)
        && let Some(timed) = held(ctx, &source.address)
    {
        let socket = Socket::new(sk as *mut _)?;
        // To the service itself, the token is the source.
        if timed.held.client.port != socket.local().port
            || timed.held.leg.target.port != source.port
        {
            return None;
        }
        timed.held.seen_ns = now();
        return Some(&timed.held.leg.requested);
    }
    let socket = Socket::new(sk as *mut _)?;
    if let Some(leg) = redirected(socket.get(&LEGS).map(|leg| &*leg), source) {
        return Some(&leg.requested);
    }
    if socket.state() == CLOSE {
        if known(ctx, source).is_none() && !is_local(ctx, source) {
            remember(ctx, source, &[0; 4]);
        }
    }
    None
}

//! `cgroup/getpeername4` and `cgroup/getpeername6` (since Linux 5.8): the application sees whom it
//! asked for.
//!
//! **What it does.** On a redirected socket it puts the requested destination in the place of the
//! service's address, and only if the peer really is that address: the storage of a socket outlives
//! its connections.
//!
//! **Returns** 1 always. **WFP**: applications see the original destination likewise.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use carnet_core::{
    address::Endpoint,
    flow::{LEG_REDIRECTED, LegState},
};

use crate::{
    connecting::leg_of,
    ctx::{load32, load64, store32},
    socket::Socket,
};

#[cgroup_sock_addr(getpeername4)]
pub fn carnet_getpeer4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let peer = Endpoint::v4(load32!(ctx, 4), u16::from_be(load32!(ctx, 24) as u16));
    if let Some(leg) = redirected(leg(ctx), &peer) {
        store32!(ctx, 4, leg.requested.address[3]);
        store32!(ctx, 24, u32::from(leg.requested.port.to_be()));
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn carnet_getpeer6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let peer = Endpoint::v6(
        [load32!(ctx, 8), load32!(ctx, 12), load32!(ctx, 16), load32!(ctx, 20)],
        u16::from_be(load32!(ctx, 24) as u16),
    );
    if let Some(leg) = redirected(leg(ctx), &peer) {
        store32!(ctx, 8, leg.requested.address[0]);
        store32!(ctx, 12, leg.requested.address[1]);
        store32!(ctx, 16, leg.requested.address[2]);
        store32!(ctx, 20, leg.requested.address[3]);
        store32!(ctx, 24, u32::from(leg.requested.port.to_be()));
    }
    1
}

#[inline(always)]
fn leg(ctx: *mut bpf_sock_addr) -> Option<&'static LegState> {
    leg_of(ctx.cast(), Socket::new(load64!(ctx, 64) as *mut _)?).map(|leg| &*leg)
}

/// The leg of a socket, if it was redirected and this peer is the service to which it was sent.
#[inline(always)]
pub(crate) fn redirected(
    leg: Option<&'static LegState>,
    peer: &Endpoint,
) -> Option<&'static LegState> {
    let leg = leg?;
    let target = &leg.target;
    let same = leg.kind == LEG_REDIRECTED
        && target.port == peer.port
        && target.address[0] == peer.address[0]
        && target.address[1] == peer.address[1]
        && target.address[2] == peer.address[2]
        && target.address[3] == peer.address[3];
    same.then_some(leg)
}

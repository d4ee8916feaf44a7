//! `cgroup/getpeername4` and `cgroup/getpeername6` (since Linux 5.8): the application sees whom it
//! asked for.
//!
//! **What it does.** On a redirected socket it puts the requested destination in the place of the
//! service's address, and only if the peer really is that address: the storage of a socket outlives
//! its connections.
//!
//! **Returns** 1 always. **WFP**: applications see the original destination likewise.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use carnet_core::{address::Endpoint, flow::LegState};

use crate::{
    connecting::leg_and_place_of,
    ctx::load64,
    sock_addr::{address_v4, address_v6, set_address_v4, set_address_v6},
    socket::Socket,
};

#[cgroup_sock_addr(getpeername4)]
pub fn carnet_getpeer4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let peer = address_v4(ctx);
    if let Some(leg) = redirected(leg(ctx), &peer) {
        set_address_v4(ctx, &leg.requested);
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn carnet_getpeer6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let peer = address_v6(ctx);
    if let Some(leg) = redirected(leg(ctx), &peer) {
        set_address_v6(ctx, &leg.requested);
    }
    1
}

#[inline(always)]
fn leg(ctx: *mut bpf_sock_addr) -> Option<&'static LegState> {
    let socket = Socket::new(load64!(ctx, 64) as *mut _)?;
    // The service asks who has connected, at each accept.
    if socket.is_accepted() {
        return None;
    }
    leg_and_place_of(ctx.cast(), socket).map(|(leg, _)| &*leg)
}

/// The leg of a socket, if it was redirected and this peer is the service to which it was sent.
#[inline(always)]
pub(crate) fn redirected(
    leg: Option<&'static LegState>,
    peer: &Endpoint,
) -> Option<&'static LegState> {
    leg.filter(|leg| leg.is_to_a_service() && leg.target.is_same(peer))
}

//! `cgroup/getsockname4` and `cgroup/getsockname6` (since Linux 5.8), on the cgroups of services that
//! ask for it: what netfilter's `TPROXY` does for a proxy.
//!
//! **What it does.** On a connection that a service accepted for a flow, its own address is told to be
//! the destination that was requested. Proxies that were written for `TPROXY` look there for it.
//!
//! **Why only there.** Most programs rightly expect their own address.
//!
//! **Returns** 1 always.

use aya_ebpf::{
    bindings::bpf_sock_addr, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use carnet_core::{address::Endpoint, flow::LegState, table::Tables as _};

use crate::{
    accepted,
    bank::Bank,
    ctx::{load32, load64, store32},
    held::asked,
    listener::same,
    maps::DELIVERED,
    socket::Socket,
};

#[cgroup_sock_addr(getsockname4)]
pub fn carnet_getsock4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let own = Endpoint::v4(load32!(ctx, 4), u16::from_be(load32!(ctx, 24) as u16));
    if let Some(leg) = delivered(ctx, &own) {
        store32!(ctx, 4, leg.requested.address[3]);
        store32!(ctx, 24, u32::from(leg.requested.port.to_be()));
    }
    1
}

#[cgroup_sock_addr(getsockname6)]
pub fn carnet_getsock6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let own = Endpoint::v6(
        [load32!(ctx, 8), load32!(ctx, 12), load32!(ctx, 16), load32!(ctx, 20)],
        u16::from_be(load32!(ctx, 24) as u16),
    );
    if let Some(leg) = delivered(ctx, &own) {
        store32!(ctx, 8, leg.requested.address[0]);
        store32!(ctx, 12, leg.requested.address[1]);
        store32!(ctx, 16, leg.requested.address[2]);
        store32!(ctx, 20, leg.requested.address[3]);
        store32!(ctx, 24, u32::from(leg.requested.port.to_be()));
    }
    1
}

/// The leg with which the socket was accepted, if its service asks for this, and if the leg is this
/// connection's: what hangs on a socket outlives its connections.
#[inline(always)]
fn delivered(ctx: *mut bpf_sock_addr, own: &Endpoint) -> Option<&'static LegState> {
    let socket = Socket::new(load64!(ctx, 64) as *mut _)?;
    if !socket.is_tcp() {
        return None;
    }
    let (leg, ticket) = match socket.get(&DELIVERED) {
        Some(leg) => (leg, 0),
        None => {
            // SAFETY: the helper takes this context.
            let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
            (accepted::find(cookie)?, cookie)
        }
    };
    let bank = Bank::in_force();
    // A cgroup around another service's has that one's sockets too.
    let service = bank.service(bank.slot_of(leg.handle))?;
    if service.tproxy == 0 || !same(&leg.target, own) {
        return None;
    }
    asked(leg, ticket);
    Some(leg)
}

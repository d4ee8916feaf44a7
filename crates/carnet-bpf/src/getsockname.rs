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
    ctx::load64,
    held::asked,
    maps::DELIVERED,
    sock_addr::{address_v4, address_v6, set_address_v4, set_address_v6},
    socket::Socket,
};

#[cgroup_sock_addr(getsockname4)]
pub fn carnet_getsock4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let own = address_v4(ctx);
    if let Some(leg) = delivered(ctx, &own) {
        set_address_v4(ctx, &leg.requested);
    }
    1
}

#[cgroup_sock_addr(getsockname6)]
pub fn carnet_getsock6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let own = address_v6(ctx);
    if let Some(leg) = delivered(ctx, &own) {
        set_address_v6(ctx, &leg.requested);
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
            (accepted::find(cookie)?.leg, cookie)
        }
    };
    let bank = Bank::in_force();
    // A cgroup around another service's has that one's sockets too.
    let service = bank.service(bank.slot_of(leg.handle))?;
    if service.tproxy == 0 || !leg.target.is_same(own) {
        return None;
    }
    asked(leg, ticket);
    Some(leg)
}

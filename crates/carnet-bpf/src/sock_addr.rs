//! The address in the context of the hooks that are about one: the destination of a connect or of a
//! datagram, the source of one that is received, the name of a socket.

use aya_ebpf::bindings::bpf_sock_addr;
use carnet_core::address::Endpoint;

use crate::ctx::{load32, store32};

/// That of a hook for IPv4.
#[inline(always)]
pub(crate) fn address_v4(ctx: *mut bpf_sock_addr) -> Endpoint {
    Endpoint::v4(load32!(ctx, 4), u16::from_be(load32!(ctx, 24) as u16))
}

/// That of a hook for IPv6.
#[inline(always)]
pub(crate) fn address_v6(ctx: *mut bpf_sock_addr) -> Endpoint {
    Endpoint::v6(
        [load32!(ctx, 8), load32!(ctx, 12), load32!(ctx, 16), load32!(ctx, 20)],
        u16::from_be(load32!(ctx, 24) as u16),
    )
}

/// Puts another in its place.
#[inline(always)]
pub(crate) fn set_address_v4(ctx: *mut bpf_sock_addr, to: &Endpoint) {
    store32!(ctx, 4, to.address[3]);
    store32!(ctx, 24, u32::from(to.port.to_be()));
}

/// Puts another in its place.
#[inline(always)]
pub(crate) fn set_address_v6(ctx: *mut bpf_sock_addr, to: &Endpoint) {
    store32!(ctx, 8, to.address[0]);
    store32!(ctx, 12, to.address[1]);
    store32!(ctx, 16, to.address[2]);
    store32!(ctx, 20, to.address[3]);
    store32!(ctx, 24, u32::from(to.port.to_be()));
}

//! From where UDP sockets send: what may not be claimed, and what is known to be local.

use aya_ebpf::bindings::{BPF_ANY, bpf_sock_addr};
use carnet_core::{
    abi::errno,
    address::Endpoint,
    flow::{LocalSourceKey, is_source_token},
};

use crate::{decide::netns_of, maps::LOCAL_SOURCES};

/// Looks at the address from which a UDP socket sends, or will if it is to be connected: gives 0, or the
/// errno with which that is refused.
///
/// A source token stands for a service's flow, so that nobody but the hooks sends from one. Of other
/// IPv6 addresses it is noted that they are local, since nothing keeps an application from sending to
/// itself from an address that is not.
#[inline(never)]
pub(crate) fn look_at(ctx: *mut bpf_sock_addr, source: &Endpoint) -> i32 {
    if is_source_token(source) {
        return errno::EADDRNOTAVAIL;
    }
    if source.is_unspecified() || source.is_ipv4() || is_local(ctx, source) {
        return 0;
    }
    match LOCAL_SOURCES.insert(key_of(ctx, source), &0, BPF_ANY.into()) {
        Ok(()) => 0,
        Err(_) => errno::ENOMEM,
    }
}

/// Whether a local UDP socket has sent from this address.
#[inline(always)]
pub(crate) fn is_local(ctx: *mut bpf_sock_addr, source: &Endpoint) -> bool {
    // SAFETY: the value is not looked at.
    unsafe { LOCAL_SOURCES.get(key_of(ctx, source)) }.is_some()
}

#[inline(always)]
fn key_of(ctx: *mut bpf_sock_addr, source: &Endpoint) -> LocalSourceKey {
    LocalSourceKey { netns: netns_of(ctx), address: source.address }
}

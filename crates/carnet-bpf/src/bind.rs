//! `cgroup/post_bind4` and `cgroup/post_bind6` (since Linux 4.17), on the cgroups of services whose
//! programs do not register their listeners.
//!
//! **What it does.** A socket of such a service that is bound to the service's port is registered, as
//! if the program had done so itself. So a program is followed that starts anew, that binds again when
//! it reads its configuration, or whose workers bind sockets of their own, and no process has to watch.
//!
//! **Why this hook.** It runs at the end of `bind(2)`, when address and port are settled. At `listen(2)`
//! runs no hook that can tell who calls. A connection is not sent to a registered socket before it
//! listens.
//!
//! **Returns** 1 always: `bind(2)` has succeeded. A socket for which there is no room is not
//! registered, as one whose program asks for it is refused.

use aya_ebpf::{
    bindings::bpf_sock, helpers::generated::bpf_get_netns_cookie, macros::cgroup_sock,
    programs::SockContext,
};
use carnet_core::{address::Endpoint, flow::Registration, table::Tables as _};

use crate::{
    bank::Bank,
    ctx::load32,
    process::carnet_service,
    registration::register,
    socket::{Socket, TCP},
};

#[cgroup_sock(post_bind4)]
pub fn carnet_bind4(ctx: SockContext) -> i32 {
    let ctx = ctx.sock;
    bound(ctx, &Endpoint::v4(load32!(ctx, 24), load32!(ctx, 44) as u16));
    1
}

#[cgroup_sock(post_bind6)]
pub fn carnet_bind6(ctx: SockContext) -> i32 {
    let ctx = ctx.sock;
    let address = [load32!(ctx, 28), load32!(ctx, 32), load32!(ctx, 36), load32!(ctx, 40)];
    bound(ctx, &Endpoint::v6(address, load32!(ctx, 44) as u16));
    1
}

#[inline(always)]
fn bound(ctx: *mut bpf_sock, local: &Endpoint) {
    let Some(socket) = Socket::new(ctx) else {
        return;
    };
    if !socket.is_tcp() && !socket.is_datagram() {
        return;
    }
    let handle = carnet_service();
    let bank = Bank::in_force();
    let Some(service) = bank.service(bank.slot_of(handle)) else {
        return;
    };
    if service.listen_port == 0 || service.listen_port != local.port {
        return;
    }
    let protocol = if socket.is_tcp() { TCP } else { socket.protocol() };
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    let _no_room = register(socket, local, protocol, Registration { handle, netns });
}

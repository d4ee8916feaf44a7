//! `cgroup/sock_create` (since Linux 4.10): no sockets whose flows nobody would see; cookies for the sockets of
//! services.
//!
//! **What it does.** Gives the TCP sockets that services make their cookies: the socket-option hooks can read
//! one, but not have it made, and keep under it what would cost more on the socket itself.
//!
//! And, where the operator asks for it, refuses to make an IPv4 or IPv6 socket whose flows pass none of the other
//! hooks: raw ones, those of `ping`, UDP-Lite, SCTP, and whatever else a module may bring.
//!
//! **Why this hook.** It runs inside `socket(2)`, for internet sockets of every protocol, when type
//! and protocol are settled. The second half is attached only with `carnet up
//! --refuse-unseen`. It does not run for other families: a packet socket takes `CAP_NET_RAW`.
//!
//! **Returns** 1: the socket is made. 0: `socket(2)` fails with `EPERM`.

use aya_ebpf::{
    helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock, programs::SockContext,
};
use carnet_core::event::{Counter, EventKind};

use crate::{
    report::{count, event_of_caller},
    socket::{Socket, TCP},
};

#[cgroup_sock(sock_create)]
pub fn carnet_cookie(ctx: SockContext) -> i32 {
    let is_plain_tcp = Socket::new(ctx.sock).is_some_and(|socket| socket.protocol() == TCP);
    if is_plain_tcp {
        // SAFETY: the helper takes this context.
        unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
    }
    1
}

#[cgroup_sock(sock_create)]
pub fn carnet_socket(ctx: SockContext) -> i32 {
    let Some(socket) = Socket::new(ctx.sock) else {
        return 1;
    };
    let kind = socket.kind();
    if !kind.is_unseen() {
        return 1;
    }
    count(Counter::SocketsRefused);
    event_of_caller(EventKind::SocketRefused as u32, |event| event.reason = kind.to_number());
    0
}

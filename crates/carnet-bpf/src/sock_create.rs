//! `cgroup/sock_create` (since Linux 4.10): no sockets whose flows nobody would see.
//!
//! **What it does.** Refuses to make an IPv4 or IPv6 socket whose flows pass none of the other
//! hooks: raw ones, those of `ping`, UDP-Lite, SCTP, and whatever else a module may bring.
//!
//! **Why this hook.** It runs inside `socket(2)`, for internet sockets of every protocol, when type
//! and protocol are settled. It is attached only where the operator asks for it (`carnet up
//! --refuse-unseen`). It does not run for other families: a packet socket takes `CAP_NET_RAW`.
//!
//! **Returns** 1: the socket is made. 0: `socket(2)` fails with `EPERM`.

use aya_ebpf::{macros::cgroup_sock, programs::SockContext};
use carnet_core::event::{Counter, EventKind};

use crate::{
    report::{count, event_of_caller},
    socket::Socket,
};

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

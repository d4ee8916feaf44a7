//! `cgroup/sock_release` (since Linux 5.9): the end of UDP flows.
//!
//! **What it does.** Ends the flows of a UDP socket that is closed for good: the leg of a connected
//! one, and the newest of those that a socket that is not connected has; the rest end by their timers.
//!
//! **Why this hook.** UDP knows no end of a connection, and what hangs on a socket goes without a word.
//!
//! **Returns** 1 always.

use aya_ebpf::{
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::cgroup_sock,
    programs::SockContext,
};
use carnet_core::{flow::TokenKey, table::Step};

use crate::{
    bank::repeat,
    end::datagrams_end,
    maps::{DATAGRAM_LEGS, LEGS, SOCKET_TOKENS, SocketTokens, TOKENS},
    socket::Socket,
};

#[cgroup_sock(sock_release)]
pub fn carnet_release(ctx: SockContext) -> i32 {
    let ctx = ctx.sock;
    let Some(socket) = Socket::new(ctx) else {
        return 1;
    };
    if !socket.is_datagram() {
        return 1;
    }
    if let Some(leg) = socket.get(&LEGS) {
        datagrams_end(leg);
    }
    if let Some(tokens) = socket.get(&TOKENS) {
        // SAFETY: the helpers take this context.
        let (netns, cookie) =
            unsafe { (bpf_get_netns_cookie(ctx.cast()), bpf_get_socket_cookie(ctx.cast())) };
        repeat(SOCKET_TOKENS as u32, &mut End { tokens, netns, cookie });
    }
    1
}

/// The way through a socket's newest flows.
struct End<'a> {
    tokens: &'a SocketTokens,
    netns: u64,
    cookie: u64,
}

impl Step for End<'_> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(token) = self.tokens.tokens.get(index as usize) else {
            return false;
        };
        let key = TokenKey { netns: self.netns, address: *token };
        if let Some(timed) = DATAGRAM_LEGS.get_ptr_mut(&key) {
            // SAFETY: the entry stays allocated until the program ends.
            let leg = unsafe { &mut (*timed).held.leg };
            if leg.cookie == self.cookie {
                datagrams_end(leg);
                let _absent = DATAGRAM_LEGS.remove(&key);
            }
        }
        true
    }
}

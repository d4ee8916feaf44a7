//! Which live listener of a service can take a connection.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_sock_tuple},
    helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_release},
};
use carnet_core::{
    abi::LISTENER_SLOTS,
    address::{AF_INET, AF_INET6, Endpoint},
    flow::ListenerKey,
    table::Step,
};

use crate::{
    bank::repeat,
    ctx::load64,
    decide::{Request, netns_of},
    maps::LISTENERS,
    socket::{LISTEN, Socket},
};

/// 127.0.0.1, in network byte order.
const LOOPBACK_V4: u32 = 0x7f00_0001_u32.to_be();
/// The last word of ::1, in network byte order.
const ONE: u32 = 1_u32.to_be();

/// Looks for a live registered listener of the service that the decision names; gives 1, and in the
/// request where it is reached, if there is one. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_listener(ctx: *mut bpf_sock_addr, request: *mut Request) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(request) = (unsafe { request.as_mut() }) else {
        return 0;
    };
    let key =
        ListenerKey { handle: request.decision.handle, netns: netns_of(ctx), family: 0, slot: 0 };
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return 0;
    };
    let own = socket.local();
    let ipv4 = request.destination.is_ipv4();
    let mut walk = Walk { ctx, request, key, own, ipv4, found: false };
    repeat(2 * LISTENER_SLOTS, &mut walk);
    i32::from(walk.found)
}

/// The way through a service's registered listeners: those of IPv4 sockets and those of IPv6
/// sockets, of which each may serve the other's connections.
struct Walk<'a> {
    ctx: *mut bpf_sock_addr,
    request: &'a mut Request,
    own: Endpoint,
    key: ListenerKey,
    ipv4: bool,
    found: bool,
}

impl Step for Walk<'_> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        self.key.family = if index < LISTENER_SLOTS { AF_INET } else { AF_INET6 }.into();
        self.key.slot = index & (LISTENER_SLOTS - 1);
        // A destination in IPv6 proper cannot be rewritten to an IPv4 listener: the socket may be
        // bound to an IPv6 address or refuse mapped ones.
        if !self.ipv4 && self.key.family == AF_INET.into() {
            return true;
        }
        let Some(entry) = LISTENERS.get_ptr_mut(&self.key) else {
            return true;
        };
        // SAFETY: the entry stays allocated until the program ends; a registration that replaces
        // it meanwhile is seen by the look-up of the listening socket below.
        let entry = unsafe { &mut *entry };
        let Some(target) = self.target(&entry.local) else {
            return true;
        };
        if self.registered(&target) {
            entry.missed = 0;
            self.request.target = target;
            self.found = true;
            return false;
        }
        entry.missed = entry.missed.wrapping_add(1);
        true
    }
}

impl Walk<'_> {
    /// The address under which the connection reaches a listener that is bound to `local`
    /// (contract C22): an unspecified one is reached under the connection's own local address if
    /// it is bound to one, else on loopback.
    #[inline(always)]
    fn target(&self, local: &Endpoint) -> Option<Endpoint> {
        let port = local.port;
        let mut target = if self.ipv4 {
            let address = if local.is_unspecified() {
                if self.own.is_ipv4() && !self.own.is_unspecified() {
                    self.own.address[3]
                } else {
                    LOOPBACK_V4
                }
            } else if local.is_ipv4() {
                local.address[3]
            } else {
                return None;
            };
            Endpoint::v4(address, port)
        } else {
            let address = if local.is_unspecified() {
                if self.own.is_unspecified() { [0, 0, 0, ONE] } else { self.own.address }
            } else if local.is_ipv4() {
                return None;
            } else {
                local.address
            };
            Endpoint::v6(address, port)
        };
        target.family = self.request.destination.family;
        Some(target)
    }

    /// Whether a listening socket that the service registered takes connections to `target`.
    #[inline(always)]
    fn registered(&self, target: &Endpoint) -> bool {
        const CURRENT_NETNS: u64 = u64::MAX;
        // `struct bpf_sock_tuple`: source and destination address, then their ports.
        let mut tuple = [0_u32; 9];
        let size = if self.ipv4 {
            tuple[1] = target.address[3];
            tuple[2] = u32::from(target.port.to_be()) << 16;
            12
        } else {
            tuple[4] = target.address[0];
            tuple[5] = target.address[1];
            tuple[6] = target.address[2];
            tuple[7] = target.address[3];
            tuple[8] = u32::from(target.port.to_be()) << 16;
            36
        };
        // SAFETY: the helper takes this context and reads `size` bytes of the tuple.
        let sk = unsafe {
            bpf_sk_lookup_tcp(
                self.ctx.cast(),
                tuple.as_mut_ptr().cast::<bpf_sock_tuple>(),
                size,
                CURRENT_NETNS,
                0,
            )
        };
        let Some(listener) = Socket::new(sk) else {
            return false;
        };
        let live = listener.state() == LISTEN && listener.registered_for() == self.key.handle;
        // SAFETY: the socket is a reference that the look-up gave; it is not used after this.
        unsafe { bpf_sk_release(sk.cast::<c_void>()) };
        live
    }
}

/// Whether two addresses and ports are the same.
#[inline(always)]
pub(crate) fn same(a: &Endpoint, b: &Endpoint) -> bool {
    a.port == b.port
        && a.address[0] == b.address[0]
        && a.address[1] == b.address[1]
        && a.address[2] == b.address[2]
        && a.address[3] == b.address[3]
}

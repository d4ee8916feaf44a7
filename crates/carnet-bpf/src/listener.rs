//! Which live listener of a service can take a connection.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_tuple},
    helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release},
};
use carnet_core::{
    abi::LISTENER_SLOTS,
    address::{AF_INET, AF_INET6, Endpoint},
    flow::{ListenerKey, Registration},
    table::Step,
};

use crate::{
    bank::repeat,
    ctx::load64,
    decide::{Request, netns_of},
    maps::LISTENERS,
    socket::{CLOSE, LISTEN, Socket, TCP, UDP},
};

/// 127.0.0.1, in network byte order.
pub(crate) const LOOPBACK_V4: u32 = 0x7f00_0001_u32.to_be();
/// The last word of ::1, in network byte order.
pub(crate) const ONE: u32 = 1_u32.to_be();

/// Looks for a live registered listener of the service that the decision names; gives 1, and in the
/// request where it is reached, if there is one. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_listener(ctx: *mut bpf_sock_addr, request: *mut Request) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(request) = (unsafe { request.as_mut() }) else {
        return 0;
    };
    let key = ListenerKey {
        handle: request.decision.handle,
        netns: netns_of(ctx),
        family: 0,
        protocol: request.protocol as u16,
        slot: 0,
    };
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
        self.key.family = if index < LISTENER_SLOTS { AF_INET } else { AF_INET6 };
        self.key.slot = index & (LISTENER_SLOTS - 1);
        // A destination in IPv6 proper cannot be rewritten to an IPv4 listener: the socket may be
        // bound to an IPv6 address or refuse mapped ones.
        if !self.ipv4 && self.key.family == AF_INET {
            return true;
        }
        let Some(entry) = LISTENERS.get_ptr_mut(&self.key) else {
            return true;
        };
        // SAFETY: the entry stays allocated until the program ends; a registration that replaces
        // it meanwhile is seen by the look-up of the listening socket below.
        let entry = unsafe { &mut *entry };
        let Some(target) = reached_at(&entry.local, &self.own, self.ipv4) else {
            return true;
        };
        // Not through a variable: the stack of the hooks is all but full.
        self.request.target = target;
        self.request.target.family = self.request.destination.family;
        let protocol = self.request.protocol;
        let target = &self.request.target;
        let home = registered_in(self.ctx, protocol, entry.home_id, target, self.key.handle);
        // The number may have become another namespace's by now: the cookie tells.
        if home != 0 && home == entry.home {
            entry.missed = 0;
            self.request.home = home;
            self.found = true;
            return false;
        }
        entry.missed = entry.missed.wrapping_add(1);
        true
    }
}

/// The address under which a connection reaches a listener that is bound to `local` (contract C22): an
/// unspecified one is reached under the connection's own local address if it is bound to one, else on
/// loopback.
#[inline(always)]
pub(crate) fn reached_at(local: &Endpoint, own: &Endpoint, ipv4: bool) -> Option<Endpoint> {
    let port = local.port;
    if ipv4 {
        let address = if local.is_unspecified() {
            if own.is_ipv4() && !own.is_unspecified() { own.address[3] } else { LOOPBACK_V4 }
        } else if local.is_ipv4() {
            local.address[3]
        } else {
            return None;
        };
        Some(Endpoint::v4(address, port))
    } else {
        let address = if local.is_unspecified() {
            if own.is_unspecified() { [0, 0, 0, ONE] } else { own.address }
        } else if local.is_ipv4() {
            return None;
        } else {
            local.address
        };
        Some(Endpoint::v6(address, port))
    }
}

/// A registered socket, bound to `local`, has been closed: others may take its slot.
#[inline(always)]
pub(crate) fn unlisten(registration: &Registration, protocol: u32, local: &Endpoint) {
    let &Registration { handle, netns } = registration;
    let key =
        ListenerKey { handle, netns, family: local.family, protocol: protocol as u16, slot: 0 };
    repeat(LISTENER_SLOTS, &mut Unlisten { key, local: *local });
}

/// The way through the slots of a service to that of a listener.
struct Unlisten {
    key: ListenerKey,
    local: Endpoint,
}

impl Step for Unlisten {
    #[inline(always)]
    fn step(&mut self, slot: u32) -> bool {
        self.key.slot = slot;
        if let Some(entry) = LISTENERS.get_ptr_mut(&self.key) {
            // SAFETY: the entry stays allocated until the program ends. Connects count in it too;
            // whichever store comes last, it is not 0, unless a connect has found another socket
            // that listens there.
            let entry = unsafe { &mut *entry };
            if entry.home == self.key.netns && entry.local.is_same(&self.local) {
                entry.missed = 1;
                return false;
            }
        }
        true
    }
}

/// Cookie of the network namespace of the socket that takes connections, or datagrams, to `target`, if
/// the service with this handle has registered it; else 0. `namespace` as for [`Found::look_up`].
#[inline(always)]
pub(crate) fn registered_in(
    ctx: *mut bpf_sock_addr,
    protocol: u32,
    namespace: i32,
    target: &Endpoint,
    handle: u64,
) -> u64 {
    let Some(listener) = Found::look_up(ctx, protocol, namespace, None, target) else {
        return 0;
    };
    let ready = if protocol == TCP { LISTEN } else { CLOSE };
    if listener.socket.state() != ready {
        return 0;
    }
    match listener.socket.registration() {
        Some(found) if found.handle == handle => found.netns,
        _ => 0,
    }
}

/// A socket that was looked up, with a reference that ends with this value.
pub(crate) struct Found {
    pub(crate) socket: Socket,
    sk: *mut bpf_sock,
}

impl Found {
    /// The socket of a network namespace that gets what comes for `to` over this protocol from
    /// `from`, or from anywhere. `namespace` is its number in that of the connecting socket, or
    /// `SAME_NAMESPACE`.
    #[inline(always)]
    pub(crate) fn look_up(
        ctx: *mut bpf_sock_addr,
        protocol: u32,
        namespace: i32,
        from: Option<&Endpoint>,
        to: &Endpoint,
    ) -> Option<Self> {
        // The helpers take any negative number for the same one.
        let namespace = i64::from(namespace) as u64;
        // `struct bpf_sock_tuple`: source and destination address, then their ports.
        let mut tuple = MaybeUninit::<[u32; 9]>::uninit();
        let word = tuple.as_mut_ptr().cast::<u32>();
        let mut ports = u32::from(to.port.to_be()) << 16;
        let mut source = [0; 4];
        if let Some(from) = from {
            ports |= u32::from(from.port.to_be());
            source = from.address;
        }
        // SAFETY: all within the tuple. Each word is written that the helper reads, and one by one: a
        // call that clears them all would cost stack that is not there.
        let size = unsafe {
            if to.is_ipv4() {
                word.write(source[3]);
                word.add(1).write(to.address[3]);
                word.add(2).write(ports);
                12
            } else {
                word.write(source[0]);
                word.add(1).write(source[1]);
                word.add(2).write(source[2]);
                word.add(3).write(source[3]);
                word.add(4).write(to.address[0]);
                word.add(5).write(to.address[1]);
                word.add(6).write(to.address[2]);
                word.add(7).write(to.address[3]);
                word.add(8).write(ports);
                36
            }
        };
        let tuple = tuple.as_mut_ptr().cast::<bpf_sock_tuple>();
        let sk = if protocol == TCP {
            // SAFETY: the helper takes this context and reads `size` bytes of the tuple.
            unsafe { bpf_sk_lookup_tcp(ctx.cast(), tuple, size, namespace, 0) }
        } else if protocol == UDP {
            // SAFETY: likewise.
            unsafe { bpf_sk_lookup_udp(ctx.cast(), tuple, size, namespace, 0) }
        } else {
            // There is no look-up for UDP-Lite, so no service can take it.
            return None;
        };
        Socket::new(sk).map(|socket| Self { socket, sk })
    }
}

impl Drop for Found {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the socket is a reference that the look-up gave; it is not used after this.
        unsafe { bpf_sk_release(self.sk.cast::<c_void>()) };
    }
}

/// Copies an address and port, word by word: LLVM would have a function do it byte by byte, and the
/// verifier follows every byte of it on every path.
#[inline(always)]
pub(crate) fn copy(to: &mut Endpoint, from: &Endpoint) {
    to.address[0] = from.address[0];
    to.address[1] = from.address[1];
    to.address[2] = from.address[2];
    to.address[3] = from.address[3];
    to.port = from.port;
    to.family = from.family;
    to.zero = 0;
}

//! Which UDP flow of a service an address stands for.
//!
//! The datagrams of a flow reach a service from an address of the flow's own: its source token, or,
//! where the client's socket is connected, that socket's address. A service that connects a socket
//! there asks about the flow; one that sends there answers it.

use aya_ebpf::bindings::bpf_sock_addr;
use carnet_core::{
    abi::LISTENER_SLOTS,
    address::{AF_INET, AF_INET6, Endpoint},
    event::Counter,
    flow::{LEG_REDIRECTED, ListenerKey, PeerKey, SAME_NAMESPACE, is_source_token},
    table::Step,
};

use crate::{
    bank::repeat,
    ctx::{load32, load64},
    decide::netns_of,
    listener::{Found, reached_at},
    maps::{DATAGRAM_LEGS, DELIVERED, LEGS, LISTENERS, TimedLeg},
    process::carnet_service,
    report::count,
    socket::Socket,
};

/// The flow of an unconnected socket with this source token.
// Not inlined: the stack of the hooks is all but full.
#[inline(never)]
pub(crate) fn held(ctx: *mut bpf_sock_addr, token: &[u32; 4]) -> Option<&'static mut TimedLeg> {
    let key = PeerKey { netns: netns_of(ctx), address: *token, port: 0, zero: 0 };
    // SAFETY: the entry stays allocated until the program ends. Its fields are written before anybody
    // knows its token, but for the time when it was last seen, of which any value will do.
    DATAGRAM_LEGS.get_ptr_mut(&key).map(|held| unsafe { &mut *held })
}

/// The flow whose client the service sees at `peer`: of an unconnected socket, or one whose socket was
/// closed a moment ago.
#[inline(never)]
fn held_at(ctx: *mut bpf_sock_addr, peer: &Endpoint) -> Option<&'static mut TimedLeg> {
    let port = if is_source_token(peer) { 0 } else { peer.port.into() };
    let key = PeerKey { netns: netns_of(ctx), address: peer.address, port, zero: 0 };
    // SAFETY: as in `held`.
    DATAGRAM_LEGS.get_ptr_mut(&key).map(|held| unsafe { &mut *held })
}

/// A UDP socket is being connected to `peer`. If that is the client of a flow that the caller's
/// service holds, the socket gets to know the flow's leg, and `peer` becomes the address of the
/// client's socket: gives 1. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_client(ctx: *mut bpf_sock_addr, peer: *mut Endpoint) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(peer) = (unsafe { peer.as_mut() }) else {
        return 0;
    };
    let service = carnet_service();
    if service == 0 {
        return 0;
    }
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return 0;
    };
    if !is_source_token(peer) && find_client(ctx, peer, service, Some(socket)) {
        count(Counter::Asked);
        return 1;
    }
    let Some(timed) = held_at(ctx, peer) else {
        return 0;
    };
    if timed.held.leg.handle != service {
        return 0;
    }
    socket.delete(&DELIVERED);
    if !socket.put_on_socket(&DELIVERED, &raw mut timed.held.leg) {
        count(Counter::AskFailed);
        return 0;
    }
    // It may have ended, but has been delivered.
    if let Some(leg) = socket.get(&DELIVERED) {
        leg.kind = LEG_REDIRECTED;
    }
    peer.address = timed.held.client.address;
    count(Counter::Asked);
    1
}

/// A datagram is being sent to `peer`: whether that is a connected client of a flow that the caller's
/// service holds. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_answers(ctx: *mut bpf_sock_addr, peer: *const Endpoint) -> i32 {
    // SAFETY: as in `carnet_client`.
    let Some(peer) = (unsafe { peer.as_ref() }) else {
        return 0;
    };
    let service = carnet_service();
    i32::from(
        service != 0
            && (find_client(ctx, peer, service, None)
                || held_at(ctx, peer).is_some_and(|timed| timed.held.leg.handle == service)),
    )
}

/// Looks for a socket at `client` that is connected to one of the service's listeners. If there is one,
/// `asking` gets to know its leg.
#[inline(always)]
fn find_client(
    ctx: *mut bpf_sock_addr,
    client: &Endpoint,
    service: u64,
    asking: Option<Socket>,
) -> bool {
    let key = ListenerKey {
        handle: service,
        netns: netns_of(ctx),
        family: 0,
        protocol: load32!(ctx, 36) as u16,
        slot: 0,
    };
    let mut search = Search { ctx, client, key, asking, found: false };
    repeat(2 * LISTENER_SLOTS, &mut search);
    search.found
}

/// The way through a service's listeners, at each of which the client may be connected.
struct Search<'a> {
    ctx: *mut bpf_sock_addr,
    client: &'a Endpoint,
    key: ListenerKey,
    asking: Option<Socket>,
    found: bool,
}

impl Step for Search<'_> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        self.key.family = if index < LISTENER_SLOTS { AF_INET } else { AF_INET6 };
        self.key.slot = index & (LISTENER_SLOTS - 1);
        let Some(entry) = LISTENERS.get_ptr_mut(&self.key) else {
            return true;
        };
        // SAFETY: the entry stays allocated until the program ends.
        let local = unsafe { (*entry).local };
        let Some(target) = reached_at(&local, self.client, self.client.is_ipv4()) else {
            return true;
        };
        let protocol = self.key.protocol.into();
        let Some(found) =
            Found::look_up(self.ctx, protocol, SAME_NAMESPACE, Some(&target), self.client)
        else {
            return true;
        };
        let Some(leg) = found.socket.get(&LEGS) else {
            return true;
        };
        if leg.kind != LEG_REDIRECTED || leg.handle != self.key.handle {
            return true;
        }
        self.found = match self.asking {
            Some(asking) => {
                asking.delete(&DELIVERED);
                asking.put_on_socket(&DELIVERED, leg)
            }
            None => true,
        };
        false
    }
}

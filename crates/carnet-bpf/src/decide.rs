//! Core's decision over the maps.
//!
//! Each half that loops is a global function (`no_mangle`): the verifier looks at it once, on its
//! own, knowing nothing of its callers, where it would follow a local one anew from every path that
//! leads to it. Such functions take plain data only.

use aya_ebpf::{bindings::bpf_sock_addr, helpers::generated::bpf_get_netns_cookie};
use carnet_core::{
    Decision,
    address::{Endpoint, Wide},
    chain::Chain,
    classify::{
        self, Connection, Listeners, Pending, Unobserved, decide, is_redirectable, leaf_of, settle,
    },
    flow::HeldKey,
    guard::GuardEntry,
    record::{FileId, Record},
    table::{Field, LeafRow, Tables as _},
};

use crate::{
    bank::Bank,
    ctx::opaque,
    listener::carnet_listener,
    maps::GUARD,
    process::{self, Process},
};

/// A connect, or the first datagram of a flow, that is to be decided. Plain data.
#[repr(C)]
pub(crate) struct Request {
    /// Where the application wants to go.
    pub(crate) destination: Endpoint,
    /// Where the service listens that was looked for last; if it was found, which ends the search.
    pub(crate) target: Endpoint,
    /// In which network namespace that is: its cookie.
    pub(crate) home: u64,
    /// What the record says, if there is one.
    chain: Chain,
    /// The executable with which the flow began, if there is a record; else zero.
    original: FileId,
    /// Not 0: there is a record.
    recorded: u32,
    /// IP protocol number of the socket.
    pub(crate) protocol: u32,
    /// The filters that may match.
    leaf: LeafRow,
    /// Slots of services that turned out to have no live listener.
    dead: u64,
    /// The service that the caller belongs to, if it holds flows for this destination and the
    /// connection has no record; else 0.
    pub(crate) forgetful: u64,
    pub(crate) decision: Decision,
    bank: Bank,
}

impl Request {
    /// A connect, or a datagram, to `destination` of a socket of this protocol.
    #[inline(always)]
    pub(crate) fn new(protocol: u32, destination: Endpoint) -> Self {
        // A number that LLVM does not know: zeros that it knows it has a function write byte by byte,
        // and the verifier follows every byte of it on every path.
        let none = opaque(0);
        Self {
            destination,
            target: destination,
            home: none,
            chain: Chain {
                visited: none as u32,
                guessed: none as u32,
                hops: none as u32,
                strangers: none as u32,
                ..Chain::empty(none as u32)
            },
            original: FileId { device: none, inode: none },
            recorded: none as u32,
            protocol,
            leaf: LeafRow { first: none as u32, count: none as u32 },
            dead: none,
            forgetful: none,
            decision: Decision::PASS,
            bank: Bank::in_force(),
        }
    }

    /// Decides, given the record that was set on the socket.
    #[inline(always)]
    pub(crate) fn settle(&mut self, ctx: *mut bpf_sock_addr, record: Option<&Record>) {
        let services = self.bank.header().map_or(0, |header| header.services);
        if let Some(record) = record {
            self.original = record.app.executable;
            self.recorded = 1;
        }
        carnet_leaf(ctx, self);
        if let Some(record) = record {
            carnet_chain(record, self);
        }
        let services = services.wrapping_add(self.chain.strangers);
        settle(record.is_some(), self.chain.legs, services, &mut Kernel { ctx, request: self });
    }

    /// Whether the service that was decided on is unmodified.
    #[inline(always)]
    pub(crate) fn goes_to_unmodified(&self) -> bool {
        self.bank.service(self.decision.slot).is_some_and(|service| service.unmodified != 0)
    }

    /// Generation of the policy that decides.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.bank.header().map_or(0, |header| header.generation)
    }
}

/// Whether a connection passes the policy's outer gate. This calls nothing: it is all that most
/// connects pay for.
#[inline(always)]
pub(crate) fn destination_concerns_somebody(protocol: u32, destination: &Endpoint) -> bool {
    let destination = Destination { protocol, destination };
    classify::destination_concerns_somebody(&Bank::in_force(), &destination)
}

/// A connection of which only the destination is asked.
struct Destination<'a> {
    protocol: u32,
    destination: &'a Endpoint,
}

impl Connection for Destination<'_> {
    #[inline(always)]
    fn value(&self, field: u32, _argument: u32) -> Wide {
        if field == Field::DestinationAddress as u32 {
            self.destination.value()
        } else if field == Field::DestinationPort as u32 {
            Wide::from_u64(self.destination.port.into())
        } else {
            Wide::from_u64(self.protocol.into())
        }
    }

    #[inline(always)]
    fn is_redirectable(&self) -> bool {
        is_redirectable(self.protocol, self.destination)
    }
}

/// Whether a connection without a record passes the policy's inner gate.
#[inline(always)]
pub(crate) fn concerns_somebody(
    ctx: *mut bpf_sock_addr,
    protocol: u32,
    destination: &Endpoint,
) -> bool {
    classify::concerns_somebody(&Bank::in_force(), &Newcomer { ctx, protocol, destination })
}

/// A connection without a record, of which nothing has been found out yet.
struct Newcomer<'a> {
    ctx: *mut bpf_sock_addr,
    protocol: u32,
    destination: &'a Endpoint,
}

impl Connection for Newcomer<'_> {
    #[inline(always)]
    fn value(&self, field: u32, argument: u32) -> Wide {
        fact(self.ctx, self.protocol, self.destination, field, argument)
    }

    #[inline(always)]
    fn is_redirectable(&self) -> bool {
        is_redirectable(self.protocol, self.destination)
    }
}

/// Finds the filters that may match; gives their number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_leaf(ctx: *mut bpf_sock_addr, request: *mut Request) -> u32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(request) = (unsafe { request.as_mut() }) else {
        return 0;
    };
    request.leaf = leaf_of(&request.bank, &Facts { ctx, request });
    request.leaf.count
}

/// Reads the chain of the record into the request.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_chain(record: *const Record, request: *mut Request) -> i32 {
    // SAFETY: the verifier makes callers pass whole values, or null.
    let (Some(record), Some(request)) = (unsafe { (record.as_ref(), request.as_mut()) }) else {
        return 0;
    };
    request.chain = Chain::of_record(&request.bank, record);
    0
}

/// Core's inner half.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_decide(ctx: *mut bpf_sock_addr, request: *mut Request) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(request) = (unsafe { request.as_mut() }) else {
        return 0;
    };
    let facts = Facts { ctx, request };
    let decision =
        decide(&request.bank, &request.leaf, &facts, &request.chain, request.dead, &mut Unobserved);
    request.decision = decision;
    0
}

/// What the policy's filters may ask about a connection, found out when they ask.
struct Facts<'a> {
    ctx: *mut bpf_sock_addr,
    request: &'a Request,
}

impl Connection for Facts<'_> {
    #[inline(always)]
    fn value(&self, field: u32, argument: u32) -> Wide {
        if field == Field::OriginalExecutable as u32 && self.request.recorded != 0 {
            file(self.request.original)
        } else {
            fact(self.ctx, self.request.protocol, &self.request.destination, field, argument)
        }
    }

    #[inline(always)]
    fn is_redirectable(&self) -> bool {
        is_redirectable(self.request.protocol, &self.request.destination)
    }
}

/// What is known of a connection without a record.
#[inline(always)]
fn fact(
    ctx: *mut bpf_sock_addr,
    protocol: u32,
    destination: &Endpoint,
    field: u32,
    argument: u32,
) -> Wide {
    if field == Field::DestinationAddress as u32 {
        destination.value()
    } else if field == Field::DestinationPort as u32 {
        Wide::from_u64(destination.port.into())
    } else if field == Field::Protocol as u32 {
        Wide::from_u64(protocol.into())
    } else if field == Field::Cgroup as u32 {
        Wide::from_u64(process::ancestor_cgroup(argument))
    } else if field == Field::User as u32 {
        Wide::from_u64(process::uid().into())
    } else if field == Field::Executable as u32 || field == Field::OriginalExecutable as u32 {
        file(Process::current().executable())
    } else if field == Field::NetworkNamespace as u32 {
        Wide::from_u64(netns_of(ctx))
    } else {
        Wide::MIN
    }
}

#[inline(always)]
fn file(id: FileId) -> Wide {
    Wide { hi: id.device, lo: id.inode }
}

/// A request in the kernel, as core's outer half needs it.
struct Kernel<'a> {
    ctx: *mut bpf_sock_addr,
    request: &'a mut Request,
}

impl Pending for Kernel<'_> {
    #[inline(always)]
    fn decide(&mut self, dead: u64) {
        self.request.dead = dead;
        carnet_decide(self.ctx, self.request);
    }

    #[inline(always)]
    fn decision(&mut self) -> &mut Decision {
        &mut self.request.decision
    }
}

impl Listeners for Kernel<'_> {
    #[inline(always)]
    fn is_live(&mut self, _handle: u64) -> bool {
        // The service is the one that the decision in the request names.
        carnet_listener(self.ctx, self.request) != 0
    }

    #[inline(always)]
    fn forgotten_legs(&mut self) -> u32 {
        carnet_forgotten(self.ctx, self.request)
    }
}

/// Legs of the flows for this destination that the caller's service holds.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_forgotten(ctx: *mut bpf_sock_addr, request: *mut Request) -> u32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(request) = (unsafe { request.as_mut() }) else {
        return 0;
    };
    let handle = process::carnet_service();
    if handle == 0 {
        return 0;
    }
    let key = HeldKey::of(handle, netns_of(ctx), request.protocol, &request.destination);
    // SAFETY: the value is copied out at once.
    match unsafe { GUARD.get(&key) }.and_then(GuardEntry::forgotten_legs) {
        Some(legs) => {
            request.forgetful = handle;
            legs
        }
        None => 0,
    }
}

/// Cookie of the network namespace of the connecting socket.
#[inline(always)]
pub(crate) fn netns_of(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

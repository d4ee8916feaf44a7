//! `cgroup/connect4` and `cgroup/connect6` (since Linux 4.17): redirect, pass or refuse.
//!
//! **What it does.** Lets pass what concerns nobody. Of the rest it clears what an earlier connect
//! left on the socket, classifies the connection with the record that was set on it, and, where a
//! service gets it, rewrites the destination to its live listener and notes the leg on the socket.
//!
//! **Why this hook.** It runs before routing and before the source address is chosen, in the
//! caller's context, for every TCP connect however it is made (plain, non-blocking, fast open,
//! io_uring, Multipath TCP), and it can refuse with an errno of its choice. IPv4-mapped
//! destinations of IPv6 sockets come to connect6 only.
//!
//! **Returns** 1: go on, with the destination as it then is. 0: the connect fails with the errno
//! that was set.
//!
//! **Fails closed**: where kernel memory is exhausted a connection that should be redirected is
//! refused. **WFP**: the `ALE_CONNECT_REDIRECT` layers.

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_socket_cookie, bpf_probe_read_kernel, bpf_set_retval, bpf_setsockopt,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use carnet_core::{
    abi::errno,
    address::Endpoint,
    classify::Reason,
    event::{Counter, EventKind},
    flow::{LEG_ONWARD, LEG_REDIRECTED, LEG_STARTING, LegState},
    record::{Hop, MAGIC, Record, VERSION},
};

use crate::{
    ctx::{fetch_add, load32, load64, store32},
    decide::{Request, concerns_somebody, destination_concerns_somebody, netns_of},
    maps::{CONFIG, CONTEXTS, LEGS},
    process::{self, Process},
    report::{count, event_of_caller, now},
    socket::{Socket, TCP, copy_record},
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;

#[cgroup_sock_addr(connect4)]
pub fn carnet_connect4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let destination = Endpoint::v4(load32!(ctx, 4), u16::from_be(load32!(ctx, 24) as u16));
    connect(ctx, destination, |target| {
        store32!(ctx, 4, target.address[3]);
        store32!(ctx, 24, u32::from(target.port.to_be()));
    })
}

#[cgroup_sock_addr(connect6)]
pub fn carnet_connect6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let destination = Endpoint::v6(
        [load32!(ctx, 8), load32!(ctx, 12), load32!(ctx, 16), load32!(ctx, 20)],
        u16::from_be(load32!(ctx, 24) as u16),
    );
    connect(ctx, destination, |target| {
        store32!(ctx, 8, target.address[0]);
        store32!(ctx, 12, target.address[1]);
        store32!(ctx, 16, target.address[2]);
        store32!(ctx, 20, target.address[3]);
        store32!(ctx, 24, u32::from(target.port.to_be()));
    })
}

/// Both hooks. `rewrite` sends the connection elsewhere.
#[inline(always)]
fn connect(ctx: *mut bpf_sock_addr, destination: Endpoint, rewrite: impl Fn(&Endpoint)) -> i32 {
    if load32!(ctx, 36) != TCP {
        return PASS;
    }
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return PASS;
    };
    // The common case. What an earlier connect left on the socket stays there: at the SYN it is found
    // to be stale.
    if !destination_concerns_somebody(&destination)
        || socket.is_blank() && !concerns_somebody(ctx, &destination)
    {
        count(Counter::Passed);
        return PASS;
    }
    let record = set_record(socket);
    let mut request = Request::new(destination, record);
    request.settle(ctx, record);
    let decision = &request.decision;
    if decision.skipped != 0 {
        count(Counter::Skipped);
    }
    let untouched = !decision.redirects() && !decision.blocks() && record.is_none();
    if untouched || Process::current().is_kernel_thread() {
        count(Counter::Passed);
        return PASS;
    }
    let error = Attempt { ctx, socket, record, request: &request }.carry_out();
    if error != 0 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_set_retval(-error) };
        return REFUSE;
    }
    if request.decision.redirects() {
        rewrite(&request.target);
    }
    PASS
}

/// The record that is set on the socket, or on the Multipath TCP connection that it belongs to. What
/// an earlier connect left there besides is removed: the kernel keeps it over `connect(AF_UNSPEC)`.
#[inline(always)]
fn set_record(socket: Socket) -> Option<&'static Record> {
    let mut holder = socket;
    if let Some(connection) = socket.multipath() {
        socket.delete(&LEGS);
        holder = connection;
    }
    let leg = holder.get(&LEGS)?;
    if leg.set_hops == 0 {
        holder.delete(&LEGS);
        return None;
    }
    leg.kind = 0;
    leg.record.take_back(leg.set_hops);
    Some(&leg.record)
}

/// A connect that has been decided.
struct Attempt<'a> {
    ctx: *mut bpf_sock_addr,
    socket: Socket,
    /// The record that is set on the socket.
    record: Option<&'static Record>,
    request: &'a Request,
}

impl Attempt<'_> {
    /// Does what was decided: gives 0, or the errno with which the connect is refused.
    #[inline(never)]
    fn carry_out(&self) -> i32 {
        let decision = &self.request.decision;
        if self.request.forgetful != 0 {
            count(Counter::Forgotten);
            self.report(EventKind::RecordForgotten, self.request.forgetful, None);
        }
        if decision.redirects() {
            if self.redirect() {
                self.unbind_device();
                return 0;
            }
            count(Counter::OutOfMemory);
            self.report_refused();
            return errno::ENOMEM;
        }
        if decision.blocks() {
            self.report_refused();
            return match decision.reason {
                Reason::Loop => {
                    count(Counter::Loops);
                    errno::ELOOP
                }
                Reason::ServiceUnavailable => {
                    count(Counter::ServiceUnavailable);
                    errno::ECONNREFUSED
                }
                Reason::NoFilter | Reason::Filter => errno::EPERM,
            };
        }
        if let Some(record) = self.record {
            self.pass_onward(record);
        }
        0
    }

    /// Notes the leg on the socket. Gives `false` when out of memory or when the record is full.
    #[inline(always)]
    fn redirect(&self) -> bool {
        let Some(leg) = self.begin(LEG_REDIRECTED, &self.request.target) else {
            return false;
        };
        leg.handle = self.request.decision.handle;
        leg.filter = self.request.decision.filter;
        if self.record.is_none() {
            self.begin_record(leg);
        }
        leg.record.legs = self.request.decision.legs.wrapping_add(1);
        leg.record.issued_ns = leg.began_ns;
        let hop =
            Hop { handle: self.request.decision.handle, filter: self.request.decision.filter };
        let noted = leg.record.push(hop);
        set_context(leg, self.request.decision.filter);
        if !noted || !self.socket.put_on_multipath(&LEGS, leg) {
            leg.kind = 0;
            return false;
        }
        count(Counter::Redirected);
        self.report(EventKind::Redirected, self.request.decision.handle, Some(&leg.record));
        true
    }

    /// Notes the last leg of a flow, which reaches the destination. Without memory for the note the
    /// connection passes all the same: only the listing misses it.
    #[inline(always)]
    fn pass_onward(&self, record: &Record) {
        count(Counter::Onward);
        if let Some(leg) = self.begin(LEG_ONWARD, &self.request.destination) {
            self.socket.put_on_multipath(&LEGS, leg);
        }
        self.report(EventKind::Onward, 0, Some(record));
    }

    /// Reports that the connection is refused.
    #[inline(always)]
    fn report_refused(&self) {
        count(Counter::Blocked);
        self.report(EventKind::Blocked, self.request.decision.handle, self.record);
    }

    #[inline(always)]
    fn report(&self, kind: EventKind, handle: u64, record: Option<&Record>) {
        event_of_caller(kind, |event| {
            event.reason = self.request.decision.reason as u32;
            event.handle = handle;
            event.filter = self.request.decision.filter;
            event.skipped = self.request.decision.skipped;
            event.generation = self.request.generation();
            event.requested = self.request.destination;
            match record {
                Some(record) => {
                    event.flow = record.flow;
                    event.legs = record.legs;
                    event.hops = record.hop_count;
                }
                None => event.legs = self.request.decision.legs,
            }
        });
    }

    #[inline(always)]
    fn begin(&self, kind: u32, target: &Endpoint) -> Option<&'static mut LegState> {
        let leg = self.socket.get_or_create(&LEGS)?;
        if let Some(record) = self.record
            && leg.set_hops == 0
        {
            // The record is that of the Multipath TCP connection.
            copy_record(leg, record);
            leg.set_hops = record.hop_count;
        }
        leg.kind = kind | LEG_STARTING;
        // SAFETY: the helper takes this context.
        leg.cookie = unsafe { bpf_get_socket_cookie(self.ctx.cast()) };
        leg.netns = netns_of(self.ctx);
        leg.began_ns = now();
        leg.pid = process::pid();
        leg.requested = self.request.destination;
        leg.target = *target;
        Some(leg)
    }

    /// Begins the record of a flow at its first leg.
    #[inline(always)]
    fn begin_record(&self, leg: &mut LegState) {
        let record = &mut leg.record;
        record.magic = MAGIC;
        record.version = VERSION;
        if let Some(config) = CONFIG.get_ptr_mut(0) {
            // SAFETY: the map's only element lives as long as the map; the counter is shared with
            // other CPUs and touched atomically alone, the epoch is written before any hook runs.
            unsafe {
                record.epoch = (*config).epoch;
                record.flow = (fetch_add(&raw mut (*config).flows, 1) as u64).wrapping_add(1);
            }
        }
        record.destination = self.request.destination;
        process::carnet_identify(leg);
    }

    /// A device that a socket is bound to keeps it from reaching a service on loopback; the service
    /// reaches the destination with a socket of its own.
    #[inline(always)]
    fn unbind_device(&self) {
        const SOL_SOCKET: i32 = 1;
        const SO_BINDTOIFINDEX: i32 = 62;
        if self.socket.bound_device() != 0 {
            let mut none = 0_u32;
            // SAFETY: the helper takes this context and reads 4 bytes.
            unsafe {
                bpf_setsockopt(
                    self.ctx.cast(),
                    SOL_SOCKET,
                    SO_BINDTOIFINDEX,
                    (&raw mut none).cast(),
                    size_of::<u32>() as i32,
                );
            }
        }
    }
}

/// Gives the leg the context of the filter that redirects it, if that has one.
#[inline(always)]
fn set_context(leg: &mut LegState, filter: u64) {
    leg.context_length = 0;
    // SAFETY: the value is copied out at once; contexts are never changed in place.
    if let Some(context) = unsafe { CONTEXTS.get(&filter) } {
        leg.context_length = context.length as u32;
        // SAFETY: both are `MAX_CONTEXT` bytes long.
        unsafe {
            bpf_probe_read_kernel(
                leg.context.as_mut_ptr().cast(),
                size_of_val(&leg.context) as u32,
                context.bytes.as_ptr().cast(),
            );
        }
    }
}

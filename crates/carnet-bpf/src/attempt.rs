//! What is done with a connect, or with the first datagram of a flow, once it has been decided: the
//! part that both have in common.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_socket_cookie, bpf_probe_read_kernel, bpf_set_retval, bpf_setsockopt,
    },
};
use carnet_core::{
    abi::errno,
    address::Endpoint,
    classify::Reason,
    event::{Counter, EventKind},
    flow::{LEG_REDIRECTED, LEG_STARTING, LEG_TO_UNMODIFIED, LegState, WAY_NONE},
    record::{Hop, MAGIC, Record, VERSION},
};

use crate::{
    ctx::fetch_add,
    decide::{Request, netns_of},
    listener::copy,
    maps::{CONFIG, CONTEXTS},
    process::{self, Process},
    report::{count, count_passed, event_of_caller, now},
    socket::{Socket, is_datagram},
};

/// Go on, with the destination as it then is.
pub(crate) const PASS: i32 = 1;

/// The system call fails with `error`: what the hook is to return.
#[inline(always)]
pub(crate) fn refuse(error: i32) -> i32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_set_retval(-error) };
    0
}

impl Request {
    /// Whether nothing is to be done with what was decided; counts it then.
    #[inline(always)]
    pub(crate) fn passes_untouched(&self, record: Option<&Record>) -> bool {
        let decision = &self.decision;
        if decision.skipped != 0 {
            count(Counter::Skipped);
        }
        let untouched = !decision.redirects() && !decision.blocks() && record.is_none();
        let passes = untouched || Process::current().is_kernel_thread();
        if passes {
            count_passed();
        }
        passes
    }
}

/// A connect, or the first datagram of a flow, that has been decided.
pub(crate) struct Attempt<'a> {
    pub(crate) ctx: *mut bpf_sock_addr,
    pub(crate) socket: Socket,
    /// The record that is set on the socket.
    pub(crate) record: Option<&'static Record>,
    pub(crate) request: &'a Request,
}

impl Attempt<'_> {
    /// Counts and reports the service that forgot the record, if one did.
    #[inline(always)]
    pub(crate) fn report_forgetful(&self) {
        if self.request.forgetful != 0 {
            count(Counter::Forgotten);
            self.report(EventKind::RecordForgotten, self.request.forgetful, None);
        }
    }

    /// Fills in what every leg begins with.
    #[inline(always)]
    pub(crate) fn begin(&self, leg: &mut LegState, kind: u32, target: &Endpoint) {
        leg.kind = kind;
        leg.way = WAY_NONE;
        // SAFETY: the helper takes this context.
        leg.cookie = unsafe { bpf_get_socket_cookie(self.ctx.cast()) };
        leg.netns = netns_of(self.ctx);
        leg.home =
            if kind & !LEG_STARTING == LEG_REDIRECTED { self.request.home } else { leg.netns };
        leg.began_ns = now();
        leg.pid = process::pid();
        leg.protocol = self.request.protocol;
        copy(&mut leg.requested, &self.request.destination);
        copy(&mut leg.target, target);
    }

    /// Makes it the leg to the service that was decided on; `first` if it is the flow's first one, in
    /// which case the caller is still to be identified; after that, [`set_context`]. Gives `false`
    /// when the record is full.
    #[inline(always)]
    pub(crate) fn redirect(&self, leg: &mut LegState, first: bool) -> bool {
        let decision = &self.request.decision;
        leg.handle = decision.handle;
        leg.filter = decision.filter;
        leg.flags &= !LEG_TO_UNMODIFIED;
        if self.request.goes_to_unmodified() {
            leg.flags |= LEG_TO_UNMODIFIED;
        }
        if first {
            begin_record(&mut leg.record, &self.request.destination);
        }
        leg.record.legs = decision.legs.wrapping_add(1);
        leg.record.issued_ns = leg.began_ns;
        leg.record.push(Hop { handle: decision.handle, filter: decision.filter })
    }

    /// Counts and reports that a service gets it.
    #[inline(always)]
    pub(crate) fn report_redirected(&self, record: &Record) {
        count(Counter::Redirected);
        if is_datagram(self.request.protocol) {
            count(Counter::DatagramFlows);
        }
        self.report(EventKind::Redirected, self.request.decision.handle, Some(record));
    }

    /// Counts and reports that it passes with a record.
    #[inline(always)]
    pub(crate) fn report_onward(&self, record: &Record) {
        count(Counter::Onward);
        self.report(EventKind::Onward, 0, Some(record));
    }

    /// Counts and reports that it is refused.
    #[inline(always)]
    pub(crate) fn report_refused(&self) {
        count(Counter::Blocked);
        self.report(EventKind::Blocked, self.request.decision.handle, self.record);
    }

    /// Counts and reports that it is refused for want of memory; gives the errno.
    #[inline(always)]
    pub(crate) fn out_of_memory(&self) -> i32 {
        count(Counter::OutOfMemory);
        self.report_refused();
        errno::ENOMEM
    }

    /// Counts and reports that it is refused since another socket has its address; gives the errno.
    #[inline(always)]
    pub(crate) fn address_in_use(&self) -> i32 {
        count(Counter::AddressInUse);
        self.report_refused();
        errno::EADDRINUSE
    }

    /// Counts and reports that it is refused as was decided; gives the errno.
    #[inline(always)]
    pub(crate) fn blocked(&self) -> i32 {
        self.report_refused();
        let (counter, error) = match self.request.decision.reason {
            Reason::Loop => (Counter::Loops, errno::ELOOP),
            Reason::ServiceUnavailable => (Counter::ServiceUnavailable, errno::ECONNREFUSED),
            Reason::NoFilter | Reason::Filter => (Counter::BlockedByFilter, errno::EPERM),
        };
        count(counter);
        error
    }

    #[inline(always)]
    fn report(&self, kind: EventKind, handle: u64, record: Option<&Record>) {
        let record = record.map_or(ptr::null(), ptr::from_ref);
        carnet_report(self.ctx, self.request, kind as u32, handle, record);
    }

    /// A device that a socket is bound to keeps it from reaching a service on loopback; the service
    /// reaches the destination with a socket of its own. Gives `false` if it stays bound: the kernel asks
    /// the process for `CAP_NET_RAW`, whoever does it.
    #[inline(always)]
    pub(crate) fn unbind_device(&self) -> bool {
        self.socket.bound_device() == 0 || bind_to_device(self.ctx.cast(), 0)
    }

    /// Counts and reports that it is refused since its socket is bound to a device; gives the errno.
    #[inline(always)]
    pub(crate) fn bound_to_device(&self) -> i32 {
        count(Counter::BoundToDevice);
        self.report_refused();
        errno::EHOSTUNREACH
    }
}

/// Binds a socket to the device of this index, or to none with 0; `ctx` is the context of the hook, which
/// tells which socket. Gives whether the kernel has done so.
#[inline(always)]
pub(crate) fn bind_to_device(ctx: *mut c_void, mut index: i32) -> bool {
    const SOL_SOCKET: i32 = 1;
    const SO_BINDTOIFINDEX: i32 = 62;
    // SAFETY: by the caller, the helper takes this context; it reads 4 bytes.
    let failed = unsafe {
        bpf_setsockopt(
            ctx,
            SOL_SOCKET,
            SO_BINDTOIFINDEX,
            (&raw mut index).cast(),
            size_of::<i32>() as i32,
        )
    };
    failed == 0
}

/// Begins the record of a new flow, which is all zero.
#[inline(always)]
pub(crate) fn begin_record(record: &mut Record, destination: &Endpoint) {
    record.magic = MAGIC;
    record.version = VERSION;
    number(record);
    copy(&mut record.destination, destination);
}

/// Makes the record that of a new flow of this instance.
#[inline(always)]
pub(crate) fn number(record: &mut Record) {
    if let Some(config) = CONFIG.get_ptr_mut(0) {
        // SAFETY: the map's only element lives as long as the map; the counter is shared with other
        // CPUs and touched atomically alone, the epoch is written before any hook runs.
        unsafe {
            record.epoch = (*config).epoch;
            record.flow = (fetch_add(&raw mut (*config).flows, 1) as u64).wrapping_add(1);
        }
    }
}

/// Reports an event about what was decided. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_report(
    ctx: *mut bpf_sock_addr,
    request: *const Request,
    kind: u32,
    handle: u64,
    record: *const Record,
) -> i32 {
    // SAFETY: the verifier makes callers pass whole values, or null.
    let (Some(request), record) = (unsafe { (request.as_ref(), record.as_ref()) }) else {
        return 0;
    };
    event_of_caller(kind, |event| {
        event.reason = request.decision.reason as u32;
        event.handle = handle;
        event.filter = request.decision.filter;
        event.skipped = request.decision.skipped;
        event.generation = request.generation();
        event.requested = request.destination;
        event.protocol = request.protocol;
        event.netns = netns_of(ctx);
        match record {
            Some(record) => {
                event.flow = record.flow;
                event.legs = record.legs;
                event.hops = record.hop_count;
                event.flags = record.flags;
            }
            None => event.legs = request.decision.legs,
        }
    });
    0
}

/// Gives the leg the context of the filter that redirects it, if that has one. Until then the place is
/// scratch.
#[inline(always)]
pub(crate) fn set_context(leg: &mut LegState) {
    leg.context_length = 0;
    // SAFETY: the value is copied out at once; contexts are never changed in place.
    if let Some(context) = unsafe { CONTEXTS.get(&leg.filter) } {
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

//! `cgroup/connect4` and `cgroup/connect6` (since Linux 4.17): redirect, pass or refuse.
//!
//! **What it does.** Lets pass what concerns nobody. Of the rest it clears what an earlier connect
//! left on the socket, classifies the connection with the record that was set on it, and, where a
//! service gets it, rewrites the destination to its live listener and notes the leg on the socket.
//! Of UDP it does the same for sockets that are connected; what they send then passes no hook. And it
//! recognises the socket by which a service asks about a UDP flow: one that is connected to the
//! flow's client.
//!
//! **Why this hook.** It runs before routing and before the source address is chosen, in the
//! caller's context, for every connect however it is made (plain, non-blocking, fast open,
//! io_uring, Multipath TCP), and it can refuse with an errno of its choice. IPv4-mapped
//! destinations of IPv6 sockets come to connect6 only.
//!
//! **Returns** 1: go on, with the destination as it then is. 0: the connect fails with the errno
//! that was set; the destination is nowhere then, for programs that run later may clear that.
//!
//! **Fails closed**: where kernel memory is exhausted a connection that should be redirected is
//! refused. **WFP**: the `ALE_CONNECT_REDIRECT` layers.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use carnet_core::{
    address::Endpoint,
    flow::{LEG_ADOPTED, LEG_ONWARD, LEG_REDIRECTED, LEG_STARTING, LegState, SAME_NAMESPACE},
    record::Record,
};

use crate::{
    accepted::NO_TICKET,
    adopt::adopt_if_unmodified,
    attempt::{Attempt, PASS, refuse, set_context},
    client::carnet_client,
    connecting::{place_for, with_record},
    ctx::{load32, load64},
    decide::{Request, concerns_somebody, destination_concerns_somebody},
    end::{abandon, datagrams_end, guard_begins},
    enforce::{carnet_refused, carnet_unsettled, forget_earlier},
    listener::Found,
    maps::{DELIVERED, LEGS},
    process::carnet_identify,
    report::count_passed,
    sock_addr::{address_v4, address_v6, set_address_v4, set_address_v6},
    socket::{ESTABLISHED, Socket, TCP, copy_record, is_datagram},
    source::look_at,
};

#[cgroup_sock_addr(connect4)]
pub fn carnet_connect4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let destination = address_v4(ctx);
    connect(ctx, destination, |target| {
        set_address_v4(ctx, target);
    })
}

#[cgroup_sock_addr(connect6)]
pub fn carnet_connect6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let destination = address_v6(ctx);
    connect(ctx, destination, |target| {
        set_address_v6(ctx, target);
    })
}

/// Both hooks. `rewrite` sends the connection elsewhere.
#[inline(always)]
fn connect(ctx: *mut bpf_sock_addr, mut destination: Endpoint, rewrite: impl Fn(&Endpoint)) -> i32 {
    let protocol = load32!(ctx, 36);
    if protocol != TCP && !is_datagram(protocol) {
        return PASS;
    }
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return PASS;
    };
    if destination.is_unspecified() {
        destination = destination.meant(&socket.local());
    }
    if protocol == TCP {
        forget_earlier(ctx);
        // The common case.
        if !destination_concerns_somebody(TCP, &destination) {
            count_passed();
            return PASS;
        }
        take_back_record(ctx, socket);
    } else {
        let mut asked = destination;
        if carnet_client(ctx, &raw mut asked) != 0 {
            rewrite(&asked);
            return PASS;
        }
        let error = look_at(ctx, &socket.local());
        if error != 0 {
            rewrite(&destination.nowhere());
            return refuse(error);
        }
        take_back_record_of_datagrams(socket);
        if !destination_concerns_somebody(protocol, &destination) {
            count_passed();
            return PASS;
        }
    }
    let error = adopt_if_unmodified(ctx, socket, &destination);
    if error != 0 {
        rewrite(&destination.nowhere());
        return refuse(error);
    }
    let record = record_on(ctx, socket);
    if record.is_none() && !concerns_somebody(ctx, protocol, &destination) {
        count_passed();
        return PASS;
    }
    let mut request = Request::new(protocol, destination);
    request.settle(ctx, record);
    if request.passes_untouched(record) {
        return PASS;
    }
    let error = carry_out(&Attempt { ctx, socket, record, request: &request });
    if error != 0 {
        carnet_refused(ctx, &raw const request);
        rewrite(&request.destination.nowhere());
        return refuse(error);
    }
    if request.decision.redirects() {
        // Here the stack has room for that.
        if is_datagram(protocol)
            && let Some(leg) = socket.get(&LEGS)
        {
            guard_begins(leg, NO_TICKET);
        }
        rewrite(&request.target);
    }
    PASS
}

/// What an earlier connect added to the record that is set on the socket, or on the Multipath TCP
/// connection that it belongs to, is taken back, and what else it left there removed: the kernel keeps it
/// over `connect(AF_UNSPEC)`.
#[inline(always)]
fn take_back_record(ctx: *mut bpf_sock_addr, socket: Socket) {
    if let Some(leg) = with_record(ctx, socket) {
        leg.record.take_back(leg.set_hops);
    }
    if socket.is_blank() {
        return;
    }
    let mut holder = socket;
    if let Some(connection) = socket.multipath() {
        socket.delete(&LEGS);
        holder = connection;
    }
    take_back(holder);
}

/// The same of a UDP socket, which may still be connected: its earlier leg ends now.
#[inline(always)]
fn take_back_record_of_datagrams(socket: Socket) {
    if let Some(leg) = socket.get(&LEGS) {
        datagrams_end(leg);
    }
    socket.delete(&DELIVERED);
    take_back(socket);
}

#[inline(always)]
fn take_back(holder: Socket) {
    let Some(leg) = holder.get(&LEGS) else {
        return;
    };
    abandon(leg);
    if leg.set_hops == 0 || leg.flags & LEG_ADOPTED != 0 {
        holder.delete(&LEGS);
    } else {
        leg.record.take_back(leg.set_hops);
    }
}

/// The record with which the socket connects: its own, or that of the Multipath TCP connection that it
/// belongs to.
#[inline(always)]
pub(crate) fn record_on(ctx: *mut bpf_sock_addr, socket: Socket) -> Option<&'static Record> {
    let on_socket = match socket.get(&LEGS) {
        Some(leg) => Some(leg),
        None => socket.multipath().and_then(|connection| connection.get(&LEGS)),
    };
    match on_socket {
        Some(leg) if leg.set_hops != 0 => Some(&leg.record),
        _ => with_record(ctx, socket).map(|leg| &leg.record),
    }
}

/// Does what was decided: gives 0, or the errno with which the connect is refused.
#[inline(never)]
fn carry_out(attempt: &Attempt<'_>) -> i32 {
    let request = attempt.request;
    attempt.report_forgetful();
    if request.decision.redirects() {
        if is_datagram(request.protocol) && is_taken(attempt) {
            return attempt.address_in_use();
        }
        if !attempt.unbind_device() {
            return attempt.bound_to_device();
        }
        if redirect(attempt) {
            return 0;
        }
        return attempt.out_of_memory();
    }
    if request.decision.blocks() {
        return attempt.blocked();
    }
    if let Some(record) = attempt.record {
        pass_onward(attempt, record);
    }
    0
}

/// Notes the leg on the socket. Gives `false` when out of memory or when the record is full.
#[inline(always)]
fn redirect(attempt: &Attempt<'_>) -> bool {
    let request = attempt.request;
    let Some(leg) = begin(attempt, LEG_REDIRECTED, &request.target) else {
        return false;
    };
    let first = attempt.record.is_none();
    let noted = attempt.redirect(leg, first);
    if first {
        carnet_identify(leg);
    }
    set_context(leg);
    if !noted || !attempt.socket.put_on_multipath(&LEGS, leg) {
        if leg.kind & LEG_STARTING != 0 {
            carnet_unsettled(-1);
        }
        leg.kind = 0;
        return false;
    }
    attempt.report_redirected(&leg.record);
    true
}

/// Notes the last leg of a flow, which reaches the destination. Without memory for the note the
/// connection passes all the same: only the listing misses it.
#[inline(always)]
fn pass_onward(attempt: &Attempt<'_>, record: &Record) {
    if let Some(leg) = begin(attempt, LEG_ONWARD, &attempt.request.destination) {
        attempt.socket.put_on_multipath(&LEGS, leg);
    }
    attempt.report_onward(record);
}

/// Begins the leg of a kind that leads to `target`.
#[inline(always)]
pub(crate) fn begin(
    attempt: &Attempt<'_>,
    kind: u32,
    target: &Endpoint,
) -> Option<&'static mut LegState> {
    let is_tcp = attempt.request.protocol == TCP;
    let leg = place_for(attempt.ctx, attempt.socket, is_tcp)?;
    if let Some(record) = attempt.record
        && leg.set_hops == 0
    {
        // The record is that of the Multipath TCP connection.
        copy_record(leg, record);
        leg.set_hops = record.hop_count;
    }
    // A UDP connect is done when it is done; of TCP the SYN is the sign.
    let mut starting = 0;
    if !is_datagram(attempt.request.protocol) {
        starting = LEG_STARTING;
        carnet_unsettled(1);
    }
    attempt.begin(leg, kind | starting, target);
    Some(leg)
}

/// Whether another UDP socket is already connected from the address of this one to the same listener
/// of the service. They share a port on purpose (`SO_REUSEADDR`, `SO_REUSEPORT`) and would be told
/// apart by their destinations, which the redirect makes the same.
#[inline(always)]
fn is_taken(attempt: &Attempt<'_>) -> bool {
    let mut own = attempt.socket.local();
    if own.port == 0 {
        return false;
    }
    let target = &attempt.request.target;
    if attempt.socket.state() == ESTABLISHED && attempt.socket.remote().is_same(target) {
        // It was connected to the same listener before: it is this socket that would be found.
        return false;
    }
    if own.is_unspecified() {
        own.address = target.address;
    }
    Found::look_up(attempt.ctx, attempt.request.protocol, SAME_NAMESPACE, Some(target), &own)
        .is_some_and(|found| found.socket.state() == ESTABLISHED)
}

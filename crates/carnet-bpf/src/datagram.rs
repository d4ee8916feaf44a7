//! `cgroup/sendmsg4` and `cgroup/sendmsg6` (since Linux 4.18): redirect, pass or refuse the datagrams
//! that are sent to an address.
//!
//! **What it does.** Recognises a flow by its socket and its destination (contract U7). The first
//! datagram of a flow is classified as a connect would be; the following ones go the same way until
//! the flow has been idle for too long, whatever the policy says by then. One that goes to a service
//! gets a source token: an address from which the service sees this flow alone. An answer of a
//! service to a source token goes to that flow's client.
//!
//! **Why this hook.** It runs for every datagram of a UDP socket that is not connected, or that is
//! sent elsewhere than where its socket is connected, however it is sent (sendto, sendmsg, sendmmsg,
//! io_uring), before routing, and it can change both addresses. Datagrams of IPv6 sockets to mapped
//! addresses come to sendmsg4.
//!
//! **Returns** 1: go on. 0: the call fails with the errno that was set; the destination's port is 0 then,
//! to which the kernel sends nothing should a program that runs later clear that.
//!
//! **Fails closed**: where kernel memory is exhausted a datagram that should be redirected is refused.
//! **WFP**: the `ALE_CONNECT_REDIRECT` layers, at the first datagram of a flow.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, bpf_sock_addr},
    helpers::generated::{bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_map_update_elem},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use carnet_core::{
    abi::errno,
    address::Endpoint,
    flow::{
        Correspondent, CorrespondentKey, LEG_REDIRECTED, PeerKey, SAME_NAMESPACE, is_source_token,
        source_token,
    },
    record::Record,
};

use crate::{
    accepted::NO_TICKET,
    adopt::adopt_if_unmodified,
    attempt::{Attempt, PASS, refuse, set_context},
    client::{carnet_answers, held},
    ctx::{fetch_add, load32, load64, opaque, store32},
    decide::{Request, concerns_somebody, destination_concerns_somebody, netns_of},
    end::guard_begins,
    idle,
    listener::{LOOPBACK_V4, ONE, registered_in},
    maps::{
        BLANK_LEG, CORRESPONDENTS, DATAGRAM_LEGS, LEGS, PASSING, SOCKET_TOKENS, TOKENS, TimedLeg,
    },
    process::{carnet_identify, carnet_service},
    report::{count_passed, now},
    sock_addr::{address_v4, address_v6, set_address_v4, set_address_v6},
    socket::{ESTABLISHED, Socket, copy_record, is_datagram},
    source::look_at,
};

#[cgroup_sock_addr(sendmsg4)]
pub fn carnet_sendmsg4(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let error = look_at(ctx, &Endpoint::v4(load32!(ctx, 40), 0));
    if error != 0 {
        store32!(ctx, 24, NO_PORT);
        return refuse(error);
    }
    let destination = address_v4(ctx);
    send(ctx, destination, |source, to| {
        if let Some(source) = source {
            store32!(ctx, 40, source[3]);
        }
        set_address_v4(ctx, to);
    })
}

#[cgroup_sock_addr(sendmsg6)]
pub fn carnet_sendmsg6(ctx: SockAddrContext) -> i32 {
    let ctx = ctx.sock_addr;
    let source = [load32!(ctx, 44), load32!(ctx, 48), load32!(ctx, 52), load32!(ctx, 56)];
    let error = look_at(ctx, &Endpoint::v6(source, 0));
    if error != 0 {
        store32!(ctx, 24, NO_PORT);
        return refuse(error);
    }
    let destination = address_v6(ctx);
    send(ctx, destination, |source, to| {
        if let Some(source) = source {
            store32!(ctx, 44, source[0]);
            store32!(ctx, 48, source[1]);
            store32!(ctx, 52, source[2]);
            store32!(ctx, 56, source[3]);
        }
        set_address_v6(ctx, to);
    })
}

/// The port of [`Endpoint::nowhere`].
const NO_PORT: u32 = 0;

/// Both hooks. `rewrite` changes the destination, and the source address if it is to be another one.
#[inline(always)]
fn send(
    ctx: *mut bpf_sock_addr,
    destination: Endpoint,
    rewrite: impl Fn(Option<&[u32; 4]>, &Endpoint),
) -> i32 {
    let protocol = load32!(ctx, 36);
    if !is_datagram(protocol) {
        return PASS;
    }
    let Some(socket) = Socket::new(load64!(ctx, 64) as *mut _) else {
        return PASS;
    };
    // There is no room for the destination twice.
    let mut request = Request::new(protocol, destination);
    request.destination.family = socket.family();
    if request.destination.is_unspecified() {
        mean(socket, &mut request.destination);
    }
    if socket.state() == ESTABLISHED {
        if is_connected_to(socket, &request.destination) {
            return PASS;
        }
        if let Some(leg) = socket.get(&LEGS)
            && leg.kind != 0
            && leg.requested.is_same(&request.destination)
        {
            rewrite(None, &leg.target);
            return PASS;
        }
    }
    if is_source_token(&request.destination) {
        let service = carnet_service();
        if let Some(timed) = held(ctx, &request.destination.address)
            && timed.held.leg.handle == service
            && timed.held.leg.kind != 0
        {
            timed.held.seen_ns = now();
            rewrite(Some(&request.destination.address), &timed.held.client);
            return PASS;
        }
        // An answer to a flow that has ended. It is no flow of the service's: taken for one it would come
        // back to the service, for ever.
        if service != 0 {
            rewrite(None, &request.destination.nowhere());
            return refuse(errno::ECONNREFUSED);
        }
    }
    if let Some(known) = known(ctx, &request.destination) {
        if known.passes() {
            return PASS;
        }
        if let Some(timed) = held(ctx, &known.token)
            && timed.held.leg.cookie == cookie_of(ctx)
        {
            let leg = &timed.held.leg;
            // The service may be gone, which nothing tells a socket that is not connected.
            if registered_in(ctx, protocol, SAME_NAMESPACE, &leg.target, leg.handle) != 0 {
                timed.held.seen_ns = known.seen_ns;
                rewrite(Some(&known.token), &leg.target);
                return PASS;
            }
            idle::end(ctx, &known.token, timed);
        }
    }
    let may_concern = destination_concerns_somebody(protocol, &request.destination);
    if may_concern {
        let error = adopt_if_unmodified(ctx, socket, &request.destination);
        if error != 0 {
            rewrite(None, &request.destination.nowhere());
            return refuse(error);
        }
    }
    let record = record_on(socket);
    if !may_concern
        || record.is_none() && !concerns_somebody(ctx, protocol, &request.destination)
        || carnet_answers(ctx, &raw const request.destination) != 0
    {
        count_passed();
        remember(ctx, &request.destination, &[0; 4]);
        return PASS;
    }
    request.settle(ctx, record);
    if request.passes_untouched(record) {
        remember(ctx, &request.destination, &[0; 4]);
        return PASS;
    }
    let mut token = [opaque(0) as u32; 4];
    let attempt = Attempt { ctx, socket, record, request: &request };
    let mut error = carry_out(&attempt, &mut token);
    if error == errno::ENOMEM && idle::sweep() {
        error = carry_out(&attempt, &mut token);
    }
    if error != 0 {
        if error == errno::ENOMEM {
            give_up(&attempt);
        }
        rewrite(None, &request.destination.nowhere());
        return refuse(error);
    }
    remember(ctx, &request.destination, &token);
    if request.decision.redirects() {
        // Nobody has seen the flow yet. Here the stack has room for that.
        if let Some(timed) = held(ctx, &token) {
            if record.is_none() {
                carnet_identify(&raw mut timed.held.leg);
            }
            set_context(&mut timed.held.leg);
            guard_begins(&mut timed.held.leg, NO_TICKET);
        }
        rewrite(Some(&token), &request.target);
    }
    PASS
}

/// Whether this is where the socket's connection really goes, about which connect has decided. The
/// kernel comes here with every datagram of an IPv6 socket that is connected to a mapped address.
#[inline(never)]
fn is_connected_to(socket: Socket, destination: &Endpoint) -> bool {
    socket.remote().is_same(destination)
}

/// Puts the address that an unspecified destination stands for in its place.
// Not inlined: the stack of the hook is all but full.
#[inline(never)]
fn mean(socket: Socket, destination: &mut Endpoint) {
    *destination = destination.meant(&socket.local());
}

/// The record that is set on the socket, which its connection, if it has one, may have lengthened.
#[inline(always)]
fn record_on(socket: Socket) -> Option<&'static Record> {
    let leg = socket.get(&LEGS)?;
    if leg.set_hops == 0 { None } else { Some(&leg.record) }
}

/// What was decided for the flow of this socket and its correspondent, if it is not idle; it has a
/// datagram now.
// Not inlined, as `remember`: the stack of the hook is all but full.
#[inline(never)]
pub(crate) fn known(
    ctx: *mut bpf_sock_addr,
    correspondent: &Endpoint,
) -> Option<&'static Correspondent> {
    let key = key_of(ctx, correspondent);
    let now = now();
    // In this order: what has passed since a service had the flow is the newer decision.
    fresh(PASSING.get_ptr_mut(&key), now).or_else(|| fresh(CORRESPONDENTS.get_ptr_mut(&key), now))
}

/// A decision about a flow that is not idle; it has a datagram now.
#[inline(always)]
fn fresh(known: Option<*mut Correspondent>, now: u64) -> Option<&'static Correspondent> {
    // SAFETY: the entry stays allocated until the program ends; whoever changes it meanwhile writes
    // another whole decision about the same flow, or another time, of which any value will do.
    let known = unsafe { &mut *known? };
    if now.wrapping_sub(known.seen_ns) > idle::limit() {
        return None;
    }
    known.seen_ns = now;
    Some(known)
}

/// Remembers what was decided for the flow of this socket and its correspondent.
#[inline(never)]
pub(crate) fn remember(ctx: *mut bpf_sock_addr, correspondent: &Endpoint, token: &[u32; 4]) {
    let known = Correspondent { seen_ns: now(), token: *token };
    let key = key_of(ctx, correspondent);
    // Without memory for it the next datagram is decided anew.
    let _full = if known.passes() {
        PASSING.insert(&key, &known, BPF_ANY.into())
    } else {
        CORRESPONDENTS.insert(&key, &known, BPF_ANY.into())
    };
}

#[inline(always)]
fn key_of(ctx: *mut bpf_sock_addr, correspondent: &Endpoint) -> CorrespondentKey {
    CorrespondentKey {
        cookie: cookie_of(ctx),
        address: correspondent.address,
        port: correspondent.port.into(),
        zero: 0,
    }
}

#[inline(always)]
fn cookie_of(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: the helper takes this context.
    unsafe { bpf_get_socket_cookie(ctx.cast()) }
}

/// Counts and reports that there is no memory for the flow.
#[inline(never)]
fn give_up(attempt: &Attempt<'_>) {
    attempt.out_of_memory();
}

/// Does what was decided: gives 0, or the errno with which the call is refused. A flow that goes to a
/// service gets its `token`; without memory for it nothing is reported yet.
#[inline(never)]
fn carry_out(attempt: &Attempt<'_>, token: &mut [u32; 4]) -> i32 {
    let decision = &attempt.request.decision;
    attempt.report_forgetful();
    if decision.redirects() {
        if !attempt.unbind_device() {
            return attempt.bound_to_device();
        }
        let Some(timed) = begin(attempt, token) else {
            return errno::ENOMEM;
        };
        remember_token(attempt.socket, token);
        attempt.report_redirected(&timed.held.leg.record);
        return 0;
    }
    if decision.blocks() {
        return attempt.blocked();
    }
    if let Some(record) = attempt.record {
        attempt.report_onward(record);
    }
    0
}

/// Makes the flow, under a token that no other has. `None` when out of memory or when the record is
/// full.
#[inline(always)]
fn begin(attempt: &Attempt<'_>, token: &mut [u32; 4]) -> Option<&'static mut TimedLeg> {
    let ipv4 = attempt.request.destination.is_ipv4();
    let mut key = PeerKey { netns: netns_of(attempt.ctx), address: [0; 4], port: 0, zero: 0 };
    let blank = BLANK_LEG.get(0)?;
    let mut failed = 0;
    for _ in 0..DRAWS {
        key.address = source_token(random(), ipv4);
        // SAFETY: key and value are whole and of the map's sizes; the value lies in another map,
        // from which the kernel copies it.
        failed = unsafe {
            bpf_map_update_elem(
                (&raw const DATAGRAM_LEGS).cast_mut().cast(),
                (&raw const key).cast(),
                blank.as_ptr().cast(),
                BPF_NOEXIST.into(),
            )
        };
        if failed == 0 {
            break;
        }
    }
    if failed != 0 {
        return None;
    }
    *token = key.address;
    let timed = held(attempt.ctx, token)?;
    let record_begins = match attempt.record {
        None => true,
        Some(record) => {
            copy_record(&mut timed.held.leg, record);
            let set_hops = attempt.socket.get(&LEGS).map_or(0, |leg| leg.set_hops);
            timed.held.leg.record.take_back(set_hops);
            timed.held.leg.set_hops = set_hops;
            false
        }
    };
    attempt.begin(&mut timed.held.leg, LEG_REDIRECTED, &attempt.request.target);
    let client = &mut timed.held.client;
    *client = attempt.socket.local();
    if client.is_unspecified() {
        client.address = if ipv4 { Endpoint::v4(LOOPBACK_V4, 0).address } else { [0, 0, 0, ONE] };
    }
    timed.held.seen_ns = timed.held.leg.began_ns;
    // Without memory for its timer the flow ends with its socket.
    idle::start(timed, idle::limit());
    if !attempt.redirect(&mut timed.held.leg, record_begins) {
        let _absent = DATAGRAM_LEGS.remove(&key);
        return None;
    }
    Some(timed)
}

/// How often a token is drawn before giving up. With all flows that there can be, one draw in 64 hits
/// another's.
const DRAWS: u32 = 4;

#[inline(always)]
fn random() -> u64 {
    // SAFETY: the helper has no preconditions.
    let half = || u64::from(unsafe { bpf_get_prandom_u32() });
    half() << 32 | half()
}

/// Notes the flow on its socket, with which it will end.
#[inline(always)]
fn remember_token(socket: Socket, token: &[u32; 4]) {
    if let Some(tokens) = socket.get_or_create(&TOKENS) {
        // SAFETY: threads that share the socket touch the number atomically alone.
        let number = unsafe { fetch_add(&raw mut tokens.begun, 1) };
        if let Some(place) = tokens.tokens.get_mut(number as usize % SOCKET_TOKENS) {
            *place = *token;
        }
    }
}

//! What an unmodified service connects without a record is given one, by core's rules.

use aya_ebpf::{bindings::bpf_sock_addr, helpers::generated::bpf_probe_read_kernel};
use carnet_core::{
    abi::errno,
    address::Endpoint,
    adoption::{Candidates, adopt},
    event::Counter,
    flow::{HeldKey, LEG_ADOPTED, LegState},
    record::Record,
    table::Tables as _,
};

use crate::{
    accepted,
    attempt::begin_record,
    bank::Bank,
    connecting::with_record,
    ctx::load32,
    decide::netns_of,
    held,
    listener::copy,
    maps::{BLANK_LEG, LEGS},
    process::{carnet_identify, carnet_service},
    report::{count, now},
    socket::{Socket, copy_record},
};

/// The caller is about to connect the socket to `destination`, or to send there. If it is an unmodified
/// service's, and no record is set on the socket, one is put there. Gives 0, or the errno with which the
/// call is to be refused.
// Not inlined: the stack of the hooks is all but full.
#[inline(never)]
pub(crate) fn adopt_if_unmodified(
    ctx: *mut bpf_sock_addr,
    socket: Socket,
    destination: &Endpoint,
) -> i32 {
    if Bank::in_force().header().is_none_or(|header| header.unmodified == 0) {
        return 0;
    }
    if socket.get(&LEGS).is_some_and(|leg| !leg.may_adopt()) {
        return 0;
    }
    let service = carnet_service();
    if service == 0 || !is_unmodified(service) || with_record(ctx, socket).is_some() {
        return 0;
    }
    let Some(leg) = socket.get_or_create(&LEGS) else {
        return out_of_memory();
    };
    leg.flags = LEG_ADOPTED;
    leg.handle = service;
    leg.netns = netns_of(ctx);
    leg.home = leg.netns;
    leg.protocol = load32!(ctx, 36);
    copy(&mut leg.requested, destination);
    let known = carnet_likeliest(leg);
    if known == 0 {
        begin(leg);
    }
    let complete = carnet_adopt(leg, known);
    // It is the onward leg's from here on.
    leg.handle = 0;
    if complete == 0 {
        return out_of_memory();
    }
    leg.set_hops = leg.record.hop_count;
    count(Counter::Adopted);
    if leg.record.is_a_guess() {
        count(Counter::AdoptedByGuess);
    }
    0
}

#[inline(always)]
fn out_of_memory() -> i32 {
    count(Counter::OutOfMemory);
    count(Counter::Blocked);
    errno::ENOMEM
}

#[inline(always)]
fn is_unmodified(service: u64) -> bool {
    let bank = Bank::in_force();
    bank.service(bank.slot_of(service)).is_some_and(|row| row.unmodified != 0)
}

/// Copies the record of the flow of the leg's service, for the leg's destination, that is the likeliest;
/// gives 0 if there is none. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_likeliest(leg: *mut LegState) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(leg) = (unsafe { leg.as_mut() }) else {
        return 0;
    };
    let Some(held) = held::find(&leg.held_key()) else {
        return 0;
    };
    let ticket = held.ticket;
    match accepted::find(ticket) {
        Some(likeliest)
            if likeliest.leg.is_candidate(likeliest.is_there, leg.handle, &leg.requested) =>
        {
            copy_record(leg, &likeliest.leg.record);
            accepted::is_kept(ticket).into()
        }
        _ => 0,
    }
}

/// Begins a record of the calling process's.
#[inline(never)]
fn begin(leg: &mut LegState) {
    if let Some(blank) = BLANK_LEG.get(0) {
        // SAFETY: there are more bytes than that in the map's value.
        unsafe {
            bpf_probe_read_kernel(
                (&raw mut leg.record).cast(),
                size_of::<Record>() as u32,
                blank.as_ptr().cast(),
            );
        }
    }
    begin_record(&mut leg.record, &leg.requested);
    leg.began_ns = now();
    leg.record.issued_ns = leg.began_ns;
    carnet_identify(leg);
}

/// Makes the record that of the leg; `known` is what [`carnet_likeliest`] gave. Gives 0 if there is no room
/// for all hops. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_adopt(leg: *mut LegState, known: i32) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(leg) = (unsafe { leg.as_mut() }) else {
        return 0;
    };
    let mut key = leg.held_key();
    let for_destination = held::find(&key);
    key = HeldKey::of_all(leg.handle);
    let all = held::find(&key);
    let candidates = Candidates {
        for_destination: for_destination.as_deref(),
        all: all.as_deref(),
        known: known != 0,
    };
    i32::from(adopt(&Bank::in_force(), candidates, leg.handle, &mut leg.record))
}

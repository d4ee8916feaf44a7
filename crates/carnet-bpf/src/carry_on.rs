//! Carrying a flow on by its ticket: the record goes from the accepted connection's leg to the socket
//! that is to be connected without a way through user mode, where it could be altered. So its MAC is
//! neither computed nor verified.

use aya_ebpf::{bindings::bpf_sockopt, helpers::generated::bpf_probe_read_kernel};
use carnet_core::{
    abi::errno, access::Caller, event::Counter, flow::LegState, record::RecordError,
};

use crate::{
    accepted::{Delivered, cookie_of, find, is_kept},
    connecting::{give_back, place_for_record},
    ctx::{load32, load64},
    end::abandon,
    maps::LEGS,
    report::{count, now},
    setsockopt::refused,
    socket::{CLOSE, Socket, TCP, copy_record},
};

/// Puts the record of the accepted connection that the caller names on a socket that is to be connected.
#[inline(always)]
pub(crate) fn carry_on(ctx: *mut bpf_sockopt, socket: Socket, caller: &Caller) -> Result<(), i32> {
    if !caller.may_act() {
        return Err(refused(RecordError::NotDelivered, caller));
    }
    if socket.state() != CLOSE || load32!(ctx, 32) != size_of::<u64>() as u32 {
        return Err(errno::EINVAL);
    }
    let mut ticket = 0_u64;
    let buffer = load64!(ctx, 8) as *const core::ffi::c_void;
    // SAFETY: reads 8 bytes into this program's stack; the helper copes with any source.
    unsafe {
        bpf_probe_read_kernel((&raw mut ticket).cast(), size_of::<u64>() as u32, buffer);
    }
    let Some(Delivered { leg: delivered, is_there, .. }) = find(ticket) else {
        return Err(errno::EINVAL);
    };
    if let Err(error) = delivered.carry_on(is_there, caller, now()) {
        return Err(refused(error, caller));
    }
    let cookie = cookie_of(ctx);
    // What is set on the socket itself would go before.
    if socket.protocol() == TCP && cookie != 0 && !is_kept(cookie) && socket.get(&LEGS).is_none() {
        if let Some(leg) = place_for_record(cookie) {
            let result = put(leg, delivered, ticket);
            if result.is_err() {
                give_back(cookie);
            }
            return result;
        }
    }
    let Some(leg) = socket.get_or_create(&LEGS) else {
        return Err(errno::ENOMEM);
    };
    // Left by a connect that failed before anything was sent.
    abandon(leg);
    put(leg, delivered, ticket)
}

/// Copies the record of the accepted socket with this ticket. After an error there is none.
#[inline(always)]
fn put(leg: &mut LegState, delivered: &LegState, ticket: u64) -> Result<(), i32> {
    copy_record(leg, &delivered.record);
    // The accepted socket may have been closed meanwhile, and another's leg be in the place of its own.
    if !is_kept(ticket) {
        leg.set_hops = 0;
        return Err(errno::EINVAL);
    }
    leg.set_record();
    count(Counter::RecordsSet);
    Ok(())
}

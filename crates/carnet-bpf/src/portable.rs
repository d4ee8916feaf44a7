//! Records that go to other hosts, and those that come from them: core translates, in a place of the
//! socket's own.

use core::ptr;

use aya_ebpf::{bindings::bpf_sockopt, helpers::generated::bpf_probe_read_kernel};
use carnet_core::{
    abi::errno,
    access::Caller,
    event::Counter,
    flow::LegState,
    record::{MAX_RECORD, Record, RecordError},
    table::Tables as _,
};

use crate::{
    attempt::number,
    bank::Bank,
    ctx::load32,
    end::abandon,
    getsockopt::copy_out,
    maps::{LEGS, SECOND_RECORDS},
    process,
    report::{count, now},
    setsockopt::{copy_in, refused},
    socket::{CLOSE, Socket, copy_record},
};

/// Gives the caller the record of an accepted connection for another host: the number of bytes, or an
/// errno.
#[inline(always)]
pub(crate) fn export(ctx: *mut bpf_sockopt, socket: Socket, leg: &LegState) -> Result<u32, i32> {
    if !socket.is_tcp() {
        return Err(errno::EINVAL);
    }
    let caller = process::caller();
    if !caller.may_set(leg.handle) {
        count(Counter::AccessDenied);
        return Err(refused(RecordError::NotDelivered, &caller));
    }
    let Some(record) = socket.get_or_create(&SECOND_RECORDS) else {
        return Err(errno::ENOMEM);
    };
    // SAFETY: both are whole records in map values.
    unsafe {
        bpf_probe_read_kernel(
            ptr::from_mut(record).cast(),
            size_of::<Record>() as u32,
            (&raw const leg.record).cast(),
        );
    }
    carnet_export(record);
    let length = u32::from(record.length);
    let result = copy_out::<{ MAX_RECORD / 8 }>(ctx, ptr::from_ref(record).cast(), length);
    socket.delete(&SECOND_RECORDS);
    if result.is_ok() {
        count(Counter::RecordsExported);
    }
    result
}

/// Keeps a record that is made of another host's on a socket that is to be connected. Nothing instead of one
/// asks whether the caller may.
#[inline(always)]
pub(crate) fn import(ctx: *mut bpf_sockopt, socket: Socket, caller: &Caller) -> Result<(), i32> {
    let bank = Bank::in_force();
    let service = bank.service(bank.slot_of(caller.service));
    if !caller.may_import(service.is_some_and(|service| service.gateway != 0)) {
        return Err(refused(RecordError::NotDelivered, caller));
    }
    if !socket.is_tcp() || socket.state() != CLOSE {
        return Err(errno::EINVAL);
    }
    let given = load32!(ctx, 32);
    if given == 0 {
        return Ok(());
    }
    let Some(record) = socket.get_or_create(&SECOND_RECORDS) else {
        return Err(errno::ENOMEM);
    };
    let result = receive(ctx, socket, record, given, caller);
    socket.delete(&SECOND_RECORDS);
    result
}

/// Takes the caller's record to a place, makes one of this host of it there, and keeps that.
#[inline(always)]
fn receive(
    ctx: *mut bpf_sockopt,
    socket: Socket,
    record: &mut Record,
    given: u32,
    caller: &Caller,
) -> Result<(), i32> {
    if given as usize > MAX_RECORD {
        return Err(refused(RecordError::Malformed, caller));
    }
    let given = copy_in(ctx, record, given)?;
    match carnet_import(record, given, caller.service) {
        0 => {}
        ENDLESS => return Err(refused(RecordError::Endless, caller)),
        _ => return Err(refused(RecordError::Malformed, caller)),
    }
    number(record);
    record.issued_ns = now();
    let Some(leg) = socket.get_or_create(&LEGS) else {
        return Err(errno::ENOMEM);
    };
    // Left by a connect that failed before anything was sent.
    abandon(leg);
    copy_record(leg, record);
    leg.set_record();
    count(Counter::RecordsSet);
    count(Counter::RecordsImported);
    Ok(())
}

const ENDLESS: u32 = RecordError::Endless as u32;

/// Makes a record portable. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_export(record: *mut Record) -> u32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    if let Some(record) = unsafe { record.as_mut() } {
        record.export(&Bank::in_force());
    }
    0
}

/// Makes a portable record one of this host; gives the number of a [`RecordError`], or 0. A global function,
/// see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn carnet_import(record: *mut Record, given: u32, own: u64) -> u32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(record) = (unsafe { record.as_mut() }) else {
        return RecordError::Malformed as u32;
    };
    record.import(&Bank::in_force(), given as usize, own).map_or_else(|error| error as u32, |()| 0)
}

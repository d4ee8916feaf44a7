//! `cgroup/setsockopt` (since Linux 5.3), on the services' cgroups: set a redirect record, register
//! a listener.
//!
//! **What it does.** Verifies a record and keeps it on the socket for the connect hook; or notes a
//! listening socket as a service's. Each only for a process of the service, or a privileged one.
//!
//! **Returns** 1: the kernel goes on (with an option that is not ours) or the option was taken (its
//! length is set to -1, so the kernel does not see it). Errors go through the return value of the
//! system call, as `carnet_core::abi` lists them, with 0.
//!
//! **WFP**: `SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS` (contract S1..S58).

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sockopt,
    helpers::generated::{bpf_get_netns_cookie, bpf_probe_read_kernel, bpf_set_retval},
    macros::cgroup_sockopt,
    programs::SockoptContext,
};
use carnet_core::{
    abi::{self, errno},
    access::Caller,
    event::{Counter, EventKind},
    flow::Registration,
    record::{MAX_HOPS, MAX_RECORD, Record, RecordError},
};

use crate::{
    carry_on::carry_on,
    ctx::{load32, load64, opaque, store32},
    end::abandon,
    mac::verify,
    maps::{LEGS, SECOND_RECORDS},
    portable::import,
    process, registration,
    report::{count, event_of_caller},
    socket::{CLOSE, LISTEN, Socket, TCP, copy_record},
};

#[cgroup_sockopt(setsockopt)]
pub fn carnet_setsockopt(ctx: SockoptContext) -> i32 {
    let ctx = ctx.sockopt;
    if load32!(ctx, 24) as i32 != abi::LEVEL {
        return 1;
    }
    // A hook of a cgroup below has taken it. That happens for moments, while a service moves from
    // one cgroup to another.
    if load32!(ctx, 32) == u32::MAX {
        return 1;
    }
    let Some(socket) = Socket::new(load64!(ctx, 0) as *mut _) else {
        return 1;
    };
    match take(ctx, socket, load32!(ctx, 28) as i32) {
        Ok(()) => {
            store32!(ctx, 32, u32::MAX);
            1
        }
        Err(error) => {
            if error == errno::EACCES {
                count(Counter::AccessDenied);
            }
            // SAFETY: the helper has no preconditions.
            unsafe { bpf_set_retval(-error) };
            0
        }
    }
}

#[inline(always)]
fn take(ctx: *mut bpf_sockopt, socket: Socket, name: i32) -> Result<(), i32> {
    if !socket.is_inet() {
        return Err(errno::EOPNOTSUPP);
    }
    if name != abi::SET_REDIRECT_RECORDS
        && name != abi::REGISTER_LISTENER
        && name != abi::CARRY_ON
        && name != abi::IMPORT_RECORD
    {
        return Err(errno::EOPNOTSUPP);
    }
    if !socket.is_tcp() && !socket.is_datagram() {
        return Err(errno::EINVAL);
    }
    let caller = process::caller();
    if name == abi::SET_REDIRECT_RECORDS {
        set_record(ctx, socket, &caller)
    } else if name == abi::CARRY_ON {
        carry_on(ctx, socket, &caller)
    } else if name == abi::IMPORT_RECORD {
        import(ctx, socket, &caller)
    } else {
        register(ctx, socket, &caller)
    }
}

/// Keeps a record on a socket that is to be connected. Nothing instead of one takes it off a UDP socket
/// again.
#[inline(always)]
fn set_record(ctx: *mut bpf_sockopt, socket: Socket, caller: &Caller) -> Result<(), i32> {
    if !caller.may_act() {
        return Err(refused(RecordError::NotDelivered, caller));
    }
    if socket.state() != CLOSE {
        return Err(errno::EINVAL);
    }
    let given = load32!(ctx, 32);
    if given == 0 && socket.is_datagram() {
        // It may begin other flows without one.
        if let Some(leg) = socket.get(&LEGS) {
            leg.set_hops = 0;
        }
        return Ok(());
    }
    if given == 0 || given as usize > MAX_RECORD {
        return Err(refused(RecordError::Malformed, caller));
    }
    let Some(leg) = socket.get_or_create(&LEGS) else {
        return Err(errno::ENOMEM);
    };
    // Left by a connect that failed before anything was sent, or of UDP by one that was dissolved,
    // which no hook sees.
    abandon(leg);
    if leg.set_hops == 0 {
        let result = receive(ctx, &mut leg.record, given, caller);
        if result.is_err() {
            // Nothing of a refused record stays.
            socket.delete(&LEGS);
        }
        result?;
    } else {
        let Some(second) = socket.get_or_create(&SECOND_RECORDS) else {
            return Err(errno::ENOMEM);
        };
        let result = receive(ctx, second, given, caller);
        if result.is_ok() {
            copy_record(leg, second);
        }
        socket.delete(&SECOND_RECORDS);
        result?;
    }
    leg.set_record();
    count(Counter::RecordsSet);
    Ok(())
}

/// Takes the caller's record to its place, and verifies it there.
#[inline(always)]
fn receive(
    ctx: *mut bpf_sockopt,
    place: &mut Record,
    given: u32,
    caller: &Caller,
) -> Result<(), i32> {
    let given = copy_in(ctx, place, given)?;
    verify(place, given).map_err(|error| refused(error, caller))?;
    // The mask changes nothing, it tells the verifier a bound.
    let newest = opaque(place.hop_count.wrapping_sub(1)) & (MAX_HOPS as u64 - 1);
    let delivered_to = place.hop(newest as u32).map_or(0, |hop| hop.handle);
    if !caller.may_set(delivered_to) {
        return Err(refused(RecordError::NotDelivered, caller));
    }
    Ok(())
}

/// Copies what the caller gives, so many bytes, to a record's place; gives their number again.
#[inline(always)]
pub(crate) fn copy_in(ctx: *mut bpf_sockopt, place: &mut Record, given: u32) -> Result<u32, i32> {
    let buffer = load64!(ctx, 8) as *const core::ffi::c_void;
    let given = opaque(given);
    if given > MAX_RECORD as u64 {
        return Err(errno::EINVAL);
    }
    // SAFETY: `given` is at most the size of the place; the helper copes with any source, and the
    // kernel's copy of the caller's buffer is at least `given` bytes long (it holds a page).
    unsafe {
        bpf_probe_read_kernel(ptr::from_mut(place).cast(), given as u32, buffer);
    }
    Ok(given as u32)
}

/// Counts and reports a refused record; gives its errno.
#[inline(always)]
pub(crate) fn refused(error: RecordError, caller: &Caller) -> i32 {
    event_of_caller(EventKind::RecordRefused as u32, |event| {
        event.reason = error as u32;
        event.handle = caller.service;
    });
    count(match error {
        RecordError::Malformed => Counter::RecordsMalformed,
        RecordError::Forged => Counter::RecordsForged,
        RecordError::Foreign => Counter::RecordsForeign,
        RecordError::Expired => Counter::RecordsExpired,
        // Counted with the other calls that are.
        RecordError::NotDelivered => return errno::EACCES,
        RecordError::Endless => Counter::RecordsEndless,
    });
    if matches!(error, RecordError::Endless) {
        return errno::ELOOP;
    }
    errno::EINVAL
}

/// Notes a socket as one of a service's: a TCP socket that listens, or a UDP socket that is bound to a
/// port and not connected.
#[inline(always)]
fn register(ctx: *mut bpf_sockopt, socket: Socket, caller: &Caller) -> Result<(), i32> {
    if !caller.may_act() {
        return Err(errno::EACCES);
    }
    let local = socket.local();
    let protocol = if socket.is_tcp() { TCP } else { socket.protocol() };
    let listens = if protocol == TCP {
        socket.state() == LISTEN
    } else {
        socket.state() == CLOSE && local.port != 0
    };
    if !listens || socket.bound_device() != 0 {
        return Err(errno::EINVAL);
    }
    let handle = match load32!(ctx, 32) {
        0 => caller.service,
        8 => {
            let mut handle = 0_u64;
            let buffer = load64!(ctx, 8) as *const core::ffi::c_void;
            // SAFETY: reads 8 bytes into this program's stack; the helper copes with any source.
            unsafe {
                bpf_probe_read_kernel((&raw mut handle).cast(), size_of::<u64>() as u32, buffer);
            }
            handle
        }
        _ => return Err(errno::EINVAL),
    };
    if !caller.may_register(handle) {
        return Err(errno::EACCES);
    }
    // SAFETY: the helper takes this context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    registration::register(socket, &local, protocol, Registration { handle, netns })
}

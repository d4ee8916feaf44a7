//! `cgroup/getsockopt` (since Linux 5.3), on the services' cgroups: the questions of the control
//! interface, and `SO_ORIGINAL_DST` for unmodified proxies.
//!
//! **What it does.** Answers from the leg that the socket was accepted with. The kernel has run its
//! own `getsockopt` before and failed, since it does not know the option; an answer clears that
//! error.
//!
//! **Why only there.** The hook taxes every get- and setsockopt of its cgroup, so the rest of the
//! host is spared it.
//!
//! **Returns** 1 always; errors go through the return value of the system call, as
//! `carnet_core::abi` lists them. **WFP**: `SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS` and
//! `..._CONTEXT`.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sockopt, helpers::generated::bpf_set_retval, macros::cgroup_sockopt,
    programs::SockoptContext,
};
use carnet_core::{
    abi::{self, FlowInfo, OnwardsInfo, errno},
    address::{AF_INET, AF_INET6, Endpoint},
    flow::LegState,
    record::{AppIdentity, MAX_RECORD},
};

use crate::{
    accepted::{Delivered, delivered_to},
    ctx::{load32, load64, store32},
    held::asked,
    mac::issue,
    portable::export,
    process,
    report::now,
    socket::{CLOSE, LISTEN, SYN_SENT, Socket},
};

#[cgroup_sockopt(getsockopt)]
pub fn carnet_getsockopt(ctx: SockoptContext) -> i32 {
    let ctx = ctx.sockopt;
    let level = load32!(ctx, 24) as i32;
    let name = load32!(ctx, 28) as i32;
    let Some(socket) = Socket::new(load64!(ctx, 0) as *mut _) else {
        return 1;
    };
    if level == abi::LEVEL {
        let error = match answer(ctx, socket, name) {
            Ok(length) => {
                store32!(ctx, 32, length);
                0
            }
            Err(error) => -error,
        };
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_set_retval(error) };
        return 1;
    }
    let mut length = 0;
    if name == abi::SO_ORIGINAL_DST
        && (level == abi::SOL_IP || level == abi::SOL_IPV6)
        && let Some(Delivered { leg, ticket, .. }) = delivered(ctx, socket)
        && let Some(answered) = original_destination(ctx, level, &leg.requested)
    {
        let error = match answered {
            Ok(bytes) => {
                length = bytes;
                asked(leg, ticket);
                0
            }
            // As netfilter says it.
            Err(_) => -errno::EINVAL,
        };
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_set_retval(error) };
    }
    // Everybody else gets the kernel's own answer. With the length 0 it stays as it is: some options
    // (`NETLINK_LIST_MEMBERSHIPS`) tell of more bytes than there was room for, which the kernel
    // takes for a mistake of the hook.
    store32!(ctx, 32, length);
    1
}

/// The leg with which the socket was accepted. It can still be asked for when the connection is
/// over, but not when the socket has been connected elsewhere since.
#[inline(always)]
fn delivered(ctx: *mut bpf_sockopt, socket: Socket) -> Option<Delivered> {
    let delivered = delivered_to(ctx, socket)?;
    if delivered.is_there || socket.state() == CLOSE { Some(delivered) } else { None }
}

/// Answers an option of the control interface: the number of bytes, or an errno.
#[inline(always)]
fn answer(ctx: *mut bpf_sockopt, socket: Socket, name: i32) -> Result<u32, i32> {
    if !socket.is_inet() {
        return Err(errno::EOPNOTSUPP);
    }
    if !socket.is_tcp() && !socket.is_datagram() {
        return Err(errno::EINVAL);
    }
    if name < abi::QUERY_REDIRECT_RECORDS
        || name > abi::EXPORT_RECORD
        || name == abi::SET_REDIRECT_RECORDS
        || name == abi::REGISTER_LISTENER
        || name == abi::CARRY_ON
    {
        return Err(errno::EOPNOTSUPP);
    }
    let Some(Delivered { leg, is_there, ticket }) = delivered(ctx, socket) else {
        let state = socket.state();
        return Err(if state == CLOSE || state == LISTEN || state == SYN_SENT {
            errno::ENOTCONN
        } else {
            errno::ENODATA
        });
    };
    match name {
        abi::QUERY_REDIRECT_RECORDS => {
            let length = u32::from(leg.record.length);
            leg.ask(is_there, now());
            // Not done at every redirect: a service that only looks at the destination does not
            // need it.
            issue(&mut leg.record);
            copy_out::<{ MAX_RECORD / 8 }>(ctx, ptr::from_ref(&leg.record).cast(), length)
        }
        abi::QUERY_REDIRECT_CONTEXT => {
            may_read_context(leg)?;
            copy_out::<{ abi::MAX_CONTEXT / 8 }>(
                ctx,
                leg.context.as_ptr().cast(),
                leg.context_length,
            )
        }
        abi::REDIRECT_RECORDS_LENGTH => put(ctx, u32::from(leg.record.length)),
        abi::REDIRECT_CONTEXT_LENGTH => {
            may_read_context(leg)?;
            put(ctx, leg.context_length)
        }
        abi::ORIGINAL_DESTINATION => put(ctx, leg.requested),
        abi::ONWARDS => put(ctx, OnwardsInfo { destination: leg.requested, ticket }),
        abi::ORIGINAL_APP => copy_out::<{ size_of::<AppIdentity>() / 8 }>(
            ctx,
            ptr::from_ref(&leg.record.app).cast(),
            size_of::<AppIdentity>() as u32,
        ),
        abi::EXPORT_RECORD => export(ctx, socket, leg),
        _ => put(
            ctx,
            FlowInfo {
                flow: leg.record.flow,
                handle: leg.handle,
                filter: leg.filter,
                began_ns: leg.began_ns,
                hops: leg.record.hop_count,
                legs: leg.record.legs,
            },
        ),
    }
}

/// Whether there is a context, for this caller.
#[inline(always)]
fn may_read_context(leg: &LegState) -> Result<(), i32> {
    if leg.context_length == 0 || !process::caller().may_read_context(leg.handle) {
        return Err(errno::ENODATA);
    }
    Ok(())
}

/// Copies the first `length` bytes of a map value's part of `WORDS` 64-bit words to the caller.
#[inline(always)]
pub(crate) fn copy_out<const WORDS: usize>(
    ctx: *mut bpf_sockopt,
    source: *const u64,
    length: u32,
) -> Result<u32, i32> {
    if (load32!(ctx, 32) as i32) < length as i32 {
        return Err(errno::ERANGE);
    }
    let start = load64!(ctx, 8) as *mut u8;
    let end = load64!(ctx, 16) as *mut u8;
    // Not `repeat`: a call for each word would cost more than the word.
    for index in 0..WORDS {
        let offset = index * 8;
        if offset >= length as usize {
            break;
        }
        // SAFETY: `index` is within the source, whose `WORDS` words lie in one map value.
        let word = unsafe { *source.wrapping_add(index) };
        let to = start.wrapping_add(offset);
        if to.wrapping_add(8) > end {
            copy_tail(word, to, end);
            break;
        }
        // SAFETY: the caller's buffer has room for 8 bytes here, as was just checked.
        unsafe { to.cast::<u64>().write_unaligned(word) };
    }
    Ok(length)
}

/// Copies as much of a word as fits: the last word of a context may be longer than the context, and
/// than the buffer.
#[inline(always)]
fn copy_tail(word: u64, to: *mut u8, end: *mut u8) {
    let mut rest = word;
    let mut at = to;
    for _ in 0..7 {
        if at.wrapping_add(1) > end {
            break;
        }
        // SAFETY: the caller's buffer has room for a byte here, as was just checked.
        unsafe { *at = rest as u8 };
        rest >>= 8;
        at = at.wrapping_add(1);
    }
}

/// Gives the caller a value of fixed size.
#[inline(always)]
fn put<T>(ctx: *mut bpf_sockopt, value: T) -> Result<u32, i32> {
    let (start, end) = (load64!(ctx, 8), load64!(ctx, 16));
    let size = size_of::<T>() as u64;
    if start + size > end {
        return Err(errno::ERANGE);
    }
    // SAFETY: the caller's buffer has room for a `T`.
    unsafe { ptr::write_unaligned(start as *mut T, value) };
    Ok(size as u32)
}

/// Gives the caller a `sockaddr_in` (16 bytes) or a `sockaddr_in6` (28 bytes), as the kernel does
/// for connections that netfilter redirected; an errno if the buffer is too small. `None` if the address
/// has no such form.
#[inline(always)]
fn original_destination(
    ctx: *mut bpf_sockopt,
    level: i32,
    address: &Endpoint,
) -> Option<Result<u32, i32>> {
    if level == abi::SOL_IP {
        if !address.is_ipv4() {
            return None;
        }
        let name = SocketAddressV4 {
            family: AF_INET,
            port: address.port.to_be(),
            address: address.address[3],
            zero: [0; 2],
        };
        return Some(put(ctx, name));
    }
    let name = SocketAddressV6 {
        family: AF_INET6,
        port: address.port.to_be(),
        flow: 0,
        address: address.address,
        scope: 0,
    };
    Some(put(ctx, name))
}

/// `struct sockaddr_in`.
#[repr(C)]
struct SocketAddressV4 {
    family: u16,
    port: u16,
    address: u32,
    zero: [u32; 2],
}

/// `struct sockaddr_in6`.
#[repr(C)]
struct SocketAddressV6 {
    family: u16,
    port: u16,
    flow: u32,
    address: [u32; 4],
    scope: u32,
}

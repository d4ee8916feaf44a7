//! `setsockopt` and `getsockopt`: Linux's, but for the options that mean something else on Windows.

use crate::contract::{error_of_errno, wsa};
use crate::memory::{CallerPtr, Fault, MOST};
use crate::message::{CONTEXT, RECORDS};
use crate::process::process;
use crate::sockets::Socket;
use crate::sys::{self, Errno};
use carnet_core::abi;
use std::os::fd::RawFd;

/// `SO_ORIGINAL_DST` of mstcpip.h (contract Q12).
const SO_ORIGINAL_DST: i32 = 0x300F;
/// `SO_EXCLUSIVEADDRUSE` of winsock2.h.
const SO_EXCLUSIVEADDRUSE: i32 = !libc::SO_REUSEADDR;

/// An option with a meaning of its own here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    /// Ancillary data: at `IPPROTO_IPV6` or `IPPROTO_IP`; the context or the record.
    Ancillary {
        v6: bool,
        context: bool,
    },
    /// A `DWORD` of milliseconds.
    Timeout,
    /// A Winsock error.
    Error,
    ExclusiveAddress,
    OriginalDestination,
}

fn own(level: i32, option: i32) -> Option<Own> {
    match (level, option) {
        (abi::SOL_IP | abi::SOL_IPV6, RECORDS | CONTEXT) => {
            Some(Own::Ancillary { v6: level == abi::SOL_IPV6, context: option == CONTEXT })
        }
        (libc::SOL_SOCKET, libc::SO_RCVTIMEO | libc::SO_SNDTIMEO) => Some(Own::Timeout),
        (libc::SOL_SOCKET, libc::SO_ERROR) => Some(Own::Error),
        (libc::SOL_SOCKET, SO_EXCLUSIVEADDRUSE) => Some(Own::ExclusiveAddress),
        (libc::SOL_SOCKET, SO_ORIGINAL_DST) => Some(Own::OriginalDestination),
        _ => None,
    }
}

fn of_errno(errno: Errno) -> i32 {
    error_of_errno(errno)
}

pub(crate) fn set(
    handle: usize,
    level: i32,
    option: i32,
    value: CallerPtr,
    length: i32,
) -> Result<(), i32> {
    let socket = find(handle)?;
    let length = usize::try_from(length).map_err(|_| wsa::EFAULT)?;
    if length > MOST {
        return Err(wsa::EINVAL);
    }
    let value = value.read_vec(length).map_err(|Fault| wsa::EFAULT)?;
    let Some(own) = own(level, option) else {
        return sys::set_option(socket.fd, level, option, &value).map_err(of_errno);
    };
    let number = value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
    match own {
        Own::Ancillary { v6, context } => {
            check_ancillary(socket.fd, v6)?;
            let mut attributes = socket.attributes;
            let wanted = if v6 { &mut attributes.wanted.v6 } else { &mut attributes.wanted.v4 };
            wanted[usize::from(context)] = number.ok_or(wsa::EFAULT)? != 0;
            process().sockets.note(socket.fd, attributes);
            Ok(())
        }
        Own::Timeout => {
            let ms = i64::from(number.ok_or(wsa::EFAULT)?);
            let time = timeval(ms);
            sys::set_option(socket.fd, level, option, &time).map_err(of_errno)
        }
        // Exclusive is what is not reusable.
        Own::ExclusiveAddress => {
            let reuse = i32::from(number.ok_or(wsa::EFAULT)? == 0);
            sys::set_option(socket.fd, level, libc::SO_REUSEADDR, &reuse.to_ne_bytes())
                .map_err(of_errno)
        }
        Own::Error | Own::OriginalDestination => Err(wsa::ENOPROTOOPT),
    }
}

pub(crate) fn get(
    handle: usize,
    level: i32,
    option: i32,
    value: CallerPtr,
    length: CallerPtr,
) -> Result<(), i32> {
    let fault = |Fault| wsa::EFAULT;
    let socket = find(handle)?;
    let room = length.read_u32().map_err(fault)? as usize;
    length.check_writable(4).map_err(fault)?;
    let mut buffer = vec![0; room.min(MOST)];
    let answer = match own(level, option) {
        None => {
            let used = sys::get_option(socket.fd, level, option, &mut buffer).map_err(of_errno)?;
            buffer.truncate(used);
            buffer
        }
        Some(Own::Ancillary { v6, context }) => {
            check_ancillary(socket.fd, v6)?;
            let wanted = socket.attributes.wanted;
            let wanted = if v6 { wanted.v6 } else { wanted.v4 };
            u32::from(wanted[usize::from(context)]).to_ne_bytes().to_vec()
        }
        Some(Own::Timeout) => {
            let mut time = [0; size_of::<libc::timeval>()];
            sys::get_option(socket.fd, level, option, &mut time).map_err(of_errno)?;
            milliseconds(time).to_ne_bytes().to_vec()
        }
        Some(Own::Error) => {
            let errno = sys::get_int(socket.fd, level, option).map_err(of_errno)?;
            let error = if errno == 0 { 0 } else { error_of_errno(errno) };
            error.to_ne_bytes().to_vec()
        }
        Some(Own::ExclusiveAddress) => {
            let reuse = sys::get_int(socket.fd, level, libc::SO_REUSEADDR).map_err(of_errno)?;
            u32::from(reuse == 0).to_ne_bytes().to_vec()
        }
        Some(Own::OriginalDestination) => original_destination(socket.fd)?,
    };
    if answer.len() > room {
        return Err(wsa::EFAULT);
    }
    value.write(&answer).map_err(fault)?;
    length.write_u32(answer.len() as u32).map_err(fault)
}

fn find(handle: usize) -> Result<Socket, i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    process().sockets.find(handle)
}

/// On UDP and raw sockets only (contract U3), IPv6's on IPv6 sockets only.
fn check_ancillary(fd: RawFd, v6: bool) -> Result<(), i32> {
    let option = |name| sys::get_int(fd, libc::SOL_SOCKET, name).map_err(of_errno);
    match (option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?) {
        (libc::AF_INET, _) if v6 => Err(wsa::ENOPROTOOPT),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_RAW) => Ok(()),
        (libc::AF_INET | libc::AF_INET6, _) => Err(wsa::EINVAL),
        _ => Err(wsa::ENOPROTOOPT),
    }
}

/// The destination that a redirected connection asked for, as a `sockaddr`.
fn original_destination(fd: RawFd) -> Result<Vec<u8>, i32> {
    let domain = sys::get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN).map_err(of_errno)?;
    let level = if domain == libc::AF_INET6 { abi::SOL_IPV6 } else { abi::SOL_IP };
    let mut address = vec![0; size_of::<libc::sockaddr_storage>()];
    let length =
        sys::get_option(fd, level, abi::SO_ORIGINAL_DST, &mut address).map_err(of_errno)?;
    address.truncate(length);
    Ok(address)
}

fn timeval(ms: i64) -> [u8; size_of::<libc::timeval>()] {
    let mut bytes = [0; size_of::<libc::timeval>()];
    let (seconds, micros) = bytes.split_at_mut(8);
    seconds.copy_from_slice(&(ms / 1000).to_ne_bytes());
    micros.copy_from_slice(&(ms % 1000 * 1000).to_ne_bytes());
    bytes
}

fn milliseconds(timeval: [u8; size_of::<libc::timeval>()]) -> u32 {
    let half = |at: usize| {
        timeval.get(at..at + 8).and_then(|v| v.try_into().ok()).map_or(0, i64::from_ne_bytes)
    };
    let ms = half(0).saturating_mul(1000).saturating_add(half(8) / 1000);
    u32::try_from(ms).unwrap_or(u32::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn times_are_milliseconds_on_one_side_and_a_timeval_on_the_other() {
        for ms in [0_u32, 1, 999, 1000, 1001, 86_400_000, u32::MAX] {
            assert_eq!(milliseconds(timeval(i64::from(ms))), ms);
        }
        assert_eq!(timeval(1500)[..8], 1_i64.to_ne_bytes());
        assert_eq!(timeval(1500)[8..], 500_000_i64.to_ne_bytes());
    }

    #[test]
    fn options_of_linux_pass() {
        for (level, option) in [
            (libc::SOL_SOCKET, libc::SO_REUSEADDR),
            (libc::IPPROTO_TCP, libc::TCP_NODELAY),
            (libc::SOL_SOCKET, RECORDS),
            (abi::LEVEL, abi::REGISTER_LISTENER),
        ] {
            assert_eq!(own(level, option), None);
        }
        assert_eq!(own(41, 70), Some(Own::Ancillary { v6: true, context: true }));
        assert_eq!(own(0, 60), Some(Own::Ancillary { v6: false, context: false }));
    }
}

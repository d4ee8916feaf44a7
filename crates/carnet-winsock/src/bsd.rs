//! The socket functions that both systems have, with Windows' errors and habits.
#![expect(unsafe_code, reason = "system calls on addresses of the caller, which the kernel checks")]

use crate::contract::{error_of_errno, wsa};
use crate::flows;
use crate::memory::{CallerPtr, Fault};
use crate::operation;
use crate::process::process;
use crate::sockets::Attributes;
use crate::{sys, wait};
use std::ffi::c_void;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// `WSA_FLAG_OVERLAPPED` and `WSA_FLAG_NO_HANDLE_INHERIT`.
const FLAG_OVERLAPPED: u32 = 0x01;
const FLAG_NO_INHERIT: u32 = 0x80;

fn check(status: isize) -> Result<i32, i32> {
    if status < 0 { Err(error_of_errno(sys::errno())) } else { Ok(status as i32) }
}

/// The descriptor of a socket; that it is one is left to the kernel to say.
pub(crate) fn descriptor(handle: usize) -> Result<RawFd, i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    RawFd::try_from(handle).map_err(|_| wsa::ENOTSOCK)
}

/// `WSASocket` (contract W1); `socket` is one with the overlapped attribute.
pub(crate) fn socket(family: i32, kind: i32, protocol: i32, flags: u32) -> Result<usize, i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    if flags & !(FLAG_OVERLAPPED | FLAG_NO_INHERIT) != 0 {
        return Err(wsa::EINVAL);
    }
    let cloexec = if flags & FLAG_NO_INHERIT != 0 { libc::SOCK_CLOEXEC } else { 0 };
    // SAFETY: no memory arguments.
    let fd = check(unsafe { libc::socket(family, kind | cloexec, protocol) } as isize)?;
    let overlapped = flags & FLAG_OVERLAPPED != 0;
    process().sockets.note(fd, Attributes { overlapped, ..Attributes::default() });
    Ok(fd as usize)
}

/// `accept`: the new socket has the listener's overlapped attribute and blocking mode, as on
/// Windows.
///
/// # Safety
/// `address` and `length` are for this purpose, or null.
pub(crate) unsafe fn accept(
    handle: usize,
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> Result<usize, i32> {
    let listener = descriptor(handle)?;
    let attributes = process().sockets.find(handle)?.attributes;
    let nonblocking = sys::is_nonblocking(listener).map_err(error_of_errno)?;
    let flags = if nonblocking { libc::SOCK_NONBLOCK } else { 0 };
    // SAFETY: by the contract of this function; the kernel checks both addresses.
    let fd = check(unsafe { libc::accept4(listener, address, length, flags) } as isize)?;
    process().sockets.note(fd, attributes);
    Ok(fd as usize)
}

/// `closesocket`: cancels what pends on the socket (contract S29a).
pub(crate) fn close(handle: usize) -> Result<(), i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let socket = process().sockets.find(handle)?;
    operation::cancel_of_socket(socket);
    process().sockets.forget(socket.fd);
    sys::close(socket.fd).map_err(error_of_errno)
}

/// `ioctlsocket`, for `FIONBIO` and `FIONREAD`.
pub(crate) fn ioctl(handle: usize, command: u32, value: CallerPtr) -> Result<(), i32> {
    use crate::contract::code::{FIONBIO, FIONREAD};
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let socket = process().sockets.find(handle)?;
    match command {
        FIONBIO => {
            let on = value.read_u32().map_err(|Fault| wsa::EFAULT)? != 0;
            sys::set_nonblocking(socket.fd, on).map_err(error_of_errno)
        }
        FIONREAD => {
            let count = sys::readable_bytes(socket.fd).map_err(error_of_errno)?;
            value.write_u32(count).map_err(|Fault| wsa::EFAULT)
        }
        _ => Err(wsa::EOPNOTSUPP),
    }
}

/// A socket address of the caller's.
pub(crate) type Address = (*const libc::sockaddr, i32);

/// # Safety
/// The address is for this purpose.
pub(crate) unsafe fn bind(handle: usize, (address, length): Address) -> Result<(), i32> {
    let fd = descriptor(handle)?;
    // SAFETY: by the contract of this function; the kernel checks it.
    check(unsafe { libc::bind(fd, address, length.cast_unsigned()) } as isize)?;
    Ok(())
}

/// # Safety
/// The address is for this purpose.
pub(crate) unsafe fn connect(handle: usize, (address, length): Address) -> Result<(), i32> {
    let fd = descriptor(handle)?;
    // SAFETY: by the contract of this function; the kernel checks it.
    check(unsafe { libc::connect(fd, address, length.cast_unsigned()) } as isize)?;
    Ok(())
}

pub(crate) fn listen(handle: usize, backlog: i32) -> Result<(), i32> {
    let fd = descriptor(handle)?;
    // SAFETY: no memory arguments.
    check(unsafe { libc::listen(fd, backlog) } as isize)?;
    Ok(())
}

pub(crate) fn shutdown(handle: usize, how: i32) -> Result<(), i32> {
    let fd = descriptor(handle)?;
    // SAFETY: no memory arguments. SD_RECEIVE, SD_SEND and SD_BOTH have the numbers of SHUT_*.
    check(unsafe { libc::shutdown(fd, how) } as isize)?;
    Ok(())
}

/// `send` and `sendto`: never with a signal.
///
/// # Safety
/// Buffer and address are for this purpose.
pub(crate) unsafe fn send(
    handle: usize,
    (buffer, length): (*const c_void, i32),
    flags: i32,
    (address, address_length): Address,
) -> Result<i32, i32> {
    let fd = descriptor(handle)?;
    let length = usize::try_from(length).map_err(|_| wsa::EFAULT)?;
    let flags = flags | libc::MSG_NOSIGNAL;
    let send = |now| {
        let flags = flags | now;
        // SAFETY: by the contract of this function; the kernel checks both.
        check(unsafe {
            libc::sendto(fd, buffer, length, flags, address, address_length.cast_unsigned())
        })
    };
    if address.is_null() || !flows::has_flows(fd) {
        return send(0);
    }
    let socket = process().sockets.find(handle)?;
    let flows = process().sockets.flows(socket);
    let sent = flows.send(fd, None, flags & libc::MSG_DONTWAIT == 0, send)?;
    if socket.attributes.wanted.any() {
        // SAFETY: by the contract of this function.
        let name = unsafe { CallerPtr::new(address.expose_provenance()) };
        let length = address_length.unsigned_abs() as usize;
        if let Some(to) = name.read_vec(length).ok().and_then(|name| flows::address(&name)) {
            flows.has_sent(to);
        }
    }
    Ok(sent)
}

/// `recv` and `recvfrom`.
///
/// # Safety
/// Buffer, address and its length are for this purpose, the latter two or null.
pub(crate) unsafe fn receive(
    handle: usize,
    (buffer, length): (*mut c_void, i32),
    flags: i32,
    (address, address_length): (*mut libc::sockaddr, *mut libc::socklen_t),
) -> Result<i32, i32> {
    let fd = descriptor(handle)?;
    let length = usize::try_from(length).map_err(|_| wsa::EFAULT)?;
    // SAFETY: by the contract of this function; the kernel checks all of it.
    check(unsafe { libc::recvfrom(fd, buffer, length, flags, address, address_length) })
}

/// One of `getsockname` and `getpeername`.
pub(crate) type GetName =
    unsafe extern "C" fn(RawFd, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

/// # Safety
/// Address and length are for this purpose.
pub(crate) unsafe fn name(
    get: GetName,
    handle: usize,
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> Result<(), i32> {
    let fd = descriptor(handle)?;
    // SAFETY: by the contract of this function; the kernel checks both.
    check(unsafe { get(fd, address, length) } as isize)?;
    Ok(())
}

/// Windows' `fd_set`: a count and, eight bytes on, as many sockets.
struct Set {
    place: CallerPtr,
    handles: Vec<usize>,
}

impl Set {
    /// As many as a process can have open are enough.
    const MOST: usize = 1 << 20;

    fn read(place: CallerPtr) -> Result<Self, i32> {
        if place.is_null() {
            return Ok(Self { place, handles: Vec::new() });
        }
        let fault = |Fault| wsa::EFAULT;
        let count = place.read_u32().map_err(fault)? as usize;
        if count > Self::MOST {
            return Err(wsa::EINVAL);
        }
        place.check_writable(8 + 8 * count).map_err(fault)?;
        let mut bytes = vec![0; 8 * count];
        place.at(8).read_into(&mut bytes).map_err(fault)?;
        let handles = bytes.chunks_exact(8).filter_map(|b| b.try_into().ok());
        Ok(Self { place, handles: handles.map(usize::from_ne_bytes).collect() })
    }

    /// Leaves those in it whose entries say one of these: how many.
    fn keep(&self, entries: &[libc::pollfd], events: i16) -> Result<u32, i32> {
        if self.place.is_null() {
            return Ok(0);
        }
        let fault = |Fault| wsa::EFAULT;
        let ready = |(_, entry): &(&usize, &libc::pollfd)| entry.revents & events != 0;
        let kept: Vec<usize> =
            self.handles.iter().zip(entries).filter(ready).map(|(&handle, _)| handle).collect();
        let bytes: Vec<u8> = kept.iter().flat_map(|handle| handle.to_ne_bytes()).collect();
        self.place.at(8).write(&bytes).map_err(fault)?;
        self.place.write_u32(kept.len() as u32).map_err(fault)?;
        Ok(kept.len() as u32)
    }
}

/// `select`: how many sockets are left in the sets; `WSAEINTR` if it was interrupted. A connect that failed is in the third set, as
/// on Windows, and in the second, as on Linux.
pub(crate) fn select(sets: [CallerPtr; 3], timeout: CallerPtr) -> Result<i32, i32> {
    const READ: i16 = libc::POLLIN | libc::POLLHUP | libc::POLLERR;
    const WRITE: i16 = libc::POLLOUT | libc::POLLERR | libc::POLLHUP;
    const EXCEPT: i16 = libc::POLLPRI | libc::POLLERR;
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let [read, write, except] = sets;
    let [read, write, except] = [Set::read(read)?, Set::read(write)?, Set::read(except)?];
    let deadline = deadline(timeout)?;
    let asked = [(&read, libc::POLLIN), (&write, libc::POLLOUT), (&except, libc::POLLPRI)];
    let mut entries = Vec::new();
    for (set, events) in asked {
        for &handle in &set.handles {
            let fd = RawFd::try_from(handle).map_err(|_| wsa::ENOTSOCK)?;
            entries.push(libc::pollfd { fd, events, revents: 0 });
        }
    }
    if entries.is_empty() {
        return Err(wsa::EINVAL);
    }
    // Only a call that has to wait can be interrupted.
    if sys::poll(&mut entries, Some(Instant::now())).map_err(error_of_errno)? == 0 {
        wait::interruptible(&mut entries, deadline)?;
    }
    if entries.iter().any(|entry| entry.revents & libc::POLLNVAL != 0) {
        return Err(wsa::ENOTSOCK);
    }
    let (of_read, rest) = entries.split_at(read.handles.len());
    let (of_write, of_except) = rest.split_at(write.handles.len());
    let count = read.keep(of_read, READ)?
        + write.keep(of_write, WRITE)?
        + except.keep(of_except, EXCEPT)?;
    Ok(count as i32)
}

/// When a `struct timeval` from now is; none for null: for ever.
fn deadline(timeout: CallerPtr) -> Result<Option<Instant>, i32> {
    if timeout.is_null() {
        return Ok(None);
    }
    let seconds = timeout.read().map(i64::from_ne_bytes);
    let micros = timeout.at(8).read().map(i64::from_ne_bytes);
    let (Ok(seconds), Ok(micros)) = (seconds, micros) else {
        return Err(wsa::EFAULT);
    };
    let (Ok(seconds), Ok(micros)) = (u64::try_from(seconds), u64::try_from(micros)) else {
        return Err(wsa::EINVAL);
    };
    // What is too far away to be reckoned is for ever.
    let time = Duration::from_secs(seconds).checked_add(Duration::from_micros(micros));
    Ok(time.and_then(|time| Instant::now().checked_add(time)))
}

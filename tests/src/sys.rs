//! The two calls of the control interface, raw: the tests check the errno values themselves, which
//! the library `carnet` translates. And the ways to open a flow, or an object of the kernel's BPF, that
//! no safe library has.
#![expect(unsafe_code, reason = "socket options of any number, io_uring, sendmmsg, bpf, unshare")]

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::puppet::{BpfObject, Ring};

/// `getsockopt(2)` with a buffer of `length` bytes; gives what the kernel says it wrote.
///
/// # Errors
/// What the kernel says; `InvalidData` if it claims to have written more than there was room for.
pub fn get_option(
    socket: impl AsFd,
    level: i32,
    option: i32,
    length: usize,
) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; length];
    let mut written = libc::socklen_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: the descriptor is borrowed for the call; `value` is valid for writes of `written`
    // bytes, which is its length.
    let status = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            value.as_mut_ptr().cast(),
            &raw mut written,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    if written as usize > length {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes than there was room"));
    }
    value.truncate(written as usize);
    Ok(value)
}

/// `setsockopt(2)`.
///
/// # Errors
/// What the kernel says.
pub fn set_option(socket: impl AsFd, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is borrowed for the call; `value` is valid for reads of `length`
    // bytes.
    let status = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, option, value.as_ptr().cast(), length)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Opens an object of the kernel's BPF with bpf(2).
///
/// # Errors
/// What the kernel says.
pub fn open_bpf(object: &BpfObject) -> io::Result<OwnedFd> {
    const OBJ_GET: i64 = 7;
    const PROG_GET_FD_BY_ID: i64 = 13;
    const MAP_GET_FD_BY_ID: i64 = 14;
    const LINK_GET_FD_BY_ID: i64 = 30;
    let mut path = Vec::new();
    let (command, first) = match object {
        BpfObject::Pin(pin) => {
            path.extend_from_slice(pin.as_os_str().as_encoded_bytes());
            path.push(0);
            (OBJ_GET, path.as_ptr() as u64)
        }
        BpfObject::Map(id) => (MAP_GET_FD_BY_ID, u64::from(*id)),
        BpfObject::Program(id) => (PROG_GET_FD_BY_ID, u64::from(*id)),
        BpfObject::Link(id) => (LINK_GET_FD_BY_ID, u64::from(*id)),
    };
    // All four begin with an id or an address; the rest, zero, means nothing special.
    let attributes = [first, 0];
    // SAFETY: the kernel reads 16 bytes of attributes, and a path that ends with zero where the first
    // of them is its address; both outlive the call.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes))
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel gave a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

/// Loads a BPF program of this type, for this place, under this name of at most 15 bytes. Each instruction is
/// a `struct bpf_insn`.
///
/// # Errors
/// What the kernel says.
pub fn load_program(
    kind: u32,
    attach_type: u32,
    instructions: &[u64],
    name: &str,
) -> io::Result<OwnedFd> {
    const PROG_LOAD: i64 = 5;
    let mut attributes = LoadAttributes {
        kind,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        log: [0; 4],
        version_and_flags: [0; 2],
        name: [0; 16],
        device: 0,
        attach_type,
    };
    for (to, byte) in attributes.name[..15].iter_mut().zip(name.bytes()) {
        *to = byte;
    }
    // SAFETY: the kernel reads as many attributes as it is told there are, the instructions and the
    // licence, all of which outlive the call.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attributes, size_of_val(&attributes))
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel gave a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

/// The begin of `union bpf_attr`, for loading a program.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log: [u32; 4],
    version_and_flags: [u32; 2],
    name: [u8; 16],
    device: u32,
    attach_type: u32,
}

/// Attaches a program to a cgroup by a link, which ends with the descriptor.
///
/// # Errors
/// What the kernel says.
pub fn link_program(
    program: impl AsFd,
    cgroup: impl AsFd,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    const LINK_CREATE: i64 = 28;
    let number = |fd: i32| fd.cast_unsigned();
    let attributes = [
        number(program.as_fd().as_raw_fd()),
        number(cgroup.as_fd().as_raw_fd()),
        attach_type,
        flags,
    ];
    // SAFETY: the kernel reads 16 bytes of attributes, which outlive the call.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_bpf, LINK_CREATE, attributes.as_ptr(), size_of_val(&attributes))
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel gave a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

/// Has this process, which has one thread, enter a user namespace of its own.
///
/// # Errors
/// What the kernel says.
pub fn enter_new_user_namespace() -> io::Result<()> {
    // SAFETY: no file descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) }?;
    Ok(())
}

/// Carries out one request by an io_uring of its own, within `limit`.
///
/// # Safety
/// All that the request points to must live until this returns, and be as the operation wants it.
unsafe fn through_ring(entry: squeue::Entry, ring: Ring, limit: Duration) -> io::Result<i32> {
    let mut builder = IoUring::builder();
    if ring == Ring::Polled {
        builder.setup_sqpoll(1000);
    }
    let mut uring: IoUring = builder.build(2)?;
    let entry = if ring == Ring::Async { entry.flags(squeue::Flags::ASYNC) } else { entry };
    // SAFETY: the caller answers for what the entry points to. The ring is gone when this returns,
    // and no request of a ring that is gone goes on.
    unsafe { uring.submission().push(&entry) }.map_err(io::Error::other)?;
    let time = types::Timespec::from(limit);
    uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))?;
    let completed = uring.completion().next();
    match completed.ok_or_else(|| io::Error::from_raw_os_error(libc::ETIMEDOUT))?.result() {
        error @ ..0 => Err(io::Error::from_raw_os_error(-error)),
        result => Ok(result),
    }
}

/// Makes a socket by an io_uring (since Linux 5.19).
///
/// # Errors
/// As for [`ring_connect`].
pub fn ring_socket(
    domain: Domain,
    kind: Type,
    protocol: Option<Protocol>,
    ring: Ring,
    limit: Duration,
) -> io::Result<Socket> {
    let kind = i32::from(kind) | libc::SOCK_CLOEXEC;
    let entry = opcode::Socket::new(domain.into(), kind, protocol.map_or(0, i32::from));
    // SAFETY: the request points to nothing.
    let descriptor = unsafe { through_ring(entry.build(), ring, limit) }?;
    // SAFETY: the kernel gave a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }.into())
}

/// Connects by an io_uring.
///
/// # Errors
/// What the kernel says; `ETIMEDOUT` after `limit`.
pub fn ring_connect(socket: &Socket, to: &SockAddr, ring: Ring, limit: Duration) -> io::Result<()> {
    let entry = opcode::Connect::new(types::Fd(socket.as_raw_fd()), to.as_ptr().cast(), to.len());
    // SAFETY: socket and address outlive the call; the length is the address's.
    unsafe { through_ring(entry.build(), ring, limit) }.map(drop)
}

/// Sends a datagram by an io_uring.
///
/// # Errors
/// As for [`ring_connect`].
pub fn ring_send(
    socket: &Socket,
    to: &SockAddr,
    data: &[u8],
    ring: Ring,
    limit: Duration,
) -> io::Result<()> {
    let mut parts = [IoSlice::new(data)];
    let message = message(to, &mut parts);
    let entry = opcode::SendMsg::new(types::Fd(socket.as_raw_fd()), &raw const message);
    // SAFETY: socket, message and all that it points to outlive the call.
    unsafe { through_ring(entry.build(), ring, limit) }.map(drop)
}

/// A message to an address. It points to both arguments.
fn message(to: &SockAddr, parts: &mut [IoSlice<'_>]) -> libc::msghdr {
    // SAFETY: all zero is a value of this structure of numbers and pointers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = to.as_ptr().cast_mut().cast();
    message.msg_namelen = to.len();
    // An `IoSlice` is laid out as `struct iovec`.
    message.msg_iov = parts.as_mut_ptr().cast();
    message.msg_iovlen = parts.len() as _;
    message
}

/// `sendmmsg(2)`: sends every datagram to the address, with one call.
///
/// # Errors
/// What the kernel says; `EMSGSIZE` if it took fewer than all.
pub fn send_many(socket: &Socket, to: &SockAddr, datagrams: &[Vec<u8>]) -> io::Result<()> {
    let mut parts: Vec<_> = datagrams.iter().map(|data| [IoSlice::new(data)]).collect();
    let mut messages: Vec<_> = parts
        .iter_mut()
        .map(|parts| libc::mmsghdr { msg_hdr: message(to, parts), msg_len: 0 })
        .collect();
    // SAFETY: the messages and all that they point to outlive the call; the number is theirs.
    let sent = unsafe {
        libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0)
    };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent == messages.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
    }
}

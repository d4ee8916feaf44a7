//! `WSARecvMsg` and `WSASendMsg`: messages with ancillary data, redirect records among it
//! (contract U1..U5, U9).
//!
//! A control message has the same layout on both systems, and those of Linux pass through. Records
//! and contexts are no control messages of Linux: they are taken from and given to the engine's
//! socket options. The engine answers these on UDP sockets from the release on in which it redirects
//! UDP; until then no datagram carries any.
#![expect(unsafe_code, reason = "sendmsg(2) and recvmsg(2) with buffers of the caller's")]

use crate::contract::{Failure, error_of_errno, wsa};
use crate::memory::{CallerPtr, Fault, MOST};
use crate::process::process;
use crate::sockets::{Socket, Wanted};
use crate::sys;
use carnet_core::abi;

/// `IP_WFP_REDIRECT_RECORDS` and `IPV6_WFP_REDIRECT_RECORDS`.
pub(crate) const RECORDS: i32 = 60;
/// `IP_WFP_REDIRECT_CONTEXT` and `IPV6_WFP_REDIRECT_CONTEXT`.
pub(crate) const CONTEXT: i32 = 70;

/// `WSAID_WSARECVMSG` and `WSAID_WSASENDMSG`, as they lie in memory.
const WSARECVMSG: [u8; 16] = 0x22c3_51e3_4fe5_538a_436b_6f1f_f689_d7c8_u128.to_le_bytes();
const WSASENDMSG: [u8; 16] = 0x6d60_cf44_ee0d_a784_43ca_754f_a441_e712_u128.to_le_bytes();

/// The function that `SIO_GET_EXTENSION_FUNCTION_POINTER` asks for.
pub(crate) fn extension_function(guid: &[u8]) -> Option<usize> {
    if guid.starts_with(&WSARECVMSG) {
        Some(crate::ffi::WSARecvMsg as *const () as usize)
    } else if guid.starts_with(&WSASENDMSG) {
        Some(crate::ffi::WSASendMsg as *const () as usize)
    } else {
        None
    }
}

/// The fields of a `WSAMSG`.
struct Message {
    place: CallerPtr,
    name: usize,
    name_length: usize,
    buffers: Vec<libc::iovec>,
    control: CallerPtr,
    control_length: usize,
    flags: u32,
}

impl Message {
    const NAME_LENGTH: usize = 8;
    const CONTROL_LENGTH: usize = 32;
    const FLAGS: usize = 48;
    const SIZE: usize = 56;
    /// A `WSABUF`: a length and, eight bytes on, an address.
    const BUFFER: usize = 16;

    fn read(place: CallerPtr) -> Result<Self, i32> {
        let bytes: [u8; Self::SIZE] = place.read().map_err(|Fault| wsa::EFAULT)?;
        let word = |at: usize| {
            bytes.get(at..at + 8).and_then(|v| v.try_into().ok()).map_or(0, usize::from_ne_bytes)
        };
        let half = |at: usize| {
            bytes.get(at..at + 4).and_then(|v| v.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        let count = half(24) as usize;
        if count * Self::BUFFER > MOST {
            return Err(wsa::EMSGSIZE);
        }
        // SAFETY: the message says that these are its buffers.
        let (buffers, control) = unsafe { (CallerPtr::new(word(16)), CallerPtr::new(word(40))) };
        let buffers = buffers.read_vec(count * Self::BUFFER).map_err(|Fault| wsa::EFAULT)?;
        let buffers = buffers.chunks_exact(Self::BUFFER).map(|buffer| {
            let (length, address) = buffer.split_at(8);
            let length = length.first_chunk().map_or(0, |v| u32::from_ne_bytes(*v));
            let address = address.first_chunk().map_or(0, |v| usize::from_ne_bytes(*v));
            libc::iovec { iov_base: address as *mut _, iov_len: length as usize }
        });
        Ok(Self {
            place,
            name: word(0),
            name_length: half(Self::NAME_LENGTH) as usize,
            buffers: buffers.collect(),
            control,
            control_length: half(Self::CONTROL_LENGTH) as usize,
            flags: half(Self::FLAGS),
        })
    }
}

fn find(handle: usize, overlapped: CallerPtr) -> Result<Socket, i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let socket = process().sockets.find(handle)?;
    if overlapped.is_null() || !socket.attributes.overlapped {
        Ok(socket)
    } else {
        Err(wsa::EOPNOTSUPP)
    }
}

/// `WSARecvMsg`, which waits: an overlapped one is `WSAEOPNOTSUPP`.
pub(crate) fn receive(
    handle: usize,
    message: CallerPtr,
    received: CallerPtr,
    overlapped: CallerPtr,
) -> Result<(), i32> {
    let fault = |Fault| wsa::EFAULT;
    let socket = find(handle, overlapped)?;
    let mut message = Message::read(message)?;
    message.place.check_writable(Message::SIZE).map_err(fault)?;
    if !received.is_null() {
        received.check_writable(4).map_err(fault)?;
    }
    message.control.check_writable(message.control_length).map_err(fault)?;
    // The kernel's control messages come here first, so that others can follow them.
    let mut control = Control::new(message.control_length.min(MOST));
    let mut name = [0_u8; size_of::<libc::sockaddr_storage>()];
    // SAFETY: zero is a valid value of every field.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as libc::socklen_t;
    header.msg_iov = message.buffers.as_mut_ptr();
    header.msg_iovlen = message.buffers.len() as _;
    header.msg_control = control.bytes.as_mut_ptr().cast();
    header.msg_controllen = control.bytes.len() as _;
    // SAFETY: name, control and the list of buffers are ours and outlive the call; the buffers are
    // the caller's, for this purpose, and checked by the kernel.
    let count = unsafe { libc::recvmsg(socket.fd, &raw mut header, message.flags as i32) };
    if count < 0 {
        return Err(error_of_errno(sys::errno()));
    }
    control.used = header.msg_controllen as usize;
    control.truncated = header.msg_flags & libc::MSG_CTRUNC != 0;
    let name_length = (header.msg_namelen as usize).min(name.len());
    let source = name.get(..name_length).unwrap_or_default();
    control.add_redirection(socket, source);

    if message.name != 0 {
        // SAFETY: the message says that this is its place for the address.
        let place = unsafe { CallerPtr::new(message.name) };
        let fitting = source.get(..message.name_length).unwrap_or(source);
        place.write(fitting).map_err(fault)?;
        let written = (source.len() as u32).to_ne_bytes();
        message.place.at(Message::NAME_LENGTH).write(&written).map_err(fault)?;
    }
    let filled = control.bytes.get(..control.used).unwrap_or_default();
    message.control.write(filled).map_err(fault)?;
    message.place.at(Message::CONTROL_LENGTH).write_u32(filled.len() as u32).map_err(fault)?;
    let lost = if control.truncated { libc::MSG_CTRUNC } else { 0 };
    let flags = header.msg_flags & !libc::MSG_CMSG_CLOEXEC | lost;
    message.place.at(Message::FLAGS).write_u32(flags.cast_unsigned()).map_err(fault)?;
    if !received.is_null() {
        received.write_u32(count as u32).map_err(fault)?;
    }
    // The message is there as far as it fits, and the call says that it did not.
    if flags & libc::MSG_TRUNC != 0 { Err(wsa::EMSGSIZE) } else { Ok(()) }
}

/// `WSASendMsg`, which waits: an overlapped one is `WSAEOPNOTSUPP`.
pub(crate) fn send(
    handle: usize,
    message: CallerPtr,
    flags: u32,
    sent: CallerPtr,
    overlapped: CallerPtr,
) -> Result<(), i32> {
    let fault = |Fault| wsa::EFAULT;
    let socket = find(handle, overlapped)?;
    let mut message = Message::read(message)?;
    if !sent.is_null() {
        sent.check_writable(4).map_err(fault)?;
    }
    if message.control_length > MOST {
        return Err(wsa::EINVAL);
    }
    let control = message.control.read_vec(message.control_length).map_err(fault)?;
    let Outgoing { mut native, records } = Outgoing::split(&control)?;
    if let Some(records) = records {
        sys::set_option(socket.fd, abi::LEVEL, abi::SET_REDIRECT_RECORDS, &records)
            .map_err(|errno| Failure::of_option(errno).code())?;
    }
    // SAFETY: zero is a valid value of every field.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = message.name as *mut _;
    header.msg_namelen = message.name_length as libc::socklen_t;
    header.msg_iov = message.buffers.as_mut_ptr();
    header.msg_iovlen = message.buffers.len() as _;
    if !native.is_empty() {
        header.msg_control = native.as_mut_ptr().cast();
        header.msg_controllen = native.len() as _;
    }
    let flags = flags.cast_signed() | libc::MSG_NOSIGNAL;
    // SAFETY: control and the list of buffers are ours and outlive the call; name and buffers are
    // the caller's, for this purpose, and checked by the kernel.
    let count = unsafe { libc::sendmsg(socket.fd, &raw const header, flags) };
    if count < 0 {
        return Err(error_of_errno(sys::errno()));
    }
    if !sent.is_null() {
        sent.write_u32(count as u32).map_err(fault)?;
    }
    Ok(())
}

/// `WSACMSGHDR` and `cmsghdr`: length (with the header), level, type.
const HEADER: usize = 16;

fn aligned(length: usize) -> usize {
    length.next_multiple_of(8)
}

/// A control buffer of the caller's length, being filled.
#[derive(Debug)]
struct Control {
    bytes: Vec<u8>,
    used: usize,
    truncated: bool,
}

impl Control {
    fn new(length: usize) -> Self {
        Self { bytes: vec![0; length], used: 0, truncated: false }
    }

    /// Adds what was asked for of the redirection of a datagram from this source.
    fn add_redirection(&mut self, socket: Socket, source: &[u8]) {
        let wanted = socket.attributes.wanted;
        if wanted == Wanted::default() {
            return;
        }
        let (level, [records, context]) = wanted_of(wanted, source);
        let mut add = |wanted: bool, kind: i32, option: i32| {
            let mut value = vec![0; 4096];
            // An error says that the datagram carries none.
            if wanted && let Ok(length) = sys::get_option(socket.fd, abi::LEVEL, option, &mut value)
            {
                value.truncate(length);
                self.add(level, kind, &value);
            }
        };
        add(records, RECORDS, abi::QUERY_REDIRECT_RECORDS);
        add(context, CONTEXT, abi::QUERY_REDIRECT_CONTEXT);
    }

    /// Adds an object if all of it fits; half a record would be of no use (contract U9).
    fn add(&mut self, level: i32, kind: i32, value: &[u8]) {
        let begin = aligned(self.used);
        let length = HEADER + value.len();
        let Some(place) = self.bytes.get_mut(begin..begin + length) else {
            self.truncated = true;
            return;
        };
        let (header, data) = place.split_at_mut(HEADER);
        header[..8].copy_from_slice(&length.to_ne_bytes());
        header[8..12].copy_from_slice(&level.to_ne_bytes());
        header[12..].copy_from_slice(&kind.to_ne_bytes());
        data.copy_from_slice(value);
        self.used = aligned(begin + length).min(self.bytes.len());
    }
}

/// The level of the objects of a datagram, and which of them are wanted: those of IPv4 for an IPv4
/// source, mapped or not, on a socket of either family (contract U2).
fn wanted_of(wanted: Wanted, source: &[u8]) -> (i32, [bool; 2]) {
    const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    let family = source.first_chunk().map_or(0, |family| u16::from_ne_bytes(*family));
    // Family, port and flow information come before the address.
    let mapped = source.get(8..20) == Some(&MAPPED[..]);
    if i32::from(family) == libc::AF_INET6 && !mapped {
        (abi::SOL_IPV6, wanted.v6)
    } else {
        (abi::SOL_IP, wanted.v4)
    }
}

/// The control buffer of a message to be sent, taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outgoing {
    /// What the kernel is to see.
    native: Vec<u8>,
    /// The redirect record of a new flow (contract U4).
    records: Option<Vec<u8>>,
}

impl Outgoing {
    fn split(control: &[u8]) -> Result<Self, i32> {
        let mut outgoing = Self::default();
        let mut rest = control;
        while rest.len() >= HEADER {
            let length = rest.first_chunk().map_or(0, |v| usize::from_ne_bytes(*v));
            let object = rest.get(..length).filter(|object| object.len() >= HEADER);
            let object = object.ok_or(wsa::EINVAL)?;
            let (header, value) = object.split_at(HEADER);
            let int = |at: usize| {
                header.get(at..at + 4).and_then(|v| v.try_into().ok()).map_or(0, i32::from_ne_bytes)
            };
            match (int(8), int(12)) {
                (abi::SOL_IP | abi::SOL_IPV6, RECORDS) => {
                    if outgoing.records.replace(value.to_vec()).is_some() {
                        return Err(wsa::EINVAL);
                    }
                }
                // A context is for the service alone.
                (abi::SOL_IP | abi::SOL_IPV6, CONTEXT) => return Err(wsa::EINVAL),
                _ => {
                    outgoing.native.extend_from_slice(object);
                    outgoing.native.resize(aligned(outgoing.native.len()), 0);
                }
            }
            rest = rest.get(aligned(length)..).unwrap_or_default();
        }
        Ok(outgoing)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const ALL: Wanted = Wanted { v4: [true, true], v6: [true, false] };

    #[test]
    fn objects_are_laid_out_as_control_messages() {
        let mut control = Control::new(64);
        control.add(abi::SOL_IP, RECORDS, b"record");
        control.add(abi::SOL_IPV6, CONTEXT, b"context!");
        assert!(!control.truncated);
        assert_eq!(control.used, 24 + 24);
        let bytes = &control.bytes;
        assert_eq!(bytes[0..8], 22_u64.to_ne_bytes());
        assert_eq!(bytes[8..12], 0_i32.to_ne_bytes());
        assert_eq!(bytes[12..16], 60_i32.to_ne_bytes());
        assert_eq!(&bytes[16..22], b"record");
        assert_eq!(bytes[24..32], 24_u64.to_ne_bytes());
        assert_eq!(bytes[32..36], 41_i32.to_ne_bytes());
        assert_eq!(bytes[36..40], 70_i32.to_ne_bytes());
        assert_eq!(&bytes[40..48], b"context!");
    }

    #[test]
    fn what_does_not_fit_is_lost_and_said_so() {
        for room in 0..22 {
            let mut control = Control::new(room);
            control.add(abi::SOL_IP, RECORDS, b"record");
            assert!(control.truncated, "{room}");
            assert_eq!(control.used, 0);
        }
        // Without room for the padding it fits.
        let mut control = Control::new(22);
        control.add(abi::SOL_IP, RECORDS, b"record");
        assert_eq!((control.truncated, control.used), (false, 22));
        control.add(abi::SOL_IP, CONTEXT, b"");
        assert_eq!((control.truncated, control.used), (true, 22));
    }

    #[test]
    fn a_dual_stack_socket_has_the_objects_of_ipv4_for_mapped_sources() {
        let mut v6 = [0_u8; 28];
        v6[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        v6[8] = 0x20;
        assert_eq!(wanted_of(ALL, &v6), (41, [true, false]));
        v6[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        assert_eq!(wanted_of(ALL, &v6), (0, [true, true]));
        let mut v4 = [0_u8; 16];
        v4[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        assert_eq!(wanted_of(ALL, &v4), (0, [true, true]));
    }

    #[test]
    fn records_are_taken_out_and_the_rest_passes() {
        let mut control = Control::new(256);
        control.add(abi::SOL_IP, libc::IP_TTL, &[9, 0, 0, 0]);
        control.add(abi::SOL_IPV6, RECORDS, b"the record");
        control.add(abi::SOL_IP, libc::IP_TOS, &[8]);
        let outgoing = Outgoing::split(&control.bytes[..control.used]).unwrap();
        assert_eq!(outgoing.records.as_deref(), Some(&b"the record"[..]));
        let mut native = Control::new(256);
        native.add(abi::SOL_IP, libc::IP_TTL, &[9, 0, 0, 0]);
        native.add(abi::SOL_IP, libc::IP_TOS, &[8]);
        assert_eq!(outgoing.native, native.bytes[..native.used]);
    }

    #[test]
    fn malformed_control_data_is_refused() {
        let mut twice = Control::new(256);
        twice.add(abi::SOL_IP, RECORDS, b"one");
        twice.add(abi::SOL_IP, RECORDS, b"two");
        let mut context = Control::new(256);
        context.add(abi::SOL_IP, CONTEXT, b"mine");
        let mut long = Control::new(256);
        long.add(abi::SOL_IP, RECORDS, b"record");
        long.bytes[0] = 0xff;
        let mut short = Control::new(256);
        short.add(abi::SOL_IP, RECORDS, b"record");
        short.bytes[0] = 15;
        for control in [twice, context, long, short] {
            assert_eq!(Outgoing::split(&control.bytes[..control.used]), Err(wsa::EINVAL));
        }
        // Less than a header is nothing.
        assert_eq!(Outgoing::split(&[1; 15]), Ok(Outgoing::default()));
    }
}

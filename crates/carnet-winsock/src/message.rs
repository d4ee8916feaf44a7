//! `WSARecvMsg` and `WSASendMsg`: messages with ancillary data, redirect records among it
//! (contract U1..U5, U9).
//!
//! A control message has the same layout on both systems, and those of Linux pass through. Records
//! and contexts are no control messages of Linux: they are taken from and given to the engine's
//! socket options, see [`flows`].
//!
//! An overlapped one that cannot be done at once is an operation: the executor does it when the
//! socket is ready, and writes the caller's `WSAMSG` with the result.
#![expect(unsafe_code, reason = "sendmsg(2) and recvmsg(2) with buffers of the caller's")]

use crate::contract::{Failure, error_of_errno, status, wsa};
use crate::flows::{self, Begin};
use crate::ioctl::{self, Target};
use crate::memory::{CallerPtr, Fault, MOST, Overlapped};
use crate::operation::{Outcome, Work, complete_at_once};
use crate::process::process;
use crate::sockets::{Socket, Wanted};
use crate::sys;
use crate::thread::CompletionRoutine;
use carnet_core::abi;
use std::os::fd::RawFd;

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

/// An operation's arguments that are the same for both functions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) socket: usize,
    pub(crate) message: CallerPtr,
    /// `lpdwNumberOfBytesRecvd` or `lpNumberOfBytesSent`.
    pub(crate) count: CallerPtr,
    pub(crate) overlapped: CallerPtr,
    pub(crate) routine: Option<CompletionRoutine>,
}

/// The fields of a `WSAMSG`.
#[derive(Debug)]
struct Message {
    place: CallerPtr,
    name: CallerPtr,
    name_length: usize,
    /// Address and length of each buffer.
    buffers: Vec<(usize, usize)>,
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
        let bytes: [u8; Self::SIZE] = place.read().map_err(fault)?;
        let word = |at: usize| {
            bytes.get(at..at + 8).and_then(|v| v.try_into().ok()).map_or(0, usize::from_ne_bytes)
        };
        let half = |at: usize| {
            bytes.get(at..at + 4).and_then(|v| v.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        // SAFETY: the message says that these are its places.
        let at = |offset| unsafe { CallerPtr::new(word(offset)) };
        let count = half(24) as usize;
        if count * Self::BUFFER > MOST {
            return Err(wsa::EMSGSIZE);
        }
        let buffers = at(16).read_vec(count * Self::BUFFER).map_err(fault)?;
        let buffers = buffers.chunks_exact(Self::BUFFER).map(|buffer| {
            let (length, address) = buffer.split_at(8);
            let length = length.first_chunk().map_or(0, |v| u32::from_ne_bytes(*v));
            let address = address.first_chunk().map_or(0, |v| usize::from_ne_bytes(*v));
            (address, length as usize)
        });
        Ok(Self {
            place,
            name: at(0),
            name_length: half(Self::NAME_LENGTH) as usize,
            buffers: buffers.collect(),
            control: at(40),
            control_length: half(Self::CONTROL_LENGTH) as usize,
            flags: half(Self::FLAGS),
        })
    }

    /// As the kernel wants them.
    fn vectors(&self) -> Vec<libc::iovec> {
        let vector = |&(address, iov_len): &(usize, usize)| libc::iovec {
            iov_base: address as *mut _,
            iov_len,
        };
        self.buffers.iter().map(vector).collect()
    }

    /// Checks the buffers, which would otherwise be found bad when it is too late to say so.
    fn check_buffers(&self, check: fn(CallerPtr, usize) -> Result<(), Fault>) -> Result<(), i32> {
        self.buffers.iter().try_for_each(|&(address, length)| {
            // SAFETY: the message says that this is a buffer of it.
            check(unsafe { CallerPtr::new(address) }, length).map_err(fault)
        })
    }
}

fn fault(Fault: Fault) -> i32 {
    wsa::EFAULT
}

/// A message to be received: what was in its `WSAMSG` when the call was made.
#[derive(Debug)]
pub(crate) struct Receive(Message);

impl Receive {
    fn read(place: CallerPtr) -> Result<Self, i32> {
        let message = Message::read(place)?;
        message.place.check_writable(Message::SIZE).map_err(fault)?;
        message.control.check_writable(message.control_length).map_err(fault)?;
        if !message.name.is_null() {
            message.name.check_writable(message.name_length.min(NAME)).map_err(fault)?;
        }
        Ok(Self(message))
    }

    /// Receives it into its buffers. Nothing else of the caller's is written yet.
    fn perform(&self, fd: RawFd, socket: Socket, flags: i32) -> Result<Received, i32> {
        let message = &self.0;
        let mut buffers = message.vectors();
        // The kernel's control messages come here first, so that others can follow them.
        let mut control = Control::new(message.control_length.min(MOST));
        let mut name = vec![0; NAME];
        // SAFETY: zero is a valid value of every field.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_name = name.as_mut_ptr().cast();
        header.msg_namelen = name.len() as libc::socklen_t;
        header.msg_iov = buffers.as_mut_ptr();
        header.msg_iovlen = buffers.len() as _;
        header.msg_control = control.bytes.as_mut_ptr().cast();
        header.msg_controllen = control.bytes.len() as _;
        let flags = message.flags.cast_signed() | flags;
        // SAFETY: name, control and the list of buffers are ours and outlive the call; the buffers
        // are the caller's, for this purpose, and checked by the kernel.
        let count = unsafe { libc::recvmsg(fd, &raw mut header, flags) };
        if count < 0 {
            return Err(error_of_errno(sys::errno()));
        }
        control.used = header.msg_controllen as usize;
        control.truncated = header.msg_flags & libc::MSG_CTRUNC != 0;
        name.truncate(header.msg_namelen as usize);
        // The queue of errors has no datagrams that came.
        if flags & libc::MSG_ERRQUEUE == 0 {
            control.add_redirection(fd, socket, &name, flags & libc::MSG_PEEK != 0);
        }
        let lost = if control.truncated { libc::MSG_CTRUNC } else { 0 };
        control.bytes.truncate(control.used);
        Ok(Received {
            place: message.place,
            name_place: message.name,
            name_room: message.name_length,
            control_place: message.control,
            name,
            control: control.bytes,
            flags: header.msg_flags & !libc::MSG_CMSG_CLOEXEC | lost,
            bytes: count as u32,
        })
    }
}

/// A message that was received, all but its buffers still to be written to the caller's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    place: CallerPtr,
    name_place: CallerPtr,
    name_room: usize,
    control_place: CallerPtr,
    name: Vec<u8>,
    control: Vec<u8>,
    flags: i32,
    bytes: u32,
}

impl Received {
    /// Writes the source, the control data, and the fields of the `WSAMSG` that say how long they
    /// are and what was lost.
    pub(crate) fn store(&self) -> Result<(), Fault> {
        if !self.name_place.is_null() {
            let fitting = self.name.get(..self.name_room).unwrap_or(&self.name);
            self.name_place.write(fitting)?;
            self.place.at(Message::NAME_LENGTH).write_u32(self.name.len() as u32)?;
        }
        self.control_place.write(&self.control)?;
        self.place.at(Message::CONTROL_LENGTH).write_u32(self.control.len() as u32)?;
        self.place.at(Message::FLAGS).write_u32(self.flags.cast_unsigned())
    }

    /// The message is there as far as it fits, and the result says that it did not.
    fn is_truncated(&self) -> bool {
        self.flags & libc::MSG_TRUNC != 0
    }

    /// What a completion reports: status and bytes.
    pub(crate) fn status(&self) -> (u32, u32) {
        let status = if self.is_truncated() { status::BUFFER_OVERFLOW } else { status::SUCCESS };
        (status, self.bytes)
    }
}

/// A message to be sent: all of it but its buffers is copied.
#[derive(Debug)]
pub(crate) struct Send {
    message: Message,
    name: Vec<u8>,
    control: Outgoing,
    flags: i32,
}

impl Send {
    fn read(place: CallerPtr, flags: u32) -> Result<Self, i32> {
        let message = Message::read(place)?;
        if message.control_length > MOST {
            return Err(wsa::EINVAL);
        }
        let name = if message.name.is_null() { 0 } else { message.name_length.min(NAME) };
        let name = message.name.read_vec(name).map_err(fault)?;
        let control = message.control.read_vec(message.control_length).map_err(fault)?;
        let control = Outgoing::split(&control)?;
        Ok(Self { message, name, control, flags: flags.cast_signed() | libc::MSG_NOSIGNAL })
    }

    /// Sends it: the number of bytes.
    fn perform(&self, fd: RawFd, socket: Socket, flags: i32) -> Result<u32, i32> {
        let record = self.control.records.as_deref();
        if record.is_none() && self.name.is_empty() || !flows::has_flows(fd) {
            // Records are for datagrams (contract U1).
            return if record.is_some() { Err(wsa::EINVAL) } else { self.transmit(fd, flags) };
        }
        let flows = process().sockets.flows(socket);
        let waits = (self.flags | flags) & libc::MSG_DONTWAIT == 0;
        let sent = flows.send(fd, record, waits, |now| self.transmit(fd, flags | now))?;
        if let (true, Some(to)) = (socket.attributes.wanted.any(), flows::address(&self.name)) {
            flows.has_sent(to);
        }
        Ok(sent)
    }

    fn transmit(&self, fd: RawFd, flags: i32) -> Result<u32, i32> {
        let mut buffers = self.message.vectors();
        // SAFETY: zero is a valid value of every field.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        if !self.name.is_empty() {
            header.msg_name = self.name.as_ptr().cast_mut().cast();
            header.msg_namelen = self.name.len() as libc::socklen_t;
        }
        header.msg_iov = buffers.as_mut_ptr();
        header.msg_iovlen = buffers.len() as _;
        let control = &self.control.native;
        if !control.is_empty() {
            header.msg_control = control.as_ptr().cast_mut().cast();
            header.msg_controllen = control.len() as _;
        }
        // SAFETY: name, control and the list of buffers are ours and outlive the call, which only
        // reads them; the buffers are the caller's, for this purpose, and checked by the kernel.
        let count = unsafe { libc::sendmsg(fd, &raw const header, self.flags | flags) };
        if count < 0 { Err(error_of_errno(sys::errno())) } else { Ok(count as u32) }
    }
}

/// What operations of one kind on one socket wait in, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Receive,
    /// The queue of errors, which fills by itself.
    ReceiveError,
    Send,
}

impl Lane {
    /// What of `epoll(7)` says that the socket may be ready; errors are always said.
    pub(crate) fn events(self) -> u32 {
        match self {
            Self::Receive | Self::ReceiveError => libc::EPOLLIN.cast_unsigned(),
            Self::Send => libc::EPOLLOUT.cast_unsigned(),
        }
    }
}

/// A message to be received or sent without waiting.
#[derive(Debug)]
pub(crate) enum Transfer {
    Receive(Receive),
    Send(Send),
}

impl Transfer {
    pub(crate) fn lane(&self) -> Lane {
        match self {
            Self::Receive(Receive(message)) => {
                let of_errors = message.flags.cast_signed() & libc::MSG_ERRQUEUE != 0;
                if of_errors { Lane::ReceiveError } else { Lane::Receive }
            }
            Self::Send(_) => Lane::Send,
        }
    }

    /// Receives or sends it if the socket is ready for it, by this descriptor of it.
    pub(crate) fn attempt(&self, fd: RawFd, socket: Socket) -> Option<Outcome> {
        let result = match self {
            Self::Receive(receive) => {
                receive.perform(fd, socket, libc::MSG_DONTWAIT).map(Outcome::Received)
            }
            Self::Send(send) => send.perform(fd, socket, libc::MSG_DONTWAIT).map(Outcome::Sent),
        };
        match result {
            Ok(outcome) => Some(outcome),
            Err(wsa::EWOULDBLOCK) => None,
            Err(error) => Some(Outcome::NotTransferred(error)),
        }
    }

    /// What would be found bad in another thread, too late to be said at once (contract W5).
    fn check_buffers(&self) -> Result<(), i32> {
        match self {
            Self::Receive(Receive(message)) => message.check_buffers(CallerPtr::check_writable),
            Self::Send(send) => send.message.check_buffers(CallerPtr::check_readable),
        }
    }
}

fn find(call: &Call) -> Result<Socket, i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    process().sockets.find(call.socket)
}

fn is_overlapped(call: &Call, socket: Socket) -> bool {
    socket.attributes.overlapped && !call.overlapped.is_null()
}

/// `WSARecvMsg`.
pub(crate) fn receive(call: &Call) -> Result<(), i32> {
    let socket = find(call)?;
    if is_overlapped(call, socket) {
        check_kind(socket.fd)?;
        return overlapped(call, socket, |place| Receive::read(place).map(Transfer::Receive));
    }
    let receive = Receive::read(call.message)?;
    check_count(call)?;
    let received = receive.perform(socket.fd, socket, 0)?;
    received.store().map_err(fault)?;
    store_count(call, received.bytes)?;
    if received.is_truncated() { Err(wsa::EMSGSIZE) } else { Ok(()) }
}

/// `WSASendMsg`.
pub(crate) fn send(call: &Call, flags: u32) -> Result<(), i32> {
    let socket = find(call)?;
    if is_overlapped(call, socket) {
        check_kind(socket.fd)?;
        return send_overlapped(call, socket, flags);
    }
    check_count(call)?;
    let sent = Send::read(call.message, flags)?.perform(socket.fd, socket, 0)?;
    store_count(call, sent)
}

/// An overlapped one, on a socket of any kind.
pub(crate) fn send_overlapped(call: &Call, socket: Socket, flags: u32) -> Result<(), i32> {
    overlapped(call, socket, |place| Send::read(place, flags).map(Transfer::Send))
}

/// The count need not be asked for.
fn check_count(call: &Call) -> Result<(), i32> {
    if call.count.is_null() { Ok(()) } else { call.count.check_writable(4).map_err(fault) }
}

fn store_count(call: &Call, count: u32) -> Result<(), i32> {
    if call.count.is_null() { Ok(()) } else { call.count.write_u32(count).map_err(fault) }
}

/// At once if that is possible and nothing else waits for the same; otherwise it pends, whether the
/// socket is a blocking one or not.
fn overlapped(
    call: &Call,
    socket: Socket,
    read: impl FnOnce(CallerPtr) -> Result<Transfer, i32>,
) -> Result<(), i32> {
    let overlapped = Overlapped(call.overlapped);
    check_count(call)?;
    let notification = ioctl::notification(overlapped, call.routine, Target::Caller)?;
    let transfer = read(call.message)?;
    transfer.check_buffers()?;
    let pending = &process().pending;
    let outcome = if pending.any_in(socket, transfer.lane()) {
        None
    } else {
        transfer.attempt(socket.fd, socket)
    };
    let Some(outcome) = outcome else {
        let work = Work::Transfer(transfer);
        pending.begin(socket, overlapped, notification, work).map_err(Failure::code)?;
        return Err(wsa::IO_PENDING);
    };
    let bytes = match &outcome {
        Outcome::NotTransferred(error) => return Err(*error),
        Outcome::Received(received) if !received.is_truncated() => received.bytes,
        Outcome::Sent(bytes) => *bytes,
        // That a message was cut is said by its completion, with what there is of it.
        _ => {
            complete_at_once(overlapped, &notification, &outcome);
            return Err(wsa::IO_PENDING);
        }
    };
    // The completion is the last that is written, and it comes in any case (W3).
    let counted = store_count(call, bytes);
    complete_at_once(overlapped, &notification, &outcome);
    counted
}

/// Overlapped messages are for sockets of datagrams of IPv4 and IPv6.
fn check_kind(fd: RawFd) -> Result<(), i32> {
    let option = |name| sys::get_int(fd, libc::SOL_SOCKET, name).map_err(error_of_errno);
    let inet = matches!(option(libc::SO_DOMAIN)?, libc::AF_INET | libc::AF_INET6);
    let datagrams = matches!(option(libc::SO_TYPE)?, libc::SOCK_DGRAM | libc::SOCK_RAW);
    if inet && datagrams { Ok(()) } else { Err(wsa::EOPNOTSUPP) }
}

/// The longest address that there is.
const NAME: usize = size_of::<libc::sockaddr_storage>();

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

    /// Adds what was asked for of the flow, if the datagram from this source begins one.
    fn add_redirection(&mut self, fd: RawFd, socket: Socket, source: &[u8], peeked: bool) {
        let (level, [records, context]) = wanted_of(socket.attributes.wanted, source);
        if !(records || context) || !flows::has_flows(fd) {
            return;
        }
        let Some(address) = flows::address(source) else {
            return;
        };
        let flows = process().sockets.flows(socket);
        let Some(Begin { record, context: bytes }) = flows.receive(address, peeked) else {
            return;
        };
        if records {
            self.add(level, RECORDS, &record);
        }
        if context && !bytes.is_empty() {
            self.add(level, CONTEXT, &bytes);
        }
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
                    // To the engine, no bytes at all mean something else.
                    let twice = outgoing.records.replace(value.to_vec()).is_some();
                    if twice || value.is_empty() {
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

/// For the fuzzer (`fuzz/`): control data of messages, both ways.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::{Control, Outgoing};

    /// What the kernel is to see of control data that is sent, and the record in it. `None` if it is
    /// refused.
    pub fn split(control: &[u8]) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
        let Outgoing { native, records } = Outgoing::split(control).ok()?;
        Some((native, records))
    }

    /// Control data with these objects (level, kind and value), in `room` bytes; and whether all of
    /// them had room.
    pub fn join(room: usize, objects: &[(i32, i32, Vec<u8>)]) -> (Vec<u8>, bool) {
        let mut control = Control::new(room);
        for (level, kind, value) in objects {
            control.add(*level, *kind, value);
        }
        control.bytes.truncate(control.used);
        (control.bytes, !control.truncated)
    }

    /// Whether this is the id of an extension function.
    pub fn is_extension(guid: &[u8]) -> bool {
        super::extension_function(guid).is_some()
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
        let mut empty = Control::new(256);
        empty.add(abi::SOL_IP, RECORDS, b"");
        let mut context = Control::new(256);
        context.add(abi::SOL_IP, CONTEXT, b"mine");
        let mut long = Control::new(256);
        long.add(abi::SOL_IP, RECORDS, b"record");
        long.bytes[0] = 0xff;
        let mut short = Control::new(256);
        short.add(abi::SOL_IP, RECORDS, b"record");
        short.bytes[0] = 15;
        for control in [twice, empty, context, long, short] {
            assert_eq!(Outgoing::split(&control.bytes[..control.used]), Err(wsa::EINVAL));
        }
        // Less than a header is nothing.
        assert_eq!(Outgoing::split(&[1; 15]), Ok(Outgoing::default()));
    }
}

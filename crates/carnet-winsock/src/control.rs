//! Carrying out control codes: from what a caller asked for to socket options and back.

use crate::contract::{Control, Failure};
use crate::memory::{CallerPtr, Fault};
use crate::operation;
use crate::sockets::Socket;
use crate::sys::{self, Errno};
use carnet_core::abi;
use std::os::fd::RawFd;

/// No answer of the engine is longer; its own limits are less than half of it.
const LONGEST: usize = 4096;

/// Where an answer is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) place: CallerPtr,
    pub(crate) length: usize,
}

/// What a caller asked for, with all that was to be copied from its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// An option of the engine's whose value is the answer.
    Query {
        option: i32,
        output: Output,
    },
    /// A redirect record.
    SetRecords(Vec<u8>),
    /// A code that means nothing (contract W16).
    Unsupported,
    /// Cancel what pends on this socket.
    Flush(Socket),
    NonBlocking(bool),
    KeepAlive {
        on: bool,
        idle_ms: u32,
        interval_ms: u32,
    },
    ReadableBytes(Output),
    /// A value that needs no kernel to answer.
    Value {
        bytes: [u8; 8],
        output: Output,
    },
}

/// The bytes of an answer and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    bytes: Vec<u8>,
    output: Option<Output>,
}

impl Answer {
    const NOTHING: Self = Self { bytes: Vec::new(), output: None };

    pub(crate) fn length(&self) -> u32 {
        self.bytes.len() as u32
    }

    /// Writes it to the caller's buffer: the number of bytes.
    pub(crate) fn store(&self) -> Result<u32, Fault> {
        if let Some(output) = self.output {
            output.place.write(&self.bytes)?;
        }
        Ok(self.length())
    }

    /// It goes to the buffer if it fits (contract Q5, X3).
    fn fitting(bytes: Vec<u8>, output: Output) -> Result<Self, Failure> {
        if bytes.len() > output.length {
            return Err(Failure::BufferTooSmall { needed: bytes.len() as u32 });
        }
        Ok(Self { bytes, output: Some(output) })
    }
}

/// Carries out a request on a socket.
pub(crate) fn perform(fd: RawFd, request: &Request) -> Result<Answer, Failure> {
    match request {
        Request::Query { option, output } => {
            check_protocol(fd)?;
            let mut bytes = vec![0; LONGEST];
            let length = sys::get_option(fd, abi::LEVEL, *option, &mut bytes)
                .map_err(|errno| of_redirection(fd, errno))?;
            bytes.truncate(length);
            Answer::fitting(bytes, *output)
        }
        Request::SetRecords(record) => {
            check_protocol(fd)?;
            sys::set_option(fd, abi::LEVEL, abi::SET_REDIRECT_RECORDS, record)
                .map_err(|errno| of_redirection(fd, errno))?;
            Ok(Answer::NOTHING)
        }
        Request::Unsupported => Err(Failure::NotSupported),
        Request::Flush(socket) => {
            operation::cancel_of_socket(*socket);
            Ok(Answer::NOTHING)
        }
        Request::NonBlocking(on) => {
            sys::set_nonblocking(fd, *on).map_err(of_ordinary)?;
            Ok(Answer::NOTHING)
        }
        Request::KeepAlive { on, idle_ms, interval_ms } => {
            keep_alive(fd, *on, *idle_ms, *interval_ms).map_err(of_ordinary)?;
            Ok(Answer::NOTHING)
        }
        Request::ReadableBytes(output) => {
            let count = sys::readable_bytes(fd).map_err(of_ordinary)?;
            Answer::fitting(count.to_ne_bytes().to_vec(), *output)
        }
        Request::Value { bytes, output } => Answer::fitting(bytes.to_vec(), *output),
    }
}

/// What the errno of an option of the engine's stands for: on a socket of the wrong kind, that.
fn of_redirection(fd: RawFd, errno: Errno) -> Failure {
    check_kind(fd).err().unwrap_or_else(|| Failure::of_option(errno))
}

/// What the errno of an option that has nothing to do with the engine stands for.
fn of_ordinary(errno: Errno) -> Failure {
    match errno {
        libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::ENOTTY => Failure::NotSupported,
        errno => Failure::of_option(errno),
    }
}

/// Probes begin after so much silence, and follow one another so; in full seconds on Linux.
fn keep_alive(fd: RawFd, on: bool, idle_ms: u32, interval_ms: u32) -> Result<(), Errno> {
    let set = |level, option, value: i32| sys::set_option(fd, level, option, &value.to_ne_bytes());
    set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, i32::from(on))?;
    if on {
        let seconds = |ms: u32| ms.div_ceil(1000).max(1) as i32;
        set(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, seconds(idle_ms))?;
        set(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, seconds(interval_ms))?;
    }
    Ok(())
}

/// The engine answers on UDP sockets too, whose records come as ancillary data instead (contract U1).
fn check_protocol(fd: RawFd) -> Result<(), Failure> {
    let protocol = sys::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL);
    if protocol.is_ok_and(is_tcp) { Ok(()) } else { check_kind(fd) }
}

fn is_tcp(protocol: i32) -> bool {
    matches!(protocol, libc::IPPROTO_TCP | libc::IPPROTO_MPTCP)
}

/// The three codes are for TCP over IPv4 or IPv6. Another family's provider does not support them
/// (contract S37b); another type of socket is an unacceptable one (S34c).
pub(crate) fn check_kind(fd: RawFd) -> Result<(), Failure> {
    let option = |name| sys::get_int(fd, libc::SOL_SOCKET, name).map_err(Failure::of_option);
    if !matches!(option(libc::SO_DOMAIN)?, libc::AF_INET | libc::AF_INET6) {
        return Err(Failure::NotSupported);
    }
    if is_tcp(option(libc::SO_PROTOCOL)?) { Ok(()) } else { Err(Failure::Invalid) }
}

/// What is wrong with the socket itself, before its arguments are looked at (contract W36). Asked
/// only where an argument is bad; else the engine says it.
pub(crate) fn check_state(fd: RawFd, control: Control) -> Result<(), Failure> {
    /// `TCP_CLOSE`, `TCP_LISTEN` and `TCP_SYN_SENT`, in the first byte of `TCP_INFO`.
    const CLOSE: u8 = 7;
    const LISTEN: u8 = 10;
    const SYN_SENT: u8 = 2;
    check_kind(fd)?;
    let mut state = [CLOSE];
    sys::get_option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut state)
        .map_err(Failure::of_option)?;
    match (control, state[0]) {
        (Control::SetRecords, CLOSE) => Ok(()),
        (Control::SetRecords, _) => Err(Failure::Invalid),
        (_, CLOSE | LISTEN | SYN_SENT) => Err(Failure::NotConnected),
        _ => Ok(()),
    }
}

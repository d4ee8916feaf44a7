//! Windows: the three control codes, by `WSAIoctl`, and `SO_ORIGINAL_DST`.
#![expect(unsafe_code, reason = "getsockopt is a foreign function")]

mod ioctl;

use self::ioctl::{LIMIT, control, last_error, raw};
use crate::error::{Error, Operation};
use crate::growth::read_growing;
use crate::winsock::{explain, query_outcome};
use crate::{Flow, OriginalApp};
use socket2::SockAddr;
use std::net::SocketAddr;
use std::os::windows::io::BorrowedSocket;
use windows_sys::Win32::Networking::WinSock::{
    SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT, SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS,
    SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS, SOL_SOCKET, getsockopt,
};

pub use std::os::windows::io::AsSocket;

/// `SO_ORIGINAL_DST` at `SOL_SOCKET` (contract Q12).
const SO_ORIGINAL_DST: i32 = 0x300F;

pub(crate) fn query_redirect_records(socket: &impl AsSocket) -> Result<Vec<u8>, Error> {
    let code = SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS;
    query(socket.as_socket(), Operation::QueryRedirectRecords, code)
}

pub(crate) fn query_redirect_context(socket: &impl AsSocket) -> Result<Vec<u8>, Error> {
    let code = SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT;
    query(socket.as_socket(), Operation::QueryRedirectContext, code)
}

pub(crate) fn set_redirect_records(socket: &impl AsSocket, record: &[u8]) -> Result<(), Error> {
    let code = SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS;
    control(socket.as_socket(), code, record, &mut [], LIMIT)
        .0
        .map_err(|code| explain(Operation::SetRedirectRecords, code))
}

pub(crate) fn export_redirect_records(_socket: &impl AsSocket) -> Result<Vec<u8>, Error> {
    Err(Error::Unsupported { operation: Operation::ExportRedirectRecords })
}

pub(crate) fn import_redirect_records(
    _socket: &impl AsSocket,
    _record: &[u8],
) -> Result<(), Error> {
    Err(Error::Unsupported { operation: Operation::ImportRedirectRecords })
}

pub(crate) fn register_listener(_socket: &impl AsSocket) -> Result<(), Error> {
    Err(Error::Unsupported { operation: Operation::RegisterListener })
}

pub(crate) fn original_app(_socket: &impl AsSocket) -> Result<OriginalApp, Error> {
    Err(Error::Unsupported { operation: Operation::OriginalApp })
}

pub(crate) fn flow(_socket: &impl AsSocket) -> Result<Flow, Error> {
    Err(Error::Unsupported { operation: Operation::Flow })
}

/// There are no tickets: record and destination do.
pub(crate) fn onwards(_socket: &impl AsSocket) -> Option<(SocketAddr, u64)> {
    None
}

/// See [`onwards`].
pub(crate) fn carry_on(_socket: &impl AsSocket, _ticket: u64) -> Result<(), Error> {
    Err(Error::Unsupported { operation: Operation::SetRedirectRecords })
}

pub(crate) fn original_destination(socket: &impl AsSocket) -> Result<SocketAddr, Error> {
    let operation = Operation::OriginalDestination;
    let socket = socket.as_socket();
    let fill = |storage: *mut socket2::SockAddrStorage, length: *mut socket2::socklen_t| {
        // SAFETY: the socket is open while it is borrowed; `try_init` gives a storage that is
        // valid for writes of `*length` bytes, and a valid `length`.
        let status =
            unsafe { getsockopt(raw(socket), SOL_SOCKET, SO_ORIGINAL_DST, storage.cast(), length) };
        if status == 0 { Ok(()) } else { Err(last_error()) }
    };
    let mut code = 0;
    // SAFETY: a successful getsockopt has written a socket address and its length.
    let answer = unsafe {
        SockAddr::try_init(|storage, length| {
            fill(storage, length).map_err(|refused| {
                code = refused;
                std::io::Error::from_raw_os_error(refused)
            })
        })
    };
    let (_, address) = answer.map_err(|_| explain(operation, code))?;
    let length = address.len() as usize;
    address.as_socket().ok_or(Error::InvalidAnswer { operation, length })
}

fn query(socket: BorrowedSocket<'_>, operation: Operation, code: u32) -> Result<Vec<u8>, Error> {
    let answer = read_growing(operation, |buffer| {
        let (result, returned) = control(socket, code, &[], buffer, LIMIT);
        query_outcome(operation, result, returned, buffer.len())
    })?;
    if answer.is_empty() { Err(Error::NotRedirected { operation }) } else { Ok(answer) }
}

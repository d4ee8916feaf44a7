//! Linux: the socket options of [`carnet_core::abi`], which the kernel engine answers.
#![expect(unsafe_code, reason = "no safe library has getsockopt and setsockopt of any option")]

use crate::error::{Error, Operation};
use crate::growth::{Attempt, read_growing};
use crate::{Flow, OriginalApp};
use carnet_core::abi::{self, FlowInfo, OnwardsInfo};
use carnet_core::address::Endpoint;
use carnet_core::record::AppIdentity;
use socket2::{Domain, Protocol, SockRef, Type};
use std::ffi::OsString;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

pub use std::os::fd::AsFd as AsSocket;

pub(crate) fn query_redirect_records(socket: &impl AsSocket) -> Result<Vec<u8>, Error> {
    let (option, length) = (abi::QUERY_REDIRECT_RECORDS, abi::REDIRECT_RECORDS_LENGTH);
    query_blob(socket.as_fd(), Operation::QueryRedirectRecords, option, length)
}

pub(crate) fn query_redirect_context(socket: &impl AsSocket) -> Result<Vec<u8>, Error> {
    let (option, length) = (abi::QUERY_REDIRECT_CONTEXT, abi::REDIRECT_CONTEXT_LENGTH);
    query_blob(socket.as_fd(), Operation::QueryRedirectContext, option, length)
}

pub(crate) fn set_redirect_records(socket: &impl AsSocket, record: &[u8]) -> Result<(), Error> {
    set(socket.as_fd(), Operation::SetRedirectRecords, abi::SET_REDIRECT_RECORDS, record)
}

pub(crate) fn export_redirect_records(socket: &impl AsSocket) -> Result<Vec<u8>, Error> {
    let (option, length) = (abi::EXPORT_RECORD, abi::REDIRECT_RECORDS_LENGTH);
    query_blob(socket.as_fd(), Operation::ExportRedirectRecords, option, length)
}

/// With an empty record: asks whether the caller may.
pub(crate) fn import_redirect_records(socket: &impl AsSocket, record: &[u8]) -> Result<(), Error> {
    set(socket.as_fd(), Operation::ImportRedirectRecords, abi::IMPORT_RECORD, record)
}

pub(crate) fn register_listener(socket: &impl AsSocket) -> Result<(), Error> {
    set(socket.as_fd(), Operation::RegisterListener, abi::REGISTER_LISTENER, &[])
}

pub(crate) fn original_destination(socket: &impl AsSocket) -> Result<SocketAddr, Error> {
    let operation = Operation::OriginalDestination;
    let endpoint: Endpoint = query_value(socket.as_fd(), operation, abi::ORIGINAL_DESTINATION)?;
    Ok(socket_address(&endpoint))
}

/// Where an accepted connection was going, and the ticket with which [`carry_on`] continues its flow.
/// `None`: take destination and record instead; that tells the error, too, if there is one.
pub(crate) fn onwards(socket: &impl AsSocket) -> Option<(SocketAddr, u64)> {
    let operation = Operation::OriginalDestination;
    let info: OnwardsInfo = query_value(socket.as_fd(), operation, abi::ONWARDS).ok()?;
    (info.ticket != 0).then(|| (socket_address(&info.destination), info.ticket))
}

/// Sets the record of the accepted connection with this ticket.
pub(crate) fn carry_on(socket: &impl AsSocket, ticket: u64) -> Result<(), Error> {
    set(socket.as_fd(), Operation::SetRedirectRecords, abi::CARRY_ON, ticket.as_bytes())
}

pub(crate) fn original_app(socket: &impl AsSocket) -> Result<OriginalApp, Error> {
    query_value(socket.as_fd(), Operation::OriginalApp, abi::ORIGINAL_APP).map(application)
}

pub(crate) fn flow(socket: &impl AsSocket) -> Result<Flow, Error> {
    query_value(socket.as_fd(), Operation::Flow, abi::FLOW).map(flow_of)
}

fn flow_of(info: FlowInfo) -> Flow {
    Flow {
        id: info.flow,
        handle: info.handle,
        filter: info.filter,
        began: Duration::from_nanos(info.began_ns),
        hops: info.hops,
        legs: info.legs,
    }
}

/// An endpoint in the family of its socket: a mapped address stays mapped.
pub(crate) fn socket_address(endpoint: &Endpoint) -> SocketAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(endpoint.address.as_bytes());
    let address = Ipv6Addr::from(octets);
    match address.to_ipv4_mapped() {
        Some(v4) if endpoint.family == carnet_core::address::AF_INET => (v4, endpoint.port).into(),
        _ => (address, endpoint.port).into(),
    }
}

pub(crate) fn application(app: AppIdentity) -> OriginalApp {
    let until_zero = |bytes: &[u8]| {
        let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        OsString::from_vec(text.to_vec())
    };
    let path = app.path.get(..app.path_length as usize).unwrap_or(&app.path);
    OriginalApp {
        pid: app.pid,
        uid: app.uid,
        gid: app.gid,
        cgroup: app.cgroup,
        network_namespace: app.netns,
        executable: (app.path_length > 0).then(|| until_zero(path).into()),
        executable_device: app.executable.device,
        executable_inode: app.executable.inode,
        started: Duration::from_nanos(app.started_ns),
        command: until_zero(&app.command),
    }
}

/// Reads an option whose value has a fixed layout. A longer one would not fit, which is an error.
fn query_value<T: FromBytes + IntoBytes>(
    socket: BorrowedFd<'_>,
    operation: Operation,
    option: i32,
) -> Result<T, Error> {
    // No byte more: what fits into 32, the kernel does not allocate memory for.
    let mut value = T::new_zeroed();
    let length = get_option(socket, abi::LEVEL, option, value.as_mut_bytes())
        .map_err(|error| explain(operation, error, || Kind::of(socket)))?;
    if length == size_of::<T>() {
        Ok(value)
    } else {
        Err(Error::InvalidAnswer { operation, length })
    }
}

/// Reads an option whose value has any length.
fn query_blob(
    socket: BorrowedFd<'_>,
    operation: Operation,
    option: i32,
    length_option: i32,
) -> Result<Vec<u8>, Error> {
    read_growing(operation, |buffer| match get_option(socket, abi::LEVEL, option, buffer) {
        Ok(length) => Ok(Attempt::Filled(length)),
        Err(error) if error.raw_os_error() == Some(abi::errno::ERANGE) => {
            // A failing getsockopt cannot say what it needs; this option can (contract Q4).
            let needed = query_value::<u32>(socket, operation, length_option)? as usize;
            let otherwise = Error::InvalidAnswer { operation, length: needed };
            Ok(Attempt::TooSmall { needed: Some(needed), otherwise })
        }
        Err(error) => Err(explain(operation, error, || Kind::of(socket))),
    })
}

fn set(
    socket: BorrowedFd<'_>,
    operation: Operation,
    option: i32,
    value: &[u8],
) -> Result<(), Error> {
    set_option(socket, abi::LEVEL, option, value)
        .map_err(|error| explain(operation, error, || Kind::of(socket)))
}

/// What a socket is, as far as it tells why an option was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Not TCP (or MPTCP) or UDP over IPv4 or IPv6.
    Other,
    /// TCP, neither listening nor connected nor on the way to it.
    Idle,
    /// UDP, neither bound nor connected.
    Datagram,
    /// UDP, bound to a port and not connected.
    Bound,
    /// Listening.
    Listening,
    /// Connecting, connected, or closing.
    Busy,
}

impl Kind {
    fn of(socket: BorrowedFd<'_>) -> Self {
        let view = SockRef::from(&socket);
        if !matches!(view.domain(), Ok(Domain::IPV4 | Domain::IPV6)) {
            return Self::Other;
        }
        match (view.r#type(), view.protocol()) {
            (Ok(Type::STREAM), Ok(Some(Protocol::TCP | Protocol::MPTCP))) => {}
            (Ok(Type::DGRAM), Ok(Some(Protocol::UDP))) => {
                let port = view.local_addr().ok().and_then(|own| own.as_socket()).map(|a| a.port());
                return match (view.peer_addr().is_ok(), port) {
                    (true, _) => Self::Busy,
                    (false, None | Some(0)) => Self::Datagram,
                    (false, Some(_)) => Self::Bound,
                };
            }
            _ => return Self::Other,
        }
        if view.is_listener().unwrap_or(false) {
            return Self::Listening;
        }
        // The first byte of the answer is the state.
        let mut state = [0];
        match get_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut state) {
            Ok(_) if i32::from(state[0]) != TCP_CLOSE => Self::Busy,
            _ => Self::Idle,
        }
    }
}

/// The state of a socket that is not connected, in `TCP_INFO`.
const TCP_CLOSE: i32 = 7;

/// The error that an errno stands for: the table of [`carnet_core::abi`], with the help of what
/// the socket is where one errno has several causes.
fn explain(operation: Operation, error: io::Error, kind: impl FnOnce() -> Kind) -> Error {
    use Operation::{
        ExportRedirectRecords, ImportRedirectRecords, RegisterListener, SetRedirectRecords,
    };
    match error.raw_os_error() {
        Some(libc::ENOPROTOOPT | abi::errno::EOPNOTSUPP) => match kind() {
            Kind::Other => Error::WrongSocket { operation },
            _ => Error::NoEngine { operation },
        },
        Some(abi::errno::EINVAL) => match (operation, kind()) {
            (_, Kind::Other) => Error::WrongSocket { operation },
            (ExportRedirectRecords, _) | (ImportRedirectRecords, Kind::Bound | Kind::Datagram) => {
                Error::Unsupported { operation }
            }
            (SetRedirectRecords, Kind::Idle | Kind::Datagram | Kind::Bound)
            | (ImportRedirectRecords, Kind::Idle) => Error::InvalidRecord,
            (SetRedirectRecords | ImportRedirectRecords, _) => Error::AlreadyConnected,
            (RegisterListener, Kind::Listening | Kind::Bound) => Error::BoundToDevice,
            (RegisterListener, _) => Error::NotListening,
            _ => Error::Os { operation, source: error },
        },
        Some(abi::errno::ENOTCONN) => Error::NotConnected { operation },
        Some(abi::errno::ENODATA) => Error::NotRedirected { operation },
        Some(abi::errno::EACCES) if operation == ImportRedirectRecords => Error::NotAGateway,
        Some(abi::errno::EACCES) => Error::AccessDenied { operation },
        Some(abi::errno::ELOOP) if operation == ImportRedirectRecords => Error::Endless,
        Some(abi::errno::ENOSPC) if operation == RegisterListener => Error::TooManyListeners,
        _ => Error::Os { operation, source: error },
    }
}

/// `getsockopt(2)`: fills `value` from its beginning and returns how many bytes the kernel says
/// that it wrote.
fn get_option(
    socket: BorrowedFd<'_>,
    level: i32,
    option: i32,
    value: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: the descriptor is open while it is borrowed; `value` is valid for writes of
    // `length` bytes, which are at most its length, and any bytes are valid in it.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if status == 0 { Ok(length as usize) } else { Err(io::Error::last_os_error()) }
}

/// `setsockopt(2)`.
fn set_option(socket: BorrowedFd<'_>, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open while it is borrowed; `value` is valid for reads of `length`
    // bytes.
    let status = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), length)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// For the fuzzer (`fuzz/`): answers of the kernel, of any bytes and claimed length.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::{Flow, FromBytes, OriginalApp, application, flow_of, socket_address};

    /// The value that the kernel has written to a buffer, of which it says that it used so many bytes.
    fn value_in<T: FromBytes>(buffer: &[u8], length: usize) -> Option<T> {
        T::read_from_bytes(buffer.get(..length).unwrap_or_default()).ok()
    }

    /// An answer to [`ORIGINAL_DESTINATION`](carnet_core::abi::ORIGINAL_DESTINATION).
    pub fn destination(buffer: &[u8], length: usize) -> Option<std::net::SocketAddr> {
        value_in(buffer, length).map(|endpoint| socket_address(&endpoint))
    }

    /// An answer to [`ORIGINAL_APP`](carnet_core::abi::ORIGINAL_APP).
    pub fn app(buffer: &[u8], length: usize) -> Option<OriginalApp> {
        value_in(buffer, length).map(application)
    }

    /// An answer to [`FLOW`](carnet_core::abi::FLOW).
    pub fn flow(buffer: &[u8], length: usize) -> Option<Flow> {
        value_in(buffer, length).map(flow_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use zerocopy::FromZeros;

    #[test]
    fn kinds_of_sockets_are_told_apart() {
        let kind = |socket: &dyn AsFd| Kind::of(socket.as_fd());
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert_eq!(kind(&listener), Kind::Listening);
            assert_eq!(kind(&client), Kind::Busy);
            assert_eq!(kind(&accepted), Kind::Busy);
        }
        let idle = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(kind(&idle), Kind::Idle);
        let idle = socket2::Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
        assert_eq!(kind(&idle), Kind::Datagram);
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(kind(&datagrams), Kind::Bound);
        datagrams.connect(datagrams.local_addr().unwrap()).unwrap();
        assert_eq!(kind(&datagrams), Kind::Busy);
        assert_eq!(kind(&UnixStream::pair().unwrap().0), Kind::Other);
    }

    /// One row of the table: errno, operation, kind of the socket, the error by its name.
    #[test]
    fn the_errno_table() {
        use Kind::*;
        use Operation::*;
        let rows = [
            (libc::ENOPROTOOPT, QueryRedirectRecords, Busy, "NoEngine"),
            (libc::ENOPROTOOPT, SetRedirectRecords, Idle, "NoEngine"),
            (libc::EOPNOTSUPP, RegisterListener, Listening, "NoEngine"),
            (libc::EOPNOTSUPP, QueryRedirectRecords, Other, "WrongSocket"),
            (libc::EINVAL, QueryRedirectContext, Other, "WrongSocket"),
            (libc::EINVAL, SetRedirectRecords, Other, "WrongSocket"),
            (libc::EINVAL, SetRedirectRecords, Idle, "InvalidRecord"),
            (libc::EINVAL, SetRedirectRecords, Bound, "InvalidRecord"),
            (libc::EINVAL, SetRedirectRecords, Datagram, "InvalidRecord"),
            (libc::EINVAL, ImportRedirectRecords, Idle, "InvalidRecord"),
            (libc::EINVAL, ImportRedirectRecords, Busy, "AlreadyConnected"),
            (libc::EINVAL, ImportRedirectRecords, Bound, "Unsupported"),
            (libc::EINVAL, ImportRedirectRecords, Datagram, "Unsupported"),
            (libc::EINVAL, ExportRedirectRecords, Busy, "Unsupported"),
            (libc::EACCES, ImportRedirectRecords, Idle, "NotAGateway"),
            (libc::EACCES, ExportRedirectRecords, Busy, "AccessDenied"),
            (libc::ELOOP, ImportRedirectRecords, Idle, "Endless"),
            (libc::ELOOP, SetRedirectRecords, Idle, "Os"),
            (libc::EINVAL, SetRedirectRecords, Busy, "AlreadyConnected"),
            (libc::EINVAL, SetRedirectRecords, Listening, "AlreadyConnected"),
            (libc::EINVAL, RegisterListener, Idle, "NotListening"),
            (libc::EINVAL, RegisterListener, Busy, "NotListening"),
            (libc::EINVAL, RegisterListener, Listening, "BoundToDevice"),
            (libc::EINVAL, RegisterListener, Bound, "BoundToDevice"),
            (libc::EINVAL, OriginalApp, Busy, "Os"),
            (libc::ENOTCONN, OriginalDestination, Listening, "NotConnected"),
            (libc::ENODATA, OriginalDestination, Busy, "NotRedirected"),
            (libc::EACCES, SetRedirectRecords, Idle, "AccessDenied"),
            (libc::EACCES, RegisterListener, Listening, "AccessDenied"),
            (libc::ENOSPC, RegisterListener, Listening, "TooManyListeners"),
            (libc::ENOSPC, SetRedirectRecords, Idle, "Os"),
            (libc::ENOMEM, RegisterListener, Listening, "Os"),
            (libc::EBADF, Flow, Busy, "Os"),
        ];
        for (errno, operation, kind, name) in rows {
            let error = explain(operation, io::Error::from_raw_os_error(errno), || kind);
            let text = format!("{error:?}");
            let found = text.split([' ', '{']).next().unwrap();
            assert_eq!(found, name, "errno {errno}, {operation:?}, {kind:?}");
        }
    }

    #[test]
    fn endpoints_become_addresses_of_the_same_family() {
        let mapped = [0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes([192, 0, 2, 1])];
        let v4 = Endpoint::v4(u32::from_ne_bytes([192, 0, 2, 1]), 80);
        assert_eq!(socket_address(&v4), "192.0.2.1:80".parse().unwrap());
        let v6 = Endpoint::v6(mapped, 80);
        assert_eq!(socket_address(&v6), "[::ffff:192.0.2.1]:80".parse().unwrap());
        let real = Endpoint::v6([0x2001_0db8_u32.to_be(), 0, 0, 1_u32.to_be()], 443);
        assert_eq!(socket_address(&real), "[2001:db8::1]:443".parse().unwrap());
    }

    #[test]
    fn texts_of_an_application_end_where_they_should() {
        let mut app = AppIdentity::new_zeroed();
        app.command[..4].copy_from_slice(b"curl");
        app.path[..20].copy_from_slice(b"/usr/bin/curl\0rest\0x");
        app.path_length = 20;
        let decoded = application(app);
        assert_eq!(decoded.command, "curl");
        assert_eq!(decoded.executable.unwrap(), std::path::Path::new("/usr/bin/curl"));

        // A length beyond the field is cut, not trusted.
        app.path.fill(b'x');
        app.command.fill(b'y');
        app.path_length = u32::MAX;
        let decoded = application(app);
        assert_eq!(decoded.executable.unwrap().as_os_str().len(), app.path.len());
        assert_eq!(decoded.command.len(), app.command.len());

        // A path that the kernel could not read is none, not an empty one.
        app.path_length = 0;
        assert_eq!(application(app).executable, None);
    }
}

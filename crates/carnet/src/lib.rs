//! The library that a redirect service links: connect redirection with redirect records.
//!
//! Carnet's kernel engine (on Windows: a WFP callout) diverts connections to a local *redirect
//! service*. The service accepts such a connection, looks at it, and connects onwards to where it
//! was going. So that this new connection is not diverted to the same service again, for ever, it
//! carries the *redirect record* of the accepted one: the service queries it there and sets it
//! here, without reading it.
//!
//! ```no_run
//! use std::net::TcpListener;
//!
//! let listener = TcpListener::bind("127.0.0.1:0")?;
//! carnet::register_listener(&listener)?;
//! for accepted in listener.incoming() {
//!     let accepted = accepted?;
//!     let onwards = carnet::connect_onwards(&accepted)?;
//!     // Relay between `accepted` and `onwards`.
//!     # let _ = onwards;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The process has to be in the cgroup of the service: `carnet service run NAME -- COMMAND` starts
//! it there. No privilege is needed otherwise, no library of the engine is linked, and nothing
//! here talks to a daemon: these are socket options ([`carnet_core::abi`]), on Windows the control
//! codes `SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS` and its siblings.
//!
//! # What to ask where
//!
//! | on | function |
//! |---|---|
//! | a listening socket | [`register_listener`] |
//! | an accepted socket | [`query_redirect_records`], [`query_redirect_context`], [`original_destination`], [`original_app`], [`flow`] |
//! | a new socket, before `connect` | [`set_redirect_records`] |
//! | an accepted socket, all in one | [`connect_onwards`], [`connect_onwards_to`], [`Onwards`] |
//! | a flow that goes on at another host | [`export_redirect_records`] here, [`import_redirect_records`] there |
//! | UDP: a registered socket's datagram | [`DatagramFlow::of`] its source, which stands for an accepted socket; [`connect_onwards_datagram`] |
//!
//! All of them take any socket that can be borrowed ([`AsSocket`]): those of std, socket2, tokio,
//! mio and others. None of them blocks, except the ones that connect. On Windows an answer may have
//! to come through somebody's driver: one that does not come within two seconds is
//! [`Error::TimedOut`].
//!
//! # Connection pools
//!
//! A record belongs to one flow. A connection onwards must not be shared by flows whose records
//! differ: it would mix their identities (contract C60). [`RedirectRecords`] is `Eq` and `Hash`
//! over its raw bytes, to serve as part of a pool's key.
//!
//! # Features
//!
//! - `tokio`: the module `carnet::tokio` with the same one-call connect for tokio.

mod datagram;
mod error;
mod growth;
mod onwards;
mod portable;
mod sys;
#[cfg(feature = "tokio")]
pub mod tokio;
#[cfg(any(windows, test))]
mod winsock;

pub use datagram::{DatagramFlow, connect_onwards_datagram};
pub use error::{Error, Operation};
pub use onwards::{Onwards, connect_onwards, connect_onwards_to};
pub use portable::{
    PortableRecord, export_redirect_records, import_redirect_records, may_import_redirect_records,
};
#[doc(no_inline)]
pub use sys::AsSocket;
#[cfg(fuzzing)]
pub use sys::fuzzing;

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The redirect record of a connection: opaque bytes, to be given back unchanged (contract S55).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RedirectRecords(Vec<u8>);

impl RedirectRecords {
    /// The bytes, in no layout that a service may rely on.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// For records that came another way than from [`query_redirect_records`]: from another process of
/// the same service, for example. Nothing is checked until they are set.
impl From<Vec<u8>> for RedirectRecords {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for RedirectRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedirectRecords({} bytes)", self.0.len())
    }
}

/// The redirect context: bytes that the filter's author meant for the service (contract S51). To
/// Carnet they are opaque.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RedirectContext(Vec<u8>);

impl RedirectContext {
    /// The bytes, at most [`carnet_core::abi::MAX_CONTEXT`] of them on Linux.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Where a redirected connection was going when its application called `connect`, in the address
/// family of the application's socket: `::ffff:192.0.2.1` stays mapped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalDestination(pub SocketAddr);

impl fmt::Display for OriginalDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The application with which a flow began, as the kernel saw it at the first `connect`
/// (contract C38). It stays the same however many services the flow passes.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct OriginalApp {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// Group id in the initial user namespace.
    pub gid: u32,
    /// Id of the process's cgroup: the inode number of its directory.
    pub cgroup: u64,
    /// Cookie of the socket's network namespace, as `SO_NETNS_COOKIE` gives it.
    pub network_namespace: u64,
    /// The executable, as the application's own mount namespace names it, cut after 256 bytes;
    /// none if the kernel could not read it.
    pub executable: Option<PathBuf>,
    /// Device of the executable in the kernel's encoding: major number in the bits from 20.
    pub executable_device: u64,
    /// Inode number of the executable.
    pub executable_inode: u64,
    /// When the process started, after the boot of the system (suspended time included).
    pub started: Duration,
    /// The command name (`comm`), at most 15 bytes; a process can choose it freely.
    pub command: OsString,
}

/// The flow to which an accepted connection belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Flow {
    /// The flow's number: the same in every service that it passes.
    pub id: u64,
    /// The redirect handle of the service that it was delivered to here.
    pub handle: u64,
    /// The filter that redirected it here.
    pub filter: u64,
    /// When the flow began, after the boot of the system (suspended time included).
    pub began: Duration,
    /// How many services the record names, this one included.
    pub hops: u32,
    /// How often the flow was redirected, those times included after which a service forgot to set
    /// the record.
    pub legs: u32,
}

/// The redirect record of an accepted, redirected connection (contract S49). It is not consumed:
/// asking again gives the same bytes (Q10).
///
/// # Errors
/// [`Error::NotRedirected`] for a connection that came here directly, [`Error::NotConnected`] for
/// a listener, [`Error::NoEngine`], [`Error::WrongSocket`].
#[doc(alias = "SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS")]
pub fn query_redirect_records(socket: &impl AsSocket) -> Result<RedirectRecords, Error> {
    sys::query_redirect_records(socket).map(RedirectRecords)
}

/// The redirect context of an accepted, redirected connection, if the filter that redirected it
/// has one (contract S51, S52).
///
/// # Errors
/// Those of [`query_redirect_records`].
#[doc(alias = "SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT")]
pub fn query_redirect_context(socket: &impl AsSocket) -> Result<Option<RedirectContext>, Error> {
    match sys::query_redirect_context(socket) {
        Ok(context) => Ok(Some(RedirectContext(context))),
        // "No context" and "not redirected" are one answer; the record tells them apart.
        Err(Error::NotRedirected { .. }) => match sys::query_redirect_records(socket) {
            Ok(_) => Ok(None),
            Err(Error::NotRedirected { .. }) => {
                Err(Error::NotRedirected { operation: Operation::QueryRedirectContext })
            }
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// Sets a redirect record on a new socket, before it is connected (contract S1, S54, S58); bound
/// or not makes no difference.
///
/// # Errors
/// [`Error::InvalidRecord`] for a record that was altered or has expired,
/// [`Error::AlreadyConnected`] when it is too late, [`Error::AccessDenied`] for a process outside
/// the service, [`Error::NoEngine`], [`Error::WrongSocket`].
#[doc(alias = "SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS")]
pub fn set_redirect_records(
    socket: &impl AsSocket,
    records: &RedirectRecords,
) -> Result<(), Error> {
    sys::set_redirect_records(socket, records.as_bytes())
}

/// Where an accepted, redirected connection was going (contract C40, Q12).
///
/// # Errors
/// Those of [`query_redirect_records`]. On Windows [`Error::Unsupported`] where the system is too
/// old to know.
#[doc(alias = "SO_ORIGINAL_DST")]
pub fn original_destination(socket: &impl AsSocket) -> Result<OriginalDestination, Error> {
    sys::original_destination(socket).map(OriginalDestination)
}

/// The application with which the flow of an accepted connection began (contract C38).
///
/// # Errors
/// Those of [`query_redirect_records`]. [`Error::Unsupported`] on Windows, where only the kernel
/// side knows it.
pub fn original_app(socket: &impl AsSocket) -> Result<OriginalApp, Error> {
    sys::original_app(socket)
}

/// The flow to which an accepted connection belongs.
///
/// # Errors
/// Those of [`query_redirect_records`]. [`Error::Unsupported`] on Windows.
pub fn flow(socket: &impl AsSocket) -> Result<Flow, Error> {
    sys::flow(socket)
}

/// Registers a socket as one of the service to which the calling process belongs (contract C15): a TCP
/// socket that listens, or a UDP socket that is bound to a port and not connected. Redirected
/// connections, or UDP flows, of the same network namespace and address family come to it until it is
/// closed. How a UDP service tells its flows: [`DatagramFlow`].
///
/// # Errors
/// [`Error::NotListening`], [`Error::BoundToDevice`], [`Error::TooManyListeners`],
/// [`Error::AccessDenied`] for a process that belongs to no service, [`Error::NoEngine`],
/// [`Error::WrongSocket`]. [`Error::Unsupported`] on Windows, where the kernel side of the service
/// names the listener.
pub fn register_listener(listener: &impl AsSocket) -> Result<(), Error> {
    sys::register_listener(listener)
}

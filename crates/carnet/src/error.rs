//! The errors of this crate: what was refused, why that usually is, and what to do about it.

use std::fmt;
use std::io;
use std::net::SocketAddr;

/// Why an operation on a redirected connection failed.
///
/// Every variant says what usually causes it and what helps. On Linux they stand for the errno
/// values in the table of [`carnet_core::abi`]; on Windows for the codes of
/// `SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS` and its siblings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No engine answers on this socket.
    ///
    /// Usually the process does not run in a service's cgroup, or the socket was made before it
    /// came there: what counts is the cgroup in which the socket was made. Start the process with
    /// `carnet service run NAME -- COMMAND`, and see `carnet status` for whether the engine is up.
    #[error(
        "{operation}: no Carnet engine answers on this socket; start the engine with `carnet up` \
         and the process with `carnet service run`, so that its sockets belong to a service"
    )]
    NoEngine {
        /// What was asked.
        operation: Operation,
    },

    /// The socket is not connected.
    ///
    /// Usually the query went to the listening socket instead of the accepted one (contract Q9).
    #[error("{operation}: the socket is not connected; ask the accepted socket, not the listener")]
    NotConnected {
        /// What was asked.
        operation: Operation,
    },

    /// The connection came here directly: no filter redirected it.
    ///
    /// Usually somebody connected to the service's own port. Refuse such a connection: it has no
    /// original destination, and connecting it onwards would make the service an open relay.
    #[error("{operation}: the connection was not redirected to this service")]
    NotRedirected {
        /// What was asked.
        operation: Operation,
    },

    /// The calling process may not do this (contract S30).
    ///
    /// It is neither in a service's cgroup nor privileged, or the record was delivered to another
    /// service. Start it with `carnet service run`.
    #[error(
        "{operation}: access denied; the process must be in the cgroup of the service (`carnet \
         service run`), and a record can be set only by the service that it was delivered to"
    )]
    AccessDenied {
        /// What was asked.
        operation: Operation,
    },

    /// The redirect record was refused (contract S34b): malformed, altered, of another instance of
    /// the engine, expired, or under a key that was replaced.
    ///
    /// Usually the engine was restarted, or its key replaced, while the connection lasted. Query the
    /// record again and give it back unchanged and soon; if that was done, close the accepted
    /// connection.
    #[error(
        "the redirect record was refused: it is malformed, altered, expired or of another engine"
    )]
    InvalidRecord,

    /// The calling process may not take over flows of other hosts.
    ///
    /// Whoever may decides which services a flow passes by: it has to be of a service that the policy calls
    /// a gateway.
    #[error(
        "taking over a flow of another host: access denied; the process must be of a service that was \
         added with `carnet service add --gateway`, and in its cgroup"
    )]
    NotAGateway,

    /// A flow of another host has made as many legs as it may (contract C11). Usually hosts send it to each
    /// other in a circle.
    #[error(
        "taking over a flow of another host: the hop guard ended a loop; hosts send the flow in a circle"
    )]
    Endless,

    /// A record was to be set on a socket that is connecting, connected or listening.
    ///
    /// The record must be there before `connect` is called (contract S58): afterwards the
    /// connection has been classified without it.
    #[error("a redirect record must be set before the socket is connected")]
    AlreadyConnected,

    /// The socket is not a TCP or UDP socket over IPv4 or IPv6 (contract S34c, S37b).
    #[error("{operation}: not a TCP or UDP socket over IPv4 or IPv6")]
    WrongSocket {
        /// What was asked.
        operation: Operation,
    },

    /// The socket that was to be registered is not listening: call `listen` first. A UDP socket has to
    /// be bound to a port, and not connected.
    #[error(
        "the socket is not listening; call listen() before registering it (a UDP socket: bind it, \
         and do not connect it)"
    )]
    NotListening,

    /// The listener is bound to a device (`SO_BINDTODEVICE`): redirected connections come over the
    /// loopback device or a local address and could not reach it.
    #[error("the listener is bound to a device, where redirected connections cannot reach it")]
    BoundToDevice,

    /// The service has as many listeners of this family in this network namespace as it may:
    /// [`carnet_core::abi::LISTENER_SLOTS`]. Close one, or share one by `SO_REUSEPORT`.
    #[error(
        "the service has {} listeners of this family in this network namespace, the most it may",
        carnet_core::abi::LISTENER_SLOTS
    )]
    TooManyListeners,

    /// The hop guard ended a loop (contract C11, S46): the connection came by too often without a
    /// record. Usually a service on the way does not set the records; `carnet trace` names it.
    #[error(
        "connecting to {destination}: the hop guard ended a loop; a service on the way does not \
         set redirect records (`carnet trace` names it)"
    )]
    Loop {
        /// Where the connection was to go.
        destination: SocketAddr,
    },

    /// The connection onwards is not permitted: a filter of Carnet's, or another security policy,
    /// blocks it. `carnet explain` tells which filter.
    #[error("connecting to {destination}: blocked by policy (see `carnet explain`)")]
    Blocked {
        /// Where the connection was to go.
        destination: SocketAddr,
    },

    /// The connection onwards failed for a reason of the network: refused, unreachable, timed out.
    #[error("connecting to {destination}: {source}")]
    Connect {
        /// Where the connection was to go.
        destination: SocketAddr,
        /// What the system said.
        source: io::Error,
    },

    /// The answer does not have the expected shape. Usually the engine and this library are of
    /// different versions: rebuild the service, or run `carnet upgrade`.
    #[error("{operation}: unexpected answer of {length} bytes; engine and library do not match")]
    InvalidAnswer {
        /// What was asked.
        operation: Operation,
        /// How many bytes were answered, or asked for at last when no buffer was large enough.
        length: usize,
    },

    /// This operating system has no such operation, or not for this socket (contract S37).
    ///
    /// On Windows usually because it is older than Windows 8, or because the socket's transport
    /// provider is not the system's own.
    #[error("{operation}: not supported by this operating system on this socket")]
    Unsupported {
        /// What was asked.
        operation: Operation,
    },

    /// The system did not answer within two seconds (contract C59). Only on Windows, where the
    /// answer may have to come through somebody's driver. The request was withdrawn; close the
    /// connection.
    #[error("{operation}: the system did not answer in time")]
    TimedOut {
        /// What was asked.
        operation: Operation,
    },

    /// The system refused for a reason that is not specific to redirection.
    #[error("{operation}: {source}")]
    Os {
        /// What was asked.
        operation: Operation,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// What an error of `connect` means on a host with Carnet, for services that connect
    /// themselves: [`Loop`](Self::Loop), [`Blocked`](Self::Blocked), or
    /// [`Connect`](Self::Connect) for everything that is not the engine's doing.
    pub fn from_connect(destination: SocketAddr, source: io::Error) -> Self {
        use carnet_core::abi::errno;
        match source.raw_os_error() {
            Some(errno::ELOOP) if cfg!(target_os = "linux") => Self::Loop { destination },
            Some(errno::EPERM) if cfg!(target_os = "linux") => Self::Blocked { destination },
            _ => Self::Connect { destination, source },
        }
    }
}

/// What a failed call was about; part of most [`Error`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// [`query_redirect_records`](crate::query_redirect_records).
    QueryRedirectRecords,
    /// [`query_redirect_context`](crate::query_redirect_context).
    QueryRedirectContext,
    /// [`set_redirect_records`](crate::set_redirect_records).
    SetRedirectRecords,
    /// [`original_destination`](crate::original_destination).
    OriginalDestination,
    /// [`original_app`](crate::original_app).
    OriginalApp,
    /// [`register_listener`](crate::register_listener).
    RegisterListener,
    /// [`flow`](crate::flow).
    Flow,
    /// [`DatagramFlow::of`](crate::DatagramFlow::of).
    FindDatagramFlow,
    /// [`export_redirect_records`](crate::export_redirect_records).
    ExportRedirectRecords,
    /// [`import_redirect_records`](crate::import_redirect_records).
    ImportRedirectRecords,
    /// Making, preparing or binding the socket of a connection onwards.
    PrepareSocket,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QueryRedirectRecords => "querying the redirect records",
            Self::QueryRedirectContext => "querying the redirect context",
            Self::SetRedirectRecords => "setting the redirect records",
            Self::OriginalDestination => "asking for the original destination",
            Self::OriginalApp => "asking for the original application",
            Self::RegisterListener => "registering the listener",
            Self::Flow => "asking for the flow",
            Self::FindDatagramFlow => "finding the flow of a datagram's source",
            Self::ExportRedirectRecords => "exporting the redirect records",
            Self::ImportRedirectRecords => "importing redirect records",
            Self::PrepareSocket => "preparing the socket of the connection onwards",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connect_errors_of_the_engine_have_names() {
        let destination: SocketAddr = "192.0.2.1:80".parse().unwrap();
        let of = |errno| Error::from_connect(destination, io::Error::from_raw_os_error(errno));
        let (looped, blocked) =
            (of(carnet_core::abi::errno::ELOOP), of(carnet_core::abi::errno::EPERM));
        // The numbers are Linux's: elsewhere they mean something else.
        let here = cfg!(target_os = "linux");
        assert_eq!(matches!(looped, Error::Loop { .. }), here, "{looped:?}");
        assert_eq!(matches!(blocked, Error::Blocked { .. }), here, "{blocked:?}");
        let refused = of(carnet_core::abi::errno::ECONNREFUSED);
        assert!(matches!(&refused, Error::Connect { destination: d, .. } if *d == destination));
        assert!(refused.to_string().starts_with("connecting to 192.0.2.1:80: "), "{refused}");
    }
}

//! The control interface: socket options that the kernel engine answers on a service's sockets.
//!
//! Any language reaches them with plain `getsockopt(2)` and `setsockopt(2)`; no library, no daemon
//! and no privilege to load BPF is needed. The first three numbers are those of the three Windows
//! control codes (contract Q1, S3).
//!
//! | option | call | value |
//! |---|---|---|
//! | 220 [`QUERY_REDIRECT_RECORDS`] | get | the record, opaque bytes (S49, S55) |
//! | 221 [`QUERY_REDIRECT_CONTEXT`] | get | the context, opaque bytes (S51) |
//! | 222 [`SET_REDIRECT_RECORDS`] | set | a record as it was queried (S1, S54); on UDP empty to take it off (U5) |
//! | 223 [`REDIRECT_RECORDS_LENGTH`] | get | `u32`: bytes that 220 would return |
//! | 224 [`REDIRECT_CONTEXT_LENGTH`] | get | `u32`: bytes that 221 would return |
//! | 225 [`ORIGINAL_DESTINATION`] | get | [`Endpoint`], 24 bytes |
//! | 226 [`ORIGINAL_APP`] | get | [`AppIdentity`](crate::record::AppIdentity), 328 bytes |
//! | 227 [`REGISTER_LISTENER`] | set | empty, or a `u64` redirect handle (administrators) |
//! | 228 [`FLOW`] | get | [`FlowInfo`], 40 bytes |
//! | 229 [`ONWARDS`] | get | [`OnwardsInfo`], 32 bytes |
//! | 230 [`CARRY_ON`] | set | `u64`: the ticket of 229, instead of the record that 220 gives |
//! | 231 [`EXPORT_RECORD`] | get | the record for another host, a [portable record](crate::portable) |
//! | 232 [`IMPORT_RECORD`] | set | a portable record of another host; empty to ask whether the caller may |
//!
//! All but 222, 227, 230 and 232 are asked on an accepted connection. For UDP that is a socket which the service
//! has connected to the source of a flow's datagrams, as `recvfrom` gave it on a registered socket. It
//! carries no data: answers go out through the registered socket, to the same address.
//!
//! Errors, the same for every option unless said otherwise:
//!
//! | errno | condition |
//! |---|---|
//! | `ENOPROTOOPT`, `EOPNOTSUPP` | no engine serves this socket's cgroup: the kernel itself answers |
//! | `EOPNOTSUPP` | not an IPv4 or IPv6 socket (S37b), or an option number that Carnet does not know |
//! | `EINVAL` | not a TCP or UDP socket (S34c); for 222: a record that is malformed, forged, truncated, of another instance, expired or under a key that is no longer accepted, or a socket that is already connecting, connected or listening (S34b, S58); for 230: such a socket, a ticket that is none, or one whose record has expired; for 231: a UDP socket; for 232: a UDP socket or one that is connecting, connected or listening, or what is no portable record; for 227: not a listening TCP socket or bound and unconnected UDP socket, or one that is bound to a device |
//! | `ENOTCONN` | get: the socket is not connected (it was not accepted) |
//! | `ENODATA` | get: connected, but not by a redirect; 221, 224: the redirect carries no context (S52), or the calling process is of another service |
//! | `ERANGE` | get: the buffer is too small (ask 223 or 224 first; [`MAX_RECORD`](crate::record::MAX_RECORD) bytes hold what 231 gives) |
//! | `EACCES` | 222, 227, 230: the calling process is neither in a service's cgroup nor privileged; 222, 230, 231: the record was not delivered to this service (S30); 232: the caller is neither of a gateway nor a privileged process of no service |
//! | `ELOOP` | 232: the flow has made as many legs as it may: hosts send it in a circle |
//! | `ENOSPC` | 227: the service has [`LISTENER_SLOTS`] listeners of this family and protocol in this network namespace |
//! | `ENOMEM` | the kernel is out of memory |

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::address::Endpoint;

/// The socket-option level of the control interface: `"WFP\0"` read as a big-endian number.
pub const LEVEL: i32 = 0x5746_5000;

/// Get the redirect record of an accepted connection (contract S49).
pub const QUERY_REDIRECT_RECORDS: i32 = 220;
/// Get the redirect context of an accepted connection (contract S51).
pub const QUERY_REDIRECT_CONTEXT: i32 = 221;
/// Set a redirect record on a socket that is to be connected (contract S1). On a UDP socket that is not
/// connected it is for every flow that begins from then on, until another one is set or an empty value
/// takes it off (contract U5).
pub const SET_REDIRECT_RECORDS: i32 = 222;
/// Get the length in bytes of the redirect record, as `u32` (contract Q4: a failing `getsockopt`
/// cannot report it).
pub const REDIRECT_RECORDS_LENGTH: i32 = 223;
/// Get the length in bytes of the redirect context, as `u32` (contract Q4).
pub const REDIRECT_CONTEXT_LENGTH: i32 = 224;
/// Get the destination that the redirected connect asked for (contract C40, Q12).
pub const ORIGINAL_DESTINATION: i32 = 225;
/// Get the identity of the application that the flow began with (contract C38).
pub const ORIGINAL_APP: i32 = 226;
/// Register a listening TCP socket, or a bound UDP socket, as one of the calling service's (contract
/// C15, X11).
pub const REGISTER_LISTENER: i32 = 227;
/// Get the flow's identity: [`FlowInfo`].
pub const FLOW: i32 = 228;
/// Get what the connection onwards needs: [`OnwardsInfo`].
pub const ONWARDS: i32 = 229;
/// Set, on a socket that is to be connected, the record of the accepted connection with this ticket,
/// which is still open. It saves the way of the record through user mode, and so its verification.
pub const CARRY_ON: i32 = 230;

/// Get the redirect record of an accepted connection in the form in which it goes to other hosts: a
/// [portable record](crate::portable).
pub const EXPORT_RECORD: i32 = 231;
/// Set, on a socket that is to be connected, a record that is made of a portable one of another host. An
/// empty value changes nothing: it asks whether the caller may.
pub const IMPORT_RECORD: i32 = 232;

/// How many listeners a service may have registered at once in one network namespace, of one address
/// family and one protocol.
pub const LISTENER_SLOTS: u32 = 8;

/// Largest redirect context, in bytes.
pub const MAX_CONTEXT: usize = 256;

/// `SO_ORIGINAL_DST`, at `SOL_IP`, and `IP6T_SO_ORIGINAL_DST`, at `SOL_IPV6`: answered on accepted
/// sockets, for unmodified proxies.
pub const SO_ORIGINAL_DST: i32 = 80;
/// `SOL_IP`.
pub const SOL_IP: i32 = 0;
/// `SOL_IPV6`.
pub const SOL_IPV6: i32 = 41;

/// Errno values that the control interface and the connect hooks produce, as Linux numbers them on
/// every architecture that Carnet supports.
pub mod errno {
    /// Operation not permitted: the connection was blocked by a filter.
    pub const EPERM: i32 = 1;
    /// The kernel is out of memory.
    pub const ENOMEM: i32 = 12;
    /// The caller may not do this (contract S30).
    pub const EACCES: i32 = 13;
    /// An argument is unacceptable (contract S34b, S34c).
    pub const EINVAL: i32 = 22;
    /// No free listener slot.
    pub const ENOSPC: i32 = 28;
    /// The buffer is too small (contract Q5).
    pub const ERANGE: i32 = 34;
    /// A loop was ended by the hop guard (contract C11, S46).
    pub const ELOOP: i32 = 40;
    /// There is no record or no context (contract Q8).
    pub const ENODATA: i32 = 61;
    /// Not this kind of socket, or not an option of Carnet's (contract S37b).
    pub const EOPNOTSUPP: i32 = 95;
    /// Another UDP socket is connected from the same address to the same service.
    pub const EADDRINUSE: i32 = 98;
    /// The socket sends from an address that is kept for source tokens.
    pub const EADDRNOTAVAIL: i32 = 99;
    /// The socket is not connected (contract Q6).
    pub const ENOTCONN: i32 = 107;
    /// The connection's service is not there and its failure policy is `block`.
    pub const ECONNREFUSED: i32 = 111;
    /// The socket is bound to a device from which no service is reached, and which it cannot leave.
    pub const EHOSTUNREACH: i32 = 113;
}

/// The flow to which an accepted connection belongs.
///
/// Layout (40 bytes, little-endian): flow id, redirect handle, filter id, start time (all 64 bits),
/// number of hops and number of legs so far (32 bits each).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FlowInfo {
    /// The flow's number: the same on every leg, unique in this instance's life.
    pub flow: u64,
    /// The redirect handle of the service to which this leg was delivered.
    pub handle: u64,
    /// The filter that redirected this leg.
    pub filter: u64,
    /// When the flow began: nanoseconds of the boot-time clock.
    pub began_ns: u64,
    /// Number of hops in the record, this service's included.
    pub hops: u32,
    /// Number of redirected legs so far, those included whose record a service forgot.
    pub legs: u32,
}

/// What the connection onwards needs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct OnwardsInfo {
    /// The destination that the redirected connect asked for.
    pub destination: Endpoint,
    /// For [`CARRY_ON`], as long as the accepted socket is open. It is no secret: it serves only the
    /// service that the flow was delivered to. 0: there is none for this socket, take the record.
    pub ticket: u64,
}

const _: () = assert!(size_of::<FlowInfo>() == 40);
const _: () = assert!(size_of::<OnwardsInfo>() == 32);

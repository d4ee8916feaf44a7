//! What the kernel keeps for a redirected connection, and for the guard.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{abi::MAX_CONTEXT, address::Endpoint, record::Record};

/// [`LegState::kind`]: the connection goes to a service.
pub const LEG_REDIRECTED: u32 = 1;
/// [`LegState::kind`]: the connection carries a record and goes to its destination.
pub const LEG_ONWARD: u32 = 2;

/// Added to [`LegState::kind`] from the connect until its SYN is sent. If it is still there at
/// another SYN, that connect failed before, and the leg is not this one's.
pub const LEG_STARTING: u32 = 1 << 8;

/// One leg of a flow: the state of the socket that connects, copied to the socket that the service
/// accepts.
///
/// It begins when a service sets a record on the socket, or when a connect is redirected; `kind` is
/// 0 until the connect and after the connection's end. On the connecting socket it answers `getpeername` and the flow listing; on the accepted one the
/// control interface. Its record's MAC is computed when a service asks for the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LegState {
    /// [`LEG_REDIRECTED`] or [`LEG_ONWARD`], at first with [`LEG_STARTING`]; 0 without a connection.
    pub kind: u32,
    /// Length of the redirect context in bytes, 0 for none.
    pub context_length: u32,
    /// Redirect handle of the service that the leg goes to; 0 for an onward leg.
    pub handle: u64,
    /// The filter that redirected the leg; 0 for an onward leg.
    pub filter: u64,
    /// Cookie of the connecting socket.
    pub cookie: u64,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// When the leg began: nanoseconds of the boot-time clock.
    pub began_ns: u64,
    /// Process that connected, in the initial pid namespace.
    pub pid: u32,
    /// Number of hops of the record that a service set on the connecting socket; 0 if none was. It
    /// tells what a later connect of the socket begins with: a redirect appends a hop.
    pub set_hops: u32,
    /// The destination that the connect asked for.
    pub requested: Endpoint,
    /// Where the connection really goes: the service's listener; for an onward leg the same as
    /// `requested`.
    pub target: Endpoint,
    /// The redirect context, `context_length` bytes.
    pub context: [u8; MAX_CONTEXT],
    /// The record with this leg's hop in it.
    pub record: Record,
}

/// The two ends of a TCP connection, as the connecting side sees them: the key under which a leg
/// waits for its acceptance.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Tuple {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// Address of the connecting end, four words in network byte order, IPv4 mapped.
    pub local_address: [u32; 4],
    /// Address of the accepting end, likewise.
    pub remote_address: [u32; 4],
    /// Port of the connecting end, in host byte order.
    pub local_port: u32,
    /// Port of the accepting end, in host byte order.
    pub remote_port: u32,
}

/// Key of the guard's memory: a service, and a destination for which it holds flows.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GuardKey {
    /// The service's redirect handle.
    pub handle: u64,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The destination's address, four words in network byte order, IPv4 mapped.
    pub address: [u32; 4],
    /// The destination's port, in host byte order.
    pub port: u32,
    /// Always zero.
    pub zero: u32,
}

/// What the guard remembers: how many flows for that destination the service holds, and how many
/// legs the longest of them has made.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct GuardEntry {
    /// Accepted connections that are still open.
    pub live: i64,
    /// Id of the flow that was delivered last.
    pub flow: u64,
    /// Most legs among the flows that have been open since `live` was last 0.
    pub legs: u32,
    /// Always zero.
    pub zero: u32,
}

/// Key of the registered listeners.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ListenerKey {
    /// The service's redirect handle.
    pub handle: u64,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// Family of the listening socket: 2 or 10.
    pub family: u32,
    /// 0..[`LISTENER_SLOTS`](crate::abi::LISTENER_SLOTS).
    pub slot: u32,
}

/// A registered listener. It counts only while a listening socket of the service is really there.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ListenerEntry {
    /// The address that it is bound to; may be unspecified.
    pub local: Endpoint,
    /// Connects that did not find it since it was last found. Not 0: its slot may be taken.
    pub missed: u64,
}

const _: () = {
    assert!(size_of::<LegState>() == 56 + 48 + 256 + 912);
    assert!(size_of::<Tuple>() == 48);
    assert!(size_of::<GuardKey>() == 40);
    assert!(size_of::<GuardEntry>() == 24);
    assert!(size_of::<ListenerKey>() == 24);
    assert!(size_of::<ListenerEntry>() == 32);
};

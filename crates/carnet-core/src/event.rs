//! What the kernel engine tells of its decisions, through a ring buffer.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::address::Endpoint;

/// What happened. The numbers are part of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum EventKind {
    /// A connection was sent to a service.
    Redirected = 1,
    /// A connection that carries a record passes on to its destination.
    Onward = 2,
    /// A connection was refused.
    Blocked = 3,
    /// A service's process connected to the destination of a flow that it holds, without the
    /// record: the service forgot it.
    RecordForgotten = 4,
    /// A redirected or onward connection ended.
    Closed = 5,
    /// A record that somebody tried to set was refused, or was not his to set.
    RecordRefused = 6,
    /// A service registered a listener.
    ListenerRegistered = 7,
    /// A socket was not made, since no hook would see its flows.
    SocketRefused = 8,
    /// Another program had undone what was decided about a TCP connection, which was therefore refused
    /// once more, when its SYN was about to be sent.
    Undone = 9,
}

impl EventKind {
    /// The kind with this number.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Redirected,
            2 => Self::Onward,
            3 => Self::Blocked,
            4 => Self::RecordForgotten,
            5 => Self::Closed,
            6 => Self::RecordRefused,
            7 => Self::ListenerRegistered,
            8 => Self::SocketRefused,
            9 => Self::Undone,
            _ => return None,
        })
    }
}

/// An event, 144 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Event {
    /// When: nanoseconds of the boot-time clock.
    pub time_ns: u64,
    /// An [`EventKind`] as number.
    pub kind: u32,
    /// Why: a [`Reason`](crate::classify::Reason) as number; for a refused record a
    /// [`RecordError`](crate::record::RecordError) as number; for a refused socket a
    /// [`SocketKind`](crate::socket::SocketKind) as number; for what was undone an
    /// [`Outcome`](crate::outcome::Outcome) as number.
    pub reason: u32,
    /// The flow; 0 for a connection that belongs to none.
    pub flow: u64,
    /// The service concerned, by redirect handle: the one that gets the connection, is missing,
    /// forgot the record or set it; 0 for none.
    pub handle: u64,
    /// The filter that decided, 0 for none.
    pub filter: u64,
    /// Slots of the services that were passed over because they had no live listener.
    pub skipped: u64,
    /// Generation of the policy that decided.
    pub generation: u64,
    /// Process that acted, in the initial pid namespace; 0 where none did (the end of a flow).
    pub pid: u32,
    /// Its user, in the initial user namespace.
    pub uid: u32,
    /// The destination that was asked for.
    pub requested: Endpoint,
    /// Redirected legs so far.
    pub legs: u32,
    /// Hops in the record.
    pub hops: u32,
    /// `Closed`: bytes of payload that the connecting side sent. Of a leg that ends with the accepted connection they
    /// have arrived there; of another one some may still be on their way when its socket is closed. 0 for UDP, of which
    /// the kernel keeps no count, and for a leg that ends because its socket connects anew.
    pub bytes_sent: u64,
    /// `Closed`: bytes of payload that the connecting side received; 0 likewise.
    pub bytes_received: u64,
    /// Command name of the process, zero-padded.
    pub command: [u8; 16],
    /// IP protocol number of the socket: 6, TCP; 17, UDP; 136, UDP-Lite; 0 where the event concerns
    /// no connection.
    pub protocol: u32,
    /// The [flags](crate::record::Record::flags) of the record.
    pub flags: u32,
    /// Cookie of the network namespace: of the connecting socket, or of the listener that was
    /// registered; 0 for a refused record.
    pub netns: u64,
}

const _: () = assert!(size_of::<Event>() == 64 + 24 + 8 + 16 + 16 + 8 + 8);

/// Counters of the engine, each a slot of a per-CPU array. The first group adds up to the number of
/// connects that were classified; what the others add up to, see `docs/counters.md`. All are exact but
/// [`Counter::Passed`], which may lose a count now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Counter {
    /// Connects that passed without a record.
    Passed = 0,
    /// Connects that were redirected.
    Redirected = 1,
    /// Connects that passed with a record.
    Onward = 2,
    /// Connects that were refused, for whatever reason.
    Blocked = 3,

    /// Of the refused: loops ended by the hop guard.
    Loops = 4,
    /// Of the refused: for want of a live listener.
    ServiceUnavailable = 5,
    /// Times a service was passed over for want of a live listener.
    Skipped = 6,
    /// Times a service's process connected without the record of the flow that it holds.
    Forgotten = 7,
    /// Redirected TCP connections that were established at their service, with their record.
    Delivered = 8,
    /// Records that were set.
    RecordsSet = 9,
    /// Records that were refused as malformed.
    RecordsMalformed = 10,
    /// Records that were refused as forged, or under a key that is no longer accepted.
    RecordsForged = 11,
    /// Records that were refused as another instance's.
    RecordsForeign = 12,
    /// Records that were refused as expired.
    RecordsExpired = 13,
    /// Calls of the control interface that were refused with `EACCES`.
    AccessDenied = 14,
    /// Events that found the ring buffer full.
    EventsLost = 15,
    /// Connections that could not be redirected because kernel memory or a map was exhausted; they
    /// are refused.
    OutOfMemory = 16,
    /// Redirected TCP connections whose leg could not be handed over to the accepting side.
    HandoverFailed = 17,
    /// Sockets that were not made, since no hook would see their flows.
    SocketsRefused = 18,
    /// Of the refused: by a filter.
    BlockedByFilter = 19,
    /// Of the refused: another UDP socket is connected from the same address to the same service.
    AddressInUse = 20,
    /// Redirected TCP connections that ended before their SYN was sent: no route, no port, closed
    /// before the first byte of a fast open.
    Unsent = 21,
    /// Redirected TCP connections that ended before they were established at their service: it refused
    /// or reset them, it never answered, or the client gave up.
    Unanswered = 22,
    /// Of the redirected: UDP flows.
    DatagramFlows = 23,
    /// Redirected UDP flows that have ended: their socket was closed or connected elsewhere, they were
    /// idle, or their service was gone.
    DatagramFlowsEnded = 24,
    /// Times that a service connected a socket to ask about a UDP flow.
    Asked = 25,
    /// Times that it could not be told, for want of memory.
    AskFailed = 26,
    /// TCP connects that were refused a second time, when their SYN was about to be sent: another program
    /// had cleared the refusal.
    RefusalsCleared = 27,
    /// Redirected TCP connects that were refused when their SYN was about to be sent: another program had
    /// sent them elsewhere. They are of the unsent.
    Diverted = 28,
    /// Of the two before: those that went out all the same, since the kernel would not keep them back.
    NotHeldBack = 29,
    /// Of the refused: their socket is bound to a device, by a process that may not undo that.
    BoundToDevice = 30,
    /// Connections of unmodified services, and first datagrams of their flows, that adopted a record.
    Adopted = 31,
    /// Of the adopted: those of which flow, application or services are guessed.
    AdoptedByGuess = 32,
    /// Records that were given out for other hosts.
    RecordsExported = 33,
    /// Records of other hosts that were taken over. They are of the records that were set.
    RecordsImported = 34,
    /// Records of other hosts that were refused as endless.
    RecordsEndless = 35,
}

impl Counter {
    /// Number of counters.
    pub const COUNT: usize = 36;

    /// All counters with the names under which they are shown.
    pub const ALL: [(Self, &'static str); Self::COUNT] = [
        (Self::Passed, "passed"),
        (Self::Redirected, "redirected"),
        (Self::Onward, "onward"),
        (Self::Blocked, "blocked"),
        (Self::Loops, "loops_ended"),
        (Self::ServiceUnavailable, "service_unavailable"),
        (Self::Skipped, "services_skipped"),
        (Self::Forgotten, "records_forgotten"),
        (Self::Delivered, "delivered"),
        (Self::RecordsSet, "records_set"),
        (Self::RecordsMalformed, "records_malformed"),
        (Self::RecordsForged, "records_forged"),
        (Self::RecordsForeign, "records_foreign"),
        (Self::RecordsExpired, "records_expired"),
        (Self::AccessDenied, "access_denied"),
        (Self::EventsLost, "events_lost"),
        (Self::OutOfMemory, "out_of_memory"),
        (Self::HandoverFailed, "handover_failed"),
        (Self::SocketsRefused, "sockets_refused"),
        (Self::BlockedByFilter, "blocked_by_filter"),
        (Self::AddressInUse, "address_in_use"),
        (Self::Unsent, "unsent"),
        (Self::Unanswered, "unanswered"),
        (Self::DatagramFlows, "udp_flows"),
        (Self::DatagramFlowsEnded, "udp_flows_ended"),
        (Self::Asked, "udp_flows_asked"),
        (Self::AskFailed, "udp_ask_failed"),
        (Self::RefusalsCleared, "refusals_cleared"),
        (Self::Diverted, "diverted"),
        (Self::NotHeldBack, "not_held_back"),
        (Self::BoundToDevice, "bound_to_device"),
        (Self::Adopted, "records_adopted"),
        (Self::AdoptedByGuess, "records_guessed"),
        (Self::RecordsExported, "records_exported"),
        (Self::RecordsImported, "records_imported"),
        (Self::RecordsEndless, "records_endless"),
    ];
}

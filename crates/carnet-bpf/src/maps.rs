//! All state of the kernel engine.
//!
//! Names have at most 15 bytes, the kernel's limit. Sizes of the policy's tables are set when the
//! engine is brought up; the numbers here are only the smallest useful ones.

use aya_ebpf::{
    bindings::bpf_timer,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use carnet_core::{
    abi::MAX_CONTEXT,
    adoption::HeldFlows,
    event::{Counter, Event},
    flow::{
        ACCEPTED_SIZE, Accepted, CONNECTING_SIZE, Correspondent, CorrespondentKey, DatagramLeg,
        Handover, HeldKey, LegState, ListenerEntry, ListenerKey, LocalSourceKey, PeerKey,
        Registration, Tuple, WAITING_PLACES,
    },
    guard::GuardEntry,
    key::KeyRow,
    record::{FileId, MAX_PATH, Record},
    siphash::Key,
    table::{ConditionRow, FilterRow, HeaderRow, LeafRow, MAX_SERVICES, NodeRow, ServiceRow},
};

const NO_PREALLOC: usize = aya_ebpf::bindings::BPF_F_NO_PREALLOC as usize;

/// The instance's identity, written once by `up`.
#[repr(C)]
pub(crate) struct Config {
    /// The instance's epoch: records of another epoch are foreign.
    pub(crate) epoch: u64,
    /// Number of flows begun so far: the next flow's id.
    pub(crate) flows: i64,
    /// How long a UDP flow of an unconnected socket lives without a datagram, in nanoseconds.
    pub(crate) datagram_idle_ns: u64,
    /// When the idle ones were last looked for: nanoseconds of the boot-time clock.
    pub(crate) swept_ns: u64,
}

/// Writer: `up`; flows, swept: the hooks. Reader: all hooks.
#[btf_map]
pub(crate) static CONFIG: Array<Config, 1> = Array::new();

/// The keys of the records' MACs, in two places. User mode draws them from the system's random source and
/// forgets them; it never reads this map. Writer: `up`; a rotation, only the place that does not count.
/// Reader: getsockopt, setsockopt.
#[btf_map]
pub(crate) static KEYS: Array<Key, 2> = Array::new();

/// What is known of the keys, in the same places. Writer, reader: as of the keys; `carnet status`.
#[btf_map]
pub(crate) static KEY_ROWS: Array<KeyRow, 2> = Array::new();

/// The place of the key that issues records, 0 or 1. Writer: a rotation, with one store. Reader: as of
/// the keys.
#[btf_map]
pub(crate) static CURRENT_KEY: Array<u64, 1> = Array::new();

/// The bank that is in force, 0 or 1. Writer: a transaction, with one store. Reader: connect.
#[btf_map]
pub(crate) static ACTIVE: Array<u64, 1> = Array::new();

// The policy's tables, both banks interleaved: row n of bank b is element 2n + b. Writer: a
// transaction, only in the idle bank. Reader: connect, only in the bank in force.
#[btf_map]
pub(crate) static HEADERS: Array<HeaderRow, 2> = Array::new();
#[btf_map]
pub(crate) static NODES: Array<NodeRow, 2> = Array::new();
#[btf_map]
pub(crate) static LEAVES: Array<LeafRow, 2> = Array::new();
#[btf_map]
pub(crate) static CANDIDATES: Array<u32, 2> = Array::new();
#[btf_map]
pub(crate) static FILTERS: Array<FilterRow, 2> = Array::new();
#[btf_map]
pub(crate) static CONDITIONS: Array<ConditionRow, 2> = Array::new();
#[btf_map]
pub(crate) static SERVICES: Array<ServiceRow, { 2 * MAX_SERVICES as usize }> = Array::new();

/// The administrator's document, from which a bank was compiled, in pages; interleaved like the
/// tables, so it changes with them. Only user mode reads it.
#[btf_map]
pub(crate) static DOCUMENT: Array<[u8; 4096], 2> = Array::new();

/// Slot of a service in a bank.
#[repr(C)]
pub(crate) struct SlotKey {
    /// The redirect handle.
    pub(crate) handle: u64,
    /// The bank.
    pub(crate) bank: u64,
}

/// Writer: a transaction. Reader: connect, once for each hop of a record.
#[btf_map]
pub(crate) static SLOTS: HashMap<SlotKey, u32, { 4 * MAX_SERVICES as usize }, NO_PREALLOC> =
    HashMap::new();

/// A service in a bank, as all hosts know it.
#[repr(C)]
pub(crate) struct IdentityKey {
    /// Its identity.
    pub(crate) identity: u64,
    /// The bank.
    pub(crate) bank: u64,
}

/// The redirect handle of a service. Writer: a transaction. Reader: setsockopt, once for each hop of a record
/// of another host.
#[btf_map]
pub(crate) static IDENTITIES: HashMap<
    IdentityKey,
    u64,
    { 4 * MAX_SERVICES as usize },
    NO_PREALLOC,
> = HashMap::new();

/// A redirect context.
#[repr(C)]
pub(crate) struct Context {
    /// Bytes in use.
    pub(crate) length: u64,
    /// The bytes, zero-padded.
    pub(crate) bytes: [u8; MAX_CONTEXT],
}

/// Contexts by filter id (ids are never reused, so both banks share the map). Writer: a
/// transaction, before its flip (new ones) and after (old ones). Reader: connect.
#[btf_map]
pub(crate) static CONTEXTS: HashMap<u64, Context, 1024, NO_PREALLOC> = HashMap::new();

/// Redirect handle of the service that owns a cgroup, by cgroup id. Writer: a transaction.
/// Reader: whoever asks which service a process belongs to.
#[btf_map]
pub(crate) static SVC_CGROUPS: HashMap<u64, u64, 128, NO_PREALLOC> = HashMap::new();

/// Cgroups of callers that belong to no service, by cgroup id: the number of the policy of which that was found out.
/// Writer and reader: whoever asks which service a process belongs to.
#[btf_map]
pub(crate) static NO_SERVICE: LruHashMap<u64, u64, 1024> = LruHashMap::new();

/// Registered listeners. Writer: setsockopt; connect notes which it missed; user mode, those that are
/// reached from another network namespace. Reader: connect.
#[btf_map]
pub(crate) static LISTENERS: HashMap<ListenerKey, ListenerEntry, 4096, NO_PREALLOC> =
    HashMap::new();

/// On a registered listening socket: whose it is. Goes with the socket, and
/// with it the registration: that is why nobody can squat on the port of a dead service.
#[btf_map]
pub(crate) static REGISTERED: SkStorage<Registration> = SkStorage::new();

/// The legs that TCP sockets make, in [`place`](carnet_core::place)s by the cookies of those. Apart from the sockets,
/// since their storage costs several times as much to make and to free. Writer: connect, setsockopt; sockops and sock_release,
/// which remove them with their last owner. Reader: sockops, getpeername, the flow listing; for accepted
/// sockets getsockopt, setsockopt, getsockname. See [`connecting`](crate::connecting).
///
/// The memory is set apart from the beginning, hence the small number: a leg is often freed by another
/// processor than made it, and what the kernel then does to have memory where it is needed takes
/// longer than all else that is done with the leg.
#[btf_map]
pub(crate) static CONNECTING: Array<LegState, { CONNECTING_SIZE.all() as usize }> = Array::new();

/// The same on the socket itself: with a record that was set before; of UDP and Multipath TCP; of more
/// sockets than [`CONNECTING`] has places for. Writer: setsockopt, connect. Reader: sockops, getpeername, the flow listing. The kernel keeps it over
/// disconnect and reconnect: the next connect clears it, or its SYN finds it stale; but a record that
/// was set stays, since the socket is still the flow's.
#[btf_map]
pub(crate) static LEGS: SkStorage<LegState> = SkStorage::new();

/// Which legs accepted sockets have, in places by the cookies of those, as in [`CONNECTING`].
/// Writer: sockops, sock_release. Reader: getsockopt, setsockopt, getsockname. See
/// [`accepted`](crate::accepted).
#[btf_map]
pub(crate) static ACCEPTED: Array<Accepted, { ACCEPTED_SIZE.all() as usize }> = Array::new();

/// The leg on the accepted socket itself, where that cannot be: the socket by which a service asks about a UDP
/// flow, Multipath TCP, more accepted sockets than [`ACCEPTED`] has places for. Writer: sockops, connect.
/// Reader: getsockopt.
#[btf_map]
pub(crate) static DELIVERED: SkStorage<LegState> = SkStorage::new();

/// On a socket for which a second record is being set, while it is verified: a refused one leaves
/// the first untouched. And for which one of another host is, or is given out for one, while it is
/// translated. Writer and reader: setsockopt, getsockopt.
#[btf_map]
pub(crate) static SECOND_RECORDS: SkStorage<Record> = SkStorage::new();

/// Legs under way from the connecting to the accepted socket: the cookies of those, at
/// [`Tuple::waiting_place`]. The way is as long as that of an ACK. Writer: sockops when the connecting end is
/// established. Reader: sockops when the other end is, which frees the place; so does the end of a connection that never
/// comes so far.
#[btf_map]
pub(crate) static WAITING: Array<u64, { WAITING_PLACES as usize }> = Array::new();

/// The same of those whose place is another one's, and of copies. Writer, reader: as of [`WAITING`].
#[btf_map]
pub(crate) static HANDOVER: HashMap<Tuple, Handover, 8192> = HashMap::new();

/// Copies of legs that are not in [`CONNECTING`]: what hangs on a socket only that one's hooks reach. Those
/// under way by the cookies of the connecting sockets, those delivered as [`ACCEPTED`] says. Writer, reader: as of
/// [`HANDOVER`] and [`ACCEPTED`].
#[btf_map]
pub(crate) static COPIES: HashMap<u64, LegState, 65536, NO_PREALLOC> = HashMap::new();

/// How many legs of connecting TCP sockets have neither come to their SYN nor been taken away. Apart from
/// what else is counted, since every connect looks. Writer: connect, sockops, sock_release, setsockopt.
/// Reader: connect.
#[btf_map]
pub(crate) static UNSETTLED: Array<i64, 1> = Array::new();

/// A UDP flow of an unconnected socket that goes to a service.
#[repr(C)]
pub(crate) struct TimedLeg {
    /// Ends the flow when it has been idle for too long.
    pub(crate) timer: bpf_timer,
    /// The flow.
    pub(crate) held: DatagramLeg,
}

/// UDP flows of unconnected sockets, by their source tokens. Writer: sendmsg; seen: sendmsg and
/// recvmsg. Reader: sendmsg, recvmsg, connect, the flow listing. They end with their socket
/// (sock_release), by their timer, or when sendmsg finds their service gone.
#[btf_map]
pub(crate) static DATAGRAM_LEGS: HashMap<PeerKey, TimedLeg, 65536, NO_PREALLOC> = HashMap::new();

/// What a new flow is filled into: all zero. Nobody writes it.
#[btf_map]
pub(crate) static BLANK_LEG: Array<[u8; size_of::<TimedLeg>()], 1> = Array::new();

/// The flows of unconnected UDP sockets that go to services. Writer and reader: sendmsg.
#[btf_map]
pub(crate) static CORRESPONDENTS: LruHashMap<CorrespondentKey, Correspondent, 65536> =
    LruHashMap::new();

/// The flows of unconnected UDP sockets that pass. Apart from those that go to services, which a server
/// with very many clients would displace. Writer: sendmsg; recvmsg for flows that the other side began.
/// Reader: sendmsg.
#[btf_map]
pub(crate) static PASSING: LruHashMap<CorrespondentKey, Correspondent, 65536> = LruHashMap::new();

/// IPv6 addresses from which local UDP sockets have sent. Writer: connect6, sendmsg6; entries stay, and
/// who finds no room is refused. Reader: recvmsg6.
#[btf_map]
pub(crate) static LOCAL_SOURCES: HashMap<LocalSourceKey, u32, 4096, NO_PREALLOC> = HashMap::new();

/// How many of an unconnected UDP socket's flows end at once with it; others by their timers.
pub(crate) const SOCKET_TOKENS: usize = 16;

/// The newest flows of an unconnected UDP socket.
#[repr(C)]
pub(crate) struct SocketTokens {
    /// Number of flows begun so far: the newest one is at this number less one, in a ring.
    pub(crate) begun: i64,
    /// Their source tokens.
    pub(crate) tokens: [[u32; 4]; SOCKET_TOKENS],
}

/// On an unconnected UDP socket that has flows. Writer: sendmsg. Reader: sock_release.
#[btf_map]
pub(crate) static TOKENS: SkStorage<SocketTokens> = SkStorage::new();

/// By what the path of an executable is known.
#[repr(C)]
pub(crate) struct PathKey {
    /// Address of its mount in the kernel.
    pub(crate) mount: u64,
    /// Address of its directory entry in the kernel.
    pub(crate) dentry: u64,
}

/// The path of an executable.
#[repr(C)]
pub(crate) struct KnownPath {
    /// The executable: the addresses of the key are used again.
    pub(crate) file: FileId,
    /// When it was read: nanoseconds of the boot-time clock; 0: it is being filled in.
    pub(crate) read_ns: u64,
    /// Its length in bytes.
    pub(crate) length: u64,
    /// The path, zero-padded.
    pub(crate) path: [u8; MAX_PATH],
}

/// The paths of the executables that began flows last: to follow one up to the root takes as long as all
/// else that a redirect does in connect. Writer and reader: whoever identifies a process. See
/// [`process`](crate::process).
#[btf_map]
pub(crate) static PATHS: LruHashMap<PathKey, KnownPath, 512> = LruHashMap::new();

/// The hop guard's memory: flows that services hold, by service and destination. Writer: sockops.
/// Reader: connect.
#[btf_map]
pub(crate) static GUARD: LruHashMap<HeldKey, GuardEntry, 65536> = LruHashMap::new();

/// The flows that unmodified services hold, by service and destination; with a key of zeros but for the
/// handle all of a service's. Writer: sockops, connect, sendmsg; what ends flows. Reader: connect, sendmsg.
#[btf_map]
pub(crate) static HELD: HashMap<HeldKey, HeldFlows, 65536, NO_PREALLOC> = HashMap::new();

/// Counters. Writer: all hooks. Reader: user mode.
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { Counter::COUNT }> = PerCpuArray::new();

/// Whether anybody reads [`EVENTS`]. Writer: who reads them, before it begins and when it is done. Reader: all
/// hooks.
#[btf_map]
pub(crate) static EVENTS_READ: Array<u64, 1> = Array::new();

/// What was decided. Writer: all hooks. Reader: `carnet trace`.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, 524288> = RingBuf::new();

//! The state that hangs on sockets.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{
        BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock,
    },
    btf_maps::SkStorage,
    helpers::generated::{
        bpf_probe_read_kernel, bpf_sk_storage_delete, bpf_sk_storage_get, bpf_skc_to_mptcp_sock,
        bpf_skc_to_tcp_sock,
    },
};
use carnet_core::{
    address::{AF_INET, AF_INET6, Endpoint},
    flow::{LegState, Registration},
    record::Record,
    socket::SocketKind,
};

use crate::{
    ctx::load32,
    maps::REGISTERED,
    process::{field, follow, offset},
};

/// `IPPROTO_TCP`.
pub(crate) const TCP: u32 = 6;
/// `IPPROTO_UDP`.
pub(crate) const UDP: u32 = 17;
/// `IPPROTO_UDPLITE`.
pub(crate) const UDP_LITE: u32 = 136;
/// `IPPROTO_MPTCP`: what a Multipath TCP socket calls itself towards the socket-option hooks.
pub(crate) const MPTCP: u32 = 262;
/// `TCP_ESTABLISHED`; also a UDP socket that is connected.
pub(crate) const ESTABLISHED: u32 = 1;
/// `TCP_SYN_SENT`.
pub(crate) const SYN_SENT: u32 = 2;
/// `TCP_FIN_WAIT2`.
pub(crate) const FIN_WAIT2: u32 = 5;
/// `TCP_CLOSE`: a socket that has not been connected, of UDP too.
pub(crate) const CLOSE: u32 = 7;
/// `TCP_LAST_ACK`.
pub(crate) const LAST_ACK: u32 = 9;
/// `TCP_LISTEN`.
pub(crate) const LISTEN: u32 = 10;
/// `TCP_CLOSING`.
pub(crate) const CLOSING: u32 = 11;

/// Byte offset of the field of `struct tcp_sock` that marks a Multipath TCP subflow. Set by the
/// loader; 0 where the kernel has no Multipath TCP and refuses the helper that finds a subflow's
/// connection.
#[unsafe(no_mangle)]
static MPTCP_MARK: Global<u32> = Global::new(1);

/// A socket as a hook sees it, never null. Its fields are read at the offsets of `struct bpf_sock`.
#[derive(Clone, Copy)]
pub(crate) struct Socket(*mut bpf_sock);

impl Socket {
    /// The socket behind a pointer that a context, a lookup or a conversion gave.
    #[inline(always)]
    pub(crate) fn new(sk: *mut bpf_sock) -> Option<Self> {
        if sk.is_null() { None } else { Some(Self(sk)) }
    }

    /// The address family.
    #[inline(always)]
    pub(crate) fn family(self) -> u16 {
        load32!(self.0, 4) as u16
    }

    /// The protocol number.
    #[inline(always)]
    pub(crate) fn protocol(self) -> u32 {
        load32!(self.0, 12)
    }

    /// What the socket was made as.
    #[inline(always)]
    pub(crate) fn kind(self) -> SocketKind {
        SocketKind {
            family: self.family(),
            kind: load32!(self.0, 8) as u16,
            protocol: self.protocol() as u16,
        }
    }

    /// The TCP state.
    #[inline(always)]
    pub(crate) fn state(self) -> u32 {
        load32!(self.0, 72)
    }

    /// Index of the device that the socket is bound to, 0 for none.
    #[inline(always)]
    pub(crate) fn bound_device(self) -> u32 {
        load32!(self.0, 0)
    }

    /// Whether this is an IPv4 or IPv6 socket.
    #[inline(always)]
    pub(crate) fn is_inet(self) -> bool {
        let family = self.family();
        family == AF_INET || family == AF_INET6
    }

    /// Whether this is a TCP socket, Multipath TCP included.
    #[inline(always)]
    pub(crate) fn is_tcp(self) -> bool {
        let protocol = self.protocol();
        protocol == TCP || protocol == MPTCP
    }

    /// Whether this is a UDP or UDP-Lite socket.
    #[inline(always)]
    pub(crate) fn is_datagram(self) -> bool {
        is_datagram(self.protocol())
    }

    /// The address and port that the socket is bound to.
    #[inline(always)]
    pub(crate) fn local(self) -> Endpoint {
        let port = load32!(self.0, 44) as u16;
        if self.family() == AF_INET {
            Endpoint::v4(load32!(self.0, 24), port)
        } else {
            Endpoint::v6(
                [
                    load32!(self.0, 28),
                    load32!(self.0, 32),
                    load32!(self.0, 36),
                    load32!(self.0, 40),
                ],
                port,
            )
        }
    }

    /// The address and port that the socket is connected to.
    #[inline(always)]
    pub(crate) fn remote(self) -> Endpoint {
        let port = u16::from_be(load32!(self.0, 48) as u16);
        if self.family() == AF_INET {
            Endpoint::v4(load32!(self.0, 52), port)
        } else {
            Endpoint::v6(
                [
                    load32!(self.0, 56),
                    load32!(self.0, 60),
                    load32!(self.0, 64),
                    load32!(self.0, 68),
                ],
                port,
            )
        }
    }

    /// The same socket as `struct tcp_sock`, of which the verifier knows all fields; null for one
    /// that is not TCP's.
    #[inline(always)]
    fn tcp(self) -> *const c_void {
        // SAFETY: the helper takes any socket.
        unsafe { bpf_skc_to_tcp_sock(self.0.cast()) }.cast_const().cast()
    }

    /// Whether neither this socket nor a Multipath TCP connection that it belongs to has any state
    /// of a BPF program. Asked at every connect, and far cheaper than to look for the state.
    #[inline(always)]
    pub(crate) fn is_blank(self) -> bool {
        let tcp = self.tcp();
        !tcp.is_null() && field::<u64>(tcp, offset!(sock_storage)) == 0 && !is_subflow(tcp)
    }

    /// Whether somebody has asked for the socket's cookie. Before that, nothing is known under it.
    #[inline(always)]
    pub(crate) fn has_cookie(self) -> bool {
        let tcp = self.tcp();
        tcp.is_null() || field::<u64>(tcp, offset!(sock_cookie)) != 0
    }

    /// Whether the socket has the [`MARK_OF_ACCEPTED`].
    #[inline(always)]
    pub(crate) fn is_accepted(self) -> bool {
        let tcp = self.tcp();
        !tcp.is_null() && u32::from(field::<u8>(tcp, offset!(tcp_sockops))) & MARK_OF_ACCEPTED != 0
    }

    /// Whether some process has, or had, a descriptor of the socket, which it closes some time. A program in the
    /// kernel may have sockets of its own, and connect them in the context of a process.
    #[inline(always)]
    pub(crate) fn has_file(self) -> bool {
        let tcp = self.tcp();
        if tcp.is_null() {
            return false;
        }
        let socket = follow(tcp, offset!(sock_owner));
        !socket.is_null() && field::<u64>(socket, offset!(socket_file)) != 0
    }

    /// Whether the SYN may carry data, so that the other end is established before this one.
    #[inline(always)]
    pub(crate) fn opens_fast(self) -> bool {
        let tcp = self.tcp();
        !tcp.is_null() && field::<u64>(tcp, offset!(tcp_fastopen)) != 0
    }

    /// Whether the other end has sent all that it will.
    #[inline(always)]
    pub(crate) fn has_received_fin(self) -> bool {
        let tcp = self.tcp();
        !tcp.is_null() && has_received_fin(field(tcp, offset!(sock_flags)))
    }

    /// Whether a process has the socket: it was not merely established on the accepting side, and is
    /// not closed.
    #[inline(always)]
    pub(crate) fn has_owner(self) -> bool {
        let tcp = self.tcp();
        !tcp.is_null() && field::<u64>(tcp, offset!(sock_owner)) != 0
    }

    /// For which service this listening socket, or the Multipath TCP socket behind it, was
    /// registered.
    #[inline(always)]
    pub(crate) fn registration(self) -> Option<&'static Registration> {
        if let Some(registration) = self.get(&REGISTERED) {
            return Some(registration);
        }
        self.multipath()?.get(&REGISTERED).map(|registration| &*registration)
    }

    /// The Multipath TCP connection whose subflow this is.
    ///
    /// Connect hooks and sockops see the subflow, socket-option and address hooks the connection:
    /// state must be on both.
    #[inline(always)]
    pub(crate) fn multipath(self) -> Option<Self> {
        let tcp = self.tcp();
        if tcp.is_null() || !is_subflow(tcp) {
            return None;
        }
        // SAFETY: the helper takes any socket and gives null for one that is no subflow.
        Self::new(unsafe { bpf_skc_to_mptcp_sock(self.0.cast()) }.cast())
    }

    /// The state of kind `map` on this socket.
    #[inline(always)]
    pub(crate) fn get<T>(self, map: &'static SkStorage<T>) -> Option<&'static mut T> {
        storage(map, self.0.cast(), ptr::null_mut(), 0)
    }

    /// The state of kind `map` on this socket, made, all zero, if there was none. `None`: out of
    /// memory.
    #[inline(always)]
    pub(crate) fn get_or_create<T>(self, map: &'static SkStorage<T>) -> Option<&'static mut T> {
        storage(map, self.0.cast(), ptr::null_mut(), CREATE)
    }

    /// Puts a copy of `value`, which lies in a map, on this socket and on the Multipath TCP
    /// connection that it belongs to. Gives `false` when out of memory.
    #[inline(always)]
    pub(crate) fn put<T>(self, map: &'static SkStorage<T>, value: *mut T) -> bool {
        self.put_on_socket(map, value) && self.put_on_multipath(map, value)
    }

    /// The first half of [`Self::put`].
    #[inline(always)]
    pub(crate) fn put_on_socket<T>(self, map: &'static SkStorage<T>, value: *mut T) -> bool {
        storage(map, self.0.cast(), value, CREATE).is_some()
    }

    /// The second half of [`Self::put`].
    #[inline(always)]
    pub(crate) fn put_on_multipath<T>(self, map: &'static SkStorage<T>, value: *mut T) -> bool {
        let Some(connection) = self.multipath() else {
            return true;
        };
        // A connection's first subflow decides; it may have the state from an earlier connect.
        connection.delete(map);
        storage(map, connection.0.cast(), value, CREATE).is_some()
    }

    /// Removes the state of kind `map` from this socket.
    #[inline(always)]
    pub(crate) fn delete<T>(self, map: &'static SkStorage<T>) {
        // SAFETY: the helper takes any socket; deleting what is not there is harmless.
        unsafe { bpf_sk_storage_delete(map_pointer(map), self.0.cast()) };
    }
}

/// The same, by the socket's flags.
#[inline(always)]
pub(crate) fn has_received_fin(flags: u64) -> bool {
    const SOCK_DONE: u64 = 1 << 1;
    flags & SOCK_DONE != 0
}

/// Set among a TCP socket's `sockops` flags, until it is connected elsewhere: a service has been given it with a leg.
/// It spares the question which leg the socket has made, at each accept; a program of others that sets the flags
/// anew may take it away. Of all flags this one costs least: it asks for a call when a packet was not answered for a
/// time.
pub(crate) const MARK_OF_ACCEPTED: u32 = BPF_SOCK_OPS_RTO_CB_FLAG;

/// Whether `sockops` is told of a TCP socket's changes of state, by its flags.
#[inline(always)]
pub(crate) fn is_watched(flags: u8) -> bool {
    u32::from(flags) & BPF_SOCK_OPS_STATE_CB_FLAG != 0
}

/// Whether an IP protocol number is that of UDP or UDP-Lite.
#[inline(always)]
pub(crate) fn is_datagram(protocol: u32) -> bool {
    protocol == UDP || protocol == UDP_LITE
}

/// Whether a `struct tcp_sock` is a subflow of a Multipath TCP connection.
#[inline(always)]
fn is_subflow(tcp: *const c_void) -> bool {
    let mark = MPTCP_MARK.load();
    mark != 0 && field::<u8>(tcp, mark) != 0
}

const CREATE: u64 = BPF_SK_STORAGE_GET_F_CREATE as u64;

#[inline(always)]
fn map_pointer<T>(map: &'static SkStorage<T>) -> *mut c_void {
    ptr::from_ref(map).cast_mut().cast()
}

/// State of kind `map` on a socket given as the helper takes it.
#[inline(always)]
fn storage<T>(
    map: &'static SkStorage<T>,
    sk: *mut c_void,
    initial: *mut T,
    flags: u64,
) -> Option<&'static mut T> {
    // SAFETY: `sk` is a socket that the verifier knows as valid; the helper gives null or a
    // pointer to a `T` that lives as long as the socket, at least until the program ends. The
    // kernel runs the hooks of one socket one at a time, under its lock.
    unsafe { bpf_sk_storage_get(map_pointer(map), sk, initial.cast(), flags).cast::<T>().as_mut() }
}

/// Copies a record into a leg.
#[inline(always)]
pub(crate) fn copy_record(leg: &mut LegState, record: &Record) {
    // SAFETY: both are whole records in map values; the helper copies many times faster than
    // the loop that LLVM would write.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut leg.record).cast(),
            size_of::<Record>() as u32,
            ptr::from_ref(record).cast(),
        );
    }
}

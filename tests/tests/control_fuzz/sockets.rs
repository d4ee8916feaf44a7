//! Sockets of every kind.

use socket2::{Domain, Protocol, Socket, Type};

/// Kinds: name, family, type, protocol.
pub(crate) const KINDS: [(&str, i32, i32, i32); 18] = [
    ("TCP", libc::AF_INET, libc::SOCK_STREAM, 0),
    ("TCP, IPv6", libc::AF_INET6, libc::SOCK_STREAM, 0),
    ("UDP", libc::AF_INET, libc::SOCK_DGRAM, 0),
    ("UDP, IPv6", libc::AF_INET6, libc::SOCK_DGRAM, 0),
    ("UDP-Lite", libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
    ("UDP-Lite, IPv6", libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
    ("MPTCP", libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    ("MPTCP, IPv6", libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    ("raw", libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
    ("raw, IPv6", libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6),
    ("ping", libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
    ("SCTP", libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
    ("AF_UNIX stream", libc::AF_UNIX, libc::SOCK_STREAM, 0),
    ("AF_UNIX datagrams", libc::AF_UNIX, libc::SOCK_DGRAM, 0),
    ("netlink", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
    ("packet", libc::AF_PACKET, libc::SOCK_RAW, 0),
    ("vsock", libc::AF_VSOCK, libc::SOCK_STREAM, 0),
    ("alg", libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
];

/// A new socket of a kind; `None` where this kernel has none.
pub(crate) fn open(kind: usize) -> Option<Socket> {
    let (_, family, of_type, protocol) = KINDS[kind];
    let protocol = (protocol != 0).then(|| Protocol::from(protocol));
    Socket::new(Domain::from(family), Type::from(of_type).nonblocking(), protocol).ok()
}

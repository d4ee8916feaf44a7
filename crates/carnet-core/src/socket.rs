//! Which sockets Carnet's hooks see.
//!
//! The kernel runs the hooks of a cgroup for the flows of TCP and UDP sockets, however they are
//! made. Other sockets reach the network without passing them: raw and packet sockets, SCTP, the
//! sockets of `ping`, UDP-Lite ones that are connected. `carnet up --refuse-unseen` refuses to make
//! the internet ones among them, `carnet doctor` finds those that are there.

use crate::address::{AF_INET, AF_INET6};

/// `AF_UNIX`.
const AF_UNIX: u16 = 1;
/// `AF_NETLINK`.
const AF_NETLINK: u16 = 16;
/// `AF_KEY`.
const AF_KEY: u16 = 15;
/// `AF_ALG`.
const AF_ALG: u16 = 38;

/// `SOCK_STREAM`.
const STREAM: u16 = 1;
/// `SOCK_DGRAM`.
const DATAGRAM: u16 = 2;

/// `IPPROTO_TCP`.
const TCP: u16 = 6;
/// `IPPROTO_UDP`.
const UDP: u16 = 17;
/// `IPPROTO_MPTCP`.
const MULTIPATH_TCP: u16 = 262;

/// What a socket was made as: the three arguments of `socket(2)`, the numbers being Linux's. The
/// protocol is the one that the kernel chose where 0 was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketKind {
    /// The address family (`AF_…`).
    pub family: u16,
    /// The type (`SOCK_…`), without flags.
    pub kind: u16,
    /// The protocol (`IPPROTO_…` for an internet socket).
    pub protocol: u16,
}

impl SocketKind {
    /// Whether it is an IPv4 or IPv6 socket.
    #[inline(always)]
    pub const fn is_internet(self) -> bool {
        self.family == AF_INET || self.family == AF_INET6
    }

    /// Whether all its flows pass the hooks: TCP, Multipath TCP and UDP over IPv4 and IPv6.
    ///
    /// UDP-Lite is not among them: what it sends to an address is seen, but the kernel runs no hook
    /// when such a socket is connected, nor for what it sends then.
    #[inline(always)]
    pub const fn is_seen(self) -> bool {
        let stream = self.protocol == TCP || self.protocol == MULTIPATH_TCP;
        self.is_internet()
            && ((self.kind == STREAM && stream) || (self.kind == DATAGRAM && self.protocol == UDP))
    }

    /// Whether it reaches other machines, or may, without any flow of it being seen.
    ///
    /// Sockets of families that end in this machine's kernel are not meant: local ones, netlink,
    /// the kernel's cryptography and key management.
    #[inline(always)]
    pub const fn is_unseen(self) -> bool {
        !self.is_seen() && !matches!(self.family, AF_UNIX | AF_NETLINK | AF_KEY | AF_ALG)
    }

    /// As the number that an event carries: the family in the highest 8 bits, then the type in 8
    /// and the protocol in 16.
    #[inline(always)]
    pub const fn to_number(self) -> u32 {
        (self.family as u32) << 24 | (self.kind as u32 & 0xff) << 16 | self.protocol as u32
    }

    /// From the number that an event carries.
    pub const fn from_number(number: u32) -> Self {
        let family = (number >> 24) as u16;
        Self { family, kind: (number >> 16) as u16 & 0xff, protocol: number as u16 }
    }
}

#[cfg(any(feature = "host", test))]
mod host {
    use core::fmt;

    use super::{SocketKind, TCP, UDP};

    impl fmt::Display for SocketKind {
        /// What people call such a socket, such as `raw IPv4 socket of protocol 1`.
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let Self { family, kind, protocol } = *self;
            if !self.is_internet() {
                return match family {
                    17 => f.write_str("packet socket (AF_PACKET)"),
                    21 => f.write_str("RDS socket"),
                    29 => f.write_str("CAN socket"),
                    30 => f.write_str("TIPC socket"),
                    31 => f.write_str("Bluetooth socket"),
                    40 => f.write_str("vsock socket"),
                    43 => f.write_str("SMC socket"),
                    44 => f.write_str("XDP socket"),
                    _ => write!(f, "socket of address family {family}"),
                };
            }
            let version = if family == super::AF_INET { "IPv4" } else { "IPv6" };
            match (kind, protocol) {
                (1, TCP) => write!(f, "TCP {version} socket"),
                (2, UDP) => write!(f, "UDP {version} socket"),
                (2, 136) => write!(f, "UDP-Lite {version} socket"),
                (1, super::MULTIPATH_TCP) => write!(f, "Multipath TCP {version} socket"),
                (2, 1 | 58) => write!(f, "ping {version} socket"),
                (_, 132) => write!(f, "SCTP {version} socket"),
                (_, 33) => write!(f, "DCCP {version} socket"),
                (3, protocol) => write!(f, "raw {version} socket of protocol {protocol}"),
                (kind, protocol) => {
                    write!(f, "{version} socket of type {kind} and protocol {protocol}")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString as _;

    use super::SocketKind;

    #[test]
    fn what_the_hooks_see_is_told_from_what_they_do_not() {
        for (family, kind, protocol, seen, unseen, name) in [
            (2, 1, 6, true, false, "TCP IPv4 socket"),
            (10, 1, 262, true, false, "Multipath TCP IPv6 socket"),
            (10, 2, 17, true, false, "UDP IPv6 socket"),
            (2, 2, 136, false, true, "UDP-Lite IPv4 socket"),
            (2, 3, 6, false, true, "raw IPv4 socket of protocol 6"),
            (10, 3, 17, false, true, "raw IPv6 socket of protocol 17"),
            (2, 2, 1, false, true, "ping IPv4 socket"),
            (10, 2, 58, false, true, "ping IPv6 socket"),
            (2, 1, 132, false, true, "SCTP IPv4 socket"),
            (2, 5, 132, false, true, "SCTP IPv4 socket"),
            (2, 6, 33, false, true, "DCCP IPv4 socket"),
            (2, 5, 9, false, true, "IPv4 socket of type 5 and protocol 9"),
            (17, 3, 768, false, true, "packet socket (AF_PACKET)"),
            (44, 3, 0, false, true, "XDP socket"),
            (1, 1, 0, false, false, "socket of address family 1"),
            (16, 3, 4, false, false, "socket of address family 16"),
            (38, 5, 0, false, false, "socket of address family 38"),
            (99, 1, 0, false, true, "socket of address family 99"),
        ] {
            let socket = SocketKind { family, kind, protocol };
            assert_eq!((socket.is_seen(), socket.is_unseen()), (seen, unseen), "{socket:?}");
            assert_eq!(socket.to_string(), name);
            assert_eq!(SocketKind::from_number(socket.to_number()), socket);
        }
    }
}

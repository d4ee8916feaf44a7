//! Endpoints and the 128-bit values in which every condition is expressed.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Address family of IPv4 sockets, as Linux numbers it.
pub const AF_INET: u16 = 2;
/// Address family of IPv6 sockets, as Linux numbers it.
pub const AF_INET6: u16 = 10;

/// The third word of an IPv4-mapped IPv6 address, in host order.
const MAPPED_WORD: u32 = 0x0000_ffff;
/// `::ffff:127.0.0.1`, in network byte order.
const LOOPBACK_V4: [u32; 4] = [0, 0, MAPPED_WORD.to_be(), 0x7f00_0001_u32.to_be()];
/// `::1`, likewise.
const LOOPBACK_V6: [u32; 4] = [0, 0, 0, 1_u32.to_be()];

/// An address and a port.
///
/// Layout (24 bytes, little-endian host):
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 16 | address, four 32-bit words in network byte order; IPv4 as IPv4-mapped IPv6 |
/// | 16 | 2 | port, in host byte order |
/// | 18 | 2 | family of the socket: 2 (`AF_INET`) or 10 (`AF_INET6`) |
/// | 20 | 4 | zero |
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Endpoint {
    /// The address, four words in network byte order, IPv4 as `::ffff:a.b.c.d`.
    pub address: [u32; 4],
    /// The port, in host byte order.
    pub port: u16,
    /// [`AF_INET`] or [`AF_INET6`]: the family of the socket, so that a mapped address on an IPv6
    /// socket is told from IPv4.
    pub family: u16,
    /// Always zero.
    pub zero: u32,
}

impl Endpoint {
    /// An IPv4 endpoint from the address as it lies in memory (network byte order) and a port in
    /// host byte order.
    #[inline(always)]
    pub const fn v4(address: u32, port: u16) -> Self {
        Self { address: [0, 0, MAPPED_WORD.to_be(), address], port, family: AF_INET, zero: 0 }
    }

    /// An endpoint of an IPv6 socket; the address may be IPv4-mapped.
    #[inline(always)]
    pub const fn v6(address: [u32; 4], port: u16) -> Self {
        Self { address, port, family: AF_INET6, zero: 0 }
    }

    /// Whether the address is IPv4, be it mapped or not.
    #[inline(always)]
    pub const fn is_ipv4(&self) -> bool {
        self.address[0] == 0 && self.address[1] == 0 && self.address[2] == MAPPED_WORD.to_be()
    }

    /// Whether the address is unspecified (`0.0.0.0`, `::`, or `::ffff:0.0.0.0`).
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.address[3] == 0
            && self.address[0] == 0
            && self.address[1] == 0
            && (self.address[2] == 0 || self.address[2] == MAPPED_WORD.to_be())
    }

    /// Whether the address is of a group: multicast, or IPv4's limited broadcast. What is sent there
    /// has no single receiver, so no service can stand for it. (A subnet's broadcast address is not
    /// told from others by its bits.)
    #[inline(always)]
    pub const fn is_group(&self) -> bool {
        if self.is_ipv4() {
            let address = u32::from_be(self.address[3]);
            address >> 28 == 0xe || address == u32::MAX
        } else {
            u32::from_be(self.address[0]) >> 24 == 0xff
        }
    }

    /// Where a flow to this destination goes. An unspecified address stands for this host: for the
    /// address that the socket is bound to, as the kernel has it, or for a loopback address.
    #[inline(always)]
    pub const fn meant(self, bound_to: &Self) -> Self {
        if !self.is_unspecified() {
            return self;
        }
        let bound_to_ipv4 = bound_to.is_ipv4() && !bound_to.is_unspecified();
        let address = if self.is_ipv4() && bound_to_ipv4 {
            bound_to.address
        } else if self.is_ipv4() || bound_to_ipv4 {
            LOOPBACK_V4
        } else {
            LOOPBACK_V6
        };
        Self { address, ..self }
    }

    /// Whether address and port are the same. Written out: the derived comparison calls a function for the
    /// address, and an IPv4-mapped address is the same whatever the family of the socket.
    #[inline(always)]
    pub const fn is_same(&self, other: &Self) -> bool {
        self.port == other.port
            && self.address[0] == other.address[0]
            && self.address[1] == other.address[1]
            && self.address[2] == other.address[2]
            && self.address[3] == other.address[3]
    }

    /// Where a socket that wanted to go here comes to nobody: port 0 of the loopback address, at which no
    /// socket can be. The kernel itself refuses to send a datagram to an address there (`EINVAL`).
    #[inline(always)]
    pub const fn nowhere(&self) -> Self {
        let address = if self.is_ipv4() { LOOPBACK_V4 } else { LOOPBACK_V6 };
        Self { address, port: 0, family: self.family, zero: 0 }
    }

    /// The address as a number, most significant bit first, for range conditions.
    #[inline(always)]
    pub const fn value(&self) -> Wide {
        Wide {
            hi: ((u32::from_be(self.address[0]) as u64) << 32)
                | u32::from_be(self.address[1]) as u64,
            lo: ((u32::from_be(self.address[2]) as u64) << 32)
                | u32::from_be(self.address[3]) as u64,
        }
    }
}

#[cfg(any(feature = "host", test))]
mod host {
    use super::{AF_INET6, Endpoint};
    use core::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

    impl From<SocketAddr> for Endpoint {
        fn from(address: SocketAddr) -> Self {
            let v6 = match address.ip() {
                IpAddr::V4(ip) => return Self::v4(u32::from_ne_bytes(ip.octets()), address.port()),
                IpAddr::V6(ip) => ip,
            };
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(v6.octets().chunks_exact(4)) {
                *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
            Self::v6(words, address.port())
        }
    }

    impl From<Endpoint> for SocketAddr {
        /// The socket address in the family of the socket: a mapped address stays mapped.
        fn from(endpoint: Endpoint) -> Self {
            let mut octets = [0; 16];
            for (bytes, word) in octets.chunks_exact_mut(4).zip(endpoint.address) {
                bytes.copy_from_slice(&word.to_ne_bytes());
            }
            let ip = Ipv6Addr::from(octets);
            match ip.to_ipv4_mapped() {
                Some(v4) if endpoint.family != AF_INET6 => {
                    SocketAddr::V4(SocketAddrV4::new(v4, endpoint.port))
                }
                _ => SocketAddr::V6(SocketAddrV6::new(ip, endpoint.port, 0, 0)),
            }
        }
    }
}

/// A 128-bit number in two words.
///
/// Every field that a filter can test (an address, a port, a uid, an executable's device and
/// inode, …) is one such number, so one comparison serves them all. It is not `u128`, because BPF
/// has no 128-bit arithmetic.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct Wide {
    /// The upper 64 bits.
    pub hi: u64,
    /// The lower 64 bits.
    pub lo: u64,
}

impl Wide {
    /// The smallest value.
    pub const MIN: Self = Self { hi: 0, lo: 0 };
    /// The largest value.
    pub const MAX: Self = Self { hi: u64::MAX, lo: u64::MAX };

    /// A value of up to 64 bits.
    #[inline(always)]
    pub const fn from_u64(lo: u64) -> Self {
        Self { hi: 0, lo }
    }

    /// Whether `self` is smaller than `other`. Written out, since the derived comparison goes
    /// through an `Ordering` that costs the BPF verifier a branch more.
    #[inline(always)]
    pub const fn below(self, other: Self) -> bool {
        self.hi < other.hi || (self.hi == other.hi && self.lo < other.lo)
    }

    /// Whether `self` lies in the closed range from `first` to `last`.
    #[inline(always)]
    pub const fn within(self, first: Self, last: Self) -> bool {
        !self.below(first) && !last.below(self)
    }
}

impl From<u128> for Wide {
    fn from(value: u128) -> Self {
        Self { hi: (value >> 64) as u64, lo: value as u64 }
    }
}

impl From<Wide> for u128 {
    fn from(value: Wide) -> Self {
        ((value.hi as u128) << 64) | value.lo as u128
    }
}

const _: () = {
    assert!(size_of::<Endpoint>() == 24);
    assert!(core::mem::offset_of!(Endpoint, port) == 16);
    assert!(core::mem::offset_of!(Endpoint, family) == 18);
    assert!(size_of::<Wide>() == 16);
};

#[cfg(test)]
mod tests {
    use super::{Endpoint, Wide};
    use core::net::SocketAddr;
    use proptest::prelude::*;

    #[test]
    fn endpoints_round_trip_and_know_their_kind() {
        for (text, ipv4, unspecified) in [
            ("192.0.2.1:80", true, false),
            ("0.0.0.0:1", true, true),
            ("[::ffff:192.0.2.1]:80", true, false),
            ("[::ffff:0.0.0.0]:80", true, true),
            ("[2001:db8::1]:443", false, false),
            ("[::]:443", false, true),
            ("[::1]:443", false, false),
        ] {
            let address: SocketAddr = text.parse().unwrap();
            let endpoint = Endpoint::from(address);
            assert_eq!(SocketAddr::from(endpoint), address, "{text}");
            assert_eq!(endpoint.is_ipv4(), ipv4, "{text}");
            assert_eq!(endpoint.is_unspecified(), unspecified, "{text}");
        }
    }

    #[test]
    fn groups_are_told_from_receivers() {
        for (text, group) in [
            ("224.0.0.251:5353", true),
            ("[::ffff:239.1.2.3]:1", true),
            ("255.255.255.255:67", true),
            ("[ff02::fb]:5353", true),
            ("223.255.255.255:1", false),
            ("240.0.0.1:1", false),
            ("[fe80::1]:1", false),
        ] {
            assert_eq!(
                Endpoint::from(text.parse::<SocketAddr>().unwrap()).is_group(),
                group,
                "{text}"
            );
        }
    }

    #[test]
    fn an_unspecified_destination_is_this_host() {
        for (destination, bound_to, meant) in [
            ("0.0.0.0:1", "0.0.0.0:2", "127.0.0.1:1"),
            ("0.0.0.0:1", "192.0.2.1:2", "192.0.2.1:1"),
            ("[::]:1", "[::]:2", "[::1]:1"),
            ("[::]:1", "[2001:db8::1]:2", "[::1]:1"),
            ("[::]:1", "[::ffff:192.0.2.1]:2", "[::ffff:127.0.0.1]:1"),
            ("[::ffff:0.0.0.0]:1", "[::]:2", "[::ffff:127.0.0.1]:1"),
            ("[::ffff:0.0.0.0]:1", "[::ffff:192.0.2.1]:2", "[::ffff:192.0.2.1]:1"),
            ("192.0.2.2:1", "192.0.2.1:2", "192.0.2.2:1"),
            ("[2001:db8::2]:1", "[::]:2", "[2001:db8::2]:1"),
        ] {
            let endpoint = |text: &str| Endpoint::from(text.parse::<SocketAddr>().unwrap());
            let found = SocketAddr::from(endpoint(destination).meant(&endpoint(bound_to)));
            assert_eq!(found, meant.parse().unwrap(), "{destination} from {bound_to}");
        }
    }

    #[test]
    fn nowhere_is_in_the_family_of_the_destination() {
        for (destination, nowhere) in [
            ("192.0.2.1:80", "127.0.0.1:0"),
            ("[::ffff:192.0.2.1]:80", "[::ffff:127.0.0.1]:0"),
            ("[2001:db8::1]:443", "[::1]:0"),
        ] {
            let endpoint = Endpoint::from(destination.parse::<SocketAddr>().unwrap());
            let found = SocketAddr::from(endpoint.nowhere());
            assert_eq!(found, nowhere.parse().unwrap(), "{destination}");
        }
    }

    proptest! {
        #[test]
        fn comparisons_are_those_of_128_bit_numbers(a: u128, b: u128, c: u128) {
            let (wa, wb, wc) = (Wide::from(a), Wide::from(b), Wide::from(c));
            prop_assert_eq!(u128::from(wa), a);
            prop_assert_eq!(wa.below(wb), a < b);
            prop_assert_eq!(wa.within(wb, wc), (b..=c).contains(&a));
        }

        #[test]
        fn an_endpoint_orders_as_its_address(a: u128, b: u128) {
            let endpoint = |n: u128| {
                Endpoint::from(SocketAddr::new(core::net::Ipv6Addr::from(n).into(), 1)).value()
            };
            prop_assert_eq!(u128::from(endpoint(a)), a);
            prop_assert_eq!(endpoint(a).below(endpoint(b)), a < b);
        }
    }
}

//! What a filter can test of a connection, as an administrator writes it.

use alloc::{borrow::ToOwned as _, string::String, vec::Vec};
use core::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    record::FileId,
    table::{Field, MAX_CGROUP_LEVEL},
};

/// First and last address of `::ffff:0:0/96`, where IPv4 lies among the 128-bit addresses.
const MAPPED: (u128, u128) = (0xffff_0000_0000, 0xffff_ffff_ffff);

/// What is wrong with the text or the parts of a condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConditionError {
    /// Neither a protocol's name nor its number.
    #[error("{0:?} is not a protocol: write tcp, udp or a number from 0 to 255")]
    Protocol(String),
    /// Not an address, or not a length that its family has.
    #[error(
        "{0:?} is not a destination: write an address or a prefix, such as 192.0.2.1, \
         192.0.2.0/24 or 2001:db8::/32"
    )]
    Prefix(String),
    /// The address of a prefix has bits set that its length leaves open.
    #[error("{text:?} has bits set beyond its length: write {meant}, or leave the length out")]
    HostBits {
        /// What was written.
        text: String,
        /// The prefix of that length in which the address lies.
        meant: Prefix,
    },
    /// Not a port or a range of ports.
    #[error("{0:?} is not a port: write a number from 0 to 65535, or a range such as 8000-8999")]
    Ports(String),
    /// Not a user id or a range of user ids.
    #[error("{0:?} is not a user id: write a number, or a range such as 1000-1999")]
    Users(String),
    /// The cgroup lies deeper than conditions can name.
    #[error(
        "cgroup {path:?} is {level} levels below the root, and a condition reaches {}: name one \
         of its parents",
        MAX_CGROUP_LEVEL
    )]
    CgroupTooDeep {
        /// The cgroup's path.
        path: String,
        /// Its level.
        level: u32,
    },
    /// An id that no object of the kernel has.
    #[error("{what} has the id 0, which nothing in the kernel has: look the id up again")]
    NoIdentity {
        /// What is to be identified, with its name.
        what: String,
    },
}

/// The conditions of a filter. An empty list does not test its field; several values of one field
/// are alternatives; different fields must all match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conditions {
    /// IP protocols.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protocols: Vec<Protocol>,
    /// Destination addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destinations: Vec<Prefix>,
    /// Destination ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
    /// User ids of the calling process, in the initial user namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<UserRange>,
    /// Cgroups of the calling process, each with all that is below it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<CgroupCondition>,
    /// The calling process's executable.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub executables: Vec<ExecutableCondition>,
    /// The executable with which the flow began (contract C38).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub original_executables: Vec<ExecutableCondition>,
    /// The socket's network namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub network_namespaces: Vec<NetnsCondition>,
}

/// A closed range of a field's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FieldRange {
    /// The field's argument: the level of a cgroup, else 0.
    pub(crate) argument: u32,
    /// Smallest value.
    pub(crate) first: u128,
    /// Largest value.
    pub(crate) last: u128,
}

impl Conditions {
    /// Checks what the types do not ensure.
    ///
    /// # Errors
    /// [`ConditionError::CgroupTooDeep`] and [`ConditionError::NoIdentity`].
    pub(crate) fn check(&self) -> Result<(), ConditionError> {
        for cgroup in &self.cgroups {
            if cgroup.level > MAX_CGROUP_LEVEL {
                let path = cgroup.path.clone();
                return Err(ConditionError::CgroupTooDeep { path, level: cgroup.level });
            }
        }
        let cgroups = self.cgroups.iter().map(|c| ("cgroup", &c.path, c.id));
        let files = self.executables.iter().chain(&self.original_executables);
        let files = files.map(|e| ("executable", &e.path, e.file.inode));
        let namespaces = &self.network_namespaces;
        let namespaces = namespaces.iter().map(|n| ("network namespace", &n.name, n.cookie));
        match cgroups.chain(files).chain(namespaces).find(|(_, _, id)| *id == 0) {
            Some((kind, name, _)) => {
                Err(ConditionError::NoIdentity { what: alloc::format!("{kind} {name:?}") })
            }
            None => Ok(()),
        }
    }

    /// The values of `field` that match: sorted ranges that neither overlap nor touch. Empty if
    /// every value matches.
    pub(crate) fn ranges(&self, field: Field) -> Vec<FieldRange> {
        let one = |value: u128| FieldRange { argument: 0, first: value, last: value };
        let file = |e: &ExecutableCondition| {
            one(u128::from(e.file.device) << 64 | u128::from(e.file.inode))
        };
        let mut ranges: Vec<FieldRange> = match field {
            Field::Protocol => self.protocols.iter().map(|p| one(p.0.into())).collect(),
            Field::DestinationAddress => {
                self.destinations.iter().flat_map(|p| p.ranges()).collect()
            }
            Field::DestinationPort => self.ports.iter().map(|p| p.range()).collect(),
            Field::User => self.users.iter().map(|u| u.range()).collect(),
            Field::Cgroup => self
                .cgroups
                .iter()
                .map(|c| FieldRange { argument: c.level, ..one(c.id.into()) })
                .collect(),
            Field::Executable => self.executables.iter().map(file).collect(),
            Field::OriginalExecutable => self.original_executables.iter().map(file).collect(),
            Field::NetworkNamespace => {
                self.network_namespaces.iter().map(|n| one(n.cookie.into())).collect()
            }
        };
        ranges.sort_unstable();
        ranges.dedup_by(|next, merged| {
            let joins =
                next.argument == merged.argument && next.first <= merged.last.saturating_add(1);
            if joins {
                merged.last = merged.last.max(next.last);
            }
            joins
        });
        if let [FieldRange { argument: 0, first: 0, last }] = ranges[..]
            && last == largest_value(field)
        {
            ranges.clear();
        }
        ranges
    }

    /// The automatic weight of a filter with these conditions (contract C49): the more specific,
    /// the heavier. It lies in `0..2^60`.
    ///
    /// Every field that excludes anything adds `2^55 + 2^55 * p / w`, where `w` is the field's
    /// width in bits and `p` how many of them the condition pins down: `w - log2(number of values
    /// that match)`. A destination counts in IPv4 or in IPv6, whichever is less specific; a cgroup
    /// by its level, of 32; executables and network namespaces by how many there are, in 64 bits.
    /// So of two filters the one that can match only connections that the other matches too is
    /// never the lighter.
    pub fn automatic_weight(&self) -> u64 {
        const UNIT: u64 = 1 << 55;
        let mut weight = 0;
        for field in Field::ALL {
            let ranges = self.ranges(field);
            if ranges.is_empty() {
                continue;
            }
            let pinned = |width: u32, sizes: &mut dyn Iterator<Item = u128>| {
                let size: u128 = sizes.sum();
                let pinned = width - size.checked_ilog2().unwrap_or(0).min(width);
                UNIT / u64::from(width) * u64::from(pinned)
            };
            let sizes = ranges.iter().map(|r| r.last - r.first + 1);
            weight += UNIT
                + match field {
                    Field::Protocol => pinned(8, &mut { sizes }),
                    Field::DestinationPort => pinned(16, &mut { sizes }),
                    Field::User => pinned(32, &mut { sizes }),
                    Field::Executable | Field::OriginalExecutable | Field::NetworkNamespace => {
                        pinned(64, &mut { sizes })
                    }
                    Field::Cgroup => {
                        let level = ranges.iter().map(|r| r.argument).min().unwrap_or(0);
                        UNIT / u64::from(MAX_CGROUP_LEVEL + 1) * u64::from(level)
                    }
                    Field::DestinationAddress => {
                        let mapped = ranges.iter().map(|r| {
                            let (first, last) = (r.first.max(MAPPED.0), r.last.min(MAPPED.1));
                            (last + 1).saturating_sub(first)
                        });
                        let all: u128 = sizes.sum();
                        let v4: u128 = mapped.sum();
                        pinned(32, &mut core::iter::once(v4))
                            .min(pinned(128, &mut core::iter::once(all - v4)))
                    }
                };
        }
        weight
    }
}

/// The largest value that a field can have.
pub(crate) const fn largest_value(field: Field) -> u128 {
    match field {
        Field::Protocol => u8::MAX as u128,
        Field::DestinationPort => u16::MAX as u128,
        Field::User => u32::MAX as u128,
        Field::Cgroup | Field::NetworkNamespace => u64::MAX as u128,
        Field::DestinationAddress | Field::Executable | Field::OriginalExecutable => u128::MAX,
    }
}

/// An IP protocol. It reads and prints as `tcp`, `udp` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TCP => f.pad("tcp"),
            Self::UDP => f.pad("udp"),
            Self(number) => number.fmt(f),
        }
    }
}

impl FromStr for Protocol {
    type Err = ConditionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "tcp" => Ok(Self::TCP),
            "udp" => Ok(Self::UDP),
            _ => {
                let number = text.parse();
                number.map(Self).map_err(|_| ConditionError::Protocol(text.to_owned()))
            }
        }
    }
}

/// An address prefix. It reads and prints as `192.0.2.0/24`, `2001:db8::/32`, or an address alone.
///
/// IPv4 and IPv6 are kept apart, as administrators mean them: `0.0.0.0/0` is all of IPv4, mapped
/// addresses on IPv6 sockets included, and `::/0` is all the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// The prefix of `length` bits that begins at `address`. An IPv4-mapped prefix becomes IPv4.
    ///
    /// # Errors
    /// [`ConditionError::Prefix`] if the family has no prefixes of that length;
    /// [`ConditionError::HostBits`] if the address has bits set beyond it.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, ConditionError> {
        let text = || alloc::format!("{address}/{length}");
        let (address, length) = match (address, address.to_canonical()) {
            (IpAddr::V6(_), v4 @ IpAddr::V4(_)) if length >= 96 => (v4, length - 96),
            _ => (address, length),
        };
        let (width, bits) = match address {
            IpAddr::V4(ip) => (32, u128::from(ip.to_bits())),
            IpAddr::V6(ip) => (128, ip.to_bits()),
        };
        if length > width {
            return Err(ConditionError::Prefix(text()));
        }
        let open = u32::from(width - length);
        let network = bits.checked_shr(open).and_then(|n| n.checked_shl(open)).unwrap_or(0);
        if network != bits {
            let address = match address {
                IpAddr::V4(_) => IpAddr::V4((network as u32).into()),
                IpAddr::V6(_) => IpAddr::V6(network.into()),
            };
            let meant = Self { address, length };
            return Err(ConditionError::HostBits { text: text(), meant });
        }
        Ok(Self { address, length })
    }

    /// The first address.
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// Length in bits: up to 32 for IPv4, up to 128 for IPv6.
    pub const fn length(&self) -> u8 {
        self.length
    }

    /// Whether the prefix is a single address.
    pub const fn is_single(&self) -> bool {
        self.length == if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// The prefix as ranges of mapped values. An IPv6 prefix around the IPv4-mapped block is two.
    fn ranges(self) -> impl Iterator<Item = FieldRange> {
        let (first, length) = match self.address {
            IpAddr::V4(ip) => (ip.to_ipv6_mapped().to_bits(), self.length + 96),
            IpAddr::V6(ip) => (ip.to_bits(), self.length),
        };
        let last = first | u128::MAX.checked_shr(length.into()).unwrap_or(0);
        let range = |first, last| FieldRange { argument: 0, first, last };
        let around = self.address.is_ipv6() && first < MAPPED.0 && MAPPED.1 <= last;
        let (below, above) = if around {
            let above = (MAPPED.1 < last).then(|| range(MAPPED.1 + 1, last));
            (range(first, MAPPED.0 - 1), above)
        } else {
            (range(first, last), None)
        };
        core::iter::once(below).chain(above)
    }
}

impl From<IpAddr> for Prefix {
    /// The prefix of this address alone.
    fn from(address: IpAddr) -> Self {
        let address = address.to_canonical();
        Self { address, length: if address.is_ipv4() { 32 } else { 128 } }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_single() {
            return self.address.fmt(f);
        }
        f.pad(&alloc::format!("{}/{}", self.address, self.length))
    }
}

impl FromStr for Prefix {
    type Err = ConditionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ConditionError::Prefix(text.to_owned());
        let Some((address, length)) = text.split_once('/') else {
            return text.parse().map(|ip: IpAddr| Self::from(ip)).map_err(|_| bad());
        };
        Self::new(address.parse().map_err(|_| bad())?, length.parse().map_err(|_| bad())?)
    }
}

/// Defines a closed range of numbers that reads and prints as `N` or `N-M`.
macro_rules! number_range {
    ($(#[$doc:meta])* $name:ident, $number:ty, $error:path) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            first: $number,
            last: $number,
        }

        impl $name {
            /// The range from `first` to `last`, both included; `None` if it is empty.
            pub const fn new(first: $number, last: $number) -> Option<Self> {
                if first <= last { Some(Self { first, last }) } else { None }
            }

            /// The smallest number.
            pub const fn first(&self) -> $number {
                self.first
            }

            /// The largest number.
            pub const fn last(&self) -> $number {
                self.last
            }

            fn range(self) -> FieldRange {
                FieldRange { argument: 0, first: self.first.into(), last: self.last.into() }
            }
        }

        impl From<$number> for $name {
            fn from(number: $number) -> Self {
                Self { first: number, last: number }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if self.first == self.last {
                    return self.first.fmt(f);
                }
                f.pad(&alloc::format!("{}-{}", self.first, self.last))
            }
        }

        impl FromStr for $name {
            type Err = ConditionError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                match (first.parse(), last.parse()) {
                    (Ok(first), Ok(last)) => Self::new(first, last),
                    _ => None,
                }
                .ok_or_else(|| $error(text.to_owned()))
            }
        }
    };
}

number_range!(
    /// Ports. It reads and prints as `443` or `8000-8999`.
    PortRange,
    u16,
    ConditionError::Ports
);

number_range!(
    /// User ids in the initial user namespace. It reads and prints as `1000` or `1000-1999`.
    UserRange,
    u32,
    ConditionError::Users
);

/// Lets types that read and print as text be strings in the policy document.
macro_rules! text_in_document {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

text_in_document!(Protocol, Prefix, PortRange, UserRange);

/// A cgroup and all that is below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupCondition {
    /// Path below the root of the cgroup-v2 hierarchy, for people.
    pub path: String,
    /// Id of the cgroup: the inode number of its directory. This is what is compared.
    pub id: u64,
    /// Depth below the root, which is level 0.
    pub level: u32,
}

/// An executable file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecutableCondition {
    /// Path, for people.
    pub path: String,
    /// The file as the kernel identifies it. This is what is compared.
    #[serde(with = "FileIdInDocument")]
    pub file: FileId,
}

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetnsCondition {
    /// Name or path, for people.
    pub name: String,
    /// Its cookie (`SO_NETNS_COOKIE`). This is what is compared.
    pub cookie: u64,
}

/// How a [`FileId`] stands in the document.
#[derive(Serialize, Deserialize)]
#[serde(remote = "FileId", deny_unknown_fields)]
struct FileIdInDocument {
    device: u64,
    inode: u64,
}

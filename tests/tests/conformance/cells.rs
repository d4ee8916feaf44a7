//! The dimensions of the matrix, and what they mean in addresses.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use carnet_testbed::Topology;
use carnet_tests::puppet;

/// The client's socket, and what it reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`, with IPv4-mapped destinations.
    Mapped,
    /// `AF_INET6`, which refuses mapped destinations.
    V6,
    /// `AF_INET6`, with a destination of either kind.
    Dual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    ConnectedUdp,
    Udp,
}

/// What the client binds its socket to before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bind {
    Nothing,
    /// A port of the unspecified address.
    Port,
    /// An address of the client's namespace.
    Address,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    Loopback,
    /// An address of the client's own namespace.
    Local,
    /// A neighbour.
    OtherHost,
    /// An address that nobody has, and to which there is no route.
    Nobody,
}

/// Where the service listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Loopback,
    Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum User {
    Root,
    /// Without capabilities.
    Ordinary,
}

/// What the policy wants with a flow: told by the destination's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Will {
    /// To redirect it.
    Redirect,
    /// To block what the application asks for.
    BlockAsked,
    /// To redirect it, and to block the service's way to the destination.
    BlockOnward,
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) family: Family,
    pub(crate) protocol: Protocol,
    pub(crate) bind: Bind,
    pub(crate) destination: Destination,
    pub(crate) place: Place,
    pub(crate) user: User,
}

impl Family {
    pub(crate) const ALL: [Self; 4] = [Self::V4, Self::Mapped, Self::V6, Self::Dual];
}

impl Protocol {
    pub(crate) const ALL: [Self; 3] = [Self::Tcp, Self::ConnectedUdp, Self::Udp];

    /// Its number.
    pub(crate) fn number(self) -> u8 {
        if self == Self::Tcp { 6 } else { 17 }
    }
}

impl Bind {
    pub(crate) const ALL: [Self; 3] = [Self::Nothing, Self::Port, Self::Address];
}

impl Destination {
    pub(crate) const ALL: [Self; 4] = [Self::Loopback, Self::Local, Self::OtherHost, Self::Nobody];

    fn v4(self) -> Ipv4Addr {
        match self {
            Self::Loopback => Ipv4Addr::LOCALHOST,
            Self::Local => Topology::CLIENT_V4,
            Self::OtherHost => Topology::DESTINATION_V4,
            // Of TEST-NET-2.
            Self::Nobody => Ipv4Addr::new(198, 51, 100, 7),
        }
    }

    fn v6(self) -> Ipv6Addr {
        match self {
            Self::Loopback => Ipv6Addr::LOCALHOST,
            Self::Local => Topology::CLIENT_V6,
            Self::OtherHost => Topology::DESTINATION_V6,
            Self::Nobody => Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 7),
        }
    }

    /// Both of its addresses, with a port.
    pub(crate) fn addresses(self, port: u16) -> [SocketAddr; 2] {
        [(self.v4(), port).into(), (self.v6(), port).into()]
    }
}

impl Place {
    pub(crate) const ALL: [Self; 2] = [Self::Loopback, Self::Local];

    /// The service's name.
    pub(crate) fn service(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Local => "local",
        }
    }

    /// The service's context.
    pub(crate) fn context(self) -> Vec<u8> {
        format!("for the service on {}", self.service()).into_bytes()
    }

    /// Where the service listens.
    pub(crate) fn addresses(self) -> [IpAddr; 2] {
        let like = match self {
            Self::Loopback => Destination::Loopback,
            Self::Local => Destination::Local,
        };
        [like.v4().into(), like.v6().into()]
    }
}

impl User {
    pub(crate) const ALL: [Self; 2] = [Self::Root, Self::Ordinary];

    pub(crate) fn id(self) -> u32 {
        match self {
            Self::Root => 0,
            Self::Ordinary => 65_534,
        }
    }
}

impl Will {
    pub(crate) const ALL: [Self; 3] = [Self::Redirect, Self::BlockAsked, Self::BlockOnward];

    /// The destination's port for a service.
    pub(crate) fn port(self, place: Place) -> u16 {
        7000 + 10 * self as u16 + place as u16
    }
}

impl Cell {
    /// All cells, those that cannot be included: line by line of the table.
    pub(crate) fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                for bind in Bind::ALL {
                    for destination in Destination::ALL {
                        for place in Place::ALL {
                            for user in User::ALL {
                                let cell =
                                    Self { family, protocol, bind, destination, place, user };
                                cells.push(cell);
                            }
                        }
                    }
                }
            }
        }
        cells
    }

    /// Why it cannot be.
    pub(crate) fn impossible(&self) -> Option<&'static str> {
        (self.family == Family::Dual && self.bind == Bind::Address).then_some(
            "a socket that is bound to an address of one family reaches no destination of the other",
        )
    }

    /// The socket's family.
    pub(crate) fn socket(&self) -> puppet::Family {
        if self.family == Family::V4 { puppet::Family::V4 } else { puppet::Family::V6 }
    }

    /// What the socket is bound to.
    pub(crate) fn own_address(&self) -> Option<SocketAddr> {
        let v4 = self.family == Family::V4;
        let ip: IpAddr = match self.bind {
            Bind::Nothing => return None,
            Bind::Port if v4 => Ipv4Addr::UNSPECIFIED.into(),
            Bind::Port => Ipv6Addr::UNSPECIFIED.into(),
            Bind::Address => match self.family {
                Family::V4 => Topology::CLIENT_V4.into(),
                Family::Mapped => Topology::CLIENT_V4.to_ipv6_mapped().into(),
                Family::V6 | Family::Dual => Topology::CLIENT_V6.into(),
            },
        };
        Some((ip, 0).into())
    }

    /// Where the client wants to go, in the form that its socket takes.
    pub(crate) fn targets(&self, will: Will) -> Vec<SocketAddr> {
        let port = will.port(self.place);
        let (v4, v6) = (self.destination.v4(), self.destination.v6());
        let mapped = (v4.to_ipv6_mapped(), port).into();
        match self.family {
            Family::V4 => vec![(v4, port).into()],
            Family::Mapped => vec![mapped],
            Family::V6 => vec![(v6, port).into()],
            Family::Dual => vec![mapped, (v6, port).into()],
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "AF_INET",
            Self::Mapped => "AF_INET6, mapped",
            Self::V6 => "AF_INET6",
            Self::Dual => "dual-stack",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::ConnectedUdp => "connected UDP",
            Self::Udp => "unconnected UDP",
        })
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nothing => "implicit",
            Self::Port => "a port",
            Self::Address => "an address",
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Loopback => "loopback",
            Self::Local => "local",
            Self::OtherHost => "other host",
            Self::Nobody => "nobody's",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Loopback => "loopback",
            Self::Local => "local",
        })
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Root => "root",
            Self::Ordinary => "an ordinary user",
        })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, protocol, bind, destination, place, user } = self;
        let bound = match bind {
            Bind::Nothing => String::new(),
            _ => format!(" bound to {bind}"),
        };
        write!(
            f,
            "{family}, {protocol}{bound}, to {destination} through the service on {place}, as {user}"
        )
    }
}

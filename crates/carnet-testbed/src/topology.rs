//! Ready-made networks.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::{Error, NetworkNamespace, connect_veth};

/// Two namespaces joined by one cable, with the addresses that RFC 5737 and RFC 3849 set aside for
/// documentation:
///
/// ```text
///   client                                 destination
///   lo                                     lo
///   veth0 192.0.2.1/24   ────────────────  veth0 192.0.2.2/24
///         2001:db8::1/64                         2001:db8::2/64
/// ```
///
/// Any number of them exist side by side, with the same addresses, unseen by each other.
#[derive(Debug)]
pub struct Topology {
    /// Where applications and redirect services run.
    pub client: NetworkNamespace,
    /// Where the original destinations are.
    pub destination: NetworkNamespace,
}

impl Topology {
    /// The client's IPv4 address.
    pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    /// The destination's IPv4 address.
    pub const DESTINATION_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    /// The client's IPv6 address.
    pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    /// The destination's IPv6 address.
    pub const DESTINATION_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
    /// The name of the link in either namespace.
    pub const LINK: &str = "veth0";

    /// Makes both namespaces, the cable and the addresses. All are usable on return.
    ///
    /// # Errors
    /// [`Error::Io`] with the step that failed (`EPERM` without root).
    pub fn client_and_destination() -> Result<Self, Error> {
        let client = NetworkNamespace::create("client")?;
        let destination = NetworkNamespace::create("destination")?;
        connect_veth(&client, Self::LINK, &destination, Self::LINK)?;
        client.add_address(&format!("{}/24", Self::CLIENT_V4), Self::LINK)?;
        client.add_address(&format!("{}/64", Self::CLIENT_V6), Self::LINK)?;
        destination.add_address(&format!("{}/24", Self::DESTINATION_V4), Self::LINK)?;
        destination.add_address(&format!("{}/64", Self::DESTINATION_V6), Self::LINK)?;
        Ok(Self { client, destination })
    }
}

//! The PROXY protocol, version 2, both ways: a connection's addresses, said before its first byte.
//!
//! Towards a service that expects it ([`Announcing`]): the kernel cannot put bytes into a stream, so this
//! program accepts the redirected connection and hands it on to that service, with the application's
//! address as the source and the original destination. From a proxy that sends it ([`HeaderSource`]): the
//! destination that it names is where the connection goes. Between hosts that both have Carnet the header
//! carries the flow's record too ([`chain`](crate::chain)).

use crate::chain::gate::{self, Gate};
use crate::chain::keyring::Keyring;
use crate::chain::keys::Keys;
use crate::chain::tlv::{self, Envelope, Letter, Refusal};
use crate::origin::{Announced, FlowSource, Origin, OriginFuture, Route};
use crate::sys;
use carnet::{Error, Onwards, Operation, PortableRecord};
use ipnet::IpNet;
use proxy_header::{ParseConfig, Protocol, ProxiedAddress, ProxyHeader, Tlv};
use ring::rand::{SecureRandom as _, SystemRandom};
use std::borrow::Cow;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The part of a header before the addresses: signature, version, family, length.
const FIXED: usize = 16;
/// How a header begins.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Longest header that is read, in bytes. Certificates and the like are not expected here.
const LONGEST: usize = 4096;

/// Hands connections on to a service that expects the PROXY protocol.
pub struct Announcing {
    /// Tells where connections come from and go to.
    pub source: Arc<dyn FlowSource>,
    /// Where that service listens.
    pub service: SocketAddr,
    /// If the service is another host's gateway: the keys under which it gets the flows' records.
    pub chain: Option<Arc<Keyring>>,
}

impl FlowSource for Announcing {
    fn origin(&self, accepted: &TcpStream) -> Result<Origin, Error> {
        self.hand_on(accepted, self.source.origin(accepted)?)
    }

    fn origin_in_time<'a>(&'a self, accepted: &'a TcpStream, limit: Duration) -> OriginFuture<'a> {
        Box::pin(async move {
            self.hand_on(accepted, self.source.origin_in_time(accepted, limit).await?)
        })
    }
}

impl Announcing {
    fn hand_on(&self, accepted: &TcpStream, origin: Origin) -> Result<Origin, Error> {
        let source = accepted.peer_addr().map_err(unreadable)?;
        let chain = match &self.chain {
            Some(keys) => Some((keys.keys(), carnet::export_redirect_records(accepted)?)),
            None => None,
        };
        let flow = origin.flow.map(|flow| flow.id);
        let announcement = Announcement { source, destination: origin.destination, flow, chain };
        let service = self.service;
        let route = Box::new(origin.route.to(service));
        Ok(Origin { route: Route::Announced(Announced { route, service, announcement }), ..origin })
    }
}

/// What a service is told of a connection before its first byte.
#[derive(Clone, Debug)]
pub struct Announcement {
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// The flow's number, if it has one.
    pub flow: Option<u64>,
    /// The flow's record, and the keys under which it is sealed.
    pub chain: Option<(Arc<Keys>, PortableRecord)>,
}

impl Announcement {
    /// The header for a service at this address. It is to be sent soon: what is sealed expires.
    ///
    /// # Errors
    /// If the system has no random bytes for a seal. Others cannot occur: the header would be too long.
    pub fn header(&self, service: SocketAddr) -> io::Result<Vec<u8>> {
        let flow = self.flow.map(|flow| flow.to_string());
        let mut tlvs: Vec<(u8, &[u8])> = Vec::new();
        tlvs.extend(flow.as_ref().map(|flow| (UNIQUE_ID, flow.as_bytes())));
        let sealed = match &self.chain {
            Some((keys, record)) => Some(self.sealed(keys, record, service)?),
            None => None,
        };
        tlvs.extend(sealed.as_ref().map(|value| (tlv::TYPE, &value[..])));
        header_with(self.source, self.destination, &tlvs)
    }

    fn sealed(
        &self,
        keys: &Keys,
        record: &PortableRecord,
        service: SocketAddr,
    ) -> io::Result<Vec<u8>> {
        let (source, destination) = in_one_family(self.source, self.destination);
        let audience = SocketAddr::new(service.ip().to_canonical(), service.port());
        let mut nonce = [0; tlv::NONCE];
        let random = SystemRandom::new().fill(&mut nonce);
        random.map_err(|_| io::Error::other("the system has no random bytes"))?;
        let letter = Letter { issued_ms: gate::now_ms(), nonce, record: record.clone() };
        Ok(tlv::seal(keys, &Envelope { source, destination, audience }, &letter))
    }
}

/// `PP2_TYPE_UNIQUE_ID`.
const UNIQUE_ID: u8 = 5;

/// A header of version 2 with these TLVs, each a type and a value.
///
/// # Errors
/// If it would be too long.
pub fn header_with(
    source: SocketAddr,
    destination: SocketAddr,
    tlvs: &[(u8, &[u8])],
) -> io::Result<Vec<u8>> {
    let (source, destination) = in_one_family(source, destination);
    let mut header = ProxyHeader::with_address(ProxiedAddress::stream(source, destination));
    for &(kind, value) in tlvs {
        header.append_tlv(Tlv::Custom(kind, value.into()));
    }
    let mut bytes = Vec::new();
    let too_long = |_| io::Error::new(ErrorKind::InvalidInput, "too much for a PROXY header");
    header.encode_v2(&mut bytes).map_err(too_long)?;
    Ok(bytes)
}

/// Both addresses as IPv4 if both are, mapped ones among them; else both as IPv6.
fn in_one_family(one: SocketAddr, other: SocketAddr) -> (SocketAddr, SocketAddr) {
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let wide = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    let (one, other) = (plain(one), plain(other));
    if one.is_ipv4() == other.is_ipv4() { (one, other) } else { (wide(one), wide(other)) }
}

/// Connections of a proxy that sends the PROXY protocol, and so says where they go.
///
/// Whoever may connect decides by that where this program connects to: only the addresses that are named
/// here are believed.
#[derive(Clone, Debug)]
pub struct HeaderSource {
    /// From where connections are taken.
    pub from: Vec<IpNet>,
    /// What takes the records of flows that began on another host, if there is a key for them.
    pub gate: Option<Arc<Gate>>,
}

impl FlowSource for HeaderSource {
    fn origin(&self, _: &TcpStream) -> Result<Origin, Error> {
        Err(Error::Unsupported { operation: Operation::OriginalDestination })
    }

    fn origin_in_time<'a>(&'a self, accepted: &'a TcpStream, limit: Duration) -> OriginFuture<'a> {
        Box::pin(async move {
            let peer = accepted.peer_addr().map_err(unreadable)?.ip().to_canonical();
            if !self.from.iter().any(|prefix| prefix.contains(&peer)) {
                return Err(Error::NotRedirected { operation: Operation::OriginalDestination });
            }
            let late = |_| io::Error::new(ErrorKind::TimedOut, "no PROXY header came in time");
            let bytes = timeout(limit, read(accepted)).await.map_err(late);
            let bytes = bytes.and_then(|bytes| bytes).map_err(unreadable)?;
            let header = read_header(&bytes).map_err(unreadable)?;
            let local = accepted.local_addr().map_err(unreadable)?;
            let destination = header.destination;
            // It would come here again, for ever.
            if local == destination {
                return Err(Error::NotRedirected { operation: Operation::OriginalDestination });
            }
            let record = match &self.gate {
                Some(gate) => gate.take(&header, local),
                None => Ok(None),
            };
            let refused =
                |refusal| unreadable(io::Error::new(ErrorKind::PermissionDenied, refusal));
            Ok(match record.map_err(refused)? {
                Some(record) => {
                    let app = sys::app_of(&record);
                    let route = Route::Recorded(Box::new(Onwards::import(record, destination)));
                    Origin { destination, app, flow: None, route }
                }
                None => {
                    let route = Route::Plain(destination);
                    Origin { destination, app: None, flow: None, route }
                }
            })
        })
    }
}

fn unreadable(source: io::Error) -> Error {
    Error::Os { operation: Operation::OriginalDestination, source }
}

/// Reads a header, and nothing of what comes after it.
async fn read(stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; FIXED];
    read_exactly(stream, &mut bytes).await?;
    let rest = rest_after(&bytes)?;
    bytes.resize(FIXED + rest, 0);
    read_exactly(stream, bytes.get_mut(FIXED..).unwrap_or_default()).await?;
    Ok(bytes)
}

/// How many bytes a header has after its fixed part.
fn rest_after(fixed: &[u8]) -> io::Result<usize> {
    let invalid = |what| io::Error::new(ErrorKind::InvalidData, what);
    if !fixed.starts_with(&SIGNATURE) {
        return Err(invalid("no PROXY header of version 2"));
    }
    let length = fixed.get(14..FIXED).and_then(|length| <[u8; 2]>::try_from(length).ok());
    let rest = length.map(u16::from_be_bytes).map_or(0, usize::from);
    if FIXED + rest > LONGEST { Err(invalid("a PROXY header that is too long")) } else { Ok(rest) }
}

async fn read_exactly(stream: &TcpStream, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        stream.readable().await?;
        match stream.try_read(into) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => into = into.get_mut(read..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a header says.
#[derive(Clone, Debug)]
pub struct Header<'a> {
    /// Where the connection comes from, as the sender says.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    rest: ProxyHeader<'a>,
}

impl Header<'_> {
    /// The value of the TLV with the record of a chain, if there is one.
    ///
    /// # Errors
    /// [`Refusal::Malformed`] if there are two, or what is there cannot be read.
    pub fn chain(&self) -> Result<Option<Cow<'_, [u8]>>, Refusal> {
        let mut found = None;
        for part in self.rest.tlvs() {
            if let Tlv::Custom(tlv::TYPE, value) = part.map_err(|_| Refusal::Malformed)?
                && found.replace(value).is_some()
            {
                return Err(Refusal::Malformed);
            }
        }
        Ok(found)
    }
}

/// Reads a header.
///
/// # Errors
/// `InvalidData` if it is none of a TCP connection: a proxy says of its own checks of health that they go
/// nowhere.
pub fn read_header(bytes: &[u8]) -> io::Result<Header<'_>> {
    let invalid = |what| io::Error::new(ErrorKind::InvalidData, what);
    let config = ParseConfig { include_tlvs: true, allow_v1: false, allow_v2: true };
    let (rest, _) = ProxyHeader::parse(bytes, config).map_err(|_| invalid("a bad PROXY header"))?;
    match rest.proxied_address().cloned() {
        Some(ProxiedAddress { protocol: Protocol::Stream, source, destination }) => {
            Ok(Header { source, destination, rest })
        }
        _ => Err(invalid("a PROXY header of no TCP connection")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::testing::{keys, record};
    use proptest::prelude::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A header without a record.
    fn header(
        source: SocketAddr,
        destination: SocketAddr,
        flow: Option<u64>,
    ) -> io::Result<Vec<u8>> {
        let announcement = Announcement { source, destination, flow, chain: None };
        announcement.header(address("127.0.0.1:9"))
    }

    fn destination_in(bytes: &[u8]) -> io::Result<SocketAddr> {
        read_header(bytes).map(|header| header.destination)
    }

    #[test]
    fn the_bytes_of_a_header_are_those_of_the_specification() {
        let bytes = header(address("192.0.2.1:4660"), address("198.51.100.2:443"), None).unwrap();
        let expected = [
            &SIGNATURE[..],
            &[0x21, 0x11, 0, 12],
            &[192, 0, 2, 1],
            &[198, 51, 100, 2],
            &[0x12, 0x34],
            &[0x01, 0xbb],
        ];
        assert_eq!(bytes, expected.concat());
        let told =
            header(address("192.0.2.1:4660"), address("198.51.100.2:443"), Some(17)).unwrap();
        assert_eq!(told[15], 12 + 3 + 2);
        assert_eq!(&told[bytes.len()..], [&[5, 0, 2][..], b"17"].concat());
    }

    #[test]
    fn both_addresses_are_of_one_family() {
        for (source, destination, expected) in [
            ("127.0.0.1:1", "192.0.2.2:2", "192.0.2.2:2"),
            ("[::ffff:127.0.0.1]:1", "[::ffff:192.0.2.2]:2", "192.0.2.2:2"),
            ("[::1]:1", "[2001:db8::2]:2", "[2001:db8::2]:2"),
            ("[::1]:1", "192.0.2.2:2", "[::ffff:192.0.2.2]:2"),
            ("127.0.0.1:1", "[2001:db8::2]:2", "[2001:db8::2]:2"),
        ] {
            let bytes = header(address(source), address(destination), Some(1)).unwrap();
            assert_eq!(destination_in(&bytes).unwrap(), address(expected), "{source}");
            assert_eq!(rest_after(&bytes).unwrap(), bytes.len() - FIXED);
        }
    }

    #[test]
    fn what_is_no_header_of_a_connection_is_refused() {
        let good = header(address("127.0.0.1:1"), address("192.0.2.2:2"), None).unwrap();
        let local = [&good[..12], &[0x20], &good[13..]].concat();
        let datagrams = [&good[..13], &[0x12], &good[14..]].concat();
        let unspecified = [&good[..13], &[0, 0, 0]].concat();
        for bytes in [&local, &datagrams, &unspecified, &good[..20].to_vec(), &vec![]] {
            assert!(destination_in(bytes).is_err(), "{bytes:?}");
        }
        assert!(rest_after(b"GET / HTTP/1.1\r\n").is_err());
        let long = [&good[..14], &[0xff, 0xff]].concat();
        assert!(rest_after(&long).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn a_record_goes_from_an_announcement_through_a_gate() {
        for (source, destination, service) in [
            ("127.0.0.1:1", "192.0.2.2:2", "192.0.2.9:3"),
            ("[::1]:1", "192.0.2.2:2", "[::ffff:192.0.2.9]:3"),
            ("127.0.0.1:1", "[2001:db8::2]:2", "[2001:db8::9]:3"),
        ] {
            let [source, destination, service] = [source, destination, service].map(address);
            let chain = Some((Arc::new(keys(1)), record(3)));
            let gate = Gate::new(Arc::new(keys(1).into()), false);
            let announcement = Announcement { source, destination, flow: Some(17), chain };
            let bytes = announcement.header(service).unwrap();
            assert!(bytes.len() < LONGEST);
            let told = read_header(&bytes).unwrap();
            assert_eq!(gate.take(&told, service), Ok(Some(record(3))));
            assert_eq!(gate.take(&told, service), Err(Refusal::Replayed));
            // Each is sealed anew.
            let again = announcement.header(service).unwrap();
            assert_eq!(gate.take(&read_header(&again).unwrap(), service), Ok(Some(record(3))));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            ips in prop::array::uniform2(any::<IpAddr>()),
            ports in prop::array::uniform2(any::<u16>()),
            flow: Option<u64>,
        ) {
            let [source, destination] = [0, 1].map(|n| SocketAddr::new(ips[n], ports[n]));
            let bytes = header(source, destination, flow).unwrap();
            let read = destination_in(&bytes).unwrap();
            prop_assert_eq!(read.ip().to_canonical(), destination.ip().to_canonical());
            prop_assert_eq!(read.port(), destination.port());
        }

        #[test]
        fn arbitrary_bytes_are_taken_with_care(bytes: Vec<u8>) {
            let _any = (rest_after(&bytes), read_header(&bytes).map(|header| header.chain().is_ok()));
        }
    }
}

//! The TLV of the PROXY header that carries a record to another host.
//!
//! Type 0xE4, of those that the protocol leaves to applications; numbers in network byte order:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | version, 1 |
//! | 1 | 8 | name of the key: the first bytes of SHA-256 over `carnet chain key`, a zero byte and the key |
//! | 9 | 8 | time of issue, milliseconds since 1970 (UTC) |
//! | 17 | 16 | nonce: random, used once |
//! | 33 | 16 | audience: the address that the sender connects to, IPv4 as `::ffff:a.b.c.d` |
//! | 49 | 2 | its port |
//! | 51 | 424 to 920 | the record, a [`PortableRecord`], in its own byte order |
//! | last 32 | 32 | seal: HMAC-SHA256 over the below |
//!
//! Sealed are, one after the other: the text `carnet chain, version 1` and a zero byte; the header's address
//! family, 4 or 6, as one byte; its source and its destination, each an address in 16 bytes and a port in 2;
//! and the TLV up to the seal. So a record is good with the header that it came with alone, and for the
//! gateway that it was sent to.

use super::keys::{ID, Id, Keys};
use carnet::PortableRecord;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The type of the TLV.
pub const TYPE: u8 = 0xE4;
/// Length of a nonce in bytes.
pub const NONCE: usize = 16;

const VERSION: u8 = 1;
const CONTEXT: &[u8] = b"carnet chain, version 1\0";
const SEAL: usize = 32;
/// An address in 16 bytes, and a port.
const PLACE: usize = 18;

/// The header in which the TLV is, and where it is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The header's source, of the same family as the destination.
    pub source: SocketAddr,
    /// The header's destination.
    pub destination: SocketAddr,
    /// The address and port at which the receiver takes it.
    pub audience: SocketAddr,
}

/// What is sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// When it was sealed: milliseconds since 1970 (UTC).
    pub issued_ms: u64,
    /// Random, and used once.
    pub nonce: [u8; NONCE],
    /// The record.
    pub record: PortableRecord,
}

/// Why a header is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The header has no such TLV, and has to have one.
    #[error("its PROXY header has no record of a chain, which is wanted (see --chain-optional)")]
    Missing,
    /// It is no TLV of a chain, of an unknown version, or there are two.
    #[error("the record of a chain in its PROXY header is malformed")]
    Malformed,
    /// It is sealed under a key that this host does not have.
    #[error("the record of a chain in its PROXY header is under a key that is not in --chain-key")]
    UnknownKey,
    /// The seal is wrong: it was forged, or altered on its way, or is of another header.
    #[error("the record of a chain in its PROXY header is forged")]
    Forged,
    /// It was sealed for another gateway.
    #[error("the record of a chain in its PROXY header is for another address than this one")]
    Audience,
    /// It was sealed too long ago.
    #[error("the record of a chain in its PROXY header has expired, or the hosts' clocks differ")]
    Expired,
    /// It was sealed at a time that is yet to come.
    #[error(
        "the record of a chain in its PROXY header is from the future: the hosts' clocks differ"
    )]
    Future,
    /// It was sealed before this program began, and may have been taken by the one before.
    #[error("the record of a chain in its PROXY header is older than this program")]
    Earlier,
    /// It was taken before.
    #[error("the record of a chain in its PROXY header was used before")]
    Replayed,
    /// So many were taken that no other one can be remembered.
    #[error("more records of chains come than can be remembered")]
    Full,
}

impl Refusal {
    /// All of them, in their order.
    pub const ALL: [Self; 10] = [
        Self::Missing,
        Self::Malformed,
        Self::UnknownKey,
        Self::Forged,
        Self::Audience,
        Self::Expired,
        Self::Future,
        Self::Earlier,
        Self::Replayed,
        Self::Full,
    ];

    /// Its name, in a word or two.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::UnknownKey => "unknown key",
            Self::Forged => "forged",
            Self::Audience => "other audience",
            Self::Expired => "expired",
            Self::Future => "from the future",
            Self::Earlier => "older than this program",
            Self::Replayed => "replayed",
            Self::Full => "too many",
        }
    }
}

/// Seals a letter: the value of the TLV.
pub fn seal(keys: &Keys, envelope: &Envelope, letter: &Letter) -> Vec<u8> {
    let record = letter.record.as_bytes();
    let mut value = vec![VERSION];
    value.extend_from_slice(&keys.id());
    value.extend_from_slice(&letter.issued_ms.to_be_bytes());
    value.extend_from_slice(&letter.nonce);
    value.extend_from_slice(&place(envelope.audience));
    value.extend_from_slice(record);
    let seal = keys.seal(&sealed(envelope, &value));
    value.extend_from_slice(seal.as_ref());
    value
}

/// Opens the value of a TLV that came in this envelope. Whether it is fresh, and was not opened before, is
/// for the caller to see.
///
/// # Errors
/// [`Refusal::Malformed`], [`Refusal::UnknownKey`], [`Refusal::Forged`], [`Refusal::Audience`].
pub fn open(keys: &Keys, envelope: &Envelope, value: &[u8]) -> Result<Letter, Refusal> {
    let parts = Parts::of(value).ok_or(Refusal::Malformed)?;
    let message = sealed(envelope, parts.sealed);
    match keys.is_sealed(parts.id, &message, parts.seal) {
        None => return Err(Refusal::UnknownKey),
        Some(false) => return Err(Refusal::Forged),
        Some(true) => {}
    }
    if parts.audience != place(envelope.audience) {
        return Err(Refusal::Audience);
    }
    let record = PortableRecord::try_from(parts.record).map_err(|_| Refusal::Malformed)?;
    Ok(Letter { issued_ms: parts.issued_ms, nonce: parts.nonce, record })
}

/// A value, taken apart.
struct Parts<'a> {
    id: Id,
    issued_ms: u64,
    nonce: [u8; NONCE],
    audience: [u8; PLACE],
    record: &'a [u8],
    /// All of it but the seal.
    sealed: &'a [u8],
    seal: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(value: &'a [u8]) -> Option<Self> {
        let (sealed, seal) = value.split_last_chunk::<SEAL>()?;
        let (&[version], rest) = sealed.split_first_chunk()?;
        let (&id, rest) = rest.split_first_chunk::<ID>()?;
        let (&issued, rest) = rest.split_first_chunk()?;
        let (&nonce, rest) = rest.split_first_chunk::<NONCE>()?;
        let (&audience, record) = rest.split_first_chunk::<PLACE>()?;
        let issued_ms = u64::from_be_bytes(issued);
        (version == VERSION).then_some(Self {
            id,
            issued_ms,
            nonce,
            audience,
            record,
            sealed,
            seal,
        })
    }
}

/// What the seal is over.
fn sealed(envelope: &Envelope, value: &[u8]) -> Vec<u8> {
    let family = if envelope.destination.is_ipv4() { 4 } else { 6 };
    let mut message = CONTEXT.to_vec();
    message.push(family);
    message.extend_from_slice(&place(envelope.source));
    message.extend_from_slice(&place(envelope.destination));
    message.extend_from_slice(value);
    message
}

/// An address and a port, in one form for both families.
fn place(address: SocketAddr) -> [u8; PLACE] {
    let ip: Ipv6Addr = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut place = [0; PLACE];
    let bytes = ip.octets().into_iter().chain(address.port().to_be_bytes());
    place.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    place
}

#[cfg(test)]
mod tests {
    use super::super::testing::{keys, record};
    use super::*;
    use proptest::prelude::*;

    fn envelope() -> Envelope {
        let [source, destination, audience] =
            ["127.0.0.1:4660", "198.51.100.2:443", "192.0.2.2:15003"]
                .map(|text| text.parse().unwrap());
        Envelope { source, destination, audience }
    }

    fn letter(hops: u16) -> Letter {
        Letter { issued_ms: 0x0102_0304, nonce: [7; NONCE], record: record(hops) }
    }

    #[test]
    fn the_value_is_laid_out_as_is_said() {
        for (hops, length) in [(1, 507), (32, 1003)] {
            let letter = letter(hops);
            let value = seal(&keys(1), &envelope(), &letter);
            assert_eq!(value.len(), length);
            assert_eq!(value[0], 1);
            assert_eq!(value[1..9], keys(1).id());
            assert_eq!(value[9..17], [0, 0, 0, 0, 1, 2, 3, 4]);
            assert_eq!(value[17..33], [7; 16]);
            let address = [&[0; 10][..], &[0xff, 0xff, 192, 0, 2, 2], &[0x3a, 0x9b]].concat();
            assert_eq!(value[33..51], address);
            assert_eq!(&value[51..length - 32], letter.record.as_bytes());
            assert_eq!(open(&keys(1), &envelope(), &value), Ok(letter));
        }
    }

    /// The seal, computed apart from this code (Python's hmac): a change would part old hosts from new ones.
    #[test]
    fn the_seal_is_that_of_the_page() {
        let value = seal(&keys(1), &envelope(), &letter(1));
        let hex: String = value[475..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "797170015963ba7b485b8250c64f58e67bc7e1c2bb17ab9d549ed3767609f673");
        let id: String = value[1..9].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(id, "0ce57697be5729c3");
    }

    #[test]
    fn every_bit_of_the_value_counts() {
        let value = seal(&keys(1), &envelope(), &letter(1));
        for bit in 0..value.len() * 8 {
            let mut changed = value.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let expected = match bit / 8 {
                0 => Refusal::Malformed,
                1..9 => Refusal::UnknownKey,
                _ => Refusal::Forged,
            };
            assert_eq!(open(&keys(1), &envelope(), &changed), Err(expected), "bit {bit}");
        }
    }

    #[test]
    fn it_is_good_in_its_own_envelope_alone() {
        let value = seal(&keys(1), &envelope(), &letter(1));
        let with = |change: fn(&mut Envelope)| {
            let mut other = envelope();
            change(&mut other);
            open(&keys(1), &other, &value).map(drop)
        };
        assert_eq!(with(|_| {}), Ok(()));
        assert_eq!(with(|e| e.source.set_port(1)), Err(Refusal::Forged));
        assert_eq!(with(|e| e.destination.set_port(1)), Err(Refusal::Forged));
        assert_eq!(with(|e| e.destination.set_ip([198, 51, 100, 3].into())), Err(Refusal::Forged));
        // The same addresses in another family.
        let mapped: fn(&mut SocketAddr) = |address| {
            let IpAddr::V4(ip) = address.ip() else { unreachable!() };
            address.set_ip(ip.to_ipv6_mapped().into());
        };
        let mut wide = envelope();
        mapped(&mut wide.source);
        mapped(&mut wide.destination);
        assert_eq!(open(&keys(1), &wide, &value).map(drop), Err(Refusal::Forged));
        // What it was sealed for is sealed too, and no other gateway takes it.
        assert_eq!(with(|e| e.audience.set_port(1)), Err(Refusal::Audience));
        assert_eq!(with(|e| e.audience.set_ip([192, 0, 2, 3].into())), Err(Refusal::Audience));
        assert_eq!(open(&keys(2), &envelope(), &value).map(drop), Err(Refusal::UnknownKey));
    }

    #[test]
    fn what_is_sealed_and_is_no_record_is_malformed() {
        let value = seal(&keys(1), &envelope(), &letter(2));
        let mut sealed_well = value[..value.len() - 32 - 16].to_vec();
        let tag = keys(1).seal(&sealed(&envelope(), &sealed_well));
        sealed_well.extend_from_slice(tag.as_ref());
        assert_eq!(open(&keys(1), &envelope(), &sealed_well), Err(Refusal::Malformed));
    }

    #[test]
    fn every_refusal_has_a_name_of_its_own() {
        for (at, one) in Refusal::ALL.iter().enumerate() {
            assert_eq!(*one as usize, at);
            assert!(Refusal::ALL[..at].iter().all(|other| other.name() != one.name()));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_never_opened(
            bytes in prop::collection::vec(any::<u8>(), 0..1200),
            version: bool,
            id: bool,
        ) {
            let mut bytes = bytes;
            if let (true, Some(first)) = (version, bytes.first_mut()) {
                *first = VERSION;
            }
            if let (true, Some(place)) = (id, bytes.get_mut(1..9)) {
                place.copy_from_slice(&keys(1).id());
            }
            prop_assert!(open(&keys(1), &envelope(), &bytes).is_err());
        }
    }
}

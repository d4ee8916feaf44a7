//! The first packets of QUIC clients (RFC 9000, 9001 and 9369): the ClientHello in them, and the
//! answer that refuses a connection.
//!
//! A client's Initial packets are protected with keys that follow from the connection id that it
//! chose, so that anybody on the way can read them. They carry pieces of the ClientHello, in any
//! order and over several packets and datagrams: [`Hello`] puts them together.

use super::tls::{self, Hello as Message};
use super::{LIMIT, Protocol, Seen};
use ring::aead::quic::{AES_128, HeaderProtectionKey};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use std::fmt;

/// Longest connection id of the versions that are known.
const MAX_CONNECTION_ID: usize = 20;
/// A datagram in which a client begins has at least this length (RFC 9000, section 14.1).
const MIN_FIRST: usize = 1200;
/// Bytes of an AEAD tag, and of the sample for the protection of headers.
const TAG: usize = 16;
/// Where the sample is, counted from the packet number.
const SAMPLE_AT: usize = 4;

/// The versions whose packets can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// What a packet with a long header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Initial,
    ZeroRtt,
    Handshake,
    Retry,
}

impl Version {
    fn of(number: u32) -> Option<Self> {
        [Self::V1, Self::V2].into_iter().find(|version| version.number() == number)
    }

    fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 0x6b33_43cf,
        }
    }

    /// The packet types in the order of their numbers.
    fn kinds(self) -> [Kind; 4] {
        match self {
            Self::V1 => [Kind::Initial, Kind::ZeroRtt, Kind::Handshake, Kind::Retry],
            Self::V2 => [Kind::Retry, Kind::Initial, Kind::ZeroRtt, Kind::Handshake],
        }
    }

    fn salt(self) -> [u8; 20] {
        match self {
            Self::V1 => [
                0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8,
                0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a,
            ],
            Self::V2 => [
                0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26,
                0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9,
            ],
        }
    }

    /// The labels of key, initialisation vector and header protection key.
    fn labels(self) -> [&'static str; 3] {
        match self {
            Self::V1 => ["quic key", "quic iv", "quic hp"],
            Self::V2 => ["quicv2 key", "quicv2 iv", "quicv2 hp"],
        }
    }
}

/// Who protected a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// The keys of Initial packets.
struct Keys {
    key: LessSafeKey,
    iv: [u8; 12],
    header: HeaderProtectionKey,
}

/// A length, as `ring` wants to have it.
#[derive(Clone, Copy)]
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

impl Keys {
    /// The keys for a connection id that a client chose. None does not occur.
    fn new(version: Version, connection: &[u8], side: Side) -> Option<Self> {
        let initial = Salt::new(HKDF_SHA256, &version.salt()).extract(connection);
        let label = match side {
            Side::Client => "client in",
            Side::Server => "server in",
        };
        let mut secret = [0; 32];
        expand(&initial, label, &mut secret)?;
        let secret = Prk::new_less_safe(HKDF_SHA256, &secret);
        let (mut key, mut iv, mut header) = ([0; 16], [0; 12], [0; 16]);
        let [for_key, for_iv, for_header] = version.labels();
        expand(&secret, for_key, &mut key)?;
        expand(&secret, for_iv, &mut iv)?;
        expand(&secret, for_header, &mut header)?;
        Some(Self {
            key: LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).ok()?),
            iv,
            header: HeaderProtectionKey::new(&AES_128, &header).ok()?,
        })
    }

    fn nonce(&self, number: u32) -> Nonce {
        let mut nonce = self.iv;
        for (byte, part) in nonce[8..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= part;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// The mask for the header of a packet whose number is at `at`.
    fn mask(&self, packet: &[u8], at: usize) -> Option<[u8; 5]> {
        let sample = packet.get(at + SAMPLE_AT..)?.get(..TAG)?;
        self.header.new_mask(sample).ok()
    }

    /// The payload of a packet whose number is at `at`; none if other keys protected it.
    fn open(&self, packet: &[u8], at: usize) -> Option<Vec<u8>> {
        let mut packet = packet.to_vec();
        let mask = self.mask(&packet, at)?;
        let first = packet.first_mut()?;
        *first ^= mask[0] & 0x0f;
        let length = usize::from(*first & 3) + 1;
        let mut number = [0; 4];
        for (index, byte) in packet.get_mut(at..at + length)?.iter_mut().enumerate() {
            *byte ^= mask[1 + index];
            number[4 - length + index] = *byte;
        }
        let (header, payload) = packet.split_at_mut_checked(at + length)?;
        // Before any were acknowledged, numbers are sent in full.
        let nonce = self.nonce(u32::from_be_bytes(number));
        let opened = self.key.open_in_place(nonce, Aad::from(&*header), payload).ok()?;
        Some(opened.to_vec())
    }

    /// Protects a packet: `header` ends with its number, of `length` bytes.
    fn seal(&self, header: &[u8], length: usize, payload: &[u8]) -> Option<Vec<u8>> {
        let at = header.len().checked_sub(length)?;
        let mut number = [0; 4];
        number.get_mut(4 - length..)?.copy_from_slice(header.get(at..)?);
        let nonce = self.nonce(u32::from_be_bytes(number));
        let mut body = payload.to_vec();
        self.key.seal_in_place_append_tag(nonce, Aad::from(header), &mut body).ok()?;
        let mut packet = [header, &body].concat();
        let mask = self.mask(&packet, at)?;
        *packet.first_mut()? ^= mask[0] & 0x0f;
        for (byte, part) in packet.get_mut(at..header.len())?.iter_mut().zip(&mask[1..]) {
            *byte ^= part;
        }
        Some(packet)
    }
}

/// HKDF-Expand-Label of TLS 1.3, without a context.
fn expand(secret: &Prk, label: &str, out: &mut [u8]) -> Option<()> {
    let length = u16::try_from(out.len()).ok()?.to_be_bytes();
    let label_length = [u8::try_from("tls13 ".len() + label.len()).ok()?];
    let info = [&length[..], &label_length, b"tls13 ", label.as_bytes(), &[0]];
    secret.expand(&info, Length(out.len())).ok()?.fill(out).ok()
}

/// Takes a datagram or a payload apart.
struct Reader<'a> {
    bytes: &'a [u8],
    /// How many bytes were taken.
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..)?.get(..length)?;
        self.at += length;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    /// A connection id, after its length.
    fn connection(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()?);
        (length <= MAX_CONNECTION_ID).then(|| self.take(length)).flatten()
    }

    /// A number of variable length.
    fn number(&mut self) -> Option<u64> {
        let first = self.byte()?;
        let more = self.take((1 << (first >> 6)) - 1)?;
        let start = u64::from(first & 0x3f);
        Some(more.iter().fold(start, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// As many bytes as the number before them says.
    fn prefixed(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(usize::try_from(length).ok()?)
    }
}

/// A packet with a long header, up to its packet number.
struct Packet<'a> {
    version: Version,
    kind: Kind,
    /// The connection id of who is to get it.
    destination: &'a [u8],
    /// The connection id of who sends it.
    source: &'a [u8],
    /// All of it.
    bytes: &'a [u8],
    /// Where its packet number is.
    number_at: usize,
}

impl<'a> Packet<'a> {
    /// The packet at the beginning of `bytes`; there can be others after it.
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let first = reader.byte().filter(|first| first & 0x80 != 0)?;
        let number = reader.take(4)?.try_into().ok()?;
        let version = Version::of(u32::from_be_bytes(number))?;
        let kind = version.kinds()[usize::from(first >> 4 & 3)];
        let (destination, source) = (reader.connection()?, reader.connection()?);
        let mut number_at = bytes.len();
        let mut end = bytes.len();
        if kind != Kind::Retry {
            if kind == Kind::Initial {
                reader.prefixed()?;
            }
            let length = usize::try_from(reader.number()?).ok()?;
            number_at = reader.at;
            reader.take(length)?;
            end = reader.at;
        }
        let bytes = bytes.get(..end)?;
        Some(Self { version, kind, destination, source, bytes, number_at })
    }
}

/// The packets with long headers in a datagram.
fn packets(datagram: &[u8]) -> impl Iterator<Item = Packet<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let packet = Packet::read(rest)?;
        rest = rest.get(packet.bytes.len()..)?;
        Some(packet)
    })
}

/// A connection, as the client calls it in its first packets.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Connection {
    version: Version,
    id: Vec<u8>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:02x?}", self.version, self.id)
    }
}

impl Connection {
    /// The connection of the first Initial packet in a datagram. Others in it are of the same.
    pub(super) fn of(datagram: &[u8]) -> Option<Self> {
        let packet = packets(datagram).find(|packet| packet.kind == Kind::Initial)?;
        Some(Self { version: packet.version, id: packet.destination.to_vec() })
    }
}

/// Whether a datagram is one of QUIC, and one with which a flow can begin.
pub(super) fn recognise(datagram: &[u8]) -> bool {
    let &[first, a, b, c, d, ..] = datagram else { return false };
    let known = match (u32::from_be_bytes([a, b, c, d]), [a, b, c, d]) {
        (number, _) if Version::of(number).is_some() => Packet::read(datagram).is_some(),
        // Drafts of the standard, versions that are there to be unknown, and those before it.
        (_, [0xff, 0, 0, _]) | (_, [b'Q' | b'T', b'0', b'4' | b'5', _]) => {
            datagram.len() >= MIN_FIRST
        }
        (number, _) if number & 0x0f0f_0f0f == 0x0a0a_0a0a => datagram.len() >= MIN_FIRST,
        _ => false,
    };
    first & 0x80 != 0 && known
}

/// A ClientHello whose pieces come.
pub(super) struct Hello {
    pub(super) connection: Connection,
    keys: Keys,
    bytes: Vec<u8>,
    /// Which of the bytes are there.
    there: Vec<bool>,
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hello({:?}, {} bytes)", self.connection, self.bytes.len())
    }
}

impl Hello {
    /// A ClientHello of which nothing is there.
    pub(super) fn new(connection: Connection) -> Option<Self> {
        let keys = Keys::new(connection.version, &connection.id, Side::Client)?;
        Some(Self { connection, keys, bytes: Vec::new(), there: Vec::new() })
    }

    /// Takes the pieces in a datagram. False if there is no packet in it that the client protected
    /// with the keys of this connection.
    pub(super) fn feed(&mut self, datagram: &[u8]) -> bool {
        let mut any = false;
        for packet in packets(datagram) {
            let mine = packet.kind == Kind::Initial
                && packet.version == self.connection.version
                && packet.destination == self.connection.id;
            if mine && let Some(payload) = self.keys.open(packet.bytes, packet.number_at) {
                any = true;
                self.take(&payload);
            }
        }
        any
    }

    /// Takes the pieces in a packet, up to something that has no place in an Initial packet.
    fn take(&mut self, payload: &[u8]) -> Option<()> {
        let mut reader = Reader::new(payload);
        loop {
            match reader.byte()? {
                // PADDING and PING.
                0 | 1 => {}
                // ACK, and ACK with counters of congestion.
                kind @ (2 | 3) => {
                    let (_largest, _delay) = (reader.number()?, reader.number()?);
                    let ranges = reader.number()?;
                    let _first = reader.number()?;
                    for _ in 0..ranges {
                        let (_gap, _length) = (reader.number()?, reader.number()?);
                    }
                    for _ in 0..if kind == 3 { 3 } else { 0 } {
                        reader.number()?;
                    }
                }
                // CRYPTO.
                6 => {
                    let offset = usize::try_from(reader.number()?).ok()?;
                    self.insert(offset, reader.prefixed()?);
                }
                _ => return None,
            }
        }
    }

    /// Puts a piece in its place. What is there already stays, and what lies beyond [`LIMIT`] is
    /// left out.
    fn insert(&mut self, offset: usize, piece: &[u8]) {
        if offset >= LIMIT {
            return;
        }
        let end = offset.saturating_add(piece.len()).min(LIMIT);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
            self.there.resize(end, false);
        }
        let places = self.bytes.iter_mut().zip(&mut self.there).skip(offset);
        for ((byte, there), &fresh) in places.zip(piece).filter(|((_, there), _)| !**there) {
            (*byte, *there) = (fresh, true);
        }
    }

    /// What is seen, when that will not change any more: when the message is complete, or can
    /// never be.
    pub(super) fn seen(&self) -> Option<Seen> {
        let beginning = self.there.iter().take_while(|there| **there).count();
        match tls::client_hello(self.bytes.get(..beginning)?) {
            Message::Complete(seen) => Some(Seen { protocol: Protocol::Quic, ..seen }),
            Message::Incomplete { missing } if beginning + missing <= LIMIT => None,
            _ => Some(Seen::of(Protocol::Quic)),
        }
    }
}

/// What a server says that refuses a connection, to the client that began it with this datagram:
/// CONNECTION_CLOSE with the code CONNECTION_REFUSED. None if the datagram begins none that could
/// be read.
pub(super) fn refusal(datagram: &[u8]) -> Option<Vec<u8>> {
    /// CONNECTION_CLOSE, CONNECTION_REFUSED, because of no frame, and the length of the reason.
    const FRAME: [u8; 4] = [0x1c, 2, 0, REASON.len() as u8];
    const REASON: &[u8] = b"refused by a policy";
    let packet = packets(datagram).find(|packet| packet.kind == Kind::Initial)?;
    let client = Keys::new(packet.version, packet.destination, Side::Client)?;
    client.open(packet.bytes, packet.number_at)?;
    let payload = [&FRAME[..], REASON].concat();
    // The number 0, in one byte, as the server's first packet.
    let header = initial_header(packet.version, packet.source, packet.destination, &[0], &payload)?;
    Keys::new(packet.version, packet.destination, Side::Server)?.seal(&header, 1, &payload)
}

/// The header of an Initial packet without a token.
fn initial_header(
    version: Version,
    destination: &[u8],
    source: &[u8],
    number: &[u8],
    payload: &[u8],
) -> Option<Vec<u8>> {
    let kind = version.kinds().iter().position(|&kind| kind == Kind::Initial)?;
    let first = 0xc0 | u8::try_from(kind << 4 | (number.len() - 1)).ok()?;
    // A number of two bytes begins with the bits 01.
    let length = u16::try_from(number.len() + payload.len() + TAG).ok().filter(|&l| l < 1 << 14)?;
    let length = (length | 0x4000).to_be_bytes();
    let ids = [destination, source].map(|id| [&[id.len() as u8][..], id].concat());
    Some(
        [&[first], &version.number().to_be_bytes()[..], &ids.concat(), &[0], &length, number]
            .concat(),
    )
}

/// Packets of clients, for who has to send some: tests, and the fuzzer, which would not hit on a key.
#[cfg(any(test, fuzzing))]
pub mod packets {
    use super::{Keys, Side, Version, initial_header};

    fn varint(value: usize) -> [u8; 4] {
        (value as u32 | 0x8000_0000).to_be_bytes()
    }

    /// A piece of a message, which begins at `from` in the whole, as a CRYPTO frame.
    pub fn crypto(from: usize, piece: &[u8]) -> Vec<u8> {
        [&[6][..], &varint(from), &varint(piece.len()), piece].concat()
    }

    /// A client's Initial packet, padded to a length with which it may begin. `None` if the
    /// connection id or the frames are too long.
    pub fn initial(second_version: bool, id: &[u8], number: u8, frames: &[u8]) -> Option<Vec<u8>> {
        let version = if second_version { Version::V2 } else { Version::V1 };
        let mut payload = frames.to_vec();
        payload.resize(payload.len().max(1200), 0);
        let header = initial_header(version, id, b"client", &[number], &payload)?;
        Keys::new(version, id, Side::Client)?.seal(&header, 1, &payload)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The connection id of the samples in RFC 9001 and RFC 9369, appendices A.
    const SAMPLE: &[u8] = &[0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];
    /// The CRYPTO frame of the client's Initial packet in these samples.
    const SAMPLE_FRAME: &str = "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868\
        04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578616d706c652e636f6dff0100\
        0100000a00080006001d0017001800100007000504616c706e00050005010000000000330026002400\
        1d00209370b2c9caa47fbabaf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b0003020304000d\
        0010000e0403050306030203080408050806002d00020101001c00024001003900320408ffffffffffffffff\
        05048000ffff07048000ffff0801100104800075300901100f088394c8f03e51570806048000ffff";
    const SERVER_PAYLOAD: &str = "02000000000600405a020000560303eefce7f7b37ba1d1632e96677825ddf739\
        88cfc79825df566dc5430b9a045a1200130100002e00330024001d00209d3c940d89690b84d08a60993c144e\
        ca684d1081287c834d5311bcf32bb9da1a002b00020304";

    fn hex(text: &str) -> Vec<u8> {
        let digits = text.chars().filter(|c| !c.is_whitespace());
        let digits: Vec<u8> = digits.map(|c| c.to_digit(16).unwrap() as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    /// The client's Initial packet of the samples.
    fn sample(version: Version) -> Vec<u8> {
        let header = match version {
            Version::V1 => "c300000001088394c8f03e5157080000449e00000002",
            Version::V2 => "d36b3343cf088394c8f03e5157080000449e00000002",
        };
        let mut payload = hex(SAMPLE_FRAME);
        payload.resize(1162, 0);
        Keys::new(version, SAMPLE, Side::Client).unwrap().seal(&hex(header), 4, &payload).unwrap()
    }

    /// A piece of a message, as a CRYPTO frame.
    pub(crate) fn crypto(message: &[u8], from: usize, to: usize) -> Vec<u8> {
        packets::crypto(from, &message[from..to])
    }

    fn packet(version: Version, id: &[u8], number: u8, frames: &[Vec<u8>]) -> Vec<u8> {
        packets::initial(version == Version::V2, id, number, &frames.concat()).unwrap()
    }

    pub(crate) fn initial(id: &[u8], number: u8, frames: &[Vec<u8>]) -> Vec<u8> {
        packet(Version::V1, id, number, frames)
    }

    /// A ClientHello, as a message without records.
    pub(crate) fn message(host: &str) -> Vec<u8> {
        crate::inspect::tests::client_hello(Some(host), &["h3"], 1 << 14)[5..].to_vec()
    }

    fn hello(datagram: &[u8]) -> Hello {
        Hello::new(Connection::of(datagram).unwrap()).unwrap()
    }

    /// What is seen of a client that sends these datagrams.
    fn inspect(datagrams: &[Vec<u8>]) -> Option<Seen> {
        let mut hello = hello(&datagrams[0]);
        for datagram in datagrams {
            assert!(hello.feed(datagram));
        }
        hello.seen()
    }

    #[test]
    fn the_samples_of_the_standards_are_read_and_written() {
        // Header protection and the tag over all of the packet show that every byte is right.
        for (version, begins, ends) in [
            (
                Version::V1,
                "c000000001088394c8f03e5157080000449e7b9aec34",
                "e221af44860018ab0856972e194cd934",
            ),
            (
                Version::V2,
                "d76b3343cf088394c8f03e5157080000449ea0c95e82",
                "a18b2faa745b6fe189cf772a9f84cbfc",
            ),
        ] {
            let packet = sample(version);
            assert_eq!(packet.len(), 1200);
            assert!(packet.starts_with(&hex(begins)));
            assert!(packet.ends_with(&hex(ends)));
            assert!(recognise(&packet));
            let seen = inspect(&[packet]).unwrap();
            assert_eq!(seen.protocol, Protocol::Quic);
            assert_eq!(seen.host.as_deref(), Some("example.com"));
            assert_eq!(seen.alpn, ["alpn"]);
        }
        assert_eq!(sample(Version::V1), hex(include_str!("../../tests/client-initial.hex")));
        for (version, header, expected) in [
            (
                Version::V1,
                "c1000000010008f067a5502a4262b50040750001",
                "cf000000010008f067a5502a4262b5004075c0d95a482cd0991cd25b0aac406a5816b6394100f37a\
                 1c69797554780bb38cc5a99f5ede4cf73c3ec2493a1839b3dbcba3f6ea46c5b7684df3548e7ddeb9\
                 c3bf9c73cc3f3bded74b562bfb19fb84022f8ef4cdd93795d77d06edbb7aaf2f58891850abbdca3d\
                 20398c276456cbc42158407dd074ee",
            ),
            (
                Version::V2,
                "d16b3343cf0008f067a5502a4262b50040750001",
                "dc6b3343cf0008f067a5502a4262b5004075d92faaf16f05d8a4398c47089698baeea26b91eb761d\
                 9b89237bbf87263017915358230035f7fd3945d88965cf17f9af6e16886c61bfc703106fbaf3cb4c\
                 fa52382dd16a393e42757507698075b2c984c707f0a0812d8cd5a6881eaf21ceda98f4bd23f6fe1a\
                 3e2c43edd9ce7ca84bed8521e2e140",
            ),
        ] {
            let keys = Keys::new(version, SAMPLE, Side::Server).unwrap();
            let sealed = keys.seal(&hex(header), 2, &hex(SERVER_PAYLOAD)).unwrap();
            assert_eq!(sealed, hex(expected));
            let packet = Packet::read(&sealed).unwrap();
            let opened = keys.open(packet.bytes, packet.number_at).unwrap();
            assert_eq!(opened, hex(SERVER_PAYLOAD));
        }
    }

    #[test]
    fn a_hello_over_several_packets_is_put_together() {
        let message = message("www.Example.org");
        let (a, b) = (40, 90);
        let pieces =
            [crypto(&message, 0, a), crypto(&message, a, b), crypto(&message, b, message.len())];
        let ping = vec![1, 0, 1];
        for version in [Version::V1, Version::V2] {
            let one = |number, frames: &[Vec<u8>]| packet(version, b"12345678", number, frames);
            let first = one(0, &[pieces[2].clone(), ping.clone(), pieces[0].clone()]);
            let second = one(1, &[vec![2, 0, 0, 0, 0], ping.clone(), pieces[1].clone()]);
            for datagrams in [
                vec![first.clone(), second.clone()],
                vec![second.clone(), first.clone()],
                vec![first.clone(), first.clone(), second.clone()],
                vec![[&first[..], &second].concat()],
            ] {
                let seen = inspect(&datagrams).unwrap();
                assert_eq!(seen.host.as_deref(), Some("www.example.org"));
                assert_eq!(seen.alpn, ["h3"]);
            }
            assert_eq!(inspect(&[first]), None);
            assert_eq!(inspect(&[second]), None);
        }
    }

    #[test]
    fn what_can_never_be_a_hello_is_quic_without_a_name() {
        let nameless = Some(Seen::of(Protocol::Quic));
        // A ServerHello, and one that is longer than what is looked at.
        for message in [vec![2, 0, 0, 5], vec![1, 0, 0x40, 0]] {
            assert_eq!(inspect(&[initial(b"12345678", 0, &[crypto(&message, 0, 4)])]), nameless);
        }
        let far = vec![6, 0xbf, 0xff, 0xff, 0xff, 1, 7];
        let mut hello = hello(&initial(b"12345678", 0, &[]));
        assert!(hello.feed(&initial(b"12345678", 0, &[far])));
        assert_eq!((hello.seen(), hello.bytes.len()), (None, 0));
        assert!(hello.feed(&initial(
            b"12345678",
            0,
            &[crypto(&[7; 2 * LIMIT], LIMIT - 9, LIMIT + 9)]
        )));
        assert_eq!(hello.bytes.len(), LIMIT);
    }

    #[test]
    fn packets_of_others_are_not_taken() {
        let mine = initial(b"12345678", 0, &[]);
        let mut hello = hello(&mine);
        assert!(hello.feed(&mine));
        assert!(!hello.feed(&initial(b"12345679", 0, &[])));
        let mut forged = mine.clone();
        forged[100] ^= 1;
        assert!(!hello.feed(&forged));
        for end in 0..mine.len() {
            assert!(!hello.feed(&mine[..end]));
        }
    }

    #[test]
    fn only_quic_is_recognised_as_quic() {
        let long = |number: u32, length: usize| {
            let mut bytes = vec![0xc0];
            bytes.extend(number.to_be_bytes());
            bytes.resize(length, 0);
            bytes
        };
        for number in [0xff00_001d, 0x1a2a_3a4a, 0x5130_3530, 0x5430_3531] {
            assert!(recognise(&long(number, 1200)), "{number:x}");
            assert!(!recognise(&long(number, 100)), "{number:x}");
        }
        assert!(!recognise(&long(0, 1200)));
        assert!(!recognise(&long(0x1234_5678, 1200)));
        // Of a known version, but with a connection id that is too long.
        assert!(!recognise(&[&long(1, 5)[..], &[21; 1200]].concat()));
        assert!(!recognise(b""));
        let mut short = sample(Version::V1);
        short[0] &= 0x7f;
        assert!(!recognise(&short));
    }

    #[test]
    fn a_refusal_can_be_read_by_the_client() {
        for version in [Version::V1, Version::V2] {
            let answer = refusal(&packet(version, b"12345678", 0, &[])).unwrap();
            let packet = Packet::read(&answer).unwrap();
            assert_eq!((packet.version, packet.kind), (version, Kind::Initial));
            assert_eq!((packet.destination, packet.bytes.len()), (&b"client"[..], answer.len()));
            let keys = Keys::new(version, b"12345678", Side::Server).unwrap();
            let payload = keys.open(packet.bytes, packet.number_at).unwrap();
            assert_eq!(payload[..3], [0x1c, 2, 0]);
            assert_eq!(payload.len(), 4 + usize::from(payload[3]));
        }
        // A later packet, to the id that a server chose.
        let mut later = initial(b"12345678", 0, &[]);
        later[6] ^= 1;
        assert_eq!(refusal(&later), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(
            first in any::<u8>(),
            version in prop::sample::select(vec![1, 0x6b33_43cf, 0, 0xff00_001d]),
            rest in prop::collection::vec(any::<u8>(), 0..1500),
        ) {
            let datagram = [&[first][..], &u32::to_be_bytes(version), &rest].concat();
            recognise(&datagram);
            recognise(&rest);
            refusal(&datagram);
            if let Some(connection) = Connection::of(&datagram) {
                Hello::new(connection).unwrap().feed(&datagram);
            }
        }

        #[test]
        fn arbitrary_payloads_do_no_harm(
            payloads in prop::collection::vec(prop::collection::vec(0_u8..8, 0..1200), 1..4),
        ) {
            let datagrams: Vec<_> = payloads.into_iter().map(|p| initial(b"12345678", 0, &[p])).collect();
            inspect(&datagrams);
        }

        #[test]
        fn the_order_and_size_of_pieces_make_no_difference(
            host in "[a-z]{1,20}\\.test",
            cuts in prop::collection::vec(0_usize..200, 0..8),
            order in any::<prop::sample::Index>(),
            per_packet in 1_usize..4,
        ) {
            let message = message(&host);
            let mut ends: Vec<usize> = cuts.iter().map(|&cut| cut.min(message.len())).collect();
            ends.push(message.len());
            ends.sort_unstable();
            let mut start = 0;
            let mut pieces = Vec::new();
            for end in ends {
                pieces.push(crypto(&message, start, end));
                start = end;
            }
            let middle = order.index(pieces.len());
            pieces.rotate_left(middle);
            let datagrams: Vec<_> =
                pieces.chunks(per_packet).map(|frames| initial(b"12345678", 0, frames)).collect();
            let mut hello = hello(&datagrams[0]);
            for (index, datagram) in datagrams.iter().enumerate() {
                prop_assert!(hello.seen().is_none(), "complete before piece {index}");
                hello.feed(datagram);
                if hello.seen().is_some() && index + 1 < datagrams.len() {
                    // Only empty pieces can be left.
                    break;
                }
            }
            prop_assert_eq!(hello.seen().unwrap().host, Some(host));
        }
    }
}

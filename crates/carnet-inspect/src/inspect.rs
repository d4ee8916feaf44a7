//! What a client's bytes tell: HTTP/1, TLS and DNS in a stream, DNS and QUIC in datagrams, or
//! something unknown.
//!
//! Nothing here does I/O. [`Inspector`] is fed with the first bytes of a stream as they come, in
//! segments of any sizes; what it sees does not depend on how they were cut. It keeps at most
//! [`LIMIT`] bytes. [`Datagrams`] is fed with every datagram of a flow.

mod datagrams;
mod dns;
mod quic;

#[cfg(test)]
pub(crate) use datagrams::tests as test_datagrams;
pub use datagrams::{Datagrams, Told, refusal};
#[cfg(any(test, fuzzing))]
pub use quic::packets;

use serde::{Deserialize, Serialize};

/// How many bytes are looked at, at most. A ClientHello with post-quantum keys has two to four
/// thousand, the head of an HTTP request rarely more than eight thousand.
pub const LIMIT: usize = 16 * 1024;

/// The protocol that a client speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    Http,
    /// TLS, begun with a ClientHello.
    Tls,
    /// DNS, begun with a query.
    Dns,
    /// QUIC, of any version that is known as one.
    Quic,
    /// Anything else; also a client that said nothing, or not enough in time.
    #[default]
    Unknown,
}

/// What was seen in a client's first bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The protocol.
    pub protocol: Protocol,
    /// The host that is asked for, in lower case, without port and trailing dot: the server name
    /// of TLS and QUIC; HTTP's request target if it names a host, else its first Host header; the
    /// name in a DNS question, with `.` for the root.
    pub host: Option<String>,
    /// The application protocols that a client of TLS or QUIC offers, in its order.
    pub alpn: Vec<String>,
    /// The HTTP request line.
    pub request: Option<String>,
    /// The DNS question: the name, as it was written, and the type; the class if it is not IN.
    pub question: Option<String>,
}

impl Seen {
    pub(crate) fn of(protocol: Protocol) -> Self {
        Self { protocol, ..Self::default() }
    }
}

/// Looks at the first bytes of a client.
#[derive(Debug, Default)]
pub struct Inspector {
    bytes: Vec<u8>,
    /// What was seen up to now.
    seen: Seen,
    /// No more bytes can change it.
    settled: bool,
    /// With fewer bytes than this, another look would tell nothing new.
    next_look: usize,
}

impl Inspector {
    /// An inspector that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes, and tells whether all that is to be seen was seen now. Bytes after
    /// that, and those beyond [`LIMIT`], are not taken.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        if self.settled {
            return true;
        }
        let fresh = bytes.get(..self.room()).unwrap_or(bytes);
        self.bytes.extend_from_slice(fresh);
        // After the request line, a head of HTTP tells something new only at the end of a line.
        let within_line = self.seen.request.is_some() && !fresh.contains(&b'\n');
        if self.bytes.len() >= self.next_look && !within_line {
            match look(&self.bytes) {
                Look::Settled(seen) => (self.seen, self.settled) = (seen, true),
                Look::More { so_far, least } => (self.seen, self.next_look) = (so_far, least),
            }
        }
        self.settled |= self.room() == 0;
        self.settled
    }

    /// How many more bytes are taken.
    pub fn room(&self) -> usize {
        LIMIT - self.bytes.len()
    }

    /// What was seen up to now.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// What was seen, when there is no more to come.
    pub fn into_seen(self) -> Seen {
        self.seen
    }

    /// Gives out all bytes that were taken, in order, and keeps what was seen. No more are taken.
    pub fn finish(&mut self) -> Vec<u8> {
        self.settled = true;
        std::mem::take(&mut self.bytes)
    }
}

/// What a look at a prefix tells.
enum Look {
    /// All that is to be seen, whatever follows.
    Settled(Seen),
    /// There may be more to see, but not before there are `least` bytes.
    More { so_far: Seen, least: usize },
}

fn look(bytes: &[u8]) -> Look {
    match bytes.first() {
        None => Look::More { so_far: Seen::default(), least: 1 },
        Some(&tls::HANDSHAKE) => tls::look(bytes),
        Some(&first) if first <= dns::LONGEST => match dns::look_in_stream(bytes) {
            // It can be a request after empty lines.
            Look::Settled(seen) if seen == Seen::default() => http::look(bytes),
            look => look,
        },
        Some(_) => http::look(bytes),
    }
}

fn unknown() -> Look {
    Look::Settled(Seen::default())
}

/// The name in an authority: `host`, `host:port`, `user@host`, `[v6]:port`.
fn host_of(authority: &[u8]) -> Option<String> {
    let text = str::from_utf8(authority).ok()?.trim();
    let text = text.rsplit_once('@').map_or(text, |(_, host)| host);
    let host = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?.0,
        None => text.split_once(':').map_or(text, |(host, _)| host),
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    (!host.is_empty()).then(|| host.to_ascii_lowercase())
}

mod http {
    use super::{Look, Protocol, Seen, host_of, unknown};
    use httparse::{EMPTY_HEADER, Request, Status, parse_headers};

    /// Reads line by line, each for itself, until the host is known: so the answer cannot depend
    /// on how much more has come meanwhile.
    pub(super) fn look(bytes: &[u8]) -> Look {
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n');
        let more = |so_far| Look::More { so_far, least: bytes.len() + 1 };
        // Empty lines before a request are ignored (RFC 9112, section 2.2).
        let first = lines.by_ref().find(|line| !is_empty(line)).unwrap_or_default();
        let ended = as_last(first);
        let mut request = Request::new(&mut []);
        // An incomplete line is parsed as well: what cannot become a request is told at once.
        match request.parse(ended.as_deref().unwrap_or(first)) {
            Ok(Status::Complete(_)) => {}
            Ok(Status::Partial) => return more(Seen::default()),
            Err(_) => return unknown(),
        }
        let (Some(method), Some(target), Some(minor)) =
            (request.method, request.path, request.version)
        else {
            return unknown();
        };
        let mut seen = Seen {
            host: target_host(method, target),
            request: Some(format!("{method} {target} HTTP/1.{minor}")),
            ..Seen::of(Protocol::Http)
        };
        while seen.host.is_none() {
            let Some(line) = lines.next().and_then(as_last) else { return more(seen) };
            let mut header = [EMPTY_HEADER];
            match parse_headers(&line, &mut header) {
                Ok(Status::Complete((_, [header]))) => {
                    if header.name.eq_ignore_ascii_case("host") {
                        seen.host = host_of(header.value);
                        break;
                    }
                }
                // The end of the head, or nothing that can be read.
                _ => break,
            }
        }
        Look::Settled(seen)
    }

    fn is_empty(line: &[u8]) -> bool {
        matches!(line, b"\n" | b"\r\n" | b"\r")
    }

    /// A complete line, made the last one of a head.
    fn as_last(line: &[u8]) -> Option<Vec<u8>> {
        line.ends_with(b"\n").then(|| [line, if is_empty(line) { b"" } else { b"\r\n" }].concat())
    }

    /// The host that a request target names: an absolute URL does, and CONNECT's authority.
    fn target_host(method: &str, target: &str) -> Option<String> {
        if method == "CONNECT" {
            return host_of(target.as_bytes());
        }
        let (_, rest) = target.split_once("://").filter(|_| !target.starts_with('/'))?;
        host_of(rest.split(['/', '?', '#']).next()?.as_bytes())
    }
}

mod tls {
    use super::{Look, Protocol, Seen, host_of, unknown};
    use tls_parser::{
        TlsExtension, parse_tls_client_hello_extensions, parse_tls_handshake_client_hello,
    };

    /// The record type of handshake messages.
    pub(super) const HANDSHAKE: u8 = 22;
    /// The handshake type of a ClientHello.
    const CLIENT_HELLO: u8 = 1;
    /// Bytes of a record's header.
    const RECORD_HEADER: usize = 5;
    /// Bytes of a handshake message's header: its type, and its length in three bytes.
    const MESSAGE_HEADER: usize = 4;

    /// A ClientHello, as far as it is there.
    pub(super) enum Hello {
        /// It is another message.
        None,
        /// At least so many bytes are missing.
        Incomplete { missing: usize },
        /// All of it is there, and this was seen.
        Complete(Seen),
    }

    /// Looks for a ClientHello at the beginning of handshake messages.
    pub(super) fn client_hello(message: &[u8]) -> Hello {
        match *message {
            [CLIENT_HELLO, a, b, c, ..] => {
                let end = MESSAGE_HEADER + u32::from_be_bytes([0, a, b, c]) as usize;
                match message.get(MESSAGE_HEADER..end) {
                    Some(hello) => Hello::Complete(seen(hello)),
                    None => Hello::Incomplete { missing: end - message.len() },
                }
            }
            [] | [CLIENT_HELLO, ..] => Hello::Incomplete { missing: 1 },
            _ => Hello::None,
        }
    }

    /// Takes the ClientHello out of its records, of which there may be several.
    pub(super) fn look(bytes: &[u8]) -> Look {
        let mut message = Vec::new();
        let mut record = bytes;
        loop {
            // Type and major version are checked as soon as they are there.
            if record.iter().zip([HANDSHAKE, 3]).any(|(&byte, expected)| byte != expected) {
                return unknown();
            }
            let Some((header, body)) = record.split_at_checked(RECORD_HEADER) else {
                let missing = if record.len() < 2 { 1 } else { RECORD_HEADER - record.len() };
                return more(&message, bytes.len() + missing);
            };
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            if length == 0 {
                return unknown();
            }
            let (body, next) = body.split_at_checked(length).unwrap_or((body, &[]));
            message.extend_from_slice(body);
            let missing = match client_hello(&message) {
                Hello::None => return unknown(),
                Hello::Complete(seen) => return Look::Settled(seen),
                Hello::Incomplete { missing } => missing,
            };
            if body.len() < length {
                return more(&message, bytes.len() + missing.min(length - body.len()));
            }
            record = next;
        }
    }

    /// An incomplete message: TLS, as soon as there is anything of a ClientHello.
    fn more(message: &[u8], least: usize) -> Look {
        let protocol = if message.is_empty() { Protocol::Unknown } else { Protocol::Tls };
        Look::More { so_far: Seen::of(protocol), least }
    }

    fn seen(hello: &[u8]) -> Seen {
        let mut seen = Seen::of(Protocol::Tls);
        let extensions = parse_tls_handshake_client_hello(hello)
            .ok()
            .and_then(|(_, hello)| hello.ext)
            .and_then(|bytes| parse_tls_client_hello_extensions(bytes).ok());
        for extension in extensions.map(|(_, list)| list).unwrap_or_default() {
            match extension {
                TlsExtension::SNI(names) => {
                    seen.host = names.first().and_then(|(_, name)| host_of(name));
                }
                TlsExtension::ALPN(names) => {
                    let text = |name: &&[u8]| String::from_utf8_lossy(name).into_owned();
                    seen.alpn = names.iter().map(text).collect();
                }
                _ => {}
            }
        }
        seen
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is seen of `bytes` that come in segments which end at `cuts`.
    fn inspect(bytes: &[u8], cuts: &[usize]) -> Seen {
        let mut inspector = Inspector::new();
        let mut ends: Vec<usize> = cuts.iter().map(|&cut| cut.min(bytes.len())).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        let mut start = 0;
        for end in ends {
            let settled = inspector.feed(&bytes[start..end]);
            assert!(settled || inspector.bytes == bytes[..end], "a byte was lost");
            start = end;
        }
        let taken = inspector.finish();
        assert!(bytes.starts_with(&taken));
        inspector.seen().clone()
    }

    fn http(bytes: &str) -> (Option<String>, Option<String>) {
        let seen = inspect(bytes.as_bytes(), &[]);
        assert_eq!(seen.protocol, Protocol::Http, "{bytes:?}");
        (seen.host, seen.request)
    }

    /// A ClientHello in records of at most `record` bytes.
    pub(crate) fn client_hello(host: Option<&str>, alpn: &[&str], record: usize) -> Vec<u8> {
        fn prefixed(width: usize, content: &[u8]) -> Vec<u8> {
            let length = (content.len() as u32).to_be_bytes();
            [&length[4 - width..], content].concat()
        }
        fn extension(kind: u8, content: &[u8]) -> Vec<u8> {
            [&[0, kind][..], &prefixed(2, content)].concat()
        }
        // A padding extension in front, so that what is looked for is not at the beginning.
        let mut extensions = extension(21, &[0; 300]);
        if let Some(host) = host {
            let name = [&[0][..], &prefixed(2, host.as_bytes())].concat();
            extensions.extend(extension(0, &prefixed(2, &name)));
        }
        if !alpn.is_empty() {
            let names: Vec<u8> =
                alpn.iter().flat_map(|name| prefixed(1, name.as_bytes())).collect();
            extensions.extend(extension(16, &prefixed(2, &names)));
        }
        let body = [
            &[3, 3][..],
            &[7; 32],
            &prefixed(1, &[5; 32]),
            &prefixed(2, &[0x13, 0x01, 0x13, 0x02]),
            &prefixed(1, &[0]),
            &prefixed(2, &extensions),
        ]
        .concat();
        let message = [&[1][..], &prefixed(3, &body)].concat();
        message
            .chunks(record)
            .flat_map(|chunk| [&[22, 3, 1][..], &prefixed(2, chunk)].concat())
            .collect()
    }

    #[test]
    fn requests_and_their_hosts() {
        let line = |text: &str| Some(text.to_owned());
        for (bytes, host) in [
            ("GET / HTTP/1.1\r\nHost: Example.COM\r\n\r\n", Some("example.com")),
            ("GET / HTTP/1.1\r\nAccept: */*\r\nhost:example.com.:8080\r\n", Some("example.com")),
            ("\r\n\r\nGET / HTTP/1.1\nHost: a.test\n\n", Some("a.test")),
            ("GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n", Some("2001:db8::1")),
            ("GET / HTTP/1.1\r\nHost: first\r\nHost: second\r\n\r\n", Some("first")),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", None),
            ("GET / HTTP/1.1\r\n\r\nHost: body\r\n", None),
            ("GET / HTTP/1.1\r\nNot a header\r\nHost: a\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nHos", None),
        ] {
            assert_eq!(http(bytes), (host.map(str::to_owned), line("GET / HTTP/1.1")), "{bytes:?}");
        }
        assert_eq!(
            http("POST http://u:p@Real.test:81/x?y HTTP/1.0\r\nHost: other\r\n\r\n"),
            (line("real.test"), line("POST http://u:p@Real.test:81/x?y HTTP/1.0"))
        );
        assert_eq!(
            http("CONNECT real.test:443 HTTP/1.1\r\nHost: other\r\n\r\n").0,
            line("real.test")
        );
        assert_eq!(http("GET /?u=http://other/ HTTP/1.1\r\nHost: a.test\r\n").0, line("a.test"));
    }

    #[test]
    fn what_is_neither_is_unknown_at_once() {
        for bytes in [
            &b"SSH-2.0-OpenSSH_9.2\r"[..],
            b"EHLO mail.example.com\r",
            b"GET /\r",
            b"PRI * HTTP/2.0\r",
            b"\0\0\0\x08",
            b"\x80\x2e\x01",
            b"\x02\x00\x12\x34\x81",
            b"\x10\x20\x00\x04MQTT",
            b"\x03\x00\x00\x13\x0e\xe0\x00\x00",
            b"\x16\x04",
            b"\x15\x03\x01",
            b"\x16\x03\x01\0\0",
            b"\x16\x03\x01\0\x04\x02",
        ] {
            let mut inspector = Inspector::new();
            assert!(inspector.feed(bytes), "{bytes:?}");
            assert_eq!(inspector.seen(), &Seen::default(), "{bytes:?}");
        }
        let mut silent = Inspector::new();
        assert!(!silent.feed(b""));
        assert_eq!(silent.finish(), b"");
        assert_eq!(silent.seen(), &Seen::default());
    }

    #[test]
    fn a_client_hello_tells_name_and_protocols() {
        for record in [1, 3, 100, 16384] {
            let bytes = client_hello(Some("Www.Example.org"), &["h2", "http/1.1"], record);
            let seen = inspect(&bytes, &[]);
            assert_eq!(seen.protocol, Protocol::Tls);
            assert_eq!(seen.host.as_deref(), Some("www.example.org"));
            assert_eq!(seen.alpn, ["h2", "http/1.1"]);
        }
        let bare = inspect(&client_hello(None, &[], 16384), &[]);
        assert_eq!(bare, Seen::of(Protocol::Tls));
    }

    #[test]
    fn an_incomplete_message_is_what_it_is_so_far() {
        let hello = client_hello(Some("a.test"), &["h2"], 200);
        assert_eq!(inspect(&hello[..hello.len() - 1], &[]), Seen::of(Protocol::Tls));
        assert_eq!(inspect(&hello[..5], &[]), Seen::default());
        assert_eq!(inspect(b"GET /index.ht", &[]), Seen::default());
    }

    #[test]
    fn no_more_than_the_limit_is_kept() {
        let endless = [b"GET /".as_slice(), &[b'a'; 2 * LIMIT]].concat();
        let mut inspector = Inspector::new();
        assert!(inspector.feed(&endless));
        assert_eq!(inspector.finish().len(), LIMIT);
        assert_eq!(inspector.seen(), &Seen::default());

        let endless =
            [b"\x16\x03\x01\xff\xff\x01\xff\xff\xff".as_slice(), &[0; 2 * LIMIT]].concat();
        assert_eq!(inspect(&endless, &[100]), Seen::of(Protocol::Tls));
    }

    /// Messages that the inspector knows, and others like them.
    fn messages() -> impl Strategy<Value = Vec<u8>> {
        let host = "[a-z]{1,9}\\.(test|example)";
        let head =
            (host, "[A-Za-z-]{1,20}: [ -~]{0,40}", any::<bool>(), "(\r\n|\n)", any::<bool>())
                .prop_map(|(host, other, first, end, broken)| {
                    let host = format!("Host: {host}{end}");
                    let other = format!("{}{other}{end}", if broken { "\u{1}" } else { "" });
                    let (a, b) = if first { (host, other) } else { (other, host) };
                    format!("GET /path HTTP/1.1{end}{a}{b}{end}body").into_bytes()
                });
        let hello = (host, 1_usize..700, prop::collection::vec(any::<u8>(), 0..40)).prop_map(
            |(host, record, tail)| [client_hello(Some(&host), &["h2"], record), tail].concat(),
        );
        let changed = (hello.clone(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
            |(mut bytes, index, value)| {
                *index.get_mut(&mut bytes) = value;
                bytes
            },
        );
        let long = (head.clone(), LIMIT - 200..LIMIT + 200).prop_map(|(head, length)| {
            let padding = vec![b'p'; length];
            [b"GET /x HTTP/1.1\r\nX: ", padding.as_slice(), b"\r\n", &head].concat()
        });
        let query =
            (prop::collection::vec("[a-z]{1,9}", 0..5), prop::collection::vec(any::<u8>(), 0..40))
                .prop_map(|(labels, tail)| {
                    [test_datagrams::query_in_stream(&labels.join(".")), tail].concat()
                });
        let odd_query = (query.clone(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
            |(mut bytes, index, value)| {
                *index.get_mut(&mut bytes) = value;
                bytes
            },
        );
        prop_oneof![
            head,
            hello,
            changed,
            long,
            query,
            odd_query,
            prop::collection::vec(any::<u8>(), 0..200)
        ]
    }

    #[test]
    fn what_follows_an_incomplete_hello_is_no_record_from_its_first_byte_on() {
        let hello = client_hello(None, &[], 100);
        // The first record, and a byte with which no record begins.
        let bytes = [&hello[..105], b"x"].concat();
        for cuts in [&[][..], &[105], &[50, 105]] {
            assert_eq!(inspect(&bytes, cuts).protocol, Protocol::Unknown, "{cuts:?}");
        }
    }

    proptest! {
        #[test]
        fn the_segmentation_makes_no_difference(
            bytes in messages(),
            cuts in prop::collection::vec(0_usize..2000, 0..20),
        ) {
            let whole = inspect(&bytes, &[]);
            prop_assert_eq!(&inspect(&bytes, &cuts), &whole);
            if bytes.len() < 3000 {
                let every: Vec<usize> = (0..bytes.len()).collect();
                prop_assert_eq!(&inspect(&bytes, &every), &whole);
            }
        }

        #[test]
        fn a_host_is_found_behind_any_cut(
            host in "[a-z]{1,20}\\.test", record in 1_usize..700, cut in 0_usize..700,
        ) {
            let hello = client_hello(Some(&host), &[], record);
            let seen = inspect(&hello, &[cut]);
            prop_assert_eq!(seen.host.as_deref(), Some(host.as_str()));
        }
    }
}

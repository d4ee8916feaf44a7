//! The UDP flows of a socket: which datagram begins one, and with which record (contract U4, U5, U7,
//! U9).
//!
//! **Receiving.** The kernel delivers each flow of a client's from an address of its own. Whether an address
//! is one, and which record and context the flow has, a socket of ours that is connected there can
//! ask. A source token is of one flow as long as that lives, so that it is asked about once. The address of
//! a connected client may soon be another one's: it is asked about with each datagram, and tells its
//! flow by the flow's number and begin.
//!
//! **Sending.** The engine gives a record that is set on a socket to every flow that begins on it. So it is
//! set for the one datagram alone, in which time nothing else is sent.

use crate::contract::{Failure, wsa};
use crate::sync::{Mutex, lock};
use crate::sys;
use carnet_core::abi;
use carnet_core::address::Endpoint;
use carnet_core::flow::is_source_token;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

/// How long a flow lives without a datagram in either direction (contract U7). Those of sockets that are
/// not connected also end when the engine says so, and come from another address when they begin anew.
const IDLE: Duration = Duration::from_secs(60);

/// How many correspondents of a socket are known at most. When they are more, the half that has been silent
/// for longest is forgotten; a flow that was gets its record once more.
const MOST: usize = 16_384;

/// No answer of the engine is longer.
const LONGEST: usize = 4096;

/// What tells a flow from any other: the answer to [`abi::FLOW`].
type Identity = [u8; size_of::<abi::FlowInfo>()];

/// Who a correspondent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Party {
    /// A client, with this flow.
    Client(Identity),
    /// Nobody whose flow was there when it was asked for; the address may become a client's.
    Nobody,
    /// No client: the socket itself has sent there first, or it is no address of this machine.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    party: Party,
    seen: Instant,
}

/// What the engine says of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Client(Identity, Begin),
    Nobody,
    Other,
    /// It could not be asked, for want of descriptors, ports or memory.
    Nothing,
}

/// What comes with the datagram that begins a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Begin {
    pub(crate) record: Vec<u8>,
    /// Empty if the filter has none.
    pub(crate) context: Vec<u8>,
}

/// A socket's correspondents.
#[derive(Debug, Default)]
struct Table(BTreeMap<SocketAddr, Known>);

impl Table {
    /// A datagram has come from there: what comes with it, if it begins a flow of a client's.
    fn receive(
        &mut self,
        source: SocketAddr,
        now: Instant,
        ask: impl FnOnce(SocketAddr) -> Said,
    ) -> Option<Begin> {
        let known = self.touch(source, now);
        let is_token = is_token(source.ip());
        match known {
            Some(Party::Other) => return None,
            Some(_) if is_token => return None,
            _ => {}
        }
        let (party, begin) = match ask(source) {
            Said::Client(flow, _) if known == Some(Party::Client(flow)) => return None,
            Said::Client(flow, begin) => (Party::Client(flow), Some(begin)),
            // The flow has ended, and what came of it is still read.
            Said::Nobody if known.is_some() => return None,
            Said::Nobody => (Party::Nobody, None),
            Said::Other => (Party::Other, None),
            Said::Nothing => return None,
        };
        self.insert(source, party, now);
        begin
    }

    /// The socket has sent there: who has not sent before will answer.
    fn send(&mut self, to: SocketAddr, now: Instant) {
        if self.touch(to, now).is_none() {
            self.insert(to, Party::Other, now);
        }
    }

    /// Who that is, unless it is long ago; there is a datagram now.
    fn touch(&mut self, address: SocketAddr, now: Instant) -> Option<Party> {
        let known = self.0.get_mut(&address)?;
        let silence = now.saturating_duration_since(known.seen);
        known.seen = now;
        (silence < IDLE).then_some(known.party)
    }

    fn insert(&mut self, address: SocketAddr, party: Party, now: Instant) {
        if self.0.len() >= MOST && !self.0.contains_key(&address) {
            let mut times: Vec<_> = self.0.values().map(|known| known.seen).collect();
            let (_, middle, _) = times.select_nth_unstable(MOST / 2);
            let middle = *middle;
            self.0.retain(|_, known| known.seen > middle);
        }
        self.0.insert(address, Known { party, seen: now });
    }
}

/// The flows of a socket.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    table: Mutex<Table>,
    /// Held while a record is on the socket, and while anything is sent to somebody.
    sending: Mutex<()>,
}

impl Flows {
    /// A datagram has come from there: what comes with it, if it begins a flow of a client's. `peeked`: it
    /// will be received once more.
    pub(crate) fn receive(&self, source: SocketAddr, peeked: bool) -> Option<Begin> {
        let source = correspondent(source);
        let mut table = lock(&self.table);
        if peeked {
            let known = table.0.get(&source).copied();
            let begin = table.receive(source, Instant::now(), ask);
            match known {
                Some(known) => table.0.insert(source, known),
                None => table.0.remove(&source),
            };
            return begin;
        }
        table.receive(source, Instant::now(), ask)
    }

    /// A datagram has been sent there.
    pub(crate) fn has_sent(&self, to: SocketAddr) {
        lock(&self.table).send(correspondent(to), Instant::now());
    }

    /// Sends something with this record on the socket, or without any, by `send`, which gets flags for
    /// the system call. Waits for room only if `waits`, on a blocking socket.
    pub(crate) fn send<T>(
        &self,
        fd: RawFd,
        record: Option<&[u8]>,
        waits: bool,
        send: impl Fn(i32) -> Result<T, i32>,
    ) -> Result<T, i32> {
        loop {
            match self.send_now(fd, record, || send(libc::MSG_DONTWAIT)) {
                Err(wsa::EWOULDBLOCK) if waits && !sys::is_nonblocking(fd).unwrap_or(true) => {
                    sys::wait_until_writable(fd).map_err(crate::contract::error_of_errno)?;
                }
                result => return result,
            }
        }
    }

    fn send_now<T>(
        &self,
        fd: RawFd,
        record: Option<&[u8]>,
        send: impl FnOnce() -> Result<T, i32>,
    ) -> Result<T, i32> {
        let _alone = lock(&self.sending);
        let Some(record) = record else {
            return send();
        };
        let set = |value: &[u8]| sys::set_option(fd, abi::LEVEL, abi::SET_REDIRECT_RECORDS, value);
        set(record).map_err(|errno| Failure::of_option(errno).code())?;
        let result = send();
        // It fails only if the engine has gone, and the record with it.
        let _ = set(&[]);
        result
    }
}

/// Whether the socket is one of UDP or UDP-Lite.
pub(crate) fn has_flows(fd: RawFd) -> bool {
    let protocol = sys::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL);
    matches!(protocol, Ok(libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE))
}

/// The address in a `sockaddr_in` or `sockaddr_in6`.
pub(crate) fn address(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let port = u16::from_be_bytes(*name.get(2..)?.first_chunk()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = *name.get(4..)?.first_chunk()?;
            Some(SocketAddr::new(Ipv4Addr::from(octets).into(), port))
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = *name.get(8..)?.first_chunk()?;
            let scope = u32::from_ne_bytes(*name.get(24..)?.first_chunk()?);
            Some(SocketAddrV6::new(octets.into(), port, 0, scope).into())
        }
        _ => None,
    }
}

/// As the table knows it: clients of IPv4 are such to sockets of IPv6 too.
fn correspondent(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn is_token(address: IpAddr) -> bool {
    let octets = match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
    .octets();
    let mut words = [0; 4];
    for (word, octets) in words.iter_mut().zip(octets.as_chunks().0) {
        *word = u32::from_ne_bytes(*octets);
    }
    is_source_token(&Endpoint::v6(words, 0))
}

/// Asks the engine about an address. The calling thread has to be in the network namespace of the socket that
/// heard from it.
fn ask(peer: SocketAddr) -> Said {
    // A connected client sends from an address of this machine. To connect anywhere else would be
    // an attempt of the service's, without a record.
    let mut own = peer;
    own.set_port(0);
    if is_token(peer.ip()) {
        own.set_ip(match peer {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        });
    }
    let socket = match UdpSocket::bind(own) {
        Ok(socket) => socket,
        Err(error) => {
            let elsewhere = error.raw_os_error() == Some(libc::EADDRNOTAVAIL);
            return if elsewhere { Said::Other } else { Said::Nothing };
        }
    };
    if socket.connect(peer).is_err() {
        return Said::Nobody;
    }
    let get = |option| {
        let mut value = vec![0; LONGEST];
        let length = sys::get_option(socket.as_raw_fd(), abi::LEVEL, option, &mut value).ok()?;
        value.truncate(length);
        Some(value)
    };
    let flow = get(abi::FLOW).and_then(|value| value.try_into().ok());
    match (flow, get(abi::QUERY_REDIRECT_RECORDS)) {
        (Some(flow), Some(record)) => {
            let context = get(abi::QUERY_REDIRECT_CONTEXT).unwrap_or_default();
            Said::Client(flow, Begin { record, context })
        }
        _ => Said::Nobody,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::Cell;

    const TOKEN: &str = "127.64.1.2:4000";
    const CLIENT: &str = "127.0.0.1:4000";

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn begin(number: u8) -> Begin {
        Begin { record: vec![number], context: Vec::new() }
    }

    fn client(number: u8) -> impl FnOnce(SocketAddr) -> Said {
        move |_| Said::Client([number; 40], begin(number))
    }

    fn nobody(_: SocketAddr) -> Said {
        Said::Nobody
    }

    fn never(peer: SocketAddr) -> Said {
        panic!("{peer} is asked about")
    }

    #[test]
    fn the_first_datagram_of_a_token_begins_its_flow() {
        let (mut table, now) = (Table::default(), Instant::now());
        assert_eq!(table.receive(at(TOKEN), now, client(1)), Some(begin(1)));
        assert_eq!(table.receive(at(TOKEN), now, never), None);
        // One of another port is another client's, with the same address or not.
        assert_eq!(table.receive(at("127.64.1.2:4001"), now, client(2)), Some(begin(2)));
    }

    #[test]
    fn after_a_minute_of_silence_it_begins_anew() {
        let (mut table, begun) = (Table::default(), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(table.receive(at(TOKEN), begun, client(1)), Some(begin(1)));
        assert_eq!(table.receive(at(TOKEN), after(59), never), None);
        // Silence of both sides: an answer is none.
        table.send(at(TOKEN), after(118));
        assert_eq!(table.receive(at(TOKEN), after(177), never), None);
        assert_eq!(table.receive(at(TOKEN), after(237), client(1)), Some(begin(1)));
        assert_eq!(table.receive(at(TOKEN), after(238), never), None);
    }

    #[test]
    fn the_port_of_a_connected_client_may_soon_be_anothers() {
        let (mut table, now) = (Table::default(), Instant::now());
        assert_eq!(table.receive(at(CLIENT), now, client(1)), Some(begin(1)));
        assert_eq!(table.receive(at(CLIENT), now, client(1)), None);
        assert_eq!(table.receive(at(CLIENT), now, client(2)), Some(begin(2)));
        // Of a flow that has ended there is still a datagram.
        assert_eq!(table.receive(at(CLIENT), now, nobody), None);
        assert_eq!(table.receive(at(CLIENT), now, client(2)), None);
        assert_eq!(table.receive(at(CLIENT), now, client(3)), Some(begin(3)));
        // It was gone before it was asked about, and answered all the same.
        assert_eq!(table.receive(at("127.0.0.1:4001"), now, nobody), None);
        table.send(at("127.0.0.1:4001"), now);
        assert_eq!(table.receive(at("127.0.0.1:4001"), now, client(4)), Some(begin(4)));
    }

    #[test]
    fn whoever_was_sent_to_first_is_no_client() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.send(at("127.0.0.53:53"), now);
        assert_eq!(table.receive(at("127.0.0.53:53"), now, never), None);
        let far = at("192.0.2.2:53");
        assert_eq!(table.receive(far, now, |_| Said::Other), None);
        assert_eq!(table.receive(far, now, never), None);
    }

    #[test]
    fn who_could_not_be_asked_about_is_asked_about_again() {
        let (mut table, now) = (Table::default(), Instant::now());
        assert_eq!(table.receive(at(TOKEN), now, |_| Said::Nothing), None);
        assert_eq!(table.receive(at(TOKEN), now, client(1)), Some(begin(1)));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest() {
        let (mut table, now) = (Table::default(), Instant::now());
        let later = |n: usize| now + Duration::from_micros(n as u64);
        let token = |n: usize| at(&format!("127.64.{}.{}:1", n / 256, n % 256));
        for n in 0..3 * MOST {
            assert!(table.receive(token(n), later(n), client(1)).is_some(), "{n}");
            assert!(table.0.len() <= MOST);
            // That one is never silent.
            assert_eq!(table.receive(token(0), later(n), never), None);
        }
        assert_eq!(table.receive(token(3 * MOST - 1), later(3 * MOST), never), None);
        assert!(table.receive(token(1), later(3 * MOST), client(1)).is_some());
        // All of the same moment.
        for n in 0..2 * MOST {
            table.send(token(n), later(4 * MOST));
            assert!(table.0.len() <= MOST);
        }
    }

    #[test]
    fn tokens_are_told_from_other_addresses() {
        for token in ["127.64.0.0", "127.127.255.255", "fd43:6172:6e65:74::9"] {
            assert!(is_token(token.parse().unwrap()), "{token}");
        }
        for other in ["127.0.0.1", "127.128.0.0", "::1", "fd43:6172:6e65:75::9"] {
            assert!(!is_token(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn mapped_addresses_are_those_of_ipv4() {
        assert_eq!(correspondent(at("[::ffff:127.64.1.2]:7")), at("127.64.1.2:7"));
        assert_eq!(correspondent(at("[2001:db8::1]:7")), at("[2001:db8::1]:7"));
    }

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let mut v4 = vec![2, 0, 0x12, 0x34, 127, 64, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(address(&v4), Some(at("127.64.1.2:4660")));
        let mut v6 = vec![0; 28];
        (v6[0], v6[3], v6[23], v6[24]) = (10, 7, 1, 3);
        let scoped = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 7, 0, 3);
        assert_eq!(address(&v6), Some(scoped.into()));
        v6.pop();
        v4[0] = 1;
        for none in [&v4[..], &v6, &v4[..1], &[]] {
            assert_eq!(address(none), None);
        }
    }

    #[test]
    fn without_an_engine_nobody_is_a_client() {
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(ask(other.local_addr().unwrap()), Said::Nobody);
        assert_eq!(ask(at("192.0.2.1:9")), Said::Other);
    }

    #[test]
    fn without_an_engine_a_record_is_refused_and_nothing_is_sent() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let send = |_| -> Result<(), i32> { panic!("it is sent") };
        let sent = Flows::default().send(socket.as_raw_fd(), Some(b"record"), true, send);
        assert_eq!(sent, Err(wsa::ENETDOWN));
    }

    #[test]
    fn only_a_blocking_socket_is_waited_for() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (fd, flows) = (socket.as_raw_fd(), Flows::default());
        let try_twice = |waits| {
            let tried = Cell::new(0);
            flows.send(fd, None, waits, |flags| {
                assert_eq!(flags, libc::MSG_DONTWAIT);
                tried.set(tried.get() + 1);
                if tried.get() < 2 { Err(wsa::EWOULDBLOCK) } else { Ok(()) }
            })
        };
        assert_eq!(try_twice(true), Ok(()));
        assert_eq!(try_twice(false), Err(wsa::EWOULDBLOCK));
        socket.set_nonblocking(true).unwrap();
        assert_eq!(try_twice(true), Err(wsa::EWOULDBLOCK));
    }
}

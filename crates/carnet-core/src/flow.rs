//! What the kernel keeps for a redirected connection.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    abi::MAX_CONTEXT,
    access::Caller,
    address::Endpoint,
    place::Size,
    record::{Record, RecordError},
};

/// [`LegState::kind`]: the connection goes to a service.
pub const LEG_REDIRECTED: u32 = 1;
/// [`LegState::kind`]: the connection carries a record and goes to its destination.
pub const LEG_ONWARD: u32 = 2;
/// [`LegState::kind`]: the connection is refused. Always with [`LEG_STARTING`]: there is no SYN, unless
/// another program clears the refusal.
pub const LEG_REFUSED: u32 = 3;

/// Added to [`LegState::kind`] of TCP from the connect until its SYN is sent. What of it an earlier connect
/// that failed left is taken away by the next one, so that it is the present one's if it is there at the
/// SYN: see [`Outcome`](crate::outcome::Outcome).
pub const LEG_STARTING: u32 = 1 << 8;

/// [`LegState::flags`]: the leg goes to an unmodified service, among whose flows it is counted
/// ([`HeldFlows`](crate::adoption::HeldFlows)).
pub const LEG_TO_UNMODIFIED: u32 = 1;
/// [`LegState::flags`]: nobody set the record on the connecting socket, the connect adopted it. It is not
/// the next connect's.
pub const LEG_ADOPTED: u32 = 2;

/// [`LegState::way`]: it has not begun.
pub const WAY_NONE: u32 = 0;
/// [`LegState::way`]: the connecting socket is established, and [`Handover`] says where the leg is.
pub const WAY_BEGUN: u32 = 1;
/// [`LegState::way`]: the accepted socket shares the leg, which ends with that one's connection.
pub const WAY_SHARED: u32 = 2;
/// [`LegState::way`]: the accepted socket has a copy, or nothing, or the connecting one has other plans. The leg ends
/// with its own socket.
pub const WAY_ENDED: u32 = 3;

/// One leg of a flow: the state of the socket that connects, and of the socket that the service
/// accepts, which share it or have a copy each.
///
/// It begins when a service sets a record on the socket, or when a connect is redirected; `kind` is
/// 0 until the connect and after the leg's end. A leg that the accepted socket shares ends with that
/// one's connection, any other with the connecting socket, at the latest: when it is closed or connects anew. For the connecting socket it answers `getpeername` and the flow listing; for the
/// accepted one the control interface. A UDP flow of an unconnected socket has its leg in a
/// [`DatagramLeg`]. Its record's MAC is computed when a service asks for the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LegState {
    /// [`LEG_REDIRECTED`], [`LEG_ONWARD`] or [`LEG_REFUSED`], at first with [`LEG_STARTING`]; 0 without a
    /// connection.
    pub kind: u32,
    /// Length of the redirect context in bytes, 0 for none.
    pub context_length: u32,
    /// Redirect handle of the service that the leg goes to; 0 for an onward leg.
    pub handle: u64,
    /// The filter that redirected the leg; 0 for an onward leg.
    pub filter: u64,
    /// Cookie of the connecting socket: the holder of the [`place`](crate::place) where the leg is kept apart
    /// from it.
    pub cookie: u64,
    /// Cookie of the connecting socket's network namespace.
    pub netns: u64,
    /// Cookie of the network namespace in which the service listens; of an onward leg, and unless the
    /// service listens elsewhere, the same.
    pub home: u64,
    /// When the leg began: nanoseconds of the boot-time clock.
    pub began_ns: u64,
    /// Process that connected, in the initial pid namespace.
    pub pid: u32,
    /// Number of hops of the record that a service set on the connecting socket; 0 if none was. It
    /// tells what a later connect of the socket begins with: a redirect appends a hop.
    pub set_hops: u32,
    /// IP protocol number of the socket: 6, TCP; 17, UDP; 136, UDP-Lite.
    pub protocol: u32,
    /// [`LEG_TO_UNMODIFIED`], [`LEG_ADOPTED`].
    pub flags: u32,
    /// Of a leg that is kept apart from its socket: how many keep it. These are the socket, until it is
    /// closed or has another leg; and the way to the accepted socket, then that one.
    pub owners: i64,
    /// How far the leg has come to the accepted socket: [`WAY_NONE`], [`WAY_BEGUN`], [`WAY_SHARED`],
    /// [`WAY_ENDED`].
    pub way: u32,
    /// Not 0: the socket does not keep it any more.
    pub left: u32,
    /// The connecting socket's own address and port, once the way has begun.
    pub local: Endpoint,
    /// The destination that the connect asked for.
    pub requested: Endpoint,
    /// Where the connection really goes: the service's listener; for an onward leg the same as
    /// `requested`.
    pub target: Endpoint,
    /// The redirect context, `context_length` bytes.
    pub context: [u8; MAX_CONTEXT],
    /// The record with this leg's hop in it.
    pub record: Record,
}

impl LegState {
    /// Under what the leg is one of the flows that its service holds.
    #[inline(always)]
    pub const fn held_key(&self) -> HeldKey {
        HeldKey::of(self.handle, self.home, self.protocol, &self.requested)
    }

    /// Whether the next connect of the socket that this leg hangs on, or the next datagram that it sends
    /// elsewhere, may adopt a record: none was set on it, and it is not connected. A socket that is
    /// connected sends with the record of its connection.
    #[inline(always)]
    pub const fn may_adopt(&self) -> bool {
        self.kind == 0 && (self.set_hops == 0 || self.flags & LEG_ADOPTED != 0)
    }

    /// A record has been set on the socket: it is there for the socket's next connect too, also if one that
    /// was adopted was there before.
    #[inline(always)]
    pub const fn set_record(&mut self) {
        self.set_hops = self.record.hop_count;
        self.flags &= !LEG_ADOPTED;
    }

    /// Whether the socket's connection goes to a service, or went there and is over on that side.
    #[inline(always)]
    pub const fn is_to_a_service(&self) -> bool {
        self.kind == LEG_REDIRECTED || self.way == WAY_SHARED
    }

    /// Whether nobody but its socket keeps the leg.
    #[inline(always)]
    pub const fn is_the_sockets_alone(&self) -> bool {
        self.owners == 1 && self.left == 0
    }

    /// The two ends of the connection, once the way has begun: where [`Handover`] is.
    #[inline(always)]
    pub const fn ends(&self) -> Tuple {
        Tuple::between(self.home, &self.local, &self.target)
    }

    /// A service asks for the record at `now_ns` of the boot-time clock. As long as its connection is
    /// there, the record is renewed ([`Record::renew`]).
    #[inline(always)]
    pub const fn ask(&mut self, is_there: bool, now_ns: u64) {
        if is_there {
            self.record.renew(now_ns);
        }
    }

    /// `caller` carries the flow on by its ticket ([`CARRY_ON`](crate::abi::CARRY_ON)): what is decided is
    /// as if it asked for the record and set it at once, but for the MAC of a record that has not left the
    /// kernel. `is_there`: the accepted connection is not over.
    ///
    /// # Errors
    /// [`RecordError::NotDelivered`] if the flow was not delivered to the caller's service (contract S30);
    /// [`RecordError::Expired`].
    #[inline(always)]
    pub const fn carry_on(
        &mut self,
        is_there: bool,
        caller: &Caller,
        now_ns: u64,
    ) -> Result<(), RecordError> {
        if !caller.may_set(self.handle) {
            return Err(RecordError::NotDelivered);
        }
        self.ask(is_there, now_ns);
        if self.record.is_expired(now_ns) { Err(RecordError::Expired) } else { Ok(()) }
    }
}

/// The two ends of a TCP connection, as the connecting side sees them: the key under which a leg
/// waits for its acceptance.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Tuple {
    /// Cookie of the accepting end's network namespace.
    pub netns: u64,
    /// Address of the connecting end, four words in network byte order, IPv4 mapped.
    pub local_address: [u32; 4],
    /// Address of the accepting end, likewise.
    pub remote_address: [u32; 4],
    /// Port of the connecting end, in host byte order.
    pub local_port: u32,
    /// Port of the accepting end, in host byte order.
    pub remote_port: u32,
}

impl Tuple {
    /// That of a connection that is accepted in the network namespace with this cookie.
    #[inline(always)]
    pub const fn between(netns: u64, connecting: &Endpoint, accepting: &Endpoint) -> Self {
        Self {
            netns,
            local_address: connecting.address,
            remote_address: accepting.address,
            local_port: connecting.port as u32,
            remote_port: accepting.port as u32,
        }
    }

    /// Which of the [`WAITING_PLACES`] the connection's cookie is in while its leg is on its way, unless that of
    /// another one is. Connections to one listener differ in the port alone, so they are not in each other's way.
    #[inline(always)]
    pub const fn waiting_place(&self) -> u32 {
        let others =
            self.remote_port ^ self.remote_address[3] ^ self.local_address[3] ^ self.netns as u32;
        (self.local_port ^ others.wrapping_mul(0x9e37_79b1) >> 16) & (WAITING_PLACES - 1)
    }
}

/// How many places there are for the legs that sockets make.
pub const CONNECTING_SIZE: Size = Size { few: 128, many: 8192 };
/// The same for accepted sockets.
pub const ACCEPTED_SIZE: Size = Size { few: 256, many: 16384 };
/// How many places there are for legs that are on their way: see [`Tuple::waiting_place`].
pub const WAITING_PLACES: u32 = 1024;

/// Where a leg is that is on its way to the accepted socket.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Handover {
    /// Cookie of the connecting socket.
    pub cookie: u64,
    /// Not 0: a copy waits under that cookie, since the leg itself hangs on the connecting socket, where
    /// only that one's hooks reach it. 0: the leg itself is kept under that cookie.
    pub copied: u64,
}

/// What is kept for an accepted socket, under its cookie: which leg it was accepted with.
///
/// It goes when the connection is over and the socket closed, whichever comes last.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Accepted {
    /// The accepted socket's cookie: the holder of the [`place`](crate::place).
    pub cookie: u64,
    /// The cookie under which the leg is kept: the connecting socket's, which shares it; of a copy the
    /// accepted socket's own, with the highest bit set.
    pub leg: u64,
    /// Not 0: it is a copy.
    pub copied: u32,
    /// Not 0 until the connection is over on this side.
    pub is_there: u32,
    /// How many of the two ends, that of the connection and that of the socket, are over.
    pub ends: i64,
}

/// Key of what is known of the flows that a service holds: the service, and their destination.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HeldKey {
    /// The service's redirect handle.
    pub handle: u64,
    /// Cookie of the network namespace in which the service listens, from which it connects onwards.
    pub netns: u64,
    /// The destination's address, four words in network byte order, IPv4 mapped.
    pub address: [u32; 4],
    /// The destination's port, in host byte order.
    pub port: u32,
    /// IP protocol number.
    pub protocol: u32,
}

impl HeldKey {
    /// That of the flows for one destination.
    #[inline(always)]
    pub const fn of(handle: u64, netns: u64, protocol: u32, destination: &Endpoint) -> Self {
        Self {
            handle,
            netns,
            address: destination.address,
            port: destination.port as u32,
            protocol,
        }
    }

    /// That of all flows of a service: all but the service is zero.
    #[inline(always)]
    pub const fn of_all(handle: u64) -> Self {
        Self { handle, netns: 0, address: [0; 4], port: 0, protocol: 0 }
    }
}

/// Key of the registered listeners.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ListenerKey {
    /// The service's redirect handle.
    pub handle: u64,
    /// Cookie of the network namespace whose flows reach it.
    pub netns: u64,
    /// Family of the listening socket, or of the address at which it is reached in another network
    /// namespace: 2 or 10.
    pub family: u16,
    /// IP protocol number of the socket: 6, TCP; 17, UDP.
    pub protocol: u16,
    /// 0..[`LISTENER_SLOTS`](crate::abi::LISTENER_SLOTS).
    pub slot: u32,
}

/// A registered listener. It counts only while a listening socket of the service is really there.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ListenerEntry {
    /// The address that it is bound to; may be unspecified. Of a listener in another network namespace
    /// the address at which it is reached.
    pub local: Endpoint,
    /// Connects that did not find it since it was last found. Not 0: its slot may be taken, unless it
    /// is in another network namespace.
    pub missed: u64,
    /// Cookie of the network namespace in which it listens: the key's, or another one.
    pub home: u64,
    /// The number by which the key's network namespace knows that one (`RTM_GETNSID`), or
    /// [`SAME_NAMESPACE`].
    pub home_id: i32,
    /// Always zero.
    pub zero: u32,
}

/// [`ListenerEntry::home_id`]: it listens in the key's network namespace.
pub const SAME_NAMESPACE: i32 = -1;

/// What hangs on a registered socket: whose listener it is. It goes with the socket.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Registration {
    /// The service's redirect handle; 0 for none.
    pub handle: u64,
    /// Cookie of the socket's network namespace. Numbers of namespaces are used again, cookies never.
    pub netns: u64,
}

/// Key of the UDP flows that are not looked up by their sockets: the address under which the service
/// sees the flow's client.
///
/// For a socket that is not connected it is the flow's *source token*. Every datagram of the flow reaches
/// the service from this address, with the client's own port, and what the service sends there reaches
/// the client. So a service tells flows by the source of their datagrams, as it would tell clients,
/// whatever clients share a port or a destination. For a connected socket, which is closed already, it is
/// the address that it had.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PeerKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The address, four words in network byte order, IPv4 mapped.
    pub address: [u32; 4],
    /// The port of a connected socket, in host byte order; 0 with a source token, of which no two are
    /// the same.
    pub port: u32,
    /// Always zero.
    pub zero: u32,
}

/// Key of what is remembered of an unconnected UDP socket's flows: the socket, and whom it talks to
/// (contract U7).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct CorrespondentKey {
    /// Cookie of the socket.
    pub cookie: u64,
    /// Address of the other side, four words in network byte order, IPv4 mapped.
    pub address: [u32; 4],
    /// Port of the other side, in host byte order.
    pub port: u32,
    /// Always zero.
    pub zero: u32,
}

/// What was decided for a flow of an unconnected UDP socket. It holds until the flow has been idle
/// for too long: policy changes do not re-route it (contract C42).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Correspondent {
    /// When the flow had its last datagram: nanoseconds of the boot-time clock.
    pub seen_ns: u64,
    /// The flow's source token if it goes to a service; all zero if it passes.
    pub token: [u32; 4],
}

impl Correspondent {
    /// Whether the flow passes. Tokens of IPv4 have a mark in their third word, those of IPv6 in their
    /// first.
    #[inline(always)]
    pub const fn passes(&self) -> bool {
        self.token[0] == 0 && self.token[2] == 0
    }
}

/// Key of the IPv6 addresses from which local sockets have sent: an address in a network namespace.
///
/// An application may send from any IPv6 address to a socket of its own (`IPV6_FREEBIND`), which would
/// look like a flow that begins elsewhere. From these addresses none does.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct LocalSourceKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The address, four words in network byte order.
    pub address: [u32; 4],
}

/// A UDP flow of an unconnected socket, as long as it goes to a service; or one whose socket was closed a
/// moment ago, then with a leg of kind 0. In the kernel a timer lies before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DatagramLeg {
    /// When the flow had its last datagram, in either direction: nanoseconds of the boot-time clock.
    pub seen_ns: u64,
    /// Where answers reach the client: the address that its socket is bound to, a loopback address
    /// if that is unspecified.
    pub client: Endpoint,
    /// The leg.
    pub leg: LegState,
}

/// How long a UDP flow of an unconnected socket lives without a datagram unless told otherwise, in
/// nanoseconds: 60 s (contract U7).
pub const DATAGRAM_IDLE_NS: u64 = 60_000_000_000;

/// How long a UDP flow can still be asked about after its socket was closed, in nanoseconds: 2 s. Its
/// last datagrams, perhaps its only ones, may not have been received yet.
pub const DATAGRAM_LINGER_NS: u64 = 2_000_000_000;

/// IPv4 source tokens are 127.64.0.0/10.
const TOKEN_V4: u32 = 0x7f40_0000;
/// The bits of an IPv4 source token that count.
const TOKEN_V4_BITS: u32 = 0x003f_ffff;
/// IPv6 source tokens are fd43:6172:6e65:74::/64, a unique local prefix of Carnet's own.
const TOKEN_V6: [u32; 2] = [0xfd43_6172_u32.to_be(), 0x6e65_0074_u32.to_be()];

/// The source token of number `n`: of IPv4 for flows that the network layer carries as IPv4, mapped ones
/// among them. IPv4 has 4,194,304 of them, which are told apart by the lowest bits of `n`.
///
/// Numbers are drawn at random: who does not know a flow's token cannot pretend to be its service.
#[inline(always)]
pub const fn source_token(n: u64, ipv4: bool) -> [u32; 4] {
    if ipv4 {
        let address = TOKEN_V4 | (n as u32 & TOKEN_V4_BITS);
        Endpoint::v4(address.to_be(), 0).address
    } else {
        [TOKEN_V6[0], TOKEN_V6[1], ((n >> 32) as u32).to_be(), (n as u32).to_be()]
    }
}

/// Whether an address is of those from which source tokens are taken.
#[inline(always)]
pub const fn is_source_token(endpoint: &Endpoint) -> bool {
    let address = &endpoint.address;
    if endpoint.is_ipv4() {
        u32::from_be(address[3]) & !TOKEN_V4_BITS == TOKEN_V4
    } else {
        address[0] == TOKEN_V6[0] && address[1] == TOKEN_V6[1]
    }
}

const _: () = {
    assert!(size_of::<LegState>() == 88 + 72 + 256 + 920);
    assert!(size_of::<Handover>() == 16);
    assert!(size_of::<Accepted>() == 32);
    assert!(size_of::<PeerKey>() == 32);
    assert!(size_of::<LocalSourceKey>() == 24);
    assert!(size_of::<CorrespondentKey>() == 32);
    assert!(size_of::<Correspondent>() == 24);
    assert!(size_of::<DatagramLeg>() == 8 + 24 + size_of::<LegState>());
    assert!(size_of::<Tuple>() == 48);
    assert!(size_of::<HeldKey>() == 40);
    assert!(size_of::<ListenerKey>() == 24);
    assert!(size_of::<ListenerEntry>() == 48);
    assert!(size_of::<Registration>() == 16);
};

#[cfg(test)]
mod tests {
    use super::{Correspondent, LEG_REDIRECTED, LegState, is_source_token, source_token};
    use crate::{
        access::Caller,
        address::Endpoint,
        record::{LIFETIME_NS, RecordError},
    };
    use core::net::{IpAddr, SocketAddr};
    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    #[track_caller]
    fn is(token: [u32; 4], address: &str) {
        let found = SocketAddr::from(Endpoint { family: 2, ..Endpoint::v6(token, 0) }).ip();
        assert_eq!(found, address.parse::<IpAddr>().unwrap());
    }

    #[test]
    fn tokens_are_addresses_of_their_prefixes() {
        is(source_token(0, true), "127.64.0.0");
        is(source_token(258, true), "127.64.1.2");
        is(source_token(4_194_303, true), "127.127.255.255");
        is(source_token(4_194_304, true), "127.64.0.0");
        is(source_token(10, false), "fd43:6172:6e65:74::a");
        for other in [
            "127.63.255.255:1",
            "127.128.0.0:1",
            "127.0.0.1:1",
            "[::1]:1",
            "[fd43:6172:6e65:75::]:1",
        ] {
            assert!(!is_source_token(&other.parse::<SocketAddr>().unwrap().into()), "{other}");
        }
    }

    #[test]
    fn a_ticket_stands_for_asking_and_setting_at_once() {
        let of = |service| Caller { service, privileged: false };
        let mut leg = LegState::new_zeroed();
        (leg.kind, leg.handle, leg.record.issued_ns) = (LEG_REDIRECTED, 7, 1);
        let late = 1 + 3 * LIFETIME_NS;
        assert_eq!(leg.carry_on(true, &of(8), late), Err(RecordError::NotDelivered));
        assert_eq!(leg.carry_on(true, &of(0), late), Err(RecordError::NotDelivered));
        assert_eq!(leg.record.issued_ns, 1, "who may not carry on renews nothing");
        assert_eq!(leg.carry_on(true, &of(7), late), Ok(()));
        assert_eq!(leg.record.issued_ns, late);
        assert_eq!(leg.carry_on(true, &Caller { service: 0, privileged: true }, late), Ok(()));
        // When the connection is over nothing renews the record.
        assert_eq!(leg.carry_on(false, &of(7), late + LIFETIME_NS), Ok(()));
        assert_eq!(leg.carry_on(false, &of(7), late + LIFETIME_NS + 1), Err(RecordError::Expired));
        assert_eq!(leg.record.issued_ns, late);
    }

    proptest! {
        #[test]
        fn every_token_is_one(n: u64, ipv4: bool, port: u16) {
            let token = Endpoint::v6(source_token(n, ipv4), port);
            prop_assert!(is_source_token(&token));
            prop_assert_eq!(token.is_ipv4(), ipv4);
            let correspondent = Correspondent { seen_ns: 0, token: token.address };
            prop_assert!(!correspondent.passes());
        }

        #[test]
        fn ipv6_tokens_do_not_repeat(a: u64, b: u64) {
            prop_assert_eq!(source_token(a, false) == source_token(b, false), a == b);
        }
    }
}

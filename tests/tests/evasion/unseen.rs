//! Sockets whose flows no hook sees, and `carnet up --refuse-unseen`.

use carnet_core::{
    event::{Counter, EventKind},
    socket::SocketKind,
};
use carnet_engine::UpOptions;
use carnet_tests::{
    Lab, Must as _,
    puppet::{Errno, Family, Kind, Puppet, Ring},
};

const STREAM: i32 = 1;
const DATAGRAM: i32 = 2;
const RAW: i32 = 3;
const SEQUENTIAL: i32 = 5;

/// Sockets that pass the hooks by.
const UNSEEN: [(Family, Kind); 11] = [
    (Family::V4, Kind::Other(RAW, libc::IPPROTO_ICMP)),
    (Family::V4, Kind::Other(RAW, libc::IPPROTO_TCP)),
    (Family::V4, Kind::Other(RAW, libc::IPPROTO_UDP)),
    (Family::V4, Kind::Other(RAW, libc::IPPROTO_RAW)),
    (Family::V6, Kind::Other(RAW, libc::IPPROTO_ICMPV6)),
    (Family::V6, Kind::Other(RAW, libc::IPPROTO_TCP)),
    (Family::V6, Kind::Other(RAW, libc::IPPROTO_RAW)),
    (Family::V4, Kind::Other(DATAGRAM, libc::IPPROTO_ICMP)),
    (Family::V6, Kind::Other(DATAGRAM, libc::IPPROTO_ICMPV6)),
    (Family::V4, Kind::UdpLite),
    (Family::V6, Kind::UdpLite),
];

/// Sockets of protocols that not every kernel has.
const WHERE_PRESENT: [(Family, Kind); 4] = [
    (Family::V4, Kind::Other(STREAM, libc::IPPROTO_SCTP)),
    (Family::V6, Kind::Other(SEQUENTIAL, libc::IPPROTO_SCTP)),
    (Family::V4, Kind::Other(6, libc::IPPROTO_DCCP)),
    (Family::V6, Kind::Other(6, libc::IPPROTO_DCCP)),
];

/// Sockets that the hooks see.
const SEEN: [Kind; 3] = [Kind::Tcp, Kind::Multipath, Kind::Udp];

/// A lab that refuses unseen sockets, or not, in which everybody may make sockets as `ping` does.
#[track_caller]
fn lab(refuse_unseen: bool) -> Lab {
    let lab = Lab::new();
    lab.down();
    lab.up_with(&UpOptions { refuse_unseen, ..UpOptions::new(lab.scope().path()) });
    let client = &lab.network().topology.client;
    client.set_sysctl("ipv4/ping_group_range", "0 2147483647").must("allow ping");
    lab
}

/// Checks that the puppet is refused what passes the hooks by, and nothing else.
#[track_caller]
fn refused(puppet: &Puppet) {
    for (family, kind) in UNSEEN {
        let made = puppet.open(family, kind).map(drop);
        assert_eq!(made, Err(Errno(libc::EPERM)), "{family:?} {kind:?}");
        for ring in [Ring::Plain, Ring::Async, Ring::Polled] {
            let made = puppet.ring_open(family, kind, ring).map(drop);
            assert_eq!(made, Err(Errno(libc::EPERM)), "{family:?} {kind:?} by {ring:?}");
        }
    }
    for (family, kind) in WHERE_PRESENT {
        let absent = [libc::EPERM, libc::EPROTONOSUPPORT, libc::ESOCKTNOSUPPORT];
        let errno = puppet.open(family, kind).map(drop).expect_err("an errno").0;
        assert!(absent.contains(&errno), "{family:?} {kind:?}: {errno}");
    }
    for (kind, family) in SEEN.into_iter().flat_map(|k| [(k, Family::V4), (k, Family::V6)]) {
        drop(puppet.open(family, kind).must("open a socket that is seen"));
    }
    for kind in [Kind::Tcp, Kind::Udp] {
        drop(puppet.open(Family::Unix, kind).must("open a local socket"));
    }
}

#[test]
fn unseen_sockets_are_refused_where_the_operator_says_so() {
    let lab = lab(true);
    let mut trace = lab.trace();
    let puppet = lab.puppet();
    refused(&puppet);
    let count = UNSEEN.len() as u64;
    // Those of protocols that are present count, too.
    assert!(lab.counter(Counter::SocketsRefused) >= count);
    let event = trace.first(EventKind::SocketRefused);
    let raw = SocketKind { family: 2, kind: 3, protocol: 1 };
    assert_eq!(SocketKind::from_number(event.reason), raw);
    assert_eq!((event.pid, event.uid), (puppet.id(), 0));
    assert!(event.command.starts_with(b"test-puppet"));

    // It is the instance's, and survives an upgrade.
    assert!(lab.engine().status().must("ask for the status").refuse_unseen);
    lab.engine().upgrade().must("upgrade");
    assert!(lab.engine().status().must("ask for the status").refuse_unseen);
    refused(&puppet);
    // Services are no exception, and what is outside of the scope is not touched.
    lab.service("alpha", 1);
    refused(&lab.puppet_of("alpha"));
    lab.down();
    drop(puppet.open(UNSEEN[0].0, UNSEEN[0].1).must("open a raw socket"));
}

#[test]
fn unseen_sockets_are_made_unless_the_operator_says_otherwise() {
    let lab = lab(false);
    let puppet = lab.puppet();
    for (family, kind) in UNSEEN {
        drop(puppet.open(family, kind).must("open an unseen socket"));
    }
    assert_eq!(lab.counter(Counter::SocketsRefused), 0);
    assert!(!lab.engine().status().must("ask for the status").refuse_unseen);
}

/// Nothing but the capability keeps a process from these.
#[test]
fn packet_sockets_take_a_capability() {
    let lab = lab(true);
    let packet = (Family::Other(libc::AF_PACKET), Kind::Other(RAW, 0));
    let puppet = lab.puppet();
    drop(puppet.open(packet.0, packet.1).must("open a packet socket"));
    puppet.become_user(65534);
    assert_eq!(puppet.open(packet.0, packet.1).map(drop), Err(Errno(libc::EPERM)));
}

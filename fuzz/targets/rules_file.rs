//! The rules file of carnet-inspect, and its decisions.
#![no_main]

use std::net::SocketAddr;

use carnet_inspect::{
    config::parse,
    inspect::{Inspector, Seen},
    rules::{Decision, Facts, Transport},
};
use libfuzzer_sys::fuzz_target;

fn seen(bytes: &[u8]) -> Seen {
    let mut inspector = Inspector::new();
    inspector.feed(bytes);
    inspector.into_seen()
}

fuzz_target!(|text: &str| {
    let Ok(rules) = parse(text) else { return };
    let destination = SocketAddr::from(([192, 0, 2, 1], 443));
    let facts = Facts { transport: Transport::Tcp, destination, executable: None };
    for bytes in [&b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"[..], b""] {
        // Once the client has been heard, nothing is open any more.
        assert_ne!(rules.decide(facts, Some(&seen(bytes))), Decision::Open);
    }
    let _first = rules.decide(facts, None);
});

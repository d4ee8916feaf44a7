//! The first bytes of a stream: HTTP/1, TLS and DNS. What is seen does not depend on how they are cut.
#![no_main]

use carnet_inspect::inspect::{Inspector, LIMIT};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<u16>, &[u8])| {
    let (cuts, bytes) = input;
    let mut whole = Inspector::new();
    whole.feed(bytes);
    let mut pieces = Inspector::new();
    let mut ends: Vec<usize> = cuts.iter().map(|cut| usize::from(*cut).min(bytes.len())).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    let mut start = 0;
    for end in ends {
        pieces.feed(&bytes[start..end]);
        start = end;
    }
    assert_eq!(pieces.seen(), whole.seen());
    for inspector in [&mut whole, &mut pieces] {
        let taken = inspector.finish();
        assert!(taken.len() <= LIMIT && bytes.starts_with(&taken), "a byte was lost or changed");
    }
});

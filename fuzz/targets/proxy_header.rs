//! A PROXY header, as a stranger may send it.
#![no_main]

use carnet_inspect::proxy_protocol::{destination_in, header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(destination) = destination_in(bytes) else { return };
    let written = header(destination, destination, None).expect("a short header");
    let read = destination_in(&written).expect("what was written is read");
    assert_eq!(read.ip(), destination.ip().to_canonical());
    assert_eq!(read.port(), destination.port());
});

//! A PROXY header, as a stranger may send it.
#![no_main]

use carnet_inspect::proxy_protocol::{header_with, read_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = read_header(bytes) else { return };
    let chain = header.chain();
    let destination = header.destination;
    let value = chain.as_ref().ok().and_then(Option::as_ref);
    let tlvs: Vec<_> = value.iter().map(|value| (0xE4, &value[..])).collect();
    let written = header_with(destination, destination, &tlvs).expect("a short header");
    let read = read_header(&written).expect("what was written is read");
    assert_eq!(read.destination.ip(), destination.ip().to_canonical());
    assert_eq!(read.destination.port(), destination.port());
    assert_eq!(read.chain().expect("what was written is read").as_ref(), value);
});

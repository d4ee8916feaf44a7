//! The parsers of what the kernel writes, for the fuzzer (`fuzz/`): they are nobody else's business.
//!
//! Each takes arbitrary bytes and has to come to an end without a panic, whatever they are.

use carnet_core::{event::Event, flow::LegState};
use zerocopy::FromBytes as _;

use crate::{Flow, btf::Btf, doctor, events, flows, kernel, mounts, netlink, sockets};

/// `/sys/kernel/btf/vmlinux`: all that is looked for in it.
pub fn types(bytes: &[u8]) {
    if let Ok(btf) = Btf::parse(bytes.to_vec()) {
        kernel::fuzzing::look_up_all(btf);
    }
}

/// `/proc/self/mounts`.
pub fn mounts(bytes: &[u8]) -> usize {
    mounts::points_of(bytes, b"cgroup2").len()
}

/// What the kernel answers to a list of sockets.
pub fn socket_list(bytes: &[u8]) -> usize {
    sockets::fuzzing::count(bytes)
}

/// What the kernel answers to a question about network namespaces.
pub fn namespace_answer(bytes: &[u8]) {
    let _any = netlink::fuzzing::number_in(bytes);
}

/// What the kernel answers to a list of nftables' chains.
pub fn chain_list(bytes: &[u8]) -> usize {
    doctor::fuzzing::count(bytes)
}

/// An entry of the ring buffer.
pub fn event(bytes: &[u8]) -> Option<Event> {
    events::decode(bytes, 0)
}

/// What the iterator over flows writes.
pub fn flows(bytes: &[u8]) -> Vec<Flow> {
    flows::legs_in(bytes).map(|leg| Flow::new(&leg, |_| None)).collect()
}

/// A leg as bytes, to begin with.
pub fn leg(bytes: &[u8]) -> Option<LegState> {
    LegState::read_from_prefix(bytes).ok().map(|(leg, _)| leg)
}

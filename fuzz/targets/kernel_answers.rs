//! What the engine reads from the kernel: type information, mounts, netlink, events, flows. All of it
//! is trusted, none of it may bring a command down or keep it for ever.
#![no_main]

use carnet_core::event::EventKind;
use carnet_engine::fuzzing::{
    chain_list, event, flows, mounts, namespace_answer, socket_list, types,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 7 {
        0 => types(bytes),
        1 => assert!(mounts(bytes) <= bytes.len()),
        2 => assert!(socket_list(bytes) <= bytes.len()),
        3 => namespace_answer(bytes),
        4 => {
            let event = event(bytes);
            assert_eq!(event.is_some(), bytes.len() >= 144);
            let kind = event.and_then(|event| EventKind::from_number(event.kind));
            assert!(kind.is_none_or(|kind| (1..=9).contains(&(kind as u32))));
        }
        5 => assert!(chain_list(bytes) <= bytes.len()),
        _ => {
            for flow in flows(bytes) {
                assert!(flow.hops.len() <= 32 && flow.context.len() <= 256);
            }
        }
    }
});

//! Control data of messages in carnet-winsock: what is sent is taken apart without a byte lost or made
//! up, what is received is laid out so that it can be taken apart.
#![no_main]

use arbitrary::Arbitrary;
use carnet_winsock::message::fuzzing::{is_extension, join, split};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    control: &'a [u8],
    room: u16,
    objects: Vec<(i32, i32, Vec<u8>)>,
}

fuzz_target!(|input: Input<'_>| {
    let Input { control, room, objects } = input;
    let _any = is_extension(control);
    if let Some((native, record)) = split(control) {
        assert!(native.len() <= control.len().next_multiple_of(8));
        assert!(record.is_none_or(|record| !record.is_empty() && record.len() < control.len()));
        // What the kernel is to see has no objects of Carnet's any more.
        assert_eq!(split(&native), Some((native.clone(), None)));
    }
    let (joined, all) = join(room.into(), &objects);
    assert!(joined.len() <= room.into());
    // Records and contexts, at the levels of IP, are not the kernel's.
    let own = |level: i32, kind: i32| matches!(level, 0 | 41) && matches!(kind, 60 | 70);
    if all && !objects.iter().any(|(level, kind, _)| own(*level, *kind)) {
        let split = split(&joined).map(|(native, _)| native);
        assert!(split.is_some_and(|native| native.starts_with(&joined)));
    }
});

//! What the kernel answers to the library `carnet`, of any bytes and any claimed length.
#![no_main]

use carnet::fuzzing::{app, destination, flow};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], usize)| {
    let (buffer, length) = input;
    // Only answers of the length of their layout are taken.
    for length in [length, buffer.len()] {
        let fits = |size: usize| length == size && length <= buffer.len();
        assert_eq!(destination(buffer, length).is_some(), fits(24));
        assert_eq!(flow(buffer, length).is_some(), fits(40));
        let app = app(buffer, length);
        assert_eq!(app.is_some(), fits(328));
        if let Some(path) = app.and_then(|app| app.executable) {
            assert!(path.as_os_str().len() <= 256);
        }
    }
});

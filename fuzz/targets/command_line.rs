//! The command line of `carnet`, with all that arguments can say: hosts and ports, namespaces, process
//! ids, trust, contexts, times, conditions. A NUL separates two arguments.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &str| {
    let words = std::iter::once("carnet").chain(line.split('\0'));
    match carnet_cli::definition().try_get_matches_from(words) {
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

//! What people write in conditions: prefixes, ports, users, protocols, weights, contexts. What is
//! understood is printed so that it is understood as the same.
#![no_main]

use std::{
    fmt::{Debug, Display},
    str::FromStr,
};

use carnet_core::object::{Context, PortRange, Prefix, Protocol, UserRange, Weight};
use libfuzzer_sys::fuzz_target;

fn round_trip<T: FromStr<Err: Display> + Display + Debug + PartialEq>(text: &str) {
    match text.parse::<T>() {
        Ok(value) => {
            let printed = value.to_string();
            assert_eq!(printed.parse::<T>().ok().as_ref(), Some(&value), "{printed}");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fuzz_target!(|text: &str| {
    round_trip::<Prefix>(text);
    round_trip::<PortRange>(text);
    round_trip::<UserRange>(text);
    round_trip::<Protocol>(text);
    round_trip::<Weight>(text);
    if let Ok(context) = Context::from_hex(text) {
        assert_eq!(2 * context.as_bytes().len(), text.len());
    }
    if let Ok(context) = Context::new(text) {
        assert_eq!(context.as_bytes(), text.as_bytes());
        let _shown = context.to_string();
    }
});

//! Policy documents: what is read is whole, is written and read again as the same, and compiles or is
//! refused with a reason.
#![no_main]

use carnet_core::{compile::compile, object::Policy};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut policy) = Policy::from_bytes(bytes) else { return };
    let again = Policy::from_bytes(&policy.to_bytes()).expect("what was written can be read");
    assert_eq!(again, policy);
    let _refused = compile(&policy, 1).map_err(|error| error.to_string());
    // Whatever the document says, all of it can be removed again, the users before the used.
    carnet_reference::generate::clear(&mut policy).expect("filters and sublayers are removed");
    for service in policy.services().to_vec() {
        let _trusted = policy.remove_service(&service.id.to_string());
    }
    assert!(Policy::from_bytes(&policy.to_bytes()).is_ok());
});

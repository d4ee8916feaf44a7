//! Names that no other fixture has, in this process or another one.

use std::{
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::Error;

/// `PREFIX-PID-COUNTER`. In another pid namespace the same name can arise: whoever makes something
/// under it takes "exists already" as a reason to ask for the next one.
pub(crate) fn unique_name(prefix: &str) -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}-{}", process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Refuses what cannot be one component of a path.
pub(crate) fn check_component(name: &str) -> Result<(), Error> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(Error::argument(name, "a name of one path component (no '/', not empty)"));
    }
    Ok(())
}

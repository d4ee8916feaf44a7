//! What tests may change: how long an operation takes before it reaches the kernel.

use std::time::Duration;

/// For tests: from now on the three control codes (and, overlapped, unknown ones) take so long
/// before they reach the kernel. 0 at the begin. In this crate's own tests for the calling thread
/// alone, since they run in parallel.
#[cfg(any(all(test, not(loom)), feature = "test-hooks"))]
pub(crate) use self::changed::{delay, set_delay};

#[cfg(all(test, not(loom)))]
mod changed {
    use super::Duration;
    use std::cell::Cell;

    thread_local! {
        static DELAY: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    pub(crate) fn set_delay(milliseconds: u32) {
        DELAY.set(Duration::from_millis(milliseconds.into()));
    }

    pub(crate) fn delay() -> Duration {
        DELAY.get()
    }
}

#[cfg(all(feature = "test-hooks", not(all(test, not(loom)))))]
mod changed {
    use super::Duration;
    use std::sync::atomic::{AtomicU32, Ordering};

    static DELAY_MS: AtomicU32 = AtomicU32::new(0);

    pub(crate) fn set_delay(milliseconds: u32) {
        DELAY_MS.store(milliseconds, Ordering::Relaxed);
    }

    pub(crate) fn delay() -> Duration {
        Duration::from_millis(DELAY_MS.load(Ordering::Relaxed).into())
    }
}

/// Without the feature nothing takes time.
#[cfg(not(any(all(test, not(loom)), feature = "test-hooks")))]
pub(crate) fn delay() -> Duration {
    Duration::ZERO
}

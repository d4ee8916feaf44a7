//! What tests may change: how long an operation takes before it reaches the kernel.

use std::time::Duration;

#[cfg(feature = "test-hooks")]
static DELAY_MS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// For tests: from now on the three control codes (and, overlapped, unknown ones) take so long
/// before they reach the kernel. 0 at the begin.
#[cfg(feature = "test-hooks")]
pub(crate) fn set_delay(milliseconds: u32) {
    DELAY_MS.store(milliseconds, std::sync::atomic::Ordering::Relaxed);
}

#[cfg(feature = "test-hooks")]
pub(crate) fn delay() -> Duration {
    Duration::from_millis(DELAY_MS.load(std::sync::atomic::Ordering::Relaxed).into())
}

/// Without the feature nothing takes time.
#[cfg(not(feature = "test-hooks"))]
pub(crate) fn delay() -> Duration {
    Duration::ZERO
}

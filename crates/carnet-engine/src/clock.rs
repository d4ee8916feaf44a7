//! The clock that the kernel engine uses.

use rustix::time::{ClockId, clock_gettime};

/// Now: nanoseconds of the boot-time clock.
pub(crate) fn boot_time_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

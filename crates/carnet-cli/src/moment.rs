//! The kernel's boot-time clock and the time of day.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// The time of day of a moment that the kernel gave in nanoseconds of the boot-time clock.
pub(crate) fn time_of_day(boottime_ns: u64) -> SystemTime {
    let ago = now().saturating_sub(Duration::from_nanos(boottime_ns));
    SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// How long ago that moment was.
pub(crate) fn age(boottime_ns: u64) -> Duration {
    now().saturating_sub(Duration::from_nanos(boottime_ns))
}

/// RFC 3339, UTC, in milliseconds.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// A duration for people: its largest unit only.
pub(crate) fn short(duration: Duration) -> String {
    match duration.as_secs() {
        0 => format!("{}ms", duration.as_millis()),
        seconds @ 1..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..86400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86400),
    }
}

/// Reads a duration: a number of seconds, or numbers with units.
pub(crate) fn duration(text: &str) -> Result<Duration, humantime::DurationError> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text),
    }
}

fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    // The clock begins at 0 and never goes back.
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_of_seconds_or_have_units() {
        assert_eq!(duration("3"), Ok(Duration::from_secs(3)));
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert!(duration("soon").is_err());
        assert!(duration("-1").is_err());
    }
}

//! The processor time that a load costs: of the client, the relays and the server, and of the
//! kernel's own threads, which free memory later. Unlike connections per second it does not count
//! what others do at the same time, so it also means something on a busy machine.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// In the flags of `/proc/PID/stat`: a thread of the kernel's own.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// Processor time until now, from some begin that is always the same.
#[derive(Clone, Debug)]
pub(crate) struct Used {
    /// Of the processes of a cgroup and those below it.
    cgroup: Duration,
    /// Of this process's threads and of the kernel's, by their names in `/proc`.
    threads: BTreeMap<OsString, Duration>,
}

impl Used {
    /// What the processes of a cgroup and those below it, this process and the kernel's threads
    /// have used.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn now(cgroup: &Path) -> Result<Self> {
        let mut threads = of_threads(Path::new("/proc/self/task"), |_| true)?;
        threads.extend(of_threads(Path::new("/proc"), is_kernel_thread)?);
        Ok(Self { cgroup: of_cgroup(cgroup)?, threads })
    }

    /// What was used since an earlier time. Of a thread that has ended since, that is not known.
    pub(crate) fn since(&self, earlier: &Self) -> Duration {
        let of_thread = |(name, now): (&OsString, &Duration)| {
            now.saturating_sub(earlier.threads.get(name).copied().unwrap_or_default())
        };
        let threads: Duration = self.threads.iter().map(of_thread).sum();
        threads + self.cgroup.saturating_sub(earlier.cgroup)
    }
}

/// What processes of a cgroup have used, those that have ended included.
fn of_cgroup(cgroup: &Path) -> Result<Duration> {
    let path = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let usage = usage.with_context(|| format!("{} has no usage_usec", path.display()))?;
    Ok(Duration::from_micros(usage.parse()?))
}

/// What the threads in a directory have used of whose `stat` a condition holds.
fn of_threads(
    directory: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<BTreeMap<OsString, Duration>> {
    let mut all = BTreeMap::new();
    let listing = || format!("listing {}", directory.display());
    for entry in fs::read_dir(directory).with_context(listing)? {
        let entry = entry?;
        let read = |file| fs::read_to_string(entry.path().join(file));
        // Not a thread, or one that has just ended.
        let (Ok(stat), Ok(times)) = (read("stat"), read("schedstat")) else { continue };
        let used = times.split(' ').next().and_then(|used| used.parse().ok());
        if wanted(&stat)
            && let Some(used) = used
        {
            all.insert(entry.file_name(), Duration::from_nanos(used));
        }
    }
    Ok(all)
}

/// Whether this is the `/proc/PID/stat` of a thread of the kernel's own: the seventh field after
/// the name in parentheses, which may have spaces in it, has the flags.
fn is_kernel_thread(stat: &str) -> bool {
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let flags = after_name.split(' ').nth(6).and_then(|flags| flags.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_the_kernel_are_told_by_their_flags() {
        assert!(is_kernel_thread("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 6 0 0 20 0 1 0 1"));
        assert!(!is_kernel_thread("1 (a) b) S 0 1 1 0 -1 4194560 4216 71 0 0 2 1 0 0 20 0 1 0"));
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(!is_kernel_thread(&own));
        assert!(!is_kernel_thread(""));
    }

    #[test]
    fn work_shows() {
        let used = || of_threads(Path::new("/proc/self/task"), |_| true).unwrap();
        let used = || Used { cgroup: Duration::ZERO, threads: used() };
        let before = used();
        let mut sum = 0_u64;
        for n in 0..20_000_000_u64 {
            sum = std::hint::black_box(sum ^ n);
        }
        let after = used();
        assert!(after.since(&before) > Duration::from_micros(100), "{before:?}, {after:?}");
    }
}

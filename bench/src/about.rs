//! The circumstances of a run, without which its figures mean nothing.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::connect::Plan;

/// The directory of this package when it was built.
pub(crate) const DIRECTORY: &str = env!("CARGO_MANIFEST_DIR");

/// The circumstances of a run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct About {
    /// Date of the run, UTC.
    pub(crate) date: String,
    /// Release of the kernel.
    pub(crate) kernel: String,
    /// Number of processors.
    pub(crate) processors: usize,
    /// Version of Carnet.
    pub(crate) version: &'static str,
    /// Commit of the checkout, with a note if there were changes; unknown outside of a checkout.
    pub(crate) commit: Option<String>,
    /// The compiler.
    pub(crate) toolchain: &'static str,
    /// The load average of the last minute before the run: others' use of the processors.
    pub(crate) load_before: f64,
    /// How often each measurement was repeated.
    pub(crate) repetitions: u32,
    /// The connections of each repetition in the parts hooks and latency.
    pub(crate) connections: u32,
    /// The connections of each repetition in the part services.
    pub(crate) exchanges: u32,
}

impl About {
    /// The circumstances as they are now.
    ///
    /// # Errors
    /// When the system does not tell.
    pub(crate) fn now(plan: &Plan) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let load = read("/proc/loadavg")?;
        Ok(Self {
            date: time.split('T').next().unwrap_or_default().to_owned(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processors: thread::available_parallelism()?.get(),
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            toolchain: env!("TOOLCHAIN"),
            load_before: load.split(' ').next().unwrap_or_default().parse()?,
            repetitions: plan.rounds,
            connections: plan.connections,
            exchanges: plan.exchanges,
        })
    }
}

/// The commit of the checkout in which this program was built.
fn commit() -> Option<String> {
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changes.is_empty() { commit } else { format!("{commit} and changes") })
}

fn git(arguments: &[&str]) -> Option<String> {
    // As root, in a checkout that is somebody else's: git would refuse.
    let mut command = Command::new("git");
    command.args(["-c", "safe.directory=*", "-C", DIRECTORY]).args(arguments);
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

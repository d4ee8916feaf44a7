//! The error of every fixture.

use std::{error::Error as _, fmt, io, path::PathBuf, process::ExitStatus, time::Duration};

use thiserror::Error;

/// Why a fixture could not be made or used.
///
/// `Display` names the operation and what it was done to; the cause is the
/// [source](std::error::Error::source). `Debug` prints the whole chain in words, so that
/// `fixture().unwrap()` in a test reads well.
#[derive(Error)]
#[non_exhaustive]
pub enum Error {
    /// The process lacks privileges without which no fixture works.
    #[error("root is needed here (missing {missing}): run the tests as root, e.g. with sudo -E")]
    NotPrivileged {
        /// The capabilities that are missing, comma-separated.
        missing: String,
    },

    /// A call to the operating system failed.
    #[error("cannot {operation} {subject}")]
    Io {
        /// What was attempted, as a verb phrase.
        operation: &'static str,
        /// The path, link or address that it was attempted on.
        subject: String,
        /// The cause.
        source: io::Error,
    },

    /// No cgroup2 hierarchy is mounted.
    #[error("no cgroup2 mount in /proc/self/mounts: mount one (mount -t cgroup2 none DIRECTORY)")]
    NoCgroup2,

    /// An argument cannot be used.
    #[error("{value:?} is not {expected}")]
    Argument {
        /// What was given.
        value: String,
        /// What is expected in its place.
        expected: &'static str,
    },

    /// The helper binary `testbed-peer` was not found beside the running executable.
    #[error(
        "testbed-peer is in none of {looked_in:?}: build it with `cargo build -p carnet-testbed` \
         (same profile and target directory as this executable)"
    )]
    PeerNotFound {
        /// The directories that were searched.
        looked_in: Vec<PathBuf>,
    },

    /// Ctrl-C or SIGTERM came: [`interrupt`](crate::interrupt).
    #[error("interrupted")]
    Interrupted,

    /// Something awaited did not happen in time.
    #[error("waited {after:?} in vain for {what}")]
    TimedOut {
        /// What was awaited, and what was seen instead.
        what: String,
        /// How long.
        after: Duration,
    },

    /// A child process ended without doing what it was started for.
    #[error("{program} {}before {expected}; its output: {output:?}", ended(*status))]
    ProcessEnded {
        /// The program.
        program: String,
        /// Its status, where it has been collected.
        status: Option<ExitStatus>,
        /// What was expected of it.
        expected: String,
        /// What it printed.
        output: String,
    },
}

/// "ended (exit status: 1) " or "closed its output ".
fn ended(status: Option<ExitStatus>) -> String {
    status.map_or_else(|| "closed its output ".into(), |status| format!("ended ({status}) "))
}

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub(crate) fn io(
        operation: &'static str,
        subject: impl fmt::Display,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, subject: subject.to_string(), source }
    }

    /// An [`Error::Argument`].
    pub(crate) fn argument(value: impl Into<String>, expected: &'static str) -> Self {
        Self::Argument { value: value.into(), expected }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut cause = self.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

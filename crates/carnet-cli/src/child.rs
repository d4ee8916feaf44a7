//! Running a command in the foreground, in a cgroup of its own.
//!
//! The command takes part in the terminal as if it had been started directly: it has this
//! process's streams and process group. Signals that end or concern a command are passed on to it,
//! and this process lives on until the command has ended, to clean up after it.

use std::{
    ffi::OsString,
    future::{poll_fn, ready},
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus},
    task::Poll,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{self, SignalKind},
};

use crate::{console::in_foreground, failure::Failure};

/// The signals that are passed on, and whether a terminal sends them to the command by itself.
const PASSED_ON: [(Signal, bool); 6] = [
    (Signal::HUP, false),
    (Signal::INT, true),
    (Signal::QUIT, true),
    (Signal::TERM, false),
    (Signal::USR1, false),
    (Signal::USR2, false),
];

/// Runs commands, and holds this process's signals meanwhile.
pub(crate) struct Runner {
    runtime: Runtime,
    signals: Signals,
}

struct Signals(Vec<(Signal, bool, unix::Signal)>);

impl Runner {
    /// From here on signals end commands, not this process.
    pub(crate) fn new() -> Result<Self, Failure> {
        let failed = |error| Failure::because("preparing to run a command", &error);
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let _entered = runtime.enter();
        let mut signals = Vec::new();
        for (signal, terminal) in PASSED_ON {
            let kind = SignalKind::from_raw(signal.as_raw());
            signals.push((signal, terminal, unix::signal(kind).map_err(failed)?));
        }
        drop(_entered);
        Ok(Self { runtime, signals: Signals(signals) })
    }

    /// Runs a command to its end, and returns the status with which to exit: its own, or 128 and
    /// the number of the signal that ended it.
    pub(crate) fn run(&mut self, command: Command) -> Result<u8, Failure> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error| {
            let failure = Failure::because(format_args!("running {program}"), &error);
            failure.with_hint("the command comes after --, as to a shell that knows no aliases")
        };
        self.runtime.block_on(async {
            if let Some(signal) = self.signals.pending().await {
                return Ok(status_of_signal(signal.as_raw()));
            }
            let mut child = tokio::process::Command::from(command).spawn().map_err(failed)?;
            loop {
                tokio::select! {
                    status = child.wait() => return Ok(exit_status(status.map_err(failed)?)),
                    (signal, terminal) = self.signals.next() => {
                        if !(terminal && in_foreground()) {
                            pass_on(signal, child.id());
                        }
                    }
                }
            }
        })
    }
}

impl Signals {
    async fn next(&mut self) -> (Signal, bool) {
        poll_fn(|context| {
            for (signal, terminal, stream) in &mut self.0 {
                if stream.poll_recv(context).is_ready() {
                    return Poll::Ready((*signal, *terminal));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// A signal that has come already.
    async fn pending(&mut self) -> Option<Signal> {
        tokio::select! {
            biased;
            (signal, _) = self.next() => Some(signal),
            () = ready(()) => None,
        }
    }
}

fn pass_on(signal: Signal, child: Option<u32>) {
    let pid = child.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It fails if the command has just ended, and then there is nothing to do.
        let _ = kill_process(pid, signal);
    }
}

fn exit_status(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(u8::MAX),
        (None, Some(signal)) => status_of_signal(signal),
        (None, None) => u8::MAX,
    }
}

fn status_of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// A command of its words, the first of which is the program.
pub(crate) fn command(words: &[OsString]) -> Command {
    let (program, arguments) = words.split_first().expect("clap requires a word");
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        command(&["sh".into(), "-c".into(), script.into()])
    }

    #[test]
    fn the_status_of_a_command_is_passed_on() {
        let mut runner = Runner::new().unwrap();
        for (script, status) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
            assert_eq!(runner.run(shell(script)).unwrap(), status, "{script}");
        }
    }

    #[test]
    fn a_command_that_does_not_exist_is_an_error() {
        let failure = Runner::new().unwrap().run(command(&["/nonexistent".into()])).unwrap_err();
        assert!(failure.message().starts_with("running /nonexistent: "), "{failure:?}");
    }
}

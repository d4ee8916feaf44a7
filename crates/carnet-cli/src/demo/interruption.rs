//! Ctrl-C and its like: the demonstration ends early, and cleans up all the same.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    thread,
};

use rustix::process::Signal;
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

use crate::failure::Failure;

/// Signals that ask the demonstration to end, kept from ending the process on the spot.
pub(super) struct Interruption(Arc<State>);

#[derive(Default)]
struct State {
    /// The signal that came, 0 for none.
    signal: AtomicI32,
    /// File that kills every process of the demonstration when "1" is written to it.
    kill_switch: Mutex<Option<PathBuf>>,
}

impl Interruption {
    /// From here on signals are noted.
    pub(super) fn await_signals() -> Result<Self, Failure> {
        let failed = |error| Failure::because("watching for signals", &error);
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let state = Arc::new(State::default());
        let noted = Arc::clone(&state);
        let (mut hangup, mut interrupt, mut quit, mut terminate) = {
            let _entered = runtime.enter();
            (
                signal(SignalKind::hangup()).map_err(failed)?,
                signal(SignalKind::interrupt()).map_err(failed)?,
                signal(SignalKind::quit()).map_err(failed)?,
                signal(SignalKind::terminate()).map_err(failed)?,
            )
        };
        // The thread lives as long as the process: signals stay caught while it cleans up.
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                runtime.block_on(async {
                    loop {
                        let signal = tokio::select! {
                            _ = hangup.recv() => Signal::HUP,
                            _ = interrupt.recv() => Signal::INT,
                            _ = quit.recv() => Signal::QUIT,
                            _ = terminate.recv() => Signal::TERM,
                        };
                        noted.signal.store(signal.as_raw(), Ordering::SeqCst);
                        noted.kill();
                    }
                });
            })
            .map_err(failed)?;
        Ok(Self(state))
    }

    /// Makes a signal kill what runs in this cgroup, so that nobody waits for it.
    pub(super) fn kills(&self, cgroup: &carnet_testbed::Cgroup) {
        let mut switch = self.0.kill_switch.lock().unwrap_or_else(PoisonError::into_inner);
        *switch = Some(cgroup.path().join("cgroup.kill"));
    }

    /// The number of the signal that came.
    pub(super) fn signal(&self) -> Option<i32> {
        match self.0.signal.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal),
        }
    }

    /// Fails if a signal came.
    pub(super) fn check(&self) -> Result<(), Failure> {
        self.signal().map_or(Ok(()), |_| Err(Failure::new("interrupted")))
    }
}

impl State {
    fn kill(&self) {
        let switch = self.kill_switch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(switch) = &*switch {
            // Where there is no such file (before Linux 5.14, or all is gone already) the waiting
            // has ends of its own.
            let _ = fs::write(switch, "1");
        }
    }
}

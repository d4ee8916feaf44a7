//! The thread that carries out pending operations. It is there from the first one to the last
//! `WSACleanup`.
//!
//! One is enough: what it does for an operation is a single `getsockopt` or `setsockopt`, which no
//! peer can delay.

use crate::contract::Failure;
use crate::hooks;
use crate::operation::Operation;
use crate::sync::{Condvar, Mutex, lock, wait};
use crate::sys;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    /// What is to be done, from when on, in the order of submission.
    due: BTreeMap<(Instant, u64), Arc<Operation>>,
    submitted: u64,
    /// The thread that works. One that finds itself to be another ends.
    worker: Option<JoinHandle<()>>,
    generation: u64,
}

#[derive(Debug)]
pub(crate) struct Executor {
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Executor {
    fn default() -> Self {
        Self { state: Mutex::new(State::default()), changed: Condvar::new() }
    }
}

impl Executor {
    /// Starts the thread if there is none.
    pub(crate) fn ensure_running(&'static self) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        if state.worker.is_none() {
            let generation = state.generation;
            let worker = std::thread::Builder::new()
                .name("carnet-winsock".into())
                .stack_size(128 * 1024)
                .spawn(move || self.work(generation))
                .map_err(|_| Failure::NoBuffers)?;
            state.worker = Some(worker);
        }
        Ok(())
    }

    /// Has an operation carried out; false if the thread has been stopped.
    pub(crate) fn submit(&self, operation: Arc<Operation>) -> bool {
        let due = Instant::now() + hooks::delay();
        let mut state = lock(&self.state);
        if state.worker.is_none() {
            return false;
        }
        let number = state.submitted;
        state.submitted += 1;
        state.due.insert((due, number), operation);
        self.changed.notify_all();
        true
    }

    /// Ends the thread; operations that are still to be done are left to be cancelled.
    pub(crate) fn stop(&self) {
        let worker = {
            let mut state = lock(&self.state);
            state.generation += 1;
            state.due.clear();
            self.changed.notify_all();
            state.worker.take()
        };
        if let Some(worker) = worker {
            let _ = worker.join();
        }
    }

    fn work(&self, generation: u64) {
        sys::block_signals();
        let mut state = lock(&self.state);
        while state.generation == generation {
            let now = Instant::now();
            // A cancelled one need not be waited for.
            state.due.retain(|_, operation| operation.is_pending());
            match state.due.first_entry() {
                Some(entry) if entry.key().0 <= now => {
                    let operation = entry.remove();
                    drop(state);
                    operation.carry_out();
                    drop(operation);
                    state = lock(&self.state);
                }
                Some(entry) => {
                    let left = entry.key().0 - now;
                    let (guard, _) = self
                        .changed
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner);
                    state = guard;
                }
                None => state = wait(&self.changed, state),
            }
        }
    }
}

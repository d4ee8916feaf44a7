//! The thread that carries out pending operations. It is there from the first one to the last
//! `WSACleanup`.
//!
//! One is enough: what it does for a control code is a single `getsockopt` or `setsockopt`, and for
//! a message a `recvmsg` or `sendmsg` when the socket is ready, none of which a peer can delay.

use crate::contract::Failure;
use crate::hooks;
use crate::operation::Operation;
use crate::poller::Poller;
use crate::process::process;
use crate::sync::{Mutex, lock};
use crate::sys;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    /// What is to be done, from when on, in the order of submission.
    due: BTreeMap<(Instant, u64), Arc<Operation>>,
    submitted: u64,
    worker: Option<Worker>,
    /// A thread that finds another one here ends.
    generation: u64,
}

/// The thread that works, and what it waits with.
#[derive(Debug)]
struct Worker {
    thread: JoinHandle<()>,
    poller: Arc<Poller>,
}

#[derive(Debug)]
pub(crate) struct Executor(Mutex<State>);

impl Default for Executor {
    fn default() -> Self {
        Self(Mutex::new(State::default()))
    }
}

impl Executor {
    /// Starts the thread if there is none. Gives what it waits with.
    pub(crate) fn ensure_running(&'static self) -> Result<Arc<Poller>, Failure> {
        let mut state = lock(&self.0);
        if let Some(worker) = &state.worker {
            return Ok(worker.poller.clone());
        }
        let poller = Arc::new(Poller::new().map_err(|_| Failure::NoBuffers)?);
        let (generation, own) = (state.generation, poller.clone());
        let thread = std::thread::Builder::new()
            .name("carnet-winsock".into())
            .stack_size(128 * 1024)
            .spawn(move || self.work(generation, &own))
            .map_err(|_| Failure::NoBuffers)?;
        state.worker = Some(Worker { thread, poller: poller.clone() });
        Ok(poller)
    }

    /// Has an operation carried out; false if the thread has been stopped.
    pub(crate) fn submit(&self, operation: Arc<Operation>) -> bool {
        let due = Instant::now() + hooks::delay();
        let mut state = lock(&self.0);
        let Some(worker) = &state.worker else {
            return false;
        };
        worker.poller.wake();
        let number = state.submitted;
        state.submitted += 1;
        state.due.insert((due, number), operation);
        true
    }

    /// Whether there is a thread that waits with this.
    pub(crate) fn waits_with(&self, poller: &Arc<Poller>) -> bool {
        lock(&self.0).worker.as_ref().is_some_and(|worker| Arc::ptr_eq(&worker.poller, poller))
    }

    /// Ends the thread; operations that are still to be done are left to be cancelled.
    pub(crate) fn stop(&self) {
        let worker = {
            let mut state = lock(&self.0);
            state.generation += 1;
            state.due.clear();
            state.worker.take()
        };
        if let Some(worker) = worker {
            worker.poller.wake();
            let _ = worker.thread.join();
        }
    }

    fn work(&self, generation: u64, poller: &Poller) {
        sys::block_signals();
        loop {
            let mut state = lock(&self.0);
            if state.generation != generation {
                return;
            }
            // A cancelled one need not be waited for.
            state.due.retain(|_, operation| operation.is_pending());
            let now = Instant::now();
            let due = state.due.first_entry().filter(|entry| entry.key().0 <= now);
            let operation = due.map(|entry| entry.remove());
            let next = state.due.first_key_value().map(|((due, _), _)| *due);
            drop(state);
            if let Some(operation) = operation {
                operation.carry_out();
            }
            let longest = next.map(|next| next.saturating_duration_since(Instant::now()));
            poller.wait(longest, |fd| process().pending.serve(fd));
        }
    }
}

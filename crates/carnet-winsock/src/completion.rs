//! The core of overlapped operation: who may complete an operation, in which order its result
//! becomes visible, and the queue of completion routines of a thread.
//!
//! Nothing here knows sockets, descriptors or the caller's memory, so that loom can explore every
//! interleaving of it: `cargo xtask winsock --check`.

use crate::sync::{Condvar, Mutex, Ordering, fence, lock, wait};
use std::collections::VecDeque;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Pending,
    /// It is being tried; this may come to nothing.
    Trying,
    /// Somebody has claimed it and is delivering the result.
    Delivering,
    /// The result is where the caller looks for it.
    Done,
}

/// The right to complete an operation, which is given out once: to whoever carried it out, or to
/// whoever cancels it, whichever comes first (contract S28, S29).
#[derive(Debug)]
pub(crate) struct Completion {
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl Completion {
    pub(crate) fn new() -> Self {
        Self { phase: Mutex::new(Phase::Pending), changed: Condvar::new() }
    }

    /// True for the one caller that is to deliver the result. It must call [`finish`](Self::finish)
    /// when the result is visible. Waits for the end of a try, which is short.
    pub(crate) fn claim(&self) -> bool {
        let mut phase = lock(&self.phase);
        while *phase == Phase::Trying {
            phase = wait(&self.changed, phase);
        }
        let first = *phase == Phase::Pending;
        if first {
            *phase = Phase::Delivering;
        }
        first
    }

    /// Tries what touches the caller's memory and cannot be undone: nobody can cancel meanwhile and
    /// make the caller believe that its memory is free. A try with a result is a
    /// [`claim`](Self::claim); after one without, the operation pends as before. One thread alone
    /// does this. `Err` if it no longer pends.
    pub(crate) fn attempt<R>(
        &self,
        attempt: impl FnOnce() -> Option<R>,
    ) -> Result<Option<R>, NotPending> {
        {
            let mut phase = lock(&self.phase);
            if *phase != Phase::Pending {
                return Err(NotPending);
            }
            *phase = Phase::Trying;
        }
        let result = attempt();
        let next = if result.is_some() { Phase::Delivering } else { Phase::Pending };
        *lock(&self.phase) = next;
        self.changed.notify_all();
        Ok(result)
    }

    /// Says that the result is visible.
    pub(crate) fn finish(&self) {
        *lock(&self.phase) = Phase::Done;
        self.changed.notify_all();
    }

    /// Waits until the result is visible.
    pub(crate) fn wait(&self) {
        let mut phase = lock(&self.phase);
        while *phase != Phase::Done {
            phase = wait(&self.changed, phase);
        }
    }

    pub(crate) fn is_pending(&self) -> bool {
        matches!(*lock(&self.phase), Phase::Pending | Phase::Trying)
    }
}

/// The operation has been completed, or is being so.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotPending;

/// The fields of a caller's `WSAOVERLAPPED` that an operation writes.
pub(crate) trait Fields {
    type Fault;
    /// `InternalHigh` (bytes), `Offset` (flags) and `OffsetHigh` (Winsock error).
    fn store_result(&self, bytes: u32, error: i32) -> Result<(), Self::Fault>;
    /// `Internal`.
    fn store_status(&self, status: u32) -> Result<(), Self::Fault>;
}

/// Makes a result visible: whoever sees the status sees the rest too (contract W47).
pub(crate) fn publish<F: Fields>(
    fields: &F,
    status: u32,
    bytes: u32,
    error: i32,
) -> Result<(), F::Fault> {
    fields.store_result(bytes, error)?;
    fence(Ordering::Release);
    fields.store_status(status)
}

/// What a waiting thread waits for.
pub(crate) trait Signal {
    fn raise(&self);
    fn lower(&self);
}

/// The thread has exited: nothing can be queued to it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Exited;

#[derive(Debug)]
struct Queued<A> {
    calls: VecDeque<A>,
    exited: bool,
}

/// The calls that a thread is to make in its next alertable wait (contract W9, W45). Its signal is
/// raised as long as there are any.
#[derive(Debug)]
pub(crate) struct ApcQueue<A, S> {
    queued: Mutex<Queued<A>>,
    signal: S,
}

impl<A, S: Signal> ApcQueue<A, S> {
    pub(crate) fn new(signal: S) -> Self {
        let queued = Queued { calls: VecDeque::new(), exited: false };
        Self { queued: Mutex::new(queued), signal }
    }

    pub(crate) fn signal(&self) -> &S {
        &self.signal
    }

    /// Queues a call. Any thread may.
    pub(crate) fn push(&self, call: A) -> Result<(), Exited> {
        let mut queued = lock(&self.queued);
        if queued.exited {
            return Err(Exited);
        }
        queued.calls.push_back(call);
        if queued.calls.len() == 1 {
            self.signal.raise();
        }
        Ok(())
    }

    /// The oldest call. Only the queue's thread asks.
    pub(crate) fn pop(&self) -> Option<A> {
        let mut queued = lock(&self.queued);
        let call = queued.calls.pop_front();
        if call.is_some() && queued.calls.is_empty() {
            self.signal.lower();
        }
        call
    }

    /// Drops what is queued and refuses what is to come: the thread is exiting.
    pub(crate) fn close(&self) {
        let mut queued = lock(&self.queued);
        queued.exited = true;
        queued.calls.clear();
        self.signal.lower();
    }

    pub(crate) fn has_exited(&self) -> bool {
        lock(&self.queued).exited
    }
}

#[cfg(all(test, loom))]
#[expect(unsafe_code, reason = "loom's cell, which says whether an access excludes all others")]
mod model {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU32, AtomicUsize};
    use loom::thread;
    use std::convert::Infallible;

    /// A caller's overlapped structure: plain stores, as the kernel makes them for us.
    struct Overlapped {
        status: AtomicU32,
        bytes: AtomicU32,
    }

    impl Fields for Overlapped {
        type Fault = Infallible;
        fn store_result(&self, bytes: u32, _error: i32) -> Result<(), Infallible> {
            self.bytes.store(bytes, Ordering::Relaxed);
            Ok(())
        }
        fn store_status(&self, status: u32) -> Result<(), Infallible> {
            self.status.store(status, Ordering::Relaxed);
            Ok(())
        }
    }

    const PENDING: u32 = 0x103;

    impl Overlapped {
        fn new() -> Self {
            Self { status: AtomicU32::new(PENDING), bytes: AtomicU32::new(0) }
        }
    }

    /// A signal that can be waited for, level-triggered as an eventfd is.
    #[derive(Debug)]
    struct Level {
        raised: Mutex<bool>,
        changed: Condvar,
    }

    impl Level {
        fn new() -> Self {
            Self { raised: Mutex::new(false), changed: Condvar::new() }
        }
        fn wait(&self) {
            let mut raised = lock(&self.raised);
            while !*raised {
                raised = wait(&self.changed, raised);
            }
        }
    }

    impl Signal for Level {
        fn raise(&self) {
            *lock(&self.raised) = true;
            self.changed.notify_all();
        }
        fn lower(&self) {
            *lock(&self.raised) = false;
        }
    }

    #[test]
    fn of_completer_and_two_cancellers_one_delivers() {
        loom::model(|| {
            let operation = Arc::new(Completion::new());
            let delivered = Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (operation, delivered) = (operation.clone(), delivered.clone());
                    thread::spawn(move || {
                        if operation.claim() {
                            delivered.fetch_add(1, Ordering::Relaxed);
                            operation.finish();
                        }
                    })
                })
                .collect();
            if operation.claim() {
                delivered.fetch_add(1, Ordering::Relaxed);
                operation.finish();
            }
            operation.wait();
            assert_eq!(delivered.load(Ordering::Relaxed), 1);
            assert!(!operation.is_pending());
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    /// The caller's buffer is written by tries, and given back with the result: whoever is told has
    /// it alone. Each of two tries may come to nothing.
    #[test]
    fn a_try_and_a_cancellation_exclude_one_another() {
        for successful in 0..3 {
            loom::model(move || {
                let shared = Arc::new((Completion::new(), UnsafeCell::new(0), AtomicUsize::new(0)));
                let worker = {
                    let shared = shared.clone();
                    thread::spawn(move || {
                        let (operation, buffer, delivered) = &*shared;
                        for number in 0..2 {
                            let tried = operation.attempt(|| {
                                // SAFETY: loom fails the test if anybody else has it.
                                buffer.with_mut(|buffer| unsafe { *buffer = number });
                                (number == successful).then_some(())
                            });
                            match tried {
                                Ok(None) => {}
                                Ok(Some(())) => {
                                    delivered.fetch_add(1, Ordering::Relaxed);
                                    operation.finish();
                                    return;
                                }
                                Err(NotPending) => return,
                            }
                        }
                    })
                };
                let (operation, buffer, delivered) = &*shared;
                let cancelled = operation.claim();
                if cancelled {
                    delivered.fetch_add(1, Ordering::Relaxed);
                    operation.finish();
                }
                assert!(cancelled || successful < 2, "nothing else would complete it");
                operation.wait();
                // SAFETY: as above: the caller has its buffer back.
                buffer.with_mut(|buffer| unsafe { *buffer = 7 });
                assert_eq!(delivered.load(Ordering::Relaxed), 1);
                worker.join().unwrap();
            });
        }
    }

    #[test]
    fn whoever_sees_the_status_sees_the_byte_count() {
        loom::model(|| {
            let overlapped = Arc::new(Overlapped::new());
            let writer = {
                let overlapped = overlapped.clone();
                thread::spawn(move || publish(&*overlapped, 0, 920, 0).unwrap())
            };
            if overlapped.status.load(Ordering::Acquire) != PENDING {
                assert_eq!(overlapped.bytes.load(Ordering::Relaxed), 920);
            }
            writer.join().unwrap();
        });
    }

    #[test]
    fn a_waiter_sees_the_result_of_whoever_finished() {
        loom::model(|| {
            let operation = Arc::new((Completion::new(), Overlapped::new()));
            let completer = {
                let operation = operation.clone();
                thread::spawn(move || {
                    if operation.0.claim() {
                        publish(&operation.1, 0, 920, 0).unwrap();
                        operation.0.finish();
                    }
                })
            };
            operation.0.wait();
            assert_eq!(operation.1.status.load(Ordering::Relaxed), 0);
            assert_eq!(operation.1.bytes.load(Ordering::Relaxed), 920);
            completer.join().unwrap();
        });
    }

    #[test]
    fn no_queued_call_is_slept_through() {
        for calls in 1..=2 {
            loom::model(move || {
                let queue = Arc::new(ApcQueue::new(Level::new()));
                let threads: Vec<_> = (0..calls)
                    .map(|call| {
                        let queue = queue.clone();
                        thread::spawn(move || queue.push(call).unwrap())
                    })
                    .collect();
                let mut seen = Vec::new();
                while seen.len() < calls {
                    queue.signal().wait();
                    seen.extend(std::iter::from_fn(|| queue.pop()));
                }
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..calls));
                assert!(!*lock(&queue.signal().raised), "the signal stays raised");
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            });
        }
    }

    /// A call is either queued before the exit, and dropped with it, or refused: it never stays.
    #[test]
    fn nothing_stays_queued_to_a_thread_that_exits() {
        loom::model(|| {
            let queue = Arc::new(ApcQueue::new(Level::new()));
            let call = Arc::new(());
            let pusher = {
                let (queue, call) = (queue.clone(), call.clone());
                thread::spawn(move || {
                    let _ = queue.push(call);
                })
            };
            queue.close();
            pusher.join().unwrap();
            assert!(queue.has_exited());
            assert!(queue.pop().is_none());
            assert_eq!(Arc::strong_count(&call), 1, "a dropped call is gone");
            assert!(!*lock(&queue.signal().raised));
        });
    }

    /// Cancelled by the exit of the thread that began it, while it is being completed with a call
    /// queued to that very thread: one result, and at most one call.
    #[test]
    fn exit_of_the_issuing_thread_against_completion() {
        loom::model(|| {
            let shared =
                Arc::new((Completion::new(), Overlapped::new(), ApcQueue::new(Level::new())));
            let completer = {
                let shared = shared.clone();
                thread::spawn(move || {
                    let (operation, overlapped, queue) = &*shared;
                    if operation.claim() {
                        publish(overlapped, 0, 920, 0).unwrap();
                        operation.finish();
                        let _ = queue.push(());
                    }
                })
            };
            let (operation, overlapped, queue) = &*shared;
            queue.close();
            if operation.claim() {
                publish(overlapped, 0xC000_0120, 0, 995).unwrap();
                operation.finish();
            }
            completer.join().unwrap();
            let status = overlapped.status.load(Ordering::Relaxed);
            let bytes = overlapped.bytes.load(Ordering::Relaxed);
            assert!(matches!((status, bytes), (0, 920) | (0xC000_0120, 0)));
            assert!(queue.pop().is_none());
        });
    }
}

//! What there is once in each thread: its last error, its queue of completion routines, and what it
//! is in the middle of.
#![expect(unsafe_code, reason = "completion routines are functions of the caller's")]

use crate::completion::ApcQueue;
use crate::contract::wsa;
use crate::events::Event;
use crate::memory::CallerPtr;
use crate::operation;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The calls that wait for a thread.
pub(crate) type Queue = ApcQueue<Apc, Event>;

/// `LPWSAOVERLAPPED_COMPLETION_ROUTINE` (contract W8).
pub(crate) type CompletionRoutine = unsafe extern "C" fn(u32, u32, *mut std::ffi::c_void, u32);
/// `LPWSAUSERAPC` (contract W45).
pub(crate) type UserApc = unsafe extern "C" fn(usize);

/// A function of the caller's, to be called in one thread.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Apc {
    Completion { routine: CompletionRoutine, error: u32, bytes: u32, overlapped: CallerPtr },
    User { function: UserApc, context: usize },
}

impl Apc {
    fn call(self) {
        match self {
            Self::Completion { routine, error, bytes, overlapped } => {
                let overlapped = std::ptr::with_exposed_provenance_mut(overlapped.address());
                // SAFETY: the caller gave the routine to be called in this way, in this thread,
                // with the overlapped structure that it gave along.
                unsafe { routine(error, bytes, overlapped, 0) };
            }
            // SAFETY: the caller gave the function to be called with this value, in this thread.
            Self::User { function, context } => unsafe { function(context) },
        }
    }
}

struct State {
    /// Tells the thread from every other one that there was or will be.
    number: u64,
    /// Made when somebody first wants to queue something to this thread or wait for it.
    queue: RefCell<Option<Arc<Queue>>>,
    /// A completion routine is running.
    in_callback: Cell<bool>,
    /// A call that may block is in progress.
    blocking: Cell<bool>,
}

impl State {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            queue: RefCell::new(None),
            in_callback: Cell::new(false),
            blocking: Cell::new(false),
        }
    }

    fn queue(&self) -> Result<Arc<Queue>, i32> {
        let mut queue = self.queue.borrow_mut();
        if let Some(queue) = &*queue {
            return Ok(queue.clone());
        }
        let event = Event::new().map_err(|_| wsa::ENOBUFS)?;
        Ok(queue.insert(Arc::new(ApcQueue::new(event))).clone())
    }
}

impl Drop for State {
    /// The thread exits: its operations are cancelled, its routines will not run (contract S29c,
    /// W10).
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.close();
        }
        operation::cancel_of_thread(self.number);
    }
}

thread_local! {
    static LAST_ERROR: Cell<i32> = const { Cell::new(0) };
    static THREAD: State = State::new();
}

pub(crate) fn last_error() -> i32 {
    LAST_ERROR.get()
}

pub(crate) fn set_last_error(error: i32) {
    LAST_ERROR.set(error);
}

/// Zero for a thread so near its end that it has no state any more.
pub(crate) fn number() -> u64 {
    THREAD.try_with(|thread| thread.number).unwrap_or(0)
}

/// The queue of the calling thread.
pub(crate) fn queue() -> Result<Arc<Queue>, i32> {
    THREAD.try_with(State::queue).unwrap_or(Err(wsa::EFAULT))
}

pub(crate) fn in_callback() -> bool {
    THREAD.try_with(|thread| thread.in_callback.get()).unwrap_or(false)
}

/// Makes the calls that are queued, and those that are queued meanwhile; says whether there were
/// any. None while one is running: a routine is not entered again (contract W9).
pub(crate) fn run_queued() -> bool {
    let Ok(Some(queue)) = THREAD.try_with(|thread| {
        (!thread.in_callback.get()).then(|| thread.queue.borrow().clone()).flatten()
    }) else {
        return false;
    };
    let mut any = false;
    while let Some(apc) = queue.pop() {
        any = true;
        let _ = THREAD.try_with(|thread| thread.in_callback.set(true));
        apc.call();
        let _ = THREAD.try_with(|thread| thread.in_callback.set(false));
    }
    any
}

/// Notes that a call that may block is in progress, until it is dropped.
#[derive(Debug)]
pub(crate) struct BlockingCall(());

impl BlockingCall {
    /// None if one is in progress: a signal handler's call, then (contract S32).
    pub(crate) fn begin() -> Option<Self> {
        let free = THREAD.try_with(|thread| !thread.blocking.replace(true)).unwrap_or(true);
        free.then_some(Self(()))
    }
}

impl Drop for BlockingCall {
    fn drop(&mut self) {
        let _ = THREAD.try_with(|thread| thread.blocking.set(false));
    }
}

/// In the child of a fork: forgets the queue of the parent's thread, and frees nothing of it.
pub(crate) fn begin_anew() {
    let _ = THREAD.try_with(|thread| std::mem::forget(thread.queue.take()));
}

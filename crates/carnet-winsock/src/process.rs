//! What there is once in a process: sockets, events, threads, pending operations.
//!
//! **Fork.** The child begins anew: the events, threads and pending operations of its parent are
//! not there, since the thread that would complete them is not. It knows its parent's sockets with
//! their attributes, and stays initialised. The child's state is made before the fork, so that the
//! child takes no lock and frees nothing that another thread of the parent may have held.
#![expect(unsafe_code, reason = "the current state is behind an atomic pointer")]

use crate::events::Event;
use crate::executor::Executor;
use crate::operation::Pending;
use crate::sockets::Sockets;
use crate::sync::{Mutex, lock};
use crate::thread::{self, Queue};
use crate::{sys, wait::Blocking};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

/// Values that name objects to the caller. They are looked up, never followed, and never used
/// again.
#[derive(Debug)]
pub(crate) struct Handles<T>(Mutex<BTreeMap<usize, Arc<T>>>);

impl<T> Handles<T> {
    fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    pub(crate) fn open(&self, object: Arc<T>) -> usize {
        let handle = next_handle();
        lock(&self.0).insert(handle, object);
        handle
    }

    pub(crate) fn get(&self, handle: usize) -> Option<Arc<T>> {
        lock(&self.0).get(&handle).cloned()
    }

    pub(crate) fn close(&self, handle: usize) -> bool {
        lock(&self.0).remove(&handle).is_some()
    }
}

/// Like Windows' handles a multiple of four: callers use the lowest bit (contract W37).
fn next_handle() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
    NEXT.fetch_add(4, Ordering::Relaxed)
}

/// The state of a process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Calls of `WSAStartup` without their `WSACleanup`.
    pub(crate) startups: AtomicU32,
    /// `SIO_FLUSH` is refused, as Microsoft's own provider does (X2).
    pub(crate) strict_msafd: bool,
    pub(crate) sockets: Sockets,
    pub(crate) events: Handles<Event>,
    pub(crate) threads: Handles<Queue>,
    pub(crate) pending: Pending,
    pub(crate) executor: Executor,
    pub(crate) blocking: Blocking,
    /// The parent's. Not used, but what it owns is not leaked either, so it is kept in reach.
    _parent: Option<&'static Self>,
}

impl Process {
    fn new(parent: Option<&'static Self>) -> Self {
        Self {
            startups: AtomicU32::new(parent.map_or(0, |p| p.startups.load(Ordering::Relaxed))),
            strict_msafd: parent.map_or_else(asks_for_strict_msafd, |p| p.strict_msafd),
            sockets: parent.map_or_else(Sockets::default, |p| p.sockets.copy()),
            events: Handles::new(),
            threads: Handles::new(),
            pending: Pending::default(),
            executor: Executor::default(),
            blocking: Blocking::default(),
            _parent: parent,
        }
    }

    pub(crate) fn is_started(&self) -> bool {
        self.startups.load(Ordering::Relaxed) > 0
    }
}

fn asks_for_strict_msafd() -> bool {
    std::env::var_os("CARNET_WINSOCK_STRICT_MSAFD").is_some_and(|value| value == "1")
}

static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

thread_local! {
    /// What the thread's next child is to have.
    static OF_CHILD: Cell<Option<Box<Process>>> = const { Cell::new(None) };
}

/// The state of this process.
pub(crate) fn process() -> &'static Process {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        make_current(Box::new(Process::new(None)));
        sys::at_fork(before_fork, in_parent, in_child);
    });
    // SAFETY: only `make_current` stores, and never takes back what it stored.
    unsafe { &*CURRENT.load(Ordering::Acquire) }
}

fn make_current(process: Box<Process>) {
    CURRENT.store(Box::leak(process), Ordering::Release);
}

extern "C" fn before_fork() {
    let child = Box::new(Process::new(Some(process())));
    OF_CHILD.with(|of_child| of_child.set(Some(child)));
}

extern "C" fn in_parent() {
    OF_CHILD.with(Cell::take);
}

extern "C" fn in_child() {
    if let Some(child) = OF_CHILD.with(Cell::take) {
        make_current(child);
    }
    thread::begin_anew();
}

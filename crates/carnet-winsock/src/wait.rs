//! Waiting: for events, for completion routines, for time to pass (contract W9, W49, X10).

use crate::contract::{status, wsa};
use crate::events::Event;
use crate::memory::{CallerPtr, Fault, Overlapped};
use crate::process::process;
use crate::sync::{Mutex, lock};
use crate::sys::{self, pollfd};
use crate::thread::{self, BlockingCall};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `WSA_MAXIMUM_WAIT_EVENTS`.
const MOST: u32 = 64;
/// `WSA_WAIT_IO_COMPLETION`.
pub(crate) const IO_COMPLETION: u32 = 0xC0;
/// `WSA_WAIT_TIMEOUT`.
const TIMED_OUT: u32 = 258;

/// None for `WSA_INFINITE`.
fn deadline(milliseconds: u32) -> Option<Instant> {
    (milliseconds != u32::MAX)
        .then(|| Instant::now() + Duration::from_millis(u64::from(milliseconds)))
}

fn readable(fd: i32) -> pollfd {
    pollfd { fd, events: libc::POLLIN, revents: 0 }
}

/// Polls, over signals; false when the deadline has passed.
fn poll_until(entries: &mut [pollfd], deadline: Option<Instant>) -> Result<bool, i32> {
    loop {
        match sys::poll(entries, deadline) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(libc::EINTR) => {}
            Err(_) => return Err(wsa::ENOBUFS),
        }
    }
}

/// `SleepEx`: 0, or [`IO_COMPLETION`] when routines were run.
pub(crate) fn sleep(milliseconds: u32, alertable: bool) -> u32 {
    let deadline = deadline(milliseconds);
    let queue = if alertable && !thread::in_callback() { thread::queue().ok() } else { None };
    loop {
        if queue.is_some() && thread::run_queued() {
            return IO_COMPLETION;
        }
        let mut entries: Vec<_> =
            queue.iter().map(|queue| readable(queue.signal().descriptor())).collect();
        match poll_until(&mut entries, deadline) {
            Ok(true) => {}
            Ok(false) | Err(_) => return 0,
        }
    }
}

/// `WSAWaitForMultipleEvents`.
pub(crate) fn wait_for_events(
    count: u32,
    handles: CallerPtr,
    all: bool,
    milliseconds: u32,
    alertable: bool,
) -> Result<u32, i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let deadline = deadline(milliseconds);
    if count == 0 || count > MOST {
        return Err(wsa::INVALID_PARAMETER);
    }
    let events = events(count as usize, handles, all)?;
    let queue = if alertable && !thread::in_callback() { Some(thread::queue()?) } else { None };
    let mut entries: Vec<_> = events.iter().map(|event| readable(event.descriptor())).collect();
    loop {
        // Events first, then routines.
        sys::poll(&mut entries, Some(Instant::now())).map_err(|_| wsa::ENOBUFS)?;
        let signalled = |entry: &pollfd| entry.revents != 0;
        let found = if all {
            entries.iter().all(signalled).then_some(0)
        } else {
            entries.iter().position(signalled)
        };
        if let Some(index) = found {
            events.iter().for_each(|event| event.acquire());
            return Ok(index as u32);
        }
        if queue.is_some() && thread::run_queued() {
            return Ok(IO_COMPLETION);
        }
        // Of all only those are waited for that are missing, or this would not wait.
        let mut missing: Vec<_> = entries
            .iter()
            .filter(|entry| !signalled(entry))
            .map(|entry| readable(entry.fd))
            .collect();
        missing.extend(queue.iter().map(|queue| readable(queue.signal().descriptor())));
        if !poll_until(&mut missing, deadline)? {
            return Ok(TIMED_OUT);
        }
    }
}

fn events(count: usize, handles: CallerPtr, all: bool) -> Result<Vec<Arc<Event>>, i32> {
    let size = size_of::<usize>();
    let values = handles.read_vec(count * size).map_err(|Fault| wsa::EFAULT)?;
    let handles: Vec<usize> = values
        .chunks_exact(size)
        .filter_map(|bytes| bytes.try_into().ok().map(usize::from_ne_bytes))
        .collect();
    // One that is named twice cannot be waited for twice at once, says Windows.
    if all && handles.iter().collect::<HashSet<_>>().len() != count {
        return Err(wsa::INVALID_PARAMETER);
    }
    handles.iter().map(|&handle| process().events.get(handle).ok_or(wsa::INVALID_HANDLE)).collect()
}

/// `WSAGetOverlappedResult`: the bytes and the flags (contract W39..W43).
pub(crate) fn overlapped_result(
    handle: usize,
    overlapped: CallerPtr,
    wait: bool,
) -> Result<(u32, u32), i32> {
    let fault = |Fault| wsa::EFAULT;
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let socket = process().sockets.find(handle)?;
    let fields = Overlapped(overlapped);
    let mut status = fields.status().map_err(fault)?;
    if status == status::PENDING && wait {
        let event = fields.event().map_err(fault)? & !1;
        if event == 0 {
            // Nothing to wait for but the operation.
            match process().pending.with_overlapped(socket, overlapped) {
                Some(operation) => operation.wait(),
                // Unless it has completed since.
                None if fields.status().map_err(fault)? == status::PENDING => {
                    return Err(wsa::INVALID_HANDLE);
                }
                None => {}
            }
        } else {
            let event = process().events.get(event).ok_or(wsa::INVALID_HANDLE)?;
            // Routines stay queued (W40).
            poll_until(&mut [readable(event.descriptor())], None)?;
            event.acquire();
        }
        status = fields.status().map_err(fault)?;
        // The event decides, not the status (W41).
        if status == status::PENDING {
            status = status::SUCCESS;
        }
    }
    match crate::contract::error_of_status(status) {
        0 => Ok((fields.bytes().map_err(fault)?, fields.flags().map_err(fault)?)),
        error => Err(error),
    }
}

/// The calls that wait and can be interrupted.
#[derive(Debug, Default)]
pub(crate) struct Blocking(Mutex<Vec<Arc<Event>>>);

impl Blocking {
    pub(crate) fn any(&self) -> bool {
        !lock(&self.0).is_empty()
    }

    /// Interrupts all of them; false if there are none.
    pub(crate) fn cancel(&self) -> bool {
        let calls = lock(&self.0);
        calls.iter().for_each(|call| call.set());
        !calls.is_empty()
    }
}

/// One of them, until it is dropped.
#[derive(Debug)]
struct Interruptible(Arc<Event>);

impl Interruptible {
    fn begin() -> Result<Self, i32> {
        let event = Arc::new(Event::new().map_err(|_| wsa::ENOBUFS)?);
        lock(&process().blocking.0).push(event.clone());
        Ok(Self(event))
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        lock(&process().blocking.0).retain(|call| !Arc::ptr_eq(call, &self.0));
    }
}

/// Waits until something happens to one of the entries; false when the deadline has passed.
///
/// # Errors
/// `WSAEINTR` for `WSACancelBlockingCall` and for a signal, after which no wait is restarted.
pub(crate) fn interruptible(
    entries: &mut Vec<pollfd>,
    deadline: Option<Instant>,
) -> Result<bool, i32> {
    let call = Interruptible::begin()?;
    entries.push(readable(call.0.descriptor()));
    let waited = sys::poll(entries, deadline);
    let raised = entries.pop().is_some_and(|entry| entry.revents != 0);
    match waited {
        Ok(_) if raised => Err(wsa::EINTR),
        Ok(ready) => Ok(ready > 0),
        Err(libc::EINTR) => Err(wsa::EINTR),
        Err(_) => Err(wsa::ENOBUFS),
    }
}

/// Begins a call that may block, so long before it reaches the kernel (contract S20, S32, S33); it
/// is over when what this returns is dropped.
///
/// # Errors
/// `WSAEINPROGRESS` if this thread is in another blocking call, or in a completion routine on a
/// blocking socket; `WSAEWOULDBLOCK` if it would have to wait and must not; `WSAEINTR` if it was
/// interrupted.
pub(crate) fn blocking_call(
    time: Duration,
    may_block: impl Fn() -> bool,
) -> Result<BlockingCall, i32> {
    if thread::in_callback() && may_block() {
        return Err(wsa::EINPROGRESS);
    }
    let call = BlockingCall::begin().ok_or(wsa::EINPROGRESS)?;
    if time.is_zero() {
        return Ok(call);
    }
    if !may_block() {
        return Err(wsa::EWOULDBLOCK);
    }
    interruptible(&mut Vec::new(), Some(Instant::now() + time))?;
    Ok(call)
}

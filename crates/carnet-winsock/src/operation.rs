//! Overlapped operations: from their begin to the delivery of their result, which happens exactly
//! once however many try (contract W3..W11, S28, S29).

use crate::completion::{Completion, publish};
use crate::contract::{Failure, error_of_status, status};
use crate::control::{self, Answer, Request};
use crate::events::Event;
use crate::memory::{CallerPtr, Fault, Overlapped};
use crate::process::process;
use crate::sockets::Socket;
use crate::sync::{Mutex, lock};
use crate::sys;
use crate::thread::{self, Apc, CompletionRoutine, Queue};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// Who is told that an operation has completed; never both (contract W7).
#[derive(Debug)]
pub(crate) enum Notification {
    /// The event of the overlapped structure, if it has a valid one.
    Event(Option<Arc<Event>>),
    /// A routine, in a thread's next alertable wait.
    Routine { routine: CompletionRoutine, queue: Arc<Queue> },
}

impl Notification {
    /// The event is reset when an operation begins.
    fn begin(&self) {
        if let Self::Event(Some(event)) = self {
            event.reset();
        }
    }

    fn deliver(&self, overlapped: Overlapped, status: u32, bytes: u32) {
        match self {
            Self::Event(event) => event.iter().for_each(|event| event.set()),
            Self::Routine { routine, queue } => {
                let error = error_of_status(status).cast_unsigned();
                let (routine, overlapped) = (*routine, overlapped.0);
                // A thread that has exited calls nothing any more (contract S29c).
                let _ = queue.push(Apc::Completion { routine, error, bytes, overlapped });
            }
        }
    }
}

/// The result of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answered(Answer),
    Failed(Failure),
    Cancelled,
}

/// Writes the result to where the caller looks for it.
fn deliver(
    overlapped: Overlapped,
    notification: &Notification,
    outcome: &Outcome,
    before_notification: impl FnOnce(),
) {
    let (status, bytes) = match outcome {
        Outcome::Answered(answer) => match answer.store() {
            Ok(bytes) => (status::SUCCESS, bytes),
            // The memory has gone since the begin of the operation.
            Err(Fault) => (status::ACCESS_VIOLATION, 0),
        },
        Outcome::Failed(failure) => (failure.status(), 0),
        Outcome::Cancelled => (status::CANCELLED, 0),
    };
    // There is nobody to tell if this memory has gone too.
    let _ = publish(&overlapped, status, bytes, error_of_status(status));
    before_notification();
    notification.deliver(overlapped, status, bytes);
}

/// Delivers a result that was there at once: the completion comes all the same (contract W3).
pub(crate) fn complete_at_once(
    overlapped: Overlapped,
    notification: &Notification,
    answer: Answer,
) {
    notification.begin();
    deliver(overlapped, notification, &Outcome::Answered(answer), || ());
}

/// An operation that pends.
#[derive(Debug)]
pub(crate) struct Operation {
    completion: Completion,
    socket: Socket,
    /// The socket itself, however its descriptor may be reused; given back with the result, so that
    /// a closed socket is closed.
    descriptor: Mutex<Option<Arc<OwnedFd>>>,
    /// The thread that began it.
    issuer: u64,
    overlapped: Overlapped,
    notification: Notification,
    request: Request,
}

impl Operation {
    pub(crate) fn is_pending(&self) -> bool {
        self.completion.is_pending()
    }

    /// Waits until the result is where the caller looks for it.
    pub(crate) fn wait(&self) {
        self.completion.wait();
    }

    /// Carries it out, if nobody has cancelled it.
    pub(crate) fn carry_out(&self) {
        let Some(descriptor) = lock(&self.descriptor).clone() else {
            return;
        };
        // Closed without closesocket: nobody wants the answer (contract S29a).
        let outcome = if sys::cookie(self.socket.fd) != Ok(self.socket.cookie) {
            Outcome::Cancelled
        } else {
            match control::perform(descriptor.as_raw_fd(), &self.request) {
                Ok(answer) => Outcome::Answered(answer),
                Err(failure) => Outcome::Failed(failure),
            }
        };
        drop(descriptor);
        self.complete(&outcome);
    }

    /// False if it was complete already.
    pub(crate) fn cancel(&self) -> bool {
        self.complete(&Outcome::Cancelled)
    }

    fn complete(&self, outcome: &Outcome) -> bool {
        if !self.completion.claim() {
            return false;
        }
        lock(&self.descriptor).take();
        // Nothing of the caller's is touched after it was told, since it may be gone then.
        deliver(self.overlapped, &self.notification, outcome, || {
            process().pending.remove(self);
            self.completion.finish();
        });
        true
    }
}

/// The operations that pend, by socket.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<BTreeMap<(RawFd, u64), OfSocket>>);

#[derive(Debug)]
struct OfSocket {
    /// One for all of the socket's operations.
    descriptor: Arc<OwnedFd>,
    operations: Vec<Arc<Operation>>,
}

impl Pending {
    /// Begins an operation. Nothing has been touched if this fails (contract W5).
    pub(crate) fn begin(
        &self,
        socket: Socket,
        overlapped: Overlapped,
        notification: Notification,
        request: Request,
    ) -> Result<(), Failure> {
        let executor = &process().executor;
        executor.ensure_running()?;
        let operation = {
            let mut pending = lock(&self.0);
            let of_socket = match pending.entry((socket.fd, socket.cookie)) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let descriptor = sys::duplicate(socket.fd).map_err(|errno| match errno {
                        libc::EBADF => Failure::NotASocket,
                        _ => Failure::NoBuffers,
                    })?;
                    let descriptor = Arc::new(descriptor);
                    entry.insert(OfSocket { descriptor, operations: Vec::new() })
                }
            };
            let operation = Arc::new(Operation {
                completion: Completion::new(),
                socket,
                descriptor: Mutex::new(Some(of_socket.descriptor.clone())),
                issuer: thread::number(),
                overlapped,
                notification,
                request,
            });
            // Both before anybody can complete it.
            let marked = overlapped.begin();
            if marked.is_ok() {
                operation.notification.begin();
                of_socket.operations.push(operation.clone());
            } else if of_socket.operations.is_empty() {
                pending.remove(&(socket.fd, socket.cookie));
            }
            marked.map_err(|Fault| Failure::Fault)?;
            operation
        };
        // The last WSACleanup may be under way in another thread.
        if !executor.submit(operation.clone()) {
            operation.cancel();
        }
        Ok(())
    }

    fn remove(&self, operation: &Operation) {
        let key = (operation.socket.fd, operation.socket.cookie);
        let mut pending = lock(&self.0);
        if let Some(of_socket) = pending.get_mut(&key) {
            of_socket.operations.retain(|other| !std::ptr::eq(&raw const **other, operation));
            if of_socket.operations.is_empty() {
                pending.remove(&key);
            }
        }
    }

    /// The operations of a socket.
    pub(crate) fn of_socket(&self, socket: Socket) -> Vec<Arc<Operation>> {
        let pending = lock(&self.0);
        pending.get(&(socket.fd, socket.cookie)).map_or_else(Vec::new, |of| of.operations.clone())
    }

    fn all(&self) -> Vec<Arc<Operation>> {
        lock(&self.0).values().flat_map(|of| of.operations.iter().cloned()).collect()
    }

    /// The operation that will complete this structure.
    pub(crate) fn with_overlapped(
        &self,
        socket: Socket,
        overlapped: CallerPtr,
    ) -> Option<Arc<Operation>> {
        self.of_socket(socket).into_iter().find(|operation| operation.overlapped.0 == overlapped)
    }
}

/// Cancels those of the operations that this says; whether there were any.
pub(crate) fn cancel_where(
    operations: Vec<Arc<Operation>>,
    which: impl Fn(&Operation) -> bool,
) -> bool {
    operations.iter().filter(|op| which(op)).fold(false, |any, op| op.cancel() | any)
}

/// All of a socket: it is being closed or flushed (contract S29a, S29b).
pub(crate) fn cancel_of_socket(socket: Socket) -> bool {
    cancel_where(process().pending.of_socket(socket), |_| true)
}

/// Those of a socket that the calling thread began (`CancelIo`).
pub(crate) fn cancel_own(socket: Socket) -> bool {
    let own = thread::number();
    cancel_where(process().pending.of_socket(socket), |operation| operation.issuer == own)
}

/// The one with this structure (`CancelIoEx`).
pub(crate) fn cancel_one(socket: Socket, overlapped: CallerPtr) -> bool {
    cancel_where(process().pending.of_socket(socket), |op| op.overlapped.0 == overlapped)
}

/// All that a thread began: it exits (contract S29c, W10).
pub(crate) fn cancel_of_thread(number: u64) {
    cancel_where(process().pending.all(), |operation| operation.issuer == number);
}

/// All of them: the last `WSACleanup`.
pub(crate) fn cancel_all() {
    cancel_where(process().pending.all(), |_| true);
}

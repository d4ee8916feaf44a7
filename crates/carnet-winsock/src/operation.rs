//! Overlapped operations: from their begin to the delivery of their result, which happens exactly
//! once however many try (contract W3..W11, S28, S29).

use crate::completion::{Completion, NotPending, publish};
use crate::contract::{Failure, error_of_status, status, status_of_error};
use crate::control::{self, Answer, Request};
use crate::events::Event;
use crate::memory::{CallerPtr, Fault, Overlapped};
use crate::message::{Lane, Received, Transfer};
use crate::poller::Watched;
use crate::process::process;
use crate::sockets::Socket;
use crate::sync::{Mutex, lock};
use crate::sys;
use crate::thread::{self, Apc, CompletionRoutine, Queue};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::RawFd;
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
    Received(Received),
    Sent(u32),
    Failed(Failure),
    /// A message could not be received or sent, for this Winsock error.
    NotTransferred(i32),
    Cancelled,
}

impl Outcome {
    /// Writes what belongs to the result to the caller's memory: status, bytes, Winsock error.
    fn store(&self) -> (u32, u32, i32) {
        let stored = match self {
            Self::Answered(answer) => answer.store().map(|bytes| (status::SUCCESS, bytes)),
            Self::Received(received) => received.store().map(|()| received.status()),
            Self::Sent(bytes) => Ok((status::SUCCESS, *bytes)),
            Self::Failed(failure) => Ok((failure.status(), 0)),
            // Many of these have no status of their own (W43): the code itself is kept too (W47).
            Self::NotTransferred(error) => return (status_of_error(*error), 0, *error),
            Self::Cancelled => Ok((status::CANCELLED, 0)),
        };
        // A fault: the memory has gone since the begin of the operation.
        let (status, bytes) = stored.unwrap_or((status::ACCESS_VIOLATION, 0));
        (status, bytes, error_of_status(status))
    }
}

/// Writes the result to where the caller looks for it.
fn deliver(
    overlapped: Overlapped,
    notification: &Notification,
    outcome: &Outcome,
    before_notification: impl FnOnce(),
) {
    let (status, bytes, error) = outcome.store();
    // There is nobody to tell if this memory has gone too.
    let _ = publish(&overlapped, status, bytes, error);
    before_notification();
    notification.deliver(overlapped, status, bytes);
}

/// Delivers a result that was there at once: the completion comes all the same (contract W3).
pub(crate) fn complete_at_once(
    overlapped: Overlapped,
    notification: &Notification,
    outcome: &Outcome,
) {
    notification.begin();
    deliver(overlapped, notification, outcome, || ());
}

/// What there is to do.
#[derive(Debug)]
pub(crate) enum Work {
    /// A control code, carried out by the executor when its turn comes.
    Control(Request),
    /// A message, received or sent when the socket is ready for it.
    Transfer(Transfer),
}

/// An operation that pends.
#[derive(Debug)]
pub(crate) struct Operation {
    completion: Completion,
    socket: Socket,
    /// The socket itself, however its descriptor may be reused; given back with the result, so that
    /// a closed socket is closed.
    descriptor: Mutex<Option<Arc<Watched>>>,
    /// The thread that began it.
    issuer: u64,
    overlapped: Overlapped,
    notification: Notification,
    work: Work,
}

impl Operation {
    pub(crate) fn is_pending(&self) -> bool {
        self.completion.is_pending()
    }

    /// Waits until the result is where the caller looks for it.
    pub(crate) fn wait(&self) {
        self.completion.wait();
    }

    /// Carries out a control code, if nobody has cancelled it.
    pub(crate) fn carry_out(&self) {
        let Work::Control(request) = &self.work else {
            return;
        };
        let Some(descriptor) = lock(&self.descriptor).clone() else {
            return;
        };
        let outcome = match self.current_socket() {
            None => Outcome::Cancelled,
            Some(_) => match control::perform(descriptor.descriptor(), request) {
                Ok(answer) => Outcome::Answered(answer),
                Err(failure) => Outcome::Failed(failure),
            },
        };
        drop(descriptor);
        self.complete(&outcome);
    }

    /// The socket with the attributes that it has by now; none if it was closed without
    /// closesocket: then nobody wants the answer (contract S29a).
    fn current_socket(&self) -> Option<Socket> {
        let current = process().sockets.find(self.socket.fd as usize).ok()?;
        (current.cookie == self.socket.cookie).then_some(current)
    }

    /// In which of the socket's queues it waits for the socket to be ready; none for a control code.
    fn lane(&self) -> Option<Lane> {
        match &self.work {
            Work::Control(_) => None,
            Work::Transfer(transfer) => Some(transfer.lane()),
        }
    }

    /// Receives or sends its message, if nobody has cancelled it; false if the socket is not ready.
    fn try_transfer(&self, transfer: &Transfer) -> bool {
        let tried = self.completion.attempt(|| {
            let Some(socket) = self.current_socket() else {
                return Some(Outcome::Cancelled);
            };
            // It is there: whoever takes it has to claim the operation first. Ours alone it must
            // not become, or a socket that is closed now would be so only when this returns.
            let descriptor = lock(&self.descriptor).as_ref().map(|watched| watched.descriptor())?;
            transfer.attempt(descriptor, socket)
        });
        match tried {
            Ok(Some(outcome)) => {
                self.complete_claimed(&outcome);
                true
            }
            Ok(None) => false,
            Err(NotPending) => true,
        }
    }

    /// False if it was complete already.
    pub(crate) fn cancel(&self) -> bool {
        self.complete(&Outcome::Cancelled)
    }

    fn complete(&self, outcome: &Outcome) -> bool {
        if !self.completion.claim() {
            return false;
        }
        self.complete_claimed(outcome);
        true
    }

    fn complete_claimed(&self, outcome: &Outcome) {
        lock(&self.descriptor).take();
        // Nothing of the caller's is touched after it was told, since it may be gone then.
        deliver(self.overlapped, &self.notification, outcome, || {
            process().pending.remove(self);
            self.completion.finish();
        });
    }
}

/// The operations that pend, by socket.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<BTreeMap<(RawFd, u64), OfSocket>>);

#[derive(Debug)]
struct OfSocket {
    /// One for all of the socket's operations.
    descriptor: Arc<Watched>,
    operations: Vec<Arc<Operation>>,
}

impl Pending {
    /// Begins an operation. Nothing has been touched if this fails (contract W5).
    pub(crate) fn begin(
        &self,
        socket: Socket,
        overlapped: Overlapped,
        notification: Notification,
        work: Work,
    ) -> Result<(), Failure> {
        let executor = &process().executor;
        let poller = executor.ensure_running()?;
        let operation = {
            let mut pending = lock(&self.0);
            let of_socket = match pending.entry((socket.fd, socket.cookie)) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let descriptor = sys::duplicate(socket.fd).map_err(|errno| match errno {
                        libc::EBADF => Failure::NotASocket,
                        _ => Failure::NoBuffers,
                    })?;
                    let descriptor = Arc::new(Watched::new(descriptor));
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
                work,
            });
            // All before anybody can complete it: what is ready by now is said at once, but nobody
            // looks here for what to do about it before the operation is there.
            let watched = operation.lane().map_or(Ok(()), |lane| {
                of_socket.descriptor.watch(&poller, socket.fd, lane.events())
            });
            let marked = watched
                .map_err(|_| Failure::NoBuffers)
                .and_then(|()| overlapped.begin().map_err(|Fault| Failure::Fault));
            if marked.is_ok() {
                operation.notification.begin();
                of_socket.operations.push(operation.clone());
            } else if of_socket.operations.is_empty() {
                pending.remove(&(socket.fd, socket.cookie));
            }
            marked?;
            operation
        };
        let taken = match operation.lane() {
            None => executor.submit(operation.clone()),
            Some(_) => executor.waits_with(&poller),
        };
        // The last WSACleanup may be under way in another thread.
        if !taken {
            operation.cancel();
        }
        Ok(())
    }

    /// Whether anything waits in this queue of a socket: what comes later has to wait too.
    pub(crate) fn any_in(&self, socket: Socket, lane: Lane) -> bool {
        let pending = lock(&self.0);
        let of_socket = pending.get(&(socket.fd, socket.cookie));
        of_socket.is_some_and(|of| of.operations.iter().any(|op| op.lane() == Some(lane)))
    }

    /// Receives and sends what can be on a socket that has become ready, in the order in which it
    /// was begun.
    pub(crate) fn serve(&self, fd: RawFd) {
        let sockets: Vec<_> = {
            let pending = lock(&self.0);
            let with_descriptor = pending.range((fd, 0)..=(fd, u64::MAX));
            with_descriptor.map(|(_, of_socket)| of_socket.operations.clone()).collect()
        };
        for operations in sockets {
            let mut blocked = Vec::new();
            for operation in operations {
                if let Work::Transfer(transfer) = &operation.work
                    && !blocked.contains(&transfer.lane())
                    && !operation.try_transfer(transfer)
                {
                    blocked.push(transfer.lane());
                }
            }
        }
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

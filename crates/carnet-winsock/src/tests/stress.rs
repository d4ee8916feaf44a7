//! Many operations, many threads, and everything that cancels, at random: each operation completes
//! exactly once, with the right status.

use super::*;
use crate::hooks::set_delay;
use std::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

const THREADS: u64 = 8;
const SOCKETS: usize = 100;
const OPERATIONS: usize = 10_000;

/// xorshift64*: the same sequence in every run.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) % limit
    }
}

/// A socket, and how often anything on it was cancelled.
struct Slot {
    socket: Owned,
    cancels: u64,
}

/// An operation that was begun.
struct Begun {
    operation: Box<Operation>,
    /// Kept until the end: a second completion would set it.
    event: Option<OwnedEvent>,
    slot: usize,
    /// What had been cancelled there before.
    cancels: u64,
    /// What it says when nobody cancels it.
    expected: usize,
}

fn read(slot: &RwLock<Slot>) -> RwLockReadGuard<'_, Slot> {
    slot.read().expect("no thread of this test panics")
}

fn write(slot: &RwLock<Slot>) -> RwLockWriteGuard<'_, Slot> {
    slot.write().expect("no thread of this test panics")
}

/// What is written over the status of a complete operation, to see whether it is completed again.
const SEEN: usize = 0x5EE2;

#[derive(Default)]
struct Tally {
    completed: usize,
    cancelled: usize,
}

impl Tally {
    /// True if it is complete; then it is counted.
    fn take(&mut self, begun: &Begun, slots: &[RwLock<Slot>]) -> bool {
        let status = begun.operation.status();
        let by_routine = begun.event.is_none();
        if status == PENDING || (by_routine && begun.operation.calls() == 0) {
            return false;
        }
        if let Some(event) = &begun.event {
            assert_eq!(event.wait(u32::MAX), 0, "the status is there, and the event set");
            WSAResetEvent(event.0);
        } else {
            let error = if status == CANCELLED {
                995
            } else if begun.expected == NO_ENGINE {
                10050
            } else {
                10045
            };
            assert_eq!(begun.operation.routine_error(), error);
            assert_eq!(begun.operation.routine_thread.load(Ordering::Relaxed), thread_id());
        }
        if status == CANCELLED {
            let now = read(&slots[begun.slot]).cancels;
            assert!(now > begun.cancels, "cancelled by nobody");
            self.cancelled += 1;
        } else {
            assert_eq!(status, begun.expected);
            self.completed += 1;
        }
        assert_eq!(begun.operation.bytes.load(Ordering::Relaxed), 0);
        begun.operation.status.store(SEEN, Ordering::Relaxed);
        true
    }
}

fn begin(random: &mut Random, slots: &[RwLock<Slot>]) -> Begun {
    let by_routine = random.below(2) == 0;
    let event = (!by_routine).then(OwnedEvent::new);
    let operation = event.as_ref().map_or_else(Operation::new, Operation::with_event);
    let index = random.below(slots.len() as u64) as usize;
    let slot = read(&slots[index]);
    set_delay(1 + random.below(4) as u32);
    let (code, expected) = match random.below(4) {
        0 => (QUERY_CONTEXT, NO_ENGINE),
        1 => (SET_RECORDS, NO_ENGINE),
        2 => (UNKNOWN, 0xC000_00BB),
        _ => (QUERY_RECORDS, NO_ENGINE),
    };
    let call = Arguments::new(&slot.socket, code).input(&[1; 64]).overlapped(&operation);
    let call = if by_routine { call.routine() } else { call };
    assert_eq!(call.begin(), (997, UNTOUCHED));
    let cancels = slot.cancels;
    drop(slot);
    Begun { operation, event, slot: index, cancels, expected }
}

/// Cancels something, or not.
fn disturb(random: &mut Random, slots: &[RwLock<Slot>], last: &Begun) {
    let index = random.below(slots.len() as u64) as usize;
    match random.below(40) {
        0 => {
            let mut slot = write(&slots[index]);
            slot.cancels += 1;
            slot.socket = Owned::overlapped();
        }
        1 => {
            let mut slot = write(&slots[index]);
            slot.cancels += 1;
            assert_eq!(Arguments::new(&slot.socket, FLUSH).begin(), (0, 0));
        }
        2 => {
            let mut slot = write(&slots[index]);
            slot.cancels += 1;
            assert_eq!(CancelIo(slot.socket.0 as *mut c_void), 1);
        }
        3..6 => {
            let mut slot = write(&slots[last.slot]);
            slot.cancels += 1;
            CancelIoEx(slot.socket.0 as *mut c_void, last.operation.pointer());
        }
        _ => {}
    }
}

#[test]
fn every_operation_completes_exactly_once() {
    let new_slot = |_| RwLock::new(Slot { socket: Owned::overlapped(), cancels: 0 });
    let slots: Vec<_> = (0..SOCKETS).map(new_slot).collect();
    let totals = Mutex::new(Tally::default());
    thread::scope(|scope| {
        for seed in 1..=THREADS {
            let (slots, totals) = (&slots, &totals);
            scope.spawn(move || {
                let mut random = Random(seed);
                let mut tally = Tally::default();
                let (mut pending, mut complete) = (Vec::new(), Vec::new());
                for _ in 0..OPERATIONS / THREADS as usize {
                    pending.push(begin(&mut random, slots));
                    disturb(&mut random, slots, &pending[pending.len() - 1]);
                    if random.below(8) == 0 || pending.len() > 50 {
                        SleepEx(random.below(3) as u32, 1);
                        let done = pending.extract_if(.., |begun| tally.take(begun, slots));
                        complete.extend(done);
                    }
                }
                while !pending.is_empty() {
                    SleepEx(1, 1);
                    let done = pending.extract_if(.., |begun| tally.take(begun, slots));
                    complete.extend(done);
                }
                for begun in &complete {
                    assert_eq!(begun.operation.status(), SEEN, "completed twice");
                    let calls = u32::from(begun.event.is_none());
                    assert_eq!(begun.operation.calls(), calls);
                    assert!(begun.event.as_ref().is_none_or(|event| event.wait(0) == 258));
                }
                let mut totals = totals.lock().unwrap();
                totals.completed += tally.completed;
                totals.cancelled += tally.cancelled;
            });
        }
    });
    let totals = totals.into_inner().unwrap();
    assert_eq!(totals.completed + totals.cancelled, OPERATIONS);
    assert!(totals.completed > 0 && totals.cancelled > 0, "both happen");
    println!("{} completed, {} cancelled", totals.completed, totals.cancelled);
}

/// Threads that begin an operation and exit at once, while it is being completed.
#[test]
fn exits_of_threads_against_completions() {
    let socket = Owned::overlapped();
    for round in 0..500_u32 {
        let (by_event, by_routine) = (Operation::new(), Operation::new());
        let event = OwnedEvent::new();
        by_event.event.store(event.0.expose_provenance(), Ordering::Relaxed);
        thread::scope(|scope| {
            scope.spawn(|| {
                set_delay(round % 2);
                let query = Arguments::new(&socket, QUERY_RECORDS);
                assert_eq!(query.overlapped(&by_event).begin().0, 997);
                assert_eq!(query.overlapped(&by_routine).routine().begin().0, 997);
            });
        });
        assert_eq!(event.wait(u32::MAX), 0);
        for operation in [&by_event, &by_routine] {
            while operation.status() == PENDING {
                thread::yield_now();
            }
            assert!(matches!(operation.status(), CANCELLED | NO_ENGINE));
            assert_eq!(operation.calls(), 0);
        }
    }
}

//! Overlapped operation: at once or later, who is told, cancellation.

use super::*;
use crate::hooks::set_delay;
use std::sync::mpsc;
use std::thread;

/// Longer than any test; nobody waits for it.
const LONG: u32 = 3_600_000;

/// Begins a query that stays until it is cancelled.
fn begin_long(socket: &Owned, operation: &Operation, routine: bool) {
    set_delay(LONG);
    let call = Arguments::new(socket, QUERY_RECORDS).overlapped(operation);
    let call = if routine { call.routine() } else { call };
    assert_eq!(call.begin(), (997, UNTOUCHED), "W4");
    set_delay(0);
}

#[test]
fn a_query_pends_and_completes_by_event() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    WSASetEvent(event.0);
    set_delay(50);
    let mut buffer = [7; 64];
    let query = Arguments::new(&socket, QUERY_RECORDS).output(&mut buffer).overlapped(&operation);
    assert_eq!(query.begin(), (997, UNTOUCHED));
    assert_eq!(event.wait(0), 258, "W7: reset");
    assert_eq!(operation.result(&socket, false), Err(996), "W39");
    assert_eq!(event.wait(u32::MAX), 0);
    assert_eq!(operation.status(), NO_ENGINE);
    assert_eq!(operation.error.load(Ordering::Relaxed), 10050, "W47");
    assert_eq!(operation.result(&socket, false), Err(10050));
    assert_eq!(buffer, [7; 64]);
    set_delay(0);
}

#[test]
fn a_query_completes_by_routine_in_the_thread_that_began_it() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    let query = Arguments::new(&socket, QUERY_CONTEXT).overlapped(&operation).routine();
    assert_eq!(query.begin(), (997, UNTOUCHED));
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    assert_eq!((operation.calls(), operation.routine_error()), (1, 10050));
    assert_eq!(operation.routine_thread.load(Ordering::Relaxed), thread_id());
    assert_eq!(event.wait(0), 258, "W7: the event is free");
    assert_eq!(SleepEx(0, 1), 0);
    // Any value will do for the event then.
    operation.event.store(0x1236, Ordering::Relaxed);
    assert_eq!(query.begin().0, 997);
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    assert_eq!(operation.calls(), 2);
}

#[test]
fn the_result_call_waits() {
    let socket = Owned::overlapped();
    set_delay(50);
    let event = OwnedEvent::new();
    for operation in [Operation::with_event(&event), Operation::new()] {
        let query = Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation);
        assert_eq!(query.begin().0, 997);
        assert_eq!(operation.result(&socket, true), Err(10050), "with an event and without");
    }
    set_delay(0);
    // The event decides (W41), a bad one is said so (W42).
    let operation = Operation::with_event(&event);
    operation.status.store(PENDING, Ordering::Relaxed);
    operation.bytes.store(5, Ordering::Relaxed);
    WSASetEvent(event.0);
    assert_eq!(operation.result(&socket, true), Ok(5));
    for bad in [0, 0x1236] {
        operation.event.store(bad, Ordering::Relaxed);
        assert_eq!(operation.result(&socket, true), Err(6));
    }
}

#[test]
fn an_unknown_code_pends_and_completes_with_not_supported() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    assert_eq!(Arguments::new(&socket, UNKNOWN).overlapped(&operation).begin(), (997, UNTOUCHED));
    assert_eq!(event.wait(u32::MAX), 0);
    assert_eq!(operation.status(), 0xC000_00BB, "W17");
    let operation = Operation::new();
    let call = Arguments::new(&socket, UNKNOWN).overlapped(&operation).routine();
    assert_eq!(call.begin(), (997, UNTOUCHED));
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    assert_eq!((operation.calls(), operation.routine_error()), (1, 10045), "W18");
}

#[test]
fn set_fails_at_once_and_pends_when_it_takes_time() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    let set = Arguments::new(&socket, SET_RECORDS).input(&[1; 100]).overlapped(&operation);
    assert_eq!(set.begin(), (10050, UNTOUCHED));
    assert!(operation.untouched(), "W5");
    assert_eq!(event.wait(0), 258);
    set_delay(1);
    assert_eq!(set.begin(), (997, UNTOUCHED), "S13");
    assert_eq!(event.wait(u32::MAX), 0);
    assert_eq!(operation.status(), NO_ENGINE);
    set_delay(0);
}

#[test]
fn what_is_done_at_once_is_completed_all_the_same() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let keepalive = [0_u8; 12];
    let on = [1, 0, 0, 0];
    for (code, input, count) in
        [(0x8004_667E, &on[..], 0), (0x9800_0004, &keepalive[..], UNTOUCHED), (FLUSH, &[], 0)]
    {
        let call = Arguments::new(&socket, code).input(input);
        let operation = Operation::with_event(&event);
        WSAResetEvent(event.0);
        operation.status.store(77, Ordering::Relaxed);
        assert_eq!(call.overlapped(&operation).begin(), (0, count), "W20 {code:#x}");
        assert_eq!((operation.status(), event.wait(0)), (0, 0), "W3");
        assert_eq!(operation.result(&socket, false), Ok(0));

        let operation = Operation::new();
        assert_eq!(call.overlapped(&operation).routine().begin(), (0, count));
        assert_eq!(operation.calls(), 0, "W9");
        assert_eq!(SleepEx(0, 1), 0xC0, "W21");
        assert_eq!((operation.calls(), operation.routine_error()), (1, 0));
        assert_eq!(SleepEx(0, 1), 0);
    }
}

#[test]
fn without_the_attribute_nothing_is_overlapped() {
    let socket = Owned::plain();
    let operation = Operation::new();
    let query = Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation).routine();
    assert_eq!(query.both(), (10050, 0));
    assert!(operation.untouched(), "S16");
    assert_eq!(SleepEx(0, 1), 0, "S22");
}

/// A way to cancel: its name, and what it does.
type Cancel = (&'static str, fn(&Owned, &Operation));

#[test]
fn closing_flushing_and_cancelling() {
    let event = OwnedEvent::new();
    let cancels: [Cancel; 5] = [
        ("closesocket", |socket, _| assert_eq!(closesocket(socket.0), 0)),
        ("SIO_FLUSH", |socket, _| assert_eq!(Arguments::new(socket, FLUSH).begin(), (0, 0))),
        ("CancelIo", |socket, _| assert_eq!(CancelIo(socket.0 as *mut c_void), 1)),
        ("CancelIoEx", |socket, operation| {
            assert_eq!(CancelIoEx(socket.0 as *mut c_void, operation.pointer()), 1);
        }),
        ("CancelIoEx, all", |socket, _| {
            assert_eq!(CancelIoEx(socket.0 as *mut c_void, null_mut()), 1);
        }),
    ];
    for (name, cancel) in cancels {
        let (socket, other) = (Owned::overlapped(), Owned::overlapped());
        let (by_event, by_routine) = (Operation::with_event(&event), Operation::new());
        let of_other = Operation::new();
        begin_long(&other, &of_other, false);
        begin_long(&socket, &by_event, false);
        cancel(&socket, &by_event);
        assert_eq!((by_event.status(), event.wait(0)), (CANCELLED, 0), "{name}");
        if name != "closesocket" {
            assert_eq!(by_event.result(&socket, false), Err(995), "{name}");
            begin_long(&socket, &by_routine, true);
            cancel(&socket, &by_routine);
            assert_eq!(SleepEx(u32::MAX, 1), 0xC0, "{name}");
            assert_eq!((by_routine.calls(), by_routine.routine_error()), (1, 995), "{name}");
            assert_eq!(CancelIoEx(socket.0 as *mut c_void, null_mut()), 0);
            assert_eq!(WSAGetLastError(), 1168);
        }
        assert_eq!(of_other.status(), PENDING, "{name}: the other socket's");
        if name == "closesocket" {
            // Its number may be another test's by now, so it is not closed once more.
            std::mem::forget(socket);
        }
        drop(other);
        assert_eq!(of_other.status(), CANCELLED);
    }
}

#[test]
fn one_is_cancelled_and_the_other_stays() {
    let socket = Owned::overlapped();
    let (first, second) = (Operation::new(), Operation::new());
    begin_long(&socket, &first, false);
    begin_long(&socket, &second, false);
    assert_eq!(CancelIoEx(socket.0 as *mut c_void, second.pointer()), 1);
    assert_eq!((first.status(), second.status()), (PENDING, CANCELLED));
    // CancelIo is for what this thread began.
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(CancelIo(socket.0 as *mut c_void), 1));
    });
    assert_eq!(first.status(), PENDING);
    assert_eq!(CancelIo(socket.0 as *mut c_void), 1);
    assert_eq!(first.status(), CANCELLED);
}

#[test]
fn the_exit_of_a_thread_cancels_what_it_began() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let (by_event, by_routine) = (Operation::with_event(&event), Operation::new());
    let own = Operation::new();
    begin_long(&socket, &own, false);
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            begin_long(&socket, &by_event, false);
            begin_long(&socket, &by_routine, true);
        });
        thread.join().unwrap();
    });
    assert_eq!(event.wait(u32::MAX), 0, "S29c");
    assert_eq!(by_event.result(&socket, false), Err(995));
    // Its routine has no thread to run in.
    while by_routine.status() == PENDING {
        thread::yield_now();
    }
    assert_eq!((by_routine.status(), by_routine.calls()), (CANCELLED, 0));
    assert_eq!(own.status(), PENDING);
    assert_eq!(CancelIo(socket.0 as *mut c_void), 1);
    assert_eq!(own.status(), CANCELLED);
}

#[test]
fn a_descriptor_that_was_closed_behind_our_back() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    set_delay(20);
    assert_eq!(Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation).begin().0, 997);
    set_delay(0);
    let other = Owned::overlapped();
    // SAFETY: no memory arguments; both are sockets of this test.
    assert!(unsafe { libc::dup2(other.0 as i32, socket.0 as i32) } >= 0);
    assert_eq!(event.wait(u32::MAX), 0);
    assert_eq!(operation.status(), CANCELLED);
}

/// A `WSATHREADID` of the calling thread.
fn own_thread() -> [usize; 2] {
    let mut id = [0, 0];
    let mut error = 0;
    // SAFETY: both are valid.
    let status = unsafe { WPUOpenCurrentThread(id.as_mut_ptr().cast(), &raw mut error) };
    assert_eq!((status, error), (0, 0));
    id
}

fn close_thread(id: &mut [usize; 2]) -> (i32, i32) {
    let mut error = 0;
    // SAFETY: both are valid.
    (unsafe { WPUCloseThread(id.as_mut_ptr().cast(), &raw mut error) }, error)
}

#[test]
fn a_routine_runs_in_the_thread_that_was_named() {
    let socket = Owned::overlapped();
    let operation = Operation::new();
    let mut id = own_thread();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut copy = id;
            let mut count = 0;
            let call = Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation).routine();
            let call =
                Arguments { thread: copy.as_mut_ptr().cast(), returned: &raw mut count, ..call };
            // SAFETY: the count is not written later, and the name is copied (S24).
            assert_eq!(unsafe { call.provider() }, 997);
            copy.fill(0);
            // What the thread began has to be complete before it exits.
            while operation.status() == PENDING {
                thread::yield_now();
            }
            assert_eq!(SleepEx(0, 1), 0, "not here");
        });
    });
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    assert_eq!((operation.calls(), operation.routine_error()), (1, 10050));
    assert_eq!(operation.routine_thread.load(Ordering::Relaxed), thread_id());
    assert_eq!(close_thread(&mut id), (0, 0));
    assert_eq!(close_thread(&mut id), (-1, 10014));
}

#[test]
fn names_of_threads_are_checked() {
    let socket = Owned::overlapped();
    let operation = Operation::new();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(own_thread()).unwrap()).join().unwrap();
    let mut of_exited = receiver.recv().unwrap();
    let pages = crate::memory::tests::Pages::new();
    let mut none = [0x1236, 0];
    // A good name, of which only the first half is in memory (S24).
    let mut own = own_thread();
    let half: *mut usize = pages.at(2, -8);
    // SAFETY: before the page that is not there is the read-only one, which is made writable.
    unsafe {
        let page: *mut c_void = pages.at(1, 0);
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mprotect(page, 4096, writable), 0);
        half.write(own[0]);
    }
    let bad: [*mut c_void; 4] =
        [of_exited.as_mut_ptr().cast(), none.as_mut_ptr().cast(), pages.at(2, -8), pages.at(2, 0)];
    for thread in bad {
        let mut count = UNTOUCHED;
        let call = Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation).routine();
        let call = Arguments { thread, returned: &raw mut count, ..call };
        // SAFETY: the count is valid.
        assert_eq!(unsafe { call.provider() }, 10014);
        assert!(operation.untouched());
        let mut error = 0;
        // SAFETY: the error is valid; the function is not called.
        let status = unsafe { WPUQueueApc(thread, Some(count_call), 0, &raw mut error) };
        assert_eq!((status, error), (-1, 10014), "W45");
    }
    assert_eq!(close_thread(&mut own), (0, 0));
}

/// # Safety
/// `counter` is the address of an [`AtomicU32`] that outlives the call.
unsafe extern "C" fn count_call(counter: usize) {
    // SAFETY: the tests give a counter that outlives the call.
    unsafe { &*(counter as *const AtomicU32) }.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn any_thread_queues_a_call_to_another() {
    let mut id = own_thread();
    let counter = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut copy = id;
                let context = (&raw const counter).expose_provenance();
                // SAFETY: the name is valid, the error not needed, the counter outlives the call.
                let status = unsafe {
                    WPUQueueApc(copy.as_mut_ptr().cast(), Some(count_call), context, null_mut())
                };
                assert_eq!(status, 0);
            });
        }
    });
    assert_eq!(counter.load(Ordering::Relaxed), 0);
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    assert_eq!(counter.load(Ordering::Relaxed), 3);
    close_thread(&mut id);
}

#[test]
fn a_provider_completes_a_request() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    operation.status.store(PENDING, Ordering::Relaxed);
    let complete = |error, bytes| {
        // SAFETY: the structure is valid, the error not needed.
        let status = unsafe {
            WPUCompleteOverlappedRequest(socket.0, operation.pointer(), error, bytes, null_mut())
        };
        assert_eq!(status, 0);
    };
    complete(0, 12);
    assert_eq!((event.wait(0), operation.result(&socket, true)), (0, Ok(12)));
    for error in [995, 10013, 10050, 10057] {
        complete(error, 0);
        assert_eq!(operation.result(&socket, false), Err(error as i32));
        assert_eq!(operation.error.load(Ordering::Relaxed), error);
    }
}

/// Begins a call of the redirection codes from within a routine (contract S32).
///
/// # Safety
/// `context` is the address of a socket and a number that outlive the call.
unsafe extern "C" fn call_inside(context: usize) {
    // SAFETY: the test gives these, and they outlive the call.
    let (socket, found) = unsafe { &*(context as *const (Owned, AtomicU32)) };
    let waiting = Arguments::new(socket, QUERY_RECORDS).both().0;
    let operation = Operation::new();
    let pending = Arguments::new(socket, QUERY_RECORDS).overlapped(&operation).begin().0;
    CancelIo(socket.0 as *mut c_void);
    while operation.status() == PENDING {
        thread::yield_now();
    }
    assert_eq!(SleepEx(0, 1), 0, "W9: not within one another");
    assert_eq!(crate::sys::set_nonblocking(socket.0 as i32, true), Ok(()));
    let nonblocking = Arguments::new(socket, QUERY_RECORDS).both().0;
    if (waiting, pending, nonblocking) == (10036, 997, 10050) {
        found.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_routine_may_not_block() {
    let shared = (Owned::overlapped(), AtomicU32::new(0));
    let mut id = own_thread();
    for _ in 0..2 {
        crate::sys::set_nonblocking(shared.0.0 as i32, false).unwrap();
        let context = (&raw const shared).expose_provenance();
        // SAFETY: the name is valid, the error not needed, `shared` outlives the call.
        let status =
            unsafe { WPUQueueApc(id.as_mut_ptr().cast(), Some(call_inside), context, null_mut()) };
        assert_eq!(status, 0);
    }
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    // The second one was put off to this wait, and found a blocking socket no more.
    assert_eq!(shared.1.load(Ordering::Relaxed), 1);
    close_thread(&mut id);
}

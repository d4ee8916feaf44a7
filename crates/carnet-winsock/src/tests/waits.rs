//! Waits, and calls that wait.

use super::*;
use crate::hooks::set_delay;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn one_of_many_events() {
    let events: Vec<_> = (0..64).map(|_| OwnedEvent::new()).collect();
    let handles: Vec<_> = events.iter().map(|event| event.0).collect();
    assert_eq!(wait(&handles, false, 0, false), 258);
    WSASetEvent(handles[63]);
    assert_eq!(wait(&handles, false, u32::MAX, false), 63);
    WSASetEvent(handles[7]);
    assert_eq!(wait(&handles, false, 0, true), 7, "the first of them");
    assert_eq!(wait(&handles, false, 0, false), 7, "manual reset");
    WSAResetEvent(handles[7]);
    assert_eq!(wait(&handles, false, 0, false), 63);

    let many = [&handles[..], &handles[..1]].concat();
    for (events, error) in [(&many[..], 87), (&[], 87), (&[std::ptr::dangling_mut()], 6)] {
        assert_eq!(wait(events, false, 0, false), u32::MAX);
        assert_eq!(WSAGetLastError(), error);
    }
    let pages = crate::memory::tests::Pages::new();
    assert_eq!(WSAWaitForMultipleEvents(2, pages.at(2, -8), 0, 0, 0), u32::MAX);
    assert_eq!(WSAGetLastError(), 10014);
}

#[test]
fn all_of_many_events() {
    let events = [OwnedEvent::new(), OwnedEvent::new(), OwnedEvent::new()];
    let handles = events.each_ref().map(|event| event.0);
    WSASetEvent(handles[0]);
    WSASetEvent(handles[2]);
    assert_eq!(wait(&handles, true, 10, false), 258);
    let last = handles[1] as usize;
    let setter = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        WSASetEvent(last as *mut c_void)
    });
    assert_eq!(wait(&handles, true, u32::MAX, true), 0);
    assert_eq!(setter.join().unwrap(), 1);
    assert_eq!(wait(&[handles[0], handles[0]], true, 0, false), u32::MAX);
    assert_eq!(WSAGetLastError(), 87);
}

#[test]
fn a_wait_is_ended_by_a_routine_and_begun_again() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::new();
    let query = Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation).routine();
    assert_eq!(query.begin().0, 997);
    while operation.status() == PENDING {
        thread::yield_now();
    }
    // The routine is queued a moment after the status is there; only an alertable wait runs it.
    assert_eq!(event.wait(20), 258);
    assert_eq!(SleepEx(0, 0), 0);
    assert_eq!(operation.calls(), 0);
    // An event that is signalled comes first.
    WSASetEvent(event.0);
    assert_eq!(wait(&[event.0], false, u32::MAX, true), 0);
    assert_eq!(operation.calls(), 0);
    WSAResetEvent(event.0);
    assert_eq!(wait(&[event.0], false, u32::MAX, true), 0xC0, "W49");
    assert_eq!(operation.calls(), 1);
    assert_eq!(wait(&[event.0], false, 0, true), 258);
}

#[test]
fn events_are_values_that_are_checked() {
    let event = WSACreateEvent();
    assert_eq!(event as usize & 3, 0, "W37: the low bits are the caller's");
    assert_eq!(WSACloseEvent(event), 1);
    for call in [WSASetEvent, WSAResetEvent, WSACloseEvent] {
        for handle in [event, null_mut(), 8 as *mut c_void, usize::MAX as *mut c_void] {
            assert_eq!(call(handle), 0);
            assert_eq!(WSAGetLastError(), 6);
        }
    }
}

#[test]
fn an_event_with_the_low_bit_set_is_the_event() {
    let socket = Owned::overlapped();
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    operation.event.fetch_or(1, Ordering::Relaxed);
    assert_eq!(Arguments::new(&socket, UNKNOWN).overlapped(&operation).begin().0, 997);
    assert_eq!(event.wait(u32::MAX), 0);
    assert_eq!(operation.result(&socket, true), Err(10045));
}

#[test]
fn sleeping_takes_its_time() {
    start();
    let began = Instant::now();
    assert_eq!(SleepEx(20, 1), 0);
    Sleep(20);
    assert!(began.elapsed() >= Duration::from_millis(40));
}

#[test]
fn a_call_that_must_not_wait_says_so() {
    let _alone = waiting();
    let socket = Owned::overlapped();
    crate::sys::set_nonblocking(socket.0 as i32, true).unwrap();
    set_delay(1);
    assert_eq!(Arguments::new(&socket, QUERY_RECORDS).both(), (10035, 0), "W32");
    let event = OwnedEvent::new();
    let operation = Operation::with_event(&event);
    assert_eq!(Arguments::new(&socket, QUERY_RECORDS).overlapped(&operation).begin().0, 997);
    assert_eq!(event.wait(u32::MAX), 0);
    // An overlapped structure on a socket without the attribute makes it wait (W2).
    let plain = Owned::plain();
    crate::sys::set_nonblocking(plain.0 as i32, true).unwrap();
    let call = Arguments::new(&plain, QUERY_RECORDS);
    assert_eq!(call.both(), (10035, 0));
    assert_eq!(call.overlapped(&operation).both(), (10050, 0));
    set_delay(0);
}

extern "C" fn nothing(_signal: i32) {}

#[test]
fn a_call_that_waits_can_be_interrupted() {
    let _alone = waiting();
    let socket = Owned::overlapped();
    let handle = socket.0;
    let query = move || {
        set_delay(3_600_000);
        let socket = Owned(handle);
        let call = Arguments::new(&socket, QUERY_RECORDS);
        std::mem::forget(socket);
        let mut count = UNTOUCHED;
        // SAFETY: the count is valid.
        let error = unsafe { Arguments { returned: &raw mut count, ..call }.application() };
        set_delay(0);
        (error, count)
    };

    let blocked = thread::spawn(query);
    while WSAIsBlocking() == 0 {
        thread::yield_now();
    }
    assert_eq!(WSACancelBlockingCall(), 0);
    assert_eq!(blocked.join().unwrap(), (10004, 0), "S33");

    let [client, _accepted, _listener] = connected();
    let waiting = client.0;
    let blocked = thread::spawn(move || {
        let mut read = [1, waiting];
        let none = null_mut();
        // SAFETY: a set of one socket.
        let status =
            unsafe { carnet_winsock_select(0, read.as_mut_ptr().cast(), none, none, none) };
        (status, WSAGetLastError())
    });
    while WSAIsBlocking() == 0 {
        thread::yield_now();
    }
    assert_eq!(WSACancelBlockingCall(), 0);
    assert_eq!(blocked.join().unwrap(), (-1, 10004), "select too");

    // SAFETY: the handler does nothing; the action is complete.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, null_mut()), 0);
    }
    let (sender, receiver) = mpsc::channel();
    let blocked = thread::spawn(move || {
        sender.send(thread_id()).unwrap();
        query()
    });
    let thread = receiver.recv().unwrap();
    // Until it arrives in the wait itself.
    while !blocked.is_finished() {
        // SAFETY: no memory arguments; the thread is of this process, or the signal is nobody's.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(blocked.join().unwrap(), (10004, 0), "S33");

    assert_eq!(WSAIsBlocking(), 0);
    assert_eq!((WSACancelBlockingCall(), WSAGetLastError()), (-1, 10022));

    set_delay(20);
    let began = Instant::now();
    assert_eq!(Arguments::new(&socket, SET_RECORDS).input(&[1; 8]).both(), (10050, 0));
    assert!(began.elapsed() >= Duration::from_millis(40), "S20, through both entry points");
    set_delay(0);
}

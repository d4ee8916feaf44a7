//! Overlapped `WSARecvMsg` and `WSASendMsg`: at once or later, in order, cut, cancelled.

use super::stress::Random;
use super::*;
use crate::memory::CallerPtr;
use crate::message;
use crate::process::process;
use std::collections::VecDeque;
use std::sync::RwLock;
use std::thread;

#[repr(C)]
struct Buffer {
    length: u32,
    address: *mut c_void,
}

#[repr(C)]
struct Header {
    name: *mut c_void,
    name_length: i32,
    buffers: *mut Buffer,
    count: u32,
    control: Buffer,
    flags: u32,
}

/// A `WSAMSG` with its memory, behind raw pointers since an operation writes it until it is complete.
struct Message {
    header: *mut Header,
    part: *mut Buffer,
    data: *mut [u8; 64],
    name: *mut libc::sockaddr_in,
    control: *mut [u8; 64],
}

// SAFETY: the tests look at it only when nothing pends.
unsafe impl Send for Message {}
// SAFETY: as above.
unsafe impl Sync for Message {}

impl Message {
    fn new() -> Self {
        Self::with(64, 64)
    }

    fn with(room: u32, control_room: u32) -> Self {
        // SAFETY: zero is a valid value of every field.
        let name = Box::into_raw(Box::new(unsafe { std::mem::zeroed::<libc::sockaddr_in>() }));
        let data = Box::into_raw(Box::new([0; 64]));
        let control = Box::into_raw(Box::new([0; 64]));
        let part = Box::into_raw(Box::new(Buffer { length: room, address: data.cast() }));
        let header = Box::into_raw(Box::new(Header {
            name: name.cast(),
            name_length: 16,
            buffers: part,
            count: 1,
            control: Buffer { length: control_room, address: control.cast() },
            flags: 0,
        }));
        Self { header, part, data, name, control }
    }

    fn to(address: libc::sockaddr_in, data: &[u8]) -> Self {
        let message = Self::with(data.len() as u32, 0);
        // SAFETY: nothing pends.
        unsafe {
            (&mut (*message.data))[..data.len()].copy_from_slice(data);
            *message.name = address;
        }
        message
    }

    fn data(&self) -> [u8; 64] {
        // SAFETY: nothing pends.
        unsafe { *self.data }
    }

    /// What was received, the length of the source's name and of the control data, the flags.
    fn lengths(&self) -> (i32, u32, i32) {
        // SAFETY: nothing pends.
        let header = unsafe { &*self.header };
        (header.name_length, header.control.length, header.flags.cast_signed())
    }

    fn receive(&self, socket: &Owned, operation: &Operation, routine: bool) -> (i32, u32) {
        let mut count = UNTOUCHED;
        let routine = if routine { ROUTINE } else { None };
        // SAFETY: the message is kept until it is complete; the count is not written later (W4).
        let status = unsafe {
            let count = &raw mut count;
            WSARecvMsg(socket.0, self.header.cast(), count, operation.pointer(), routine)
        };
        (code(status), count)
    }

    fn send(&self, socket: &Owned, operation: &Operation, routine: bool) -> (i32, u32) {
        let mut count = UNTOUCHED;
        let routine = if routine { ROUTINE } else { None };
        // SAFETY: as above.
        let status = unsafe {
            let count = &raw mut count;
            WSASendMsg(socket.0, self.header.cast(), 0, count, operation.pointer(), routine)
        };
        (code(status), count)
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: all are of `with`, and nothing pends.
        unsafe {
            drop(Box::from_raw(self.header));
            drop(Box::from_raw(self.part));
            drop(Box::from_raw(self.data));
            drop(Box::from_raw(self.name));
            drop(Box::from_raw(self.control));
        }
    }
}

fn code(status: i32) -> i32 {
    if status == 0 { 0 } else { WSAGetLastError() }
}

fn datagrams() -> Owned {
    Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1)
}

/// A bound receiver, its address, a sender.
fn pair() -> (Owned, libc::sockaddr_in, Owned) {
    let receiver = datagrams();
    let address = bind_to_loopback(&receiver);
    (receiver, address, datagrams())
}

fn send(sender: &Owned, address: libc::sockaddr_in, data: &[u8]) {
    let address = (&raw const address).cast();
    // SAFETY: as long as said.
    let sent = unsafe {
        carnet_winsock_sendto(sender.0, data.as_ptr().cast(), data.len() as i32, 0, address, 16)
    };
    assert_eq!(sent, data.len() as i32, "error {}", WSAGetLastError());
}

#[test]
fn a_receive_pends_and_completes_by_event() {
    let (receiver, address, sender) = pair();
    let event = OwnedEvent::new();
    let (operation, message) = (Operation::with_event(&event), Message::new());
    WSASetEvent(event.0);
    assert_eq!(message.receive(&receiver, &operation, false), (997, UNTOUCHED));
    assert_eq!(event.wait(0), 258, "reset");
    assert_eq!(operation.status(), PENDING);
    assert_eq!(operation.result(&receiver, false), Err(996));
    assert_eq!(message.lengths(), (16, 64, 0), "untouched");
    send(&sender, address, b"datagram");
    assert_eq!(event.wait(u32::MAX), 0);
    assert_eq!(operation.result(&receiver, false), Ok(8));
    assert_eq!(operation.bytes.load(Ordering::Relaxed), 8);
    assert_eq!(message.data()[..9], *b"datagram\0");
    assert_eq!(message.lengths(), (16, 0, 0));
    // SAFETY: nothing pends.
    let source = unsafe { *message.name };
    assert_eq!(source.sin_port, local_address(&sender).sin_port);
}

#[test]
fn a_receive_completes_by_routine_and_by_the_result_call() {
    let (receiver, address, sender) = pair();
    let (operation, message) = (Operation::new(), Message::new());
    assert_eq!(message.receive(&receiver, &operation, true), (997, UNTOUCHED));
    send(&sender, address, b"routine");
    assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
    assert_eq!((operation.calls(), operation.routine_error()), (1, 0));
    assert_eq!(operation.routine_bytes.load(Ordering::Relaxed), 7);
    assert_eq!(operation.routine_thread.load(Ordering::Relaxed), thread_id());
    assert_eq!(message.data()[..7], *b"routine");

    // With and without an event to wait for.
    let event = OwnedEvent::new();
    for operation in [Operation::with_event(&event), Operation::new()] {
        let message = Message::new();
        assert_eq!(message.receive(&receiver, &operation, false).0, 997);
        thread::scope(|scope| {
            scope.spawn(|| send(&sender, address, b"result"));
            assert_eq!(operation.result(&receiver, true), Ok(6));
        });
        assert_eq!(message.data()[..6], *b"result");
    }
}

#[test]
fn what_is_there_is_received_at_once_and_completed_all_the_same() {
    let (receiver, address, sender) = pair();
    let event = OwnedEvent::new();
    for nonblocking in [0, 1] {
        let mut nonblocking = nonblocking;
        // SAFETY: valid for the call.
        let status = unsafe { ioctlsocket(receiver.0, 0x8004_667E, &raw mut nonblocking) };
        assert_eq!(status, 0);
        send(&sender, address, b"first");
        let (operation, message) = (Operation::with_event(&event), Message::new());
        assert_eq!(message.receive(&receiver, &operation, false), (0, 5));
        assert_eq!((event.wait(0), operation.result(&receiver, false)), (0, Ok(5)), "W3");
        send(&sender, address, b"");
        let (operation, message) = (Operation::new(), Message::new());
        assert_eq!(message.receive(&receiver, &operation, true), (0, 0));
        assert_eq!(operation.calls(), 0, "W9");
        assert_eq!(SleepEx(0, 1), 0xC0, "W3");
        assert_eq!((operation.calls(), operation.routine_error()), (1, 0));
        // One that does not block makes no difference here.
        let (operation, message) = (Operation::new(), Message::new());
        assert_eq!(message.receive(&receiver, &operation, false), (997, UNTOUCHED));
        assert_eq!(CancelIo(receiver.0 as *mut c_void), 1);
        assert_eq!(operation.status(), CANCELLED);
    }
}

#[test]
fn what_does_not_fit_is_said_by_the_completion() {
    let (receiver, address, sender) = pair();
    let on = 1_i32.to_ne_bytes();
    let (ttl, on) = (libc::IP_RECVTTL, on.as_ptr().cast());
    let status = carnet_winsock_setsockopt(receiver.0, libc::IPPROTO_IP, ttl, on, 4);
    assert_eq!(status, 0);
    for at_once in [false, true] {
        // A buffer of four bytes, no room for the control data; then room for both.
        let both = libc::MSG_TRUNC | libc::MSG_CTRUNC;
        for (room, control, expected) in [(4, 8, (16, 0, both)), (64, 64, (16, 24, 0))] {
            let (operation, message) = (Operation::new(), Message::with(room, control));
            if at_once {
                send(&sender, address, b"datagram");
            }
            let (error, count) = message.receive(&receiver, &operation, true);
            let cut = room == 4;
            let begun = if at_once && !cut { (0, 8) } else { (997, UNTOUCHED) };
            assert_eq!((error, count), begun);
            if !at_once {
                send(&sender, address, b"datagram");
            }
            assert_eq!(SleepEx(u32::MAX, 1), 0xC0);
            let (error, bytes) = if cut { (10040, 4) } else { (0, 8) };
            assert_eq!(operation.routine_error(), error);
            assert_eq!(operation.routine_bytes.load(Ordering::Relaxed), bytes);
            assert_eq!(operation.bytes.load(Ordering::Relaxed), bytes as usize);
            assert_eq!(operation.status(), if cut { 0x8000_0005 } else { 0 });
            assert_eq!(message.lengths(), expected);
            assert_eq!(message.data()[..5], if cut { *b"data\0" } else { *b"datag" });
            if !cut {
                // SAFETY: nothing pends.
                let control = unsafe { *message.control };
                assert_eq!(control[12..16], libc::IP_TTL.to_ne_bytes());
            }
        }
    }
}

#[test]
fn several_are_served_in_their_order() {
    let (receiver, address, sender) = pair();
    let begun: Vec<_> = (0..20_u8)
        .map(|number| {
            // Some while others are being served.
            if number >= 10 {
                send(&sender, address, &[number - 10]);
            }
            let (operation, message) = (Operation::new(), Message::new());
            assert!(matches!(message.receive(&receiver, &operation, false).0, 0 | 997));
            (operation, message)
        })
        .collect();
    (10..20).for_each(|number| send(&sender, address, &[number]));
    for (number, (operation, message)) in begun.iter().enumerate() {
        assert_eq!(operation.result(&receiver, true), Ok(1));
        assert_eq!(usize::from(message.data()[0]), number);
    }
}

/// What becomes ready while an operation is being added, and nothing afterwards.
#[test]
fn no_datagram_is_slept_through() {
    let (receiver, address, sender) = pair();
    let events = [OwnedEvent::new(), OwnedEvent::new()];
    let round = AtomicU32::new(0);
    let rounds = 3_000;
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1..=rounds {
                while round.load(Ordering::Acquire) < number {
                    thread::yield_now();
                }
                send(&sender, address, b"1");
                send(&sender, address, b"2");
            }
        });
        for number in 1..=rounds {
            let begun = events.each_ref().map(Operation::with_event);
            let messages = [Message::new(), Message::new()];
            for (operation, message) in begun.iter().zip(&messages) {
                assert!(matches!(message.receive(&receiver, operation, false).0, 0 | 997));
                round.store(number, Ordering::Release);
            }
            let handles = events.each_ref().map(|event| event.0);
            let waited = wait(&handles, true, 20_000, false);
            if waited != 0 {
                // Nothing may pend when the memory goes, nor wait for the next round.
                CancelIo(receiver.0 as *mut c_void);
                round.store(rounds, Ordering::Release);
            }
            let data = messages.each_ref().map(|message| message.data()[0]);
            assert_eq!((waited, data), (0, *b"12"), "round {number}");
            assert!(begun.iter().all(|operation| operation.status() == 0));
        }
    });
}

#[test]
fn the_queue_of_errors_is_one_of_its_own() {
    let socket = datagrams();
    // A port where nobody listens, until the end of the test.
    let nobody = datagrams();
    let address = bind_to_loopback(&nobody);
    let on = 1_i32.to_ne_bytes();
    // SAFETY: as long as said, here and below.
    unsafe {
        let option = libc::IP_RECVERR;
        let on = on.as_ptr().cast();
        assert_eq!(carnet_winsock_setsockopt(socket.0, libc::IPPROTO_IP, option, on, 4), 0);
        let any = (&raw const address).cast();
        assert_eq!(carnet_winsock_connect(socket.0, any, 16), 0);
    }
    drop(nobody);
    let (operation, message) = (Operation::new(), Message::new());
    let (of_errors, error_message) = (Operation::new(), Message::new());
    // SAFETY: nothing pends.
    unsafe { (*error_message.header).flags = libc::MSG_ERRQUEUE.cast_unsigned() };
    assert_eq!(message.receive(&socket, &operation, false).0, 997);
    assert_eq!(error_message.receive(&socket, &of_errors, false).0, 997);
    send(&socket, address, b"lost");
    // One receives the error, the other one the message that it is about.
    assert_eq!(operation.result(&socket, true), Err(10022), "W43: no status of its own");
    assert_eq!(operation.error.load(Ordering::Relaxed), 10061, "W47");
    assert_eq!(of_errors.result(&socket, true), Ok(4));
    assert_eq!(error_message.data()[..4], *b"lost");
    assert_ne!(error_message.lengths().2 & libc::MSG_ERRQUEUE, 0);
}

#[test]
fn a_send_is_done_at_once_and_completed_all_the_same() {
    let (receiver, address, sender) = pair();
    let event = OwnedEvent::new();
    let message = Message::to(address, b"datagram");
    let operation = Operation::with_event(&event);
    assert_eq!(message.send(&sender, &operation, false), (0, 8));
    assert_eq!((event.wait(0), operation.result(&sender, false)), (0, Ok(8)));
    let operation = Operation::new();
    assert_eq!(message.send(&sender, &operation, true), (0, 8));
    assert_eq!(SleepEx(0, 1), 0xC0);
    assert_eq!((operation.calls(), operation.routine_error()), (1, 0));
    assert_eq!(operation.routine_bytes.load(Ordering::Relaxed), 8);
    for _ in 0..2 {
        let (operation, message) = (Operation::new(), Message::new());
        assert_eq!(message.receive(&receiver, &operation, false), (0, 8));
        assert_eq!(message.data()[..8], *b"datagram");
    }
}

/// Messages over a pair of local sockets, whose send buffer only the receiver empties: on the
/// loopback device no send buffer is ever full.
#[test]
fn sends_pend_while_the_buffer_is_full_and_keep_their_order() {
    start();
    let mut ends = [0; 2];
    let small = 1_i32.to_ne_bytes();
    // SAFETY: valid for the calls; the descriptors are nobody else's.
    let [sender, receiver] = unsafe {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()), 0);
        let (option, small) = (libc::SO_SNDBUF, small.as_ptr().cast());
        assert_eq!(libc::setsockopt(ends[0], libc::SOL_SOCKET, option, small, 4), 0);
        ends.map(|fd| Owned(fd as usize))
    };
    let begin = |number: u8, routine: bool| {
        let (message, operation) = (Message::with(64, 0), Operation::new());
        // SAFETY: nothing pends; then kept until it is complete.
        let call = unsafe {
            (*message.data).fill(number);
            (*message.header).name = null_mut();
            let place = |address: *mut c_void| CallerPtr::new(address.expose_provenance());
            message::Call {
                socket: sender.0,
                message: place(message.header.cast()),
                count: place(null_mut()),
                overlapped: place(operation.pointer()),
                routine: if routine { ROUTINE } else { None },
            }
        };
        let socket = process().sockets.find(sender.0).unwrap();
        let begun = message::send_overlapped(&call, socket, 0);
        assert!(matches!(begun, Ok(()) | Err(997)), "{begun:?}");
        (begun.is_err(), message, operation)
    };
    let mut sent: Vec<(bool, Message, Box<Operation>)> = Vec::new();
    while sent.last().is_none_or(|(pends, ..)| !pends) {
        sent.push(begin(sent.len() as u8, false));
    }
    assert!(sent.len() > 1, "some fit");
    let by_routine = begin(sent.len() as u8, true);
    let to_cancel = begin(0xff, true);
    sent.push(begin(sent.len() as u8 + 1, false));
    assert!(by_routine.0 && to_cancel.0 && sent.last().is_some_and(|sent| sent.0), "behind it");
    assert_eq!(CancelIoEx(sender.0 as *mut c_void, to_cancel.2.pointer()), 1);
    for number in 0..=sent.len() as u8 {
        let mut data = [0_u8; 64];
        // SAFETY: as long as said.
        let received = unsafe { carnet_winsock_recv(receiver.0, data.as_mut_ptr().cast(), 64, 0) };
        assert_eq!((received, data), (64, [number; 64]));
    }
    for (_, _, operation) in &sent {
        assert_eq!(operation.result(&sender, true), Ok(64));
    }
    while by_routine.2.calls() + to_cancel.2.calls() < 2 {
        SleepEx(u32::MAX, 1);
    }
    assert_eq!((by_routine.2.routine_error(), to_cancel.2.routine_error()), (0, 995));
    assert_eq!(by_routine.2.routine_bytes.load(Ordering::Relaxed), 64);
}

type Cancel = (&'static str, fn(&Owned, &Operation));

#[test]
fn every_way_to_cancel_a_receive() {
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
        let (socket, address, sender) = pair();
        let (operation, message) = (Operation::with_event(&event), Message::new());
        assert_eq!(message.receive(&socket, &operation, false).0, 997);
        cancel(&socket, &operation);
        assert_eq!((operation.status(), event.wait(0)), (CANCELLED, 0), "{name}");
        assert_eq!(operation.error.load(Ordering::Relaxed), 995, "{name}");
        if name == "closesocket" {
            // Really closed: the port is free.
            let other = datagrams();
            let address = (&raw const address).cast();
            // SAFETY: as long as said.
            assert_eq!(unsafe { carnet_winsock_bind(other.0, address, 16) }, 0);
            std::mem::forget(socket);
            continue;
        }
        // The next datagram is for the next receive, by routine.
        let (next, next_message) = (Operation::new(), Message::new());
        assert_eq!(next_message.receive(&socket, &next, true).0, 997);
        send(&sender, address, b"x");
        assert_eq!(SleepEx(u32::MAX, 1), 0xC0, "{name}");
        assert_eq!((next.calls(), next.routine_error()), (1, 0), "{name}");
        assert_eq!((message.data()[0], next_message.data()[0]), (0, b'x'), "{name}");
        assert_eq!(message.lengths(), (16, 64, 0), "{name}: untouched");
        assert_eq!(next_message.receive(&socket, &next, true).0, 997);
        cancel(&socket, &next);
        assert_eq!(SleepEx(u32::MAX, 1), 0xC0, "{name}");
        assert_eq!((next.calls(), next.routine_error()), (2, 995), "{name}");
    }
}

#[test]
fn the_exit_of_a_thread_cancels_its_receives() {
    let (socket, address, sender) = pair();
    let event = OwnedEvent::new();
    let (of_thread, by_routine, own) =
        (Operation::with_event(&event), Operation::new(), Operation::new());
    let messages = [Message::new(), Message::new(), Message::new()];
    thread::scope(|scope| {
        let begun = scope.spawn(|| {
            assert_eq!(messages[0].receive(&socket, &of_thread, false).0, 997);
            assert_eq!(messages[1].receive(&socket, &by_routine, true).0, 997);
            assert_eq!(of_thread.status(), PENDING);
        });
        begun.join().unwrap();
    });
    assert_eq!(event.wait(u32::MAX), 0, "S29c");
    while by_routine.status() == PENDING {
        thread::yield_now();
    }
    assert_eq!((of_thread.status(), by_routine.status()), (CANCELLED, CANCELLED));
    assert_eq!(by_routine.calls(), 0);
    assert_eq!(messages[2].receive(&socket, &own, false).0, 997);
    send(&sender, address, b"own");
    assert_eq!(own.result(&socket, true), Ok(3));
}

#[test]
fn a_descriptor_closed_behind_our_back_cancels_when_a_datagram_comes() {
    let (socket, address, sender) = pair();
    let (operation, message) = (Operation::new(), Message::new());
    assert_eq!(message.receive(&socket, &operation, false).0, 997);
    let other = datagrams();
    // SAFETY: no memory arguments; both are sockets of this test.
    assert!(unsafe { libc::dup2(other.0 as i32, socket.0 as i32) } >= 0);
    send(&sender, address, b"x");
    while operation.status() == PENDING {
        thread::yield_now();
    }
    assert_eq!((operation.status(), message.data()[0]), (CANCELLED, 0));
}

#[test]
fn memory_that_has_gone_is_an_error_of_the_completion() {
    let (socket, address, sender) = pair();
    let page = 64 * 1024;
    // The data, or what says how much of it there is.
    for data in [true, false] {
        // SAFETY: a new mapping.
        let place = unsafe {
            let writable = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(null_mut(), page, writable, flags, -1, 0)
        };
        assert_ne!(place, libc::MAP_FAILED);
        let (operation, message) = (Operation::new(), Message::new());
        let mut count = UNTOUCHED;
        // SAFETY: all is valid until the mapping is taken back.
        let status = unsafe {
            let header = if data {
                (*message.part).address = place;
                message.header
            } else {
                let header = place.cast::<Header>();
                std::ptr::copy_nonoverlapping(message.header, header, 1);
                header
            };
            let status =
                WSARecvMsg(socket.0, header.cast(), &raw mut count, operation.pointer(), None);
            let status = code(status);
            assert_eq!(libc::munmap(place, page), 0);
            status
        };
        assert_eq!(status, 997);
        send(&sender, address, b"datagram");
        assert_eq!(operation.result(&socket, true), Err(10014));
        assert_eq!(operation.status(), 0xC000_0005);
        assert_eq!(operation.bytes.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn what_is_wrong_is_said_at_once() {
    let (socket, ..) = pair();
    let pages = crate::memory::tests::Pages::new();
    let (operation, message) = (Operation::new(), Message::new());
    let nowhere: *mut c_void = pages.at(2, 0);
    let read_only: *mut c_void = pages.at(1, 0);
    let receive = |socket: &Owned, header, count, overlapped| {
        // SAFETY: nothing pends, since all of these fail.
        code(unsafe { WSARecvMsg(socket.0, header, count, overlapped, None) })
    };
    let (header, overlapped) = (message.header.cast(), operation.pointer());
    for bad in [null_mut(), nowhere, read_only] {
        assert_eq!(receive(&socket, bad, null_mut(), overlapped), 10014);
        if !bad.is_null() {
            assert_eq!(receive(&socket, header, bad.cast(), overlapped), 10014);
            assert_eq!(receive(&socket, header, null_mut(), bad), 10014);
        }
    }
    for bad in [nowhere, read_only] {
        let message = Message::new();
        // SAFETY: nothing pends.
        unsafe { (*message.part).address = bad };
        assert_eq!(message.receive(&socket, &operation, false).0, 10014, "the buffer");
        let message = Message::new();
        // SAFETY: nothing pends.
        unsafe { (*message.header).control.address = bad };
        assert_eq!(message.receive(&socket, &operation, false).0, 10014, "control");
        let message = Message::new();
        // SAFETY: nothing pends.
        unsafe { (*message.header).name = bad };
        assert_eq!(message.receive(&socket, &operation, false).0, 10014, "name");
    }
    assert!(operation.untouched(), "W5");
    // Of streams, as before.
    let [client, ..] = connected();
    assert_eq!(message.receive(&client, &operation, false).0, 10045);
    assert_eq!(message.send(&client, &operation, false).0, 10045);
    assert!(operation.untouched());
}

const SOCKETS: usize = 20;
const THREADS: u64 = 8;
const RECEIVES: usize = 10_000;

struct Slot {
    socket: Owned,
    address: libc::sockaddr_in,
    cancels: u64,
}

impl Slot {
    fn new() -> Self {
        let (socket, address, _) = pair();
        Self { socket, address, cancels: 0 }
    }
}

struct Begun {
    operation: Box<Operation>,
    event: Option<OwnedEvent>,
    message: Message,
    slot: usize,
    cancels: u64,
}

impl Begun {
    /// True if it is complete; then whether it was cancelled.
    fn result(&self, slots: &[RwLock<Slot>]) -> Option<bool> {
        let status = self.operation.status();
        if status == PENDING || (self.event.is_none() && self.operation.calls() == 0) {
            return None;
        }
        if let Some(event) = &self.event {
            assert_eq!(event.wait(u32::MAX), 0);
            WSAResetEvent(event.0);
        } else {
            let error = if status == CANCELLED { 995 } else { 0 };
            assert_eq!(self.operation.routine_error(), error);
            assert_eq!(self.operation.routine_thread.load(Ordering::Relaxed), thread_id());
        }
        let bytes = self.operation.bytes.load(Ordering::Relaxed);
        let data = self.message.data();
        if status == CANCELLED {
            assert!(
                slots[self.slot].read().expect("no thread of this test panics").cancels
                    > self.cancels,
                "by nobody"
            );
            assert_eq!((bytes, data), (0, [0; 64]), "nothing is written by a cancelled one");
        } else {
            assert_eq!((status, bytes), (0, 16));
            let half = |at: usize| {
                u64::from_ne_bytes(
                    data[at..at + 8].try_into().expect("no thread of this test panics"),
                )
            };
            assert_eq!(half(0), !half(8), "a whole datagram");
            assert_eq!(self.message.lengths(), (16, 0, 0));
        }
        // To see whether it is completed again.
        self.operation.status.store(SEEN, Ordering::Relaxed);
        Some(status == CANCELLED)
    }
}

const SEEN: usize = 0x5EE2;

#[test]
fn ten_thousand_receives_disturbed() {
    let slots: Vec<_> = (0..SOCKETS).map(|_| RwLock::new(Slot::new())).collect();
    let totals = Mutex::new([0_usize; 2]);
    thread::scope(|scope| {
        for seed in 1..=THREADS {
            let (slots, totals) = (&slots, &totals);
            scope.spawn(move || {
                let mut random = Random(seed);
                let sender = datagrams();
                let (mut pending, mut complete) = (VecDeque::new(), Vec::new());
                let mut counts = [0; 2];
                for _ in 0..RECEIVES / THREADS as usize {
                    let begun = begin(&mut random, slots);
                    // A datagram for somebody, mostly; and something that cancels, at times.
                    if random.below(4) != 0 {
                        let number = random.below(u64::MAX >> 33);
                        let data = [number.to_ne_bytes(), (!number).to_ne_bytes()].concat();
                        let index = random.below(SOCKETS as u64) as usize;
                        let slot = slots[index].read().expect("no thread of this test panics");
                        send(&sender, slot.address, &data);
                    }
                    disturb(&mut random, slots, &begun);
                    pending.push_back(begun);
                    if random.below(8) == 0 || pending.len() > 50 {
                        SleepEx(random.below(2) as u32, 1);
                        take(&mut pending, &mut complete, &mut counts, slots);
                    }
                }
                // What is left of this thread.
                for slot in slots {
                    let mut slot = slot.write().expect("no thread of this test panics");
                    slot.cancels += 1;
                    assert_eq!(CancelIo(slot.socket.0 as *mut c_void), 1);
                }
                while !pending.is_empty() {
                    SleepEx(1, 1);
                    take(&mut pending, &mut complete, &mut counts, slots);
                }
                for begun in &complete {
                    assert_eq!(begun.operation.status(), SEEN, "completed twice");
                    assert_eq!(begun.operation.calls(), u32::from(begun.event.is_none()));
                    assert!(begun.event.as_ref().is_none_or(|event| event.wait(0) == 258));
                }
                let mut totals = totals.lock().expect("no thread of this test panics");
                totals[0] += counts[0];
                totals[1] += counts[1];
            });
        }
    });
    let [received, cancelled] = totals.into_inner().expect("no thread of this test panics");
    assert_eq!(received + cancelled, RECEIVES);
    assert!(received > 0 && cancelled > 0, "both happen");
    println!("{received} received, {cancelled} cancelled");
}

fn begin(random: &mut Random, slots: &[RwLock<Slot>]) -> Begun {
    let by_routine = random.below(2) == 0;
    let event = (!by_routine).then(OwnedEvent::new);
    let operation = event.as_ref().map_or_else(Operation::new, Operation::with_event);
    let index = random.below(SOCKETS as u64) as usize;
    let message = Message::new();
    let slot = slots[index].read().expect("no thread of this test panics");
    match message.receive(&slot.socket, &operation, by_routine) {
        (997, UNTOUCHED) | (0, 16) => {}
        other => panic!("{other:?}"),
    }
    let cancels = slot.cancels;
    drop(slot);
    Begun { operation, event, message, slot: index, cancels }
}

fn disturb(random: &mut Random, slots: &[RwLock<Slot>], last: &Begun) {
    let what = random.below(40);
    let index = if what < 3 { random.below(SOCKETS as u64) as usize } else { last.slot };
    if what >= 6 {
        return;
    }
    let mut slot = slots[index].write().expect("no thread of this test panics");
    slot.cancels += 1;
    let socket = slot.socket.0 as *mut c_void;
    match what {
        0 => {
            let Slot { socket, address, .. } = Slot::new();
            (slot.socket, slot.address) = (socket, address);
        }
        1 => assert_eq!(Arguments::new(&slot.socket, FLUSH).begin(), (0, 0)),
        2 => assert_eq!(CancelIo(socket), 1),
        _ => {
            CancelIoEx(socket, last.operation.pointer());
        }
    }
}

fn take(
    pending: &mut VecDeque<Begun>,
    complete: &mut Vec<Begun>,
    counts: &mut [usize; 2],
    slots: &[RwLock<Slot>],
) {
    for _ in 0..pending.len() {
        let Some(begun) = pending.pop_front() else {
            break;
        };
        match begun.result(slots) {
            None => pending.push_back(begun),
            Some(cancelled) => {
                counts[usize::from(cancelled)] += 1;
                complete.push(begun);
            }
        }
    }
}

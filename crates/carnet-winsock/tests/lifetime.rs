//! Begin and end of the library's use, and fork. One test, since all of it is the process's.
#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "the functions under test are C's")]

use carnet_winsock::ffi::*;
use std::ffi::c_void;
use std::ptr::null_mut;

const QUERY_RECORDS: u32 = 0x9800_00DC;

/// Status, byte count, flags and error, event.
type Overlapped = [usize; 4];

fn start(version: u16) -> (i32, u16) {
    let mut data = [0_u64; 51];
    // SAFETY: the size of a WSADATA.
    let status = unsafe { WSAStartup(version, data.as_mut_ptr().cast()) };
    (status, data[0] as u16)
}

fn query(socket: usize, overlapped: *mut Overlapped) -> i32 {
    let (mut count, nothing) = (0, null_mut());
    // SAFETY: the count is valid; the callers keep the structure until it is complete.
    unsafe {
        let count = &raw mut count;
        WSAIoctl(socket, QUERY_RECORDS, nothing, 0, nothing, 0, count, overlapped.cast(), None);
    }
    WSAGetLastError()
}

/// The words of a `WSAMSG`, the one buffer that it has, and the data.
#[repr(C)]
#[derive(Default)]
struct Message {
    header: [usize; 7],
    buffer: [usize; 2],
    data: [u8; 8],
}

/// Begins to receive; the callers keep message and structure until it is complete.
fn receive(socket: usize, message: *mut Message, overlapped: *mut Overlapped) -> i32 {
    // SAFETY: by the above.
    unsafe {
        (*message).buffer = [8, (&raw mut (*message).data).expose_provenance()];
        (*message).header = [0, 0, (&raw mut (*message).buffer).expose_provenance(), 1, 0, 0, 0];
        let status = WSARecvMsg(socket, message.cast(), null_mut(), overlapped.cast(), None);
        if status == 0 { 0 } else { WSAGetLastError() }
    }
}

/// A datagram socket that is connected to itself.
fn datagrams() -> usize {
    let socket = WSASocketW(libc::AF_INET, libc::SOCK_DGRAM, 0, null_mut(), 0, 1);
    // SAFETY: zero is a valid value of every field.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    let (place, mut length) = ((&raw mut address).cast(), 16);
    // SAFETY: all are as long as said.
    unsafe {
        assert_eq!(carnet_winsock_bind(socket, place, length), 0);
        assert_eq!(carnet_winsock_getsockname(socket, place, &raw mut length), 0);
        assert_eq!(carnet_winsock_connect(socket, place, length), 0);
    }
    socket
}

fn send(socket: usize, data: &[u8]) -> bool {
    let length = data.len() as i32;
    // SAFETY: as long as said.
    unsafe { carnet_winsock_send(socket, data.as_ptr().cast(), length, 0) == length }
}

fn wait(event: *mut c_void) -> (u32, i32) {
    (WSAWaitForMultipleEvents(1, &raw const event, 0, 10_000, 0), WSAGetLastError())
}

#[test]
fn begin_end_and_fork() {
    // Before everything else.
    let invalid = (-1, 10093);
    assert_eq!((WSACleanup(), WSAGetLastError()), invalid);
    assert_eq!((closesocket(0), WSAGetLastError()), invalid);
    assert_eq!(query(0, null_mut()), 10093, "W42");
    assert!(WSACreateEvent().is_null());
    assert_eq!(carnet_winsock_socket(2, 1, 0), usize::MAX);
    assert_eq!(WSAGetLastError(), 10093);

    // SAFETY: null is no memory.
    assert_eq!(unsafe { WSAStartup(0x0202, null_mut()) }, 10014);
    assert_eq!(start(0x0200).0, 10092, "the major version is the low byte");
    assert_eq!(start(0x0001).0, 0);
    assert_eq!(start(0x0002), (0, 0x0002), "an older version is what it gets");
    assert_eq!(start(0x0909), (0, 0x0202));
    assert_eq!((WSACleanup(), WSACleanup()), (0, 0));

    let socket = WSASocketW(libc::AF_INET, libc::SOCK_STREAM, 0, null_mut(), 0, 1);
    let plain = WSASocketW(libc::AF_INET, libc::SOCK_STREAM, 0, null_mut(), 0, 0);
    let event = WSACreateEvent();
    let mut overlapped: Overlapped = [0, 0, 0, event.expose_provenance()];
    assert_eq!(query(socket, &raw mut overlapped), 997);
    assert_eq!(wait(event), (0, 0));
    assert_eq!(overlapped[0], 0xC000_000E);

    let datagrams = datagrams();
    let of_receive = WSACreateEvent();
    let mut receiving: Overlapped = [0, 0, 0, of_receive.expose_provenance()];
    let mut message = Message::default();
    assert_eq!(receive(datagrams, &raw mut message, &raw mut receiving), 997);

    // The child begins anew, with its parent's sockets.
    // SAFETY: the child calls what may be called after a fork by this library's documentation, and
    // ends without running anything of the parent's.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut failed = 0;
        let mut expect = |number: i32, holds: bool| {
            if !holds && failed == 0 {
                failed = number;
            }
        };
        expect(1, wait(event) == (u32::MAX, 6));
        let event = WSACreateEvent();
        let mut overlapped: Overlapped = [0, 0, 0, event.expose_provenance()];
        expect(2, query(socket, &raw mut overlapped) == 997);
        expect(3, wait(event) == (0, 0) && overlapped[0] == 0xC000_000E);
        // What pends here completes here; what pends in the parent does not know of this.
        let (mut own, mut again) = (Message::default(), [0, 0, 0, event.expose_provenance()]);
        let socket = self::datagrams();
        expect(6, receive(socket, &raw mut own, &raw mut again) == 997);
        expect(7, send(socket, b"child") && wait(event) == (0, 0));
        expect(8, again[..2] == [0, 5] && own.data == *b"child\0\0\0");
        expect(9, receiving[0] == 0x103);
        // The socket without the attribute is still one: the structure is ignored.
        overlapped = [7; 4];
        expect(4, query(plain, &raw mut overlapped) == 10050 && overlapped == [7; 4]);
        expect(5, WSACleanup() == 0 && query(socket, null_mut()) == 10093);
        // SAFETY: ends the child.
        unsafe { libc::_exit(failed) };
    }
    let mut status = 0;
    // SAFETY: a child of this process, and a valid place.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed at check {}", status >> 8);

    // The parent is as it was.
    assert_eq!(receiving[0], 0x103);
    assert!(send(datagrams, b"parent"));
    assert_eq!(wait(of_receive), (0, 0));
    assert_eq!((receiving[0], receiving[1], message.data), (0, 6, *b"parent\0\0"));
    overlapped[0] = 0;
    assert_eq!(query(socket, &raw mut overlapped), 997);
    assert_eq!(wait(event), (0, 0));

    assert_eq!(receive(datagrams, &raw mut message, &raw mut receiving), 997);
    assert_eq!(WSACleanup(), 0);
    assert_eq!(receiving[0], 0xC000_0120, "cancelled by the last one");
    assert_eq!(query(socket, null_mut()), 10093);
    assert_eq!(start(0x0202).0, 0);
    assert_eq!(query(socket, &raw mut overlapped), 997, "begun again");
    assert_eq!(wait(event), (0, 0));
    assert_eq!(receive(datagrams, &raw mut message, &raw mut receiving), 997);
    assert!(send(datagrams, b"again"));
    assert_eq!(wait(of_receive), (0, 0));
    assert_eq!((receiving[0], receiving[1], message.data), (0, 5, *b"againt\0\0"));
    assert_eq!((closesocket(datagrams), WSACloseEvent(of_receive)), (0, 1));
    assert_eq!((closesocket(socket), closesocket(plain), WSACloseEvent(event)), (0, 0, 1));
    assert_eq!(WSACleanup(), 0);
    assert_eq!((WSACleanup(), WSAGetLastError()), invalid);
}

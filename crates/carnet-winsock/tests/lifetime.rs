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
    overlapped[0] = 0;
    assert_eq!(query(socket, &raw mut overlapped), 997);
    assert_eq!(wait(event), (0, 0));

    assert_eq!(WSACleanup(), 0);
    assert_eq!(query(socket, null_mut()), 10093);
    assert_eq!(start(0x0202).0, 0);
    assert_eq!(query(socket, &raw mut overlapped), 997, "begun again");
    assert_eq!(wait(event), (0, 0));
    assert_eq!((closesocket(socket), closesocket(plain), WSACloseEvent(event)), (0, 0, 1));
    assert_eq!(WSACleanup(), 0);
    assert_eq!((WSACleanup(), WSAGetLastError()), invalid);
}

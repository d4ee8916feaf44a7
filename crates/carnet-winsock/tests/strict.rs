//! `CARNET_WINSOCK_STRICT_MSAFD`, which is read when the library is first used: a process of its own.
#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "the functions under test are C's")]

use carnet_winsock::ffi::*;
use std::ptr::null_mut;

/// What Microsoft's own provider does with SIO_FLUSH (contract X2, W16, W17).
#[test]
fn flush_is_an_unknown_code() {
    const SIO_FLUSH: u32 = 0x2800_0004;
    // SAFETY: the only test of this program, and no other thread of it reads the environment.
    unsafe { std::env::set_var("CARNET_WINSOCK_STRICT_MSAFD", "1") };
    let mut data = [0_u64; 51];
    // SAFETY: the size of a WSADATA.
    assert_eq!(unsafe { WSAStartup(0x0202, data.as_mut_ptr().cast()) }, 0);
    let socket = WSASocketW(libc::AF_INET, libc::SOCK_STREAM, 0, null_mut(), 0, 1);
    let event = WSACreateEvent();
    let mut overlapped = [0, 0, 0, event.expose_provenance()];
    let flush = |overlapped: *mut [usize; 4]| {
        let (mut count, nothing) = (7, null_mut());
        // SAFETY: the count is valid, and the structure is kept until it is complete.
        unsafe {
            let count = &raw mut count;
            let overlapped = overlapped.cast();
            WSAIoctl(socket, SIO_FLUSH, nothing, 0, nothing, 0, count, overlapped, None);
        }
        (WSAGetLastError(), count)
    };
    assert_eq!(flush(null_mut()), (10045, 0));
    assert_eq!(flush(&raw mut overlapped), (997, 7));
    assert_eq!(WSAWaitForMultipleEvents(1, &raw const event, 0, u32::MAX, 0), 0);
    assert_eq!(overlapped[0], 0xC000_00BB);
    assert_eq!((closesocket(socket), WSACloseEvent(event), WSACleanup()), (0, 1, 0));
}

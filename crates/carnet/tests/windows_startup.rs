//! Windows: what only a program with one thread can be asked: whether this library's first call
//! starts Winsock, and what it says of a socket that was closed behind its back.
#![cfg(windows)]
#![expect(unsafe_code, reason = "a socket is closed while it is still owned")]

use carnet::{Error, Onwards};
use std::mem::ManuallyDrop;
use std::net::UdpSocket;
use std::os::windows::io::AsRawSocket;
use windows_sys::Win32::Networking::WinSock::closesocket;

#[test]
fn winsock_is_started_and_a_closed_socket_is_an_error() {
    const WSANOTINITIALISED: i32 = 10093;
    let onwards = Onwards::new(vec![1; 64].into(), "127.0.0.1:1".parse().unwrap());
    let error = onwards.connect().unwrap_err();
    if let Error::Os { source, .. } | Error::Connect { source, .. } = &error {
        assert_ne!(source.raw_os_error(), Some(WSANOTINITIALISED), "{error}");
        panic!("the record was not refused: {error}");
    }

    const WSAENOTSOCK: i32 = 10038;
    let socket = ManuallyDrop::new(UdpSocket::bind("127.0.0.1:0").unwrap());
    // SAFETY: it is closed once only, here; what is asked of it below is asked by its number.
    assert_eq!(unsafe { closesocket(socket.as_raw_socket() as _) }, 0);
    for error in [
        carnet::query_redirect_records(&*socket).unwrap_err(),
        carnet::query_redirect_context(&*socket).unwrap_err(),
        carnet::set_redirect_records(&*socket, &vec![1; 64].into()).unwrap_err(),
        carnet::original_destination(&*socket).unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::Os { source, .. } if source.raw_os_error() == Some(WSAENOTSOCK)),
            "{error:?}"
        );
    }
}

//! Windows: what the library says where no callout redirects, and that it minds its host's manners.
//!
//! The peer is the Winsock that is there. Wine's answers all three control codes with
//! `WSAEOPNOTSUPP`; a Windows without a callout driver may have other words for "not redirected",
//! which these tests allow where the documentation does.
#![cfg(windows)]
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(unsafe_code, reason = "Winsock and the kernel are asked directly")]

use carnet::{Error, Onwards, Operation, RedirectRecords};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::windows::io::{AsHandle, AsRawHandle, AsRawSocket, FromRawHandle, OwnedHandle};
use std::os::windows::io::{AsSocket, FromRawSocket, OwnedSocket};
use std::ptr;
use std::time::{Duration, Instant};
use windows_sys::Win32::Foundation::{HANDLE, WAIT_TIMEOUT};
use windows_sys::Win32::Networking::WinSock::{
    AF_INET, INVALID_SOCKET, SOCK_STREAM, WSAEventSelect, WSASocketW,
};
use windows_sys::Win32::System::IO::{
    CreateIoCompletionPort, GetQueuedCompletionStatus, OVERLAPPED,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, GetProcessHandleCount};

/// Well below the limit after which a request is given up.
const AT_ONCE: Duration = Duration::from_secs(1);

fn connected(address: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    (listener, client, accepted)
}

/// Asserts that nothing redirected this connection, in one of the ways to say so.
fn not_redirected<T: std::fmt::Debug>(result: Result<T, Error>, operation: Operation) {
    match result {
        Err(Error::Unsupported { operation: of } | Error::NotRedirected { operation: of }) => {
            assert_eq!(of, operation);
        }
        other => panic!("{operation}: {other:?}"),
    }
}

#[test]
fn a_direct_connection_is_not_taken_for_a_redirected_one() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (_listener, client, accepted) = connected(address);
        for socket in [&accepted, &client] {
            let begun = Instant::now();
            not_redirected(carnet::query_redirect_records(socket), Operation::QueryRedirectRecords);
            not_redirected(carnet::query_redirect_context(socket), Operation::QueryRedirectContext);
            not_redirected(carnet::original_destination(socket), Operation::OriginalDestination);
            not_redirected(carnet::connect_onwards(socket), Operation::QueryRedirectRecords);
            assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        }
    }
}

#[test]
fn what_only_the_kernel_side_knows_is_unsupported() {
    let (listener, _client, accepted) = connected("127.0.0.1:0");
    let answers = [
        (carnet::original_app(&accepted).unwrap_err(), Operation::OriginalApp),
        (carnet::flow(&accepted).unwrap_err(), Operation::Flow),
        (carnet::register_listener(&listener).unwrap_err(), Operation::RegisterListener),
    ];
    for (error, asked) in answers {
        assert!(matches!(error, Error::Unsupported { operation } if operation == asked), "{error}");
        assert!(error.to_string().contains("not supported by this operating system"), "{error}");
    }
}

#[test]
fn the_listener_is_not_the_socket_to_ask() {
    let (listener, _client, _accepted) = connected("127.0.0.1:0");
    let answer = carnet::query_redirect_records(&listener);
    assert!(
        matches!(answer, Err(Error::Unsupported { .. } | Error::NotConnected { .. })),
        "{answer:?}"
    );
}

#[test]
fn nothing_is_connected_without_its_record() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let destination = listener.local_addr().unwrap();
    let records = RedirectRecords::from(vec![1; 400]);

    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let refused = carnet::set_redirect_records(&socket, &records).unwrap_err();
    assert!(is_a_refusal(&refused), "{refused:?}");
    // The socket is as it was.
    socket.connect(&SockAddr::from(destination)).unwrap();
    listener.accept().unwrap();

    let refused = Onwards::new(records, destination).connect().unwrap_err();
    assert!(is_a_refusal(&refused), "{refused:?}");
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// Whether a made-up record was refused: as one, or because nobody here knows of records.
fn is_a_refusal(error: &Error) -> bool {
    match error {
        Error::Unsupported { operation } | Error::AccessDenied { operation } => {
            *operation == Operation::SetRedirectRecords
        }
        Error::InvalidRecord => true,
        _ => false,
    }
}

#[test]
fn an_empty_record_is_refused_not_passed_over() {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    assert!(carnet::set_redirect_records(&socket, &vec![].into()).is_err());
}

#[test]
fn sockets_of_every_kind_can_be_asked() {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(carnet::query_redirect_records(&udp).is_err());
    assert!(carnet::set_redirect_records(&udp, &vec![1].into()).is_err());

    // Without the overlapped attribute every call is synchronous, which comes to the same here.
    // SAFETY: no protocol information and no group are given; the socket is ours then.
    let socket = unsafe {
        let raw = WSASocketW(AF_INET.into(), SOCK_STREAM, 0, ptr::null(), 0, 0);
        assert_ne!(raw, INVALID_SOCKET);
        OwnedSocket::from_raw_socket(raw as _)
    };
    assert!(carnet::query_redirect_records(&socket).is_err());
    let refused = carnet::set_redirect_records(&socket, &vec![1; 64].into()).unwrap_err();
    assert!(is_a_refusal(&refused), "{refused:?}");
}

#[test]
fn a_blocking_socket_stays_blocking_and_a_selected_one_stays_selected() {
    let (_listener, client, accepted) = connected("127.0.0.1:0");
    assert!(carnet::query_redirect_records(&accepted).is_err());
    accepted.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    // A non-blocking socket would answer at once, with another error.
    let waited = Instant::now();
    let read = std::io::Read::read(&mut &accepted, &mut [0]).unwrap_err();
    assert_eq!(read.kind(), ErrorKind::TimedOut, "{read}");
    assert!(waited.elapsed() >= Duration::from_millis(5));

    // Event selection, as old services use it, is no obstacle.
    let event = event();
    let raw = client.as_raw_socket() as _;
    // SAFETY: both are open; 0x3F selects every network event.
    assert_eq!(unsafe { WSAEventSelect(raw, event.as_raw_handle() as isize, 0x3F) }, 0);
    assert!(carnet::query_redirect_records(&client).is_err());
}

#[test]
fn a_completion_port_of_the_host_sees_nothing_of_it() {
    let (_listener, _client, accepted) = connected("127.0.0.1:0");
    // SAFETY: a new port for an open socket; both are ours, and the port is closed with its owner.
    let port = unsafe {
        let socket = accepted.as_raw_socket() as HANDLE;
        let port = CreateIoCompletionPort(socket, ptr::null_mut(), 7, 0);
        assert!(!port.is_null());
        OwnedHandle::from_raw_handle(port)
    };
    assert!(carnet::query_redirect_records(&accepted).is_err());
    assert!(carnet::query_redirect_context(&accepted).is_err());
    assert_eq!(next_packet(&port), None);
}

/// The key of the next packet of a completion port, if one comes soon.
fn next_packet(port: &OwnedHandle) -> Option<usize> {
    let (mut count, mut key) = (0, 0);
    let mut overlapped: *mut OVERLAPPED = ptr::null_mut();
    // SAFETY: the port is open, and all results are locals of the right types.
    let done = unsafe {
        GetQueuedCompletionStatus(
            port.as_handle().as_raw_handle(),
            &raw mut count,
            &raw mut key,
            &raw mut overlapped,
            50,
        )
    };
    if done == 0 && overlapped.is_null() {
        let error = std::io::Error::last_os_error().raw_os_error().unwrap();
        assert_eq!(error as u32, WAIT_TIMEOUT);
        return None;
    }
    Some(key)
}

/// An event of the system's own, closed with its owner.
fn event() -> OwnedHandle {
    use windows_sys::Win32::Networking::WinSock::{WSA_INVALID_EVENT, WSACreateEvent};
    // SAFETY: it has no precondition, and the event is ours.
    unsafe {
        let event = WSACreateEvent();
        assert_ne!(event, WSA_INVALID_EVENT);
        OwnedHandle::from_raw_handle(event as _)
    }
}

#[test]
fn many_threads_ask_one_socket_and_leave_no_handle_behind() {
    let (_listener, _client, accepted) = connected("127.0.0.1:0");
    let ask = |times: usize| {
        std::thread::scope(|threads| {
            for _ in 0..8 {
                threads.spawn(|| {
                    for _ in 0..times {
                        assert!(carnet::query_redirect_records(&accepted).is_err());
                        assert!(carnet::query_redirect_context(&accepted).is_err());
                    }
                });
            }
        });
    };
    ask(1);
    let before = handles();
    ask(200);
    // Other tests open a few at the same time; a handle for each request would be 3200.
    let after = handles();
    assert!(after < before + 500, "{before} handles before, {after} after");
}

/// How many handles this process has open.
fn handles() -> u32 {
    let mut count = 0;
    // SAFETY: the pseudo handle of this process is always open.
    let done = unsafe { GetProcessHandleCount(GetCurrentProcess(), &raw mut count) };
    assert_ne!(done, 0);
    count
}

#[test]
fn a_connection_onwards_that_is_refused_says_so() {
    // The system's own errors keep their numbers: WSAECONNREFUSED is 10061.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let source = TcpStream::connect(nobody).unwrap_err();
    assert_eq!(source.raw_os_error(), Some(10061));
    let error = Error::from_connect(nobody, source);
    assert!(matches!(&error, Error::Connect { destination, source }
        if *destination == nobody && source.kind() == ErrorKind::ConnectionRefused));
}

#[cfg(feature = "tokio")]
#[tokio::test]
async fn sockets_of_tokio_are_taken_as_they_are() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let client = tokio::net::TcpStream::connect(address).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let records = Operation::QueryRedirectRecords;
    not_redirected(carnet::query_redirect_records(&accepted), records);
    not_redirected(carnet::tokio::connect_onwards(&accepted).await, records);
    not_redirected(carnet::tokio::connect_onwards_to(&accepted, address).await, records);
    let onwards = Onwards::new(vec![1; 64].into(), address).timeout(AT_ONCE);
    let refused = carnet::tokio::connect(&onwards).await.unwrap_err();
    assert!(is_a_refusal(&refused), "{refused:?}");

    // tokio goes on with both sockets as if nothing had been asked.
    client.writable().await.unwrap();
    assert_eq!(client.try_write(b"still here").unwrap(), 10);
    accepted.readable().await.unwrap();
    let mut buffer = [0; 16];
    assert_eq!(accepted.try_read(&mut buffer).unwrap(), 10);
    assert!(accepted.as_socket().as_raw_socket() != INVALID_SOCKET as _);
}

//! Windows: the calling contract of `WSAIoctl` on which this library builds, as the project's
//! contract has it (rows W13 to W37), asked of the Winsock that is there.
//!
//! The rows are second-hand: others' tests assert them of real Windows. Under Wine they are asked
//! of Wine's own ws2_32. A row that a Windows answers differently is a find: the library's backend
//! is then to be looked at in its light.
#![cfg(windows)]
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(unsafe_code, reason = "Winsock is asked directly")]

use std::cell::Cell;
use std::ffi::c_void;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::windows::io::{AsRawSocket, IntoRawSocket};
use std::ptr;
use windows_sys::Win32::Foundation::{
    CloseHandle, FALSE, GetLastError, HANDLE, INVALID_HANDLE_VALUE, STATUS_NOT_SUPPORTED,
    WAIT_IO_COMPLETION,
};
use windows_sys::Win32::Networking::WinSock::{
    FIONBIO, LPWSAOVERLAPPED_COMPLETION_ROUTINE, SIO_ADDRESS_LIST_CHANGE, SIO_ADDRESS_LIST_QUERY,
    SIO_FLUSH, SIO_GET_EXTENSION_FUNCTION_POINTER, SIO_KEEPALIVE_VALS,
    SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT, SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS,
    SIO_ROUTING_INTERFACE_QUERY, SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS, SOCKET, WSA_IO_PENDING,
    WSA_OPERATION_ABORTED, WSAEFAULT, WSAEINVAL, WSAENOTCONN, WSAENOTSOCK, WSAEOPNOTSUPP,
    WSAEWOULDBLOCK, WSAGetLastError, WSAIoctl, WSASetLastError, closesocket,
};
use windows_sys::Win32::System::IO::{
    CreateIoCompletionPort, GetQueuedCompletionStatus, OVERLAPPED,
};
use windows_sys::Win32::System::Threading::SleepEx;

/// The three codes that the library uses.
const OURS: [u32; 3] = [
    SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS,
    SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT,
    SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS,
];
/// Codes that no provider of the system knows.
const UNKNOWN: [u32; 3] = [0xdead_beef, 0x667e, SIO_FLUSH];
/// A code that goes to the kernel and gives data.
const SIO_GET_INTERFACE_LIST: u32 = 0x4004_747f;
/// A code that only a connected socket answers.
const SIO_IDEAL_SEND_BACKLOG_QUERY: u32 = 0x4004_747b;
/// What is left in a count or a status that nobody writes.
const UNTOUCHED: u32 = 0xdead_beef;

/// One call, to be made as it is.
struct Call {
    socket: SOCKET,
    code: u32,
    input: *const c_void,
    input_length: u32,
    output: *mut c_void,
    output_length: u32,
    count: *mut u32,
    overlapped: *mut OVERLAPPED,
    routine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
}

impl Call {
    fn new(socket: &impl AsRawSocket, code: u32) -> Self {
        Self {
            socket: socket.as_raw_socket() as SOCKET,
            code,
            input: ptr::null(),
            input_length: 0,
            output: ptr::null_mut(),
            output_length: 0,
            count: ptr::null_mut(),
            overlapped: ptr::null_mut(),
            routine: None,
        }
    }

    fn input<T>(self, input: &T, length: usize) -> Self {
        Self { input: ptr::from_ref(input).cast(), input_length: length as u32, ..self }
    }

    fn output(self, output: &mut [u8]) -> Self {
        let output_length = output.len() as u32;
        Self { output: output.as_mut_ptr().cast(), output_length, ..self }
    }

    fn overlapped(self, overlapped: &mut Overlapped) -> Self {
        Self { overlapped: ptr::from_mut(&mut overlapped.0), ..self }
    }

    fn routine(self) -> Self {
        Self { routine: Some(completed), ..self }
    }

    /// Makes the call: the error code, 0 if it succeeded, and the count.
    fn make(mut self) -> (i32, u32) {
        let mut count = UNTOUCHED;
        self.count = &raw mut count;
        (self.error(), count)
    }

    /// Makes the call without a count: the error code, 0 if it succeeded.
    fn error(self) -> i32 {
        // SAFETY: every caller keeps what the pointers designate until the call has completed, or
        // gives pointers that Winsock is to refuse or to ignore.
        let status = unsafe {
            WSASetLastError(UNTOUCHED as i32);
            WSAIoctl(
                self.socket,
                self.code,
                self.input,
                self.input_length,
                self.output,
                self.output_length,
                self.count,
                self.overlapped,
                self.routine,
            )
        };
        // SAFETY: it has no precondition.
        let error = unsafe { WSAGetLastError() };
        assert_eq!(status, if error == 0 { 0 } else { -1 }, "last error {error}");
        error
    }
}

/// An OVERLAPPED without an event.
struct Overlapped(OVERLAPPED);

impl Overlapped {
    fn new() -> Self {
        let untouched = UNTOUCHED as usize;
        Self(OVERLAPPED { Internal: untouched, InternalHigh: untouched, ..OVERLAPPED::default() })
    }

    /// The status and the count that were written to it.
    fn status(&self) -> (u32, usize) {
        (self.0.Internal as u32, self.0.InternalHigh)
    }

    fn is_untouched(&self) -> bool {
        self.status() == (UNTOUCHED, UNTOUCHED as usize)
    }
}

thread_local! {
    /// The arguments of every completion routine that has run in this thread.
    static COMPLETED: Cell<Vec<(u32, u32, *mut OVERLAPPED)>> = const { Cell::new(Vec::new()) };
}

/// Notes its arguments.
///
/// # Safety
/// Asks for nothing; its type is the interface's.
unsafe extern "system" fn completed(
    error: u32,
    count: u32,
    overlapped: *mut OVERLAPPED,
    _flags: u32,
) {
    let mut all = COMPLETED.take();
    all.push((error, count, overlapped));
    COMPLETED.set(all);
}

/// Lets completion routines run: those that did, each with its error and count.
fn routines(of: &Overlapped) -> Vec<(u32, u32)> {
    // SAFETY: the routines that are queued here are `completed`.
    let woken = unsafe { SleepEx(0, 1) };
    let all = COMPLETED.take();
    assert_eq!(woken == WAIT_IO_COMPLETION, !all.is_empty());
    all.into_iter()
        .map(|(error, count, overlapped)| {
            assert!(ptr::eq(overlapped, &raw const of.0));
            (error, count)
        })
        .collect()
}

/// A completion port that a socket is bound to; closed with its owner.
struct Port(HANDLE);

impl Port {
    fn of(socket: &impl AsRawSocket) -> Self {
        // SAFETY: an open socket, no port yet.
        let port = unsafe {
            CreateIoCompletionPort(socket.as_raw_socket() as HANDLE, ptr::null_mut(), 7, 0)
        };
        assert!(!port.is_null() && port != INVALID_HANDLE_VALUE);
        Self(port)
    }

    /// The next packet, if there is one: the system's error code, 0 for success, and the count.
    fn packet(&self, of: &Overlapped) -> Option<(u32, u32)> {
        let (mut count, mut key, mut overlapped) = (UNTOUCHED, 0, ptr::null_mut());
        // SAFETY: the port is open, the results are locals of the right types.
        let (done, error) = unsafe {
            let (count, key, overlapped) = (&raw mut count, &raw mut key, &raw mut overlapped);
            (GetQueuedCompletionStatus(self.0, count, key, overlapped, 100), GetLastError())
        };
        if overlapped.is_null() {
            return None;
        }
        assert!(ptr::eq(overlapped, &raw const of.0));
        assert_eq!(key, 7);
        Some((if done == FALSE { error } else { 0 }, count))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: the port is open and ours.
        unsafe { CloseHandle(self.0) };
    }
}

fn tcp() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// A socket that is neither bound nor connected.
fn fresh() -> socket2::Socket {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap()
}

/// What `SIO_KEEPALIVE_VALS` takes.
const KEEPALIVE: [u32; 3] = [1, 60_000, 1000];

#[test]
fn w13_w14_w15_a_missing_count_is_refused_before_the_code_is_looked_at() {
    let socket = tcp();
    let (mut buffer, one) = ([0; 64], 1_u32);
    for code in [&OURS[..], &UNKNOWN, &[FIONBIO as u32, SIO_ADDRESS_LIST_QUERY]].concat() {
        let call = |buffer: &mut [u8]| Call::new(&socket, code).input(&one, 4).output(buffer);
        assert_eq!(call(&mut buffer).error(), WSAEFAULT, "{code:#x}");

        let mut overlapped = Overlapped::new();
        assert_eq!(call(&mut buffer).overlapped(&mut overlapped).error(), WSAEFAULT, "{code:#x}");
        assert!(overlapped.is_untouched(), "{code:#x}");

        let call = call(&mut buffer).overlapped(&mut overlapped).routine();
        assert_eq!(call.error(), WSAEFAULT, "{code:#x}");
        assert_eq!(routines(&overlapped), [], "{code:#x}");
    }
}

#[test]
fn w16_an_unknown_code_is_not_supported() {
    let socket = tcp();
    for code in [&UNKNOWN[..], &OURS].concat() {
        let (mut buffer, input) = ([7; 64], [1_u8; 64]);
        let call = Call::new(&socket, code).input(&input, 64).output(&mut buffer);
        assert_eq!(call.make(), (WSAEOPNOTSUPP, 0), "{code:#x}");
        assert_eq!(buffer, [7; 64]);
    }
}

#[test]
fn w17_an_unknown_code_completes_at_a_port() {
    for code in [&UNKNOWN[..], &OURS].concat() {
        let socket = tcp();
        let port = Port::of(&socket);
        let mut overlapped = Overlapped::new();
        let call = Call::new(&socket, code).overlapped(&mut overlapped);
        assert_eq!(call.make(), (WSA_IO_PENDING, UNTOUCHED), "{code:#x}");
        const ERROR_NOT_SUPPORTED: u32 = 50;
        assert_eq!(port.packet(&overlapped), Some((ERROR_NOT_SUPPORTED, 0)), "{code:#x}");
        assert_eq!(overlapped.status(), (STATUS_NOT_SUPPORTED as u32, 0), "{code:#x}");
    }
}

#[test]
fn w18_an_unknown_code_completes_by_a_routine() {
    let socket = tcp();
    for code in [&UNKNOWN[..], &OURS].concat() {
        let mut overlapped = Overlapped::new();
        let call = Call::new(&socket, code).overlapped(&mut overlapped).routine();
        assert_eq!(call.make(), (WSA_IO_PENDING, UNTOUCHED), "{code:#x}");
        assert_eq!(routines(&overlapped), [(WSAEOPNOTSUPP as u32, 0)], "{code:#x}");
        assert_eq!(routines(&overlapped), [], "{code:#x}");
    }
}

#[test]
fn w19_w20_w21_w35_codes_that_set_something_return_zero_bytes() {
    let socket = tcp();
    let one = 1_u32;
    let calls = || {
        [
            Call::new(&socket, FIONBIO as u32).input(&one, 4),
            Call::new(&socket, SIO_KEEPALIVE_VALS).input(&KEEPALIVE, 12),
        ]
    };
    for call in calls() {
        assert_eq!(call.make(), (0, 0));
    }
    for call in calls() {
        let mut overlapped = Overlapped::new();
        assert_eq!(call.overlapped(&mut overlapped).routine().make().0, 0);
        assert_eq!(routines(&overlapped), [(0, 0)]);
        assert_eq!(routines(&overlapped), []);
    }
    let port = Port::of(&socket);
    for call in calls() {
        let mut overlapped = Overlapped::new();
        assert_eq!(call.overlapped(&mut overlapped).make().0, 0);
        assert_eq!(port.packet(&overlapped), Some((0, 0)));
        assert_eq!(overlapped.status(), (0, 0));
    }
}

#[test]
fn w22_w23_a_short_or_missing_input_is_a_fault_at_once() {
    let socket = tcp();
    let missing = || Call { input_length: 12, ..Call::new(&socket, SIO_KEEPALIVE_VALS) };
    let short = |length| Call::new(&socket, SIO_KEEPALIVE_VALS).input(&KEEPALIVE, length);
    for call in [missing(), short(0), short(11)] {
        assert_eq!(call.make(), (WSAEFAULT, 0));
    }
    for call in [missing(), short(11)] {
        let mut overlapped = Overlapped::new();
        assert_eq!(call.overlapped(&mut overlapped).make(), (WSAEFAULT, UNTOUCHED));
        assert!(overlapped.is_untouched());
    }
}

#[test]
fn w24_w25_a_long_input_and_a_strange_output_are_accepted() {
    let socket = tcp();
    let input = [1_u32, 0];
    assert_eq!(Call::new(&socket, FIONBIO as u32).input(&input, 5).make(), (0, 0));
    let strange = Call {
        output: ptr::without_provenance_mut(0xdead_beef),
        output_length: 4,
        ..Call::new(&socket, FIONBIO as u32).input(&input, 4)
    };
    assert_eq!(strange.make(), (0, 0));
}

#[test]
fn w26_w28_an_answer_of_winsock_itself_tells_the_needed_length() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let query = || Call::new(&socket, SIO_ADDRESS_LIST_QUERY);
    let (error, needed) = query().make();
    assert_eq!(error, WSAEFAULT);
    assert!(needed > 1 && needed != UNTOUCHED, "{needed}");
    let mut buffer = vec![7; needed as usize];
    assert_eq!(query().output(&mut buffer[..needed as usize - 1]).make(), (WSAEFAULT, needed));
    assert!(buffer.iter().all(|&byte| byte == 7));
    assert_eq!(query().output(&mut buffer[..1]).make(), (WSAEINVAL, 0));

    let mut overlapped = Overlapped::new();
    let short = query().output(&mut buffer[..needed as usize - 1]).overlapped(&mut overlapped);
    assert_eq!(short.make().0, WSAEFAULT);
    assert!(overlapped.is_untouched());

    let port = Port::of(&socket);
    let full = query().output(&mut buffer).overlapped(&mut overlapped);
    assert_eq!(full.make(), (0, needed));
    assert_eq!(port.packet(&overlapped), Some((0, 0)));
    assert!(buffer.iter().any(|&byte| byte != 7));
}

#[test]
fn w27_w29_an_answer_of_the_kernel_tells_no_length() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = Port::of(&socket);
    let query = || Call::new(&socket, SIO_GET_INTERFACE_LIST);
    let mut small = [7; 4];
    assert_eq!(query().output(&mut small).make(), (WSAEFAULT, 0));
    assert_eq!(small, [7; 4]);

    let mut overlapped = Overlapped::new();
    let call = query().output(&mut small).overlapped(&mut overlapped);
    assert_eq!(call.make(), (WSA_IO_PENDING, UNTOUCHED));
    const ERROR_INSUFFICIENT_BUFFER: u32 = 122;
    assert_eq!(port.packet(&overlapped), Some((ERROR_INSUFFICIENT_BUFFER, 0)));

    let mut buffer = [7; 16 * 1024];
    let (error, length) = query().output(&mut buffer).make();
    assert!(error == 0 && length > 0, "{error}, {length}");
    let mut overlapped = Overlapped::new();
    let call = query().output(&mut buffer).overlapped(&mut overlapped);
    assert_eq!(call.make(), (WSA_IO_PENDING, UNTOUCHED));
    assert_eq!(port.packet(&overlapped), Some((0, length)));

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut overlapped = Overlapped::new();
    let call = Call::new(&socket, SIO_GET_INTERFACE_LIST).output(&mut small);
    assert_eq!(call.overlapped(&mut overlapped).routine().make().0, WSA_IO_PENDING);
    assert_eq!(routines(&overlapped), [(WSAEFAULT as u32, 0)]);
}

#[test]
fn w30_w31_a_bad_input_fails_at_once() {
    let socket = tcp();
    let (nobody, mut function) = ([0xab_u8; 16], [0; 8]);
    let mut overlapped = Overlapped::new();
    let call = Call::new(&socket, SIO_GET_EXTENSION_FUNCTION_POINTER)
        .input(&nobody, 16)
        .output(&mut function)
        .overlapped(&mut overlapped);
    assert_eq!(call.make().0, WSAEINVAL);
    assert!(overlapped.is_untouched());
    let mut address = [0; 16];
    let call = Call::new(&socket, SIO_ROUTING_INTERFACE_QUERY).output(&mut address);
    let (error, count) = call.make();
    // An older Wine calls it a fault.
    assert!([WSAEINVAL, WSAEFAULT].contains(&error), "{error}");
    assert_eq!(count, UNTOUCHED);
}

#[test]
fn w32_w33_what_waits_would_block_or_is_aborted_with_the_socket() {
    let socket = tcp();
    socket.set_nonblocking(true).unwrap();
    assert_eq!(Call::new(&socket, SIO_ADDRESS_LIST_CHANGE).make().0, WSAEWOULDBLOCK);
    let port = Port::of(&socket);
    let mut overlapped = Overlapped::new();
    let call = Call::new(&socket, SIO_ADDRESS_LIST_CHANGE).overlapped(&mut overlapped);
    assert_eq!(call.make(), (WSA_IO_PENDING, UNTOUCHED));
    assert_eq!(port.packet(&overlapped), None);
    // SAFETY: the socket is ours, and given away.
    assert_eq!(unsafe { closesocket(socket.into_raw_socket() as SOCKET) }, 0);
    assert_eq!(port.packet(&overlapped), Some((WSA_OPERATION_ABORTED as u32, 0)));
}

#[test]
fn w34_a_code_about_connections_wants_one() {
    let mut backlog = [0; 4];
    let unconnected = fresh();
    let call = Call::new(&unconnected, SIO_IDEAL_SEND_BACKLOG_QUERY).output(&mut backlog);
    assert_eq!(call.make().0, WSAENOTCONN);
    let listener = tcp();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let call = Call::new(&client, SIO_IDEAL_SEND_BACKLOG_QUERY).output(&mut backlog);
    assert_eq!(call.make(), (0, 4));
}

#[test]
fn w36_what_is_no_socket_is_found_out() {
    let socket = fresh();
    let one = 1_u32;
    for no_socket in [SOCKET::MAX, 0, 0xdead_0000] {
        let call = |code| Call { socket: no_socket, ..Call::new(&socket, code).input(&one, 4) };
        assert_eq!(call(FIONBIO as u32).make().0, WSAENOTSOCK, "{no_socket:#x}");
        for code in OURS {
            // Wine does not look at the socket for a code that it does not know.
            let error = call(code).make().0;
            assert!([WSAENOTSOCK, WSAEOPNOTSUPP].contains(&error), "{code:#x}: {error}");
        }
    }
}

#[test]
fn w37_the_low_bit_of_the_event_keeps_a_completion_from_the_port() {
    let socket = tcp();
    let port = Port::of(&socket);
    for code in OURS {
        let mut overlapped = Overlapped::new();
        overlapped.0.hEvent = ptr::without_provenance_mut(1);
        let call = Call::new(&socket, code).overlapped(&mut overlapped);
        assert_eq!(call.make().0, WSA_IO_PENDING, "{code:#x}");
        assert_eq!(port.packet(&overlapped), None, "{code:#x}");
        assert_eq!(overlapped.status().0, STATUS_NOT_SUPPORTED as u32, "{code:#x}");
    }
}

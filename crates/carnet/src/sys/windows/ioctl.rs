//! One `WSAIoctl` that comes back (contract C59).
//!
//! A driver of the filtering platform can hold a request for as long as it likes, and a synchronous
//! call would wait with it. So the request is overlapped: it is waited for up to a limit, then
//! cancelled, and if even that does not bring it back, its memory is left to the system for ever.
//! A socket without the overlapped attribute knows only synchronous calls; those of std, socket2
//! and tokio have it.
#![expect(unsafe_code, reason = "WSAIoctl and what belongs to it are foreign functions")]

use crate::winsock::{WSAETIMEDOUT, refined};
use std::os::windows::io::{AsRawSocket, BorrowedSocket};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use windows_sys::Win32::Foundation::{FALSE, HANDLE, STATUS_PENDING, TRUE};
use windows_sys::Win32::Networking::WinSock::{
    SOCKET, WSA_INVALID_EVENT, WSA_IO_PENDING, WSA_OPERATION_ABORTED, WSA_WAIT_EVENT_0,
    WSACloseEvent, WSACreateEvent, WSAEVENT, WSAGetLastError, WSAGetOverlappedResult, WSAIoctl,
    WSAWaitForMultipleEvents,
};
use windows_sys::Win32::System::IO::{CancelIoEx, OVERLAPPED};

/// How long an answer is waited for. The system has it at hand: what takes longer is stuck.
pub(super) const LIMIT: Duration = Duration::from_secs(2);
/// How long a request that was cancelled may take to come back.
const CANCELLING: Duration = Duration::from_secs(1);

/// Makes the request and waits for its answer, which it copies to `output`: the error code if it
/// failed, [`WSAETIMEDOUT`] if it did not come back within `limit`; and the count of bytes that
/// were returned, or are needed, or 0.
pub(super) fn control(
    socket: BorrowedSocket<'_>,
    code: u32,
    input: &[u8],
    output: &mut [u8],
    limit: Duration,
) -> (Result<(), i32>, usize) {
    let event = match Event::new() {
        Ok(event) => event,
        Err(code) => return (Err(code), 0),
    };
    let request = Request::new(event, input, output.len());
    let (result, returned) = match request.start(socket, code) {
        Err(WSA_IO_PENDING) => {
            if !request.wait(limit) {
                request.cancel(socket);
                if !request.wait(CANCELLING) {
                    request.abandon();
                    return (Err(WSAETIMEDOUT), 0);
                }
            }
            request.outcome(socket)
        }
        result => (result, request.returned()),
    };
    if result.is_ok() {
        request.read(output);
    }
    (result, returned)
}

/// A request, in memory of its own that the system may write to until the request has come back.
struct Request(*mut Memory);

struct Memory {
    overlapped: OVERLAPPED,
    returned: u32,
    input: Box<[u8]>,
    output: Box<[u8]>,
    event: Event,
}

impl Request {
    fn new(event: Event, input: &[u8], room: usize) -> Self {
        let overlapped = OVERLAPPED {
            Internal: STATUS_PENDING as usize,
            // The low bit keeps the completion away from a completion port that the socket may be
            // bound to, whose owner expects only his own (W37). The wait uses the event without it.
            hEvent: event.0.map_addr(|address| address | 1),
            ..OVERLAPPED::default()
        };
        Self(Box::into_raw(Box::new(Memory {
            overlapped,
            returned: 0,
            input: input.into(),
            output: vec![0; room].into(),
            event,
        })))
    }

    /// Calls `WSAIoctl`: its error code if it failed or is pending.
    fn start(&self, socket: BorrowedSocket<'_>, code: u32) -> Result<(), i32> {
        // SAFETY: the memory is there as long as `self`, and nothing refers to it now; pointers to
        // the contents of both boxes stay valid.
        let Memory { overlapped, returned, input, output, .. } = unsafe { &mut *self.0 };
        let overlapped: *mut OVERLAPPED = overlapped;
        let from = if input.is_empty() { ptr::null() } else { input.as_ptr() };
        let to = if output.is_empty() { ptr::null_mut() } else { output.as_mut_ptr() };
        let length = |buffer: &[u8]| u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        // SAFETY: the socket is open while it is borrowed. Both buffers are valid for their lengths
        // (one that does not fit is cut) or null with length 0. They, the count and the OVERLAPPED
        // stay where they are until the request has come back: `drop` is reached only then,
        // `abandon` otherwise.
        let status = unsafe {
            WSAIoctl(
                raw(socket),
                code,
                from.cast(),
                length(input),
                to.cast(),
                length(output),
                returned,
                overlapped,
                None,
            )
        };
        if status == 0 { Ok(()) } else { Err(last_error()) }
    }

    /// Waits until the request has come back; false if it has not within `limit`.
    fn wait(&self, limit: Duration) -> bool {
        // Wine leaves the event alone when it refuses a code.
        if self.has_come_back() {
            return true;
        }
        // SAFETY: the memory is there as long as `self`; the system does not write to this field.
        let event: HANDLE = unsafe { (&raw const (*self.0).event.0).read() };
        let limit = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX - 1);
        // SAFETY: one event, which is open. Not alertable: no routine of the caller's may run here.
        let ended = unsafe { WSAWaitForMultipleEvents(1, &raw const event, FALSE, limit, FALSE) };
        ended == WSA_WAIT_EVENT_0 as u32 || self.has_come_back()
    }

    /// Whether the system has written the final status, which is the last thing it writes.
    fn has_come_back(&self) -> bool {
        // SAFETY: the memory is there as long as `self`, the field is aligned, and while the system
        // may write to it, it is read in this way only.
        let status = unsafe { AtomicUsize::from_ptr(&raw mut (*self.0).overlapped.Internal) };
        status.load(Ordering::Acquire) != STATUS_PENDING as usize
    }

    /// Asks the system to let go of the request. It fails if the request has just come back.
    fn cancel(&self, socket: BorrowedSocket<'_>) {
        // SAFETY: the socket is open, and the request was started on it with this OVERLAPPED.
        unsafe { CancelIoEx(raw(socket) as HANDLE, &raw const (*self.0).overlapped) };
    }

    /// The result of a request that has come back, and its count of bytes.
    fn outcome(&self, socket: BorrowedSocket<'_>) -> (Result<(), i32>, usize) {
        let (mut count, mut flags) = (0, 0);
        // SAFETY: the socket is open; the request has come back, so the system writes to its
        // OVERLAPPED no more; both results are locals of the right types.
        let done = unsafe {
            let overlapped = &raw const (*self.0).overlapped;
            WSAGetOverlappedResult(raw(socket), overlapped, &raw mut count, FALSE, &raw mut flags)
        };
        if done == TRUE {
            return (Ok(()), count as usize);
        }
        let code = match last_error() {
            // Nobody else cancels it, as the socket is not closed while it is borrowed.
            WSA_OPERATION_ABORTED => WSAETIMEDOUT,
            code => code,
        };
        // SAFETY: as above.
        let overlapped = unsafe { &(*self.0).overlapped };
        (Err(refined(code, overlapped.Internal as u32)), overlapped.InternalHigh)
    }

    /// The count of returned bytes of a request that came back at once.
    fn returned(&self) -> usize {
        // SAFETY: the memory is there as long as `self`; the request has come back.
        unsafe { (*self.0).returned as usize }
    }

    /// Copies what the system has written.
    fn read(&self, output: &mut [u8]) {
        // SAFETY: as for `returned`.
        let written = unsafe { &(*self.0).output };
        output.copy_from_slice(written);
    }

    /// Leaves the memory to the system, which may still write to it.
    fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // SAFETY: it came out of a box, and the request has come back or was never started.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// An event that is reset by hand; closed with its owner.
struct Event(HANDLE);

impl Event {
    fn new() -> Result<Self, i32> {
        // SAFETY: it has no precondition.
        let event = unsafe { WSACreateEvent() };
        if event == WSA_INVALID_EVENT { Err(last_error()) } else { Ok(Self(event as HANDLE)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is ours and open.
        unsafe { WSACloseEvent(self.0 as WSAEVENT) };
    }
}

/// The code of this thread's last failed call to Winsock.
pub(super) fn last_error() -> i32 {
    // SAFETY: it has no precondition.
    unsafe { WSAGetLastError() }
}

pub(super) fn raw(socket: BorrowedSocket<'_>) -> SOCKET {
    socket.as_raw_socket() as SOCKET
}

/// Against the Winsock that is there: real Windows, or Wine's.
#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};
    use std::os::windows::io::AsSocket;
    use windows_sys::Win32::Networking::WinSock::{
        FIONBIO, SIO_ADDRESS_LIST_CHANGE, SIO_ADDRESS_LIST_QUERY, WSAEOPNOTSUPP,
    };

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(60);
    /// It goes to the kernel, unlike `SIO_ADDRESS_LIST_QUERY`, which Winsock answers itself.
    const SIO_GET_INTERFACE_LIST: u32 = 0x4004_747F;
    /// A code of the vendor family that nobody has.
    const UNKNOWN: u32 = 0x9800_0FFF;

    #[test]
    fn a_request_that_never_comes_back_is_cancelled() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // It is pending until the addresses of this machine change.
        for _ in 0..3 {
            let limit = Duration::from_millis(20);
            let (result, returned) =
                control(listener.as_socket(), SIO_ADDRESS_LIST_CHANGE, &[], &mut [], limit);
            assert_eq!((result, returned), (Err(WSAETIMEDOUT), 0));
        }
        // Nothing of it is left on the socket.
        let socket = listener.as_socket();
        let answer = control(socket, FIONBIO as u32, &1_u32.to_ne_bytes(), &mut [], LONG);
        assert_eq!(answer, (Ok(()), 0));
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn cancelling_brings_a_request_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = listener.as_socket();
        let request = Request::new(Event::new().unwrap(), &[], 0);
        assert_eq!(request.start(socket, SIO_ADDRESS_LIST_CHANGE), Err(WSA_IO_PENDING));
        assert!(!request.wait(Duration::from_millis(20)));
        request.cancel(socket);
        assert!(request.wait(LONG));
        assert_eq!(request.outcome(socket).0, Err(WSAETIMEDOUT));
    }

    #[test]
    fn the_memory_of_an_abandoned_request_can_still_be_written_to() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let request = Request::new(Event::new().unwrap(), &[], 64);
        let memory = request.0;
        assert_eq!(
            request.start(listener.as_socket(), SIO_ADDRESS_LIST_CHANGE),
            Err(WSA_IO_PENDING)
        );
        request.abandon();
        // The end of the socket brings it back, now that nobody waits for it.
        drop(listener);
        let abandoned = std::mem::ManuallyDrop::new(Request(memory));
        assert!(abandoned.wait(LONG));
    }

    #[test]
    fn answers_are_copied_and_counted() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for code in [SIO_ADDRESS_LIST_QUERY, SIO_GET_INTERFACE_LIST] {
            let mut buffer = [0; 16 * 1024];
            let (result, returned) = control(socket.as_socket(), code, &[], &mut buffer, LONG);
            assert_eq!(result, Ok(()), "{code:#x}");
            assert!(returned > 0 && returned <= buffer.len(), "{code:#x}: {returned}");
            assert!(buffer[..returned].iter().any(|&byte| byte != 0), "{code:#x}");
            assert!(buffer[returned..].iter().all(|&byte| byte == 0), "{code:#x}");
        }
    }

    #[test]
    fn a_short_buffer_is_refused_and_left_alone() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for code in [SIO_ADDRESS_LIST_QUERY, SIO_GET_INTERFACE_LIST] {
            let mut buffer = [7; 4];
            let (result, _) = control(socket.as_socket(), code, &[], &mut buffer, LONG);
            let attempt = crate::winsock::query_outcome(
                crate::Operation::QueryRedirectRecords,
                result,
                0,
                buffer.len(),
            );
            assert!(matches!(attempt, Ok(crate::growth::Attempt::TooSmall { .. })), "{code:#x}");
            assert_eq!(buffer, [7; 4], "{code:#x}");
        }
    }

    #[test]
    fn an_unknown_code_is_not_supported() {
        let socket = TcpListener::bind("[::1]:0").unwrap();
        let (result, returned) = control(socket.as_socket(), UNKNOWN, &[1], &mut [0; 8], LONG);
        assert_eq!((result, returned), (Err(WSAEOPNOTSUPP), 0));
    }
}

//! Tests of the exported functions, on real sockets without an engine: what reaches the kernel is
//! answered with `WSAENETDOWN` (contract S35). Against the engine: `tests/contract`.
#![expect(unsafe_code, reason = "the functions under test are C's")]

mod arguments;
mod functions;
mod messages;
mod overlapped;
mod stress;
mod waits;

use crate::ffi::*;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

const QUERY_RECORDS: u32 = 0x9800_00DC;
const QUERY_CONTEXT: u32 = 0x9800_00DD;
const SET_RECORDS: u32 = 0x9800_00DE;
const FLUSH: u32 = 0x2800_0004;
const UNKNOWN: u32 = 0xdead_beef;

const UNTOUCHED: u32 = 0xdead_beef;
const PENDING: usize = 0x103;
const CANCELLED: usize = 0xC000_0120;
/// What the kernel's "no such option" becomes (S35).
const NO_ENGINE: usize = 0xC000_000E;

fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let mut data = [0_u64; 51];
        // SAFETY: the size of a WSADATA.
        assert_eq!(unsafe { WSAStartup(0x0202, data.as_mut_ptr().cast()) }, 0);
    });
}

/// For tests whose calls wait: an interruption is for all waiting calls of the process.
fn waiting() -> MutexGuard<'static, ()> {
    static WAITING: Mutex<()> = Mutex::new(());
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that is closed at the end.
#[derive(Debug)]
struct Owned(usize);

impl Owned {
    fn of(family: i32, kind: i32, flags: u32) -> Self {
        start();
        let socket = WSASocketW(family, kind, 0, null_mut(), 0, flags);
        assert_ne!(socket, usize::MAX, "error {}", WSAGetLastError());
        Self(socket)
    }

    fn overlapped() -> Self {
        Self::of(libc::AF_INET, libc::SOCK_STREAM, 1)
    }

    fn plain() -> Self {
        Self::of(libc::AF_INET, libc::SOCK_STREAM, 0)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        closesocket(self.0);
    }
}

/// An event that is closed at the end.
struct OwnedEvent(*mut c_void);

impl OwnedEvent {
    fn new() -> Self {
        start();
        let event = WSACreateEvent();
        assert!(!event.is_null());
        Self(event)
    }

    fn wait(&self, milliseconds: u32) -> u32 {
        wait(&[self.0], false, milliseconds, false)
    }
}

impl Drop for OwnedEvent {
    fn drop(&mut self) {
        assert_eq!(WSACloseEvent(self.0), 1);
    }
}

fn wait(events: &[*mut c_void], all: bool, milliseconds: u32, alertable: bool) -> u32 {
    let (all, alertable) = (i32::from(all), i32::from(alertable));
    WSAWaitForMultipleEvents(events.len() as u32, events.as_ptr(), all, milliseconds, alertable)
}

/// A `WSAOVERLAPPED`, followed by what its routine notes.
#[repr(C)]
#[derive(Debug, Default)]
struct Operation {
    status: AtomicUsize,
    bytes: AtomicUsize,
    flags: AtomicU32,
    error: AtomicU32,
    event: AtomicUsize,
    calls: AtomicU32,
    routine_error: AtomicU32,
    routine_bytes: AtomicU32,
    routine_thread: AtomicU32,
}

impl Operation {
    fn new() -> Box<Self> {
        Box::default()
    }

    fn with_event(event: &OwnedEvent) -> Box<Self> {
        let operation = Self::new();
        operation.event.store(event.0.expose_provenance(), Ordering::Relaxed);
        operation
    }

    fn pointer(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    fn status(&self) -> usize {
        self.status.load(Ordering::Acquire)
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }

    fn routine_error(&self) -> u32 {
        self.routine_error.load(Ordering::Relaxed)
    }

    fn untouched(&self) -> bool {
        self.status() == 0 && self.bytes.load(Ordering::Relaxed) == 0 && self.calls() == 0
    }

    /// What the result call says, without waiting: the bytes or the error.
    fn result(&self, socket: &Owned, wait: bool) -> Result<u32, i32> {
        let (mut bytes, mut flags) = (UNTOUCHED, UNTOUCHED);
        let (bytes, flags) = (&raw mut bytes, &raw mut flags);
        // SAFETY: all three are valid.
        unsafe {
            match WSAGetOverlappedResult(socket.0, self.pointer(), bytes, i32::from(wait), flags) {
                0 => {
                    assert_eq!(*bytes, UNTOUCHED, "W39");
                    Err(WSAGetLastError())
                }
                _ => Ok(*bytes),
            }
        }
    }
}

fn thread_id() -> u32 {
    // SAFETY: no preconditions.
    unsafe { libc::gettid() }.cast_unsigned()
}

/// The completion routine of all [`Operation`]s.
///
/// # Safety
/// `overlapped` is an [`Operation`] that is kept until the call returns.
unsafe extern "C" fn note(error: u32, bytes: u32, overlapped: *mut c_void, flags: u32) {
    assert_eq!(flags, 0);
    // SAFETY: every operation with this routine is one of these, and is kept until it is complete.
    let operation = unsafe { &*overlapped.cast::<Operation>() };
    operation.routine_error.store(error, Ordering::Relaxed);
    operation.routine_bytes.store(bytes, Ordering::Relaxed);
    operation.routine_thread.store(thread_id(), Ordering::Relaxed);
    operation.calls.fetch_add(1, Ordering::Relaxed);
}

const ROUTINE: LPWSAOVERLAPPED_COMPLETION_ROUTINE = Some(note);

/// The arguments of a call of either entry point.
#[derive(Clone, Copy, Debug)]
struct Arguments {
    socket: usize,
    code: u32,
    input: (*mut c_void, u32),
    output: (*mut c_void, u32),
    returned: *mut u32,
    overlapped: *mut c_void,
    routine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
    thread: *mut c_void,
}

impl Arguments {
    fn new(socket: &Owned, code: u32) -> Self {
        Self {
            socket: socket.0,
            code,
            input: (null_mut(), 0),
            output: (null_mut(), 0),
            returned: null_mut(),
            overlapped: null_mut(),
            routine: None,
            thread: null_mut(),
        }
    }

    fn input(self, bytes: &[u8]) -> Self {
        Self { input: (bytes.as_ptr().cast_mut().cast(), bytes.len() as u32), ..self }
    }

    fn output(self, bytes: &mut [u8]) -> Self {
        Self { output: (bytes.as_mut_ptr().cast(), bytes.len() as u32), ..self }
    }

    fn overlapped(self, operation: &Operation) -> Self {
        Self { overlapped: operation.pointer(), ..self }
    }

    fn routine(self) -> Self {
        Self { routine: ROUTINE, ..self }
    }

    /// `WSAIoctl`: the error, 0 for a success.
    ///
    /// # Safety
    /// What there is at the addresses may be written, until an overlapped operation is complete.
    unsafe fn application(self) -> i32 {
        let Self { socket, code, input, output, returned, overlapped, routine, .. } = self;
        WSASetLastError(4711);
        // SAFETY: by the contract of this function.
        let status = unsafe {
            WSAIoctl(
                socket, code, input.0, input.1, output.0, output.1, returned, overlapped, routine,
            )
        };
        let error = WSAGetLastError();
        assert_eq!(status, if error == 0 { 0 } else { -1 }, "error {error}");
        error
    }

    /// `WSPIoctl`: the error, 0 for a success.
    ///
    /// # Safety
    /// As of [`Self::application`].
    unsafe fn provider(self) -> i32 {
        let Self { socket, code, input, output, returned, overlapped, routine, thread } = self;
        let mut error = 0;
        WSASetLastError(4711);
        // SAFETY: by the contract of this function.
        let status = unsafe {
            WSPIoctl(
                socket,
                code,
                input.0,
                input.1,
                output.0,
                output.1,
                returned,
                overlapped,
                routine,
                thread,
                &raw mut error,
            )
        };
        assert_eq!(WSAGetLastError(), 4711, "S25");
        assert_eq!(status, if error == 0 { 0 } else { -1 }, "error {error}");
        error
    }

    /// A call that waits, through both entry points: the error and the count of returned bytes.
    fn both(self) -> (i32, u32) {
        let mut counts = [UNTOUCHED; 2];
        let [first, second] = &mut counts;
        // SAFETY: the callers give memory of their own, or addresses without memory.
        let errors = unsafe {
            [
                Self { returned: first, ..self }.application(),
                Self { returned: second, ..self }.provider(),
            ]
        };
        assert_eq!(errors[0], errors[1], "both entry points, {self:?}");
        assert_eq!(counts[0], counts[1], "both entry points, {self:?}");
        (errors[0], counts[0])
    }

    /// An overlapped call: the error and the count of returned bytes.
    fn begin(self) -> (i32, u32) {
        let mut count = UNTOUCHED;
        // SAFETY: as above; the count is not written later (W4).
        let error = unsafe { Self { returned: &raw mut count, ..self }.application() };
        (error, count)
    }
}

/// A UDP or TCP address of this machine, with the port of a bound socket.
fn local_address(socket: &Owned) -> libc::sockaddr_in {
    // SAFETY: zero is a valid value of every field.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_in>() as i32;
    // SAFETY: as long as said.
    let status =
        unsafe { carnet_winsock_getsockname(socket.0, (&raw mut address).cast(), &raw mut length) };
    assert_eq!(status, 0);
    address
}

fn bind_to_loopback(socket: &Owned) -> libc::sockaddr_in {
    // SAFETY: zero is a valid value of every field.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    let length = size_of::<libc::sockaddr_in>() as i32;
    // SAFETY: as long as said.
    assert_eq!(unsafe { carnet_winsock_bind(socket.0, (&raw const address).cast(), length) }, 0);
    local_address(socket)
}

/// Both ends of a connection, and its listener.
fn connected() -> [Owned; 3] {
    let listener = Owned::overlapped();
    let address = bind_to_loopback(&listener);
    assert_eq!(carnet_winsock_listen(listener.0, 5), 0);
    let client = Owned::overlapped();
    let length = size_of::<libc::sockaddr_in>() as i32;
    // SAFETY: as long as said.
    let status = unsafe { carnet_winsock_connect(client.0, (&raw const address).cast(), length) };
    assert_eq!(status, 0, "error {}", WSAGetLastError());
    // SAFETY: no address is asked for.
    let accepted = unsafe { carnet_winsock_accept(listener.0, null_mut(), null_mut()) };
    [client, Owned(accepted), listener]
}

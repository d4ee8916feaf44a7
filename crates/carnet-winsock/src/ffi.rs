//! What the library exports: one function for each prototype of the headers in `include/`. They turn
//! arguments and results; the rest is elsewhere.
//!
//! Every function survives any values: addresses are looked at by the kernel or through `memory`, so
//! that where there is no memory the answer is `WSAEFAULT`. What the caller vouches for is that where
//! there is memory, it is the memory that it means.
#![expect(unsafe_code, reason = "the C interface")]
#![expect(non_snake_case, reason = "the names are Windows'")]
#![expect(non_camel_case_types, reason = "the names are Windows'")]

use crate::bsd::{self, Address};
use crate::completion::publish;
use crate::contract::{status_of_error, wsa};
use crate::events::Event;
use crate::ioctl::{self, Call, Target};
use crate::memory::{CallerPtr, Fault, Overlapped};
use crate::process::process;
use crate::thread::{self, Apc, CompletionRoutine, UserApc};
use crate::{message, operation, options, wait};
use std::ffi::{c_char, c_int, c_long, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `LPWSAOVERLAPPED_COMPLETION_ROUTINE`.
pub type LPWSAOVERLAPPED_COMPLETION_ROUTINE = Option<CompletionRoutine>;
/// `LPWSAUSERAPC`.
pub type LPWSAUSERAPC = Option<UserApc>;

const SOCKET_ERROR: c_int = -1;
const INVALID_SOCKET: usize = usize::MAX;

fn at<T>(address: *const T) -> CallerPtr {
    // SAFETY: an argument of an exported function, given for what the function does with it.
    unsafe { CallerPtr::new(address.expose_provenance()) }
}

/// Sets the thread's last error, also to "none" (contract W35), and gives the value or the other.
fn report<T>(result: Result<T, i32>, failed: T) -> T {
    match result {
        Ok(value) => {
            thread::set_last_error(0);
            value
        }
        Err(error) => {
            thread::set_last_error(error);
            failed
        }
    }
}

fn int(result: Result<(), i32>) -> c_int {
    report(result.map(|()| 0), SOCKET_ERROR)
}

/// A Windows `BOOL`.
fn bool(result: Result<(), i32>) -> c_int {
    report(result.map(|()| 1), 0)
}

/// For functions of the provider's side, which leave the thread's last error alone (contract S25,
/// W48).
fn provider(result: Result<(), i32>, lpErrno: *mut c_int) -> c_int {
    let Err(error) = result else {
        return 0;
    };
    // A bad address leaves nowhere to say so.
    let _ = at(lpErrno).write_u32(error.cast_unsigned());
    SOCKET_ERROR
}

fn started() -> Result<(), i32> {
    if process().is_started() { Ok(()) } else { Err(wsa::NOTINITIALISED) }
}

// ---- Starting and ending -----------------------------------------------------------------------

/// Begins the use of the library; to be called before everything else, and as often as
/// [`WSACleanup`].
///
/// Returns 0, `WSAVERNOTSUPPORTED` (a version below 1), `WSAEFAULT`.
///
/// # Safety
/// `lpWSAData` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WSAStartup(wVersionRequested: u16, lpWSAData: *mut c_void) -> c_int {
    let (major, minor) = (wVersionRequested & 0xff, wVersionRequested >> 8);
    if major == 0 {
        return wsa::VERNOTSUPPORTED;
    }
    let version: u16 = if (major, minor) >= (2, 2) { 0x0202 } else { wVersionRequested };
    let description = b"Windows Sockets on Carnet";
    let mut data = [0_u8; 408];
    data[0..2].copy_from_slice(&version.to_ne_bytes());
    data[2..4].copy_from_slice(&0x0202_u16.to_ne_bytes());
    data[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    data[6..8].copy_from_slice(&u16::MAX.to_ne_bytes());
    data[16..16 + description.len()].copy_from_slice(description);
    data[16 + 257..][..7].copy_from_slice(b"Running");
    if at(lpWSAData).write(&data).is_err() {
        return wsa::EFAULT;
    }
    process().startups.fetch_add(1, Ordering::Relaxed);
    0
}

/// Ends one use. The last one cancels what pends; sockets stay open.
///
/// Fails with `WSANOTINITIALISED`.
#[unsafe(no_mangle)]
pub extern "C" fn WSACleanup() -> c_int {
    let startups = &process().startups;
    let before = startups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
    if before == Ok(1) {
        operation::cancel_all();
        process().executor.stop();
        // What another thread began meanwhile.
        operation::cancel_all();
    }
    int(before.map(|_| ()).map_err(|_| wsa::NOTINITIALISED))
}

/// The error of the thread's last call, 0 after one that succeeded.
#[unsafe(no_mangle)]
pub extern "C" fn WSAGetLastError() -> c_int {
    thread::last_error()
}

/// Sets what [`WSAGetLastError`] returns in this thread.
#[unsafe(no_mangle)]
pub extern "C" fn WSASetLastError(iError: c_int) {
    thread::set_last_error(iError);
}

/// [`WSAGetLastError`], as an unsigned number.
#[unsafe(no_mangle)]
pub extern "C" fn GetLastError() -> u32 {
    thread::last_error().cast_unsigned()
}

/// [`WSASetLastError`], of an unsigned number.
#[unsafe(no_mangle)]
pub extern "C" fn SetLastError(dwErrCode: u32) {
    thread::set_last_error(dwErrCode.cast_signed());
}

// ---- Control codes -----------------------------------------------------------------------------

/// Carries out a control code on a socket; see `docs/winsock.md`.
///
/// # Safety
/// What the code writes to may be written, until the operation has completed; the routine may be
/// called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WSAIoctl(
    s: usize,
    dwIoControlCode: u32,
    lpvInBuffer: *mut c_void,
    cbInBuffer: u32,
    lpvOutBuffer: *mut c_void,
    cbOutBuffer: u32,
    lpcbBytesReturned: *mut u32,
    lpOverlapped: *mut c_void,
    lpCompletionRoutine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
) -> c_int {
    let call = Call {
        socket: s,
        code: dwIoControlCode,
        input: at(lpvInBuffer),
        input_length: cbInBuffer,
        output: at(lpvOutBuffer),
        output_length: cbOutBuffer,
        returned: at(lpcbBytesReturned),
        overlapped: at(lpOverlapped),
        routine: lpCompletionRoutine,
    };
    int(ioctl::ioctl(&call, Target::Caller))
}

/// [`WSAIoctl`], with the thread in which the routine is to run, and the error in `*lpErrno`.
///
/// # Safety
/// What the code writes to may be written, until the operation has completed; the routine may be
/// called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WSPIoctl(
    s: usize,
    dwIoControlCode: u32,
    lpvInBuffer: *mut c_void,
    cbInBuffer: u32,
    lpvOutBuffer: *mut c_void,
    cbOutBuffer: u32,
    lpcbBytesReturned: *mut u32,
    lpOverlapped: *mut c_void,
    lpCompletionRoutine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
    lpThreadId: *mut c_void,
    lpErrno: *mut c_int,
) -> c_int {
    let call = Call {
        socket: s,
        code: dwIoControlCode,
        input: at(lpvInBuffer),
        input_length: cbInBuffer,
        output: at(lpvOutBuffer),
        output_length: cbOutBuffer,
        returned: at(lpcbBytesReturned),
        overlapped: at(lpOverlapped),
        routine: lpCompletionRoutine,
    };
    provider(ioctl::ioctl(&call, Target::Named(at(lpThreadId))), lpErrno)
}

/// `FIONBIO` and `FIONREAD`, with the `u_long` at `argp`.
///
/// # Safety
/// `argp` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctlsocket(s: usize, cmd: c_long, argp: *mut u32) -> c_int {
    // 32 bits on Windows, where FIONBIO is negative.
    int(bsd::ioctl(s, cmd as u32, at(argp)))
}

// ---- Overlapped operations ---------------------------------------------------------------------

/// The result of an overlapped operation; waits for it if asked to, not alertably.
///
/// Fails with the error of the operation, `WSA_IO_INCOMPLETE`, `WSA_INVALID_HANDLE` (no event to
/// wait for), `WSAEFAULT`, `WSAENOTSOCK`, `WSANOTINITIALISED`.
///
/// # Safety
/// `lpcbTransfer` and `lpdwFlags` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WSAGetOverlappedResult(
    s: usize,
    lpOverlapped: *mut c_void,
    lpcbTransfer: *mut u32,
    fWait: c_int,
    lpdwFlags: *mut u32,
) -> c_int {
    let result = started().and_then(|()| {
        process().sockets.find(s)?;
        let (transfer, flags) = (at(lpcbTransfer), at(lpdwFlags));
        transfer.check_writable(4).and_then(|()| flags.check_writable(4)).map_err(fault)?;
        let (bytes, found) = wait::overlapped_result(s, at(lpOverlapped), fWait != 0)?;
        transfer.write_u32(bytes).and_then(|()| flags.write_u32(found)).map_err(fault)
    });
    bool(result)
}

fn fault(Fault: Fault) -> i32 {
    wsa::EFAULT
}

/// Cancels what the calling thread began on a socket. No error if there is nothing.
#[unsafe(no_mangle)]
pub extern "C" fn CancelIo(hFile: *mut c_void) -> c_int {
    bool(started().and_then(|()| {
        operation::cancel_own(process().sockets.find(hFile.expose_provenance())?);
        Ok(())
    }))
}

/// Cancels the operation with this structure, or (null) all of a socket; `ERROR_NOT_FOUND` if there
/// is none.
#[unsafe(no_mangle)]
pub extern "C" fn CancelIoEx(hFile: *mut c_void, lpOverlapped: *mut c_void) -> c_int {
    bool(started().and_then(|()| {
        let socket = process().sockets.find(hFile.expose_provenance())?;
        let any = if lpOverlapped.is_null() {
            operation::cancel_of_socket(socket)
        } else {
            operation::cancel_one(socket, at(lpOverlapped))
        };
        if any { Ok(()) } else { Err(wsa::NOT_FOUND) }
    }))
}

/// Ends the calls of the process that wait (`select`, and control codes) with `WSAEINTR`;
/// `WSAEINVAL` if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn WSACancelBlockingCall() -> c_int {
    int(started().and_then(
        |()| {
            if process().blocking.cancel() { Ok(()) } else { Err(wsa::EINVAL) }
        },
    ))
}

/// Whether there is a call that [`WSACancelBlockingCall`] would end.
#[unsafe(no_mangle)]
pub extern "C" fn WSAIsBlocking() -> c_int {
    c_int::from(process().blocking.any())
}

// ---- Events and waits --------------------------------------------------------------------------

/// A new event, not signalled; null with `WSAENOBUFS` or `WSANOTINITIALISED`.
#[unsafe(no_mangle)]
pub extern "C" fn WSACreateEvent() -> *mut c_void {
    let result = started().and_then(|()| {
        let event = Event::new().map_err(|_| wsa::ENOBUFS)?;
        Ok(process().events.open(Arc::new(event)))
    });
    std::ptr::without_provenance_mut(report(result, 0))
}

fn with_event(handle: *mut c_void, what: impl FnOnce(&Event)) -> c_int {
    bool(started().and_then(|()| {
        let event = process().events.get(handle.expose_provenance()).ok_or(wsa::INVALID_HANDLE)?;
        what(&event);
        Ok(())
    }))
}

/// Signals an event; `WSA_INVALID_HANDLE` if it is none.
#[unsafe(no_mangle)]
pub extern "C" fn WSASetEvent(hEvent: *mut c_void) -> c_int {
    with_event(hEvent, Event::set)
}

/// Takes the signal back; `WSA_INVALID_HANDLE` if it is no event.
#[unsafe(no_mangle)]
pub extern "C" fn WSAResetEvent(hEvent: *mut c_void) -> c_int {
    with_event(hEvent, Event::reset)
}

/// Closes an event; whoever waits for it goes on waiting. `WSA_INVALID_HANDLE` if it is none.
#[unsafe(no_mangle)]
pub extern "C" fn WSACloseEvent(hEvent: *mut c_void) -> c_int {
    bool(started().and_then(|()| {
        let closed = process().events.close(hEvent.expose_provenance());
        if closed { Ok(()) } else { Err(wsa::INVALID_HANDLE) }
    }))
}

/// Waits for one or all of at most 64 events, and if alertable for completion routines.
///
/// Returns `WSA_WAIT_EVENT_0` and the number of the event, `WSA_WAIT_IO_COMPLETION`,
/// `WSA_WAIT_TIMEOUT`, or `WSA_WAIT_FAILED` with `WSA_INVALID_PARAMETER` (none, too many, or one twice
/// of all), `WSA_INVALID_HANDLE`, `WSAEFAULT`, `WSANOTINITIALISED`.
#[unsafe(no_mangle)]
pub extern "C" fn WSAWaitForMultipleEvents(
    cEvents: u32,
    lphEvents: *const *mut c_void,
    fWaitAll: c_int,
    dwTimeout: u32,
    fAlertable: c_int,
) -> u32 {
    let waited =
        wait::wait_for_events(cEvents, at(lphEvents), fWaitAll != 0, dwTimeout, fAlertable != 0);
    report(waited, u32::MAX)
}

/// Sleeps so many milliseconds.
#[unsafe(no_mangle)]
pub extern "C" fn Sleep(dwMilliseconds: u32) {
    wait::sleep(dwMilliseconds, false);
}

/// Sleeps, and if alertable runs completion routines: then `WAIT_IO_COMPLETION`, else 0.
#[unsafe(no_mangle)]
pub extern "C" fn SleepEx(dwMilliseconds: u32, bAlertable: c_int) -> u32 {
    wait::sleep(dwMilliseconds, bAlertable != 0)
}

// ---- The provider's side -----------------------------------------------------------------------

/// Names the calling thread, until [`WPUCloseThread`]. Fails with `WSAEFAULT`, `WSAENOBUFS`.
///
/// # Safety
/// `lpThreadId` and `lpErrno` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WPUOpenCurrentThread(
    lpThreadId: *mut c_void,
    lpErrno: *mut c_int,
) -> c_int {
    let result = at(lpThreadId).check_writable(16).map_err(fault).and_then(|()| {
        let handle = process().threads.open(thread::queue()?);
        let mut id = [0; 16];
        id[..8].copy_from_slice(&handle.to_ne_bytes());
        at(lpThreadId).write(&id).map_err(fault)
    });
    provider(result, lpErrno)
}

/// Ends the use of a name; `WSAEFAULT` if it is none.
///
/// # Safety
/// `lpErrno` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WPUCloseThread(lpThreadId: *mut c_void, lpErrno: *mut c_int) -> c_int {
    let result = at(lpThreadId)
        .read_usize()
        .map_err(fault)
        .and_then(|handle| if process().threads.close(handle) { Ok(()) } else { Err(wsa::EFAULT) });
    provider(result, lpErrno)
}

/// Has a function called in a thread's next alertable wait. Any thread may ask. `WSAEFAULT` if the
/// name is none, or the thread has exited.
///
/// # Safety
/// The function may be called; `lpErrno` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WPUQueueApc(
    lpThreadId: *mut c_void,
    lpfnUserApc: LPWSAUSERAPC,
    dwContext: usize,
    lpErrno: *mut c_int,
) -> c_int {
    let result = lpfnUserApc.ok_or(wsa::EFAULT).and_then(|function| {
        let queue = ioctl::thread_of(at(lpThreadId)).ok_or(wsa::EFAULT)?;
        queue.push(Apc::User { function, context: dwContext }).map_err(|_| wsa::EFAULT)
    });
    provider(result, lpErrno)
}

/// Stores a result in an overlapped structure and signals its event. Fails with `WSAENOTSOCK`,
/// `WSAEFAULT`.
///
/// # Safety
/// `lpOverlapped` and `lpErrno` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WPUCompleteOverlappedRequest(
    s: usize,
    lpOverlapped: *mut c_void,
    dwError: u32,
    cbTransferred: u32,
    lpErrno: *mut c_int,
) -> c_int {
    let result = process().sockets.find(s).and_then(|_| {
        let overlapped = Overlapped(at(lpOverlapped));
        let error = dwError.cast_signed();
        let event = overlapped.event().map_err(fault)?;
        publish(&overlapped, status_of_error(error), cbTransferred, error).map_err(fault)?;
        if let Some(event) = process().events.get(event & !1) {
            event.set();
        }
        Ok(())
    });
    provider(result, lpErrno)
}

// ---- Messages ----------------------------------------------------------------------------------

/// Receives a message with its ancillary data. Overlapped, which is for datagrams of IPv4 and IPv6
/// (`WSAEOPNOTSUPP`): at once, or later (`WSA_IO_PENDING`); see `docs/winsock.md`.
///
/// # Safety
/// The message, its buffers and `lpdwNumberOfBytesRecvd` may be written, all but the last until an
/// overlapped operation has completed; the routine may be called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WSARecvMsg(
    s: usize,
    lpMsg: *mut c_void,
    lpdwNumberOfBytesRecvd: *mut u32,
    lpOverlapped: *mut c_void,
    lpCompletionRoutine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
) -> c_int {
    int(message::receive(&message::Call {
        socket: s,
        message: at(lpMsg),
        count: at(lpdwNumberOfBytesRecvd),
        overlapped: at(lpOverlapped),
        routine: lpCompletionRoutine,
    }))
}

/// Sends a message with its ancillary data. Overlapped, which is for datagrams of IPv4 and IPv6
/// (`WSAEOPNOTSUPP`): at once, or later (`WSA_IO_PENDING`); see `docs/winsock.md`.
///
/// # Safety
/// `lpNumberOfBytesSent` may be written; the message's buffers stay until an overlapped operation
/// has completed; the routine may be called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn WSASendMsg(
    Handle: usize,
    lpMsg: *mut c_void,
    dwFlags: u32,
    lpNumberOfBytesSent: *mut u32,
    lpOverlapped: *mut c_void,
    lpCompletionRoutine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
) -> c_int {
    let call = message::Call {
        socket: Handle,
        message: at(lpMsg),
        count: at(lpNumberOfBytesSent),
        overlapped: at(lpOverlapped),
        routine: lpCompletionRoutine,
    };
    int(message::send(&call, dwFlags))
}

// ---- Sockets -----------------------------------------------------------------------------------

fn new_socket(
    (af, kind, protocol): (c_int, c_int, c_int),
    info: *const c_void,
    flags: u32,
) -> usize {
    // Another socket's description is nothing that there is here.
    let result =
        if info.is_null() { bsd::socket(af, kind, protocol, flags) } else { Err(wsa::EINVAL) };
    report(result, INVALID_SOCKET)
}

/// A new socket, with the overlapped attribute if `WSA_FLAG_OVERLAPPED` is given.
#[unsafe(no_mangle)]
pub extern "C" fn WSASocketA(
    af: c_int,
    r#type: c_int,
    protocol: c_int,
    lpProtocolInfo: *mut c_void,
    _g: u32,
    dwFlags: u32,
) -> usize {
    new_socket((af, r#type, protocol), lpProtocolInfo, dwFlags)
}

/// [`WSASocketA`]: the two differ in an argument that has to be null.
#[unsafe(no_mangle)]
pub extern "C" fn WSASocketW(
    af: c_int,
    r#type: c_int,
    protocol: c_int,
    lpProtocolInfo: *mut c_void,
    _g: u32,
    dwFlags: u32,
) -> usize {
    new_socket((af, r#type, protocol), lpProtocolInfo, dwFlags)
}

/// Closes a socket; what pends on it is completed with `WSA_OPERATION_ABORTED`.
#[unsafe(no_mangle)]
pub extern "C" fn closesocket(s: usize) -> c_int {
    int(bsd::close(s))
}

/// `socket`: one with the overlapped attribute.
#[unsafe(no_mangle)]
pub extern "C" fn carnet_winsock_socket(af: c_int, r#type: c_int, protocol: c_int) -> usize {
    const OVERLAPPED: u32 = 1;
    new_socket((af, r#type, protocol), std::ptr::null(), OVERLAPPED)
}

/// `accept`.
///
/// # Safety
/// `addr` and `addrlen` may be written, or are null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_accept(
    s: usize,
    addr: *mut libc::sockaddr,
    addrlen: *mut c_int,
) -> usize {
    // SAFETY: by the contract of this function.
    report(unsafe { bsd::accept(s, addr, addrlen.cast()) }, INVALID_SOCKET)
}

/// `bind`.
///
/// # Safety
/// `name` may be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_bind(
    s: usize,
    name: *const libc::sockaddr,
    namelen: c_int,
) -> c_int {
    // SAFETY: by the contract of this function.
    int(unsafe { bsd::bind(s, (name, namelen)) })
}

/// `listen`.
#[unsafe(no_mangle)]
pub extern "C" fn carnet_winsock_listen(s: usize, backlog: c_int) -> c_int {
    int(bsd::listen(s, backlog))
}

/// `connect`.
///
/// # Safety
/// `name` may be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_connect(
    s: usize,
    name: *const libc::sockaddr,
    namelen: c_int,
) -> c_int {
    // SAFETY: by the contract of this function.
    int(unsafe { bsd::connect(s, (name, namelen)) })
}

/// `send`.
///
/// # Safety
/// `buf` may be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_send(
    s: usize,
    buf: *const c_char,
    len: c_int,
    flags: c_int,
) -> c_int {
    let nobody: Address = (std::ptr::null(), 0);
    // SAFETY: by the contract of this function.
    report(unsafe { bsd::send(s, (buf.cast(), len), flags, nobody) }, SOCKET_ERROR)
}

/// `recv`.
///
/// # Safety
/// `buf` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_recv(
    s: usize,
    buf: *mut c_char,
    len: c_int,
    flags: c_int,
) -> c_int {
    let nowhere = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: by the contract of this function.
    report(unsafe { bsd::receive(s, (buf.cast(), len), flags, nowhere) }, SOCKET_ERROR)
}

/// `sendto`.
///
/// # Safety
/// `buf` and `to` may be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_sendto(
    s: usize,
    buf: *const c_char,
    len: c_int,
    flags: c_int,
    to: *const libc::sockaddr,
    tolen: c_int,
) -> c_int {
    // SAFETY: by the contract of this function.
    report(unsafe { bsd::send(s, (buf.cast(), len), flags, (to, tolen)) }, SOCKET_ERROR)
}

/// `recvfrom`.
///
/// # Safety
/// `buf` may be written; `from` and `fromlen` too, or they are null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_recvfrom(
    s: usize,
    buf: *mut c_char,
    len: c_int,
    flags: c_int,
    from: *mut libc::sockaddr,
    fromlen: *mut c_int,
) -> c_int {
    let sender = (from, fromlen.cast());
    // SAFETY: by the contract of this function.
    report(unsafe { bsd::receive(s, (buf.cast(), len), flags, sender) }, SOCKET_ERROR)
}

/// `shutdown`.
#[unsafe(no_mangle)]
pub extern "C" fn carnet_winsock_shutdown(s: usize, how: c_int) -> c_int {
    int(bsd::shutdown(s, how))
}

/// `setsockopt`.
#[unsafe(no_mangle)]
pub extern "C" fn carnet_winsock_setsockopt(
    s: usize,
    level: c_int,
    optname: c_int,
    optval: *const c_char,
    optlen: c_int,
) -> c_int {
    int(options::set(s, level, optname, at(optval), optlen))
}

/// `getsockopt`.
///
/// # Safety
/// `optval` and `optlen` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_getsockopt(
    s: usize,
    level: c_int,
    optname: c_int,
    optval: *mut c_char,
    optlen: *mut c_int,
) -> c_int {
    int(options::get(s, level, optname, at(optval), at(optlen)))
}

/// `getsockname`.
///
/// # Safety
/// `name` and `namelen` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_getsockname(
    s: usize,
    name: *mut libc::sockaddr,
    namelen: *mut c_int,
) -> c_int {
    // SAFETY: by the contract of this function.
    int(unsafe { bsd::name(libc::getsockname, s, name, namelen.cast()) })
}

/// `getpeername`.
///
/// # Safety
/// `name` and `namelen` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_getpeername(
    s: usize,
    name: *mut libc::sockaddr,
    namelen: *mut c_int,
) -> c_int {
    // SAFETY: by the contract of this function.
    int(unsafe { bsd::name(libc::getpeername, s, name, namelen.cast()) })
}

/// `select`, on Windows' `fd_set`; the first argument means nothing.
///
/// # Safety
/// The sets may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn carnet_winsock_select(
    _nfds: c_int,
    readfds: *mut c_void,
    writefds: *mut c_void,
    exceptfds: *mut c_void,
    timeout: *const c_void,
) -> c_int {
    report(bsd::select([at(readfds), at(writefds), at(exceptfds)], at(timeout)), SOCKET_ERROR)
}

// ---- For tests ---------------------------------------------------------------------------------

/// For tests only: the control codes take so many milliseconds before they reach the kernel.
#[cfg(feature = "test-hooks")]
#[unsafe(no_mangle)]
pub extern "C" fn carnet_winsock_test_delay(milliseconds: u32) {
    crate::hooks::set_delay(milliseconds);
}

//! The system calls that take no address of the caller's.
#![expect(
    unsafe_code,
    reason = "sockets of the caller are plain numbers, which no safe library takes"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// The errno of a failed call.
pub(crate) type Errno = i32;

pub(crate) fn errno() -> Errno {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

fn check(status: libc::c_int) -> Result<libc::c_int, Errno> {
    if status < 0 { Err(errno()) } else { Ok(status) }
}

/// `getsockopt(2)`: fills `value` from its beginning and returns how many bytes it has.
pub(crate) fn get_option(
    fd: RawFd,
    level: i32,
    option: i32,
    value: &mut [u8],
) -> Result<usize, Errno> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: `value` is valid for writes of `length` bytes, and any bytes are valid in it.
    check(unsafe {
        libc::getsockopt(fd, level, option, value.as_mut_ptr().cast(), &raw mut length)
    })?;
    Ok(length as usize)
}

pub(crate) fn get_int(fd: RawFd, level: i32, option: i32) -> Result<i32, Errno> {
    let mut value = [0; 4];
    get_option(fd, level, option, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// `setsockopt(2)`.
pub(crate) fn set_option(fd: RawFd, level: i32, option: i32, value: &[u8]) -> Result<(), Errno> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: `value` is valid for reads of `length` bytes.
    check(unsafe { libc::setsockopt(fd, level, option, value.as_ptr().cast(), length) })?;
    Ok(())
}

/// The number that the kernel gives a socket for its life, and to no other one. Fails for what is
/// not a socket.
pub(crate) fn cookie(fd: RawFd) -> Result<u64, Errno> {
    let mut value = [0; 8];
    get_option(fd, libc::SOL_SOCKET, libc::SO_COOKIE, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// Another descriptor for the same socket, closed on `exec`.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no memory arguments.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// `close(2)` of a descriptor of the caller's.
pub(crate) fn close(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: the caller of this library asked for it; no `OwnedFd` of ours has the number, or it
    // would not be a socket that the caller knows.
    check(unsafe { libc::close(fd) })?;
    Ok(())
}

pub(crate) fn is_nonblocking(fd: RawFd) -> Result<bool, Errno> {
    // SAFETY: the call has no memory arguments.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    Ok(flags & libc::O_NONBLOCK != 0)
}

pub(crate) fn set_nonblocking(fd: RawFd, on: bool) -> Result<(), Errno> {
    let mut value = libc::c_int::from(on);
    // SAFETY: FIONBIO reads an int.
    check(unsafe { libc::ioctl(fd, libc::FIONBIO, &raw mut value) })?;
    Ok(())
}

/// How many bytes can be read at once.
pub(crate) fn readable_bytes(fd: RawFd) -> Result<u32, Errno> {
    let mut value: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int.
    check(unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut value) })?;
    Ok(value.unsigned_abs())
}

pub(crate) fn eventfd() -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no memory arguments.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds one to an eventfd: it becomes readable, or stays so.
pub(crate) fn eventfd_raise(fd: &OwnedFd) {
    let one = 1_u64;
    // SAFETY: eight bytes to read. The one failure, a full counter, means readable too.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Takes an eventfd back to zero.
pub(crate) fn eventfd_lower(fd: &OwnedFd) {
    let mut count = 0_u64;
    // SAFETY: eight bytes to write. The one failure, a counter of zero, is what is wanted.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
}

/// `epoll_create1(2)`.
pub(crate) fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no memory arguments.
    let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `epoll_ctl(2)`.
pub(crate) fn epoll_control(
    epoll: &OwnedFd,
    how: libc::c_int,
    fd: RawFd,
    events: u32,
    name: u64,
) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events, u64: name };
    // SAFETY: the event is valid for the call.
    check(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), how, fd, &raw mut event) })?;
    Ok(())
}

/// `epoll_wait(2)`, no longer than said, rounded up to milliseconds; none: for ever. Gives how many
/// entries are filled; none too if it was interrupted.
pub(crate) fn epoll_wait(
    epoll: &OwnedFd,
    events: &mut [libc::epoll_event],
    longest: Option<Duration>,
) -> usize {
    let timeout = longest.map_or(-1, |longest| {
        libc::c_int::try_from(longest.as_nanos().div_ceil(1_000_000)).unwrap_or(libc::c_int::MAX)
    });
    let room = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: room for as many entries as said.
    let count = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), room, timeout) };
    usize::try_from(count).unwrap_or(0)
}

/// What to wait for.
pub(crate) use libc::pollfd;

/// `ppoll(2)` until something happens or the deadline is there; none: for ever. Gives how many
/// entries have something to say.
pub(crate) fn poll(entries: &mut [pollfd], deadline: Option<Instant>) -> Result<usize, Errno> {
    let timeout = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        libc::timespec {
            tv_sec: left.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
        }
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: as many entries as said, and a timeout that outlives the call.
    let ready = check(unsafe {
        libc::ppoll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, timeout, std::ptr::null())
    })?;
    Ok(ready as usize)
}

/// Waits until a socket may have room for what is to be sent, as long as `SO_SNDTIMEO` says: `EAGAIN`.
pub(crate) fn wait_until_writable(fd: RawFd) -> Result<(), Errno> {
    let mut time = [0; size_of::<libc::timeval>()];
    get_option(fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &mut time)?;
    let half = |at: usize| {
        time.get(at..at + 8).and_then(|v| v.try_into().ok()).map_or(0, u64::from_ne_bytes)
    };
    let time = Duration::from_secs(half(0)) + Duration::from_micros(half(8));
    let deadline = if time.is_zero() { None } else { Instant::now().checked_add(time) };
    let mut entries = [pollfd { fd, events: libc::POLLOUT, revents: 0 }];
    if poll(&mut entries, deadline)? == 0 { Err(libc::EAGAIN) } else { Ok(()) }
}

/// Has the functions called by every `fork`: before it, and after it in the parent and in the child.
pub(crate) fn at_fork(before: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) {
    // SAFETY: the functions stay for the life of the process: the library is never unloaded
    // (`-z nodelete`).
    unsafe { libc::pthread_atfork(Some(before), Some(parent), Some(child)) };
}

/// Blocks every signal in this thread: they are for the application's threads.
pub(crate) fn block_signals() {
    // SAFETY: the set is filled before it is used, and is not used after the call.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}

/// `dup2(2)`: the descriptor of `replaced` becomes one of `by`'s socket, with no call of ours.
#[cfg(all(test, not(loom)))]
pub(crate) fn replace(by: &impl AsRawFd, replaced: &impl AsRawFd) {
    // SAFETY: both are open; the owner of the second one closes what it then is.
    let status = unsafe { libc::dup2(by.as_raw_fd(), replaced.as_raw_fd()) };
    assert!(status >= 0);
}

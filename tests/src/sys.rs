//! The two calls of the control interface, raw: the tests check the errno values themselves, which
//! the library `carnet` translates.
#![expect(unsafe_code, reason = "no safe library has getsockopt and setsockopt of any option")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// `getsockopt(2)` with a buffer of `length` bytes; gives what the kernel says it wrote.
///
/// # Errors
/// What the kernel says; `InvalidData` if it claims to have written more than there was room for.
pub fn get_option(
    socket: impl AsFd,
    level: i32,
    option: i32,
    length: usize,
) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; length];
    let mut written = libc::socklen_t::try_from(length).map_err(io::Error::other)?;
    // SAFETY: the descriptor is borrowed for the call; `value` is valid for writes of `written`
    // bytes, which is its length.
    let status = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            value.as_mut_ptr().cast(),
            &raw mut written,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    if written as usize > length {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes than there was room"));
    }
    value.truncate(written as usize);
    Ok(value)
}

/// `setsockopt(2)`.
///
/// # Errors
/// What the kernel says.
pub fn set_option(socket: impl AsFd, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is borrowed for the call; `value` is valid for reads of `length`
    // bytes.
    let status = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, option, value.as_ptr().cast(), length)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

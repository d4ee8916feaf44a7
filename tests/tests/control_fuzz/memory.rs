//! Memory to point at, and the calls that take any pointer.
#![expect(unsafe_code, reason = "pointers that are wrong on purpose")]

use std::{ffi::c_void, io, ptr};

use carnet_winsock::ffi::{WSAGetLastError, WSAIoctl, WSAStartup};

/// Bytes of the buffers of which all is checked.
pub(crate) const SIZE: usize = 8192;
/// What they are filled with.
pub(crate) const CANARY: u8 = 0xa5;
const PAGE: usize = 64 * 1024;

/// A buffer with a page behind it that may not be touched, and a length beside it.
pub(crate) struct Arena {
    start: *mut u8,
}

/// Where a pointer points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// So many bytes before the page that may not be touched.
    BeforeEnd(usize),
    Null,
    /// In the kernel's half.
    Kernel,
    /// Where nothing is.
    Nowhere,
}

impl Arena {
    pub(crate) fn new() -> Self {
        // SAFETY: a new mapping, whose second page is shut before anything refers to it. It stays.
        let start = unsafe {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(ptr::null_mut(), 2 * PAGE, both, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(start.add(PAGE), PAGE, libc::PROT_NONE), 0);
            start
        };
        Self { start: start.cast() }
    }

    /// The last [`SIZE`] bytes before the page that may not be touched.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: they are of this mapping, and of nobody else while `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(PAGE - SIZE), SIZE) }
    }

    fn at(&self, place: Place) -> *mut c_void {
        match place {
            Place::BeforeEnd(bytes) => self.start.wrapping_add(PAGE - bytes).cast(),
            Place::Null => ptr::null_mut(),
            Place::Kernel => ptr::without_provenance_mut(0xffff_8880_0000_1000),
            Place::Nowhere => ptr::without_provenance_mut(0x10),
        }
    }

    /// `getsockopt(2)`. Gives what it returned, and the length as it is then; the length is at a bad
    /// place if it is `None`.
    pub(crate) fn get(
        &self,
        socket: i32,
        level: i32,
        name: i32,
        value: Place,
        length: Option<i32>,
    ) -> (Result<i32, i32>, i32) {
        let mut written = length.unwrap_or(0);
        let place =
            if length.is_some() { (&raw mut written).cast() } else { self.at(Place::Nowhere) };
        // SAFETY: the kernel checks both pointers; what it can write lies in this mapping, which
        // nobody else borrows, or is `written`.
        let result = unsafe { libc::getsockopt(socket, level, name, self.at(value), place.cast()) };
        (outcome(result), written)
    }

    /// `setsockopt(2)`.
    pub(crate) fn set(
        &self,
        socket: i32,
        level: i32,
        name: i32,
        value: Place,
        length: u32,
    ) -> Result<i32, i32> {
        // SAFETY: the kernel checks the pointer, and only reads.
        outcome(unsafe { libc::setsockopt(socket, level, name, self.at(value), length) })
    }

    /// `WSAIoctl` of the C library, without overlapping. Gives its error, 0 for success.
    pub(crate) fn ioctl(
        &self,
        socket: i32,
        code: u32,
        input: (Place, u32),
        output: (Place, u32),
    ) -> i32 {
        let mut returned = 0;
        // SAFETY: the library checks the pointers; what it can write lies in this mapping, which
        // nobody else borrows, or is `returned`.
        let status = unsafe {
            WSAIoctl(
                socket as usize,
                code,
                self.at(input.0),
                input.1,
                self.at(output.0),
                output.1,
                &raw mut returned,
                ptr::null_mut(),
                None,
            )
        };
        if status == 0 { 0 } else { WSAGetLastError() }
    }
}

/// Has the C library begin.
pub(crate) fn start_library() {
    // `WSADATA` has 408 bytes.
    let mut about = [0_u64; 64];
    // SAFETY: there is room for what is to be told.
    assert_eq!(unsafe { WSAStartup(0x0202, about.as_mut_ptr().cast()) }, 0);
}

fn outcome(result: i32) -> Result<i32, i32> {
    if result == -1 {
        Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(result)
    }
}

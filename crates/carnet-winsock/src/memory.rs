//! The caller's memory, which may be anything: unmapped, read-only, half of it missing, the
//! kernel's. A bad address is an error here and never a signal (contract S31).
//!
//! Every access is a system call that copies and checks at once (`process_vm_readv(2)`,
//! `process_vm_writev(2)` on this very process), so that nothing can change between a check and a
//! use.
#![expect(unsafe_code, reason = "system calls on addresses of the caller")]

use crate::completion::Fields;
use crate::contract::status;
use crate::thread::CompletionRoutine;

/// The address is not wholly inside memory that allows the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault;

/// Beyond this many bytes of a buffer nothing is ever read or written, since no record or context
/// is longer by far.
pub(crate) const MOST: usize = 64 * 1024;

/// An address that the caller gave for a purpose, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallerPtr(usize);

impl CallerPtr {
    /// # Safety
    /// The caller of this library gave `address` to be read and written for this purpose: if there
    /// is memory, nothing else relies on its contents. There need not be any.
    pub(crate) const unsafe fn new(address: usize) -> Self {
        Self(address)
    }

    /// Where a routine is said to be, to see whether there is anything at all.
    pub(crate) fn of_routine(routine: CompletionRoutine) -> Self {
        Self(routine as usize)
    }

    pub(crate) const fn is_null(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn address(self) -> usize {
        self.0
    }

    /// The address so many bytes further on, of the same purpose.
    pub(crate) fn at(self, offset: usize) -> Self {
        // A sum beyond the end is an address in the kernel's half, where every access fails.
        Self(self.0.saturating_add(offset))
    }

    /// Copies from there; all or nothing.
    pub(crate) fn read_into(self, target: &mut [u8]) -> Result<(), Fault> {
        if target.is_empty() {
            return Ok(());
        }
        let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
        let remote = libc::iovec { iov_base: self.0 as *mut _, iov_len: target.len() };
        // SAFETY: `local` is exactly `target`, which is valid for writes; the kernel checks
        // `remote` while it copies.
        let copied = unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        };
        if usize::try_from(copied) == Ok(target.len()) { Ok(()) } else { Err(Fault) }
    }

    pub(crate) fn read<const N: usize>(self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read_into(&mut bytes)?;
        Ok(bytes)
    }

    /// Copies at most [`MOST`] bytes from there, after checking all `length`.
    pub(crate) fn read_vec(self, length: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; length.min(MOST)];
        self.read_into(&mut bytes)?;
        self.at(bytes.len()).check_mapped(length - bytes.len())?;
        Ok(bytes)
    }

    pub(crate) fn read_u32(self) -> Result<u32, Fault> {
        self.read().map(u32::from_ne_bytes)
    }

    pub(crate) fn read_usize(self) -> Result<usize, Fault> {
        self.read().map(usize::from_ne_bytes)
    }

    /// Copies to there. What a fault leaves of it is not defined.
    pub(crate) fn write(self, source: &[u8]) -> Result<(), Fault> {
        if source.is_empty() {
            return Ok(());
        }
        let local =
            libc::iovec { iov_base: source.as_ptr().cast_mut().cast(), iov_len: source.len() };
        let remote = libc::iovec { iov_base: self.0 as *mut _, iov_len: source.len() };
        // SAFETY: `local` is exactly `source`, which is only read; the kernel checks `remote` while
        // it copies, and by `new` nothing relies on what it holds.
        let copied = unsafe {
            libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        };
        if usize::try_from(copied) == Ok(source.len()) { Ok(()) } else { Err(Fault) }
    }

    pub(crate) fn write_u32(self, value: u32) -> Result<(), Fault> {
        self.write(&value.to_ne_bytes())
    }

    /// Checks that `length` bytes can be written there, and changes none.
    pub(crate) fn check_writable(self, length: usize) -> Result<(), Fault> {
        let near = length.min(MOST);
        self.advise(near, libc::MADV_POPULATE_WRITE)?;
        self.at(near).check_mapped(length - near)
    }

    /// Checks that `length` bytes can be read there.
    pub(crate) fn check_readable(self, length: usize) -> Result<(), Fault> {
        let near = length.min(MOST);
        self.advise(near, libc::MADV_POPULATE_READ)?;
        self.at(near).check_mapped(length - near)
    }

    /// Checks that there is memory, whatever it allows: for what is never touched.
    fn check_mapped(self, length: usize) -> Result<(), Fault> {
        let (start, length) = self.pages(length)?;
        if length == 0 {
            return Ok(());
        }
        // SAFETY: with MS_ASYNC the kernel walks its list of mappings and touches no memory.
        let status = unsafe { libc::msync(start as *mut _, length, libc::MS_ASYNC) };
        if status == 0 { Ok(()) } else { Err(Fault) }
    }

    /// Has the kernel make the pages present for an access, which it refuses where that access
    /// would fail.
    fn advise(self, length: usize, advice: libc::c_int) -> Result<(), Fault> {
        let (start, length) = self.pages(length)?;
        if length == 0 {
            return Ok(());
        }
        // SAFETY: both pieces of advice keep the contents of memory as they are.
        let status = unsafe { libc::madvise(start as *mut _, length, advice) };
        if status == 0 { Ok(()) } else { Err(Fault) }
    }

    /// The pages that these bytes touch.
    fn pages(self, length: usize) -> Result<(usize, usize), Fault> {
        let page = page_size();
        let start = self.0 & !(page - 1);
        if length == 0 {
            return Ok((start, 0));
        }
        let end = self.0.checked_add(length).and_then(|end| end.checked_next_multiple_of(page));
        end.map(|end| (start, end - start)).ok_or(Fault)
    }
}

fn page_size() -> usize {
    // SAFETY: no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// A caller's `WSAOVERLAPPED` (contract W6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overlapped(pub(crate) CallerPtr);

impl Overlapped {
    const WORD: usize = size_of::<usize>();
    /// Two words, two `DWORD`s, a handle.
    pub(crate) const SIZE: usize = 3 * Self::WORD + 8;

    pub(crate) fn check(self) -> Result<(), Fault> {
        self.0.read::<{ Self::SIZE }>()?;
        self.0.check_writable(Self::SIZE)
    }

    pub(crate) fn status(self) -> Result<u32, Fault> {
        // A status is a DWORD in a word; this crate runs on little-endian systems only.
        self.0.read_usize().map(|word| word as u32)
    }

    pub(crate) fn bytes(self) -> Result<u32, Fault> {
        self.0.at(Self::WORD).read_usize().map(|word| word as u32)
    }

    pub(crate) fn flags(self) -> Result<u32, Fault> {
        self.0.at(2 * Self::WORD).read_u32()
    }

    pub(crate) fn event(self) -> Result<usize, Fault> {
        self.0.at(2 * Self::WORD + 8).read_usize()
    }

    /// Marks the operation as pending.
    pub(crate) fn begin(self) -> Result<(), Fault> {
        self.store_result(0, 0)?;
        self.store_status(status::PENDING)
    }
}

impl Fields for Overlapped {
    type Fault = Fault;

    fn store_result(&self, bytes: u32, error: i32) -> Result<(), Fault> {
        let mut fields = [0; Self::WORD + 8];
        let (high, rest) = fields.split_at_mut(Self::WORD);
        high.copy_from_slice(&(bytes as usize).to_ne_bytes());
        rest[4..].copy_from_slice(&error.to_ne_bytes());
        self.0.at(Self::WORD).write(&fields)
    }

    fn store_status(&self, status: u32) -> Result<(), Fault> {
        self.0.write(&(status as usize).to_ne_bytes())
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests {
    use super::*;

    /// Three pages: readable and writable, read-only, nothing.
    pub(crate) struct Pages(usize);

    impl Pages {
        pub(crate) fn new() -> Self {
            let page = page_size();
            // SAFETY: a new private mapping at an address of the kernel's choice; protection and
            // absence are set on parts of it that nothing has a reference into.
            let start = unsafe {
                let start = libc::mmap(
                    std::ptr::null_mut(),
                    3 * page,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                assert_ne!(start, libc::MAP_FAILED);
                assert_eq!(libc::mprotect(start.add(page), page, libc::PROT_READ), 0);
                assert_eq!(libc::munmap(start.add(2 * page), page), 0);
                start
            };
            Self(start as usize)
        }

        /// An address so far from the begin of the page of this number.
        pub(crate) fn at<T>(&self, page: usize, offset: isize) -> *mut T {
            let address = (self.0 + page * page_size()).wrapping_add_signed(offset);
            std::ptr::with_exposed_provenance_mut(address)
        }

        fn place(&self, page: usize, offset: isize) -> CallerPtr {
            // SAFETY: inside of these pages, or nowhere.
            unsafe { CallerPtr::new(self.at::<u8>(page, offset).expose_provenance()) }
        }
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: what `new` mapped and left mapped.
            unsafe { libc::munmap(self.0 as *mut _, 2 * page_size()) };
        }
    }

    fn anywhere(address: usize) -> CallerPtr {
        // SAFETY: used for addresses at which there is no memory.
        unsafe { CallerPtr::new(address) }
    }

    const KERNEL: usize = 0xffff_8000_0000_0000;

    #[test]
    fn bytes_are_copied_both_ways() {
        let pages = Pages::new();
        let place = pages.place(0, 100);
        place.write(b"record").unwrap();
        assert_eq!(place.read::<6>(), Ok(*b"record"));
        assert_eq!(place.read_vec(6).unwrap(), b"record");
        place.write_u32(7).unwrap();
        assert_eq!(place.read_u32(), Ok(7));
        assert_eq!(place.read_vec(0).unwrap(), b"");
    }

    #[test]
    fn no_memory_is_a_fault_and_not_a_signal() {
        let pages = Pages::new();
        let nowhere = [
            anywhere(0),
            anywhere(1),
            pages.place(2, 0),
            anywhere(KERNEL),
            anywhere(usize::MAX),
            anywhere(usize::MAX - 3),
        ];
        for place in nowhere {
            assert_eq!(place.read_u32(), Err(Fault), "{place:?}");
            assert_eq!(place.write_u32(1), Err(Fault), "{place:?}");
            assert_eq!(place.check_writable(4), Err(Fault), "{place:?}");
            assert_eq!(place.read_vec(4), Err(Fault), "{place:?}");
        }
    }

    #[test]
    fn what_straddles_is_a_fault() {
        let pages = Pages::new();
        // Into the read-only page: only writing fails.
        assert!(pages.place(1, -2).read_u32().is_ok());
        assert_eq!(pages.place(1, -2).check_writable(4), Err(Fault));
        assert_eq!(pages.place(1, -2).write_u32(1), Err(Fault));
        // Into nothing.
        assert!(pages.place(2, -4).read_u32().is_ok());
        assert_eq!(pages.place(2, -3).read_u32(), Err(Fault));
        assert_eq!(pages.place(2, -3).read_vec(4), Err(Fault));
        // Its last byte, and the page's.
        assert!(pages.place(1, -4).check_writable(4).is_ok());
        assert!(pages.place(1, -1).check_writable(1).is_ok());
    }

    #[test]
    fn read_only_memory_cannot_be_written() {
        let pages = Pages::new();
        assert_eq!(pages.place(1, 8).write_u32(1), Err(Fault));
        assert_eq!(pages.place(1, 8).check_writable(1), Err(Fault));
        assert_eq!(pages.place(1, 8).read_u32(), Ok(0));
    }

    #[test]
    fn a_check_changes_nothing() {
        let pages = Pages::new();
        pages.place(0, 0).write(b"unchanged").unwrap();
        pages.place(0, 0).check_writable(page_size()).unwrap();
        assert_eq!(pages.place(0, 0).read::<9>(), Ok(*b"unchanged"));
    }

    #[test]
    fn a_length_that_lies_is_a_fault_without_an_allocation_of_it() {
        let pages = Pages::new();
        let all = u32::MAX as usize;
        assert_eq!(pages.place(0, 0).read_vec(all), Err(Fault));
        assert_eq!(pages.place(0, 0).check_writable(all), Err(Fault));
        let large = vec![1_u8; 4 * MOST];
        // SAFETY: the vector, of which nothing is kept elsewhere.
        let large = unsafe { CallerPtr::new(large.as_ptr() as usize) };
        assert_eq!(large.read_vec(3 * MOST).unwrap().len(), MOST);
        assert!(large.check_writable(3 * MOST).is_ok());
    }

    #[test]
    fn an_overlapped_has_windows_layout() {
        let pages = Pages::new();
        let place = pages.place(0, 64);
        place.write(&[0xee; 32]).unwrap();
        let overlapped = Overlapped(place);
        overlapped.begin().unwrap();
        assert_eq!(overlapped.status(), Ok(0x103));
        crate::completion::publish(&overlapped, 0xC000_0023, 5, 10014).unwrap();
        let bytes: [u8; 32] = place.read().unwrap();
        assert_eq!(bytes[0..8], 0xC000_0023_u64.to_ne_bytes());
        assert_eq!(bytes[8..16], 5_u64.to_ne_bytes());
        assert_eq!(bytes[16..20], 0_u32.to_ne_bytes());
        assert_eq!(bytes[20..24], 10014_u32.to_ne_bytes());
        assert_eq!(bytes[24..32], [0xee; 8], "the event is the caller's");
        assert_eq!(overlapped.bytes(), Ok(5));
        assert_eq!(Overlapped(pages.place(1, -31)).check(), Err(Fault));
        assert_eq!(Overlapped(pages.place(1, 0)).check(), Err(Fault));
    }
}

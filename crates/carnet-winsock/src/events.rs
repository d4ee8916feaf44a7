//! Events with manual reset (contract W7, W49).

use crate::completion::Signal;
use crate::sys::{self, Errno};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// An event. Its descriptor is readable while it is signalled.
#[derive(Debug)]
pub(crate) struct Event {
    fd: OwnedFd,
    /// Orders memory between who sets the event and who sees it: a descriptor does not, formally.
    signalled: AtomicBool,
}

impl Event {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self { fd: sys::eventfd()?, signalled: AtomicBool::new(false) })
    }

    pub(crate) fn set(&self) {
        self.signalled.store(true, Ordering::Release);
        sys::eventfd_raise(&self.fd);
    }

    pub(crate) fn reset(&self) {
        sys::eventfd_lower(&self.fd);
        self.signalled.store(false, Ordering::Release);
    }

    /// After the descriptor was seen readable: what was written before it was set is visible.
    pub(crate) fn acquire(&self) {
        self.signalled.load(Ordering::Acquire);
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Signal for Event {
    fn raise(&self) {
        self.set();
    }
    fn lower(&self) {
        self.reset();
    }
}

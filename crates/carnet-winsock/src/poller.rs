//! Waiting for sockets to become ready, in the one thread that carries out operations.
//!
//! Edge-triggered: a socket says once that something has changed, so that what nobody asked for (an
//! error that is left in a socket's queue, say) cannot keep the thread busy. Hence the rule that
//! [`Watched::watch`] is called for every operation, under the lock under which it is added: what is
//! ready then is said anew.

use crate::sync::{Mutex, lock};
use crate::sys::{self, Errno};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// No descriptor has this number.
const WAKE: u64 = u64::MAX;

/// A set of sockets to wait for.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Errno> {
        let poller = Self { epoll: sys::epoll()?, wake: sys::eventfd()? };
        let events = libc::EPOLLIN.cast_unsigned();
        sys::epoll_control(
            &poller.epoll,
            libc::EPOLL_CTL_ADD,
            poller.wake.as_raw_fd(),
            events,
            WAKE,
        )?;
        Ok(poller)
    }

    /// Ends the current wait, or the next one.
    pub(crate) fn wake(&self) {
        sys::eventfd_raise(&self.wake);
    }

    /// Waits, no longer than said, and calls `ready` for each socket that has become ready.
    pub(crate) fn wait(&self, longest: Option<Duration>, mut ready: impl FnMut(RawFd)) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        let count = sys::epoll_wait(&self.epoll, &mut events, longest);
        for event in events.iter().take(count) {
            match event.u64 {
                WAKE => sys::eventfd_lower(&self.wake),
                name => ready(name as RawFd),
            }
        }
    }
}

/// A socket's descriptor of our own, so that the socket stays while an operation pends, however the
/// caller's descriptor may be reused.
#[derive(Debug)]
pub(crate) struct Watched {
    descriptor: OwnedFd,
    /// Who waits for it, if anybody does, and for what.
    by: Mutex<Option<(Arc<Poller>, u32)>>,
}

impl Watched {
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self { descriptor, by: Mutex::new(None) }
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }

    /// Has the poller say, under the name that the caller knows the socket by, when it is ready for
    /// these events (`EPOLLIN`, `EPOLLOUT`) or becomes so, besides those asked for before. It can
    /// only fail the first time.
    pub(crate) fn watch(
        &self,
        poller: &Arc<Poller>,
        name: RawFd,
        events: u32,
    ) -> Result<(), Errno> {
        let mut by = lock(&self.by);
        // One that has been stopped is of no use any more.
        let before = by.take_if(|(by, _)| !Arc::ptr_eq(by, poller));
        if let Some((stopped, _)) = before {
            self.unwatch(&stopped);
        }
        let (how, events) = match &*by {
            Some((_, others)) => (libc::EPOLL_CTL_MOD, events | others),
            None => (libc::EPOLL_CTL_ADD, events),
        };
        let edges = events | libc::EPOLLET.cast_unsigned();
        sys::epoll_control(&poller.epoll, how, self.descriptor(), edges, name as u64)?;
        *by = Some((poller.clone(), events));
        Ok(())
    }

    fn unwatch(&self, poller: &Poller) {
        // It was added, so this cannot fail.
        let _ = sys::epoll_control(&poller.epoll, libc::EPOLL_CTL_DEL, self.descriptor(), 0, 0);
    }
}

impl Drop for Watched {
    /// The kernel would go on: for it the socket is still open, by the caller's descriptor.
    fn drop(&mut self) {
        if let Some((poller, _)) = lock(&self.by).take() {
            self.unwatch(&poller);
        }
    }
}

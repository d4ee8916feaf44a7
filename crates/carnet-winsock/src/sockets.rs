//! The sockets that this process made or accepted, and what Windows keeps of a socket but Linux
//! does not: the overlapped attribute, which ancillary data was asked for, and its UDP flows.

use crate::contract::wsa;
use crate::flows::Flows;
use crate::sync::{Mutex, lock};
use crate::sys;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::os::fd::RawFd;
use std::sync::Arc;

/// What Windows keeps of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Overlapped operations are possible (contract S16, S17, W1).
    pub(crate) overlapped: bool,
    /// The ancillary data that was asked for (contract U2).
    pub(crate) wanted: Wanted,
}

impl Default for Attributes {
    /// Those of a socket that was made elsewhere are those of `socket()`.
    fn default() -> Self {
        Self { overlapped: true, wanted: Wanted::default() }
    }
}

/// Ancillary data by option: `[records, context]` at `IPPROTO_IP` and at `IPPROTO_IPV6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) v4: [bool; 2],
    pub(crate) v6: [bool; 2],
}

impl Wanted {
    pub(crate) fn any(self) -> bool {
        self != Self::default()
    }
}

/// A socket at the moment of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Socket {
    pub(crate) fd: RawFd,
    /// Tells it from any other socket that had or will have the descriptor.
    pub(crate) cookie: u64,
    pub(crate) attributes: Attributes,
}

#[derive(Debug)]
struct Entry {
    cookie: u64,
    attributes: Attributes,
    /// Once anything was sent or received that may begin one.
    flows: Option<Arc<Flows>>,
}

/// By descriptor. An entry whose cookie is not the descriptor's is of a socket that `close(2)`
/// closed behind our back: it says nothing about the new one.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<BTreeMap<RawFd, Entry>>);

impl Sockets {
    /// What `handle` is: `WSAENOTSOCK` for anything but a socket (contract S36).
    pub(crate) fn find(&self, handle: usize) -> Result<Socket, i32> {
        let fd = RawFd::try_from(handle).map_err(|_| wsa::ENOTSOCK)?;
        let cookie = sys::cookie(fd).map_err(|_| wsa::ENOTSOCK)?;
        let attributes = match lock(&self.0).get(&fd) {
            Some(entry) if entry.cookie == cookie => entry.attributes,
            _ => Attributes::default(),
        };
        Ok(Socket { fd, cookie, attributes })
    }

    /// Notes the attributes of a socket.
    pub(crate) fn note(&self, fd: RawFd, attributes: Attributes) {
        let Ok(cookie) = sys::cookie(fd) else {
            return;
        };
        match lock(&self.0).entry(fd) {
            Occupied(entry) if entry.get().cookie == cookie => {
                entry.into_mut().attributes = attributes;
            }
            Occupied(mut other) => {
                other.insert(Entry { cookie, attributes, flows: None });
            }
            Vacant(place) => {
                place.insert(Entry { cookie, attributes, flows: None });
            }
        }
    }

    /// The UDP flows of a socket.
    pub(crate) fn flows(&self, socket: Socket) -> Arc<Flows> {
        let Socket { fd, cookie, attributes } = socket;
        let mut entries = lock(&self.0);
        let entry = entries.entry(fd).or_insert_with(|| Entry { cookie, attributes, flows: None });
        if entry.cookie != cookie {
            *entry = Entry { cookie, attributes, flows: None };
        }
        Arc::clone(entry.flows.get_or_insert_default())
    }

    /// Forgets a socket that is about to be closed.
    pub(crate) fn forget(&self, fd: RawFd) {
        lock(&self.0).remove(&fd);
    }

    /// For a child process, which has the same descriptors. It asks for the flows anew.
    pub(crate) fn copy(&self) -> Self {
        let copy = |(&fd, &Entry { cookie, attributes, .. }): (&RawFd, &Entry)| {
            (fd, Entry { cookie, attributes, flows: None })
        };
        Self(Mutex::new(lock(&self.0).iter().map(copy).collect()))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    const PLAIN: Attributes =
        Attributes { overlapped: false, wanted: Wanted { v4: [false; 2], v6: [false; 2] } };

    #[test]
    fn what_is_no_socket_is_not_found() {
        let sockets = Sockets::default();
        let file = std::fs::File::open("/dev/null").unwrap();
        for handle in [file.as_raw_fd() as usize, usize::MAX, 1 << 31, i32::MAX as usize] {
            assert_eq!(sockets.find(handle), Err(10038), "{handle:#x}");
        }
    }

    #[test]
    fn attributes_belong_to_the_socket_and_not_to_its_number() {
        let sockets = Sockets::default();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let handle = socket.as_raw_fd() as usize;
        assert!(sockets.find(handle).unwrap().attributes.overlapped);
        sockets.note(socket.as_raw_fd(), PLAIN);
        assert_eq!(sockets.find(handle).unwrap().attributes, PLAIN);
        assert_eq!(sockets.copy().find(handle).unwrap().attributes, PLAIN);

        // The same number, without closesocket.
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        sys::replace(&other, &socket);
        assert!(sockets.find(handle).unwrap().attributes.overlapped);

        sockets.note(socket.as_raw_fd(), PLAIN);
        sockets.forget(socket.as_raw_fd());
        assert!(sockets.find(handle).unwrap().attributes.overlapped);
    }
}

//! What the kernel engine tells of its decisions, as it happens.

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use aya::maps::{Array, Map, MapData, MapError, RingBuf};
use carnet_core::event::Event;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::FromBytes as _;

use crate::{Engine, Error, clock::boot_time_ns, location::Lock};

const EVENTS: &str = "EVENTS";
const EVENTS_READ: &str = "EVENTS_READ";

/// The reader of an instance's events. There is one at a time, since events are gone when they are
/// read.
///
/// Its descriptor is readable when there is something to read; ask [`EventReader::next_timeout`]
/// with [`Duration::ZERO`] then, until it gives `None`.
pub struct EventReader {
    ring: RingBuf<MapData>,
    /// Its only element tells the hooks whether anybody reads.
    read: Array<MapData, u64>,
    /// Events from before are nobody's business: boot-time clock, nanoseconds.
    since_ns: u64,
    _lock: Lock,
}

impl std::fmt::Debug for EventReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventReader").field("since_ns", &self.since_ns).finish_non_exhaustive()
    }
}

impl Engine {
    /// Begins to read the events; those of before this call are skipped.
    ///
    /// # Errors
    /// [`Error::EventsTaken`] if somebody reads them; [`Error::NotUp`], [`Error::UnknownLayout`];
    /// [`Error::Map`] if the ring buffer cannot be mapped.
    pub fn events(&self) -> Result<EventReader, Error> {
        let lock = self.location().lock_reader()?;
        let map = self.reading(|tables| tables.open(EVENTS))?;
        let bytes = map.info().map_err(Error::map(EVENTS))?.max_entries();
        let mut ring: RingBuf<_> =
            Map::RingBuf(map).try_into().map_err(Error::map::<MapError>(EVENTS))?;
        let map = self.reading(|tables| tables.open(EVENTS_READ))?;
        let read = Map::Array(map).try_into().map_err(Error::map::<MapError>(EVENTS_READ))?;
        // What an earlier reader has left would take the room of what is to come. One that was killed has the
        // hooks still report, so that there may be no end to it.
        let mut most = bytes as usize / size_of::<Event>();
        while most > 0 && ring.next().is_some() {
            most -= 1;
        }
        let since_ns = boot_time_ns();
        let mut reader = EventReader { ring, read, since_ns, _lock: lock };
        reader.read.set(0, 1, 0).map_err(Error::map(EVENTS_READ))?;
        Ok(reader)
    }
}

impl EventReader {
    /// The next event; waits for it as long as `timeout`. `None` if there was none, or if a signal
    /// came.
    ///
    /// # Errors
    /// [`Error::Io`] if waiting fails.
    pub fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, Error> {
        let failed = || Error::io("wait for", "events");
        // A timeout that is too long for the kernel is as good as none.
        let timeout = Timespec::try_from(timeout).ok();
        if let Some(event) = self.take() {
            return Ok(Some(event));
        }
        let mut polled = [PollFd::new(&self.ring, PollFlags::IN)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => Ok(self.take()),
            Err(rustix::io::Errno::INTR) => Ok(None),
            Err(errno) => Err(failed()(errno)),
        }
    }

    fn take(&mut self) -> Option<Event> {
        while let Some(bytes) = self.ring.next() {
            if let Some(event) = decode(&bytes, self.since_ns) {
                return Some(event);
            }
        }
        None
    }
}

/// The event in an entry of the ring buffer, if it is not from before.
pub(crate) fn decode(entry: &[u8], since_ns: u64) -> Option<Event> {
    // An event that is longer is one of a newer build, with more at its end.
    let (event, _) = Event::read_from_prefix(entry).ok()?;
    (event.time_ns >= since_ns).then_some(event)
}

impl Drop for EventReader {
    /// Of one that is killed the hooks do not learn: they fill the buffer, and count what does not fit.
    fn drop(&mut self) {
        let _unread_events_cost_little = self.read.set(0, 0, 0);
    }
}

impl AsFd for EventReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

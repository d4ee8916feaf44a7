//! Relaying bytes between two sockets.
//!
//! Each direction is a [`Leg`] that carries bytes until the end of its stream, and then passes the
//! end on, by shutting down the writing half of the other socket: half-closed connections stay
//! half-closed. A leg reads only what it can write, so a slow reader slows its writer down, and it
//! holds one buffer, later one pipe, however much passes.
//!
//! It begins with copying, and goes over to what the system has for relaying when a direction turns
//! out to carry much: splice(2) on Linux, whose pipe costs more than a short connection gains.

use crate::sys;
use socket2::SockRef;
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Size in bytes of the buffer that a leg copies with.
pub const BUFFER: usize = 16 * 1024;
/// After this many bytes a leg goes over to what the system has for relaying.
const CARRY_AFTER: u64 = 64 * 1024;

/// One direction of a relayed connection.
#[derive(Clone, Copy, Debug)]
pub struct Leg<'a> {
    pub(crate) from: &'a TcpStream,
    pub(crate) to: &'a TcpStream,
    carried: &'a AtomicU64,
}

/// Why a leg did not reach the end of its stream.
#[derive(Debug)]
pub enum Fault {
    /// The socket that it reads from is broken.
    Reading(io::Error),
    /// The socket that it writes to is broken.
    Writing(io::Error),
}

impl<'a> Leg<'a> {
    /// The direction from `from` to `to`. It counts the bytes that it has written in `carried`.
    pub fn new(from: &'a TcpStream, to: &'a TcpStream, carried: &'a AtomicU64) -> Self {
        Self { from, to, carried }
    }

    /// Relays everything up to the end of the stream, and the end. `buffer` must not be empty.
    ///
    /// # Errors
    /// When one of the sockets is broken.
    pub async fn relay(&self, mut buffer: Vec<u8>) -> Result<(), Fault> {
        while self.carried.load(Ordering::Relaxed) < CARRY_AFTER {
            if !self.copy(&mut buffer).await? {
                return self.finish();
            }
        }
        drop(std::mem::take(&mut buffer));
        if sys::carry(self).await? {
            return self.finish();
        }
        buffer = vec![0; BUFFER];
        while self.copy(&mut buffer).await? {}
        self.finish()
    }

    /// Reads what has come; waits until something has. Returns 0 at the end of the stream.
    /// Cancelling it loses nothing.
    ///
    /// # Errors
    /// When one of the sockets is broken: also the one that is not read, which otherwise would
    /// not be noticed while nothing comes to be written to it.
    pub async fn read(&self, buffer: &mut [u8]) -> Result<usize, Fault> {
        loop {
            self.unless_broken(self.from.readable()).await?;
            match self.from.try_read(buffer) {
                Err(error) if is_transient(&error) => {}
                result => return result.map_err(Fault::Reading),
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn write(&self, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            match self.to.try_write(bytes) {
                Ok(written) => {
                    self.count(written);
                    bytes = bytes.get(written..).unwrap_or_default();
                }
                Err(error) if is_transient(&error) => {
                    self.to.writable().await.map_err(Fault::Writing)?;
                }
                Err(error) => return Err(Fault::Writing(error)),
            }
        }
        Ok(())
    }

    /// Passes the end of the stream on.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn finish(&self) -> Result<(), Fault> {
        SockRef::from(self.to).shutdown(Shutdown::Write).map_err(Fault::Writing)
    }

    /// Copies what has come. False at the end of the stream.
    async fn copy(&self, buffer: &mut [u8]) -> Result<bool, Fault> {
        let length = self.read(buffer).await?;
        self.write(buffer.get(..length).unwrap_or_default()).await?;
        Ok(length > 0)
    }

    /// Waits for `reading`, but not longer than the socket to be written to is intact.
    pub(crate) async fn unless_broken<T>(
        &self,
        reading: impl Future<Output = io::Result<T>>,
    ) -> Result<T, Fault> {
        tokio::select! {
            biased;
            result = reading => result.map_err(Fault::Reading),
            // The error itself is left on the socket, for the leg that reads from it.
            _ = self.to.ready(Interest::ERROR) => {
                Err(Fault::Writing(io::ErrorKind::ConnectionReset.into()))
            }
        }
    }

    /// Counts bytes that were written.
    pub(crate) fn count(&self, written: usize) {
        self.carried.fetch_add(written as u64, Ordering::Relaxed);
    }
}

/// An end of a relayed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that was accepted.
    Client,
    /// The one that leads onwards.
    Server,
}

/// Why a relayed connection ended before both streams did.
#[derive(Debug)]
pub enum Stop {
    /// This side is broken: it was reset, or its network failed.
    Broken(Side, io::Error),
    /// This side takes no more bytes, but has sent all of its own, which the other side got.
    Deaf(Side, io::Error),
    /// The client was refused when it had spoken.
    Refused,
}

/// A leg's end, as one of the directions of a relayed connection.
#[derive(Debug)]
pub enum LegEnd {
    /// This leg's socket is broken.
    Fault(Fault),
    /// The client was refused when it had spoken.
    Refused,
}

impl From<Fault> for LegEnd {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Runs both directions to their ends.
///
/// A socket that takes no more bytes may still have some to give (a server that answers "too
/// large" and closes): so when writing to it fails, what it has sent before is relayed first.
///
/// # Errors
/// When one of the directions did not reach its end.
pub async fn both(
    up: impl Future<Output = Result<(), LegEnd>>,
    down: impl Future<Output = Result<(), LegEnd>>,
) -> Result<(), Stop> {
    let (mut up, mut down) = (pin!(up), pin!(down));
    tokio::select! {
        end = &mut up => rest(end, Side::Client, Side::Server, down).await,
        end = &mut down => rest(end, Side::Server, Side::Client, up).await,
    }
}

/// The rest of a connection after the direction from `from` to `to` has ended: `back` goes on.
async fn rest(
    ended: Result<(), LegEnd>,
    from: Side,
    to: Side,
    back: impl Future<Output = Result<(), LegEnd>>,
) -> Result<(), Stop> {
    let deaf = match ended {
        Ok(()) => None,
        Err(LegEnd::Refused) => return Err(Stop::Refused),
        Err(LegEnd::Fault(Fault::Reading(error))) => return Err(Stop::Broken(from, error)),
        Err(LegEnd::Fault(Fault::Writing(error))) => Some(error),
    };
    match (back.await, deaf) {
        (Err(LegEnd::Refused), _) => Err(Stop::Refused),
        (Err(LegEnd::Fault(Fault::Reading(error))), _) => Err(Stop::Broken(to, error)),
        (Err(LegEnd::Fault(Fault::Writing(error))), None) => Err(Stop::Deaf(from, error)),
        // Neither side takes any more bytes.
        (Err(LegEnd::Fault(Fault::Writing(error))), Some(_)) => Err(Stop::Broken(from, error)),
        (Ok(()), Some(error)) => Err(Stop::Deaf(to, error)),
        (Ok(()), None) => Ok(()),
    }
}

/// Makes the peer see a reset when the socket is closed, and drops what was not sent yet.
pub fn reset_on_close(socket: &TcpStream) {
    // It cannot fail on a socket; if it did, the peer would see an ordinary close.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// Throws away what still comes until its end, for at most `limit`. A socket that is closed with
/// bytes unread sends a reset, which can overtake and destroy what was sent before.
pub async fn discard(socket: &TcpStream, limit: Duration) {
    let reading = async {
        let mut buffer = vec![0; BUFFER];
        while socket.readable().await.is_ok() {
            match socket.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if is_transient(&error) => {}
                Err(_) => break,
            }
        }
    };
    // At the limit it is closed as it is.
    let _ = tokio::time::timeout(limit, reading).await;
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

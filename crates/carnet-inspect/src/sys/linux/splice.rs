//! splice(2): moving bytes from socket to socket through a pipe, without copying them to user mode.

use crate::relay::{BUFFER, Fault, Leg};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How much is moved at once: what a pipe holds by default. It bounds the kernel's memory for a
/// direction.
const CAPACITY: usize = 64 * 1024;

/// Relays the rest of a stream, but not its end. False if these sockets cannot be spliced, or
/// descriptors are short: nothing is lost, and copying does as well.
pub(crate) async fn carry(leg: &Leg<'_>) -> Result<bool, Fault> {
    let Ok(mut pipe) = Pipe::new() else { return Ok(false) };
    loop {
        match leg.unless_broken(pipe.fill(leg.from)).await {
            Ok(true) => {}
            Ok(false) => return Ok(true),
            Err(Fault::Reading(error)) if is_impossible(&error) => return Ok(false),
            Err(fault) => return Err(fault),
        }
        match pipe.drain(leg.to, |moved| leg.count(moved)).await {
            Ok(()) => {}
            Err(error) if is_impossible(&error) => {
                let mut buffer = vec![0; BUFFER];
                loop {
                    let length = pipe.take(&mut buffer)?;
                    if length == 0 {
                        return Ok(false);
                    }
                    leg.write(buffer.get(..length).unwrap_or_default()).await?;
                }
            }
            Err(error) => return Err(Fault::Writing(error)),
        }
    }
}

/// A pipe between two sockets.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes in the pipe.
    held: usize,
}

impl Pipe {
    /// An empty pipe.
    ///
    /// # Errors
    /// When the process or the system has no more descriptors.
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { read, write, held: 0 })
    }

    /// Moves what has come from `from` into the empty pipe; waits until something has. Returns
    /// false at the end of the stream. Cancelling it loses nothing.
    async fn fill(&mut self, from: &TcpStream) -> io::Result<bool> {
        // The pipe is empty: "would block" can only mean that nothing has come.
        let moved = from.async_io(Interest::READABLE, || step(from, &self.write, CAPACITY)).await?;
        self.held += moved;
        Ok(moved > 0)
    }

    /// Moves all that the pipe holds to `to`, and tells `moved` of each part.
    async fn drain(&mut self, to: &TcpStream, mut moved: impl FnMut(usize)) -> io::Result<()> {
        while self.held > 0 {
            let part = to.async_io(Interest::WRITABLE, || step(&self.read, to, self.held)).await?;
            if part == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.held -= part;
            moved(part);
        }
        Ok(())
    }

    /// Takes bytes out of the pipe by copying, for sockets that cannot be spliced to. None are
    /// left when it returns 0.
    fn take(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        if self.held == 0 {
            return Ok(0);
        }
        let taken = rustix::io::read(&self.read, buffer).map_err(|e| Fault::Reading(e.into()))?;
        self.held -= taken;
        Ok(taken)
    }
}

/// Whether splice(2) does not work with these sockets, where copying does.
fn is_impossible(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn step(
    from: impl std::os::fd::AsFd,
    to: impl std::os::fd::AsFd,
    length: usize,
) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(splice(from, None, to, None, length, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connecting = TcpStream::connect(listener.local_addr().unwrap());
        let (connected, accepted) = tokio::join!(connecting, listener.accept());
        (connected.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn what_was_filled_in_can_be_taken_out_by_copying() {
        let (mut sender, receiver) = connection().await;
        let mut pipe = Pipe::new().unwrap();
        sender.write_all(b"twelve bytes").await.unwrap();
        assert!(pipe.fill(&receiver).await.unwrap());
        let mut buffer = [0; 8];
        let mut taken = Vec::new();
        loop {
            match pipe.take(&mut buffer).unwrap() {
                0 => break,
                length => taken.extend_from_slice(&buffer[..length]),
            }
        }
        assert_eq!(taken, b"twelve bytes");

        sender.shutdown().await.unwrap();
        assert!(!pipe.fill(&receiver).await.unwrap());
    }

    #[tokio::test]
    async fn parts_are_told_and_sum_up() {
        let (mut sender, receiver) = connection().await;
        let (onwards, _far) = connection().await;
        let mut pipe = Pipe::new().unwrap();
        sender.write_all(&[7; 5000]).await.unwrap();
        let mut told = 0;
        while told < 5000 {
            assert!(pipe.fill(&receiver).await.unwrap());
            pipe.drain(&onwards, |part| told += part).await.unwrap();
        }
        assert_eq!((told, pipe.held), (5000, 0));
    }

    #[test]
    fn only_a_missing_ability_is_called_impossible() {
        let error = |errno: Errno| io::Error::from_raw_os_error(errno.raw_os_error());
        assert!(is_impossible(&error(Errno::INVAL)));
        assert!(!is_impossible(&error(Errno::CONNRESET)));
        assert!(!is_impossible(&io::ErrorKind::WriteZero.into()));
    }
}

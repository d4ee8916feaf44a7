//! The checked exchange: a client of [`EchoServer`](crate::EchoServer) that knows every byte it is
//! to get back.
//!
//! Both directions run at once, then the client ends its half, and the server must end the other
//! one after the last byte: neither earlier (lost data) nor later (foreign data).

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    str::FromStr,
    thread,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

/// How much is sent or checked at a time, in bytes. A multiple of the pattern's word of 8.
const CHUNK: usize = 64 * 1024;

/// The socket that a client uses to reach an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// The family of the address.
    #[default]
    Native,
    /// AF_INET; the address must be IPv4.
    V4,
    /// AF_INET6; the address must be IPv6.
    V6,
    /// AF_INET6 to `::ffff:A.B.C.D`; the address must be IPv4.
    Mapped,
}

impl FromStr for Family {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "native" => Ok(Self::Native),
            "v4" => Ok(Self::V4),
            "v6" => Ok(Self::V6),
            "mapped" => Ok(Self::Mapped),
            _ => Err(format!("{name:?} is none of native, v4, v6, mapped")),
        }
    }
}

impl Family {
    /// The name that [`FromStr`] reads.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }

    /// The address to give to connect(), and to bind().
    fn address(self, address: SocketAddr) -> io::Result<SocketAddr> {
        match (self, address) {
            (Self::Native, _) | (Self::V4, SocketAddr::V4(_)) | (Self::V6, SocketAddr::V6(_)) => {
                Ok(address)
            }
            (Self::Mapped, SocketAddr::V4(v4)) => Ok((v4.ip().to_ipv6_mapped(), v4.port()).into()),
            (Self::Mapped, SocketAddr::V6(v6)) if is_mapped(v6.ip()) => Ok(address),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{address} is not of family {}", self.name()),
            )),
        }
    }
}

fn is_mapped(ip: &Ipv6Addr) -> bool {
    ip.to_ipv4_mapped().is_some()
}

/// How to open a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The socket's family.
    pub family: Family,
    /// The local address to bind to before connecting; port 0 for any.
    pub bind: Option<SocketAddr>,
    /// Whether to make a Multipath TCP socket.
    pub mptcp: bool,
    /// The longest that connecting, and any single send or receive, may take.
    pub timeout: Duration,
}

impl Default for ConnectOptions {
    /// The address's own family, unbound, plain TCP, 30 seconds.
    fn default() -> Self {
        Self { family: Family::Native, bind: None, mptcp: false, timeout: Duration::from_secs(30) }
    }
}

/// Opens a connection from the calling thread's network namespace, by an ordinary blocking
/// connect().
///
/// # Errors
/// As socket(), bind() and connect() give them; `TimedOut` after the options' timeout;
/// `InvalidInput` if an address does not suit the family.
pub fn connect(to: SocketAddr, options: &ConnectOptions) -> io::Result<TcpStream> {
    let to = options.family.address(to)?;
    let protocol = if options.mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    // On Linux, the send timeout bounds connect() as well, without making the socket non-blocking.
    socket.set_write_timeout(Some(options.timeout))?;
    socket.set_read_timeout(Some(options.timeout))?;
    if let Some(local) = options.bind {
        socket.bind(&options.family.address(local)?.into())?;
    }
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            Err(io::Error::from_raw_os_error(libc::ETIMEDOUT))
        }
        result => result.map(|()| socket.into()),
    }
}

/// Why an exchange failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// No connection.
    #[error("cannot connect to {to}")]
    Connect {
        /// The address.
        to: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// Sending failed.
    #[error("cannot send")]
    Send(#[source] io::Error),
    /// Receiving failed.
    #[error("cannot receive after {received} bytes")]
    Receive {
        /// How many bytes had come back.
        received: u64,
        /// The cause.
        source: io::Error,
    },
    /// The other side ended its half too early.
    #[error("the stream ended after {received} of {expected} bytes")]
    Truncated {
        /// How many bytes came back.
        received: u64,
        /// How many were due.
        expected: u64,
    },
    /// A byte came back changed.
    #[error("the byte at offset {offset} is {found:#04x} instead of {expected:#04x}")]
    Corrupt {
        /// Where it is in the stream.
        offset: u64,
        /// What was sent.
        expected: u8,
        /// What came back.
        found: u8,
    },
    /// More came back than was sent.
    #[error("the stream goes on after all {expected} bytes")]
    Excess {
        /// How many were due.
        expected: u64,
    },
}

impl ExchangeError {
    /// The operating system's error, where there is one.
    #[must_use]
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::Connect { source, .. } | Self::Receive { source, .. } => Some(source),
            Self::Send(source) => Some(source),
            Self::Truncated { .. } | Self::Corrupt { .. } | Self::Excess { .. } => None,
        }
    }
}

/// Connects to an echo server from the calling thread's network namespace, and makes
/// [one exchange](checked_exchange_over).
///
/// # Errors
/// [`ExchangeError`] says at which step and how.
pub fn checked_exchange(to: SocketAddr, bytes: u64, seed: u64) -> Result<(), ExchangeError> {
    let stream = connect(to, &ConnectOptions::default())
        .map_err(|source| ExchangeError::Connect { to, source })?;
    checked_exchange_over(&stream, bytes, seed)
}

/// Sends `bytes` pseudo-random bytes that depend on `seed`, ends its half of the connection, and
/// meanwhile checks that the same bytes come back and that the stream ends after them. Bounded in
/// time by the stream's own timeouts.
///
/// # Errors
/// [`ExchangeError`]: the first failure of receiving if there is one, else of sending.
pub fn checked_exchange_over(
    stream: &TcpStream,
    bytes: u64,
    seed: u64,
) -> Result<(), ExchangeError> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream, bytes, seed));
        let received = receive(stream, bytes, seed);
        if received.is_err() {
            // So that the sender is not left waiting for a reader; it may have been reset already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        received.and(sent.map_err(ExchangeError::Send))
    })
}

fn send(mut stream: &TcpStream, bytes: u64, seed: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut offset = 0;
    while offset < bytes {
        let part = part_of(&mut chunk, bytes - offset);
        fill(part, offset, seed);
        stream.write_all(part)?;
        offset += part.len() as u64;
    }
    stream.shutdown(Shutdown::Write)
}

fn receive(mut stream: &TcpStream, bytes: u64, seed: u64) -> Result<(), ExchangeError> {
    let mut chunk = vec![0; CHUNK];
    let mut pattern = vec![0; CHUNK];
    let mut offset = 0;
    while offset < bytes {
        let part = part_of(&mut chunk, bytes - offset);
        let length = read_full(stream, part)
            .map_err(|source| ExchangeError::Receive { received: offset, source })?;
        let expected = part_of(&mut pattern, length as u64);
        fill(expected, offset, seed);
        if part[..length] != *expected {
            let differs = part.iter().zip(&*expected).position(|(found, sent)| found != sent);
            let at = differs.unwrap_or_default();
            return Err(ExchangeError::Corrupt {
                offset: offset + at as u64,
                expected: expected[at],
                found: part[at],
            });
        }
        offset += length as u64;
        if length < part.len() {
            return Err(ExchangeError::Truncated { received: offset, expected: bytes });
        }
    }
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(ExchangeError::Excess { expected: bytes }),
        Err(source) => Err(ExchangeError::Receive { received: offset, source }),
    }
}

/// The beginning of a chunk: all of it, or as much as is left to do.
fn part_of(chunk: &mut [u8], left: u64) -> &mut [u8] {
    let length = usize::try_from(left).map_or(chunk.len(), |left| left.min(chunk.len()));
    &mut chunk[..length]
}

/// Reads until the buffer is full or the stream ends; returns how much was read.
fn read_full(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match stream.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// Fills a buffer with the part of the stream that begins at `offset`, a multiple of 8. Each word
/// of 8 bytes is the mixed (SplitMix64) sum of the seed and the word's number, so that a stream
/// that repeats, drops, or swaps anything differs.
fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    for (word, number) in buffer.chunks_mut(8).zip(offset / 8..) {
        let mut x = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        word.copy_from_slice(&x.to_le_bytes()[..word.len()]);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// The two ends of a connection over loopback.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let near = connect(listener.local_addr().unwrap(), &ConnectOptions::default()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    /// An exchange of `bytes` bytes against a peer that answers `answer(what it received)`.
    fn against(
        bytes: u64,
        answer: impl FnOnce(Vec<u8>) -> Vec<u8> + Send,
    ) -> Result<(), ExchangeError> {
        let (near, mut far) = pair();
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut data = Vec::new();
                far.read_to_end(&mut data).unwrap();
                far.write_all(&answer(data)).unwrap();
            });
            checked_exchange_over(&near, bytes, 7)
        })
    }

    #[test]
    fn an_honest_echo_passes() {
        for bytes in [0, 1, 7, 8, 9, CHUNK as u64 - 1, CHUNK as u64 + 13] {
            against(bytes, |data| data).unwrap();
        }
    }

    #[test]
    fn one_changed_byte_is_found() {
        let result = against(100_000, |mut data| {
            data[77_777] ^= 1;
            data
        });
        assert!(matches!(result, Err(ExchangeError::Corrupt { offset: 77_777, .. })), "{result:?}");
    }

    #[test]
    fn a_missing_byte_and_a_surplus_byte_are_found() {
        let result = against(1000, |mut data| {
            data.pop();
            data
        });
        let truncated =
            matches!(result, Err(ExchangeError::Truncated { received: 999, expected: 1000 }));
        assert!(truncated, "{result:?}");
        let result = against(1000, |mut data| {
            data.push(0);
            data
        });
        assert!(matches!(result, Err(ExchangeError::Excess { expected: 1000 })), "{result:?}");
    }

    #[test]
    fn the_pattern_depends_on_seed_and_offset() {
        let mut whole = [0; 64];
        fill(&mut whole, 0, 1);
        let mut second_half = [0; 32];
        fill(&mut second_half, 32, 1);
        assert_eq!(whole[32..], second_half);
        fill(&mut second_half, 32, 2);
        assert_ne!(whole[32..], second_half);
    }

    #[test]
    fn an_address_must_suit_the_family() {
        let v4: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        assert_eq!(Family::Mapped.address(v4).unwrap(), "[::ffff:192.0.2.1]:1".parse().unwrap());
        for (family, address) in [(Family::V4, v6), (Family::V6, v4), (Family::Mapped, v6)] {
            let error = family.address(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}

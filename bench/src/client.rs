//! The load: a process that makes a number of connections with blocking sockets, one after the
//! other in each of its threads, and tells how long they took.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::net::sockopt::set_socket_linger;
use serde::{Deserialize, Serialize};

use crate::server::{REQUEST, RESPONSE};
use crate::statistics::percentile;

/// What one connection consists of, and what of it is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Exchange {
    /// Nothing: the connection is reset at once, so that neither end keeps its port busy. Timed:
    /// connect() and close().
    Nothing,
    /// A small HTTP request and response. Timed: from before connect() to the end of the stream.
    Request,
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Request => "request",
        })
    }
}

/// A number of connections to one server.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Load {
    /// The server.
    #[arg(long)]
    pub(crate) to: SocketAddr,
    /// How many connections; each thread makes its share, rounded up.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) connections: u32,
    /// How many threads.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) threads: u32,
    /// What each connection consists of.
    #[arg(long, value_enum)]
    pub(crate) exchange: Exchange,
}

/// What a load measured. The client prints it as one line of JSON.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// How many connections were made, every one with the right response.
    pub(crate) connections: u64,
    /// How long all of them together took.
    pub(crate) seconds: f64,
    /// Median of what one took, in nanoseconds.
    pub(crate) p50: u64,
    /// 99th percentile of what one took, in nanoseconds.
    pub(crate) p99: u64,
}

impl Measured {
    /// Connections per second.
    pub(crate) fn rate(&self) -> f64 {
        self.connections as f64 / self.seconds
    }
}

impl Load {
    /// The command line of the client that makes it.
    pub(crate) fn arguments(&self) -> [String; 9] {
        let Self { to, connections, threads, exchange } = self;
        [
            "client".into(),
            "--to".into(),
            to.to_string(),
            "--connections".into(),
            connections.to_string(),
            "--threads".into(),
            threads.to_string(),
            "--exchange".into(),
            exchange.to_string(),
        ]
    }

    /// Makes one connection and times it.
    fn connect(&self, buffer: &mut [u8; RESPONSE.len() + 1]) -> io::Result<Duration> {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(self.to)?;
        if self.exchange == Exchange::Nothing {
            let connected = begun.elapsed();
            set_socket_linger(&stream, Some(Duration::ZERO))?;
            let closing = Instant::now();
            drop(stream);
            return Ok(connected + closing.elapsed());
        }
        stream.write_all(REQUEST)?;
        let mut length = 0;
        loop {
            let room = buffer.get_mut(length..).unwrap_or_default();
            match stream.read(room)? {
                0 => break,
                read => length += read,
            }
        }
        if buffer.get(..length) != Some(RESPONSE) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the server's response"));
        }
        Ok(begun.elapsed())
    }
}

/// Carries a load out and prints what it measured.
///
/// # Errors
/// When a connection fails, or brings another response than the server's.
pub(crate) fn run(load: &Load) -> Result<()> {
    let share = load.connections.div_ceil(load.threads);
    let start = Barrier::new(load.threads as usize + 1);
    let one_thread = || -> io::Result<Vec<u64>> {
        let mut taken = Vec::with_capacity(share as usize);
        let mut buffer = [0; RESPONSE.len() + 1];
        start.wait();
        for _ in 0..share {
            taken.push(load.connect(&mut buffer)?.as_nanos() as u64);
        }
        Ok(taken)
    };
    let (seconds, mut taken) = thread::scope(|scope| -> Result<_> {
        let threads: Vec<_> = (0..load.threads).map(|_| scope.spawn(one_thread)).collect();
        start.wait();
        let begun = Instant::now();
        let mut taken = Vec::with_capacity(load.connections as usize);
        for thread in threads {
            let Ok(result) = thread.join() else { bail!("a thread of the client panicked") };
            taken.extend(result.with_context(|| format!("a connection to {} failed", load.to))?);
        }
        Ok((begun.elapsed().as_secs_f64(), taken))
    })?;
    taken.sort_unstable();
    let measured = Measured {
        connections: taken.len() as u64,
        seconds,
        p50: percentile(&taken, 50),
        p99: percentile(&taken, 99),
    };
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

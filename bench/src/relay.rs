//! The process `relay`: as little of a relay as does the job, for measurements of what redirecting
//! costs where the relay itself costs little. carnet-inspect does much more for a connection, on
//! which the difference between ways to redirect is a smaller part.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::Shutdown;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_gid, set_thread_uid};
use socket2::SockRef;

/// How many threads accept and relay, one connection at a time each: enough that none of a client's
/// few threads ever waits for one.
const THREADS: usize = 16;
/// Size in bytes of a thread's buffer.
const BUFFER: usize = 16 * 1024;

/// How to start it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Ask the connection tracker for destinations, instead of being a service of Carnet's.
    #[arg(long)]
    conntrack: bool,
    /// The user and group to run as.
    #[arg(long)]
    user: u32,
}

/// Runs it. Prints "ready" and its address when connections can come.
///
/// # Errors
/// When it cannot listen or register.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("relay cannot listen")?;
    if !arguments.conntrack {
        carnet::register_listener(&listener).context("relay cannot register its listener")?;
    }
    // Before there are other threads, which inherit it.
    set_thread_gid(Gid::from_raw(arguments.user)).context("relay cannot change its group")?;
    set_thread_uid(Uid::from_raw(arguments.user)).context("relay cannot change its user")?;
    let address = listener.local_addr().context("relay's address cannot be read")?;
    let listener = Arc::new(listener);
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let listener = Arc::clone(&listener);
            thread::spawn(move || accept(&listener, arguments.conntrack))
        })
        .collect();
    println!("ready {address}");
    for thread in threads {
        if thread.join().is_err() {
            bail!("a thread of the relay panicked");
        }
    }
    Ok(())
}

/// Relays connections one after the other until the listener breaks.
fn accept(listener: &TcpListener, conntrack: bool) {
    let mut buffer = vec![0; BUFFER];
    while let Ok((accepted, _)) = listener.accept() {
        let server = if conntrack { connect(&accepted) } else { onwards(&accepted) };
        // What goes wrong with a connection, the client notices.
        drop(server.and_then(|server| relay([&accepted, &server], &mut buffer)));
    }
}

fn onwards(accepted: &TcpStream) -> io::Result<TcpStream> {
    carnet::connect_onwards(accepted).map_err(io::Error::other)
}

fn connect(accepted: &TcpStream) -> io::Result<TcpStream> {
    let destination: Option<SocketAddr> = SockRef::from(accepted).original_dst_v4()?.as_socket();
    TcpStream::connect(destination.ok_or(io::ErrorKind::AddrNotAvailable)?)
}

/// Carries bytes both ways until both streams have ended.
fn relay(sockets: [&TcpStream; 2], buffer: &mut [u8]) -> io::Result<()> {
    let [client, server] = sockets;
    let mut open = [true, true];
    while open != [false, false] {
        let wanted = open.map(|open| if open { PollFlags::IN } else { PollFlags::empty() });
        let mut events = [PollFd::new(client, wanted[0]), PollFd::new(server, wanted[1])];
        poll(&mut events, None)?;
        let ready = events.map(|event| !event.revents().is_empty());
        for (from, to) in [(0, 1), (1, 0)] {
            if !open[from] || !ready[from] {
                continue;
            }
            let length = { sockets[from] }.read(buffer)?;
            { sockets[to] }.write_all(buffer.get(..length).unwrap_or_default())?;
            if length == 0 {
                open[from] = false;
                rustix::net::shutdown(sockets[to], Shutdown::Write)?;
            }
        }
    }
    Ok(())
}

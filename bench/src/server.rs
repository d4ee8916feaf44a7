//! What answers the load.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use carnet_testbed::NetworkNamespace;
use rustix::net::Shutdown;

use crate::client::Exchange;

/// What clients send: something that carnet-inspect recognises.
pub(crate) const REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: bench.example\r\nConnection: close\r\n\r\n";
/// What they get.
pub(crate) const RESPONSE: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\ncarnet";

/// How many threads accept and answer: enough that none of a client's few threads ever waits for
/// one, and no thread has to be started for a connection.
const THREADS: usize = 8;

/// A server on threads of its own; it stops when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts a server in a namespace. Port 0 takes a free port.
    ///
    /// # Errors
    /// When it cannot listen there, or threads are short.
    pub(crate) fn start(
        namespace: &NetworkNamespace,
        address: SocketAddr,
        exchange: Exchange,
    ) -> Result<Self> {
        let listener = namespace
            .run(|| TcpListener::bind(address))?
            .with_context(|| format!("the server cannot listen on {address}"))?;
        let address = listener.local_addr().context("the server's address cannot be read")?;
        let mut server = Self { listener: Arc::new(listener), address, threads: Vec::new() };
        for _ in 0..THREADS {
            let listener = Arc::clone(&server.listener);
            let thread = thread::Builder::new()
                .name("server".into())
                .spawn(move || serve(&listener, exchange))
                .context("the server's threads cannot be started")?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    /// Where it listens, with the actual port.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ends every accept() on it. It cannot fail on a listening socket.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        for thread in self.threads.drain(..) {
            // A panic of the thread has already been printed.
            let _ = thread.join();
        }
    }
}

/// Serves connections one after the other until the listener is shut down.
fn serve(listener: &TcpListener, exchange: Exchange) {
    loop {
        match listener.accept() {
            // What goes wrong with a connection, the client notices.
            Ok((stream, _)) if exchange == Exchange::Request => drop(answer(stream)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => return,
        }
    }
}

/// Reads one request and answers it.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut request = [0; REQUEST.len()];
    stream.read_exact(&mut request)?;
    stream.write_all(RESPONSE)
}

/// The process `sink`: a redirect service that closes every connection, for measurements of what
/// the kernel alone does. Prints "ready" when its listener is registered.
///
/// # Errors
/// When it cannot listen or register.
pub(crate) fn sink() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("sink cannot listen")?;
    carnet::register_listener(&listener).context("sink cannot register its listener")?;
    println!("ready");
    serve(&listener, Exchange::Nothing);
    Ok(())
}

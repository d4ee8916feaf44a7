//! Carnet's reference redirect service.
//!
//! It accepts connections and UDP flows that Carnet redirected to it, asks where they were going
//! and which application made them, connects onwards with their redirect records, and relays both
//! ways, looking at the first bytes: HTTP/1 and TLS, DNS and QUIC, or something unknown. Rules allow
//! or refuse flows, and every flow leaves one line in the log.
//!
//! The program is `carnet-inspect`; [`run`] is all of it. The parts, from the outside inwards:
//!
//! | module | what it holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`config`], [`rules`] | the rules file; what rules mean |
//! | [`service`] | listeners, limits, draining |
//! | `flow` | one connection from its acceptance to its line in the log |
//! | `datagrams`, `gate` | UDP flows; which of their datagrams pass; the latter without I/O |
//! | [`origin`] | where a connection comes from and goes to, and the trait to test without an engine |
//! | [`proxy_protocol`] | headers that say where a connection goes, both ways |
//! | [`chain`] | the records in them, for chains that go on at another host |
//! | [`inspect`] | what a client's bytes and datagrams tell; no I/O |
//! | [`relay`] | bytes from socket to socket |
//! | [`log`] | the log |
//! | [`sys`] | what differs between Linux and Windows |
//!
//! # What it does with bytes
//!
//! The server's bytes are relayed to the client from the beginning, so protocols in which the
//! server speaks first never wait for inspection. The client's bytes are inspected while they pass;
//! they are held back only if a rule about hosts or protocols concerns the flow, and then until
//! the message is complete enough to decide, [`inspect::LIMIT`] bytes are there, or the time for
//! it has passed: what could not be recognised counts as unknown. Only the first request of an
//! HTTP connection is looked at, and only the first question of a DNS connection.
//!
//! # What it does with datagrams
//!
//! Each is relayed as it is, in both directions. If a rule about hosts or protocols concerns the
//! flow, everything that the client asks for is judged before it passes: each question of DNS, each
//! ClientHello of QUIC, each datagram that is neither. A question that is refused is answered
//! REFUSED, and the flow goes on. A QUIC connection that is refused is answered with
//! CONNECTION_REFUSED, on which clients fall back to TCP at once; nothing more of its flow passes,
//! since later packets of one connection cannot be told from those of another. What else is refused
//! is dropped without a word. A ClientHello whose pieces come in several datagrams is held back like
//! the first bytes of a connection, in few datagrams; what is late is judged when it comes.
//!
//! A flow ends when nothing has come for a while, and soon when all questions of DNS that it asked
//! are answered. Then, as at any time, its next datagram may begin another one.

pub mod chain;
pub mod cli;
pub mod config;
mod datagrams;
mod flow;
mod gate;
pub mod inspect;
pub mod log;
pub mod origin;
pub mod proxy_protocol;
pub mod relay;
pub mod rules;
pub mod service;
pub mod sys;

use anyhow::{Context as _, Result, bail};
use chain::Chain;
use chain::keyring::Keyring;
use cli::Arguments;
use log::{Log, Writer};
use origin::FlowSource;
use proxy_protocol::Announcing;
use rules::Rules;
use service::{Control, DatagramLimits, Options, Service};
use socket2::{Domain, Protocol, Socket, Type};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use sys::Signals;

/// How many connections may wait to be accepted; the system may allow fewer.
const BACKLOG: i32 = 4096;

/// How many bytes of datagrams, of all flows, may wait to be received.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Runs the service until it is told to end: by SIGTERM or SIGINT, on Windows by Ctrl-C or
/// Ctrl-Break.
///
/// # Errors
/// When it cannot begin: an address that is in use, a rules file with a mistake, no engine, … What
/// goes wrong later is said on the standard error, and the service goes on.
pub fn run(arguments: Arguments) -> Result<()> {
    let rules = arguments.rules.as_deref().map(config::load).transpose()?.unwrap_or_default();
    // What only the present user may open, is opened now.
    let chain = arguments.system.chain(arguments.send_proxy.is_some())?;
    let sockets = listen(&arguments)?;
    let target: Box<dyn Write + Send> = match &arguments.log_file {
        Some(path) => Box::new(append_to(path)?),
        None => Box::new(io::stdout()),
    };
    let ready = arguments.system.begin(&sockets.listeners, &sockets.datagrams)?;
    let (log, writer) = Log::start(arguments.log, target).context("starting the log's thread")?;
    let workers = match arguments.workers {
        Some(number) => number.get(),
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .context("starting the worker threads")?
        .block_on(serve(&arguments, &chain, sockets, rules, log, ready))?;
    Writer::finish(writer);
    if let Some(gate) = &chain.gate {
        say(format_args!("{gate}"));
    }
    Ok(())
}

async fn serve(
    arguments: &Arguments,
    chain: &Chain,
    sockets: Sockets,
    rules: Rules,
    log: Log,
    ready: Option<File>,
) -> Result<()> {
    let options = Options {
        name: arguments.name.clone(),
        max_connections: arguments.max_connections,
        inspect_timeout: arguments.inspect_timeout,
        connect_timeout: arguments.connect_timeout,
        drain_timeout: arguments.drain_timeout,
        datagrams: datagrams(arguments).unwrap_or_default(),
    };
    let Sockets { listeners, datagrams } = sockets;
    let addresses: Vec<String> = listeners
        .iter()
        .map(|listener| listener.local_addr().map(|address| address.to_string()))
        .collect::<io::Result<_>>()?;
    let service = Service::new(options, source(arguments, chain), rules, log);
    let signals = Signals::install()?;
    let (control, rules) = (service.control(), arguments.rules.clone());
    let (ending, keys) = (control.clone(), chain.keys.clone());
    let signals =
        tokio::spawn(signals.obey(
            move || end(&ending),
            move || reload(&control, rules.as_deref(), keys.as_deref()),
        ));
    let announce = || {
        let line = format!("ready {}", addresses.join(" "));
        say(format_args!("{line}"));
        if let Some(mut descriptor) = ready
            && let Err(error) = writeln!(descriptor, "{line}")
        {
            say(format_args!("telling that the service is ready: {error}"));
        }
    };
    service.run(listeners, datagrams, announce).await?;
    signals.abort();
    Ok(())
}

/// Who tells where flows come from and go to, and how to get there.
fn source(arguments: &Arguments, chain: &Chain) -> Arc<dyn FlowSource> {
    let source = arguments.system.source(chain);
    match arguments.send_proxy {
        Some(service) => Arc::new(Announcing { source, service, chain: chain.keys.clone() }),
        None => source,
    }
}

/// The limits of UDP flows, if there are to be any: the PROXY protocol is for connections.
fn datagrams(arguments: &Arguments) -> Option<DatagramLimits> {
    arguments.system.datagrams().filter(|_| arguments.send_proxy.is_none())
}

/// The first request to end drains; the second one stops.
fn end(control: &Control) {
    if control.is_ending() {
        control.stop();
    } else {
        say(format_args!("ending: live connections go on; a second signal ends them at once"));
        control.drain();
    }
}

/// Reads again what was read from files.
fn reload(control: &Control, rules: Option<&Path>, keys: Option<&Keyring>) {
    if rules.is_none() && keys.is_none() {
        say(format_args!("nothing to read again: started without --rules and --chain-key"));
    }
    if let Some(path) = rules {
        reload_rules(control, path);
    }
    if let Some(keys) = keys
        && let Some(path) = keys.path()
    {
        match keys.reload() {
            Ok(number) => say(format_args!("{number} chain keys read from {}", path.display())),
            Err(error) => say(format_args!("the old chain keys stay in force: {error}")),
        }
    }
}

fn reload_rules(control: &Control, path: &Path) {
    match config::load(path) {
        Ok(rules) => {
            say(format_args!("{} rules read from {}", rules.rules.len(), path.display()));
            control.replace_rules(rules);
        }
        Err(error) => say(format_args!("the old rules stay in force: {error}")),
    }
}

/// What the service listens on: a listener for each address, and a socket for datagrams at the same
/// address and port, if there are to be any.
#[derive(Default)]
struct Sockets {
    listeners: Vec<TcpListener>,
    datagrams: Vec<UdpSocket>,
}

fn listen(arguments: &Arguments) -> Result<Sockets> {
    let mut sockets = Sockets::default();
    for &address in &arguments.listen {
        match bind_both(address, datagrams(arguments).is_some()) {
            Ok((listener, datagrams)) => {
                sockets.listeners.push(listener);
                sockets.datagrams.extend(datagrams);
            }
            // Nobody asked for it; a system without IPv6 has no such connections either.
            Err(_) if address.to_string() == cli::DEFAULT_V6 && !sockets.listeners.is_empty() => {
                say(format_args!("not listening on {address}: this system has no IPv6"));
            }
            Err(error) => bail!("listening on {address}: {error}"),
        }
    }
    Ok(sockets)
}

/// A listener and, if wanted, a socket for datagrams. A port that the system chose for the one may
/// be taken for the other: then it chooses again.
fn bind_both(address: SocketAddr, datagrams: bool) -> io::Result<(TcpListener, Option<UdpSocket>)> {
    let mut attempts = if address.port() == 0 { 20 } else { 1 };
    loop {
        attempts -= 1;
        let listener = bind(address)?;
        if !datagrams {
            return Ok((listener, None));
        }
        match bind_datagrams(listener.local_addr()?) {
            Ok(socket) => return Ok((listener, Some(socket))),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempts > 0 => {}
            Err(error) => {
                return Err(io::Error::new(error.kind(), format!("for datagrams: {error}")));
            }
        }
    }
}

/// A non-blocking socket for datagrams.
fn bind_datagrams(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    sys::enlarge_receive_buffer(&socket, RECEIVE_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A non-blocking listener. Accepted sockets inherit its options, which saves calls for each.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    sys::reuse_address(&socket)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn append_to(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("opening the log file {}", path.display()))
}

/// Says something to the operator, on the standard error; if nobody listens, all goes on.
fn say(message: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "carnet-inspect: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn datagrams_have_the_port_of_connections() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (listener, socket) = bind_both(address.parse().unwrap(), true).unwrap();
            let listens = listener.local_addr().unwrap();
            assert_eq!(socket.unwrap().local_addr().unwrap(), listens);
            drop(listener);
            assert!(bind_both(listens, false).unwrap().1.is_none());
        }
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let _taken = UdpSocket::bind(taken).unwrap();
        let message = bind_both(taken, true).unwrap_err().to_string();
        assert!(message.contains("for datagrams"), "{message}");
    }

    #[test]
    fn accepted_sockets_have_the_options_of_their_listener() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = bind(address.parse().unwrap()).unwrap();
            listener.set_nonblocking(false).unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert!(accepted.nodelay().unwrap());
            assert!(socket2::SockRef::from(&accepted).keepalive().unwrap());
        }
    }
}

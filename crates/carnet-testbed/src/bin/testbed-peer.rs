//! A client that checks every byte, and an echo server, as processes of their own.
//!
//! Tests start it through `carnet_testbed::PeerClient` and `carnet_testbed::PeerServer`.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    num::NonZeroUsize,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use carnet_testbed::{
    ClientPlan, EchoServer,
    datagrams::DatagramPlan,
    exchange::{ConnectOptions, Family},
};
use clap::{Args, Parser};

/// A TCP client that checks every byte, the echo server for it, and the same over UDP.
#[derive(Parser)]
#[command(name = "testbed-peer", version)]
enum Arguments {
    /// Exchange bytes with an echo server; print one line of JSON per connection.
    ///
    /// The exit status is 1 if any connection failed.
    Client(ClientArguments),
    /// Echo whatever is received, until standard input ends.
    ///
    /// Prints "ready ADDRESS…", with the actual ports, when it listens.
    Server(ServerArguments),
    /// Exchange datagrams with servers that say who they are; print a report in JSON.
    ///
    /// The exit status is 1 if anything was not as it should be.
    Datagrams(DatagramArguments),
}

#[derive(Args)]
struct ClientArguments {
    /// The echo server's address and port.
    #[arg(long, value_name = "ADDRESS")]
    to: SocketAddr,
    /// Bytes that each connection sends and gets back.
    #[arg(long, value_name = "N", default_value_t = 65536)]
    bytes: u64,
    /// Number of connections.
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: u64,
    /// Number of connections at a time.
    #[arg(long, value_name = "N", default_value = "1")]
    parallel: NonZeroUsize,
    /// Seed of the first connection's bytes.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Local address and port to bind to (port 0 for any).
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<SocketAddr>,
    /// Family of the socket: native (the address's own), v4, v6, mapped (IPv6 to ::ffff:A.B.C.D).
    #[arg(long, value_name = "FAMILY", default_value = "native")]
    family: Family,
    /// Use Multipath TCP.
    #[arg(long)]
    mptcp: bool,
    /// Longest time for connecting and for any single send or receive.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    timeout: u64,
}

#[derive(Args)]
struct ServerArguments {
    /// Address and port to listen on (port 0 for any); may be repeated.
    #[arg(long, value_name = "ADDRESS", required = true)]
    listen: Vec<SocketAddr>,
    /// Listen with Multipath TCP sockets, which serve plain TCP as well.
    #[arg(long)]
    mptcp: bool,
}

#[derive(Args)]
struct DatagramArguments {
    /// A server's address and port; may be repeated.
    #[arg(long, value_name = "ADDRESS", required = true)]
    to: Vec<SocketAddr>,
    /// Number of clients.
    #[arg(long, value_name = "N", default_value_t = 1)]
    clients: u32,
    /// Datagrams that each client sends to each server.
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: u32,
    /// Number of unanswered datagrams at a time, over all clients.
    #[arg(long, value_name = "N", default_value_t = 64)]
    window: usize,
    /// Connect the sockets.
    #[arg(long)]
    connected: bool,
    /// Longest time in which no answer comes.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse() {
        Arguments::Client(arguments) => client(&arguments),
        Arguments::Server(arguments) => server(&arguments),
        Arguments::Datagrams(arguments) => datagrams(arguments),
    }
}

fn client(arguments: &ClientArguments) -> anyhow::Result<ExitCode> {
    let plan = ClientPlan {
        to: arguments.to,
        bytes: arguments.bytes,
        count: arguments.count,
        parallel: arguments.parallel,
        seed: arguments.seed,
        options: ConnectOptions {
            family: arguments.family,
            bind: arguments.bind,
            mptcp: arguments.mptcp,
            timeout: Duration::from_secs(arguments.timeout),
        },
    };
    let mut all_ok = true;
    let mut printed = Ok(());
    plan.run(|report| {
        all_ok &= report.ok;
        if printed.is_ok() {
            printed = serde_json::to_string(&report)
                .map_err(io::Error::from)
                .and_then(|line| writeln!(io::stdout(), "{line}"));
        }
    })
    .context("cannot start a thread")?;
    printed.context("cannot print a report")?;
    Ok(if all_ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn server(arguments: &ServerArguments) -> anyhow::Result<ExitCode> {
    let addresses = arguments.listen.iter().copied();
    let server = if arguments.mptcp {
        EchoServer::start_multipath(addresses)?
    } else {
        EchoServer::start(addresses)?
    };
    let mut line = String::from("ready");
    for address in server.addresses() {
        line.push_str(&format!(" {address}"));
    }
    writeln!(io::stdout(), "{line}").context("cannot print that the server is ready")?;
    io::copy(&mut io::stdin().lock(), &mut io::sink()).context("cannot read standard input")?;
    Ok(ExitCode::SUCCESS)
}

fn datagrams(arguments: DatagramArguments) -> anyhow::Result<ExitCode> {
    let DatagramArguments { to, clients, rounds, window, connected, timeout } = arguments;
    let timeout = Duration::from_secs(timeout);
    let report = DatagramPlan { to, clients, rounds, window, connected, timeout }.run()?;
    let line = serde_json::to_string(&report).context("cannot write the report")?;
    writeln!(io::stdout(), "{line}").context("cannot print the report")?;
    Ok(if report.is_perfect() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

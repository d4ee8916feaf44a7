//! The processes at both ends of a crowd: a client that has very many connections at once, and a server
//! that echoes.

use std::io::stdin;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use carnet_testbed::datagrams::raise_file_limit;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How many connections are begun, or used, at the same time.
const AT_ONCE: usize = 256;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(300);

/// How to start the client.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ClientArguments {
    /// Where the server is.
    #[arg(long)]
    to: Vec<SocketAddr>,
    /// How many connections to have.
    #[arg(long)]
    count: u32,
}

/// Makes all connections and has each echo something, then does as it is told by a line each: `check`
/// has each echo something again, the end of input closes all. Says what it has done, with the seconds
/// that it took.
///
/// # Errors
/// When a connection fails.
pub(crate) fn client(arguments: &ClientArguments) -> Result<()> {
    raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let begun = Instant::now();
        let to = &arguments.to;
        let opened =
            (0..arguments.count as usize).map(|number| open(number, to[number % to.len()]));
        let mut streams = all(opened).await?;
        println!("open {:.1}", begun.elapsed().as_secs_f64());
        let mut order = String::new();
        while stdin().read_line(&mut order).context("reading an order")? > 0 {
            let begun = Instant::now();
            streams = all(streams.drain(..).map(again)).await?;
            println!("checked {:.1}", begun.elapsed().as_secs_f64());
            order.clear();
        }
        Ok(())
    })
}

/// A connection, with its number.
type Numbered = (usize, TcpStream);

/// Does something with all connections, some of them at the same time.
async fn all<F>(work: impl Iterator<Item = F>) -> Result<Vec<Numbered>>
where
    F: Future<Output = Result<Numbered>> + Send + 'static,
{
    let (mut running, mut done) = (JoinSet::new(), Vec::new());
    for one in work {
        if running.len() >= AT_ONCE
            && let Some(finished) = running.join_next().await
        {
            done.push(finished??);
        }
        running.spawn(one);
    }
    while let Some(finished) = running.join_next().await {
        done.push(finished??);
    }
    Ok(done)
}

async fn open(number: usize, to: SocketAddr) -> Result<Numbered> {
    let stream = timeout(LIMIT, TcpStream::connect(to)).await.context("connecting")?;
    let stream = stream.with_context(|| format!("connection {number} to {to}"))?;
    again((number, stream)).await
}

/// Has a connection echo something that no other one has.
async fn again((number, mut stream): Numbered) -> Result<Numbered> {
    let sent = format!("this is connection {number:>8}");
    let mut echoed = vec![0; sent.len()];
    let exchange = async {
        stream.write_all(sent.as_bytes()).await?;
        stream.read_exact(&mut echoed).await
    };
    let exchanged = timeout(LIMIT, exchange).await.context("waiting for an echo")?;
    exchanged.with_context(|| format!("connection {number}"))?;
    if echoed != sent.as_bytes() {
        bail!("connection {number} got another one's echo");
    }
    Ok((number, stream))
}

/// How to start the server.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServerArguments {
    /// Where it is.
    #[arg(long)]
    at: Vec<SocketAddr>,
}

/// Echoes until it is killed. Says when it is ready.
///
/// # Errors
/// When it cannot listen.
pub(crate) fn server(arguments: &ServerArguments) -> Result<()> {
    raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut accepting = JoinSet::new();
        for address in &arguments.at {
            let listener = std::net::TcpListener::bind(address).context("listening")?;
            rustix::net::listen(&listener, 4096)?;
            listener.set_nonblocking(true)?;
            accepting.spawn(accept(TcpListener::from_std(listener)?));
        }
        println!("ready");
        accepting.join_all().await;
        Ok(())
    })
}

async fn accept(listener: TcpListener) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    }
}

async fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 64];
    while let Ok(length) = stream.read(&mut buffer).await {
        if length == 0 || stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

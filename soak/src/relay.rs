//! The process `relay`: a redirect service that marks all that it relays, connections and datagrams.

use std::collections::HashMap;
use std::io::{Read as _, stdin};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use carnet::{DatagramFlow, Onwards};
use carnet_core::flow::is_source_token;
use tokio::io::{AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::proof::mark;

/// How long connecting onwards may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// How long a flow of datagrams is kept that has none.
const IDLE: Duration = Duration::from_secs(2);
/// Most bytes of a datagram.
const DATAGRAM: usize = 512;

/// How to start it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Its place among the services, from 0.
    #[arg(long)]
    place: usize,
    /// From which addresses it connects onwards, at most one of each family.
    #[arg(long)]
    source: Vec<IpAddr>,
    /// Relay one of so many connections without its mark, as if it had not passed: the soak must find
    /// that.
    #[arg(long)]
    forget_mark: Option<u64>,
}

/// Runs it until the standard input ends. Prints "ready" when it is registered.
///
/// # Errors
/// When it cannot listen or register.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    carnet_testbed::datagrams::raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let relay = Arc::new(Relay { arguments, relayed: Mutex::new(0) });
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let listener = listen(address)?;
            carnet::register_listener(&listener).context("registering a listener")?;
            tokio::spawn(Arc::clone(&relay).accept(listener));
            let socket = Arc::new(UdpSocket::bind((address, 0)).await?);
            carnet_testbed::widen(&*socket)?;
            carnet::register_listener(&*socket).context("registering a UDP socket")?;
            tokio::spawn(Arc::clone(&relay).receive(socket));
        }
        println!("ready");
        let (ended, end) = tokio::sync::oneshot::channel();
        thread::spawn(move || {
            // Whatever comes of it, the orchestrator has gone, or wants this process to end.
            let _ = stdin().read_to_end(&mut Vec::new());
            ended.send(())
        });
        end.await.context("waiting for the end")
    })
}

/// A listener whose queue does not overflow where everything else is busy.
fn listen(address: IpAddr) -> Result<TcpListener> {
    let socket = if address.is_ipv4() {
        tokio::net::TcpSocket::new_v4()
    } else {
        tokio::net::TcpSocket::new_v6()
    }?;
    socket.bind((address, 0).into())?;
    socket.listen(4096).context("listening")
}

struct Relay {
    arguments: Arguments,
    relayed: Mutex<u64>,
}

impl Relay {
    /// What to put before a flow.
    fn mark(&self) -> &'static [u8] {
        const MARKS: [[u8; 1]; 3] = [[1], [2], [3]];
        let mut relayed = self.relayed.lock().unwrap_or_else(PoisonError::into_inner);
        *relayed += 1;
        let forgets = self.arguments.forget_mark.is_some_and(|every| relayed.is_multiple_of(every));
        debug_assert_eq!(MARKS[self.arguments.place][0], mark(self.arguments.place));
        if forgets { &[] } else { &MARKS[self.arguments.place] }
    }

    /// The way onwards, from the service's own address.
    fn onwards(&self, of: &impl carnet::AsSocket) -> Result<Onwards, carnet::Error> {
        let onwards = Onwards::of(of)?;
        let ipv4 = onwards.destination().is_ipv4();
        let source = self.arguments.source.iter().find(|source| source.is_ipv4() == ipv4);
        Ok(match source {
            Some(source) => onwards.bind(SocketAddr::new(*source, 0)),
            None => onwards,
        })
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((accepted, _)) => drop(tokio::spawn(Arc::clone(&self).relay(accepted))),
                // One that was reset before it was accepted, or no descriptor is left.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    /// Relays a connection. What goes wrong with it, its ends notice.
    async fn relay(self: Arc<Self>, mut accepted: TcpStream) {
        let Ok(onwards) = self.onwards(&accepted) else {
            return;
        };
        let Ok(mut onward) = carnet::tokio::connect(&onwards.timeout(CONNECT_LIMIT)).await else {
            reset(&accepted);
            return;
        };
        if onward.write_all(self.mark()).await.is_err()
            || copy_bidirectional(&mut accepted, &mut onward).await.is_err()
        {
            reset(&accepted);
            reset(&onward);
        }
    }

    /// Relays the datagrams that come to a socket.
    async fn receive(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let sessions = Arc::new(Mutex::new(HashMap::new()));
        let mut buffer = [0; DATAGRAM];
        loop {
            let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
                // An earlier answer has found nobody.
                continue;
            };
            let known = lock(&sessions).get(&peer).cloned();
            let session = known.filter(Session::is_current);
            let Some(session) = session.or_else(|| self.begin(peer, &socket, &sessions)) else {
                continue;
            };
            let datagram = [self.mark(), &buffer[..length]].concat();
            // One that is lost is sent again.
            let _ = session.onward.send(&datagram).await;
        }
    }

    /// A flow of datagrams that has not been seen before.
    fn begin(&self, peer: SocketAddr, socket: &Arc<UdpSocket>, all: &Sessions) -> Option<Session> {
        let flow = DatagramFlow::of(peer).ok()?;
        let number = carnet::flow(&flow).ok()?.id;
        let onward = self.onwards(&flow).ok()?.connect_datagram().ok()?;
        onward.set_nonblocking(true).ok()?;
        let onward = Arc::new(UdpSocket::from_std(onward).ok()?);
        let session = Session { peer, number, onward };
        lock(all).insert(peer, session.clone());
        tokio::spawn(answer(session.clone(), Arc::clone(socket), Arc::clone(all)));
        Some(session)
    }
}

type Sessions = Arc<Mutex<HashMap<SocketAddr, Session>>>;

/// A flow of datagrams.
#[derive(Clone)]
struct Session {
    peer: SocketAddr,
    number: u64,
    onward: Arc<UdpSocket>,
}

impl Session {
    /// Whether its peer still stands for the same flow: a client's own address may have become another
    /// one's.
    fn is_current(&self) -> bool {
        is_source_token(&self.peer.into())
            || DatagramFlow::of(self.peer)
                .and_then(|flow| carnet::flow(&flow))
                .is_ok_and(|flow| flow.id == self.number)
    }
}

/// Takes the answers of a flow back, until there are none, or nobody is there any more: the next datagram
/// then goes the way that the policy has for it.
async fn answer(session: Session, socket: Arc<UdpSocket>, all: Sessions) {
    let mut buffer = [0; DATAGRAM];
    while let Ok(Ok(length)) = timeout(IDLE, session.onward.recv(&mut buffer)).await {
        // The flow may have ended.
        let _ = socket.send_to(&buffer[..length], session.peer).await;
    }
    let mut all = lock(&all);
    if all.get(&session.peer).is_some_and(|current| current.number == session.number) {
        all.remove(&session.peer);
    }
}

fn lock(sessions: &Sessions) -> std::sync::MutexGuard<'_, HashMap<SocketAddr, Session>> {
    sessions.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a connection end with a reset, so that its other end knows that something went wrong.
fn reset(stream: &TcpStream) {
    // It may be broken already.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

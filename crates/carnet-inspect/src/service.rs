//! The service: accepts connections and datagrams on its sockets until it is told to stop.
//!
//! It has three phases. It *serves*; it *drains*, when no more connections are accepted and those
//! that are there go on to their ends, for a limited time; it is *stopped*, when what is left is
//! reset. Flows of datagrams end sooner while it drains, when they are idle; those that begin then
//! are served too, for the socket that sends the answers of the others gets their datagrams.
//! [`Control`] moves it from phase to phase and replaces its rules.

use crate::datagrams::Relay;
use crate::flow::Context;
use crate::log::Log;
use crate::origin::FlowSource;
use crate::rules::Rules;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, UdpSocket as StdUdpSocket};
use std::num::NonZeroU32;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};

/// How long accepting rests when descriptors or memory are short.
const REST: Duration = Duration::from_millis(50);
/// How long flows may take to end when they are stopped.
const STOPPING: Duration = Duration::from_secs(1);

/// How a service behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// The service's name, for the log.
    pub name: String,
    /// How many connections it serves at once; more wait to be accepted.
    pub max_connections: NonZeroU32,
    /// How long bytes are held back, at most, while a decision needs more of them.
    pub inspect_timeout: Duration,
    /// How long connecting onwards may take.
    pub connect_timeout: Duration,
    /// How long live flows may go on when the service is drained.
    pub drain_timeout: Duration,
    /// How many flows of datagrams it serves, and for how long.
    pub datagrams: DatagramLimits,
}

/// The limits of flows of datagrams.
#[derive(Clone, Copy, Debug)]
pub struct DatagramLimits {
    /// How many there may be at once. One more, and those that were idle for longest give way.
    pub flows: NonZeroU32,
    /// How long a flow stays in which nothing comes.
    pub idle: Duration,
}

impl Default for DatagramLimits {
    /// 8192 flows, 60 seconds.
    fn default() -> Self {
        Self { flows: NonZeroU32::MIN.saturating_add(8191), idle: Duration::from_secs(60) }
    }
}

/// What the service is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Phase {
    Serving,
    Draining,
    Stopped,
}

/// Controls a service from outside. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control {
    phase: watch::Sender<Phase>,
    rules: Arc<RwLock<Arc<Rules>>>,
}

impl Control {
    /// Accepts no more connections and lets those that are there come to their ends.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// Ends everything at once.
    pub fn stop(&self) {
        self.advance(Phase::Stopped);
    }

    /// Whether the service has been told to drain or stop.
    pub fn is_ending(&self) -> bool {
        *self.phase.borrow() > Phase::Serving
    }

    /// Replaces the rules, for flows that begin from now on.
    pub fn replace_rules(&self, rules: Rules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    pub(crate) fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = to > *phase;
            if later {
                *phase = to;
            }
            later
        });
    }

    /// Returns when the service is in `phase` or a later one.
    pub(crate) async fn reached(&self, phase: Phase) {
        // It cannot fail: this very control keeps the sender.
        let _ = self.phase.subscribe().wait_for(|&now| now >= phase).await;
    }
}

/// A redirect service that is ready to run.
pub struct Service {
    context: Arc<Context>,
    control: Control,
    datagrams: Arc<Relay>,
    free: Arc<Semaphore>,
    max_connections: u32,
    drain_timeout: Duration,
}

impl Service {
    /// A service that learns of its connections from `source` and logs them to `log`.
    pub fn new(options: Options, source: Arc<dyn FlowSource>, rules: Rules, log: Log) -> Self {
        let max_connections = options.max_connections.get();
        let context = Arc::new(Context {
            name: options.name,
            source,
            log,
            inspect_timeout: options.inspect_timeout,
            connect_timeout: options.connect_timeout,
        });
        let control = Control {
            phase: watch::Sender::new(Phase::Serving),
            rules: Arc::new(RwLock::new(Arc::new(rules))),
        };
        let datagrams = Relay::new(Arc::clone(&context), control.clone(), options.datagrams);
        Self {
            context,
            control,
            datagrams: Arc::new(datagrams),
            free: Arc::new(Semaphore::new(max_connections as usize)),
            max_connections,
            drain_timeout: options.drain_timeout,
        }
    }

    /// What controls this service.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Serves connections that come to `listeners` and datagrams that come to `sockets`, which must
    /// be non-blocking, until the service has been drained or stopped. `ready` is called when
    /// nothing that comes is lost any more.
    ///
    /// # Errors
    /// When a socket cannot be used with tokio: usually it is blocking.
    pub async fn run(
        self,
        listeners: Vec<StdListener>,
        sockets: Vec<StdUdpSocket>,
        ready: impl FnOnce(),
    ) -> io::Result<()> {
        let service = Arc::new(self);
        let mut receiving = Vec::new();
        for (place, socket) in sockets.into_iter().enumerate() {
            let socket = UdpSocket::from_std(socket)?;
            receiving.push(tokio::spawn(Arc::clone(&service.datagrams).receive(socket, place)));
        }
        let mut accepting = Vec::new();
        for listener in listeners {
            let listener = TcpListener::from_std(listener)?;
            accepting.push(tokio::spawn(Arc::clone(&service).accept(listener)));
        }
        ready();
        for task in accepting {
            // A panic of the task has already been printed; the others go on.
            let _ = task.await;
        }
        service.control.reached(Phase::Draining).await;
        tokio::select! {
            () = service.idle() => {}
            () = sleep(service.drain_timeout) => {}
            () = service.control.reached(Phase::Stopped) => {}
        }
        service.control.stop();
        // Flows that are stopped only have their line to write.
        let _ = timeout(STOPPING, service.idle()).await;
        for task in receiving {
            let _ = timeout(STOPPING, task).await;
        }
        Ok(())
    }

    /// Returns when there are neither connections nor flows of datagrams.
    async fn idle(&self) {
        // The semaphore is never closed.
        let _ = self.free.acquire_many(self.max_connections).await;
        self.datagrams.idle().await;
    }

    /// Accepts connections until the service drains.
    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut draining = std::pin::pin!(self.control.reached(Phase::Draining));
        loop {
            let next = async {
                let place =
                    Arc::clone(&self.free).acquire_owned().await.map_err(io::Error::other)?;
                Ok((place, listener.accept().await?))
            };
            let accepted: io::Result<_> = tokio::select! {
                biased;
                () = &mut draining => break,
                accepted = next => accepted,
            };
            match accepted {
                Ok((place, (stream, peer))) => self.begin(stream, peer, place),
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    crate::say(format_args!("accepting connections: {error}; trying again"));
                    sleep(REST).await;
                }
            }
        }
        // Those that the kernel has accepted already were promised service.
        if let Ok(listener) = listener.into_std() {
            while let Ok(place) = Arc::clone(&self.free).try_acquire_owned()
                && let Ok((stream, peer)) = listener.accept()
                && stream.set_nonblocking(true).is_ok()
                && let Ok(stream) = TcpStream::from_std(stream)
            {
                self.begin(stream, peer, place);
            }
        }
    }

    /// Serves a connection in a task of its own; it has its `place` until it ends.
    fn begin(&self, stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit) {
        let (context, control) = (Arc::clone(&self.context), self.control.clone());
        let rules = control.rules();
        let stopped = async move { control.reached(Phase::Stopped).await };
        tokio::spawn(context.serve(stream, peer, rules, stopped, place));
    }
}

/// Whether accepting failed because of the one connection that was to be accepted.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

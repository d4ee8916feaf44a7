//! One connection, from its acceptance to its line in the log.

use crate::inspect::{Inspector, Seen};
use crate::log::{Entry, Log};
use crate::origin::{FlowSource, Origin, Route};
use crate::relay::{BUFFER, Leg, LegEnd, Side, Stop, both, discard, reset_on_close};
use crate::rules::{Action, Decision, Facts, Rules, Transport, Verdict};
use socket2::SockRef;
use std::convert::Infallible;
use std::future::{Future, pending};
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};

/// How long a connection has to last before it is probed whether its server is still there.
const LASTING: Duration = Duration::from_secs(30);
/// How long a peer may take to notice that it has been answered for good, before it is closed.
const LINGER: Duration = Duration::from_secs(2);

/// What HTTP clients get that are refused, if the rules say so.
const FORBIDDEN: &[u8] = b"HTTP/1.1 403 Forbidden\r\n\
    Content-Type: text/plain; charset=utf-8\r\n\
    Content-Length: 32\r\n\
    Connection: close\r\n\
    \r\n\
    Refused by an inspection policy.";

/// What serving a connection takes.
pub(crate) struct Context {
    /// The service's name, for the log.
    pub(crate) name: String,
    /// Tells where connections come from and go to.
    pub(crate) source: Arc<dyn FlowSource>,
    /// Where flows are logged.
    pub(crate) log: Log,
    /// How long bytes are held back, at most, while the decision needs more of them.
    pub(crate) inspect_timeout: Duration,
    /// How long connecting onwards may take.
    pub(crate) connect_timeout: Duration,
}

/// Bytes relayed, counted while they are.
#[derive(Default)]
struct Traffic {
    up: AtomicU64,
    down: AtomicU64,
}

impl Context {
    /// Serves an accepted connection until it ends or `stopped` does, and logs it. It has its
    /// `place` until then.
    pub(crate) async fn serve(
        self: Arc<Self>,
        accepted: TcpStream,
        peer: SocketAddr,
        rules: Arc<Rules>,
        stopped: impl Future<Output = ()>,
        place: impl Sized,
    ) {
        let begun = Instant::now();
        let traffic = Traffic::default();
        let mut entry = Entry::new(&self.name, peer);
        let ended = tokio::select! {
            biased;
            ended = self.converse(&accepted, &rules, &traffic, &mut entry) => ended,
            () = stopped => {
                reset_on_close(&accepted);
                Some("the service was stopped".to_owned())
            }
        };
        drop(accepted);
        entry.ended = ended;
        entry.bytes_up = traffic.up.load(Ordering::Relaxed);
        entry.bytes_down = traffic.down.load(Ordering::Relaxed);
        entry.close(begun.elapsed());
        self.log.add(&entry).await;
        drop(place);
    }

    /// The whole conversation. Returns why it ended, if not because both sides were done.
    async fn converse(
        &self,
        client: &TcpStream,
        rules: &Rules,
        traffic: &Traffic,
        entry: &mut Entry,
    ) -> Option<String> {
        let origin = match self.source.origin_in_time(client, self.inspect_timeout).await {
            Ok(origin) => origin,
            Err(error) => {
                entry.verdict = Action::Refuse;
                reset_on_close(client);
                return Some(error.to_string());
            }
        };
        let destination = origin.destination;
        let route = describe(entry, origin);
        let executable = entry.executable.clone();
        let facts =
            Facts { transport: Transport::Tcp, destination, executable: executable.as_deref() };
        let decision = rules.decide(facts, None);
        if let Decision::Settled(verdict) = &decision {
            record(entry, verdict);
            if verdict.action == Action::Refuse {
                reset_on_close(client);
                return None;
            }
        }

        // Also while the decision is open: it may be the server that speaks first.
        let server = match route.connect(self.connect_timeout).await {
            Ok(server) => server,
            Err(error) => {
                reset_on_close(client);
                return Some(error.to_string());
            }
        };
        let mut inspector = Inspector::new();
        let result = {
            let up = Upload {
                leg: Leg::new(client, &server, &traffic.up),
                server: &server,
                inspector: &mut inspector,
                patience: self.inspect_timeout,
            };
            // Pinned where they are: futures that are handed on by value are copied each time, and
            // these are large.
            let up = pin!(async {
                match decision {
                    Decision::Settled(_) => up.look().await,
                    Decision::Open => up.hold(|seen| settle(rules, facts, seen, entry)).await,
                }
            });
            let down = pin!(async {
                let leg = Leg::new(&server, client, &traffic.down);
                leg.relay(vec![0; BUFFER]).await.map_err(LegEnd::from)
            });
            let probe = pin!(probe_later(&server));
            tokio::select! {
                biased;
                result = both(up, down) => result,
                never = probe => match never {},
            }
        };
        entry.tell(inspector.into_seen());
        match result {
            Ok(()) => None,
            Err(Stop::Refused) => {
                reset_on_close(&server);
                drop(server);
                let answer = rules.http_response && entry.request.is_some();
                refuse(client, answer && traffic.down.load(Ordering::Relaxed) == 0).await
            }
            Err(Stop::Broken(side, error)) => {
                reset_on_close(client);
                reset_on_close(&server);
                Some(broken(side, &error))
            }
            Err(Stop::Deaf(side, error)) => {
                let other = if side == Side::Client { &server } else { client };
                discard(other, LINGER).await;
                Some(broken(side, &error))
            }
        }
    }
}

// Accepted sockets have these options from their listener. The sockets that lead onwards get them
// when they need them, since every call on a socket costs a service, and most connections are short
// and send one request. Without them all works, only less well.

/// Makes segments go out as they are: whoever sent small ones meant it. What is written first is not
/// held back in any case.
fn send_at_once(server: &TcpStream) {
    let _ = server.set_nodelay(true);
}

/// Has a peer that vanished without a word found out, in time, if the connection lasts.
async fn probe_later(server: &TcpStream) -> Infallible {
    sleep(LASTING).await;
    let _ = SockRef::from(server).set_keepalive(true);
    pending().await
}

/// Puts what is known of a flow into its line. What is left is how to get onwards.
pub(crate) fn describe(entry: &mut Entry, origin: Origin) -> Route {
    entry.destination = Some(origin.destination);
    if let Some(flow) = origin.flow {
        (entry.flow, entry.hops) = (Some(flow.id), Some(flow.hops));
    }
    if let Some(app) = origin.app {
        (entry.pid, entry.uid) = (Some(app.pid), Some(app.uid));
        (entry.executable, entry.command) = (app.executable, Some(app.command));
    }
    origin.route
}

/// Settles an open decision with what the client said.
fn settle(rules: &Rules, facts: Facts<'_>, seen: &Seen, entry: &mut Entry) -> Result<(), LegEnd> {
    let Decision::Settled(verdict) = rules.decide(facts, Some(seen)) else {
        // With the client's words every decision is settled; if not, better refuse.
        return Err(LegEnd::Refused);
    };
    record(entry, &verdict);
    if verdict.action == Action::Refuse { Err(LegEnd::Refused) } else { Ok(()) }
}

fn record(entry: &mut Entry, verdict: &Verdict) {
    entry.verdict = verdict.action;
    entry.rule.clone_from(&verdict.rule);
}

/// Ends a client's connection, with a response if it is to have one.
async fn refuse(client: &TcpStream, answer: bool) -> Option<String> {
    // The socket's buffer is empty: a short response goes out at once or not at all.
    if answer && client.try_write(FORBIDDEN).is_ok_and(|written| written == FORBIDDEN.len()) {
        if SockRef::from(client).shutdown(Shutdown::Write).is_ok() {
            discard(client, LINGER).await;
        }
        return Some("answered 403".to_owned());
    }
    reset_on_close(client);
    None
}

fn broken(side: Side, error: &io::Error) -> String {
    let side = match side {
        Side::Client => "client",
        Side::Server => "server",
    };
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            format!("reset by the {side}")
        }
        _ => format!("the connection with the {side} broke: {error}"),
    }
}

/// The direction from the client, which is inspected.
struct Upload<'a> {
    leg: Leg<'a>,
    /// The socket that the leg writes to.
    server: &'a TcpStream,
    inspector: &'a mut Inspector,
    patience: Duration,
}

impl Upload<'_> {
    /// Inspects bytes while they pass.
    async fn look(self) -> Result<(), LegEnd> {
        let mut buffer = vec![0; BUFFER];
        let mut settled = false;
        while !settled {
            let length = self.leg.read(&mut buffer).await?;
            let bytes = buffer.get(..length).unwrap_or_default();
            settled = self.inspector.feed(bytes);
            self.leg.write(bytes).await?;
            if length == 0 {
                return Ok(self.leg.finish()?);
            }
            if !settled {
                send_at_once(self.server);
            }
        }
        self.inspector.finish();
        self.go_on(buffer).await
    }

    /// Holds bytes back until `settle` has decided on them.
    async fn hold(self, settle: impl FnOnce(&Seen) -> Result<(), LegEnd>) -> Result<(), LegEnd> {
        let mut buffer = vec![0; BUFFER];
        // A client that is silent holds nothing up; patience begins with its first bytes.
        let mut until: Option<Instant> = None;
        let mut ended = false;
        loop {
            let room = self.inspector.room().min(buffer.len());
            let part = buffer.get_mut(..room).unwrap_or_default();
            let reading = self.leg.read(part);
            let length = match until {
                None => reading.await?,
                Some(until) => match timeout_at(until, reading).await {
                    Ok(length) => length?,
                    Err(_) => break,
                },
            };
            ended = length == 0;
            if ended || self.inspector.feed(buffer.get(..length).unwrap_or_default()) {
                break;
            }
            until.get_or_insert_with(|| Instant::now() + self.patience);
        }
        let held = self.inspector.finish();
        settle(self.inspector.seen())?;
        self.leg.write(&held).await?;
        drop(held);
        if ended { Ok(self.leg.finish()?) } else { self.go_on(buffer).await }
    }

    /// Relays what comes after the first bytes.
    async fn go_on(&self, mut buffer: Vec<u8>) -> Result<(), LegEnd> {
        let length = self.leg.read(&mut buffer).await?;
        if length == 0 {
            return Ok(self.leg.finish()?);
        }
        send_at_once(self.server);
        self.leg.write(buffer.get(..length).unwrap_or_default()).await?;
        Ok(self.leg.relay(buffer).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_response_has_the_length_that_it_says() {
        let text = str::from_utf8(FORBIDDEN).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    }
}

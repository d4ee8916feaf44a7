//! Flows of datagrams: each from its first datagram to its line in the log.
//!
//! Datagrams of all flows come in on the sockets that the service listens on, each from an address
//! that stands for its flow, the *peer*. A flow gets a socket of its own that leads onwards when its
//! first datagram passes, and a task that relays the answers, through the socket on which the flow
//! came in. Datagrams are relayed one by one, as they are; what a socket does not take at once is
//! lost, as it is in a network.
//!
//! Memory is bounded: so many flows, a few datagrams held back in each, one buffer for each socket
//! that is listened on and one for each worker thread.

use crate::flow::{Context, describe};
use crate::gate::{Gate, Step};
use crate::inspect::{Protocol, Seen, refusal};
use crate::log::{Datagrams as Counted, Entry};
use crate::origin::{FlowId, Route};
use crate::rules::{Action, Decision, Facts, Rules, Transport, Verdict};
use crate::service::{Control, DatagramLimits, Phase};
use socket2::SockRef;
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

/// Longest datagram.
const LONGEST: usize = 65_535;
/// How many datagrams are relayed before others get their turn.
const BATCH: usize = 64;
/// How long a flow stays that needs it no longer: its questions are answered, its onward socket
/// could not be made, or the service is to end.
const SHORT: Duration = Duration::from_secs(5);
/// How many times in a millisecond it is asked whether an address still stands for a flow. While there
/// are no more datagrams, each of them is certain to be of its flow.
const ASKED: u64 = 16;
/// With more datagrams than that: for how many milliseconds an answer holds.
const CERTAIN: u64 = 10;
/// How long receiving rests after an error.
const REST: Duration = Duration::from_millis(50);
/// How old a flow has to be to end when it is refused onwards: who sends to nobody fills no log.
const YOUNG: Duration = Duration::from_secs(1);

thread_local! {
    /// Where a worker receives answers.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; LONGEST]);
}

/// All flows of datagrams of a service.
pub(crate) struct Relay {
    context: Arc<Context>,
    control: Control,
    limits: DatagramLimits,
    /// Times of flows are counted from here.
    epoch: Instant,
    table: Mutex<HashMap<Key, Arc<Flow>>>,
    /// How many flows there are, those included that only have their line to write.
    live: watch::Sender<usize>,
    /// The present millisecond, and how many times it was asked in it, in the lowest byte.
    asked: AtomicU64,
    /// Whether it has been said that flows are turned away.
    said: AtomicBool,
}

/// The place of the socket that a flow came in on, and its peer.
type Key = (usize, SocketAddr);

/// A flow.
struct Flow {
    key: Key,
    /// The socket that it came in on.
    incoming: Arc<UdpSocket>,
    /// When it began.
    begun: Instant,
    /// When its last datagram came, in either direction, in milliseconds.
    last: AtomicU64,
    /// What it is, as far as it could be asked.
    identity: Identity,
    /// When it was last certain that the peer stands for it, in milliseconds.
    certain: AtomicU64,
    /// Tells its task that there is something new.
    changed: Notify,
    traffic: Traffic,
    state: Mutex<State>,
}

/// What a flow is.
#[derive(Clone, Copy, Debug)]
enum Identity {
    /// A flow with a number. Its peer can stand for others later, if it is lent.
    Numbered {
        /// The flow.
        id: FlowId,
        /// Whether it is.
        lent: bool,
    },
    /// One without.
    Nameless,
    /// None that was redirected; or its client was gone before it could be asked.
    Stranger,
}

/// Datagrams of a flow, counted as they are relayed.
#[derive(Default)]
struct Traffic {
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
}

/// What is known of a flow.
struct State {
    gate: Gate,
    judge: Judge,
    /// How to get onwards, while that has not been tried.
    route: Option<Route>,
    onward: Option<Arc<UdpSocket>>,
    /// When making the socket that leads onwards failed.
    failed: Option<Instant>,
    /// Nothing more is to be done for it.
    over: bool,
}

/// Judges what a client asks for, and keeps what is to be logged of it.
struct Judge {
    rules: Arc<Rules>,
    /// What was decided before the client spoke.
    settled: Option<Verdict>,
    destination: SocketAddr,
    entry: Entry,
    /// Something was judged.
    spoken: bool,
}

impl Relay {
    /// Without flows.
    pub(crate) fn new(context: Arc<Context>, control: Control, limits: DatagramLimits) -> Self {
        Self {
            context,
            control,
            limits,
            epoch: Instant::now(),
            table: Mutex::new(HashMap::new()),
            live: watch::Sender::new(0),
            asked: AtomicU64::new(0),
            said: AtomicBool::new(false),
        }
    }

    /// Returns when there are no flows.
    pub(crate) async fn idle(&self) {
        // It cannot fail: this very relay keeps the sender.
        let _ = self.live.subscribe().wait_for(|&live| live == 0).await;
    }

    /// Relays what comes to a socket until the service is stopped.
    ///
    /// Flows that begin while the service drains are served too: their datagrams come to the socket
    /// that also has to send the answers of the others.
    pub(crate) async fn receive(self: Arc<Self>, socket: UdpSocket, place: usize) {
        let socket = Arc::new(socket);
        let mut stopped = pin!(self.control.reached(Phase::Stopped));
        let mut buffer = vec![0; LONGEST];
        loop {
            let received = tokio::select! {
                biased;
                () = &mut stopped => return,
                ready = socket.readable() => {
                    ready.and_then(|()| self.take_some(&socket, place, &mut buffer))
                }
            };
            match received {
                Ok(()) => tokio::task::yield_now().await,
                Err(error) => {
                    crate::say(format_args!("receiving datagrams: {error}; trying again"));
                    sleep(REST).await;
                }
            }
        }
    }

    /// Takes datagrams that have come.
    fn take_some(
        self: &Arc<Self>,
        socket: &Arc<UdpSocket>,
        place: usize,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        for _ in 0..BATCH {
            match socket.try_recv_from(buffer) {
                Ok((length, peer)) => {
                    let datagram = buffer.get(..length).unwrap_or_default();
                    self.take(socket, (place, peer), datagram);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Does with a client's datagram what is to be done with it. Where its flow turns out to be over,
    /// another one begins.
    fn take(self: &Arc<Self>, socket: &Arc<UdpSocket>, key: Key, datagram: &[u8]) {
        for _ in 0..2 {
            match self.flow(socket, key) {
                Some(flow) if self.upwards(&flow, datagram).is_err() => {}
                _ => return,
            }
        }
    }

    /// The flow that a datagram belongs to, which may begin with it. None if there are too many.
    fn flow(self: &Arc<Self>, socket: &Arc<UdpSocket>, key: Key) -> Option<Arc<Flow>> {
        // The lock is not held while a flow begins: nobody else begins this one.
        let known = lock(&self.table).get(&key).map(|flow| {
            flow.last.store(self.now(), Ordering::Relaxed);
            Arc::clone(flow)
        });
        if let Some(flow) = known {
            if self.is_current(&flow) {
                return Some(flow);
            }
            self.end(&flow, TAKEN);
        }
        let most = self.limits.flows.get() as usize;
        // Those that gave way have their lines to write; if that takes long, nobody else begins.
        if *self.live.borrow() >= most.saturating_mul(2) {
            if !self.said.swap(true, Ordering::Relaxed) {
                crate::say(format_args!(
                    "the log is too slow for so many UDP flows: datagrams are dropped; that is not \
                     said again"
                ));
            }
            return None;
        }
        let state = self.begin(key.1);
        let entry = &state.judge.entry;
        let identity = match (entry.destination, entry.flow, entry.hops) {
            (None, ..) => Identity::Stranger,
            (_, Some(id), Some(hops)) => Identity::Numbered {
                id: FlowId { id, hops },
                lent: self.context.source.is_lent(key.1),
            },
            _ => Identity::Nameless,
        };
        let flow = Arc::new(Flow {
            key,
            incoming: Arc::clone(socket),
            begun: Instant::now(),
            last: AtomicU64::new(self.now()),
            identity,
            certain: AtomicU64::new(self.now()),
            changed: Notify::new(),
            traffic: Traffic::default(),
            state: Mutex::new(state),
        });
        let mut table = lock(&self.table);
        if table.len() >= most {
            make_room(&mut table);
        }
        table.insert(key, Arc::clone(&flow));
        drop(table);
        self.live.send_modify(|live| *live += 1);
        tokio::spawn(Arc::clone(self).serve(Arc::clone(&flow)));
        Some(flow)
    }

    /// Whether the peer of a flow still stands for it.
    fn is_current(&self, flow: &Flow) -> bool {
        let now = self.now();
        let certain = now.saturating_sub(flow.certain.load(Ordering::Relaxed)) < CERTAIN;
        // Flows whose peers are theirs alone are asked for only to be told of their end.
        let is_lent = !matches!(flow.identity, Identity::Numbered { lent: false, .. });
        if certain && !(is_lent && self.may_ask(now)) {
            return true;
        }
        let (source, peer) = (&self.context.source, flow.key.1);
        let current = match flow.identity {
            Identity::Numbered { id, .. } => source.is_current(peer, id),
            Identity::Nameless => true,
            Identity::Stranger => source.datagram_origin(peer).is_err(),
        };
        if current {
            flow.certain.store(now, Ordering::Relaxed);
        }
        current
    }

    /// Whether it was not asked too often in this millisecond. That threads miscount does no harm.
    fn may_ask(&self, now: u64) -> bool {
        let asked = self.asked.load(Ordering::Relaxed);
        let times = if asked >> 8 == now { asked & 0xff } else { 0 };
        if times < ASKED {
            self.asked.store(now << 8 | (times + 1), Ordering::Relaxed);
        }
        times < ASKED
    }

    /// What is known of a flow that begins.
    fn begin(&self, peer: SocketAddr) -> State {
        let rules = self.control.rules();
        let mut entry = Entry::new(&self.context.name, peer);
        entry.transport = Transport::Udp;
        let (route, settled, destination) = match self.context.source.datagram_origin(peer) {
            Ok(origin) => {
                let destination = origin.destination;
                let route = describe(&mut entry, origin);
                let facts = Facts {
                    transport: Transport::Udp,
                    destination,
                    executable: entry.executable.as_deref(),
                };
                let settled = match rules.decide(facts, None) {
                    Decision::Settled(verdict) => Some(verdict),
                    Decision::Open => None,
                };
                (Some(route), settled, destination)
            }
            Err(error) => {
                entry.ended = Some(error.to_string());
                (None, Some(Verdict { action: Action::Refuse, rule: None }), peer)
            }
        };
        if let Some(verdict) = &settled {
            entry.verdict = verdict.action;
            entry.rule.clone_from(&verdict.rule);
        }
        let gate = Gate::new(settled.as_ref().map(|verdict| verdict.action));
        let judge = Judge { rules, settled, destination, entry, spoken: false };
        State { gate, judge, route, onward: None, failed: None, over: false }
    }

    /// Does with a datagram of a flow what is to be done with it.
    fn upwards(&self, flow: &Flow, datagram: &[u8]) -> Result<(), Over> {
        let mut guard = lock(&flow.state);
        let state = &mut *guard;
        if state.over {
            return Err(Over);
        }
        let State { gate, judge, .. } = state;
        match gate.take(datagram, Instant::now(), |seen| judge.judge(seen)) {
            Step::Pass => flow.pass(state, datagram),
            Step::Release => {
                flow.release(state);
                flow.pass(state, datagram);
            }
            Step::Hold { dropped } => {
                flow.traffic.lost.fetch_add(dropped, Ordering::Relaxed);
                flow.changed.notify_one();
            }
            Step::Refuse => {
                let held = state.gate.release().len() as u64;
                flow.traffic.refused.fetch_add(held, Ordering::Relaxed);
                flow.refuse(state, datagram);
            }
            Step::Drop => {
                flow.traffic.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        let is_over = state.over;
        // The table is never locked by who has locked a flow.
        drop(guard);
        if is_over {
            self.leave_table(flow);
            return Err(Over);
        }
        Ok(())
    }

    /// Serves a flow until it ends, and logs it.
    async fn serve(self: Arc<Self>, flow: Arc<Flow>) {
        let reason = self.answer(&flow).await;
        self.leave_table(&flow);
        let mut entry = {
            let mut state = lock(&flow.state);
            state.over = true;
            state.onward = None;
            state.judge.entry.clone()
        };
        entry.ended = entry.ended.or(reason);
        flow.traffic.write_to(&mut entry);
        entry.close(flow.begun.elapsed());
        self.context.log.add(&entry).await;
        self.live.send_modify(|live| *live -= 1);
    }

    /// Ends a flow: the next datagram from its peer begins another one.
    fn end(&self, flow: &Flow, reason: &str) {
        self.leave_table(flow);
        flow.end(reason);
    }

    /// Takes a flow out of the table, if it is there and no other one in its place.
    fn leave_table(&self, flow: &Flow) {
        let mut table = lock(&self.table);
        if table.get(&flow.key).is_some_and(|other| std::ptr::eq(&**other, flow)) {
            table.remove(&flow.key);
        }
    }

    /// Relays answers until the flow ends. Returns why it did, if not because it was idle.
    async fn answer(&self, flow: &Flow) -> Option<String> {
        let mut stopped = pin!(self.control.reached(Phase::Stopped));
        let mut draining = pin!(self.control.reached(Phase::Draining));
        let mut drains = false;
        let mut alarm = pin!(sleep_until(self.idle_end(flow, drains)));
        let mut onward: Option<Arc<UdpSocket>> = None;
        loop {
            tokio::select! {
                biased;
                () = &mut stopped => return Some("the service was stopped".to_owned()),
                () = &mut draining, if !drains => drains = true,
                () = flow.changed.notified() => {
                    let state = lock(&flow.state);
                    if state.over {
                        return None;
                    }
                    onward.clone_from(&state.onward);
                }
                () = &mut alarm => {
                    self.expire(flow);
                    if self.idle_end(flow, drains) <= Instant::now() && self.forget(flow, drains) {
                        return None;
                    }
                }
                result = readable(onward.as_deref()) => {
                    if let Err(error) = result {
                        return Some(format!("the socket onwards broke: {error}"));
                    }
                    if let Some(onward) = &onward {
                        self.downwards(flow, onward);
                        tokio::task::yield_now().await;
                    }
                }
            }
            let mut next = self.idle_end(flow, drains);
            if let Some(held) = lock(&flow.state).gate.deadline(self.context.inspect_timeout) {
                next = next.min(held);
            }
            // Moving it forth is left to when it rings, which is not for every datagram.
            if alarm.is_elapsed() || next < alarm.deadline() {
                alarm.as_mut().reset(next);
            }
        }
    }

    /// Relays answers that have come.
    fn downwards(&self, flow: &Flow, onward: &UdpSocket) {
        BUFFER.with_borrow_mut(|buffer| {
            for _ in 0..BATCH {
                match onward.try_recv(buffer) {
                    Ok(length) => {
                        flow.last.store(self.now(), Ordering::Relaxed);
                        if !self.is_current(flow) {
                            flow.traffic.lost.fetch_add(1, Ordering::Relaxed);
                            self.end(flow, TAKEN);
                            break;
                        }
                        match flow.reply(buffer.get(..length).unwrap_or_default()) {
                            Ok(()) => {
                                flow.traffic.bytes_down.fetch_add(length as u64, Ordering::Relaxed);
                                flow.traffic.down.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => lock(&flow.state).lose(flow, &error, "the client"),
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if flow.ends_by(&error) => {
                        self.end(flow, REFUSED);
                        break;
                    }
                    // What the network says of a datagram that was sent before.
                    Err(error) => lock(&flow.state).note(&error, "the destination"),
                }
            }
        });
    }

    /// Judges what has been held long enough.
    fn expire(&self, flow: &Flow) {
        let mut guard = lock(&flow.state);
        let state = &mut *guard;
        let patience = self.context.inspect_timeout;
        if state.gate.deadline(patience).is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        let State { gate, judge, .. } = state;
        match gate.expire(|seen| judge.judge(seen)) {
            Step::Release => flow.release(state),
            _ => {
                for datagram in state.gate.release() {
                    flow.refuse(state, &datagram);
                }
            }
        }
    }

    /// When a flow has been idle for long enough, if nothing comes.
    fn idle_end(&self, flow: &Flow, drains: bool) -> Instant {
        let state = lock(&flow.state);
        if let Some(failed) = state.failed {
            return failed + SHORT;
        }
        let traffic = &flow.traffic;
        let answered = state.judge.entry.protocol == Protocol::Dns
            && traffic.down.load(Ordering::Relaxed) >= traffic.up.load(Ordering::Relaxed);
        let limit = if drains || answered { self.limits.idle.min(SHORT) } else { self.limits.idle };
        self.epoch + Duration::from_millis(flow.last.load(Ordering::Relaxed)) + limit
    }

    /// Takes a flow out of the table, unless something has come for it.
    fn forget(&self, flow: &Flow, drains: bool) -> bool {
        let mut table = lock(&self.table);
        let idle = self.idle_end(flow, drains) <= Instant::now();
        if idle {
            table.remove(&flow.key);
        }
        idle
    }

    /// Now, in milliseconds.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }
}

/// Ends the flows that were idle for longest: more than one, so that it is not done each time.
fn make_room(table: &mut HashMap<Key, Arc<Flow>>) {
    let mut ages: Vec<(u64, Key)> =
        table.values().map(|flow| (flow.last.load(Ordering::Relaxed), flow.key)).collect();
    let count = ages.len().div_ceil(64);
    if count < ages.len() {
        ages.select_nth_unstable_by_key(count, |&(last, _)| last);
    }
    for (_, key) in ages.iter().take(count) {
        if let Some(flow) = table.remove(key) {
            flow.end("it gave way to another flow");
        }
    }
}

/// Why a flow ends whose client is gone.
const TAKEN: &str = "its client closed its socket, or connected it elsewhere";
/// Why a flow ends that is refused onwards. Where its next datagram has to go is to be asked anew.
const REFUSED: &str = "refused by the destination";

/// A flow takes no datagrams any more.
struct Over;

impl Flow {
    /// Whether it ends by what the network says of a datagram that was sent onwards: nobody is there, or
    /// the next service is another process, at another address.
    fn ends_by(&self, error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::ConnectionRefused && self.begun.elapsed() >= YOUNG
    }

    /// Ends it.
    fn end(&self, reason: &str) {
        lock(&self.state).end(reason);
        self.changed.notify_one();
    }

    /// Sends a datagram onwards.
    fn pass(&self, state: &mut State, datagram: &[u8]) {
        if let Some(route) = state.route.take() {
            match route.connect_datagram() {
                Ok(socket) => {
                    state.onward = Some(Arc::new(socket));
                    self.changed.notify_one();
                }
                Err(error) => {
                    state.failed = Some(Instant::now());
                    let ended = &mut state.judge.entry.ended;
                    ended.get_or_insert_with(|| error.to_string());
                    self.changed.notify_one();
                }
            }
        }
        let Some(onward) = state.onward.clone() else {
            self.traffic.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let onward = SockRef::from(&*onward);
        // What is said here was usually said of an earlier datagram, and this one was not sent.
        let sent = match onward.send(datagram) {
            Err(error) if self.ends_by(&error) => {
                state.end(REFUSED);
                self.changed.notify_one();
                return;
            }
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                state.note(&error, "the destination");
                onward.send(datagram)
            }
            sent => sent,
        };
        match sent {
            Ok(length) => {
                self.traffic.bytes_up.fetch_add(length as u64, Ordering::Relaxed);
                self.traffic.up.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => state.lose(self, &error, "the destination"),
        }
    }

    /// Sends onwards what is held.
    fn release(&self, state: &mut State) {
        for datagram in state.gate.release() {
            self.pass(state, &datagram);
        }
    }

    /// Refuses a datagram, and tells the client if there is a way to.
    fn refuse(&self, state: &mut State, datagram: &[u8]) {
        self.traffic.refused.fetch_add(1, Ordering::Relaxed);
        // Who was not redirected gets no answer.
        if state.judge.entry.destination.is_some()
            && let Some(answer) = refusal(datagram)
            && let Err(error) = self.reply(&answer)
        {
            state.note(&error, "the client");
        }
    }

    /// Sends a datagram to the client.
    fn reply(&self, datagram: &[u8]) -> io::Result<()> {
        // Not tokio's, which asks first whether there is room: if there is not, it is lost anyway.
        SockRef::from(&*self.incoming).send_to(datagram, &self.key.1.into()).map(|_| ())
    }
}

impl State {
    /// Ends the flow.
    fn end(&mut self, reason: &str) {
        self.over = true;
        self.judge.entry.ended.get_or_insert_with(|| reason.to_owned());
    }

    /// Counts a datagram that could not be sent.
    fn lose(&mut self, flow: &Flow, error: &io::Error, to: &str) {
        flow.traffic.lost.fetch_add(1, Ordering::Relaxed);
        self.note(error, to);
    }

    /// Keeps what went wrong first. That a socket takes no more for the moment is nothing wrong.
    fn note(&mut self, error: &io::Error, to: &str) {
        if error.kind() != io::ErrorKind::WouldBlock {
            let ended = &mut self.judge.entry.ended;
            ended.get_or_insert_with(|| match error.kind() {
                io::ErrorKind::ConnectionRefused => format!("refused by {to}"),
                _ => format!("sending to {to}: {error}"),
            });
        }
    }
}

impl Judge {
    fn judge(&mut self, seen: &Seen) -> Action {
        let verdict = match &self.settled {
            Some(verdict) => verdict.clone(),
            None => {
                let facts = Facts {
                    transport: Transport::Udp,
                    destination: self.destination,
                    executable: self.entry.executable.as_deref(),
                };
                match self.rules.decide(facts, Some(seen)) {
                    Decision::Settled(verdict) => verdict,
                    // With the client's words every decision is settled; if not, better refuse.
                    Decision::Open => Verdict { action: Action::Refuse, rule: None },
                }
            }
        };
        let action = verdict.action;
        // The line tells of what was asked for first, or of what was refused first.
        let entry = &mut self.entry;
        let refused_now = action == Action::Refuse && entry.verdict == Action::Allow;
        let told_now = action == entry.verdict && entry.host.is_none() && seen.host.is_some();
        if !self.spoken || refused_now || told_now {
            self.spoken = true;
            (entry.verdict, entry.rule) = (verdict.action, verdict.rule);
            entry.tell(seen.clone());
        }
        action
    }
}

impl Traffic {
    fn write_to(&self, entry: &mut Entry) {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (entry.bytes_up, entry.bytes_down) = (value(&self.bytes_up), value(&self.bytes_down));
        entry.datagrams = Some(Counted {
            up: value(&self.up),
            down: value(&self.down),
            refused: value(&self.refused),
            lost: value(&self.lost),
        });
    }
}

/// Waits until something has come to a socket; for ever while there is none.
async fn readable(socket: Option<&UdpSocket>) -> io::Result<()> {
    match socket {
        Some(socket) => socket.readable().await,
        None => pending().await,
    }
}

/// A panic elsewhere leaves what a lock protects as good as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! `carnet trace`: what happens to connections, as it happens.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anstyle::Style;
use carnet_core::{
    classify::Reason,
    event::{Event, EventKind},
    object::{Policy, Protocol, Service},
    outcome::Outcome,
    record::{
        RECORD_ADOPTED, RECORD_HOPS_GUESSED, RECORD_IDENTITY_GUESSED, RECORD_IMPORTED, RecordError,
    },
    socket::SocketKind,
};
use carnet_engine::{Engine, Listener};
use serde::Serialize;

use super::{DONE, filter::name_or_id, flows::removed, service::live_listeners};
use crate::{
    console::{BAD, FAINT, GOOD, WARNING, plain, styled},
    failure::Failure,
    lookup::NamespaceNames,
    moment,
    session::Session,
};

/// Print what happens to connections, as it happens
///
/// One line for each event: redirects, onward connections, refusals with their reason, services
/// that forgot to set the redirect record, ends of connections.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// End after this many events
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// End after this time, for example 10s; a number alone is seconds
    #[arg(long, value_name = "TIME", value_parser = moment::duration)]
    timeout: Option<Duration>,
}

/// JSON of `trace`: one of these on each line. What an event does not have is left out.
#[derive(Debug, Serialize)]
struct Traced {
    /// When, RFC 3339, UTC.
    time: String,
    /// `redirected`, `onward`, `blocked`, `record_forgotten`, `closed`, `record_refused`,
    /// `listener_registered`, `socket_refused` or `undone`.
    event: &'static str,
    /// Why a connection was blocked (`filter`, `service_unavailable`, `loop`), or a record refused
    /// (`malformed`, `forged`, `foreign`, `expired`); what another program had done to one that was
    /// undone (`refusal_cleared`, `diverted`).
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// What socket was refused, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
    /// The flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    flow: Option<u64>,
    /// The service that gets the connection, is missing, forgot the record or set it: its name, or
    /// the handle of one that was removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    /// The filter that decided: its name or id.
    #[serde(skip_serializing_if = "Option::is_none")]
    filter: Option<String>,
    /// The services that were passed over because they had no live listener.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<String>,
    /// Of the services that had no live listener, those that have some in other network namespaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    listens_elsewhere: Vec<String>,
    /// Cookie of the network namespace of the socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<u64>,
    /// The process that acted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    /// Its user.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    /// Its command name.
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<String>,
    /// `tcp`, `udp` or the protocol's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    /// The destination that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<SocketAddr>,
    /// Redirected legs so far.
    legs: u32,
    /// Hops in the record.
    hops: u32,
    /// Whether it has a record that was adopted, since not all services set it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    adopted: bool,
    /// Whether the flow began on another host.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    imported: bool,
    /// What of the record is a guess: `application` (and the flow's number), `services`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    guessed: Vec<&'static str>,
    /// Of a TCP connection that ended: bytes that the connecting side sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_sent: Option<u64>,
    /// Of a TCP connection that ended: bytes that the connecting side received.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_received: Option<u64>,
    #[serde(skip)]
    kind: Option<EventKind>,
}

pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let engine = session.engine()?;
    let mut events = engine.events()?;
    let mut policy = engine.policy()?;
    let mut seen = 0;
    session.console.note(styled(FAINT, "waiting for connections; Ctrl-C ends"))?;
    let end = arguments.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    while arguments.count.is_none_or(|count| seen < count) {
        let left = match end {
            Some(end) => end.saturating_duration_since(Instant::now()),
            None => Duration::from_secs(3600),
        };
        let Some(event) = events.next_timeout(left)? else {
            if end.is_some_and(|end| Instant::now() >= end) {
                break;
            }
            continue;
        };
        seen += 1;
        if !knows(&policy, &event) {
            policy = refreshed(&engine, policy)?;
        }
        let missing = missing(&event, &policy);
        let listeners = match missing.is_empty() {
            true => Vec::new(),
            // As with the policy: an instance that was taken down meanwhile has none.
            false => engine.listeners().unwrap_or_default(),
        };
        let mut traced = Traced::new(&event, &policy);
        traced.listens_elsewhere = elsewhere(&event, &policy, &missing, &listeners);
        if session.global.json {
            session.console.json_line(&traced)?;
        } else {
            session.console.line(traced.line())?;
        }
    }
    Ok(DONE)
}

/// The services that had no live listener for what the event speaks of, by redirect handle.
fn missing(event: &Event, policy: &Policy) -> Vec<u64> {
    let skipped = skipped(event, policy).map(|service| service.handle);
    let unavailable = event.kind == EventKind::Blocked as u32
        && Reason::from_number(event.reason) == Reason::ServiceUnavailable;
    skipped.chain(unavailable.then_some(event.handle)).collect()
}

/// The services that an event says were passed over.
fn skipped<'a>(event: &Event, policy: &'a Policy) -> impl Iterator<Item = &'a Service> {
    let skipped = event.skipped;
    let is_it = move |(slot, _): &(usize, _)| {
        1_u64.checked_shl(*slot as u32).is_some_and(|bit| skipped & bit != 0)
    };
    policy.services().iter().enumerate().filter(is_it).map(|(_, service)| service)
}

/// The names of those of the missing services that listen, though not for the network namespace and
/// the protocol that the event speaks of.
fn elsewhere(
    event: &Event,
    policy: &Policy,
    missing: &[u64],
    listeners: &[Listener],
) -> Vec<String> {
    let services = missing.iter().filter_map(|handle| policy.service_by_handle(*handle));
    let listens = |service: &&Service| {
        live_listeners(listeners, service)
            .any(|l| l.netns != event.netns && u32::from(l.protocol.0) == event.protocol)
    };
    services.filter(listens).map(|service| service.name.clone()).collect()
}

/// Whether the policy has names for what the event speaks of.
fn knows(policy: &Policy, event: &Event) -> bool {
    (event.handle == 0 || policy.service_by_handle(event.handle).is_some())
        && (event.filter == 0 || policy.filter_by_id(event.filter).is_some())
}

/// The policy as it is now. An instance that was taken down meanwhile has none, and its last events
/// are shown all the same.
fn refreshed(engine: &Engine, old: Policy) -> Result<Policy, Failure> {
    Ok(engine.policy().unwrap_or(old))
}

impl Traced {
    fn new(event: &Event, policy: &Policy) -> Self {
        let kind = EventKind::from_number(event.kind);
        let protocol = Protocol(event.protocol as u8);
        let counted = kind == Some(EventKind::Closed) && protocol == Protocol::TCP;
        let set = |number: u64| (number != 0).then_some(number);
        Self {
            time: moment::rfc3339(moment::time_of_day(event.time_ns)),
            event: match kind {
                Some(EventKind::Redirected) => "redirected",
                Some(EventKind::Onward) => "onward",
                Some(EventKind::Blocked) => "blocked",
                Some(EventKind::RecordForgotten) => "record_forgotten",
                Some(EventKind::Closed) => "closed",
                Some(EventKind::RecordRefused) => "record_refused",
                Some(EventKind::ListenerRegistered) => "listener_registered",
                Some(EventKind::SocketRefused) => "socket_refused",
                Some(EventKind::Undone) => "undone",
                None => "unknown",
            },
            reason: match kind {
                Some(EventKind::Blocked) => Some(reason(Reason::from_number(event.reason))),
                Some(EventKind::RecordRefused) => Some(refusal(event.reason)),
                Some(EventKind::Undone) => Some(undone(Outcome::from_number(event.reason))),
                _ => None,
            },
            socket: (kind == Some(EventKind::SocketRefused))
                .then(|| SocketKind::from_number(event.reason).to_string()),
            flow: set(event.flow),
            service: set(event.handle).map(|handle| service_name(policy, handle)),
            filter: set(event.filter).map(|id| filter_name(policy, id)),
            skipped: skipped(event, policy).map(|service| service.name.clone()).collect(),
            listens_elsewhere: Vec::new(),
            netns: set(event.netns),
            pid: (event.pid != 0).then_some(event.pid),
            uid: (event.pid != 0).then_some(event.uid),
            command: command_name(&event.command),
            protocol: (event.protocol != 0).then(|| protocol.to_string()),
            destination: (event.requested.port != 0).then(|| event.requested.into()),
            legs: event.legs,
            hops: event.hops,
            adopted: event.flags & RECORD_ADOPTED != 0,
            imported: event.flags & RECORD_IMPORTED != 0,
            guessed: [(RECORD_IDENTITY_GUESSED, "application"), (RECORD_HOPS_GUESSED, "services")]
                .into_iter()
                .filter_map(|(flag, what)| (event.flags & flag != 0).then_some(what))
                .collect(),
            bytes_sent: counted.then_some(event.bytes_sent),
            bytes_received: counted.then_some(event.bytes_received),
            kind,
        }
    }

    /// The event as a line for people.
    fn line(&self) -> String {
        let (style, what) = self.words();
        // The time of day is enough where events are watched.
        let time = self.time.get(11..23).unwrap_or(&self.time);
        let flow = self.flow.map(|flow| format!("flow {flow} ")).unwrap_or_default();
        let process = match (&self.command, self.pid) {
            (Some(command), Some(pid)) => format!("{}[{pid}]: ", plain(command)),
            _ => String::new(),
        };
        let skipped = match &self.skipped[..] {
            [] => String::new(),
            names => {
                let told = names.iter().map(|name| format!("{name} ({})", self.missing(name)));
                format!(", passing over {}", told.collect::<Vec<_>>().join(", "))
            }
        };
        let what = styled(style, what);
        let from = if self.imported { ", from another host" } else { "" };
        format!("{} {flow}{process}{what}{skipped}{from}{}", styled(FAINT, time), self.adopted())
    }

    /// That the record was adopted, and what of it is a guess.
    fn adopted(&self) -> String {
        match &self.guessed[..] {
            _ if !self.adopted => String::new(),
            [] => ", record adopted".into(),
            guesses => format!(", record adopted ({} guessed)", guesses.join(" and ")),
        }
    }

    /// What the service of this name, which got nothing, does not have.
    fn missing(&self, service: &str) -> String {
        match self.netns {
            Some(netns) if self.listens_elsewhere.iter().any(|name| name == service) => format!(
                "no live listener in the network namespace {}, though it has in others",
                NamespaceNames::known().name(netns)
            ),
            _ => "no live listener".into(),
        }
    }

    fn words(&self) -> (Style, String) {
        let service = self.service.as_deref().unwrap_or("?");
        let destination = match (&self.protocol, self.destination) {
            (_, None) => "?".into(),
            // Of the one that is by far the most frequent, nothing is said.
            (Some(protocol), Some(to)) if protocol != "tcp" => format!("{protocol} {to}"),
            (_, Some(to)) => to.to_string(),
        };
        let by_filter = self.filter.as_ref().map(|f| format!(" by filter {f}")).unwrap_or_default();
        match self.kind {
            Some(EventKind::Redirected) => {
                (Style::new(), format!("to {destination}: redirected to {service}{by_filter}"))
            }
            Some(EventKind::Onward) => {
                (GOOD, format!("onwards to {destination} after {}", services(self.hops)))
            }
            Some(EventKind::Blocked) => (BAD, {
                let why = match self.reason {
                    Some("service_unavailable") => {
                        format!("service {service} has {}{by_filter}", self.missing(service))
                    }
                    Some("loop") => format!(
                        "loop ended after {} legs: a service forgets to set the record, and \
                         {service} would have had the flow again",
                        self.legs
                    ),
                    _ => format!("blocked{by_filter}"),
                };
                format!("to {destination}: refused: {why}")
            }),
            Some(EventKind::RecordForgotten) => {
                (WARNING, format!("to {destination}: service {service} forgot to set the record"))
            }
            Some(EventKind::Closed) => (FAINT, {
                let bytes = match (self.bytes_sent, self.bytes_received) {
                    (Some(sent), Some(received)) => {
                        format!(", {sent} bytes sent, {received} received")
                    }
                    _ => String::new(),
                };
                let whose = match &self.service {
                    Some(service) => format!("to {destination} through {service}"),
                    None => format!("onwards to {destination}"),
                };
                format!("{whose}: ended{bytes}")
            }),
            Some(EventKind::RecordRefused) => (BAD, {
                let reason = self.reason.unwrap_or("?").replace('_', " ");
                match &self.service {
                    Some(service) => format!("record refused, which {service} set: {reason}"),
                    None => format!("record refused: {reason}"),
                }
            }),
            Some(EventKind::ListenerRegistered) => {
                (Style::new(), format!("service {service} registered a listener"))
            }
            Some(EventKind::SocketRefused) => {
                let socket = self.socket.as_deref().unwrap_or("socket");
                (BAD, format!("{socket} refused: its connections would pass unseen"))
            }
            Some(EventKind::Undone) => (BAD, {
                let done = match self.reason {
                    Some("diverted") => format!("sent it elsewhere than to {service}"),
                    _ => "cleared its refusal".into(),
                };
                format!(
                    "to {destination}: refused before its SYN: another BPF program {done}, see \
                     `carnet doctor`"
                )
            }),
            None => (WARNING, "an event that this version does not know".into()),
        }
    }
}

fn services(number: u32) -> String {
    if number == 1 { "1 service".into() } else { format!("{number} services") }
}

fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::NoFilter | Reason::Filter => "filter",
        Reason::ServiceUnavailable => "service_unavailable",
        Reason::Loop => "loop",
    }
}

fn refusal(number: u32) -> &'static str {
    const NAMES: [(RecordError, &str); 6] = [
        (RecordError::Malformed, "malformed"),
        (RecordError::Forged, "forged"),
        (RecordError::Foreign, "foreign"),
        (RecordError::Expired, "expired"),
        (RecordError::NotDelivered, "not_delivered"),
        (RecordError::Endless, "endless"),
    ];
    let known = NAMES.into_iter().find(|(error, _)| *error as u32 == number);
    known.map_or("unknown", |(_, name)| name)
}

fn undone(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::RefusalCleared) => "refusal_cleared",
        Some(Outcome::Diverted) => "diverted",
        _ => "unknown",
    }
}

/// The name of the service with this handle, or what can be said of one that was removed.
pub(super) fn service_name(policy: &Policy, handle: u64) -> String {
    policy.service_by_handle(handle).map_or_else(|| removed(handle), |s| s.name.clone())
}

fn filter_name(policy: &Policy, id: u64) -> String {
    policy.filter_by_id(id).map_or_else(|| id.to_string(), name_or_id)
}

/// A command name as the kernel pads it.
fn command_name(bytes: &[u8]) -> Option<String> {
    let name = bytes.split(|byte| *byte == 0).next()?;
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use carnet_core::object::{CgroupRef, FailurePolicy, NewService};

    use super::*;

    fn policy() -> Policy {
        let mut policy = Policy::new();
        policy.add_provider("acme", "").unwrap();
        for (id, name) in [(1, "tls"), (2, "av")] {
            let new = NewService::new(name, "acme", CgroupRef { path: "/s".into(), id });
            policy.add_service(NewService { on_failure: FailurePolicy::Skip, ..new }).unwrap();
        }
        policy
    }

    fn event(kind: EventKind) -> Event {
        let mut command = [0; 16];
        command[..4].copy_from_slice(b"curl");
        Event {
            kind: kind as u32,
            flow: 7,
            handle: policy().services()[0].handle,
            pid: 42,
            requested: "192.0.2.1:443".parse::<SocketAddr>().unwrap().into(),
            legs: 1,
            hops: 1,
            command,
            ..Event::default()
        }
    }

    fn told(event: &Event) -> String {
        let line = anstream::adapter::strip_str(&Traced::new(event, &policy()).line()).to_string();
        // Without the time.
        line.split_once(' ').unwrap().1.to_owned()
    }

    #[test]
    fn events_are_told_with_names() {
        let redirected = Event { skipped: 2, ..event(EventKind::Redirected) };
        assert_eq!(
            told(&redirected),
            "flow 7 curl[42]: to 192.0.2.1:443: redirected to tls, passing over av (no live \
             listener)"
        );
        let mut elsewhere = Traced::new(&Event { netns: u64::MAX, ..redirected }, &policy());
        elsewhere.listens_elsewhere = vec!["av".into()];
        let line = anstream::adapter::strip_str(&elsewhere.line()).to_string();
        assert!(
            line.ends_with(
                "redirected to tls, passing over av (no live listener in the network namespace \
                 cookie:18446744073709551615, though it has in others)"
            ),
            "{line}"
        );
        assert_eq!(
            told(&event(EventKind::RecordForgotten)),
            "flow 7 curl[42]: to 192.0.2.1:443: service tls forgot to set the record"
        );
        assert_eq!(
            told(&Event { handle: 0, ..event(EventKind::Onward) }),
            "flow 7 curl[42]: onwards to 192.0.2.1:443 after 1 service"
        );
        let flags = RECORD_ADOPTED | RECORD_IDENTITY_GUESSED | RECORD_HOPS_GUESSED;
        assert_eq!(
            told(&Event { flags, hops: 2, ..event(EventKind::Onward) }),
            "flow 7 curl[42]: onwards to 192.0.2.1:443 after 2 services, record adopted \
             (application and services guessed)"
        );
        assert_eq!(
            told(&Event { flags: RECORD_IMPORTED, ..event(EventKind::Onward) }),
            "flow 7 curl[42]: onwards to 192.0.2.1:443 after 1 service, from another host"
        );
        let endless = RecordError::Endless as u32;
        assert_eq!(
            told(&Event { reason: endless, flow: 0, ..event(EventKind::RecordRefused) }),
            "curl[42]: record refused, which tls set: endless"
        );
        let unavailable = Reason::ServiceUnavailable as u32;
        assert_eq!(
            told(&Event { reason: unavailable, ..event(EventKind::Blocked) }),
            "flow 7 curl[42]: to 192.0.2.1:443: refused: service tls has no live listener"
        );
        let forged = RecordError::Forged as u32;
        assert_eq!(
            told(&Event { reason: forged, ..event(EventKind::RecordRefused) }),
            "flow 7 curl[42]: record refused, which tls set: forged"
        );
        let theft = RecordError::NotDelivered as u32;
        assert_eq!(
            told(&Event { reason: theft, handle: 0, ..event(EventKind::RecordRefused) }),
            "flow 7 curl[42]: record refused: not delivered"
        );
        let diverted = Outcome::Diverted as u32;
        assert_eq!(
            told(&Event { reason: diverted, ..event(EventKind::Undone) }),
            "flow 7 curl[42]: to 192.0.2.1:443: refused before its SYN: another BPF program sent it \
             elsewhere than to tls, see `carnet doctor`"
        );
        let cleared = Outcome::RefusalCleared as u32;
        assert_eq!(
            told(&Event { reason: cleared, flow: 0, handle: 0, ..event(EventKind::Undone) }),
            "curl[42]: to 192.0.2.1:443: refused before its SYN: another BPF program cleared its \
             refusal, see `carnet doctor`"
        );
        let raw = SocketKind { family: 2, kind: 3, protocol: 1 }.to_number();
        assert_eq!(
            told(&Event { reason: raw, flow: 0, ..event(EventKind::SocketRefused) }),
            "curl[42]: raw IPv4 socket of protocol 1 refused: its connections would pass unseen"
        );
    }

    #[test]
    fn what_an_event_does_not_have_is_not_in_its_json() {
        let event = Event { kind: EventKind::ListenerRegistered as u32, ..Event::default() };
        let json = serde_json::to_value(Traced::new(&event, &policy())).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["event", "hops", "legs", "time"]);
    }

    #[test]
    fn a_service_that_was_removed_keeps_its_handle() {
        assert_eq!(service_name(&policy(), 99), "removed-99");
    }
}

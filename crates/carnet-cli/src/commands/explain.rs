//! `carnet explain`: what would happen to a connection, leg by leg, and why.
//!
//! It is the kernel's own decision function that answers, over the policy as the kernel has it.

use std::{fmt, net::SocketAddr, path::PathBuf};

use carnet_core::{
    address::Endpoint,
    arbitration::Verdict,
    chain::RedirectState,
    classify::{Decision, Outcome, Reason},
    compile::CompiledPolicy,
    explain::{self, HostConnection, Leg, Process},
    object::{FilterAction, Policy, Protocol, Service},
    table::Field,
};
use carnet_engine::{Engine, Listener};
use serde::Serialize;

use super::{
    DONE,
    filter::{action, name_or_id},
    service::live_listeners,
    trace::service_name,
};
use crate::{
    console::{BAD, FAINT, GOOD, HEADING, WARNING, styled},
    failure::Failure,
    lookup::{self, Cgroup, HostPort, NetworkNamespace, Pid},
    privileges,
    session::Session,
};

/// Say what would happen to a connection, and why
///
/// Which filters match, which services get it in which order, whether it arrives, and what would be
/// different if one of the services were dead. Nothing is connected.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the connection goes
    #[arg(long, value_name = "HOST:PORT")]
    to: HostPort,

    /// Its protocol
    #[arg(long, value_name = "NAME|NUMBER", default_value_t = Protocol::TCP)]
    protocol: Protocol,

    /// Take executable, user, cgroup and network namespace from this process
    #[arg(long)]
    pid: Option<Pid>,

    /// Executable of the process that connects
    #[arg(long, value_name = "PATH")]
    exe: Option<PathBuf>,

    /// User id of the process that connects
    #[arg(long)]
    uid: Option<u32>,

    /// Cgroup of the process that connects
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// Network namespace in which it connects
    #[arg(long, value_name = "PATH|pid:N")]
    netns: Option<NetworkNamespace>,

    /// As if this service had no live listener (repeatable); otherwise it counts which services
    /// have one now
    #[arg(long, value_name = "NAME|ID")]
    dead: Vec<String>,
}

/// JSON of `explain`.
#[derive(Debug, Serialize)]
struct Explained {
    /// The destination.
    destination: SocketAddr,
    /// What happens in the end.
    #[serde(flatten)]
    result: Fate,
    /// The legs, in the order in which they are made.
    legs: Vec<ExplainedLeg>,
    /// What would happen if one of the services that the flow passes were dead.
    if_dead: Vec<IfDead>,
}

/// What happens to a flow in the end.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Fate {
    /// Whether it reaches its destination, as far as Carnet decides.
    arrives: bool,
    /// The services that it passes, in their order.
    services: Vec<String>,
}

/// What happens to a flow if a service is dead.
#[derive(Debug, Serialize)]
struct IfDead {
    /// The service that would be dead.
    service: String,
    #[serde(flatten)]
    result: Fate,
}

/// One leg.
#[derive(Debug, Serialize)]
struct ExplainedLeg {
    /// The service that makes it; null for the application.
    by: Option<String>,
    /// How the services see it.
    states: Vec<State>,
    /// What the policy tests and is not known of it: filters that test it do not match.
    unknown: Vec<&'static str>,
    /// The filters that match, in the order in which they are consulted.
    matched: Vec<Matched>,
    /// `redirect`, `pass` or `refuse`.
    decision: &'static str,
    /// Why it is refused: `filter`, `service_unavailable` or `loop`.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// The service to which it is redirected, or that is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
}

/// How a service sees a leg.
#[derive(Debug, Serialize)]
struct State {
    /// The service's name.
    service: String,
    /// The redirect state: `not_redirected`, `redirected_by_self`, `redirected_by_other` or
    /// `previously_redirected_by_self`.
    state: &'static str,
    /// Whether it has a live listener.
    live: bool,
    /// Whether it has live listeners in other network namespaces only.
    elsewhere: bool,
}

/// A filter that matches a leg.
#[derive(Debug, Serialize)]
struct Matched {
    /// Its name or id.
    filter: String,
    /// Its sublayer.
    sublayer: String,
    /// Its action, in words.
    action: String,
    /// What came of it, in words.
    outcome: String,
}

pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let engine = session.engine()?;
    let policy = engine.policy()?;
    let compiled = engine.compiled()?;
    let dead: Vec<u64> = arguments
        .dead
        .iter()
        .map(|key| Ok(Session::known(&policy, policy.service(key))?.handle))
        .collect::<Result<_, Failure>>()?;
    let addresses = arguments.to.addresses()?;
    let process = process(&arguments, &engine)?;
    let connection = HostConnection {
        protocol: arguments.protocol.0,
        destination: Endpoint::from(addresses[0]).meant(&Endpoint::default()),
        process,
        original_executable: None,
    };
    let listeners = engine.listeners()?;
    let mut live = Vec::new();
    for service in policy.services().iter().filter(|service| !dead.contains(&service.handle)) {
        let suited = |listener: &&Listener| listener.protocol == arguments.protocol;
        live.extend(live_listeners(&listeners, service).filter(suited).map(Live::new));
    }
    let question = Question { policy: &policy, compiled: &compiled, connection, live };
    let explained = question.answer(addresses[0]);
    if session.global.json {
        session.console.json(&explained)?;
    } else {
        if addresses.len() > 1 {
            let rest = addresses.len() - 1;
            session.console.note(format_args!(
                "{} is {}, and {rest} more; this is about the first",
                arguments.to, addresses[0]
            ))?;
        }
        session.console.line(&explained)?;
    }
    Ok(DONE)
}

/// What is said of the process that connects.
fn process(arguments: &Arguments, engine: &Engine) -> Result<Process, Failure> {
    let mut process = Process::default();
    if let Some(pid) = arguments.pid {
        privileges::examine_processes()?;
        process = pid.describe(engine)?;
    }
    if let Some(path) = &arguments.exe {
        let condition = lookup::executable_condition(engine, &lookup::executable(path)?)?;
        process.executable = Some(condition.file);
    }
    if let Some(path) = &arguments.cgroup {
        process.cgroups = Some(Cgroup::find(path)?.lineage()?);
    }
    if let Some(namespace) = &arguments.netns {
        process.network_namespace = Some(namespace.condition()?.cookie);
    }
    process.user = arguments.uid.or(process.user);
    Ok(process)
}

/// A connection, and all that its fate depends on.
struct Question<'a> {
    policy: &'a Policy,
    compiled: &'a CompiledPolicy,
    connection: HostConnection,
    /// The live listeners for its protocol.
    live: Vec<Live>,
}

/// A live listener.
struct Live {
    /// Its service's redirect handle.
    handle: u64,
    /// Cookie of the network namespace whose flows it gets.
    netns: u64,
    /// Cookie of the one in which it listens.
    home: u64,
}

impl Live {
    fn new(listener: &Listener) -> Self {
        Self { handle: listener.handle, netns: listener.netns, home: listener.home }
    }

    /// Whether it is the service's and gets the flows of a network namespace, if that is known.
    fn serves(&self, handle: u64, netns: Option<u64>) -> bool {
        self.handle == handle && netns.is_none_or(|netns| netns == self.netns)
    }
}

impl Question<'_> {
    /// The listener of a service that gets the flows of a network namespace.
    fn listener(&self, handle: u64, netns: Option<u64>) -> Option<&Live> {
        self.live.iter().find(|live| live.serves(handle, netns))
    }

    /// The legs, if the service `dead` is dead.
    fn legs(&self, dead: Option<u64>) -> Vec<Leg> {
        let live =
            |handle: u64, netns| dead != Some(handle) && self.listener(handle, netns).is_some();
        // A service connects from its cgroup and from where it listens; its user and executable may
        // be any.
        let process_of = |service: &Service, netns: Option<u64>| Process {
            cgroups: Cgroup::find(service.cgroup.path.as_ref()).and_then(|c| c.lineage()).ok(),
            network_namespace: netns
                .and_then(|_| self.listener(service.handle, netns))
                .map(|live| live.home),
            ..Process::default()
        };
        explain::explain(self.policy, self.compiled, &self.connection, &live, &process_of)
    }

    fn answer(&self, destination: SocketAddr) -> Explained {
        let legs = self.legs(None);
        let passed = legs.iter().filter_map(|leg| leg.service);
        let if_dead = passed.map(|handle| IfDead {
            service: service_name(self.policy, handle),
            result: self.fate(&self.legs(Some(handle))),
        });
        Explained {
            destination,
            result: self.fate(&legs),
            if_dead: if_dead.collect(),
            legs: legs.iter().map(|leg| self.leg(leg)).collect(),
        }
    }

    fn fate(&self, legs: &[Leg]) -> Fate {
        let passed = legs.iter().filter_map(|leg| leg.service);
        Fate {
            arrives: legs.last().is_some_and(|leg| !leg.decision.blocks()),
            services: passed.map(|handle| service_name(self.policy, handle)).collect(),
        }
    }

    fn leg(&self, leg: &Leg) -> ExplainedLeg {
        let Decision { reason, handle, .. } = leg.decision;
        // Those that have a live listener, but none that would get this leg.
        let elsewhere = |handle: u64| {
            let netns = leg.connection.process.network_namespace;
            self.listener(handle, netns).is_none() && self.listener(handle, None).is_some()
        };
        let states = leg.services.iter().map(|view| State {
            service: view.name.clone(),
            state: state(view.state),
            live: view.live,
            elsewhere: elsewhere(view.handle),
        });
        let matched = leg.matched.iter().filter_map(|m| {
            let filter = self.policy.filter_by_id(m.filter)?;
            Some(Matched {
                filter: name_or_id(filter),
                sublayer: filter.sublayer.clone(),
                action: action(&filter.action),
                outcome: match &filter.action {
                    FilterAction::Redirect { service, .. } => {
                        let handle = self.policy.service(service).map_or(0, |s| s.handle);
                        outcome(m.outcome, service, elsewhere(handle))
                    }
                    FilterAction::Permit { .. } | FilterAction::Block { .. } => {
                        outcome(m.outcome, "", false)
                    }
                },
            })
        });
        let refused = leg.decision.blocks();
        ExplainedLeg {
            by: leg.service.map(|handle| service_name(self.policy, handle)),
            states: states.collect(),
            unknown: leg.unknown.iter().map(|field| field_name(*field)).collect(),
            matched: matched.collect(),
            decision: match (leg.decision.redirects(), refused) {
                (true, _) => "redirect",
                (false, true) => "refuse",
                (false, false) => "pass",
            },
            reason: refused.then_some(match reason {
                Reason::NoFilter | Reason::Filter => "filter",
                Reason::ServiceUnavailable => "service_unavailable",
                Reason::Loop => "loop",
            }),
            service: (handle != 0).then(|| service_name(self.policy, handle)),
        }
    }
}

/// What came of a filter, in words. `service` is the one to which it redirects, if it does;
/// `elsewhere` says whether that has live listeners in other network namespaces only.
fn outcome(outcome: Outcome, service: &str, elsewhere: bool) -> String {
    let missing = if elsewhere {
        "no live listener in this network namespace, only in others"
    } else {
        "no live listener"
    };
    match outcome {
        Outcome::Decided(Verdict::None) => "says nothing".into(),
        Outcome::Decided(Verdict::SoftPermit) => "permits it".into(),
        Outcome::Decided(Verdict::HardPermit) => "permits it for good".into(),
        Outcome::Decided(Verdict::SoftBlock) => {
            "refuses it, unless a lighter sublayer permits it".into()
        }
        Outcome::Decided(Verdict::HardBlock) => "refuses it".into(),
        Outcome::Redirects => format!("redirects it to {service}"),
        Outcome::Shadowed => "has no say: a heavier filter of its sublayer has decided".into(),
        Outcome::Overruled => {
            format!("does not redirect it to {service}: a heavier sublayer has decided for good")
        }
        Outcome::LaterLeg => format!("redirects it to {service} on a later leg"),
        Outcome::AlreadyVisited => format!("is done with it: {service} has had the flow"),
        Outcome::Group => {
            format!(
                "would redirect it to {service}, but what is for a group has no single receiver"
            )
        }
        Outcome::Trusts => {
            format!("lets it pass: {service} trusts the services that have had the flow")
        }
        Outcome::Skipped => {
            format!("passes over {service}, which has {missing} (on failure: skip)")
        }
        Outcome::ServiceUnavailable => {
            format!("refuses it: {service} has {missing} (on failure: block)")
        }
    }
}

fn state(state: RedirectState) -> &'static str {
    match state {
        RedirectState::NotRedirected => "not_redirected",
        RedirectState::RedirectedBySelf => "redirected_by_self",
        RedirectState::RedirectedByOther => "redirected_by_other",
        RedirectState::PreviouslyRedirectedBySelf => "previously_redirected_by_self",
    }
}

/// A field, as the option that says it is called.
fn field_name(field: Field) -> &'static str {
    match field {
        Field::Protocol => "protocol",
        Field::DestinationAddress | Field::DestinationPort => "to",
        Field::User => "uid",
        Field::Cgroup => "cgroup",
        Field::Executable => "exe",
        Field::OriginalExecutable => "original-exe",
        Field::NetworkNamespace => "netns",
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.services[..], self.arrives) {
            ([], true) => f.write_str("goes straight to its destination"),
            ([], false) => f.write_str("is refused"),
            (services, true) => {
                write!(f, "passes {} and reaches its destination", services.join(", then "))
            }
            (services, false) => {
                write!(f, "passes {} and is then refused", services.join(", then "))
            }
        }
    }
}

impl fmt::Display for ExplainedLeg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            None => writeln!(f, "{}", styled(HEADING, "The application connects"))?,
            Some(service) => {
                writeln!(f, "{}", styled(HEADING, format_args!("{service} connects onwards")))?;
            }
        }
        if !self.unknown.is_empty() {
            let unknown = format!(
                "not known of it: {}; filters that test this are taken not to match",
                self.unknown.join(", ")
            );
            writeln!(f, "  {}", styled(WARNING, unknown))?;
        }
        if self.matched.is_empty() {
            writeln!(f, "  {}", styled(FAINT, "no filter matches"))?;
        }
        for Matched { filter, sublayer, outcome, .. } in &self.matched {
            writeln!(f, "  filter {filter} ({sublayer}) {outcome}")?;
        }
        let service = self.service.as_deref().unwrap_or("?");
        match (self.decision, self.reason) {
            ("redirect", _) => write!(f, "  -> {service}"),
            ("pass", _) => write!(f, "  -> {}", styled(GOOD, "the destination")),
            (_, Some("loop")) => write!(
                f,
                "  -> {}",
                styled(BAD, "refused: more legs than there can be, a service forgets the record")
            ),
            _ => write!(f, "  -> {}", styled(BAD, "refused")),
        }
    }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for leg in &self.legs {
            writeln!(f, "{leg}\n")?;
        }
        let style = if self.result.arrives { GOOD } else { BAD };
        let what = format!("A connection to {} {}.", self.destination, self.result);
        write!(f, "{}", styled(style, what))?;
        for IfDead { service, result } in &self.if_dead {
            write!(f, "\nIf {service} were dead: it {result}.")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use carnet_core::{
        compile::compile,
        object::{CgroupRef, Conditions, FailurePolicy, NewFilter, NewService, Weight},
    };

    use super::*;

    /// Two services that want everything: `tls` is missed if it is dead, `av` is not.
    fn policy() -> Policy {
        let mut policy = Policy::new();
        policy.add_provider("acme", "").unwrap();
        let services = [("tls", FailurePolicy::Block), ("av", FailurePolicy::Skip)];
        for (id, (name, on_failure)) in (1..).zip(services) {
            let cgroup = CgroupRef { path: "/no-such-cgroup".into(), id };
            let new = NewService::new(name, "acme", cgroup);
            policy.add_service(NewService { on_failure, ..new }).unwrap();
            let sublayer = format!("for-{name}");
            policy.add_sublayer(&sublayer, "acme", 100 - id as u16).unwrap();
            policy
                .add_filter(NewFilter {
                    name: Some(format!("to-{name}")),
                    sublayer,
                    weight: Weight::Auto,
                    conditions: Conditions::default(),
                    action: FilterAction::Redirect { service: name.into(), context: None },
                })
                .unwrap();
        }
        policy
    }

    fn answer(live: &[&str]) -> Explained {
        let policy = policy();
        let compiled = compile(&policy, 1).unwrap();
        let destination = "192.0.2.1:443".parse::<SocketAddr>().unwrap();
        let live = live.iter().map(|name| Live {
            handle: policy.service(name).unwrap().handle,
            netns: 1,
            home: 1,
        });
        let question = Question {
            policy: &policy,
            compiled: &compiled,
            connection: HostConnection {
                protocol: 6,
                destination: destination.into(),
                ..HostConnection::default()
            },
            live: live.collect(),
        };
        question.answer(destination)
    }

    #[test]
    fn the_way_of_a_flow_is_told_leg_by_leg() {
        let told = answer(&["tls", "av"]).to_string();
        let told = anstream::adapter::strip_str(&told).to_string();
        let expected = "\
The application connects
  filter to-tls (for-tls) redirects it to tls
  filter to-av (for-av) redirects it to av on a later leg
  -> tls

tls connects onwards
  filter to-tls (for-tls) is done with it: tls has had the flow
  filter to-av (for-av) redirects it to av
  -> av

av connects onwards
  filter to-tls (for-tls) is done with it: tls has had the flow
  filter to-av (for-av) is done with it: av has had the flow
  -> the destination

A connection to 192.0.2.1:443 passes tls, then av and reaches its destination.
If tls were dead: it is refused.
If av were dead: it passes tls and reaches its destination.";
        assert_eq!(told, expected);
    }

    #[test]
    fn a_dead_service_decides_by_its_failure_policy() {
        let explained = answer(&["av"]);
        assert_eq!(explained.result, Fate { arrives: false, services: Vec::new() });
        assert_eq!(explained.legs[0].reason, Some("service_unavailable"));
        assert_eq!(explained.legs[0].service.as_deref(), Some("tls"));
        let explained = answer(&["tls"]);
        assert_eq!(explained.result, Fate { arrives: true, services: vec!["tls".into()] });
    }

    #[test]
    fn a_service_that_listens_in_another_network_namespace_is_told_from_a_dead_one() {
        let policy = policy();
        let compiled = compile(&policy, 1).unwrap();
        let destination = "192.0.2.1:443".parse::<SocketAddr>().unwrap();
        let handle = |name| policy.service(name).unwrap().handle;
        let told = |netns, live: Vec<Live>| {
            let mut connection = HostConnection {
                protocol: 6,
                destination: destination.into(),
                ..HostConnection::default()
            };
            connection.process.network_namespace = Some(netns);
            let question = Question { policy: &policy, compiled: &compiled, connection, live };
            let told = question.answer(destination).to_string();
            anstream::adapter::strip_str(&told).to_string()
        };
        let local = |name, netns| Live { handle: handle(name), netns, home: netns };
        let words = told(2, vec![local("tls", 1), local("av", 1)]);
        let refused = "refuses it: tls has no live listener in this network namespace, only in \
                       others (on failure: block)";
        assert!(words.contains(refused), "{words}");
        // A service that is reached in another one connects onwards from there.
        let reached = Live { handle: handle("tls"), netns: 2, home: 1 };
        let words = told(2, vec![reached, local("av", 1)]);
        assert!(words.ends_with(
            "passes tls, then av and reaches its destination.\nIf tls were dead: it is refused.\n\
             If av were dead: it passes tls and reaches its destination."
        ), "{words}");
    }

    #[test]
    fn the_json_says_the_same() {
        let json = serde_json::to_value(answer(&["tls", "av"])).unwrap();
        assert_eq!(json["services"], serde_json::json!(["tls", "av"]));
        assert_eq!(json["arrives"], true);
        assert_eq!(json["legs"][1]["by"], "tls");
        assert_eq!(json["legs"][1]["states"][0]["state"], "redirected_by_self");
        assert_eq!(json["if_dead"][0]["arrives"], false);
    }
}

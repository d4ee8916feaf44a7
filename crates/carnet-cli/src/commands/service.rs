//! `carnet service`: redirect services and their listeners.

use std::{net::SocketAddr, path::PathBuf};

use carnet_core::object::{FailurePolicy, NewService, Protocol, Service, Trust};
use carnet_engine::{Engine, Listener, Reach, ServiceSockets};
use serde::Serialize;

use super::{DONE, service_kind::Kind, service_run, service_wait};
use crate::{
    arguments::new_name,
    console::plain,
    failure::Failure,
    lookup::{Cgroup, NamespaceNames, NetworkNamespace, Pid},
    privileges,
    session::Session,
    table::Table,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Add a service whose processes run in a cgroup that exists
    #[command(group(clap::ArgGroup::new("place").required(true).args(["cgroup", "unit"])))]
    Add {
        /// Its name
        #[arg(value_parser = new_name)]
        name: String,

        /// The provider that brings it
        #[arg(long, value_name = "NAME|ID")]
        provider: String,

        /// The cgroup in which its processes run
        #[arg(long, value_name = "PATH")]
        cgroup: Option<PathBuf>,

        /// The systemd unit that is the service, instead of its cgroup. Better that of a slice, which
        /// stays when the unit starts anew
        #[arg(long, value_name = "UNIT")]
        unit: Option<String>,

        /// What happens to its connections while it has no live listener
        #[arg(long, value_enum, value_name = "WHAT", default_value_t)]
        on_failure: OnFailure,

        /// Do not look at flows that only these services have redirected: none, all, or names
        #[arg(long, value_name = "none|all|NAME,…", value_parser = parse_trust, default_value = "none")]
        trust: Trust,

        #[command(flatten)]
        kind: Kind,
    },
    /// List the services and their listeners
    Ls,
    /// Remove a service to which no filter redirects
    Rm {
        /// Its name or id
        #[arg(value_name = "NAME|ID")]
        service: String,
    },
    Run(service_run::Arguments),
    Wait(service_wait::Arguments),
    Register(Register),
    /// Take back what `register --listen` has said
    ///
    /// Connections that are open go on. What a process has registered ends with its sockets.
    Unregister {
        /// The service's name or id
        #[arg(value_name = "NAME|ID")]
        service: String,

        /// The address at which flows reached its listener
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: SocketAddr,

        /// Only for the flows of this network namespace
        #[arg(long, value_name = "PATH|pid:N")]
        netns: Option<NetworkNamespace>,
    },
}

/// Register a service's listeners for it
///
/// For programs that do not do so themselves: the listening TCP sockets of all processes in the service's
/// cgroup, and their UDP sockets that are bound and not connected. Those at the service's port, if it
/// has one (--listen-port of service add; then it is needed only for sockets that were bound before).
/// Each socket gets the flows of its own network namespace.
///
/// With --listen a listener in another network namespace than the flows': those of --netns reach it
/// at an address of its own network namespace, for example that of the host's end of a veth pair,
/// without address translation on the way. TCP only. The service has to have registered it there. It
/// stays so until `unregister`, also when the service starts anew.
#[derive(Debug, clap::Args)]
pub(crate) struct Register {
    /// The service's name or id
    #[arg(value_name = "NAME|ID")]
    service: String,

    /// Only sockets of this process, and of those that descend from it: its workers
    #[arg(long, conflicts_with = "listen")]
    pid: Option<Pid>,

    /// Of the TCP sockets only the one that is bound to this address (repeatable): a program may listen
    /// for other things as well
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "listen")]
    tcp: Vec<SocketAddr>,

    /// Of the UDP sockets only the one that is bound to this address (repeatable): a process may have
    /// others, which are no listeners
    #[arg(long, value_name = "ADDRESS:PORT")]
    udp: Vec<SocketAddr>,

    /// Only sockets in this network namespace. With --listen: that of the flows
    #[arg(long, value_name = "PATH|pid:N")]
    netns: Option<NetworkNamespace>,

    /// Where flows of another network namespace reach the service's listener
    #[arg(long, value_name = "ADDRESS:PORT", requires = "netns")]
    listen: Option<SocketAddr>,

    /// With --listen: the network namespace of the listener, if it is not this command's
    #[arg(long, value_name = "PATH|pid:N", requires = "listen", conflicts_with = "pid")]
    home: Option<NetworkNamespace>,
}

/// [`FailurePolicy`] as an option.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub(crate) enum OnFailure {
    /// They are refused
    #[default]
    Block,
    /// They pass over the service, as if it had no filters
    Skip,
}

impl From<OnFailure> for FailurePolicy {
    fn from(choice: OnFailure) -> Self {
        match choice {
            OnFailure::Block => Self::Block,
            OnFailure::Skip => Self::Skip,
        }
    }
}

/// Reads `none`, `all`, or names (or ids) with commas between them.
pub(super) fn parse_trust(text: &str) -> Result<Trust, &'static str> {
    match text {
        "none" => Ok(Trust::None),
        "all" => Ok(Trust::All),
        _ => {
            let names: Vec<_> = text.split(',').map(str::to_owned).collect();
            match names.iter().any(String::is_empty) {
                true => Err("write none, all, or names of services with commas between them"),
                false => Ok(Trust::Services(names)),
            }
        }
    }
}

/// JSON of `service ls`: a service, and its live listeners.
#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    service: &'a Service,
    /// Where it listens.
    listeners: Vec<Listening>,
}

/// JSON of a listener.
#[derive(Serialize)]
struct Listening {
    /// The address that it is bound to; of one in another network namespace that at which it is
    /// reached.
    address: SocketAddr,
    /// `tcp` or `udp`.
    protocol: String,
    /// Cookie of the network namespace whose flows it gets.
    netns: u64,
    /// Cookie of the network namespace in which it listens.
    home: u64,
}

/// JSON of `service register` and `service unregister`.
#[derive(Serialize)]
struct Registered {
    /// The service's name.
    service: String,
    /// The listeners that were registered, or taken back.
    listeners: Vec<Listening>,
}

/// JSON: the service that was added or removed ([`carnet_core::object::Service`]); for `ls` an
/// array of [`Listed`]; for `register` and `unregister` [`Registered`].
pub(super) fn run(command: Command, session: &mut Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Add { name, provider, cgroup, unit, on_failure, trust, kind } => {
            let mut engine = session.engine()?;
            let cgroup = match (cgroup, unit) {
                (Some(cgroup), _) => Cgroup::find(&cgroup)?,
                (None, unit) => Cgroup::of_unit(&unit.unwrap_or_default())?,
            };
            let on_failure = on_failure.into();
            let new = NewService::new(name, provider, cgroup.reference());
            let new = kind.of(NewService { on_failure, trust, ..new });
            let added = session.change(&mut engine, |p| p.add_service(new).cloned())?;
            if added.listen_port.is_some() {
                // What its program bound before.
                engine.register_sockets_of(&added.name, &ServiceSockets::default())?;
            }
            session.changed(&added, format_args!("service {} added", added.name))?;
        }
        Command::Ls => list(&session.engine()?, session)?,
        Command::Rm { service } => {
            let mut engine = session.engine()?;
            let removed = session.change(&mut engine, |p| p.remove_service(&service))?;
            session.changed(&removed, format_args!("service {} removed", removed.name))?;
        }
        Command::Run(arguments) => return service_run::run(arguments, session),
        Command::Wait(arguments) => return service_wait::run(&arguments, session),
        Command::Register(arguments) => register(&arguments, session)?,
        Command::Unregister { service, listen, netns } => {
            let engine = session.engine()?;
            let policy = engine.policy()?;
            let service = Session::known(&policy, policy.service(&service))?.name.clone();
            let cookie = netns.as_ref().map(NetworkNamespace::cookie).transpose()?;
            let gone = engine.unregister_reach(&service, cookie, listen)?;
            if gone.is_empty() {
                return Err(Failure::new(format_args!(
                    "no flows of another network namespace reach service {service} at {listen}"
                ))
                .with_hint("carnet service ls shows where they do"));
            }
            let listeners: Vec<_> = gone.iter().map(Listening::new).collect();
            let names = NamespaceNames::known();
            let from: Vec<_> = gone.iter().map(|listener| names.name(listener.netns)).collect();
            let line = format!(
                "flows of {} no longer reach service {service} at {listen}",
                from.join(", ")
            );
            session.changed(&Registered { service, listeners }, line)?;
        }
    }
    Ok(DONE)
}

fn register(arguments: &Register, session: &mut Session<'_>) -> Result<(), Failure> {
    let Register { service, pid, tcp, udp, netns, listen, home } = arguments;
    if listen.is_some() && !udp.is_empty() {
        return Err(Failure::usage(
            "UDP flows cannot go to a listener in another network namespace: the addresses from \
             which a service gets their datagrams mean nothing beyond their own",
        )
        .with_hint(
            "run the service in that network namespace too, and register its UDP socket there",
        ));
    }
    let engine = session.engine()?;
    privileges::examine_processes()?;
    pid.map_or(Ok(()), Pid::check)?;
    let policy = engine.policy()?;
    let known = Session::known(&policy, policy.service(service))?;
    let service = known.name.clone();
    let registered = match (listen, netns) {
        (Some(address), Some(flows)) => {
            let home = home.as_ref().map_or(Ok("/proc/self/ns/net".into()), |home| home.path())?;
            let reach = Reach { flows: &flows.path()?, home: &home, address: *address };
            let listener = engine.register_reach(&service, &reach)?;
            let address = listener.local;
            let line = format!("flows of {flows} reach service {service} at {address}");
            let listeners = vec![Listening::new(&listener)];
            return session.changed(&Registered { service, listeners }, line);
        }
        (_, netns) => {
            let netns = netns.as_ref().map(NetworkNamespace::cookie).transpose()?;
            let (process, tcp, udp) = (pid.map(|pid| pid.0), tcp.clone(), udp.clone());
            let sockets = ServiceSockets { process, tcp, udp, netns };
            let registered = engine.register_sockets_of(&service, &sockets)?;
            if registered.is_empty() {
                return Err(listens_nowhere(known, &sockets));
            }
            registered
        }
    };
    let names = NamespaceNames::known();
    let list: Vec<_> = registered.iter().map(|listener| told(listener, &names)).collect();
    let line = format!("service {service} listens on {}", list.join(", "));
    let listeners = registered.iter().map(Listening::new).collect();
    session.changed(&Registered { service, listeners }, line)
}

/// There is none of the sockets that were to be registered.
fn listens_nowhere(service: &Service, sockets: &ServiceSockets) -> Failure {
    let who = match sockets.process {
        Some(pid) => format!("process {pid}"),
        None => format!("service {}", service.name),
    };
    let at = service.listen_port.map_or(String::new(), |port| format!(" at port {port}"));
    let within = sockets.netns.map_or("", |_| " in that network namespace");
    let failure = Failure::new(format_args!("{who} listens on no TCP or UDP socket{at}{within}"));
    failure.with_hint(match sockets.process {
        Some(_) => "start it first, and name the process that listens".into(),
        None => format!("start it first, in the cgroup {}", service.cgroup.path),
    })
}

impl Listening {
    fn new(listener: &Listener) -> Self {
        let Listener { local, protocol, netns, home, .. } = *listener;
        Self { address: local, protocol: protocol.to_string(), netns, home }
    }
}

/// A listener, for people.
fn told(listener: &Listener, names: &NamespaceNames) -> String {
    let Listener { local, protocol, netns, home, .. } = listener;
    let protocol = if *protocol == Protocol::TCP { "" } else { "udp " };
    if home != netns {
        format!("{protocol}{local} from {}", names.name(*netns))
    } else if names.is_own(*netns) {
        format!("{protocol}{local}")
    } else {
        format!("{protocol}{local} in {}", names.name(*netns))
    }
}

fn list(engine: &Engine, session: &mut Session<'_>) -> Result<(), Failure> {
    let policy = engine.policy()?;
    let listeners = engine.listeners()?;
    let names = NamespaceNames::known();
    let mut table = Table::new([
        "ID",
        "NAME",
        "PROVIDER",
        "ON FAILURE",
        "TRUST",
        "UNMODIFIED",
        "GATEWAY",
        "LISTENERS",
        "CGROUP",
    ]);
    let mut listed = Vec::new();
    for service in policy.services() {
        let live: Vec<_> = live_listeners(&listeners, service).collect();
        let mut words = live.iter().map(|listener| told(listener, &names));
        table.row([
            service.id.to_string(),
            service.name.clone(),
            service.provider.clone(),
            service.on_failure.to_string(),
            trust(&service.trust),
            yes_or_no(service.unmodified),
            yes_or_no(service.gateway),
            words.next().unwrap_or_else(|| "none".into()),
            plain(&service.cgroup.path),
        ]);
        for listener in words {
            let mut more = [const { String::new() }; 9];
            more[7] = listener;
            table.row(more);
        }
        let listeners = live.into_iter().map(Listening::new).collect();
        listed.push(Listed { service, listeners });
    }
    session.list(&listed, "services", &table)
}

/// Where a service listens, as far as can be told: the kernel forgets a listener that was closed
/// only when a connection does not find it, or its place is needed.
pub(super) fn live_listeners<'a>(
    listeners: &'a [Listener],
    service: &Service,
) -> impl Iterator<Item = &'a Listener> {
    let handle = service.handle;
    let runs = service_run::runs(service).unwrap_or(false);
    let own = move |one: &&Listener| one.handle == handle && one.missed == 0 && runs;
    listeners.iter().filter(own).filter(move |one| {
        // What is reached from another network namespace is some listener of its own one.
        let is_it = |other: &Listener| {
            (other.netns, other.home) == (one.home, one.home)
                && (other.protocol, other.local.port()) == (one.protocol, one.local.port())
        };
        one.home == one.netns || listeners.iter().filter(own).any(is_it)
    })
}

fn yes_or_no(is: bool) -> String {
    if is { "yes" } else { "no" }.into()
}

fn trust(trust: &Trust) -> String {
    match trust {
        Trust::None => "none".into(),
        Trust::All => "all".into(),
        Trust::Services(names) => names.join(","),
    }
}

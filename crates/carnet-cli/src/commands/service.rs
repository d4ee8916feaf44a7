//! `carnet service`: redirect services and their listeners.

use std::{net::SocketAddr, path::PathBuf};

use carnet_core::object::{FailurePolicy, NewService, Service, Trust};
use carnet_engine::{Engine, Listener};
use serde::Serialize;

use super::{DONE, service_run};
use crate::{
    arguments::new_name,
    console::plain,
    failure::Failure,
    lookup::{Cgroup, Pid},
    privileges,
    session::Session,
    table::Table,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Add a service whose processes run in a cgroup that exists
    Add {
        /// Its name
        #[arg(value_parser = new_name)]
        name: String,

        /// The provider that brings it
        #[arg(long, value_name = "NAME|ID")]
        provider: String,

        /// The cgroup in which its processes run, for example that of its systemd unit
        #[arg(long, value_name = "PATH")]
        cgroup: PathBuf,

        /// What happens to its connections while it has no live listener
        #[arg(long, value_enum, value_name = "WHAT", default_value_t)]
        on_failure: OnFailure,

        /// Do not look at flows that only these services have redirected: none, all, or names
        #[arg(long, value_name = "none|all|NAME,…", value_parser = parse_trust, default_value = "none")]
        trust: Trust,
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
    /// Register the sockets on which a process listens, TCP and UDP, as a service's listeners
    ///
    /// For services that do not do so themselves. The process has to run in the service's cgroup.
    Register {
        /// The service's name or id
        #[arg(value_name = "NAME|ID")]
        service: String,

        /// The process
        #[arg(long)]
        pid: Pid,
    },
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
    listeners: Vec<SocketAddr>,
}

/// JSON of `service register`.
#[derive(Serialize)]
struct Registered {
    /// The service's name.
    service: String,
    /// The listeners that were registered.
    listeners: Vec<SocketAddr>,
}

/// JSON: the service that was added or removed ([`carnet_core::object::Service`]); for `ls` an
/// array of [`Listed`]; for `register` [`Registered`].
pub(super) fn run(command: Command, session: &mut Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Add { name, provider, cgroup, on_failure, trust } => {
            let mut engine = session.engine()?;
            let cgroup = Cgroup::find(&cgroup)?.reference();
            let on_failure = on_failure.into();
            let new = NewService { name, provider, cgroup, on_failure, trust };
            let added = session.change(&mut engine, |p| p.add_service(new).cloned())?;
            session.changed(&added, format_args!("service {} added", added.name))?;
        }
        Command::Ls => list(&session.engine()?, session)?,
        Command::Rm { service } => {
            let mut engine = session.engine()?;
            let removed = session.change(&mut engine, |p| p.remove_service(&service))?;
            session.changed(&removed, format_args!("service {} removed", removed.name))?;
        }
        Command::Run(arguments) => return service_run::run(arguments, session),
        Command::Register { service, pid } => {
            let engine = session.engine()?;
            privileges::examine_processes()?;
            pid.check()?;
            let policy = engine.policy()?;
            let service = Session::known(&policy, policy.service(&service))?.name.clone();
            let listeners = engine.register_listener_of(&service, pid.0)?;
            if listeners.is_empty() {
                return Err(Failure::new(format_args!(
                    "process {pid} listens on no TCP or UDP socket"
                ))
                .with_hint("start it first, and name the process that listens"));
            }
            let list: Vec<_> = listeners.iter().map(SocketAddr::to_string).collect();
            let line = format!("service {service} listens on {}", list.join(" "));
            session.changed(&Registered { service, listeners }, line)?;
        }
    }
    Ok(DONE)
}

fn list(engine: &Engine, session: &mut Session<'_>) -> Result<(), Failure> {
    let policy = engine.policy()?;
    let listeners = engine.listeners()?;
    let listed: Vec<_> = policy
        .services()
        .iter()
        .map(|service| Listed {
            service,
            listeners: live_listeners(&listeners, service).map(|l| l.local).collect(),
        })
        .collect();
    let mut table =
        Table::new(["ID", "NAME", "PROVIDER", "ON FAILURE", "TRUST", "LISTENERS", "CGROUP"]);
    for Listed { service, listeners } in &listed {
        let mut listeners = listeners.iter().map(SocketAddr::to_string);
        table.row([
            service.id.to_string(),
            service.name.clone(),
            service.provider.clone(),
            service.on_failure.to_string(),
            trust(&service.trust),
            listeners.next().unwrap_or_else(|| "none".into()),
            plain(&service.cgroup.path),
        ]);
        for listener in listeners {
            let mut more = [const { String::new() }; 7];
            more[5] = listener;
            table.row(more);
        }
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
    listeners.iter().filter(move |one| one.handle == handle && one.missed == 0 && runs)
}

fn trust(trust: &Trust) -> String {
    match trust {
        Trust::None => "none".into(),
        Trust::All => "all".into(),
        Trust::Services(names) => names.join(","),
    }
}

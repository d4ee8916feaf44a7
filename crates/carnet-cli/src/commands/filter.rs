//! `carnet filter`: what happens to which connections.

use std::{collections::BTreeSet, fmt::Write as _, path::PathBuf};

use carnet_core::object::{
    Conditions, Context, Filter, FilterAction, NewFilter, Policy, PolicyError, PortRange, Prefix,
    Protocol, UserRange, Weight,
};
use carnet_engine::{Ended, Engine};
use serde::Serialize;

use super::DONE;
use crate::{
    arguments::new_name,
    console::plain,
    failure::Failure,
    lookup::{self, Cgroup, NetworkNamespace},
    privileges,
    session::Session,
    table::Table,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Add(Box<Add>),
    /// List the filters, in the order in which they are consulted
    Ls,
    /// Remove a filter
    Rm {
        /// Its name or id
        #[arg(value_name = "NAME|ID")]
        filter: String,
    },
}

/// Add a filter
///
/// It matches the connections that meet all conditions; of a condition that is given several times
/// one value must match. Without conditions it matches every connection.
#[derive(Debug, clap::Args)]
pub(crate) struct Add {
    /// The sublayer to which it belongs
    #[arg(long, value_name = "NAME|ID")]
    sublayer: String,

    /// Its name
    #[arg(long, value_parser = new_name)]
    name: Option<String>,

    /// Heavier filters of a sublayer come first; auto: the more specific, the heavier
    #[arg(long, value_name = "auto|NUMBER", default_value_t = Weight::Auto)]
    weight: Weight,

    #[command(flatten)]
    action: Action,

    #[command(flatten)]
    details: Details,

    #[command(flatten)]
    conditions: ConditionArguments,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Action")]
#[group(required = true, multiple = false)]
struct Action {
    /// Send the connection to this service
    #[arg(long, value_name = "SERVICE")]
    redirect: Option<String>,

    /// Let the connection pass
    #[arg(long)]
    permit: bool,

    /// Refuse the connection
    #[arg(long)]
    block: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Action")]
#[group(skip)]
struct Details {
    /// With --redirect: what the service gets to read with the connection; hex:… for bytes that
    /// are no text
    #[arg(long, value_name = "TEXT|hex:DIGITS", value_parser = parse_context,
          requires = "redirect", conflicts_with_all = ["permit", "block"])]
    context: Option<Context>,

    /// With --permit: lighter sublayers cannot block it, except by a veto
    #[arg(long, requires = "permit", conflicts_with_all = ["redirect", "block"])]
    hard: bool,

    /// With --block: lighter sublayers can let it pass
    #[arg(long, requires = "block", conflicts_with_all = ["redirect", "permit"])]
    soft: bool,

    /// With --block: even if a heavier sublayer has permitted it for good
    #[arg(long, requires = "block", conflicts_with_all = ["soft", "redirect", "permit"])]
    veto: bool,

    /// With --block: also end the connections that are there and that it refuses
    ///
    /// Otherwise a new filter is for connections that begin after it. Looked at are the network
    /// namespaces in which processes of the instance are. Who holds such a connection finds it
    /// broken.
    #[arg(long, requires = "block", conflicts_with_all = ["redirect", "permit"])]
    end_existing: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Conditions (repeatable)")]
struct ConditionArguments {
    /// Protocol: tcp, udp or a number
    #[arg(long, value_name = "NAME|NUMBER")]
    protocol: Vec<Protocol>,

    /// Destination address
    #[arg(long, value_name = "ADDRESS|PREFIX")]
    to: Vec<Prefix>,

    /// Destination port
    #[arg(long, value_name = "PORT|FIRST-LAST")]
    port: Vec<PortRange>,

    /// User id of the process that connects
    #[arg(long, value_name = "UID|FIRST-LAST")]
    uid: Vec<UserRange>,

    /// Cgroup of the process that connects, with all that is below it
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,

    /// Executable of the process that connects
    #[arg(long, value_name = "PATH")]
    exe: Vec<PathBuf>,

    /// Executable with which the flow began, also on the legs of services
    #[arg(long, value_name = "PATH")]
    original_exe: Vec<PathBuf>,

    /// Network namespace
    #[arg(long, value_name = "PATH|pid:N")]
    netns: Vec<NetworkNamespace>,
}

fn parse_context(text: &str) -> Result<Context, PolicyError> {
    match text.strip_prefix("hex:") {
        Some(digits) => Context::from_hex(digits),
        None => Context::new(text),
    }
}

impl Action {
    fn resolve(self, details: Details) -> FilterAction {
        let Details { context, hard, soft, veto, end_existing: _ } = details;
        match self.redirect {
            Some(service) => FilterAction::Redirect { service, context },
            None if self.permit => FilterAction::Permit { hard },
            None => FilterAction::Block { hard: !soft, veto },
        }
    }
}

impl ConditionArguments {
    fn resolve(self, engine: &Engine) -> Result<Conditions, Failure> {
        let executables = |names: &[PathBuf]| {
            let found = names
                .iter()
                .map(|name| lookup::executable_condition(engine, &lookup::executable(name)?));
            found.collect::<Result<_, Failure>>()
        };
        let cgroups = self.cgroup.iter().map(|path| Cgroup::find(path).map(Cgroup::condition));
        Ok(Conditions {
            protocols: self.protocol,
            destinations: self.to,
            ports: self.port,
            users: self.uid,
            cgroups: cgroups.collect::<Result<_, _>>()?,
            executables: executables(&self.exe)?,
            original_executables: executables(&self.original_exe)?,
            network_namespaces: self
                .netns
                .iter()
                .map(NetworkNamespace::condition)
                .collect::<Result<_, _>>()?,
        })
    }
}

/// JSON of a filter that was added.
#[derive(Serialize)]
struct Added<'a> {
    #[serde(flatten)]
    filter: &'a Filter,
    /// With `--end-existing`: what was ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<EndedCount>,
}

#[derive(Serialize)]
struct EndedCount {
    /// Number of connections.
    connections: usize,
    /// Number of redirected flows that they belonged to.
    flows: usize,
}

impl EndedCount {
    fn of(ended: &[Ended]) -> Self {
        let flows: BTreeSet<u64> = ended.iter().filter_map(|ended| ended.flow).collect();
        Self { connections: ended.len(), flows: flows.len() }
    }
}

/// JSON: the filter that was added or removed; for `ls` an array of them
/// ([`carnet_core::object::Filter`]).
pub(super) fn run(command: Command, session: &mut Session<'_>) -> Result<u8, Failure> {
    let mut engine = session.engine()?;
    match command {
        Command::Add(add) => {
            let end_existing = add.details.end_existing;
            if end_existing {
                privileges::examine_processes()?;
                Engine::check_ending()?;
            }
            let new = NewFilter {
                name: add.name,
                sublayer: add.sublayer,
                weight: add.weight,
                conditions: add.conditions.resolve(&engine)?,
                action: add.action.resolve(add.details),
            };
            let added = session.change(&mut engine, |p| p.add_filter(new).cloned())?;
            let name = name_or_id(&added);
            let ended = end_existing.then(|| engine.end_existing(added.id)).transpose();
            let ended = ended.map_err(|error| {
                let what = format_args!("filter {name} is added, but not all was ended");
                Failure::because(what, &error)
            })?;
            let ended = ended.map(|ended| EndedCount::of(&ended));
            let mut line = format!("filter {name} added");
            if let Some(EndedCount { connections, flows }) = ended {
                line += &format!(", {connections} connections ended, of {flows} redirected flows");
            }
            session.changed(&Added { filter: &added, ended }, line)?;
        }
        Command::Ls => {
            let policy = engine.policy()?;
            let filters = in_order(&policy);
            let mut table =
                Table::new(["ID", "NAME", "SUBLAYER", "WEIGHT", "ACTION", "CONDITIONS"]);
            for filter in &filters {
                table.row([
                    filter.id.to_string(),
                    filter.name.clone().unwrap_or_default(),
                    filter.sublayer.clone(),
                    filter.weight.to_string(),
                    action(&filter.action),
                    conditions(&filter.conditions),
                ]);
            }
            session.list(&filters, "filters", &table)?;
        }
        Command::Rm { filter } => {
            let removed = session.change(&mut engine, |p| p.remove_filter(&filter))?;
            session.changed(&removed, format_args!("filter {} removed", name_or_id(&removed)))?;
        }
    }
    Ok(DONE)
}

/// The filters in the order of arbitration.
fn in_order(policy: &Policy) -> Vec<&Filter> {
    let sublayers = policy.sublayers_in_order();
    let rank = |filter: &Filter| sublayers.iter().position(|s| s.name == filter.sublayer);
    let mut filters: Vec<_> = policy.filters().iter().collect();
    filters.sort_by_key(|f| (rank(f), std::cmp::Reverse(f.effective_weight()), f.id));
    filters
}

/// How a filter is called.
pub(super) fn name_or_id(filter: &Filter) -> String {
    filter.name.clone().unwrap_or_else(|| filter.id.to_string())
}

/// What a filter does, in words.
pub(super) fn action(action: &FilterAction) -> String {
    match action {
        FilterAction::Permit { hard: false } => "permit".into(),
        FilterAction::Permit { hard: true } => "permit, hard".into(),
        FilterAction::Block { veto: true, .. } => "block, veto".into(),
        FilterAction::Block { hard: true, .. } => "block".into(),
        FilterAction::Block { hard: false, .. } => "block, soft".into(),
        FilterAction::Redirect { service, context: None } => format!("redirect to {service}"),
        FilterAction::Redirect { service, context: Some(context) } => {
            format!("redirect to {service} with {}", plain(context))
        }
    }
}

/// What a filter matches, in the words of its options.
fn conditions(conditions: &Conditions) -> String {
    let Conditions {
        protocols,
        destinations,
        ports,
        users,
        cgroups,
        executables,
        original_executables,
        network_namespaces,
    } = conditions;
    let paths = |executables: &[carnet_core::object::ExecutableCondition]| {
        list(executables.iter().map(|e| &e.path))
    };
    let fields = [
        ("protocol", list(protocols)),
        ("to", list(destinations)),
        ("port", list(ports)),
        ("uid", list(users)),
        ("cgroup", list(cgroups.iter().map(|c| &c.path))),
        ("exe", paths(executables)),
        ("original-exe", paths(original_executables)),
        ("netns", list(network_namespaces.iter().map(|n| &n.name))),
    ];
    let mut text = String::new();
    for (field, values) in fields {
        if !values.is_empty() {
            let space = if text.is_empty() { "" } else { " " };
            // Writing to a string does not fail.
            let _ = write!(text, "{space}{field} {values}");
        }
    }
    if text.is_empty() { "every connection".into() } else { text }
}

fn list(values: impl IntoIterator<Item = impl std::fmt::Display>) -> String {
    values.into_iter().map(plain).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_listed_as_they_are_consulted() {
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        policy.add_sublayer("light", "p", 1).unwrap();
        policy.add_sublayer("heavy", "p", 2).unwrap();
        for (name, sublayer, port) in
            [("a", "light", None), ("b", "heavy", None), ("c", "heavy", Some(80))]
        {
            let ports = port.map(PortRange::from).into_iter().collect();
            policy
                .add_filter(NewFilter {
                    name: Some(name.into()),
                    sublayer: sublayer.into(),
                    weight: Weight::Auto,
                    conditions: Conditions { ports, ..Conditions::default() },
                    action: FilterAction::BLOCK,
                })
                .unwrap();
        }
        let names: Vec<_> = in_order(&policy).into_iter().map(name_or_id).collect();
        assert_eq!(names, ["c", "b", "a"]);
    }

    #[test]
    fn conditions_read_as_they_were_given() {
        assert_eq!(conditions(&Conditions::default()), "every connection");
        let given = Conditions {
            protocols: vec![Protocol::TCP],
            destinations: vec!["192.0.2.0/24".parse().unwrap(), "::1".parse().unwrap()],
            ports: vec!["80-81".parse().unwrap()],
            ..Conditions::default()
        };
        assert_eq!(conditions(&given), "protocol tcp to 192.0.2.0/24,::1 port 80-81");
    }

    #[test]
    fn a_context_is_text_or_bytes() {
        assert_eq!(parse_context("hex:00ff").unwrap().as_bytes(), [0, 255]);
        assert_eq!(parse_context("hexagon").unwrap().as_bytes(), b"hexagon");
        assert!(parse_context("hex:0").is_err());
        assert!(parse_context("").is_err());
    }
}

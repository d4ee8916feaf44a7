//! `carnet flows`: the flows that are alive.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use carnet_engine::{Flow, FlowHop, LegKind};
use serde::Serialize;

use super::DONE;
use crate::{console::plain, failure::Failure, moment, session::Session, table::Table};

/// List the live flows, each with the services that it passes
///
/// A flow is what an application connected, with all the connections that the services made of it.
/// Connections that no filter redirects are none.
///
/// What an unmodified service connects belongs to one of the flows that it holds: where it is a guess to
/// which, or which services that one has passed, there is a question mark.
///
/// A flow that began on another host has an @ behind its application, which is what that host says. A
/// service that this host does not have is "elsewhere-" and the number by which all hosts know it.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

/// JSON of `flows`: an array of these.
#[derive(Debug, Serialize)]
struct Listed {
    /// The flow's number.
    flow: u64,
    /// When its oldest live leg began, RFC 3339, UTC.
    began: String,
    /// `tcp`, `udp` or the protocol's number.
    protocol: String,
    /// The destination that the application wanted.
    destination: SocketAddr,
    /// The application.
    application: Application,
    /// Whether the application is a guess: an unmodified service holds several flows for the
    /// destination, or none.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    application_guessed: bool,
    /// Whether the flow began on another host, which says which application it was.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    imported: bool,
    /// The services that it has been redirected to, oldest first. One that was removed meanwhile
    /// is `removed-` and its handle, one of another host `elsewhere-` and its identity in hexadecimal.
    services: Vec<String>,
    /// Those of them of which that is a guess.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services_guessed: Vec<String>,
    /// Whether it goes on to its destination from the last of them.
    onward: bool,
    /// Its live connections, oldest first.
    legs: Vec<Leg>,
    #[serde(skip)]
    age: Duration,
}

#[derive(Debug, Serialize)]
struct Application {
    /// Its process.
    pid: u32,
    /// Its user.
    uid: u32,
    /// Its group.
    gid: u32,
    /// Its executable; null where the kernel could not read the path.
    executable: Option<PathBuf>,
    /// Its command name.
    command: String,
}

#[derive(Debug, Serialize)]
struct Leg {
    /// The process that connected.
    pid: u32,
    /// The service to which it goes; null if it goes to the destination.
    service: Option<String>,
    /// The id of the filter that redirected it; null if it goes to the destination.
    filter: Option<u64>,
    /// Whether the process set no record, and the connection adopted one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    adopted: bool,
    /// Where the process connected to.
    requested: SocketAddr,
    /// Where the connection really goes.
    target: SocketAddr,
}

pub(super) fn run(_arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let flows = listed(session.engine()?.flows()?);
    let mut table =
        Table::new(["FLOW", "AGE", "APPLICATION", "", "DESTINATION", "THROUGH", "NOW AT"]);
    for flow in &flows {
        let Application { pid, command, .. } = &flow.application;
        let last = flow.services.last().map_or("?", String::as_str);
        table.row([
            flow.flow.to_string(),
            moment::short(flow.age),
            format!(
                "{}[{pid}]{}{}",
                plain(command),
                if flow.imported { "@" } else { "" },
                mark(flow.application_guessed)
            ),
            flow.protocol.clone(),
            flow.destination.to_string(),
            through(flow),
            if flow.onward { "destination".into() } else { last.into() },
        ]);
    }
    session.list(&flows, "live flows", &table)?;
    Ok(DONE)
}

/// What is put behind a guess.
fn mark(guessed: bool) -> &'static str {
    if guessed { "?" } else { "" }
}

fn through(flow: &Listed) -> String {
    let guessed = |service| mark(flow.services_guessed.contains(service));
    let services = flow.services.iter().map(|service| format!("{service}{}", guessed(service)));
    services.collect::<Vec<_>>().join(" > ")
}

/// The legs, by flow.
fn listed(legs: Vec<Flow>) -> Vec<Listed> {
    let mut flows: BTreeMap<u64, Vec<Flow>> = BTreeMap::new();
    for leg in legs {
        flows.entry(leg.flow).or_default().push(leg);
    }
    flows.into_values().filter_map(|legs| one(&legs)).collect()
}

/// A flow of its legs, of which the engine gives the oldest first.
fn one(legs: &[Flow]) -> Option<Listed> {
    let oldest = legs.first()?;
    let furthest = legs.iter().max_by_key(|leg| (leg.hops.len(), leg.kind == LegKind::Onward))?;
    let name = |service: &Option<String>, handle: u64| match service {
        Some(name) => name.clone(),
        None => removed(handle),
    };
    let began = u64::try_from(oldest.began.as_nanos()).unwrap_or(u64::MAX);
    let leg = |leg: &Flow| {
        let redirected = leg.kind == LegKind::Redirected;
        Leg {
            pid: leg.pid,
            service: redirected.then(|| name(&leg.service, leg.handle)),
            filter: redirected.then_some(leg.filter),
            adopted: leg.adopted,
            requested: leg.requested,
            target: leg.target,
        }
    };
    // One that is certain as well is no guess.
    let same = |one: &FlowHop, other: &FlowHop| {
        (one.handle, one.identity) == (other.handle, other.identity)
    };
    let is_certain = |hop| furthest.hops.iter().any(|other| same(other, hop) && !other.guessed);
    let guessed = furthest.hops.iter().filter(|hop| !is_certain(hop));
    let name_of = |hop: &FlowHop| hop_name(hop.handle, hop.service.as_deref(), hop.identity);
    Some(Listed {
        flow: oldest.flow,
        began: moment::rfc3339(moment::time_of_day(began)),
        protocol: oldest.protocol.to_string(),
        destination: oldest.destination,
        application: Application {
            pid: oldest.app.pid,
            uid: oldest.app.uid,
            gid: oldest.app.gid,
            executable: oldest.app.path.clone(),
            command: oldest.app.command.to_string_lossy().into_owned(),
        },
        application_guessed: legs.iter().all(|leg| leg.identity_guessed),
        imported: oldest.imported,
        services: furthest.hops.iter().map(name_of).collect(),
        services_guessed: guessed.map(name_of).collect(),
        onward: furthest.kind == LegKind::Onward,
        legs: legs.iter().map(leg).collect(),
        age: moment::age(began),
    })
}

/// The name of a service that a flow has had, or what can be said of one that this host does not have.
fn hop_name(handle: u64, name: Option<&str>, identity: u64) -> String {
    match name {
        Some(name) => name.to_owned(),
        None if handle == 0 => format!("elsewhere-{identity:016x}"),
        None => removed(handle),
    }
}

/// What can be said of a service that was removed.
pub(super) fn removed(handle: u64) -> String {
    format!("removed-{handle}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_this_host_does_not_have_is_named_by_its_identity() {
        let elsewhere = hop_name(0, None, 0x1f);
        assert_eq!(elsewhere, "elsewhere-000000000000001f");
        assert_eq!(hop_name(7, None, 0), "removed-7");
        assert_eq!(hop_name(7, Some("tls"), 0), "tls");
    }
}

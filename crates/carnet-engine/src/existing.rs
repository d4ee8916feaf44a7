//! Ending connections that are there already, where a filter is added that refuses them.
//!
//! Which these are the decision function says ([`carnet_core::existing`]). It is asked about every
//! leg of the flows that Carnet knows, and about every other connection that a socket of the
//! instance's cgroups has made. The kernel does not tell who began a connection of these: one of TCP
//! whose own port is that of a listening socket counts as having been accepted.
//!
//! A connection ends with its socket, which is destroyed. The flows of a UDP socket that is not
//! connected have no connection to end: what was decided for them is forgotten, so that the next
//! datagram meets the filter.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
};

use carnet_core::{
    address::{AF_INET, AF_INET6, Endpoint},
    chain::Chain,
    compile::CompiledPolicy,
    existing::is_ended_by,
    explain::{HostConnection, Process},
    flow::CorrespondentKey,
    record::{Hop, Record},
};
use zerocopy::FromZeros as _;

use crate::{
    Engine, Error, Flow, LegKind,
    members::{Members, Namespace},
    sockets::{
        CLOSE, Diagnosis, ESTABLISHED, LISTEN, Listed, NEW_SYN_RECEIVED, PROTOCOLS, SYN_RECEIVED,
        TIME_WAIT,
    },
    tables::Tables,
};

/// `IPPROTO_TCP`.
const TCP: u8 = 6;

/// How often the sockets are gone through at most: connections that were under way when the policy
/// changed may appear in the kernel's list a moment later.
const MAX_ROUNDS: usize = 8;

/// A connection that was ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Ended {
    /// IP protocol number.
    pub protocol: u8,
    /// Where it went, as who made it saw it.
    pub destination: SocketAddr,
    /// The flow that it was a leg of; `None` for one that Carnet had passed.
    pub flow: Option<u64>,
    /// Cookie of the socket that made it.
    pub cookie: u64,
    /// Cookie of its network namespace.
    pub netns: u64,
}

impl Engine {
    /// Refuses to go on where the kernel cannot end connections.
    ///
    /// # Errors
    /// [`Error::CannotEnd`]; [`Error::NoSocketList`].
    pub fn check_ending() -> Result<(), Error> {
        let diagnosis = Diagnosis::open().map_err(unlisted)?;
        match diagnosis.can_destroy() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::CannotEnd),
            Err(error) => Err(unlisted(error)),
        }
    }

    /// Ends the connections that are there and that the policy in force would refuse, if the filter
    /// with the id `filter` has a say in that; gives those that it has ended. A flow is ended as a
    /// whole if any of its legs is refused.
    ///
    /// Looked at are the network namespaces in which processes of the instance's cgroups are. Who
    /// holds the socket that made a connection finds it broken: `ECONNABORTED`. A UDP socket that is
    /// not connected stays, and what it sends next is refused; answers that a service still sends
    /// reach it until the flow has been idle for too long.
    ///
    /// # Errors
    /// As for [`Engine::check_ending`] and [`Engine::flows`]; what was ended before stays so.
    pub fn end_existing(&self, filter: u64) -> Result<Vec<Ended>, Error> {
        let compiled = self.compiled()?;
        let members = Members::of(self, &self.policy()?)?;
        let namespaces = members.namespaces()?;
        let inquiry = Inquiry {
            engine: self,
            compiled: &compiled,
            members: &members,
            filter,
            processes: RefCell::default(),
        };
        let mut ended = BTreeSet::new();
        for _ in 0..MAX_ROUNDS {
            let round = inquiry.round(&namespaces)?;
            if round.is_empty() {
                break;
            }
            ended.extend(round);
        }
        Ok(ended.into_iter().collect())
    }
}

/// A search for connections that a filter ends.
struct Inquiry<'a> {
    engine: &'a Engine,
    compiled: &'a CompiledPolicy,
    members: &'a Members,
    filter: u64,
    /// What was found out about processes.
    processes: RefCell<BTreeMap<u32, Process>>,
}

impl Inquiry<'_> {
    /// Goes through everything once.
    fn round(&self, namespaces: &[Namespace]) -> Result<BTreeSet<Ended>, Error> {
        let legs = self.engine.flows()?;
        let condemned = legs.iter().filter(|leg| self.ends_leg(leg)).map(|leg| leg.flow).collect();
        let mut round = Round {
            inquiry: self,
            legs: BTreeMap::new(),
            condemned,
            holders: self.members.holders(),
            correspondents: BTreeMap::new(),
            ended: BTreeSet::new(),
        };
        for leg in &legs {
            round.legs.entry((leg.netns, leg.cookie)).or_default().push(leg);
        }
        for key in self.engine.reading(Tables::correspondents)? {
            round.correspondents.entry(key.cookie).or_default().push(key);
        }
        for Namespace { cookie: netns, diagnosis } in namespaces {
            for protocol in PROTOCOLS {
                round.go_through(diagnosis, *netns, protocol)?;
            }
        }
        Ok(round.ended)
    }

    /// Whether the filter ends a leg of a flow.
    fn ends_leg(&self, leg: &Flow) -> bool {
        // The record that the connect began with: without the hop that it brought.
        let before = match leg.kind {
            LegKind::Redirected => leg.hops.len().saturating_sub(1),
            LegKind::Onward => leg.hops.len(),
        };
        let mut record = Record::new_zeroed();
        for hop in leg.hops.iter().take(before) {
            record.push(Hop { handle: hop.handle, filter: hop.filter });
        }
        let process = if before == 0 {
            Process {
                user: Some(leg.app.uid),
                cgroups: self.members.cgroups.get(&leg.app.cgroup).cloned(),
                executable: Some(leg.app.executable),
                network_namespace: Some(leg.netns),
            }
        } else {
            Process { network_namespace: Some(leg.netns), ..self.process(leg.pid) }
        };
        let connection = HostConnection {
            protocol: leg.protocol.0,
            destination: leg.requested.into(),
            process,
            original_executable: Some(leg.app.executable),
        };
        let chain = Chain::of_record(self.compiled, &record);
        is_ended_by(self.filter, self.compiled, &connection, &chain)
    }

    /// Whether the filter ends a connection that passed without a record, for any of the processes
    /// that hold it.
    fn ends_passed(
        &self,
        socket: &Listed,
        netns: u64,
        destination: SocketAddr,
        holders: Option<&Vec<u32>>,
    ) -> bool {
        let ends = |process: Process| {
            let connection = HostConnection {
                protocol: socket.protocol,
                destination: destination.into(),
                original_executable: process.executable,
                process: Process { network_namespace: Some(netns), ..process },
            };
            is_ended_by(self.filter, self.compiled, &connection, &Chain::empty(0))
        };
        match holders {
            Some(pids) => pids.iter().any(|pid| ends(self.process(*pid))),
            // Held by nobody any more, or elsewhere.
            None => ends(Process {
                user: Some(socket.user),
                cgroups: self.members.cgroups.get(&socket.cgroup).cloned(),
                ..Process::default()
            }),
        }
    }

    /// What is known of a process.
    fn process(&self, pid: u32) -> Process {
        let mut processes = self.processes.borrow_mut();
        let describe = || self.engine.describe_process(pid).unwrap_or_default();
        processes.entry(pid).or_insert_with(describe).clone()
    }
}

/// What is there to be looked at, and what was ended of it.
struct Round<'a> {
    inquiry: &'a Inquiry<'a>,
    /// By network namespace and cookie. A UDP socket that is not connected may have many.
    legs: BTreeMap<(u64, u64), Vec<&'a Flow>>,
    /// The flows that the filter ends.
    condemned: BTreeSet<u64>,
    /// The processes that hold sockets, by the sockets' inodes.
    holders: BTreeMap<u64, Vec<u32>>,
    /// With whom UDP sockets that are not connected have flows, by the sockets' cookies.
    correspondents: BTreeMap<u64, Vec<CorrespondentKey>>,
    ended: BTreeSet<Ended>,
}

impl Round<'_> {
    /// Goes through the sockets of a protocol in a network namespace.
    fn go_through(&mut self, diagnosis: &Diagnosis, netns: u64, protocol: u8) -> Result<(), Error> {
        let sockets = diagnosis.list(protocol).map_err(unlisted)?;
        let listening = |socket: &&Listed| protocol == TCP && socket.state == LISTEN;
        let listening: BTreeSet<u16> =
            sockets.iter().filter(listening).map(|socket| socket.local().port()).collect();
        for socket in &sockets {
            let leg =
                self.leg(netns, socket, |leg| protocol == TCP || same(leg.target, socket.peer()));
            let end = match leg {
                Some(leg) => self.condemned.contains(&leg.flow),
                None => {
                    is_connection(socket)
                        && !listening.contains(&socket.local().port())
                        && self.ends_passed(netns, socket, socket.peer())
                }
            };
            let (flow, destination) = match leg {
                Some(leg) => (Some(leg.flow), leg.requested),
                None => (None, socket.peer()),
            };
            let cookie = socket.cookie();
            let failed = || Error::io("end", socket.local());
            if end && diagnosis.destroy(socket).map_err(failed())? {
                self.ended.insert(Ended { protocol, destination, flow, cookie, netns });
            }
            for key in self.correspondents.get(&cookie).into_iter().flatten() {
                let destination = destination_of(key);
                let leg = self.leg(netns, socket, |leg| same(leg.requested, destination));
                let end = match leg {
                    Some(leg) => self.condemned.contains(&leg.flow),
                    None => self.ends_passed(netns, socket, destination),
                };
                let forget = |tables: &Tables| tables.forget_correspondent(key);
                if end && self.inquiry.engine.reading(forget)? {
                    let flow = leg.map(|leg| leg.flow);
                    self.ended.insert(Ended { protocol, destination, flow, cookie, netns });
                }
            }
        }
        Ok(())
    }

    /// A leg that a socket has made.
    fn leg(&self, netns: u64, socket: &Listed, is_it: impl Fn(&Flow) -> bool) -> Option<&Flow> {
        let legs = self.legs.get(&(netns, socket.cookie()))?;
        legs.iter().find(|leg| is_it(leg)).copied()
    }

    /// Whether the filter ends what a socket sends to `destination` without a record.
    fn ends_passed(&self, netns: u64, socket: &Listed, destination: SocketAddr) -> bool {
        let Inquiry { members, .. } = self.inquiry;
        let holders = self.holders.get(&socket.inode);
        members.cgroups.contains_key(&socket.cgroup)
            && self.inquiry.ends_passed(socket, netns, destination, holders)
    }
}

/// Why the sockets cannot be listed.
pub(crate) fn unlisted(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT) => Error::NoSocketList,
        _ => Error::io("list", "the sockets of a network namespace")(error),
    }
}

/// Whom a UDP socket has a flow with.
fn destination_of(key: &CorrespondentKey) -> SocketAddr {
    let endpoint = Endpoint::v6(key.address, key.port as u16);
    let family = if endpoint.is_ipv4() { AF_INET } else { AF_INET6 };
    Endpoint { family, ..endpoint }.into()
}

/// Whether two addresses are the same, one of which may be mapped.
fn same(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical()
}

/// Whether a socket that was listed has another end, and does not only remember it.
fn is_connection(socket: &Listed) -> bool {
    match socket.protocol {
        TCP => {
            !matches!(socket.state, CLOSE | LISTEN | TIME_WAIT | SYN_RECEIVED | NEW_SYN_RECEIVED)
        }
        _ => socket.state == ESTABLISHED,
    }
}

//! Why: the legs that a flow would make under a policy, each with the filters that had a say.
//!
//! [`explain`] runs the kernel's own decision function over a compiled policy, leg after leg, as
//! if every service accepted, set the record and connected onwards to the same destination.

use alloc::{string::String, vec::Vec};

use zerocopy::FromZeros as _;

use crate::{
    address::{Endpoint, Wide},
    chain::{Chain, RedirectState},
    classify::{Connection, Decision, Listeners, Observer, Outcome, classify, is_redirectable},
    compile::CompiledPolicy,
    object::{Policy, Service},
    record::{FileId, Hop, Record},
    table::{Field, FilterRow},
};

/// A connection as the host describes it: the values of its fields.
///
/// What is not known matches no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostConnection {
    /// IP protocol number.
    pub protocol: u8,
    /// Where it goes.
    pub destination: Endpoint,
    /// Who makes it.
    pub process: Process,
    /// The executable with which the flow began, if it is known. For [`explain`], which begins
    /// with the application, `None` stands for the process's own.
    pub original_executable: Option<FileId>,
}

/// What can be said of a process that connects. `None` is for what is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// User id in the initial user namespace.
    pub user: Option<u32>,
    /// Ids of its cgroup and that one's ancestors, by level: the root first, its own last.
    pub cgroups: Option<Vec<u64>>,
    /// Its executable.
    pub executable: Option<FileId>,
    /// Cookie of its sockets' network namespace.
    pub network_namespace: Option<u64>,
}

impl HostConnection {
    /// The fields of which nothing is known.
    pub fn unknown(&self) -> impl Iterator<Item = Field> {
        Field::ALL.into_iter().filter(|field| self.get(*field, 0).is_none())
    }

    fn get(&self, field: Field, argument: u32) -> Option<Wide> {
        let file = |file: FileId| Wide { hi: file.device, lo: file.inode };
        match field {
            Field::Protocol => Some(Wide::from_u64(self.protocol.into())),
            Field::DestinationAddress => Some(self.destination.value()),
            Field::DestinationPort => Some(Wide::from_u64(self.destination.port.into())),
            Field::User => self.process.user.map(|user| Wide::from_u64(user.into())),
            Field::Cgroup => self.process.cgroups.as_ref().map(|cgroups| {
                Wide::from_u64(cgroups.get(argument as usize).copied().unwrap_or(0))
            }),
            Field::Executable => self.process.executable.map(file),
            Field::OriginalExecutable => self.original_executable.map(file),
            Field::NetworkNamespace => self.process.network_namespace.map(Wide::from_u64),
        }
    }
}

impl Connection for HostConnection {
    fn value(&self, field: u32, argument: u32) -> Wide {
        let Some(field) = Field::ALL.get(field as usize) else {
            return Wide::MIN;
        };
        // No condition reaches up to the largest value of two words: not that of a range of
        // users, nor of an existing file, cgroup or network namespace.
        self.get(*field, argument).unwrap_or(Wide::MAX)
    }

    fn is_redirectable(&self) -> bool {
        is_redirectable(self.protocol.into(), &self.destination)
    }
}

/// One leg of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leg {
    /// The connection that was classified.
    pub connection: HostConnection,
    /// Redirect handle of the service whose process makes it; `None` on the first leg, which the
    /// application makes.
    pub service: Option<u64>,
    /// What the record said.
    pub chain: Chain,
    /// The redirect state and the listener of every service, in the policy's order.
    pub services: Vec<ServiceView>,
    /// Fields that the policy tests and that are not known of this connection: filters that test
    /// them were taken not to match.
    pub unknown: Vec<Field>,
    /// The filters that matched, in the order of arbitration.
    pub matched: Vec<Match>,
    /// What happens to the leg.
    pub decision: Decision,
}

/// How a service sees a leg.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceView {
    /// The service's name.
    pub name: String,
    /// Its redirect handle.
    pub handle: u64,
    /// Where the flow stands with respect to it (contract C5..C8).
    pub state: RedirectState,
    /// Whether it has a live listener.
    pub live: bool,
}

/// A filter that matched a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Match {
    /// The filter's id.
    pub filter: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// Follows a flow that begins with `connection` until it is let through or refused.
///
/// `compiled` is what [`compile`](crate::compile::compile()) made of `policy`; `live` says by
/// redirect handle whether a service has a live listener for flows of a network namespace;
/// `process_of` describes the process by which a service connects onwards that got a leg in a network
/// namespace (with [`Process::default`], nothing is known of it). The network namespace is `None`
/// where it is not known.
pub fn explain(
    policy: &Policy,
    compiled: &CompiledPolicy,
    connection: &HostConnection,
    live: &dyn Fn(u64, Option<u64>) -> bool,
    process_of: &dyn Fn(&Service, Option<u64>) -> Process,
) -> Vec<Leg> {
    let mut record = Record::new_zeroed();
    let mut connection = connection.clone();
    connection.original_executable =
        connection.original_executable.or(connection.process.executable);
    let mut service = None;
    let mut legs = Vec::new();
    loop {
        let chain = Chain::of_record(compiled, &record);
        let netns = connection.process.network_namespace;
        let view = |(slot, service): (u32, &Service)| ServiceView {
            name: service.name.clone(),
            handle: service.handle,
            state: chain.state(slot),
            live: live(service.handle, netns),
        };
        let services = (0..).zip(policy.services()).map(view).collect();
        let tested = |field: &Field| compiled.header().fields & field.bit() != 0;
        let unknown = connection.unknown().filter(tested).collect();
        let mut matched = Matches(Vec::new());
        let mut live = Live { live, netns };
        let decision = classify(compiled, &connection, &chain, &mut live, &mut matched);
        let matched = matched.0;
        let leg = Leg { connection, service, chain, services, unknown, matched, decision };
        let mut next = leg.connection.clone();
        legs.push(leg);
        // A record that is full ends the flow in the kernel too.
        let hop = Hop { handle: decision.handle, filter: decision.filter };
        if !decision.redirects() || !record.push(hop) {
            return legs;
        }
        record.legs += 1;
        service = Some(decision.handle);
        let service = policy.service_by_handle(decision.handle);
        next.process = service.map(|service| process_of(service, netns)).unwrap_or_default();
        connection = next;
    }
}

struct Live<'a> {
    live: &'a dyn Fn(u64, Option<u64>) -> bool,
    netns: Option<u64>,
}

impl Listeners for Live<'_> {
    fn is_live(&mut self, handle: u64) -> bool {
        (self.live)(handle, self.netns)
    }
}

struct Matches(Vec<Match>);

impl Observer for Matches {
    fn begin(&mut self) {
        self.0.clear();
    }

    fn matched(&mut self, filter: &FilterRow, outcome: Outcome) {
        // A filter that is several rows matches by the first of them. They follow each other.
        if self.0.last().is_none_or(|last| last.filter != filter.id) {
            self.0.push(Match { filter: filter.id, outcome });
        }
    }
}

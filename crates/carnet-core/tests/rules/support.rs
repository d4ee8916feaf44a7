//! Policies, connections and records for the tests.

use std::net::SocketAddr;

use carnet_core::{
    chain::Chain,
    classify::{Decision, Listeners, Unobserved, classify},
    compile::CompiledPolicy,
    explain::{HostConnection, Process},
    object::{
        CgroupCondition, CgroupRef, Conditions, ExecutableCondition, FailurePolicy, FilterAction,
        NetnsCondition, NewFilter, NewService, Policy, Trust, Weight,
    },
    record::{FileId, Hop, Record},
    table::Tables,
};
use proptest::{prelude::*, sample::select};
use zerocopy::FromZeros as _;

/// A service that is to be added, of provider "p" and with a cgroup of its own.
pub(crate) fn new_service(name: &str, on_failure: FailurePolicy) -> NewService {
    let id = name.bytes().fold(1, |id, byte| id << 8 | u64::from(byte));
    let cgroup = CgroupRef { path: format!("/services/{name}"), id };
    NewService { on_failure, ..NewService::new(name, "p", cgroup) }
}

/// A filter that is to be added, with an automatic weight and no name.
pub(crate) fn new_filter(
    sublayer: &str,
    conditions: Conditions,
    action: FilterAction,
) -> NewFilter {
    NewFilter { name: None, sublayer: sublayer.into(), weight: Weight::Auto, conditions, action }
}

/// A redirect to `service` without a context.
pub(crate) fn redirect(service: &str) -> FilterAction {
    FilterAction::Redirect { service: service.into(), context: None }
}

/// A policy of provider "p" with sublayers of these names and weights and services of these names,
/// which block while they are dead.
pub(crate) fn policy(sublayers: &[(&str, u16)], services: &[&str]) -> Policy {
    let mut policy = Policy::new();
    policy.add_provider("p", "").unwrap();
    for (name, weight) in sublayers {
        policy.add_sublayer(name, "p", *weight).unwrap();
    }
    for name in services {
        policy.add_service(new_service(name, FailurePolicy::Block)).unwrap();
    }
    policy
}

/// A TCP connection of which only the destination is known.
pub(crate) fn connection_to(destination: &str) -> HostConnection {
    let destination: SocketAddr = destination.parse().unwrap();
    HostConnection { protocol: 6, destination: destination.into(), ..Default::default() }
}

/// A record with these handles, after `legs` legs.
pub(crate) fn record(handles: &[u64], legs: u32) -> Record {
    let mut record = Record::new_zeroed();
    for handle in handles {
        assert!(record.push(Hop { handle: *handle, filter: 0 }));
    }
    record.legs = legs;
    record
}

/// Listeners as a test says.
pub(crate) struct Host<'a> {
    pub(crate) live: &'a dyn Fn(u64) -> bool,
    pub(crate) forgotten_legs: u32,
}

impl Listeners for Host<'_> {
    fn is_live(&mut self, handle: u64) -> bool {
        (self.live)(handle)
    }

    fn forgotten_legs(&mut self) -> u32 {
        self.forgotten_legs
    }
}

/// Classifies with all services alive and a record that says `chain`.
pub(crate) fn decide(tables: &impl Tables, connection: &HostConnection, chain: &Chain) -> Decision {
    let mut host = Host { live: &|_| true, forgotten_legs: 0 };
    classify(tables, connection, chain, &mut host, &mut Unobserved)
}

/// Checks what every compiled policy keeps to.
pub(crate) fn check_bounds(compiled: &CompiledPolicy) {
    use carnet_core::compile::{max_candidates, max_nodes};
    let rows = compiled.filters().len();
    assert!(compiled.nodes().len() <= max_nodes(rows));
    assert!(compiled.leaves().len() <= compiled.nodes().len() + 1);
    assert!(compiled.candidates().len() <= max_candidates(rows));
    for leaf in compiled.leaves() {
        let end = leaf.first as usize + leaf.count as usize;
        let candidates = &compiled.candidates()[leaf.first as usize..end];
        assert!(candidates.is_sorted_by(|a, b| a < b));
        assert!(candidates.iter().all(|row| (*row as usize) < rows));
    }
    for filter in compiled.filters() {
        let end = filter.first_condition as usize + filter.condition_count as usize;
        let conditions = &compiled.conditions()[filter.first_condition as usize..end];
        let fields = conditions.iter().fold(0, |fields, c| fields | 1_u32 << c.field);
        assert_eq!(fields.count_ones(), filter.condition_count, "a field twice in a row");
        assert_eq!(compiled.header().fields | fields, compiled.header().fields);
    }
}

/// Conditions from domains so small that filters and connections meet.
pub(crate) fn conditions() -> impl Strategy<Value = Conditions> {
    /// No value, mostly; else one to three.
    fn values<T: Clone + std::fmt::Debug + 'static>(
        element: impl Strategy<Value = T> + 'static,
    ) -> impl Strategy<Value = Vec<T>> {
        prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(element, 1..=3)]
    }
    fn parsed<T: std::str::FromStr<Err: std::fmt::Debug> + std::fmt::Debug>(
        texts: &'static [&'static str],
    ) -> impl Strategy<Value = T> {
        select(texts).prop_map(|text| text.parse().unwrap())
    }
    let cgroup = (0_u32..4, 1_u64..4).prop_map(|(level, id)| CgroupCondition {
        path: format!("/{level}/{id}"),
        id,
        level,
    });
    let executable =
        || file().prop_map(|file| ExecutableCondition { path: format!("/{}", file.inode), file });
    let netns = (1_u64..3).prop_map(|cookie| NetnsCondition { name: "n".into(), cookie });
    const DESTINATIONS: &[&str] = &[
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.1.2.3",
        "0.0.0.0/0",
        "::/0",
        "::/64",
        "::ffff:10.1.0.0/112",
        "2001:db8::/32",
        "2001:db8::1",
        "2001:db8::/127",
    ];
    const PORTS: &[&str] = &["80", "443", "80-443", "81-442", "0-65535", "444-65535"];
    const USERS: &[&str] = &["0", "1000", "1000-1999", "0-999", "2000-4294967295"];
    (
        values(parsed(&["tcp", "udp"])),
        values(parsed(DESTINATIONS)),
        values(parsed(PORTS)),
        values(parsed(USERS)),
        values(cgroup),
        values(executable()),
        values(executable()),
        values(netns),
    )
        .prop_map(
            |(protocols, destinations, ports, users, cgroups, executables, original, ns)| {
                Conditions {
                    protocols,
                    destinations,
                    ports,
                    users,
                    cgroups,
                    executables,
                    original_executables: original,
                    network_namespaces: ns,
                }
            },
        )
}

fn file() -> impl Strategy<Value = FileId> {
    (0_u64..2, 1_u64..3).prop_map(|(device, inode)| FileId { device, inode })
}

/// Connections that meet the filters of [`conditions`].
pub(crate) fn connections() -> impl Strategy<Value = HostConnection> {
    const DESTINATIONS: &[&str] = &[
        "10.1.2.3:80",
        "10.1.2.4:443",
        "10.9.0.1:80",
        "192.0.2.1:80",
        "[::ffff:10.1.2.3]:443",
        "[::ffff:192.0.2.1]:0",
        "[2001:db8::]:80",
        "[2001:db8::1]:443",
        "[2001:db8::2]:100",
        "[2001:db9::1]:444",
        "[::1]:65535",
        "224.0.1.1:80",
        "[ff0e::1]:443",
    ];
    (
        select(&[6_u8, 17]),
        select(DESTINATIONS),
        select(&[0_u32, 999, 1000, 1001, 1999, 2000, u32::MAX]),
        prop::collection::vec(1_u64..4, 0..5),
        file(),
        file(),
        1_u64..3,
    )
        .prop_map(|(protocol, destination, user, cgroups, executable, original, netns)| {
            HostConnection {
                protocol,
                process: Process {
                    user: Some(user),
                    cgroups: Some(cgroups),
                    executable: Some(executable),
                    network_namespace: Some(netns),
                },
                original_executable: Some(original),
                ..connection_to(destination)
            }
        })
}

/// Policies of up to 6 services, 4 sublayers and 24 filters.
pub(crate) fn policies() -> impl Strategy<Value = Policy> {
    const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
    let trust = prop_oneof![
        3 => Just(None),
        1 => Just(Some(u8::MAX)),
        2 => any::<u8>().prop_map(Some),
    ];
    let service = (any::<bool>(), trust);
    let action = prop_oneof![
        2 => any::<bool>().prop_map(|hard| FilterAction::Permit { hard }),
        2 => any::<[bool; 2]>().prop_map(|[hard, veto]| FilterAction::Block { hard, veto }),
        5 => select(&NAMES).prop_map(redirect),
    ];
    let weight = prop_oneof![Just(Weight::Auto), (0_u64..4).prop_map(Weight::Exact)];
    let filter = (0_usize..4, weight, conditions(), action);
    (
        prop::collection::vec(service, 0..=6),
        prop::collection::vec(0_u16..3, 1..=4),
        prop::collection::vec(filter, 0..=24),
    )
        .prop_map(|(services, sublayers, filters)| {
            let mut policy = policy(&[], &[]);
            let layer = |n: usize| format!("s{n}");
            for (n, weight) in sublayers.iter().enumerate() {
                policy.add_sublayer(&layer(n), "p", *weight).unwrap();
            }
            for (name, (skip, _)) in NAMES.iter().zip(&services) {
                let on_failure = if *skip { FailurePolicy::Skip } else { FailurePolicy::Block };
                policy.add_service(new_service(name, on_failure)).unwrap();
            }
            for (n, (_, trusts)) in services.iter().enumerate() {
                let trust = match trusts {
                    None => Trust::None,
                    Some(u8::MAX) => Trust::All,
                    Some(set) => {
                        let trusted = (0..services.len()).filter(|m| *m != n && set & 1 << *m != 0);
                        Trust::Services(trusted.map(|m| NAMES[m].into()).collect())
                    }
                };
                policy.set_trust(NAMES[n], trust).unwrap();
            }
            for (sublayer, weight, conditions, action) in filters {
                let sublayer = layer(sublayer % sublayers.len());
                let action = match action {
                    FilterAction::Redirect { service, .. } if policy.service(&service).is_err() => {
                        FilterAction::BLOCK
                    }
                    action => action,
                };
                let new = NewFilter { weight, ..new_filter(&sublayer, conditions, action) };
                policy.add_filter(new).unwrap();
            }
            policy
        })
}

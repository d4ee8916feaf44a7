//! The tree gives the answer that a look at every row gives, and it stays within its bounds.

use std::{
    cell::Cell,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use carnet_core::{
    address::Wide,
    chain::Chain,
    classify::{concerns_somebody, destination_concerns_somebody},
    compile::{
        CompileError, CompiledPolicy, MAX_ROWS_PER_FILTER, SMALL_LEAF, compile, max_candidates,
        max_nodes,
    },
    explain::{HostConnection, Process},
    object::{Conditions, FilterAction, Policy, PortRange, Prefix, UserRange},
    table::{
        ConditionRow, EMPTY_LEAF, Field, FilterRow, HeaderRow, LEAF, LeafRow, MAX_DEPTH, NodeRow,
        Repeat, ServiceRow, Step, Tables,
    },
};
use proptest::prelude::*;

use crate::support::{check_bounds, connection_to, decide, new_filter, policy, redirect};

/// A bank that counts what is read from it, and that can be told to have one leaf only.
struct Bank<'a> {
    compiled: &'a CompiledPolicy,
    flat: Option<(HeaderRow, LeafRow, Vec<u32>)>,
    nodes_read: Cell<u32>,
    candidates_read: Cell<u32>,
}

impl<'a> Bank<'a> {
    fn new(compiled: &'a CompiledPolicy) -> Self {
        Self { compiled, flat: None, nodes_read: Cell::new(0), candidates_read: Cell::new(0) }
    }

    /// No gates, and one leaf with all rows in the order of arbitration.
    fn flat(compiled: &'a CompiledPolicy) -> Self {
        let count = compiled.filters().len() as u32;
        let gate = ConditionRow { last: Wide::MAX, ..Default::default() };
        let header =
            HeaderRow { outer_gate: gate, inner_gate: gate, root: LEAF, ..*compiled.header() };
        let leaf = LeafRow { first: 0, count };
        Self { flat: Some((header, leaf, (0..count).collect())), ..Self::new(compiled) }
    }
}

impl Repeat for Bank<'_> {
    fn repeat<S: Step>(count: u32, step: &mut S) {
        CompiledPolicy::repeat(count, step);
    }
}

impl Tables for Bank<'_> {
    fn header(&self) -> Option<&HeaderRow> {
        self.flat.as_ref().map_or_else(|| Some(self.compiled.header()), |flat| Some(&flat.0))
    }

    fn node(&self, index: u32) -> Option<&NodeRow> {
        self.nodes_read.set(self.nodes_read.get() + 1);
        self.compiled.node(index)
    }

    fn leaf(&self, index: u32) -> Option<&LeafRow> {
        self.flat.as_ref().map_or_else(|| self.compiled.leaf(index), |flat| Some(&flat.1))
    }

    fn candidate(&self, index: u32) -> Option<&u32> {
        self.candidates_read.set(self.candidates_read.get() + 1);
        match &self.flat {
            Some(flat) => flat.2.get(index as usize),
            None => self.compiled.candidate(index),
        }
    }

    fn filter(&self, index: u32) -> Option<&FilterRow> {
        self.compiled.filter(index)
    }

    fn condition(&self, index: u32) -> Option<&ConditionRow> {
        self.compiled.condition(index)
    }

    fn service(&self, slot: u32) -> Option<&ServiceRow> {
        self.compiled.service(slot)
    }

    fn slot_of(&self, handle: u64) -> u32 {
        self.compiled.slot_of(handle)
    }

    fn handle_of(&self, identity: u64) -> u64 {
        self.compiled.handle_of(identity)
    }
}

/// A sequence of numbers that look random: SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A prefix from a few thousand networks, so that many lie in each other.
    fn prefix(&mut self) -> Prefix {
        if self.below(4) == 0 {
            let length = [16, 32, 48, 64, 128][self.below(5) as usize];
            let bits = 0x2001_u128 << 112 | u128::from(self.below(64)) << 96;
            let bits = bits | u128::from(self.next()) << 32;
            return Prefix::new(Ipv6Addr::from(bits & u128::MAX << (128 - length)).into(), length)
                .unwrap();
        }
        let length = [8, 12, 16, 24, 30, 32][self.below(6) as usize];
        let bits = 10 << 24 | self.below(1 << 24) as u32;
        Prefix::new(Ipv4Addr::from(bits & u32::MAX << (32 - length)).into(), length as u8).unwrap()
    }

    fn conditions(&mut self) -> Conditions {
        let mut conditions = Conditions::default();
        if self.below(8) != 0 {
            conditions.destinations.push(self.prefix());
        }
        if self.below(2) == 0 {
            let first = self.below(2000) as u16;
            let last = first + [0, 0, 0, 9, 1000][self.below(5) as usize];
            conditions.ports.push(PortRange::new(first, last).unwrap());
        }
        if self.below(8) == 0 {
            let first = self.below(100) as u32;
            conditions.users.push(UserRange::new(first, first + self.below(10) as u32).unwrap());
        }
        conditions
    }
}

/// A connection at, or just beyond, the bounds of a filter.
fn connection_near(conditions: &Conditions, numbers: &mut Numbers) -> HostConnection {
    let off_by = |numbers: &mut Numbers| [0, 0, 0, 1, u128::MAX][numbers.below(5) as usize];
    let prefix = conditions.destinations.first().copied();
    let ip = match prefix.unwrap_or_else(|| numbers.prefix()).address() {
        std::net::IpAddr::V4(ip) => {
            Ipv4Addr::from(ip.to_bits().wrapping_add(off_by(numbers) as u32)).into()
        }
        std::net::IpAddr::V6(ip) => {
            Ipv6Addr::from(ip.to_bits().wrapping_add(off_by(numbers))).into()
        }
    };
    let ports = conditions.ports.first();
    let port = ports.map_or(numbers.below(2000) as u16, |ports| ports.last());
    let port = port.wrapping_add(off_by(numbers) as u16);
    let user = conditions.users.first().map_or(numbers.below(110) as u32, |users| users.first());
    HostConnection {
        protocol: 6,
        destination: SocketAddr::new(ip, port).into(),
        process: Process {
            // Unknown now and then: that is a value beyond all ranges.
            user: (numbers.below(8) != 0).then(|| user.wrapping_add(off_by(numbers) as u32)),
            ..Default::default()
        },
        original_executable: None,
    }
}

fn policy_of(filters: impl Iterator<Item = Conditions>, numbers: &mut Numbers) -> Policy {
    let mut policy = policy(&[("heavy", 2), ("light", 1)], &["a", "b"]);
    for conditions in filters {
        let sublayer = ["heavy", "light"][numbers.below(2) as usize];
        let action = match numbers.below(4) {
            0 => FilterAction::PERMIT,
            1 => FilterAction::BLOCK,
            2 => redirect("a"),
            _ => redirect("b"),
        };
        policy.add_filter(new_filter(sublayer, conditions, action)).unwrap();
    }
    policy
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn a_large_tree_answers_as_one_leaf_does(seed: u64) {
        let mut numbers = Numbers(seed);
        let conditions: Vec<_> = (0..2000).map(|_| numbers.conditions()).collect();
        let policy = policy_of(conditions.iter().cloned(), &mut numbers);
        let compiled = compile(&policy, 1).unwrap();
        check_bounds(&compiled);
        let flat = Bank::flat(&compiled);
        let mut read = 0;
        for conditions in &conditions[..400] {
            let connection = connection_near(conditions, &mut numbers);
            let bank = Bank::new(&compiled);
            let chain = Chain::empty(0);
            prop_assert_eq!(
                decide(&bank, &connection, &chain),
                decide(&flat, &connection, &chain),
                "{:?}", connection
            );
            prop_assert!(bank.nodes_read.get() <= MAX_DEPTH);
            read += bank.candidates_read.get();
        }
        // A fourth of the filters are for every destination, or nearly: they are what a lookup
        // costs, not the rest.
        prop_assert!(read / 400 < 2000 / 4, "{} candidates on average", read / 400);
    }
}

#[test]
fn of_a_hundred_thousand_addresses_a_lookup_checks_a_handful() {
    const COUNT: u32 = 100_000;
    const WILDCARDS: u32 = 5;
    let mut numbers = Numbers(1);
    // An odd multiplier visits every address of 10.0.0.0/8 at most once.
    let address = |n: u32| Ipv4Addr::from(10 << 24 | (n.wrapping_mul(0x9e_3779) & 0xff_ffff));
    let one = |ip: Ipv4Addr| Conditions {
        destinations: vec![std::net::IpAddr::V4(ip).into()],
        ..Default::default()
    };
    let wildcards = (0..WILDCARDS).map(|_| Conditions::default());
    let policy = policy_of((0..COUNT).map(|n| one(address(n))).chain(wildcards), &mut numbers);
    let compiled = compile(&policy, 1).unwrap();
    check_bounds(&compiled);
    assert_eq!(compiled.filters().len() as u32, COUNT + WILDCARDS);
    for n in (0..COUNT).step_by(97) {
        let connection = connection_to(&format!("{}:80", address(n)));
        let bank = Bank::new(&compiled);
        let decision = decide(&bank, &connection, &Chain::empty(0));
        assert_ne!(decision.filter, 0);
        assert!(bank.candidates_read.get() <= SMALL_LEAF as u32 + WILDCARDS);
        assert!(bank.nodes_read.get() <= 24, "{} nodes", bank.nodes_read.get());
    }
}

#[test]
fn policies_that_cannot_be_cut_well_stay_within_the_bounds() {
    let range = |first, last| Conditions {
        ports: vec![PortRange::new(first, last).unwrap()],
        ..Default::default()
    };
    let user = |user: u32| Conditions { users: vec![UserRange::from(user)], ..Default::default() };
    let mut numbers = Numbers(7);
    let nested = policy_of((0..1000).map(|n| range(n, 3000 - n)), &mut numbers);
    let crossing = policy_of((0..1000).map(|n| range(n, n + 1000)), &mut numbers);
    let equal = policy_of((0..1000).map(|_| range(80, 80)), &mut numbers);
    let unconditional = policy_of((0..1000).map(|_| Conditions::default()), &mut numbers);
    let two_fields = (0..500).flat_map(|n| [range(n, n), user(n.into())]);
    let two_fields = policy_of(two_fields, &mut numbers);
    for policy in [nested, crossing, equal, unconditional, two_fields] {
        let compiled = compile(&policy, 1).unwrap();
        check_bounds(&compiled);
        let flat = Bank::flat(&compiled);
        for port in (0_u32..3100).step_by(7) {
            let mut connection = connection_to(&format!("192.0.2.1:{port}"));
            connection.process.user = Some(port % 500);
            let bank = Bank::new(&compiled);
            let chain = Chain::empty(0);
            let (tree, leaf) =
                (decide(&bank, &connection, &chain), decide(&flat, &connection, &chain));
            assert_eq!(tree, leaf, "port {port}");
            assert!(bank.nodes_read.get() <= MAX_DEPTH);
        }
    }
}

#[test]
fn the_worked_example_of_the_table_module() {
    let mut policy = policy(&[("s", 0)], &[]);
    let ports = Conditions { ports: vec![PortRange::from(80)], ..Default::default() };
    let a = policy.add_filter(new_filter("s", ports, FilterAction::BLOCK)).unwrap().id;
    let b = new_filter("s", Conditions::default(), FilterAction::PERMIT);
    let b = policy.add_filter(b).unwrap().id;
    let compiled = compile(&policy, 9).unwrap();
    assert_eq!(compiled.header().generation, 9);
    assert_eq!(compiled.nodes().len(), 2);
    let candidates = |port: u16| {
        let bank = Bank::new(&compiled);
        let decision =
            decide(&bank, &connection_to(&format!("192.0.2.1:{port}")), &Chain::empty(0));
        (bank.candidates_read.get(), decision.filter)
    };
    assert_eq!(candidates(79), (1, b));
    assert_eq!(candidates(80), (2, a));
    assert_eq!(candidates(81), (1, b));
    // Two of the three parts have the same candidates, which are stored once.
    assert_eq!(compiled.leaves().len(), 2);
}

#[test]
fn an_empty_policy_has_shut_gates_and_lets_everything_pass() {
    let compiled = compile(&Policy::new(), 1).unwrap();
    assert_eq!((compiled.nodes().len(), compiled.leaves().len()), (0, 0));
    assert_eq!((compiled.header().root, compiled.header().fields), (EMPTY_LEAF, 0));
    for destination in ["0.0.0.0:0", "[ffff::]:65535"] {
        assert!(!destination_concerns_somebody(&compiled, &connection_to(destination)));
        assert!(!concerns_somebody(&compiled, &connection_to(destination)));
    }
    let decision = decide(&compiled, &connection_to("192.0.2.1:1"), &Chain::empty(0));
    assert_eq!(decision, carnet_core::Decision::PASS);
}

#[test]
fn the_gates_are_the_narrowest_ranges_around_all_filters() {
    let mut policy = policy(&[("s", 0)], &[]);
    let mut add = |conditions| {
        policy.add_filter(new_filter("s", conditions, FilterAction::BLOCK)).unwrap();
        *compile(&policy, 1).unwrap().header()
    };
    let ports = |first, last| vec![PortRange::new(first, last).unwrap()];
    let users = vec![UserRange::from(1000)];
    let one = Conditions { ports: ports(80, 90), users: users.clone(), ..Default::default() };
    let header = add(one);
    // A user is one of many more values than a port, but not the destination's.
    assert_eq!(header.inner_gate.field, Field::User as u32);
    assert_eq!(header.outer_gate.field, Field::DestinationPort as u32);
    let two = Conditions { ports: ports(443, 443), ..Default::default() };
    let HeaderRow { outer_gate, inner_gate, .. } = add(two);
    assert_eq!(outer_gate, inner_gate);
    assert_eq!(outer_gate.field, Field::DestinationPort as u32);
    assert_eq!((u128::from(outer_gate.first), u128::from(outer_gate.last)), (80, 443));
    // No field is tested by all of them.
    let HeaderRow { outer_gate, inner_gate, .. } = add(Conditions { users, ..Default::default() });
    for gate in [outer_gate, inner_gate] {
        assert_eq!((gate.first, gate.last), (Wide::MIN, Wide::MAX));
    }
}

#[test]
fn a_filter_becomes_a_row_for_each_combination_of_its_values() {
    let mut policy = policy(&[("s", 0)], &[]);
    let ports = |n: u16| (0..n).map(|port| PortRange::from(2 * port)).collect();
    let users = |n: u32| (0..n).map(|user| UserRange::from(2 * user)).collect();
    let conditions = Conditions { ports: ports(32), users: users(32), ..Default::default() };
    let filter = policy.add_filter(new_filter("s", conditions, FilterAction::BLOCK)).unwrap().id;
    let compiled = compile(&policy, 1).unwrap();
    assert_eq!(compiled.filters().len(), MAX_ROWS_PER_FILTER);
    assert!(compiled.filters().iter().all(|row| row.id == filter && row.condition_count == 2));

    // Values that touch become one range, and a range of all values no condition.
    let together = Conditions {
        ports: vec!["0-79".parse().unwrap(), "80".parse().unwrap(), "70-65535".parse().unwrap()],
        users: vec!["0-4".parse().unwrap(), "5".parse().unwrap(), "9".parse().unwrap()],
        ..Default::default()
    };
    policy.remove_filter(&filter.to_string()).unwrap();
    policy.add_filter(new_filter("s", together, FilterAction::BLOCK)).unwrap();
    let compiled = compile(&policy, 1).unwrap();
    assert_eq!((compiled.filters().len(), compiled.conditions().len()), (2, 2));

    let conditions = Conditions { ports: ports(33), users: users(32), ..Default::default() };
    let filter = policy.add_filter(new_filter("s", conditions, FilterAction::BLOCK)).unwrap().id;
    let error = compile(&policy, 1).unwrap_err();
    assert_eq!(error, CompileError::TooManyRowsInFilter { filter, rows: 33 * 32 });
}

#[test]
fn the_limits_grow_linearly() {
    assert_eq!((max_nodes(0), max_candidates(0)), (256, 4096));
    assert_eq!((max_nodes(100_000), max_candidates(100_000)), (100_256, 804_096));
    assert_eq!(max_candidates(1 << 20), 1 << 20);
}

//! The configurations that are explored, each to its end.

mod scenes;

use carnet_core::object::FailurePolicy::{Block, Skip};

use self::scenes::{
    ALL, MIXED, bank_policies, changes, everybody, failures, filters, masks, opposite_orders,
    opposite_pair, unmodified, unmodified_pair,
};
use crate::{
    banks::{self, Banks},
    explore::{Report, Until, explore},
    protocol::{self, Protocol, Witness},
    scene::{NAMES, Scene},
};

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct Configuration {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Whether it is part of a short run.
    pub quick: bool,
    model: Build,
}

#[derive(Clone, Copy, Debug)]
enum Build {
    Protocol(fn() -> Protocol),
    Banks,
}

/// A part of a model that is broken on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Defects {
    /// Of the protocol.
    pub protocol: Option<protocol::Defect>,
    /// Of transactions and hooks.
    pub banks: Option<banks::Defect>,
}

/// All of them.
pub const CONFIGURATIONS: &[Configuration] = &[
    Configuration {
        name: "smallest",
        about: "2 services, 2 flows; they die and start again; an upgrade, and the key is rotated twice",
        quick: true,
        model: Build::Protocol(|| Protocol {
            scenes: vec![everybody(&["a", "b"], &[Block, Skip], &[0, 0])],
            flows: vec![0, 0],
            deaths: true,
            rotations: 2,
            upgrade: true,
            witnesses: vec![
                Witness::ThroughFewer,
                Witness::Unavailable,
                Witness::Broken,
                Witness::Upgraded,
            ],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "deaths",
        about: "4 services with each of the 16 combinations of failure policies, 3 flows to 2 \
                destinations in opposite orders; services die and start again at any time",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: (0..16).map(|set| opposite_orders(&failures::<4>(set))).collect(),
            flows: vec![0, 0, 1],
            deaths: true,
            witnesses: vec![
                Witness::ThroughFour,
                Witness::ThroughFewer,
                Witness::Unavailable,
                Witness::Broken,
            ],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "trust",
        about: "4 services, of which 2 block and 2 are skipped, 1 flow; each of the 4096 ways in which \
                they can trust each other, and one where 2 trust all; they die and start again",
        quick: false,
        model: Build::Protocol(|| {
            let mut scenes: Vec<Scene> =
                (0..4096).map(|trust| everybody(&NAMES, &MIXED, &masks::<4>(trust))).collect();
            scenes.push(everybody(&NAMES, &MIXED, &[0, ALL, 0, ALL]));
            Protocol {
                scenes,
                flows: vec![0],
                deaths: true,
                witnesses: vec![Witness::ThroughFour, Witness::ThroughFewer, Witness::Unavailable],
                ..Protocol::default()
            }
        }),
    },
    Configuration {
        name: "trust-three",
        about: "3 services, 1 flow; every way to trust with every combination of failure policies; \
                services die and start again",
        quick: true,
        model: Build::Protocol(|| {
            let scenes = (0..64).flat_map(|trust| {
                (0..8)
                    .map(move |set| everybody(&NAMES[..3], &failures::<3>(set), &masks::<3>(trust)))
            });
            Protocol {
                scenes: scenes.collect(),
                flows: vec![0],
                deaths: true,
                witnesses: vec![Witness::ThroughFewer, Witness::Unavailable, Witness::Broken],
                ..Protocol::default()
            }
        }),
    },
    Configuration {
        name: "changes",
        about: "4 services, 3 flows; filters and a service are added and removed, and its name used \
                again, by 4 transactions; services die and start again; an upgrade",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: vec![changes()],
            flows: vec![0, 0, 0],
            restarts: true,
            deaths: true,
            upgrade: true,
            witnesses: vec![
                Witness::ThroughFour,
                Witness::MidFlow,
                Witness::Successor,
                Witness::TooLate,
                Witness::Upgraded,
            ],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "changes-pair",
        about: "the same with 2 flows and without the upgrade",
        quick: true,
        model: Build::Protocol(|| Protocol {
            scenes: vec![changes()],
            flows: vec![0, 0],
            restarts: true,
            deaths: true,
            witnesses: vec![
                Witness::MidFlow,
                Witness::Successor,
                Witness::TooLate,
                Witness::Unavailable,
            ],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "forget",
        about: "4 services, of which 2 may forget the record at any time, 3 flows",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: vec![everybody(&NAMES, &[Block; 4], &[0; 4])],
            flows: vec![0, 0, 0],
            forgetful: vec![1, 3],
            witnesses: vec![Witness::Loop, Witness::Circling, Witness::ThroughFour],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "forget-all",
        about: "4 services, all of which may forget the record at any time, 1 flow, a service dies",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: vec![everybody(&NAMES, &[Skip; 4], &[0b1000, 0, 0b0001, 0])],
            flows: vec![0],
            deaths: true,
            forgetful: vec![0, 1, 2, 3],
            witnesses: vec![Witness::Loop, Witness::Circling, Witness::Broken],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "forget-pair",
        about: "2 services that may forget the record, 2 flows in opposite orders",
        quick: true,
        model: Build::Protocol(|| Protocol {
            scenes: vec![opposite_pair()],
            flows: vec![0, 1],
            forgetful: vec![0, 1],
            witnesses: vec![Witness::Loop, Witness::Circling, Witness::ThroughFewer],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "lies",
        about: "4 services in opposite orders for 2 destinations, of which 2 lie; 3 flows; an hour \
                passes; 2 lies are believed",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: vec![opposite_orders(&[Block; 4])],
            flows: vec![0, 0, 1],
            liars: vec![1, 3],
            lies: 2,
            hours: true,
            witnesses: vec![Witness::Believed, Witness::ThroughFour],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "lies-pair",
        about: "2 services that lie, 2 flows in opposite orders; an hour passes, the key is rotated; 2 lies are \
                believed",
        quick: true,
        model: Build::Protocol(|| Protocol {
            scenes: vec![opposite_pair()],
            flows: vec![0, 1],
            liars: vec![0, 1],
            lies: 2,
            hours: true,
            rotations: 1,
            witnesses: vec![Witness::Believed, Witness::ThroughFewer],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "unmodified",
        about: "4 services, of which each non-empty set is unmodified, passed over when dead, 2 flows; \
                services die and start again at any time",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: (1..16).map(|set| unmodified(&NAMES, set)).collect(),
            flows: vec![0, 0],
            deaths: true,
            witnesses: vec![Witness::ThroughFour, Witness::Guessed, Witness::Broken],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "unmodified-crowd",
        about: "2 services, of which each non-empty set is unmodified, passed over when dead, 3 flows; \
                services die and start again at any time",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: (1..4).map(|set| unmodified(&NAMES[..2], set)).collect(),
            flows: vec![0, 0, 0],
            deaths: true,
            witnesses: vec![Witness::ThroughFewer, Witness::Guessed, Witness::Broken],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "unmodified-elsewhere",
        about: "2 services in opposite orders for 2 destinations, of which each non-empty set is \
                unmodified, 3 flows, 2 of which go on to the other destination",
        quick: false,
        model: Build::Protocol(|| Protocol {
            scenes: (1..4).map(unmodified_pair).collect(),
            flows: vec![0, 0, 1],
            lies: 2,
            witnesses: vec![Witness::ThroughFewer, Witness::Guessed],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "unmodified-three",
        about: "3 services, of which each non-empty set is unmodified, passed over when dead, 2 flows; \
                services die and start again; 1 flow goes on to the other destination",
        quick: true,
        model: Build::Protocol(|| Protocol {
            scenes: (1..8).map(|set| unmodified(&NAMES[..3], set)).collect(),
            flows: vec![0, 0],
            deaths: true,
            lies: 1,
            witnesses: vec![Witness::ThroughFewer, Witness::Guessed, Witness::Broken],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "filters",
        about: "permits, blocks and redirects of 3 sublayers, hard, soft, with a veto: each combination of \
                one filter in each of the two heavier ones above a redirect",
        quick: true,
        model: Build::Protocol(|| Protocol {
            scenes: filters(),
            flows: vec![0, 1],
            witnesses: vec![Witness::Blocked, Witness::Untouched, Witness::ThroughFewer],
            ..Protocol::default()
        }),
    },
    Configuration {
        name: "banks",
        about: "3 hooks, 5 policies; commands fail and are killed at any step",
        quick: true,
        model: Build::Banks,
    },
];

impl Configuration {
    /// Explores it.
    pub fn explore(&self, until: Until, defects: Defects) -> Report {
        match self.model {
            Build::Protocol(build) => {
                let protocol = Protocol { defect: defects.protocol, ..build() };
                explore(self.name, protocol, until)
            }
            Build::Banks => explore(self.name, Banks::new(&bank_policies(), defects.banks), until),
        }
    }
}

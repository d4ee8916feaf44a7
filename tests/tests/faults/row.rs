//! A row of the table that `cargo xtask faults` prints.

use std::{collections::BTreeMap, env};

use serde::Serialize;

/// How many failures are told in words.
const TOLD: usize = 8;

/// Whether everything is tried, and not only a sample.
pub(crate) fn thorough() -> bool {
    env::var_os("CARNET_FAULTS_ALL").is_some()
}

/// A sample of the numbers from 1 to `count`: evenly spread, the first and the last among them; all
/// of them in a thorough run.
pub(crate) fn sample(count: usize, most: usize) -> Vec<usize> {
    if thorough() || count <= most {
        return (1..=count).collect();
    }
    let at = |index: usize| 1 + index * (count - 1) / (most - 1);
    (0..most).map(at).collect()
}

/// What became of a fault that was tried many times.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    group: &'static str,
    fault: String,
    /// How often it was tried.
    tries: usize,
    /// What came of it, and how often.
    outcomes: BTreeMap<&'static str, usize>,
    /// Flows that were made meanwhile and afterwards.
    flows: usize,
    /// Flows that were to be carried and were not.
    lost: usize,
    /// Flows that passed a service by which was to see them.
    uninspected: usize,
    #[serde(skip)]
    failures: Vec<String>,
}

impl Row {
    pub(crate) fn new(group: &'static str, fault: impl Into<String>) -> Self {
        Self {
            group,
            fault: fault.into(),
            tries: 0,
            outcomes: BTreeMap::new(),
            flows: 0,
            lost: 0,
            uninspected: 0,
            failures: Vec::new(),
        }
    }

    /// Another try begins.
    pub(crate) fn try_one(&mut self) {
        self.tries += 1;
    }

    pub(crate) fn came(&mut self, outcome: &'static str) {
        *self.outcomes.entry(outcome).or_default() += 1;
    }

    /// A flow was made, and is well.
    pub(crate) fn flow(&mut self) {
        self.flows += 1;
    }

    pub(crate) fn lost(&mut self, what: String) {
        self.lost += 1;
        self.failed(what);
    }

    pub(crate) fn uninspected(&mut self, what: String) {
        self.uninspected += 1;
        self.failed(what);
    }

    pub(crate) fn failed(&mut self, what: String) {
        self.failures.push(what);
    }

    /// Notes a failure unless a condition holds.
    pub(crate) fn check(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.failed(what());
        }
    }

    /// Prints the row, and panics if anything was not as it should be.
    #[track_caller]
    pub(crate) fn conclude(self) {
        println!("fault: {}", serde_json::to_string(&self).expect("a row of plain values"));
        let told = self.failures.iter().take(TOLD).map(|failure| format!("\n  {failure}"));
        let told: String = told.collect();
        assert!(
            self.failures.is_empty(),
            "{}: {} of {} tries: {told}",
            self.fault,
            self.failures.len(),
            self.tries
        );
        assert!(self.tries > 0, "{}: nothing was tried", self.fault);
    }
}

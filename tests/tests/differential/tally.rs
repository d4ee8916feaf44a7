//! How many cases had which outcome, as a table: every outcome has to occur.

use std::{collections::BTreeMap, fmt};

use carnet_core::object::Policy;

use crate::{
    case::Case,
    judge::{Fate, Judged, fate},
};

/// The columns: how a flow is opened.
const WAYS: [&str; 3] = ["TCP connect", "UDP connect", "UDP sendto"];
/// The rows: what becomes of it, and what it shows besides.
const OUTCOMES: [&str; 13] = [
    "passes, no filter decides",
    "passes, permitted",
    "passes with a record",
    "blocked by a filter",
    "refused, service missing",
    "refused as a loop",
    "redirected, first leg",
    "redirected, later leg",
    "redirected, record forgotten",
    "a service passed over",
    "a service of a record is removed",
    "IPv4-mapped destination",
    "IPv6 destination",
];

/// See the module.
#[derive(Default)]
pub(crate) struct Tally {
    cells: BTreeMap<(usize, usize), usize>,
    cases: usize,
    policies: usize,
    filters: usize,
    mismatches: usize,
}

impl Tally {
    pub(crate) fn policy(&mut self, policy: &Policy) {
        self.policies += 1;
        self.filters += policy.filters().len();
    }

    pub(crate) fn count(&mut self, policy: &Policy, case: &Case, judged: &Judged) {
        self.cases += 1;
        self.mismatches += usize::from(!judged.agrees());
        let way = match (case.call.protocol, case.call.unconnected) {
            (6, _) => 0,
            (_, false) => 1,
            (_, true) => 2,
        };
        let answer = &judged.expected.reference;
        let history = &judged.expected.history;
        let recorded = case.kept.is_some();
        let main = match fate(answer) {
            Fate::Passes if recorded => 2,
            Fate::Passes if answer.filter == 0 => 0,
            Fate::Passes => 1,
            Fate::Blocked => 3,
            Fate::ServiceUnavailable => 4,
            Fate::Loop => 5,
            Fate::Redirected(_) if recorded => 7,
            Fate::Redirected(_) if history.forgotten_legs > 0 => 8,
            Fate::Redirected(_) => 6,
        };
        let removed = |handle: &u64| policy.service_by_handle(*handle).is_none();
        let ip = case.call.to.ip();
        let besides = [
            (9, !answer.passed_over.is_empty()),
            (10, history.handles.iter().any(removed)),
            (11, ip.is_ipv6() && ip.to_canonical().is_ipv4()),
            (12, ip.to_canonical().is_ipv6()),
        ];
        let rows = std::iter::once(main).chain(besides.iter().filter(|b| b.1).map(|b| b.0));
        for row in rows {
            *self.cells.entry((row, way)).or_default() += 1;
        }
    }

    pub(crate) fn cases(&self) -> usize {
        self.cases
    }

    pub(crate) fn mismatches(&self) -> usize {
        self.mismatches
    }

    /// The outcomes that no case had.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let total = |row: usize| (0..WAYS.len()).map(|way| self.cell(row, way)).sum::<usize>();
        (0..OUTCOMES.len()).filter(|row| total(*row) == 0).map(|row| OUTCOMES[row]).collect()
    }

    fn cell(&self, row: usize, way: usize) -> usize {
        self.cells.get(&(row, way)).copied().unwrap_or(0)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:32}", "outcome")?;
        for way in WAYS {
            write!(f, " {way:>11}")?;
        }
        writeln!(f)?;
        for (row, outcome) in OUTCOMES.iter().enumerate() {
            write!(f, "{outcome:32}")?;
            for way in 0..WAYS.len() {
                write!(f, " {:11}", self.cell(row, way))?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "{} cases under {} policies of {} filters on average",
            self.cases,
            self.policies,
            self.filters / self.policies.max(1)
        )?;
        write!(f, "{} mismatches", self.mismatches)
    }
}

//! How many calls had which outcome, from a process to the test and on to the terminal.

use std::{collections::BTreeMap, fmt};

/// What a line with a tally begins with.
const MARK: &str = "tally ";

/// Calls by what was done, on which kind of socket, and their outcomes: 0, or an errno.
#[derive(Debug, Default)]
pub(crate) struct Tally(BTreeMap<(String, String), BTreeMap<i32, u64>>);

impl Tally {
    pub(crate) fn count(&mut self, call: &str, kind: &str, outcome: i32) {
        let key = (call.to_owned(), kind.to_owned());
        *self.0.entry(key).or_default().entry(outcome).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: Self) {
        for (key, outcomes) in other.0 {
            let own = self.0.entry(key).or_default();
            for (outcome, count) in outcomes {
                *own.entry(outcome).or_default() += count;
            }
        }
    }

    pub(crate) fn calls(&self) -> u64 {
        self.0.values().flat_map(BTreeMap::values).sum()
    }

    /// The tally as a line.
    pub(crate) fn to_line(&self) -> String {
        let rows: Vec<_> = self.0.iter().collect();
        format!("{MARK}{}", serde_json::to_string(&rows).expect("plain numbers and texts"))
    }

    /// The tally in a line, if it is one.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        let rows: Vec<_> = serde_json::from_str(line.strip_prefix(MARK)?).ok()?;
        Some(Self(rows.into_iter().collect()))
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:12} {:18} {:>9}  outcomes (0: success; else errno: times)",
            "", "", "calls"
        )?;
        for ((call, kind), outcomes) in &self.0 {
            let calls: u64 = outcomes.values().sum();
            let each: Vec<_> = outcomes.iter().map(|(o, count)| format!("{o}: {count}")).collect();
            writeln!(f, "{call:12} {kind:18} {calls:9}  {}", each.join(", "))?;
        }
        write!(f, "{} calls", self.calls())
    }
}

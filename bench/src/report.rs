//! What was measured, as tables for people and as JSON; kept in `bench/results`.

use std::fmt::{self, Write as _};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::about::{About, DIRECTORY};
use crate::services::{Between, THREADS};
use crate::site::Relay;
use crate::statistics::Spread;
use crate::{hooks, latency, services};

/// Everything that a run measured. Parts that were left out are null.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The circumstances.
    pub(crate) about: About,
    /// Nanoseconds of each hook.
    pub(crate) hooks: Option<Vec<hooks::Row>>,
    /// connect() and close().
    pub(crate) latency: Option<Vec<latency::Row>>,
    /// Whole connections through services.
    pub(crate) services: Option<Vec<services::Row>>,
}

impl Report {
    /// Keeps it in `bench/results/DATE-KERNEL` of the checkout that this program was built in; what
    /// was kept there before, is replaced. Gives the directory.
    ///
    /// # Errors
    /// When the checkout is gone or a file cannot be written.
    pub(crate) fn save(&self) -> Result<PathBuf> {
        let results = Path::new(DIRECTORY).join("results");
        let directory = results.join(format!("{}-{}", self.about.date, self.about.kernel));
        fs::create_dir_all(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        // The benchmark runs as root, the checkout is somebody's.
        let owner = fs::metadata(DIRECTORY).with_context(|| format!("examining {DIRECTORY}"))?;
        let hand_over = |path: &Path| {
            chown(path, Some(owner.uid()), Some(owner.gid()))
                .with_context(|| format!("handing {} over", path.display()))
        };
        let raw = serde_json::to_string_pretty(self)? + "\n";
        let summary = format!("# cargo xtask bench connect\n\n```text\n{self}```\n");
        for (name, text) in [("raw.json", raw), ("summary.md", summary)] {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            hand_over(&path)?;
        }
        hand_over(&results)?;
        hand_over(&directory)?;
        Ok(directory)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let About { date, kernel, processors, version, commit, toolchain, .. } = &self.about;
        let commit = commit.as_deref().unwrap_or("unknown");
        writeln!(f, "{date}, Linux {kernel}, {processors} processors")?;
        writeln!(f, "Carnet {version}, commit {commit}, {toolchain}")?;
        let About { repetitions, load_before, .. } = self.about;
        writeln!(
            f,
            "median (min to max) of {repetitions} repetitions; load before: {load_before}"
        )?;
        if let Some(rows) = &self.hooks {
            let connections = self.about.connections;
            writeln!(
                f,
                "\nHooks, ns per run by the kernel's statistics, {connections} connections"
            )?;
            write!(f, "{}", hooks_table(rows))?;
        }
        if let Some(rows) = &self.latency {
            let connections = self.about.connections;
            writeln!(f, "\nconnect() and close(), us, {connections} connections")?;
            write!(f, "{}", latency_table(rows))?;
        }
        if let Some(rows) = &self.services {
            let connections = self.about.exchanges;
            writeln!(
                f,
                "\nConnections per second, {THREADS} client threads, {connections} connections"
            )?;
            write!(f, "{}", rate_table(rows))?;
            writeln!(f, "\nProcessor time of one of these connections, us")?;
            write!(f, "{}", processor_table(rows))?;
            let connections = connections / THREADS;
            writeln!(
                f,
                "\nLatency of a connection, us, 1 client thread, {connections} connections"
            )?;
            write!(f, "{}", added_table(rows))?;
        }
        Ok(())
    }
}

fn hooks_table(rows: &[hooks::Row]) -> Table {
    let mut table = Table::new(["policy", "hook", "runs/connection", "ns"]);
    for row in rows {
        let runs = format!("{:.2}", row.runs_per_connection);
        table.add([row.policy.clone(), row.hook.clone(), runs, spread(row.spread(), 0)]);
    }
    table
}

fn latency_table(rows: &[latency::Row]) -> Table {
    let mut table = Table::new(["engine", "", "p50", "added"]);
    for (row, added) in compared(rows, latency::Row::added) {
        table.add([row.engine.into(), String::new(), spread(row.p50(), 2), spread(added, 2)]);
    }
    table
}

fn rate_table(rows: &[services::Row]) -> Table {
    let mut table = Table::new(["between", "per second", "/ none", "/ nftables"]);
    for (row, ratio) in compared(rows, services::Row::ratio) {
        let to_nftables = behind_nftables(rows, row).and_then(|other| row.ratio(other));
        let name = name(row.between);
        table.add([name, spread(row.rate(), 0), spread(ratio, 2), spread(to_nftables, 2)]);
    }
    table
}

fn processor_table(rows: &[services::Row]) -> Table {
    let mut table = Table::new(["between", "us", "/ none", "/ nftables"]);
    for (row, ratio) in compared(rows, services::Row::processor_ratio) {
        let to_nftables = behind_nftables(rows, row).and_then(|other| row.processor_ratio(other));
        let time = spread(row.processor(), 1);
        table.add([name(row.between), time, spread(ratio, 3), spread(to_nftables, 3)]);
    }
    table
}

/// The case of the same relay behind nftables.
fn behind_nftables<'a>(
    rows: &'a [services::Row],
    row: &services::Row,
) -> Option<&'a services::Row> {
    let (Between::Nftables(relay) | Between::Carnet(relay, _)) = row.between else {
        return None;
    };
    rows.iter().find(|other| other.between == Between::Nftables(relay))
}

fn added_table(rows: &[services::Row]) -> Table {
    let mut table = Table::new(["between", "p50", "p50 added", "p99 added"]);
    for (row, p50) in compared(rows, |row, other| row.added(other, |measured| measured.p50)) {
        let p99 = rows.first().and_then(|other| row.added(other, |measured| measured.p99));
        let taken = row.latency(|measured| measured.p50);
        table.add([name(row.between), spread(taken, 0), spread(p50, 0), spread(p99, 0)]);
    }
    table
}

/// Rows, each with how it compares with the first one.
fn compared<T>(
    rows: &[T],
    compare: impl Fn(&T, &T) -> Option<Spread>,
) -> impl Iterator<Item = (&T, Option<Spread>)> {
    rows.iter().map(move |row| (row, rows.first().and_then(|first| compare(row, first))))
}

fn name(between: Between) -> String {
    match between {
        Between::Nothing => "nothing".into(),
        Between::Nftables(relay) => format!("nftables, {}", relay_name(relay)),
        Between::Carnet(relay, 1) => format!("Carnet, {}", relay_name(relay)),
        Between::Carnet(relay, services) => format!("Carnet, {services} x {}", relay_name(relay)),
    }
}

fn relay_name(relay: Relay) -> &'static str {
    match relay {
        Relay::Inspect => "carnet-inspect",
        Relay::Bare => "bare relay",
    }
}

fn spread(spread: Option<Spread>, decimals: usize) -> String {
    match spread {
        Some(Spread { median, min, max }) => {
            format!("{median:.decimals$} ({min:.decimals$}-{max:.decimals$})")
        }
        None => "-".into(),
    }
}

/// A table of text: the first column to the left, the others to the right.
struct Table(Vec<[String; 4]>);

impl Table {
    fn new(head: [&str; 4]) -> Self {
        Self(vec![head.map(str::to_owned)])
    }

    fn add(&mut self, row: [String; 4]) {
        self.0.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let cells = self.0.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        for row in &self.0 {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = width(column);
                match column {
                    0 => write!(line, "{cell:<width$}")?,
                    _ => write!(line, "  {cell:>width$}")?,
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

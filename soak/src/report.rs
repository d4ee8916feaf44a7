//! What was measured, as tables; kept in `soak/results`.

use std::fmt;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::crowd::{Crowds, Round};
use crate::crowd_site::Level;
use crate::memory::Bytes;
use crate::sample::Sample;
use crate::soak::{MARGIN, Soak, trend};

/// The directory of this package when it was built.
const DIRECTORY: &str = env!("CARGO_MANIFEST_DIR");

/// Everything that a run has shown. Parts that were left out are `None`.
#[derive(Debug)]
pub(crate) struct Report {
    /// What chance began with.
    pub(crate) seed: u64,
    /// Very many connections at once.
    pub(crate) crowds: Option<Vec<Crowds>>,
    /// The long run.
    pub(crate) soak: Option<Soak>,
}

impl Report {
    /// How much is wrong.
    pub(crate) fn violations(&self) -> usize {
        let crowds = self.crowds.iter().flatten().map(|crowds| crowds.violations.len());
        crowds.chain(self.soak.iter().map(|soak| soak.violations.len())).sum()
    }

    /// Keeps it in `soak/results/DATE-KERNEL.md` of the checkout that this program was built in; where
    /// one part alone was run, that part is in the name, too. Gives the file.
    ///
    /// # Errors
    /// When the checkout is gone or the file cannot be written.
    pub(crate) fn save(&self) -> Result<PathBuf> {
        let results = Path::new(DIRECTORY).join("results");
        fs::create_dir_all(&results).with_context(|| format!("making {}", results.display()))?;
        let part = match (&self.crowds, &self.soak) {
            (Some(_), None) => "-crowd",
            (None, Some(_)) => "-churn",
            _ => "",
        };
        let date = said("date", &["-u", "+%F"])?;
        let path = results.join(format!("{date}-{}{part}.md", kernel()?));
        let text = format!("# cargo xtask soak\n\n```text\n{self}```\n");
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        // It runs as root, the checkout is somebody's.
        let owner = fs::metadata(DIRECTORY).with_context(|| format!("examining {DIRECTORY}"))?;
        for path in [&results, &path] {
            chown(path, Some(owner.uid()), Some(owner.gid()))
                .with_context(|| format!("handing {} over", path.display()))?;
        }
        Ok(path)
    }
}

fn kernel() -> Result<String> {
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the release")?;
    Ok(release.trim().to_owned())
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("starting {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn commit() -> String {
    // As root, in a checkout that is somebody else's: git would refuse.
    let git = ["-c", "safe.directory=*", "-C", DIRECTORY, "rev-parse", "--short=12", "HEAD"];
    said("git", &git).unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        let kernel = kernel().unwrap_or_default();
        writeln!(
            f,
            "Linux {kernel}, {processors} processors, Carnet {}, commit {}, seed {}",
            env!("CARGO_PKG_VERSION"),
            commit(),
            self.seed
        )?;
        for crowds in self.crowds.iter().flatten() {
            writeln!(f, "\n{crowds}")?;
        }
        if let Some(soak) = &self.soak {
            writeln!(f, "\n{soak}")?;
        }
        let violations = self.violations();
        writeln!(f, "\n{}", if violations == 0 { "all in order" } else { "NOT in order" })
    }
}

/// Bytes for people.
fn bytes(bytes: Bytes) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
    }
}

/// A line of a table.
fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display) -> fmt::Result {
    writeln!(f, "  {name:<48} {value}")
}

fn violations(f: &mut fmt::Formatter<'_>, violations: &[String]) -> fmt::Result {
    violations.iter().try_for_each(|violation| write!(f, "\n  VIOLATION: {violation}"))
}

impl Crowds {
    /// Something of each crowd.
    fn each<T: fmt::Display>(&self, value: impl Fn(&Round) -> T) -> String {
        let values: Vec<_> = self.rounds.iter().map(|round| value(round).to_string()).collect();
        values.join("; ")
    }

    /// Two lines: what there was at first and after each crowd, and with all connections of each.
    fn levels(
        &self,
        f: &mut fmt::Formatter<'_>,
        what: &str,
        value: impl Fn(&Level) -> String,
    ) -> fmt::Result {
        let after = self.each(|round| value(&round.after));
        row(f, what, &format!("{} at first, then {after}", value(&self.before)))?;
        row(f, "  with all connections", &self.each(|round| value(&round.with)))
    }

    /// What a connection takes while it is there, in bytes; of the first crowd, which finds no caches.
    fn taken(&self, value: impl Fn(&Level) -> Bytes) -> Bytes {
        let with = self.rounds.first().map_or(0, |round| value(&round.with));
        with.saturating_sub(value(&self.before)) / u64::from(self.connections)
    }
}

impl fmt::Display for Crowds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { services, lanes, connections, rounds, .. } = self;
        let times = rounds.len();
        writeln!(
            f,
            "{connections} connections at once, {times} times, each through {services} carnet-inspect, in \
             {lanes} lanes"
        )?;
        let rate = |round: &Round| f64::from(*connections) / round.opening;
        let opening = self.each(|round| format!("{:.1} s, {:.0}/s", round.opening, rate(round)));
        row(f, "all there, each has echoed", &opening)?;
        let checking = self.each(|round| format!("{:.1} s", round.checking));
        row(f, "each has echoed again", &checking)?;
        let [human, json, status] = self.listing;
        row(f, "carnet flows; --json", &format!("{human:.2} s; {json:.2} s"))?;
        row(f, "carnet status", &format!("{status:.2} s"))?;
        if let Some(kept) = self.kept() {
            let kernel = |level: &Level| level.kernel.unwrap_or_default();
            let name = "kernel memory, both ends and sockets included";
            self.levels(f, name, |level| bytes(kernel(level)))?;
            row(f, "  for each connection", &bytes(self.taken(kernel)))?;
            row(f, "  left by each connection of the later crowds", &format!("{kept:.1} B"))?;
        } else {
            row(f, "kernel memory", &"NOT CHECKED: the kernel accounts none to cgroups here")?;
        }
        let resident = |level: &Level| level.resident;
        self.levels(f, "resident memory of the services", |level| bytes(resident(level)))?;
        let each = self.taken(resident) / *services as u64;
        row(f, "  for each connection and service", &bytes(each))?;
        self.levels(f, "descriptors of the services", |level| level.descriptors.to_string())?;
        self.levels(f, "sockets", |level| level.sockets.to_string())?;
        write!(f, "  {:<48} {}", "fullest map", self.fullest)?;
        violations(f, &self.violations)
    }
}

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minutes = self.lasted.as_secs_f64() / 60.0;
        writeln!(f, "{minutes:.1} minutes under load, with churn; figures with the warm-up's")?;
        let done = &self.done;
        let rate = self.flows as f64 / self.lasted.as_secs_f64();
        row(f, "flows", &format!("{}, {rate:.0}/s", done.flows()))?;
        row(f, "  short connections", &done.short)?;
        row(f, "  long connections", &done.long)?;
        row(f, "  broken off by the client", &done.aborted)?;
        row(f, "  UDP flows", &done.datagrams)?;
        row(f, "  refused by policy, or lost with a killed service", &done.excused)?;
        let seen = &self.seen;
        let arrived = format!("{} connections, {} datagrams", seen.connections, seen.datagrams);
        row(f, "arrived at the destination", &arrived)?;
        row(f, "  ended before they said anything", &seen.silent)?;
        row(f, "lost", &done.lost)?;
        row(f, "uninspected", &seen.uninspected)?;
        row(f, "twice through a service", &seen.twice)?;
        row(f, "through a service unasked", &seen.unasked)?;
        row(f, "not refused", &done.unrefused)?;
        for (class, count) in &done.losses {
            row(f, &format!("  lost: {class}"), count)?;
        }
        for (what, times) in &self.happened {
            let longest = times.longest.as_secs_f64();
            row(f, what, &format!("{}, longest {longest:.1} s", times.count))?;
        }
        if !self.rotates {
            row(f, "carnet rotate-key", &"not in this build")?;
        }
        account(f, &self.end)?;
        if let (Some(start), Some(end)) = (self.start.kernel, self.end.kernel) {
            let peak = self.samples.iter().filter_map(|sample| sample.kernel).max();
            let peak = peak.map_or_else(|| "?".to_owned(), bytes);
            let all = format!("{} -> {}, peak {peak}", bytes(start), bytes(end));
            row(f, &format!("kernel memory at rest (margin {})", bytes(MARGIN)), &all)?;
        } else {
            row(f, "kernel memory", &"NOT CHECKED: the kernel accounts none to cgroups here")?;
        }
        if let Some((early, late)) = trend(&self.samples) {
            let medians = format!("{} -> {}", bytes(early), bytes(late));
            row(f, "  under load, medians of 2nd and last quarter", &medians)?;
        }
        for (name, before) in &self.start.maps {
            let Some(after) = self.end.maps.get(name) else { continue };
            let seen = self.samples.iter().filter_map(|sample| sample.maps.get(name));
            let peak = seen.map(|map| map.used).max().unwrap_or_default();
            let cache = if before.oldest_give_way { ", the oldest give way" } else { "" };
            let all = format!("{} -> {}, peak {peak}{cache}", before.used, after.used);
            row(f, &format!("map {name} of {}", before.capacity), &all)?;
        }
        for (name, before) in &self.start.descriptors {
            let after = self.end.descriptors.get(name).copied().unwrap_or_default();
            let seen = self.samples.iter().filter_map(|sample| sample.descriptors.get(name));
            let peak = seen.max().copied().unwrap_or_default();
            row(
                f,
                &format!("descriptors of {name}"),
                &format!("{before} -> {after}, peak {peak}"),
            )?;
        }
        let (start, end) = (self.start.sockets, self.end.sockets);
        let sockets = format!("{} -> {}, {} -> {}", start.tcp, end.tcp, start.udp, end.udp);
        write!(f, "  {:<48} {sockets}", "sockets: TCP, UDP")?;
        violations(f, &self.violations)
    }
}

/// The sums.
fn account(f: &mut fmt::Formatter<'_>, sample: &Sample) -> fmt::Result {
    let (tcp, udp, refused) = (sample.account.tcp, sample.account.udp, sample.account.refused);
    let sums = format!(
        "{} = {} delivered + {} handover failed + {} unsent + {} unanswered + {} under way",
        tcp.redirected,
        tcp.delivered,
        tcp.handover_failed,
        tcp.unsent,
        tcp.unanswered,
        tcp.starting + tcp.connecting
    );
    row(f, "redirected, TCP", &sums)?;
    let sums = format!("{} = {} ended + {} live", udp.redirected, udp.ended, udp.live);
    row(f, "redirected, UDP", &sums)?;
    let sums = format!(
        "{} = {} by a filter + {} without service + {} loops + {} without memory + {} in use \
         + {} bound to a device",
        refused.refused,
        refused.by_filter,
        refused.service_unavailable,
        refused.loops_ended,
        refused.out_of_memory,
        refused.address_in_use,
        refused.bound_to_device
    );
    row(f, "refused", &sums)
}

//! The long run: full load, while services and policy change; then rest, and nothing may be left.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use carnet_testbed::{Process, interrupt};

use crate::Options;
use crate::board::SERVICES;
use crate::churn::{Churn, Happened};
use crate::client::{Arguments, Done};
use crate::memory::{Bytes, MemoryGroup};
use crate::sample::{Sample, descriptors};
use crate::server::Seen;
use crate::site::{Site, destinations, last_line};

/// How long the load lasts after which the start is measured, at most.
const WARM_UP: Duration = Duration::from_secs(20);
/// How often a sample is taken under load.
const SAMPLING: Duration = Duration::from_secs(5);
/// How long clients may take to finish what they are doing.
const FINISHING: Duration = Duration::from_secs(150);
/// How long a process may take to close what belonged to flows that have ended.
const CLOSING: Duration = Duration::from_secs(20);
/// What kernel memory may differ by between two rests. The caches that the kernel keeps for each
/// processor (of map entries, of sockets) fill up to some hundred objects each.
pub(crate) const MARGIN: Bytes = 6 << 20;

/// What a long run has shown.
#[derive(Debug)]
pub(crate) struct Soak {
    /// How long it was under load.
    pub(crate) lasted: Duration,
    /// What the clients did then and in the warm-up.
    pub(crate) done: Done,
    /// What the clients did under load.
    pub(crate) flows: u64,
    /// What the server saw.
    pub(crate) seen: Seen,
    /// What happened.
    pub(crate) happened: Happened,
    /// Whether this build can rotate keys.
    pub(crate) rotates: bool,
    /// At rest, after the warm-up.
    pub(crate) start: Sample,
    /// At rest, after all.
    pub(crate) end: Sample,
    /// Under load.
    pub(crate) samples: Vec<Sample>,
    /// What is wrong.
    pub(crate) violations: Vec<String>,
}

/// Runs it.
///
/// # Errors
/// When it cannot be carried out. What it finds is in the result.
pub(crate) fn run(options: &Options, memory: Option<&MemoryGroup>) -> Result<Soak> {
    let seed = options.seed.unwrap_or_default();
    let load = Duration::from_secs_f64(options.minutes * 60.0);
    let mut site = Site::new(options.forget_mark)?;
    let mut churn = Churn::new(seed, &site);
    let mut course = Course {
        site: &mut site,
        churn: &mut churn,
        memory,
        samples: Vec::new(),
        violations: Vec::new(),
    };

    eprintln!("    warming up");
    let before = course.under_load(WARM_UP.min(load / 4), seed ^ 1)?;
    let start = course.rest()?;
    course.samples.clear();
    eprintln!("    {:.1} minutes under load", options.minutes);
    let begun = Instant::now();
    let during = course.under_load(load, seed)?;
    let lasted = begun.elapsed();
    eprintln!("    coming to rest");
    course.closed(&start)?;
    let end = course.rest()?;
    let Course { samples, mut violations, .. } = course;

    let seen = site.seen()?;
    violations.extend(judge(&start, &end, &samples)?);
    let done = before.and(&during);
    for (count, what) in [
        (seen.uninspected, "flows arrived uninspected"),
        (seen.twice, "flows passed a service twice"),
        (seen.unasked, "flows passed a service that was not for them"),
        (done.lost, "flows were lost"),
        (done.unrefused, "flows arrived that had to be refused"),
    ] {
        if count > 0 {
            violations.push(format!("{count} {what}"));
        }
    }
    for (count, kind) in [
        (during.short, "short connection"),
        (during.long, "long connection"),
        (during.aborted, "connection that is broken off"),
        (during.datagrams, "UDP flow"),
    ] {
        if count == 0 {
            violations.push(format!("no {kind} came to its end: the load was none"));
        }
    }
    violations.extend(seen.faults.iter().chain(&done.faults).cloned());
    let happened = churn.happened();
    let rotates = churn.rotates();
    site.end()?;
    let flows = during.flows();
    Ok(Soak { lasted, done, flows, seen, happened, rotates, start, end, samples, violations })
}

/// What goes on with a site.
struct Course<'a> {
    site: &'a mut Site,
    churn: &'a mut Churn,
    memory: Option<&'a MemoryGroup>,
    samples: Vec<Sample>,
    violations: Vec<String>,
}

impl Course<'_> {
    /// Has clients make flows while things happen; then lets them finish.
    fn under_load(&mut self, load: Duration, seed: u64) -> Result<Done> {
        let board = self.site.board.path().to_owned();
        let words = Arguments::new(destinations(), board, seed & 0xffff_ffff).words();
        let mut clients = self.site.start_clients(&words)?;
        let end = Instant::now() + load;
        let mut sampled = Instant::now();
        while Instant::now() < end {
            interrupt::check()?;
            if self.churn.pause_before_next(|| is_alive(&clients)).is_none() {
                bail!("the clients have ended: {:?}", clients.lines().last());
            }
            self.churn.step(self.site)?;
            if sampled.elapsed() > SAMPLING {
                sampled = Instant::now();
                self.samples.push(Sample::take(self.site, self.memory)?);
            }
        }
        clients.close_input();
        let status = clients.wait(FINISHING)?;
        if !status.success() {
            bail!("the clients ended with {status}");
        }
        last_line(&clients).context("the clients have told nothing")
    }

    /// Checks that the services have closed all that belonged to flows: then they have as much open as
    /// those at the start, to which none had come.
    fn closed(&mut self, start: &Sample) -> Result<()> {
        let deadline = Instant::now() + CLOSING;
        for (name, worker) in SERVICES.iter().zip(&self.site.workers) {
            let worker = worker.as_ref().context("a service has no process")?;
            let before = start.descriptors.get(*name).copied().unwrap_or_default();
            loop {
                let now = descriptors(worker.id())?;
                if now == before {
                    break;
                }
                if Instant::now() > deadline {
                    let violation = format!("{name} has {now} descriptors open, not {before}");
                    self.violations.push(violation);
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// Waits until nothing is under way, puts all services into the policy anew, each with one new
    /// process, and looks at what is left.
    fn rest(&mut self) -> Result<Sample> {
        self.violations.extend(self.site.settle()?);
        for (place, name) in SERVICES.iter().enumerate() {
            self.site.remove_filter(place)?;
            self.site.kill(place)?;
            self.site.carnet.call(&["service", "rm", name])?;
            self.site.add_service(place)?;
            self.site.start(place)?;
            self.site.add_filter(place)?;
        }
        let mut sample = Sample::take(self.site, self.memory)?;
        sample.kernel = self.memory.map(MemoryGroup::at_rest).transpose()?;
        sample.sockets = Sample::take(self.site, None)?.sockets;
        Ok(sample)
    }
}

fn is_alive(process: &Process) -> bool {
    descriptors(process.id()).is_ok_and(|count| count > 0)
}

/// What is wrong with what is left.
fn judge(start: &Sample, end: &Sample, samples: &[Sample]) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for (what, difference) in [
        ("redirected TCP connections", end.account.tcp.difference()),
        ("redirected UDP flows", end.account.udp.difference()),
        ("refusals", end.account.refused.difference()),
    ] {
        if difference != 0 {
            violations.push(format!("{difference} {what} are not accounted for"));
        }
    }
    for (name, before) in &start.maps {
        let after = end.maps.get(name).context("a map is missing")?;
        if !before.oldest_give_way && before.used != after.used {
            let (before, after) = (before.used, after.used);
            violations.push(format!("the map {name} has {after} entries, not {before} as before"));
        }
        if before.oldest_give_way && before.bytes != after.bytes {
            violations.push(format!("the map {name} takes other memory than before"));
        }
    }
    if start.descriptors != end.descriptors {
        let (before, after) = (&start.descriptors, &end.descriptors);
        violations
            .push(format!("other descriptors are open than before: {after:?}, not {before:?}"));
    }
    if start.sockets != end.sockets {
        let (before, after) = (&start.sockets, &end.sockets);
        violations.push(format!("there are other sockets than before: {after:?}, not {before:?}"));
    }
    if let (Some(before), Some(after)) = (start.kernel, end.kernel)
        && after > before + MARGIN
    {
        violations.push(format!("kernel memory has grown from {before} to {after} bytes"));
    }
    if let Some((early, late)) = trend(samples)
        && late > early + early / 4 + MARGIN
    {
        violations.push(format!("kernel memory under load has grown from {early} to {late} bytes"));
    }
    Ok(violations)
}

/// Kernel memory under load, early and late: the medians of the second and of the last quarter of the
/// samples. `None` if there are too few to tell.
pub(crate) fn trend(samples: &[Sample]) -> Option<(Bytes, Bytes)> {
    let quarter = samples.len() / 4;
    let median = |samples: &[Sample]| {
        let mut readings: Vec<_> = samples.iter().filter_map(|sample| sample.kernel).collect();
        readings.sort_unstable();
        readings.get(readings.len() / 2).copied()
    };
    if quarter < 5 {
        return None;
    }
    Some((median(&samples[quarter..2 * quarter])?, median(&samples[samples.len() - quarter..])?))
}

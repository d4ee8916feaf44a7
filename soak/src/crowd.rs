//! Very many connections at once, through one carnet-inspect and through a chain of two; and again, in
//! the same processes and the same instance.
//!
//! What the first crowd leaves behind says little: the kernel keeps caches, and tables that have grown
//! for the many stay as large as they are while their processes live. Another crowd finds all that. So
//! what is left after the last crowd is compared with what was left after the first: a leak grows with
//! each of them. What grew by chance is less after another one, so there are more if it has grown.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use carnet_testbed::{Process, interrupt};
use rustix::process::{Resource, getrlimit};

use crate::Options;
use crate::crowd_site::{LIMIT, Level, Site};
use crate::memory::{Bytes, MemoryGroup};

/// How many crowds there are, one after the other.
const ROUNDS: usize = 3;
/// How many there are if kernel memory has grown since the first of them.
const MOST_ROUNDS: usize = 8;
/// What kernel memory may differ by after the first crowd and after the last. Without a leak it goes up
/// and down by some megabytes: caches for each processor, page tables of the services.
const MARGIN: Bytes = 6 << 20;
/// Memory that is to stay free, and what a connection may take with one service and with two: what is
/// not there is not tried.
const SPARE: Bytes = 2 << 30;
const NEEDED: [Bytes; 2] = [100 << 10, 150 << 10];

/// What crowds have shown.
#[derive(Debug)]
pub(crate) struct Crowds {
    /// How many services each connection passed.
    pub(crate) services: usize,
    /// How many lanes there were.
    pub(crate) lanes: u32,
    /// How many connections there were at once.
    pub(crate) connections: u32,
    /// What there was at first.
    pub(crate) before: Level,
    /// One after the other.
    pub(crate) rounds: Vec<Round>,
    /// Seconds of `carnet flows`, of `carnet --json flows` and of `carnet status`, with the first crowd.
    pub(crate) listing: [f64; 3],
    /// Most entries of any map that they fill, and what it holds.
    pub(crate) fullest: String,
    /// What is wrong.
    pub(crate) violations: Vec<String>,
}

/// What one crowd has shown.
#[derive(Debug)]
pub(crate) struct Round {
    /// Seconds until all were there.
    pub(crate) opening: f64,
    /// Seconds until all had echoed once more.
    pub(crate) checking: f64,
    /// What there was with all of them.
    pub(crate) with: Level,
    /// What there was when all were closed.
    pub(crate) after: Level,
}

impl Crowds {
    /// Kernel memory after the first crowd and after the last.
    fn first_and_last(&self) -> Option<(Bytes, Bytes)> {
        let after = |round: Option<&Round>| round?.after.kernel;
        Some((after(self.rounds.first())?, after(self.rounds.last())?))
    }

    /// Whether kernel memory after the last crowd is above that after the first by more than it differs anyway.
    fn have_grown(&self) -> bool {
        self.first_and_last().is_some_and(|(first, last)| last > first + MARGIN)
    }

    /// Whether one more crowd is due.
    fn go_on(&self) -> bool {
        let so_far = self.rounds.len();
        so_far < ROUNDS || so_far < MOST_ROUNDS && self.have_grown()
    }

    /// How much kernel memory each connection of the later crowds has left behind.
    pub(crate) fn kept(&self) -> Option<f64> {
        let (first, last) = self.first_and_last()?;
        let later = u64::from(self.connections) * (self.rounds.len() as u64).saturating_sub(1);
        (later > 0).then(|| last.saturating_sub(first) as f64 / later as f64)
    }

    /// What is wrong with what is left.
    fn judge(&self) -> Vec<String> {
        let mut violations = Vec::new();
        for (number, Round { after, .. }) in (1..).zip(&self.rounds) {
            if (self.before.descriptors, self.before.sockets) != (after.descriptors, after.sockets)
            {
                violations.push(format!(
                    "not all descriptors and sockets are closed after crowd {number}"
                ));
            }
        }
        if self.have_grown()
            && let Some((first, last)) = self.first_and_last()
        {
            violations.push(format!(
                "kernel memory has grown from {first} bytes after the first crowd to {last} after \
                 the last, of {}",
                self.rounds.len()
            ));
        }
        violations
    }
}

/// Runs them.
///
/// # Errors
/// When one cannot be carried out. What they find is in the result.
pub(crate) fn run(options: &Options, memory: Option<&MemoryGroup>) -> Result<Vec<Crowds>> {
    let mut all = Vec::new();
    for (services, needed) in (1..).zip(NEEDED) {
        let wanted = needed * u64::from(options.connections) + SPARE;
        let available = available()?;
        if available < wanted {
            eprintln!(
                "    no crowd through {services}: {available} bytes of memory are free, {wanted} are \
                 wanted"
            );
            continue;
        }
        eprintln!("    {} connections through {services}", options.connections);
        let lanes = options.connections.div_ceil(lane());
        let crowds = crowds(Site::new(services, lanes)?, options.connections, memory)?;
        eprintln!("{crowds}");
        all.push(crowds);
        interrupt::check()?;
    }
    if all.is_empty() {
        bail!("there is too little memory for {} connections", options.connections);
    }
    Ok(all)
}

fn available() -> Result<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")).context("MemAvailable")?;
    Ok(kilobytes.trim().parse::<u64>()? * 1024)
}

/// How many connections there can be in a lane: services have two descriptors for each, and some more.
fn lane() -> u32 {
    let maximum = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    u32::try_from(maximum.saturating_sub(1000) / 2).unwrap_or(u32::MAX).max(1)
}

fn crowds(site: Site, connections: u32, memory: Option<&MemoryGroup>) -> Result<Crowds> {
    let mut crowds = Crowds {
        services: site.services(),
        lanes: site.lanes(),
        connections,
        before: site.level(memory)?,
        rounds: Vec::new(),
        listing: [0.0; 3],
        fullest: String::new(),
        violations: Vec::new(),
    };
    while crowds.go_on() {
        let round = round(&site, &mut crowds, memory)?;
        crowds.rounds.push(round);
    }
    let left = crowds.judge();
    crowds.violations.extend(left);
    site.end()?;
    Ok(crowds)
}

/// Has the command tell of a crowd that is there, which takes long.
fn list(site: &Site, crowds: &mut Crowds) -> Result<()> {
    let timed = |arguments: &[&str]| -> Result<f64> {
        let begun = Instant::now();
        site.carnet.call(arguments)?;
        Ok(begun.elapsed().as_secs_f64())
    };
    crowds.listing = [timed(&["flows"])?, timed(&["--json", "flows"])?, timed(&["status"])?];
    let listed = site.carnet.json(&["flows"])?;
    let listed = listed.as_array().map_or(0, Vec::len);
    if listed != crowds.connections as usize {
        let all = crowds.connections;
        crowds.violations.push(format!("carnet flows lists {listed} flows of {all}"));
    }
    crowds.fullest = site.fullest_map()?;
    Ok(())
}

/// One crowd; what is wrong meanwhile goes to `crowds`.
fn round(site: &Site, crowds: &mut Crowds, memory: Option<&MemoryGroup>) -> Result<Round> {
    let mut clients = site.start_clients(crowds.connections)?;
    let opening = seconds(&clients, "open")?;

    let with = site.level(memory)?;
    if crowds.rounds.is_empty() {
        list(site, crowds)?;
    }
    for client in &mut clients {
        client.write_line("check")?;
    }
    let checking = seconds(&clients, "checked")?;
    for client in &mut clients {
        client.close_input();
    }
    for client in &mut clients {
        let status = client.wait(LIMIT)?;
        if !status.success() {
            crowds.violations.push(format!("a client ended with {status}"));
        }
    }
    let after = site.rest(&crowds.before, memory)?;
    let account = site.engine.account()?;
    let so_far = crowds.rounds.len() as u64 + 1;
    let legs = u64::from(crowds.connections) * crowds.services as u64 * so_far;
    if account.tcp.difference() != 0 || account.tcp.delivered != legs {
        crowds.violations.push(format!("{legs} legs were to be delivered: {account:?}"));
    }
    Ok(Round { opening, checking, with, after })
}

/// The seconds that the slowest client says it took for what it did.
fn seconds(clients: &[Process], what: &str) -> Result<f64> {
    let mut most = 0_f64;
    for client in clients {
        let line = client.wait_for_line(what, LIMIT, |line| line.starts_with(what))?;
        let seconds: f64 = line.split(' ').nth(1).context("no seconds")?.parse()?;
        most = most.max(seconds);
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Crowds of 1000 after each of which so much kernel memory is left.
    fn crowds(kernel: &[Bytes], sockets: u64) -> Crowds {
        let level = |kernel| Level { kernel: Some(kernel), sockets: 10, ..Level::default() };
        let round = |kernel| Round {
            opening: 1.0,
            checking: 1.0,
            with: level(10 * kernel),
            after: Level { sockets, ..level(kernel) },
        };
        Crowds {
            services: 1,
            lanes: 1,
            connections: 1000,
            before: level(1 << 20),
            rounds: kernel.iter().map(|kernel| round(*kernel)).collect(),
            listing: [1.0; 3],
            fullest: String::new(),
            violations: Vec::new(),
        }
    }

    #[test]
    fn what_the_first_crowd_leaves_is_no_leak_and_what_each_leaves_is() {
        let caches = crowds(&[50 << 20, 51 << 20, 50 << 20], 10);
        assert_eq!((caches.judge(), caches.kept()), (vec![], Some(0.0)));
        assert!(!caches.go_on());

        let leak = crowds(&[50 << 20, 60 << 20, 70 << 20], 10);
        assert!(leak.judge().iter().any(|what| what.contains("has grown")), "{leak:?}");
        assert!(leak.kept() > Some(10_000.0));
        assert!(leak.go_on());

        // As it was once, while the machine had other things to do as well.
        let chance = crowds(&[48 << 20, 55 << 20, 63 << 20, 48 << 20], 10);
        assert_eq!((chance.judge(), chance.go_on()), (vec![], false));
        let endless: Vec<_> =
            (5..5 + MOST_ROUNDS as Bytes).map(|number| number * (10 << 20)).collect();
        assert!(!crowds(&endless, 10).go_on());
        assert!(crowds(&[50 << 20, 51 << 20], 10).go_on());

        let open = crowds(&[50 << 20, 50 << 20], 11);
        assert!(open.judge().iter().any(|what| what.contains("after crowd 2")), "{open:?}");
    }
}

//! The benchmark `connect`.

use std::num::NonZeroU32;

use anyhow::{Result, bail};
use carnet_testbed::{interrupt, require_root};

use crate::about::About;
use crate::report::Report;
use crate::site::Relay;
use crate::{firewall, hooks, latency, services};

/// What to measure, and how much of it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each measurement is repeated; all cases take turns
    #[arg(long, value_name = "NUMBER", default_value = "5")]
    rounds: NonZeroU32,

    /// Connections of each repetition in the parts hooks and latency; half as many in services
    #[arg(long, value_name = "NUMBER", default_value = "20000")]
    connections: NonZeroU32,

    /// The longest chain of services
    #[arg(long, value_name = "NUMBER", default_value = "5", value_parser = clap::value_parser!(u32).range(1..=16))]
    services: u32,

    /// Measure only this part (repeatable)
    #[arg(long, value_enum, value_name = "PART")]
    part: Vec<Part>,

    /// In the part services measure only with this relay (repeatable)
    #[arg(long, value_enum, value_name = "RELAY")]
    relay: Vec<Relay>,

    /// See in seconds whether everything works; the figures mean little
    #[arg(long, conflicts_with_all = ["rounds", "connections", "services", "save"])]
    quick: bool,

    /// Leave the comparison with nftables out
    #[arg(long)]
    no_nftables: bool,

    /// Print everything that was measured as JSON instead of the tables
    #[arg(long)]
    json: bool,

    /// Keep the results in bench/results
    #[arg(long)]
    save: bool,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Nanoseconds of each hook
    Hooks,
    /// What connect() and close() take
    Latency,
    /// Connections through chains of services
    Services,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Repetitions.
    pub(crate) rounds: u32,
    /// Connections of each repetition.
    pub(crate) connections: u32,
    /// Connections of each repetition, where each has a request and a response.
    pub(crate) exchanges: u32,
    /// The longest chain.
    pub(crate) services: u32,
    /// Whether nftables is compared with.
    pub(crate) nftables: bool,
    /// The relays that are measured.
    pub(crate) relays: Vec<Relay>,
}

/// Runs it and prints, or keeps, what was measured.
///
/// # Errors
/// When root or nftables are missing, something cannot be set up, a connection fails, or what was
/// counted does not agree with what was done.
pub(crate) fn run(options: &Options) -> Result<()> {
    let plan = options.plan();
    let wanted = |part| options.part.is_empty() || options.part.contains(&part);
    if options.save && !(options.part.is_empty() && options.relay.is_empty()) {
        bail!("--save keeps complete results only: leave --part and --relay out");
    }
    require_root()?;
    if plan.nftables && wanted(Part::Services) {
        firewall::require()?;
    }
    interrupt::prepare()?;
    let report = Report {
        about: About::now(&plan)?,
        hooks: wanted(Part::Hooks).then(|| hooks::measure(&plan)).transpose()?,
        latency: wanted(Part::Latency).then(|| latency::measure(&plan)).transpose()?,
        services: wanted(Part::Services).then(|| services::measure(&plan)).transpose()?,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    if options.save {
        eprintln!("kept in {}", report.save()?.display());
    }
    Ok(())
}

impl Options {
    fn plan(&self) -> Plan {
        let (rounds, connections, services) = if self.quick {
            (2, 400, 2)
        } else {
            (self.rounds.get(), self.connections.get(), self.services)
        };
        let exchanges = connections.div_ceil(2).max(services::THREADS);
        let wanted = |relay: &Relay| self.relay.is_empty() || self.relay.contains(relay);
        let relays = [Relay::Bare, Relay::Inspect].into_iter().filter(wanted).collect();
        Plan { rounds, connections, exchanges, services, nftables: !self.no_nftables, relays }
    }
}

impl Plan {
    /// How many connections each case makes before anything is measured.
    pub(crate) fn warm_up(&self) -> u32 {
        self.connections.div_ceil(20)
    }

    /// All repetitions, each said on the standard error when it begins.
    pub(crate) fn repetitions(&self, part: &'static str) -> impl Iterator<Item = Repetition> {
        let rounds = self.rounds;
        (1..=rounds).map(move |number| {
            eprintln!("{part}: repetition {number} of {rounds}");
            Repetition { number }
        })
    }
}

/// One repetition of a part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Repetition {
    number: u32,
}

impl Repetition {
    /// The cases with their numbers, in this repetition's order: every second one goes through
    /// them backwards, so that none is always measured after the same other one.
    pub(crate) fn order<T>(self, cases: &[T]) -> impl Iterator<Item = (usize, &T)> {
        let count = cases.len();
        let backwards = self.number.is_multiple_of(2);
        let place = move |step| if backwards { count - 1 - step } else { step };
        (0..count).map(place).filter_map(|number| Some((number, cases.get(number)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_alternate() {
        let cases = ["a", "b", "c"];
        let order = |number| -> Vec<_> { Repetition { number }.order(&cases).collect() };
        assert_eq!(order(1), [(0, &"a"), (1, &"b"), (2, &"c")]);
        assert_eq!(order(2), [(2, &"c"), (1, &"b"), (0, &"a")]);
    }
}

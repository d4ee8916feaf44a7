//! Whole connections, with a small request and response each, through a chain of services: how
//! many per second, and how long each takes. Compared with no proxy, and with the same relay
//! behind nftables.

use anyhow::{Result, bail};
use serde::Serialize;

use crate::client::{Exchange, Measured};
use crate::connect::Plan;
use crate::site::{Relay, Site};
use crate::statistics::Spread;

/// Threads of the client while connections per second are measured.
pub(crate) const THREADS: u32 = 4;

/// What lies between client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Between {
    /// Nothing.
    Nothing,
    /// A relay to which nftables redirects.
    Nftables(Relay),
    /// So many relays in a chain, to which Carnet redirects.
    Carnet(Relay, u32),
}

/// What was measured in one case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// The case.
    pub(crate) between: Between,
    /// With [`THREADS`] threads of the client: one value for each repetition.
    pub(crate) busy: Vec<Measured>,
    /// The processor time of one of these connections, in microseconds: one value for each
    /// repetition.
    pub(crate) processor: Vec<f64>,
    /// With a single thread of the client: one value for each repetition.
    pub(crate) alone: Vec<Measured>,
}

impl Row {
    /// Connections per second with a busy client.
    pub(crate) fn rate(&self) -> Option<Spread> {
        Spread::of(self.busy.iter().map(Measured::rate))
    }

    /// How many times as many as in another case, repetition by repetition.
    pub(crate) fn ratio(&self, other: &Self) -> Option<Spread> {
        let pairs = self.busy.iter().zip(&other.busy);
        Spread::of(pairs.map(|(own, other)| own.rate() / other.rate()))
    }

    /// Processor time of a connection with a busy client, in microseconds.
    pub(crate) fn processor(&self) -> Option<Spread> {
        Spread::of(self.processor.iter().copied())
    }

    /// How many times as much as in another case, repetition by repetition.
    pub(crate) fn processor_ratio(&self, other: &Self) -> Option<Spread> {
        let pairs = self.processor.iter().zip(&other.processor);
        Spread::of(pairs.map(|(own, other)| own / other))
    }

    /// What a connection of a client that is alone takes, in microseconds, by `value`.
    pub(crate) fn latency(&self, value: impl Fn(&Measured) -> u64) -> Option<Spread> {
        Spread::of(self.alone.iter().map(|measured| value(measured) as f64 / 1e3))
    }

    /// How much longer that is than in another case, repetition by repetition.
    pub(crate) fn added(&self, other: &Self, value: impl Fn(&Measured) -> u64) -> Option<Spread> {
        let pairs = self.alone.iter().zip(&other.alone);
        Spread::of(pairs.map(|(own, other)| (value(own) as f64 - value(other) as f64) / 1e3))
    }
}

/// Measures the cases in turn. The first row is that with nothing between.
///
/// # Errors
/// When something cannot be set up, a connection fails, or connections were not redirected as they
/// must be.
pub(crate) fn measure(plan: &Plan) -> Result<Vec<Row>> {
    let mut cases = vec![Between::Nothing];
    for &relay in &plan.relays {
        if plan.nftables {
            cases.push(Between::Nftables(relay));
        }
        let longest = if relay == Relay::Bare { 1 } else { plan.services };
        cases.extend((1..=longest).map(|services| Between::Carnet(relay, services)));
    }
    let sites: Vec<(Between, Site)> =
        cases.into_iter().map(|case| Ok((case, site(case)?))).collect::<Result<_>>()?;
    let row = |&(between, _): &(Between, Site)| Row {
        between,
        busy: vec![],
        processor: vec![],
        alone: vec![],
    };
    let mut rows: Vec<Row> = sites.iter().map(row).collect();
    for (between, site) in &sites {
        load(*between, site, plan.warm_up(), THREADS)?;
    }
    for repetition in plan.repetitions("services") {
        for (number, (between, site)) in repetition.order(&sites) {
            let before = site.processor_time()?;
            let busy = load(*between, site, plan.exchanges, THREADS)?;
            let used = site.processor_time()?.since(&before).as_secs_f64();
            let alone = load(*between, site, plan.exchanges / THREADS, 1)?;
            if let Some(row) = rows.get_mut(number) {
                row.processor.push(used * 1e6 / busy.connections as f64);
                row.busy.push(busy);
                row.alone.push(alone);
            }
        }
    }
    Ok(rows)
}

fn site(between: Between) -> Result<Site> {
    let mut site = Site::far(Exchange::Request)?;
    match between {
        Between::Nothing => {}
        Between::Nftables(relay) => site.add_relay_behind_nftables(relay)?,
        Between::Carnet(relay, services) => {
            site.bring_engine_up()?;
            for _ in 0..services {
                site.add_relay(relay)?;
            }
        }
    }
    Ok(site)
}

/// Makes connections, and makes sure that they went the way that is measured.
fn load(between: Between, site: &Site, connections: u32, threads: u32) -> Result<Measured> {
    let redirected = || match between {
        Between::Nothing => Ok(0),
        Between::Nftables(_) => site.redirected_by_nftables(),
        Between::Carnet(..) => site.redirected_by_carnet(),
    };
    let legs = match between {
        Between::Nothing => 0,
        Between::Nftables(_) => 1,
        Between::Carnet(_, services) => u64::from(services),
    };
    let before = redirected()?;
    let measured = site.load(Exchange::Request, connections, threads)?;
    let count = redirected()? - before;
    if count != legs * measured.connections {
        bail!(
            "{between:?}: {count} redirections for {} connections, not {legs} for each",
            measured.connections
        );
    }
    Ok(measured)
}

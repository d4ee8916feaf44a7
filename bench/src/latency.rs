//! What connect() and close() cost the application: no engine, one that lets the connection pass,
//! one that redirects it. Over loopback in all three cases, since a redirected connection ends there.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use carnet_testbed::Topology;
use serde::Serialize;

use crate::client::{Exchange, Measured};
use crate::connect::Plan;
use crate::site::Site;
use crate::statistics::Spread;

/// What was measured in one case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// The case.
    pub(crate) engine: &'static str,
    /// One value for each repetition.
    pub(crate) repetitions: Vec<Measured>,
}

impl Row {
    /// The medians of the repetitions together, in microseconds.
    pub(crate) fn p50(&self) -> Option<Spread> {
        Spread::of(self.repetitions.iter().map(|measured| measured.p50 as f64 / 1e3))
    }

    /// What the repetitions took longer at their medians than those of `other`, in microseconds.
    pub(crate) fn added(&self, other: &Self) -> Option<Spread> {
        let pairs = self.repetitions.iter().zip(&other.repetitions);
        Spread::of(pairs.map(|(own, other)| (own.p50 as f64 - other.p50 as f64) / 1e3))
    }
}

/// Measures the cases in turn. The first row is that without an engine.
///
/// # Errors
/// When something cannot be set up, or a connection fails.
pub(crate) fn measure(plan: &Plan) -> Result<Vec<Row>> {
    let address = Topology::CLIENT_V4;
    let without = Site::near(address, Exchange::Nothing)?;
    let mut passes = Site::near(address, Exchange::Nothing)?;
    passes.bring_engine_up()?;
    // Of the network that RFC 2544 sets aside; nothing is ever sent there.
    passes.add_filters(&[IpAddr::from(Ipv4Addr::new(198, 18, 0, 0))])?;
    let mut redirects = Site::near(address, Exchange::Nothing)?;
    redirects.bring_engine_up()?;
    redirects.add_sink()?;
    let sites = [("no engine", without), ("no match", passes), ("redirect", redirects)];
    let mut rows = sites.each_ref().map(|&(engine, _)| Row { engine, repetitions: Vec::new() });
    for (_, site) in &sites {
        site.load(Exchange::Nothing, plan.warm_up(), 1)?;
    }
    for repetition in plan.repetitions("latency") {
        for (number, (_, site)) in repetition.order(&sites) {
            let measured = site.load(Exchange::Nothing, plan.connections, 1)?;
            if let Some(row) = rows.get_mut(number) {
                row.repetitions.push(measured);
            }
        }
    }
    Ok(rows.into())
}

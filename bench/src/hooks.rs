//! Nanoseconds of each hook, from the kernel's own run-time statistics of its BPF programs.
//!
//! The kernel adds up the time and counts the runs of every program. The number of runs is checked
//! against the number of connections that were made: nothing is measured that did not happen, and
//! nothing is left out.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, bail};
use aya::sys::{Stats, enable_stats};
use carnet_testbed::Topology;
use serde::Serialize;

use crate::client::Exchange;
use crate::connect::Plan;
use crate::site::{Relay, Runs, Site};
use crate::statistics::Spread;

/// How many filters the larger policy has.
const MANY: u16 = 1000;

/// What was measured of one hook under one policy.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// The policy.
    pub(crate) policy: String,
    /// The hook.
    pub(crate) hook: String,
    /// How often it ran for each of the client's connections.
    pub(crate) runs_per_connection: f64,
    /// The mean of a run, in nanoseconds: one value for each repetition.
    pub(crate) nanoseconds: Vec<f64>,
}

impl Row {
    /// The repetitions together.
    pub(crate) fn spread(&self) -> Option<Spread> {
        Spread::of(self.nanoseconds.iter().copied())
    }
}

/// A policy under which hooks are measured.
struct Case {
    policy: &'static str,
    site: Site,
    /// The hook whose runs are checked.
    hook: &'static str,
    /// How often that hook runs for each connection.
    runs: u64,
    /// Whether the other hooks are reported, too.
    all_hooks: bool,
    exchange: Exchange,
}

/// Measures all policies in turn.
///
/// # Errors
/// When something cannot be set up, a connection fails, or a hook ran more or less often than it
/// must.
pub(crate) fn measure(plan: &Plan) -> Result<Vec<Row>> {
    let cases = cases()?;
    let _statistics: OwnedFd = enable_stats(Stats::RunTime)
        .context("the kernel's run-time statistics cannot be switched on")?;
    let mut measured: BTreeMap<(usize, String), (u64, Vec<f64>)> = BTreeMap::new();
    for case in &cases {
        case.site.load(case.exchange, plan.warm_up(), 1)?;
    }
    for repetition in plan.repetitions("hooks") {
        for (number, case) in repetition.order(&cases) {
            let before = case.site.runs()?;
            let load = case.site.load(case.exchange, plan.connections, 1)?;
            let ran = case.difference(&before, case.site.runs()?, load.connections)?;
            for (hook, Runs { nanoseconds, count }) in ran {
                let (total, means) = measured.entry((number, hook)).or_default();
                *total += count;
                means.push(nanoseconds as f64 / count as f64);
            }
        }
    }
    let connections = f64::from(plan.connections) * f64::from(plan.rounds);
    let rows = measured.into_iter().filter_map(|((number, hook), (count, nanoseconds))| {
        let policy = cases.get(number)?.policy.to_owned();
        Some(Row { policy, hook, runs_per_connection: count as f64 / connections, nanoseconds })
    });
    Ok(rows.collect())
}

fn cases() -> Result<Vec<Case>> {
    let v4 = IpAddr::from(Topology::CLIENT_V4);
    let v6 = IpAddr::from(Topology::CLIENT_V6);
    // Of the networks that RFC 2544 and RFC 3849 set aside; nothing is ever sent there.
    let others_v4 = |count: u16| -> Vec<IpAddr> {
        (0..count).map(|n| Ipv4Addr::from(0xc612_0000 + u32::from(n)).into()).collect()
    };
    let other_v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
    let case = |policy, address, set_up: &dyn Fn(&mut Site) -> Result<()>| -> Result<Case> {
        let exchange = Exchange::Nothing;
        let mut site = Site::near(address, exchange)?;
        site.bring_engine_up()?;
        set_up(&mut site)?;
        let hook = if address == v4 { "connect4" } else { "connect6" };
        Ok(Case { policy, site, hook, runs: 1, all_hooks: false, exchange })
    };
    let one = |site: &mut Site| site.add_filters(&others_v4(1));
    let mut reference = Site::near(v4, Exchange::Nothing)?;
    reference.attach_reference()?;
    let mut cases = vec![
        Case {
            policy: "a program that does nothing",
            site: reference,
            hook: "connect4",
            runs: 1,
            all_hooks: false,
            exchange: Exchange::Nothing,
        },
        case("empty", v4, &|_| Ok(()))?,
        case("1 filter, no match", v4, &one)?,
        case("1000 filters, no match", v4, &|site| site.add_filters(&others_v4(MANY)))?,
        case("1 filter, no match", v6, &|site| site.add_filters(&[other_v6.into()]))?,
        case("redirect", v4, &Site::add_sink)?,
    ];
    let exchange = Exchange::Request;
    let mut site = Site::far(exchange)?;
    site.bring_engine_up()?;
    one(&mut site)?;
    let (policy, hook) = ("1 filter, with requests", "connect4");
    cases.insert(3, Case { policy, site, hook, runs: 1, all_hooks: false, exchange });
    let mut site = Site::far(exchange)?;
    site.bring_engine_up()?;
    site.add_relay(Relay::Inspect)?;
    // The application connects, and the service does.
    let (hook, runs) = ("connect4", 2);
    cases.push(Case { policy: "whole flow", site, hook, runs, all_hooks: true, exchange });
    Ok(cases)
}

impl Case {
    /// What ran between `before` and `after`, while the client made so many connections.
    ///
    /// # Errors
    /// When the hook that is checked ran more or less often than it must.
    fn difference(
        &self,
        before: &BTreeMap<String, Runs>,
        mut after: BTreeMap<String, Runs>,
        connections: u64,
    ) -> Result<BTreeMap<String, Runs>> {
        for (hook, runs) in &mut after {
            let earlier = before.get(hook).copied().unwrap_or_default();
            runs.nanoseconds -= earlier.nanoseconds;
            runs.count -= earlier.count;
        }
        let count = after.get(self.hook).map_or(0, |runs| runs.count);
        if count != self.runs * connections {
            bail!(
                "{}: {} ran {count} times for {connections} connections, not {} times for each",
                self.policy,
                self.hook,
                self.runs
            );
        }
        after.retain(|hook, runs| runs.count > 0 && (self.all_hooks || hook == self.hook));
        Ok(after)
    }
}

//! What happens meanwhile: services come and go, the policy changes, the programs are replaced.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use carnet_core::object::{Conditions, FilterAction, NewFilter, Policy, Weight};

use crate::board::{REFUSAL, SERVICES};
use crate::site::{ON_FAILURE, PORT, REFUSED_PORT, Site};

/// The name of what comes and goes beside the services.
const EXTRA: &str = "extra";
/// How many filters are added at once that concern nobody.
const FILTERS: u16 = 50;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Kill,
    Replace,
    Remove,
    Filter,
    Order,
    Refusal,
    Filters,
    Sublayer,
    Upgrade,
    RotateKey,
    Look,
}

impl Event {
    /// All, with how often they happen.
    const ALL: [(Self, u32); 11] = [
        (Self::Kill, 4),
        (Self::Replace, 3),
        (Self::Remove, 2),
        (Self::Filter, 4),
        (Self::Order, 4),
        (Self::Refusal, 3),
        (Self::Filters, 2),
        (Self::Sublayer, 2),
        (Self::Upgrade, 1),
        (Self::RotateKey, 1),
        (Self::Look, 2),
    ];

    /// As the table names it.
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "service killed and started again",
            Self::Replace => "service replaced by another process",
            Self::Remove => "service removed and added again",
            Self::Filter => "service's filter removed and added again",
            Self::Order => "order of two services turned in one transaction",
            Self::Refusal => "refusing filter added and removed",
            Self::Filters => "50 filters added and removed",
            Self::Sublayer => "provider and sublayer added and removed",
            Self::Upgrade => "carnet upgrade",
            Self::RotateKey => "carnet rotate-key",
            Self::Look => "carnet status, flows, explain, service ls",
        }
    }
}

/// What happens, as the board tells it.
pub(crate) fn named(happening: u64) -> &'static str {
    let place = usize::try_from(happening).unwrap_or(usize::MAX);
    Event::ALL.get(place).map_or("nothing", |(event, _)| event.name())
}

/// How often something has happened, and how long it took at most.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) count: u64,
    pub(crate) longest: Duration,
}

/// What has happened.
pub(crate) type Happened = BTreeMap<&'static str, Times>;

/// Has things happen.
#[derive(Debug)]
pub(crate) struct Churn {
    chance: fastrand::Rng,
    happened: BTreeMap<Event, Times>,
    rotates: bool,
}

impl Churn {
    /// With a begin of chance.
    pub(crate) fn new(seed: u64, site: &Site) -> Self {
        Self {
            chance: fastrand::Rng::with_seed(seed),
            happened: BTreeMap::new(),
            rotates: site.carnet.knows("rotate-key"),
        }
    }

    /// What has happened.
    pub(crate) fn happened(&self) -> Happened {
        self.happened.iter().map(|(event, times)| (event.name(), *times)).collect()
    }

    /// Whether this build of the command can rotate the key.
    pub(crate) fn rotates(&self) -> bool {
        self.rotates
    }

    /// Has one thing happen; afterwards all is as before.
    ///
    /// # Errors
    /// When a command or a transaction fails, which none may.
    pub(crate) fn step(&mut self, site: &mut Site) -> Result<()> {
        let all: u32 = Event::ALL.iter().map(|(_, weight)| weight).sum();
        let mut drawn = self.chance.u32(0..all);
        let place = Event::ALL.iter().position(|(_, weight)| {
            let hit = drawn < *weight;
            drawn = drawn.saturating_sub(*weight);
            hit
        });
        let place = place.context("no event drawn")?;
        let (event, _) = Event::ALL[place];
        if event == Event::RotateKey && !self.rotates {
            return Ok(());
        }
        site.board.tell(place as u64)?;
        let began = Instant::now();
        self.carry_out(event, site)
            .with_context(|| format!("while it happened: {}", event.name()))?;
        site.board.tell(u64::MAX)?;
        let times = self.happened.entry(event).or_default();
        times.count += 1;
        times.longest = times.longest.max(began.elapsed());
        Ok(())
    }

    /// Waits a moment; `None` if the load is not there any more.
    pub(crate) fn pause_before_next(&mut self, load: impl Fn() -> bool) -> Option<()> {
        self.pause(400);
        load().then_some(())
    }

    fn pause(&mut self, most: u64) {
        thread::sleep(Duration::from_millis(self.chance.u64(10..most)));
    }

    fn carry_out(&mut self, event: Event, site: &mut Site) -> Result<()> {
        let place = self.chance.usize(0..SERVICES.len());
        // Alpha always is in the policy, so that nothing comes past all services.
        let other = self.chance.usize(1..SERVICES.len());
        match event {
            Event::Kill => {
                site.kill(place)?;
                self.pause(400);
                site.start(place)
            }
            Event::Replace => site.replace(place),
            Event::Remove => {
                site.remove_filter(other)?;
                site.kill(other)?;
                site.carnet.call(&["service", "rm", SERVICES[other]])?;
                self.pause(300);
                site.add_service(other)?;
                site.start(other)?;
                site.add_filter(other)
            }
            Event::Filter => {
                site.remove_filter(other)?;
                self.pause(500);
                site.add_filter(other)
            }
            Event::Order => {
                turn(site)?;
                self.pause(500);
                turn(site)
            }
            Event::Refusal => self.refuse(site),
            Event::Filters => {
                site.engine.transact(add_filters)?;
                self.pause(300);
                site.engine.transact(remove_filters)
            }
            Event::Sublayer => {
                site.carnet.call(&["provider", "add", EXTRA])?;
                let weight = self.chance.u16(..).to_string();
                let add = ["sublayer", "add", EXTRA, "--provider", EXTRA, "--weight", &weight];
                site.carnet.call(&add)?;
                self.pause(300);
                site.carnet.call(&["sublayer", "rm", EXTRA])?;
                site.carnet.call(&["provider", "rm", EXTRA])?;
                Ok(())
            }
            Event::Upgrade => site.carnet.call(&["upgrade"]).map(drop),
            Event::RotateKey => site.carnet.call(&["rotate-key"]).map(drop),
            Event::Look => look(site),
        }
    }

    /// Refuses flows to a port for a while.
    fn refuse(&mut self, site: &Site) -> Result<()> {
        let port = REFUSED_PORT.to_string();
        site.board.update(REFUSAL, |entry| entry.demanding(false, true))?;
        let add = ["filter", "add", "--sublayer", SERVICES[0], "--name", "refusal", "--block"];
        site.carnet.call(&[&add[..], &["--port", &port]].concat())?;
        site.board.update(REFUSAL, |entry| entry.demanding(true, true))?;
        self.pause(500);
        site.board.update(REFUSAL, |entry| entry.demanding(false, true))?;
        site.carnet.call(&["filter", "rm", "refusal"])?;
        site.board.update(REFUSAL, |entry| entry.demanding(false, false))
    }
}

/// Turns the order of beta and gamma: both are in the policy before and after, and so they are meanwhile.
fn turn(site: &mut Site) -> Result<()> {
    site.engine.transact(|policy| -> Result<()> {
        let crossed = policy.filter("beta")?.sublayer == "gamma";
        for (filter, from) in [("beta", "gamma"), ("gamma", "beta")] {
            policy.remove_filter(filter)?;
            policy.add_filter(NewFilter {
                name: Some(filter.into()),
                sublayer: if crossed { filter } else { from }.into(),
                weight: Weight::Auto,
                conditions: Conditions {
                    ports: vec![format!("{PORT}-{REFUSED_PORT}").parse()?],
                    ..Conditions::default()
                },
                action: FilterAction::Redirect { service: filter.into(), context: None },
            })?;
        }
        Ok(())
    })
}

/// Adds filters for an address to which nobody connects.
fn add_filters(policy: &mut Policy) -> Result<()> {
    for number in 0..FILTERS {
        policy.add_filter(NewFilter {
            name: Some(format!("{EXTRA}-{number}")),
            sublayer: SERVICES[0].into(),
            weight: Weight::Auto,
            conditions: Conditions {
                destinations: vec!["198.51.100.1/32".parse()?],
                ports: vec![(20_000 + number).into()],
                ..Conditions::default()
            },
            action: FilterAction::PERMIT,
        })?;
    }
    Ok(())
}

fn remove_filters(policy: &mut Policy) -> Result<()> {
    for number in 0..FILTERS {
        policy.remove_filter(&format!("{EXTRA}-{number}"))?;
    }
    Ok(())
}

/// Asks everything that can be asked.
fn look(site: &Site) -> Result<()> {
    for question in [&["status"][..], &["flows"], &["filter", "ls"]] {
        site.carnet.json(question)?;
    }
    site.carnet.call(&["explain", "--to", &format!("192.0.2.2:{PORT}")])?;
    let services = site.carnet.json(&["service", "ls"])?;
    let services = services.as_array().context("no list of services")?;
    for (place, name) in SERVICES.iter().enumerate() {
        let service = services.iter().find(|service| service["name"] == *name);
        let service = service.with_context(|| format!("{name} is missing"))?;
        if site.workers[place].is_some()
            && service["listeners"].as_array().is_none_or(Vec::is_empty)
        {
            bail!("{name} ({}) has no listener", ON_FAILURE[place]);
        }
    }
    Ok(())
}

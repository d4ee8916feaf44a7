//! What an instance is and does, all of it read back from the kernel.

use std::{os::fd::AsFd as _, path::PathBuf, time::Duration};

use carnet_core::{compile::compile, event::Counter, object::Policy};

use crate::{
    Account, BuildId, Engine, Error, KeyStatus, cgroup::Place, links::list, object::LAYOUT, sys,
    tables::Tables,
};

/// What an instance is and does.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The instance's name.
    pub instance: String,
    /// Where its pins are.
    pub directory: PathBuf,
    /// The redirected scope: a directory of the cgroup-v2 hierarchy.
    pub scope: PathBuf,
    /// The scope's cgroup id.
    pub scope_id: u64,
    /// Whether the scope's cgroup is still there. If not, nothing is redirected.
    pub scope_alive: bool,
    /// The epoch: records of another one are refused.
    pub epoch: u64,
    /// The key under which records are issued.
    pub key: KeyStatus,
    /// Number of the last transaction; 0 if there has been none.
    pub generation: u64,
    /// Number of flows that have begun.
    pub flows_begun: u64,
    /// Layout of the maps.
    pub layout: u32,
    /// The build of the programs.
    pub build: BuildId,
    /// The build that is part of this library. If it is another one, `carnet upgrade` brings it in.
    pub own_build: BuildId,
    /// Whether the scope is refused sockets whose flows no hook sees.
    pub refuse_unseen: bool,
    /// How many filters there is room for.
    pub max_filters: u32,
    /// How long a UDP flow of an unconnected socket lives without a datagram.
    pub udp_idle: Duration,
    /// The programs.
    pub programs: Vec<ProgramStatus>,
    /// The links.
    pub links: Vec<LinkStatus>,
    /// The counters, in the order of their numbers.
    pub counters: Vec<(Counter, u64)>,
    /// What became of the redirects.
    pub account: Account,
    /// How full the policy's tables are.
    pub tables: Vec<TableStatus>,
    /// How full the maps are that grow and shrink with what goes on.
    pub maps: Vec<MapStatus>,
}

/// A program.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProgramStatus {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub id: u32,
    /// The kernel's digest of its instructions; compare it on one kernel only.
    pub tag: [u8; 8],
    /// Instructions that the verifier looked at when it was loaded.
    pub verified_instructions: u32,
    /// Times that it ran; 0 unless the kernel counts (`sysctl kernel.bpf_stats_enabled=1`).
    pub run_count: u64,
    /// How long it ran in all, if the kernel counts.
    pub run_time: Duration,
}

/// A program's attachment to a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkStatus {
    /// The kernel's number for it.
    pub id: u32,
    /// The hook.
    pub hook: String,
    /// The program that is attached.
    pub program_id: u32,
    /// The id of the cgroup that it was made for.
    pub cgroup: u64,
    /// The name of the service whose cgroup that is, or `None` for the scope.
    pub service: Option<String>,
    /// Whether it is attached. A link whose cgroup was removed is not, and never will be again.
    pub alive: bool,
}

/// How full a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableStatus {
    /// What it holds.
    pub what: &'static str,
    /// How many there are.
    pub used: usize,
    /// How many there can be.
    pub capacity: usize,
}

/// How full a map is that grows and shrinks with what goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapStatus {
    /// Its name, that of its pin.
    pub name: &'static str,
    /// What it holds.
    pub what: &'static str,
    /// How many there are.
    pub used: usize,
    /// How many there can be.
    pub capacity: usize,
    /// Whether the oldest give way where there is no room: entries stay that nobody needs any more.
    pub oldest_give_way: bool,
    /// Its kernel memory in bytes, as the kernel tells it; before Linux 6.4 that of a full one.
    pub bytes: u64,
}

impl Engine {
    /// What the instance is and does.
    ///
    /// # Errors
    /// [`Error::NotUp`], [`Error::UnknownLayout`]; [`Error::Map`] and [`Error::Io`] if the kernel
    /// does not answer.
    pub fn status(&self) -> Result<Status, Error> {
        self.reading(|tables| self.status_of(tables))
    }

    fn status_of(&self, tables: &Tables) -> Result<Status, Error> {
        let known = self.instance()?;
        // Read again: another process may have upgraded it.
        let instance = tables.read_instance()?.unwrap_or_else(|_| known.clone());
        let (epoch, flows_begun, udp_idle) = tables.epoch_flows_and_udp_idle()?;
        let in_force = tables.in_force()?;
        let compiled = compile(&in_force.policy, in_force.generation)?;
        // In an empty instance there is no document yet.
        let document = if in_force.generation == 0 { 0 } else { in_force.policy.to_bytes().len() };
        let uses = tables.capacities()?.uses(&compiled, document);
        let table = |(what, used, capacity)| TableStatus { what, used, capacity };
        let scope_alive = Place::at(self.scope()).is_ok_and(|scope| scope.id == instance.scope_id);
        Ok(Status {
            instance: self.location().instance().to_owned(),
            directory: self.location().directory().to_owned(),
            scope: self.scope().to_owned(),
            scope_id: instance.scope_id,
            scope_alive,
            epoch,
            key: tables.key_status()?,
            generation: in_force.generation,
            flows_begun,
            layout: LAYOUT,
            build: instance.build,
            own_build: BuildId::own(),
            refuse_unseen: instance.refuse_unseen,
            max_filters: instance.max_filters,
            udp_idle,
            programs: self.programs()?,
            links: self.link_status(&in_force.policy, scope_alive.then_some(instance.scope_id))?,
            counters: tables.counters()?,
            account: self.account_of(tables)?,
            tables: uses.into_iter().map(table).collect(),
            maps: maps_of(tables)?,
        })
    }

    fn programs(&self) -> Result<Vec<ProgramStatus>, Error> {
        let mut programs = Vec::new();
        for (name, path) in list(&self.location().path("programs"))? {
            let failed = || Error::io("examine the program", path.display());
            let program = sys::open_pin(&path).map_err(failed())?;
            let info = sys::program_info(program.as_fd()).map_err(failed())?;
            programs.push(ProgramStatus {
                name,
                id: info.id,
                tag: info.tag,
                verified_instructions: info.verified_instructions,
                run_count: info.run_count,
                run_time: Duration::from_nanos(info.run_time_ns),
            });
        }
        Ok(programs)
    }

    /// `scope` is the id of the scope's cgroup, if that is there.
    fn link_status(&self, policy: &Policy, scope: Option<u64>) -> Result<Vec<LinkStatus>, Error> {
        let mut links = Vec::new();
        for pinned in self.links().pinned()? {
            let link = pinned.open()?;
            let info = sys::link_info(link.as_fd())
                .map_err(Error::io("examine the link", pinned.path.display()))?;
            let id = pinned.cgroup;
            let service = policy.services().iter().find(|service| service.cgroup.id == id);
            // The kernel lets go of a link some time after its cgroup was removed.
            let there = match service {
                Some(service) => Place::referred_by(&service.cgroup)?.is_some(),
                None => scope == Some(id),
            };
            links.push(LinkStatus {
                id: info.id,
                program_id: info.program,
                cgroup: id,
                service: service.map(|service| service.name.clone()),
                alive: there && info.cgroup == id,
                hook: pinned.hook,
            });
        }
        Ok(links)
    }
}

fn maps_of(tables: &Tables) -> Result<Vec<MapStatus>, Error> {
    Tables::CHANGING.into_iter().map(|(what, name)| tables.fill(what, name)).collect()
}

//! One policy for another: what a file says instead of what is in force.

use super::{
    Filter, NewFilter, NewService, Policy, PolicyError, Service, Sublayer, Trust, check_cgroup,
};
use crate::record::FileId;

/// Finds what paths and names of a document stand for now. The numbers by which the kernel compares
/// are others after a restart, or when something was made anew.
pub trait Identities {
    /// Why something cannot be found.
    type Error;

    /// Id and level of the cgroup with this path below the root of the hierarchy.
    ///
    /// # Errors
    /// If there is none.
    fn cgroup(&mut self, path: &str) -> Result<(u64, u32), Self::Error>;

    /// The file with this path.
    ///
    /// # Errors
    /// If there is none.
    fn executable(&mut self, path: &str) -> Result<FileId, Self::Error>;

    /// The cookie of the network namespace with this name.
    ///
    /// # Errors
    /// If there is none.
    fn network_namespace(&mut self, name: &str) -> Result<u64, Self::Error>;
}

impl Policy {
    /// Puts the numbers of now in the place of those that the document has for cgroups,
    /// executables and network namespaces.
    ///
    /// # Errors
    /// What `identities` says of the first that it does not find.
    pub fn identify<I: Identities>(&mut self, identities: &mut I) -> Result<(), I::Error> {
        for service in &mut self.services {
            (service.cgroup.id, _) = identities.cgroup(&service.cgroup.path)?;
        }
        for conditions in self.filters.iter_mut().map(|filter| &mut filter.conditions) {
            for cgroup in &mut conditions.cgroups {
                (cgroup.id, cgroup.level) = identities.cgroup(&cgroup.path)?;
            }
            let executables =
                conditions.executables.iter_mut().chain(&mut conditions.original_executables);
            for executable in executables {
                executable.file = identities.executable(&executable.path)?;
            }
            for namespace in &mut conditions.network_namespaces {
                namespace.cookie = identities.network_namespace(&namespace.name)?;
            }
        }
        Ok(())
    }

    /// Makes this policy say what `wanted` says. `wanted`'s own numbers mean nothing here: what
    /// stays the same keeps its id, and a service of the same name and provider its redirect
    /// handle, so that live flows go on; what is new gets numbers that were never given. To say the
    /// same again changes nothing.
    ///
    /// Filters and sublayers of equal weight are consulted in `wanted`'s order.
    ///
    /// # Errors
    /// [`PolicyError::CgroupTaken`], [`PolicyError::NoCgroup`], [`PolicyError::Condition`],
    /// [`PolicyError::IdsExhausted`]. Nothing is changed then.
    pub fn replace(&mut self, wanted: &Self) -> Result<(), PolicyError> {
        let mut next = Self { next_id: self.next_id, ..Self::default() };
        for provider in &wanted.providers {
            let (name, description) = (&provider.name, &provider.description);
            let mut old = self.providers.iter();
            match old.find(|old| (&old.name, &old.description) == (name, description)) {
                Some(old) => next.providers.push(old.clone()),
                None => drop(next.add_provider(name, description)?),
            }
        }
        // Age orders those of equal weight. So what was there is looked for in the order of its
        // age, and after the first that is new all are.
        let mut old = self.sublayers.iter();
        for sublayer in &wanted.sublayers {
            let (name, provider, weight) = (&sublayer.name, &sublayer.provider, sublayer.weight);
            let same = |old: &&Sublayer| {
                (&old.name, &old.provider, old.weight) == (name, provider, weight)
            };
            match old.find(same) {
                Some(old) => next.sublayers.push(old.clone()),
                None => drop(next.add_sublayer(name, provider, weight)?),
            }
        }
        self.replace_services(wanted, &mut next)?;
        let mut old = self.filters.iter();
        for filter in &wanted.filters {
            match old.find(|old| Filter { id: old.id, ..filter.clone() } == **old) {
                Some(old) => next.filters.push(old.clone()),
                None => {
                    let Filter { name, sublayer, weight, conditions, action, .. } = filter.clone();
                    next.add_filter(NewFilter { name, sublayer, weight, conditions, action })?;
                }
            }
        }
        *self = next;
        Ok(())
    }

    fn replace_services(&self, wanted: &Self, next: &mut Self) -> Result<(), PolicyError> {
        for service in &wanted.services {
            let same =
                |old: &&Service| (&old.name, &old.provider) == (&service.name, &service.provider);
            if let Some(old) = self.services.iter().find(same) {
                check_cgroup(&next.services, &service.cgroup)?;
                let (id, handle) = (old.id, old.handle);
                let trust = Trust::None;
                next.services.push(Service { id, handle, trust, ..service.clone() });
                continue;
            }
            let Service { name, provider, cgroup, .. } = service.clone();
            let &Service { on_failure, unmodified, listen_port, tproxy, gateway, .. } = service;
            let new = NewService::new(name, provider, cgroup);
            let new = NewService { on_failure, unmodified, listen_port, tproxy, gateway, ..new };
            next.add_service(new)?;
        }
        // Only now is everybody there who may be trusted.
        for service in &wanted.services {
            next.set_trust(&service.name, service.trust.clone())?;
        }
        Ok(())
    }
}

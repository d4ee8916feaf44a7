//! Links: which program is attached to which cgroup.
//!
//! Which links there have to be follows from the scope and the services' cgroups alone, so links
//! are never tracked: what is missing is attached, what is too much is detached.
//!
//! A hook is attached once on every way from the root to a socket's cgroup. Where cgroups of
//! services lie in one another, or in the scope, the outer one's link serves the inner one too;
//! with two, every connect would be decided twice.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
};

use carnet_core::object::{CgroupRef, Policy, Service};

use crate::{
    Error,
    cgroup::{Place, below_root},
    object::{Hook, PORT_HOOKS, REFUSE_UNSEEN, SCOPE_HOOKS, SERVICE_HOOKS, TPROXY_HOOKS},
    sys,
    tables::Instance,
};

/// The hooks that a cgroup has to have.
#[derive(Debug)]
pub(crate) struct Wanted {
    cgroup: CgroupRef,
    /// The service whose cgroup it is, if it is not only the scope's.
    service: Option<String>,
    hooks: Vec<&'static Hook>,
}

/// The hooks that cgroups have to have, by the cgroups' ids.
pub(crate) type Plan = BTreeMap<u64, Wanted>;

/// Whether hooks are for the sockets of a service, in the cgroup with this path below the root.
type Concerns<'a> = &'a dyn Fn(&Service, &Path) -> bool;

/// What has to be attached where.
pub(crate) fn plan(instance: &Instance, policy: &Policy) -> Result<Plan, Error> {
    let scope = instance.scope.as_path();
    let path_of = |service: &Service| below_root(&service.cgroup.path).to_owned();
    let paths: Vec<PathBuf> = policy.services().iter().map(path_of).collect();
    let mut plan = Plan::new();
    let whole_scope =
        CgroupRef { path: scope.to_string_lossy().into_owned(), id: instance.scope_id };
    let mut hooks: Vec<_> = SCOPE_HOOKS.iter().collect();
    hooks.extend(instance.refuse_unseen.then_some(&REFUSE_UNSEEN));
    plan.insert(instance.scope_id, Wanted { cgroup: whole_scope, service: None, hooks });
    let sets: [(&'static [Hook], Concerns<'_>); 4] = [
        (&SERVICE_HOOKS, &|_, _| true),
        (&PORT_HOOKS, &|service, _| service.listen_port.is_some()),
        (&TPROXY_HOOKS, &|service, _| service.tproxy),
        (&SCOPE_HOOKS, &|_, path| !path.starts_with(scope)),
    ];
    for (service, path) in policy.services().iter().zip(&paths) {
        if scope.starts_with(path) && scope != path {
            return Err(Error::ServiceAroundScope {
                service: service.name.clone(),
                path: service.cgroup.path.clone(),
                scope: scope.display().to_string(),
            });
        }
        let mut hooks = Vec::new();
        for (set, concerns) in &sets {
            let around = |other: &Service, outer: &Path| {
                path.starts_with(outer) && outer != path && concerns(other, outer)
            };
            let mut all = policy.services().iter().zip(&paths);
            if concerns(service, path) && !all.any(|(other, outer)| around(other, outer)) {
                hooks.extend(*set);
            }
        }
        if hooks.is_empty() {
            continue;
        }
        plan.entry(service.cgroup.id)
            .or_insert_with(|| Wanted {
                cgroup: service.cgroup.clone(),
                service: None,
                hooks: Vec::new(),
            })
            .add(service, hooks);
    }
    Ok(plan)
}

impl Wanted {
    fn add(&mut self, service: &Service, hooks: Vec<&'static Hook>) {
        self.service = Some(service.name.clone());
        self.hooks.extend(hooks);
    }
}

/// A pinned link.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) path: PathBuf,
    /// The id of the cgroup that it was made for.
    pub(crate) cgroup: u64,
    /// The hook's name.
    pub(crate) hook: String,
}

impl Pinned {
    pub(crate) fn open(&self) -> Result<OwnedFd, Error> {
        sys::open_pin(&self.path).map_err(Error::io("open the link", self.path.display()))
    }
}

/// The links of an instance.
#[derive(Debug)]
pub(crate) struct Links {
    /// The instance's directory.
    directory: PathBuf,
}

impl Links {
    pub(crate) fn of(instance_directory: &Path) -> Self {
        Self { directory: instance_directory.to_owned() }
    }

    fn all(&self) -> PathBuf {
        self.directory.join("links")
    }

    fn of_cgroup(&self, id: u64) -> PathBuf {
        self.all().join(format!("{CGROUP_PREFIX}{id}"))
    }

    /// Attaches what is missing. A cgroup that is gone is passed over if `may_be_gone` says so of
    /// its id.
    pub(crate) fn attach_missing(
        &self,
        plan: &Plan,
        may_be_gone: impl Fn(u64) -> bool,
    ) -> Result<(), Error> {
        for (id, wanted) in plan {
            let directory = self.of_cgroup(*id);
            let missing: Vec<_> =
                wanted.hooks.iter().filter(|hook| !directory.join(hook.name).exists()).collect();
            if missing.is_empty() {
                continue;
            }
            let Some(place) = Place::referred_by(&wanted.cgroup)? else {
                if may_be_gone(*id) {
                    tracing::warn!("the cgroup {} is gone", wanted.cgroup.path);
                    continue;
                }
                return Err(Error::CgroupGone {
                    service: wanted.service.clone().unwrap_or_default(),
                    path: wanted.cgroup.path.clone(),
                });
            };
            create_directory(&directory)?;
            for hook in missing {
                self.attach(&place, hook, &directory.join(hook.name))?;
            }
        }
        Ok(())
    }

    fn attach(&self, place: &Place, hook: &Hook, pin: &Path) -> Result<(), Error> {
        let program = self.directory.join("programs").join(hook.program);
        let program =
            sys::open_pin(&program).map_err(Error::io("open the program", program.display()))?;
        let cgroup = place.open()?;
        let link = sys::link_to_cgroup(program.as_fd(), cgroup.as_fd(), hook.attach_type).map_err(
            |source| Error::Attach {
                program: hook.program,
                cgroup: place.directory.clone(),
                source,
            },
        )?;
        // Without a pin it is detached when the descriptor is closed.
        sys::pin(link.as_fd(), pin).map_err(Error::io("pin the link", pin.display()))
    }

    /// The links that there are.
    pub(crate) fn pinned(&self) -> Result<Vec<Pinned>, Error> {
        let mut found = Vec::new();
        for (name, directory) in list(&self.all())? {
            let Some(id) = name.strip_prefix(CGROUP_PREFIX).and_then(|id| id.parse().ok()) else {
                continue;
            };
            for (hook, path) in list(&directory)? {
                found.push(Pinned { path, cgroup: id, hook });
            }
        }
        Ok(found)
    }

    /// Detaches what is not wanted.
    pub(crate) fn detach_superfluous(&self, plan: &Plan) -> Result<(), Error> {
        let wanted = |link: &Pinned| {
            plan.get(&link.cgroup)
                .is_some_and(|wanted| wanted.hooks.iter().any(|hook| hook.name == link.hook))
        };
        self.detach_where(|link| !wanted(link))
    }

    /// Detaches everything.
    pub(crate) fn detach_all(&self) -> Result<(), Error> {
        self.detach_where(|_| true)
    }

    fn detach_where(&self, superfluous: impl Fn(&Pinned) -> bool) -> Result<(), Error> {
        let mut links = self.pinned()?;
        // While connections are still redirected, services can ask about them.
        links.sort_by_key(|link| SERVICE_HOOKS.iter().any(|hook| hook.name == link.hook));
        for link in links {
            if superfluous(&link) {
                // The kernel would detach it some time after the pin is gone; the caller relies on
                // that it is.
                let fd = link.open()?;
                sys::detach_link(fd.as_fd())
                    .map_err(Error::io("detach the link", link.path.display()))?;
                fs::remove_file(&link.path)
                    .map_err(Error::io("remove the link", link.path.display()))?;
            }
        }
        for (_, directory) in list(&self.all())? {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                    return Err(Error::io("remove", directory.display())(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

const CGROUP_PREFIX: &str = "cgroup-";

/// Makes a directory that only its owner can enter, if it is not there.
pub(crate) fn create_directory(path: &Path) -> Result<(), Error> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::io("create", path.display())(error))
        }
        _ => Ok(()),
    }
}

/// Names and paths of what is in a directory; nothing if there is none.
pub(crate) fn list(directory: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let failed = |error| Error::io::<io::Error>("list", directory.display())(error);
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use carnet_core::object::NewService;

    use super::*;
    use crate::object::BuildId;

    const SCOPE: u64 = 100;

    fn instance(scope: &str) -> Instance {
        let build = BuildId([0; 32]);
        Instance {
            max_filters: 1,
            build,
            refuse_unseen: false,
            scope_id: SCOPE,
            scope: scope.into(),
        }
    }

    /// The hooks of each cgroup, by number of those for the scope and for services.
    fn planned(scope: &str, services: &[(u64, &str)]) -> Result<Vec<(u64, usize, usize)>, Error> {
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        for (id, path) in services {
            let cgroup = CgroupRef { path: (*path).into(), id: *id };
            policy.add_service(NewService::new(format!("s{id}"), "p", cgroup)).unwrap();
        }
        let count = |wanted: &Wanted, hooks: &'static [Hook]| {
            let is = |hook: &&&'static Hook| hooks.iter().any(|other| std::ptr::eq(other, **hook));
            wanted.hooks.iter().filter(is).count()
        };
        let plan = plan(&instance(scope), &policy)?;
        let row = |(id, wanted): (&u64, &Wanted)| {
            (*id, count(wanted, &SCOPE_HOOKS), count(wanted, &SERVICE_HOOKS))
        };
        Ok(plan.iter().map(row).collect())
    }

    #[test]
    fn every_socket_passes_each_hook_once() {
        let inside = planned("a", &[(1, "/a/x"), (2, "/a/y")]).unwrap();
        assert_eq!(inside, [(1, 0, 3), (2, 0, 3), (SCOPE, 10, 0)]);
        let outside = planned("a", &[(1, "/b"), (2, "/ab")]).unwrap();
        assert_eq!(outside, [(1, 10, 3), (2, 10, 3), (SCOPE, 10, 0)]);
        let nested = planned("a", &[(1, "/a/x/y"), (2, "/a/x"), (3, "/b/c"), (4, "/b")]).unwrap();
        assert_eq!(nested, [(2, 0, 3), (4, 10, 3), (SCOPE, 10, 0)]);
        let scope_itself = planned("a", &[(SCOPE, "/a"), (1, "/a/x")]).unwrap();
        assert_eq!(scope_itself, [(SCOPE, 10, 3)]);
        let everything = planned("", &[(1, "/a"), (2, "/b")]).unwrap();
        assert_eq!(everything, [(1, 0, 3), (2, 0, 3), (SCOPE, 10, 0)]);
    }

    #[test]
    fn hooks_of_some_services_are_at_the_outermost_of_them() {
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        let port = NonZeroU16::new(15001);
        let services = [
            ("outer", 1, None, false),
            ("outer/a", 2, port, true),
            ("outer/a/b", 3, port, false),
            ("outer/a/b/c", 4, None, true),
            ("outer/d", 5, None, true),
        ];
        for (path, id, listen_port, tproxy) in services {
            let new = NewService::new(format!("s{id}"), "p", CgroupRef { path: path.into(), id });
            policy.add_service(NewService { listen_port, tproxy, ..new }).unwrap();
        }
        let plan = plan(&instance("outer"), &policy).unwrap();
        let at = |hook: &Hook| -> Vec<u64> {
            let has = |wanted: &Wanted| wanted.hooks.iter().any(|one| one.name == hook.name);
            plan.iter().filter(|(_, wanted)| has(wanted)).map(|(id, _)| *id).collect()
        };
        assert_eq!(at(&PORT_HOOKS[0]), [2]);
        assert_eq!(at(&TPROXY_HOOKS[0]), [2, 5]);
        assert_eq!(at(&SERVICE_HOOKS[0]), [1]);
    }

    #[test]
    fn only_the_scope_refuses_unseen_sockets_and_only_if_asked_to() {
        let mut policy = Policy::new();
        let hooks = |instance: &Instance, policy: &Policy| {
            let plan = plan(instance, policy).unwrap();
            let with = |(id, wanted): (&u64, &Wanted)| {
                wanted.hooks.iter().any(|hook| hook.name == REFUSE_UNSEEN.name).then_some(*id)
            };
            plan.iter().filter_map(with).collect::<Vec<_>>()
        };
        policy.add_provider("p", "").unwrap();
        let cgroup = CgroupRef { path: "/elsewhere".into(), id: 1 };
        policy.add_service(NewService::new("s", "p", cgroup)).unwrap();
        let mut instance = instance("a");
        assert!(hooks(&instance, &policy).is_empty());
        instance.refuse_unseen = true;
        assert_eq!(hooks(&instance, &policy), [SCOPE]);
    }

    #[test]
    fn a_service_around_the_scope_is_refused() {
        let error = planned("a/b", &[(1, "/a")]).unwrap_err();
        assert!(matches!(error, Error::ServiceAroundScope { .. }), "{error}");
        assert!(planned("a/b", &[(1, "/")]).is_err());
    }
}

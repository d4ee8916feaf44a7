//! The cgroups whose sockets' flows pass an instance's hooks, the processes in them, and what those
//! hold open.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use carnet_core::{
    explain::Process,
    object::{Policy, Service},
};

use crate::{
    Engine, Error,
    cgroup::{Place, mount_point},
    namespace::inside,
    sockets::Diagnosis,
    sys,
};

/// Most processes that are looked at.
const MAX_PROCESSES: usize = 65_536;

/// A process in a cgroup of an instance, or in one below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) pid: u32,
}

/// The processes of a service: one and those that descend from it in the service's cgroup, or all that
/// run there or in one below.
pub(crate) fn processes_of(service: &Service, one: Option<u32>) -> Result<Vec<u32>, Error> {
    let members = match (Place::referred_by(&service.cgroup)?, one) {
        (Some(place), _) => Members::below(&place.directory)?,
        (None, Some(_)) => Members::default(),
        (None, None) => {
            let (service, path) = (service.name.clone(), service.cgroup.path.clone());
            return Err(Error::CgroupGone { service, path });
        }
    };
    let mut pids: Vec<_> = members.processes.iter().map(|member| member.pid).collect();
    let Some(one) = one else { return Ok(pids) };
    let parents: BTreeMap<_, _> =
        pids.iter().filter_map(|pid| Some((*pid, parent_of(*pid)?))).collect();
    let descends = |pid: &u32| {
        let line = std::iter::successors(Some(*pid), |pid| parents.get(pid).copied());
        // Longer only if the numbers of processes that ended were given anew meanwhile.
        *pid != one && line.take(parents.len() + 1).any(|ancestor| ancestor == one)
    };
    pids.retain(descends);
    pids.insert(0, one);
    Ok(pids)
}

/// The process from which one descends, if it is there.
fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
}

/// What passes an instance's hooks.
#[derive(Debug, Default)]
pub(crate) struct Members {
    /// The cgroups by their ids: each with the ids of its ancestors, by level, and its own last.
    pub(crate) cgroups: BTreeMap<u64, Vec<u64>>,
    /// The processes.
    pub(crate) processes: Vec<Member>,
    /// Whether there are more processes than are looked at.
    pub(crate) cut: bool,
}

impl Members {
    /// Those of a cgroup and all below it.
    pub(crate) fn below(cgroup: &Path) -> Result<Self, Error> {
        let mut members = Self::default();
        members.add(cgroup)?;
        Ok(members)
    }

    /// Those of an instance's scope, and of its services' cgroups outside the scope.
    pub(crate) fn of(engine: &Engine, policy: &Policy) -> Result<Self, Error> {
        let mut members = Self::below(engine.scope())?;
        for service in policy.services() {
            if let Some(place) = Place::referred_by(&service.cgroup)?
                && !members.cgroups.contains_key(&place.id)
            {
                members.add(&place.directory)?;
            }
        }
        Ok(members)
    }

    fn add(&mut self, cgroup: &Path) -> Result<(), Error> {
        let lineage = lineage(cgroup).map_err(Error::io("examine cgroup", cgroup.display()))?;
        let mut waiting = vec![(cgroup.to_owned(), lineage)];
        while let Some((directory, lineage)) = waiting.pop() {
            for pid in processes_in(&directory) {
                if self.processes.len() < MAX_PROCESSES {
                    self.processes.push(Member { pid });
                } else {
                    self.cut = true;
                }
            }
            for (path, id) in children(&directory) {
                waiting.push((path, [&lineage[..], &[id]].concat()));
            }
            if let Some(own) = lineage.last() {
                self.cgroups.insert(*own, lineage);
            }
        }
        Ok(())
    }

    /// A netlink socket in each network namespace in which a process is, with the namespace's
    /// cookie and one of its processes.
    pub(crate) fn namespaces(&self) -> Result<Vec<Namespace>, Error> {
        let mut seen = BTreeSet::new();
        let mut namespaces = Vec::new();
        for Member { pid } in &self.processes {
            let path = format!("/proc/{pid}/ns/net");
            // It may have ended.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if !seen.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            let Ok(file) = File::open(&path) else { continue };
            let opened = inside(&file, || {
                let diagnosis = Diagnosis::open()?;
                Ok(Namespace { cookie: sys::netns_cookie(diagnosis.as_fd())?, diagnosis })
            });
            namespaces.push(opened.map_err(Error::io("ask for the sockets of", &path))?);
        }
        Ok(namespaces)
    }

    /// The processes that hold sockets, by the sockets' inodes.
    pub(crate) fn holders(&self) -> BTreeMap<u64, Vec<u32>> {
        let mut holders: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for Member { pid } in &self.processes {
            for (_, inode) in sockets_of(*pid) {
                let of_socket = holders.entry(inode).or_default();
                if of_socket.last() != Some(pid) {
                    of_socket.push(*pid);
                }
            }
        }
        holders
    }
}

/// A network namespace in which a process of an instance is.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) cookie: u64,
    pub(crate) diagnosis: Diagnosis,
}

/// The numbers of a process's descriptors of sockets, with the sockets' inodes. Nothing of a process
/// that has ended.
pub(crate) fn sockets_of(pid: u32) -> Vec<(i32, u64)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let socket = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        Some((entry.file_name().to_str()?.parse().ok()?, inode.parse().ok()?))
    };
    entries.filter_map(Result::ok).filter_map(socket).collect()
}

/// The ids of a cgroup's ancestors, by level, and its own last.
fn lineage(cgroup: &Path) -> io::Result<Vec<u64>> {
    let root = mount_point().map_err(io::Error::other)?;
    let mut lineage = Vec::new();
    for ancestor in cgroup.ancestors().take_while(|ancestor| ancestor.starts_with(&root)) {
        lineage.push(fs::metadata(ancestor)?.ino());
    }
    lineage.reverse();
    Ok(lineage)
}

fn processes_in(cgroup: &Path) -> Vec<u32> {
    // It may be gone; one of threads has none of its own.
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // 0 stands for a process that is not in sight.
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect()
}

fn children(cgroup: &Path) -> Vec<(PathBuf, u64)> {
    let Ok(entries) = fs::read_dir(cgroup) else { return Vec::new() };
    let child = |entry: fs::DirEntry| {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        is_directory.then(|| Some((entry.path(), entry.metadata().ok()?.ino()))).flatten()
    };
    entries.filter_map(Result::ok).filter_map(child).collect()
}

impl Engine {
    /// What filters can test of a running process that connects. A thread of the kernel, for
    /// example, has no executable.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such process, or if it cannot be examined (needs
    /// `CAP_SYS_PTRACE` for those of other users).
    pub fn describe_process(&self, pid: u32) -> Result<Process, Error> {
        let path = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
        let read = |name| {
            let path = path(name);
            fs::read_to_string(&path).map_err(Error::io("read", path.display()))
        };
        let status = read("status")?;
        // The real one: that is what the hooks see, too.
        let real = |line: &str| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok();
        let table = read("cgroup")?;
        let below = table.lines().find_map(|line| line.strip_prefix("0::/"));
        let root = mount_point()?;
        let cgroups = below.map(|below| lineage(&root.join(below)));
        Ok(Process {
            user: status.lines().find_map(real),
            cgroups: cgroups.and_then(Result::ok),
            executable: self.resolve_executable(&path("exe")).ok(),
            network_namespace: Some(Self::resolve_netns(&path("ns/net"))?),
        })
    }
}

#[cfg(test)]
mod tests {
    use carnet_core::object::{CgroupRef, NewService};
    use carnet_testbed::{Cgroup, require_root};

    use super::*;

    #[test]
    fn processes_of_a_service_are_those_of_its_cgroup_or_descend_from_one() {
        require_root().unwrap();
        let cgroup = Cgroup::create("carnet-engine-workers").unwrap();
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        let place = Place::at(cgroup.path()).unwrap();
        let reference = CgroupRef { path: format!("/{}", place.path.display()), id: place.id };
        policy.add_service(NewService::new("s", "p", reference)).unwrap();
        let service = policy.service("s").unwrap();
        assert!(processes_of(service, None).unwrap().is_empty());

        // A master with a worker that has one of its own, and somebody else.
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "sh -c 'sleep 600 & wait' & wait"]);
        let mut master = cgroup.spawn(&mut command).unwrap();
        let mut other = cgroup.spawn(std::process::Command::new("sleep").arg("600")).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while cgroup.processes().unwrap().len() < 4 {
            assert!(std::time::Instant::now() < deadline, "the workers do not start");
            std::thread::yield_now();
        }
        let mut all = processes_of(service, None).unwrap();
        all.sort_unstable();
        let mut expected = cgroup.processes().unwrap();
        expected.sort_unstable();
        assert_eq!(all, expected);
        let own = processes_of(service, Some(master.id())).unwrap();
        assert_eq!((own[0], own.len()), (master.id(), 3));
        assert!(!own.contains(&other.id()));
        assert_eq!(processes_of(service, Some(other.id())).unwrap(), [other.id()]);

        cgroup.kill().unwrap();
        for process in [&mut master, &mut other] {
            process.wait().unwrap();
        }
        drop(cgroup);
        let gone = processes_of(service, None).unwrap_err();
        assert!(matches!(gone, Error::CgroupGone { .. }), "{gone}");
    }

    #[test]
    fn members_are_found_below_a_cgroup_with_what_they_hold() {
        require_root().unwrap();
        let scope = Cgroup::create("carnet-engine-members").unwrap();
        let child = scope.child("child").unwrap();
        let sleeper = || {
            let mut command = std::process::Command::new("sleep");
            command.arg("600");
            command
        };
        let (listener, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut command = sleeper();
        command.stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()));
        let mut outer = scope.spawn(&mut sleeper()).unwrap();
        let mut inner = child.spawn(&mut command).unwrap();

        let members = Members::below(scope.path()).unwrap();
        assert!(!members.cut);
        let mut pids: Vec<_> = members.processes.iter().map(|member| member.pid).collect();
        pids.sort_unstable();
        let mut expected = [outer.id(), inner.id()];
        expected.sort_unstable();
        assert_eq!(pids, expected);
        assert_eq!(members.cgroups.len(), 2);
        let lineage = &members.cgroups[&child.id()];
        assert_eq!(lineage[lineage.len() - 2..], [scope.id(), child.id()]);
        assert_eq!(lineage[0], 1, "the root");

        let [(0, inode)] = sockets_of(inner.id())[..] else { panic!("one socket, as input") };
        assert_eq!(members.holders(), BTreeMap::from([(inode, vec![inner.id()])]));
        assert_eq!(members.namespaces().unwrap().len(), 1);
        for process in [&mut outer, &mut inner] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
        assert!(sockets_of(inner.id()).is_empty());
        assert!(Members::below(scope.path()).unwrap().namespaces().unwrap().is_empty());
    }
}

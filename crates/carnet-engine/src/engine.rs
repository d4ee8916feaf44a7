//! Bringing an instance up, opening it, upgrading it, taking it down.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::MapData;
use carnet_core::{
    compile::{CompiledPolicy, compile},
    event::Counter,
    flow::DATAGRAM_IDLE_NS,
    object::Policy,
};
use rustix::thread::{CapabilitySet, capabilities};

use crate::{
    Error, Location, cgroup,
    cgroup::Place,
    kernel,
    links::{Links, Pinned, create_directory, list, plan},
    location::Lock,
    object::{self, BuildId},
    sys,
    tables::{Capacities, InForce, Instance, Tables},
};

/// How an instance is brought up.
#[derive(Clone, Debug)]
pub struct UpOptions {
    /// The redirected scope: a directory of the cgroup-v2 hierarchy. The connections of the
    /// processes in it and below it are classified.
    pub cgroup: PathBuf,
    /// Room for this many filters, 1 to 1,048,576. A filter that names several values of several
    /// fields counts once for each combination. The tables take about 2 KB of kernel memory for
    /// each.
    pub max_filters: u32,
    /// How long a UDP flow of an unconnected socket lives without a datagram (contract U7). What a
    /// socket sends to the same destination after that begins a new flow, which the policy of that
    /// time decides about. At least a millisecond.
    pub udp_idle: Duration,
    /// Refuse the scope's processes to make internet sockets whose flows no hook sees: raw ones,
    /// those of `ping`, UDP-Lite, SCTP and the like ([`SocketKind::is_unseen`]).
    ///
    /// [`SocketKind::is_unseen`]: carnet_core::socket::SocketKind::is_unseen
    pub refuse_unseen: bool,
}

impl UpOptions {
    /// Room for filters unless told otherwise.
    pub const DEFAULT_MAX_FILTERS: u32 = 1024;
    /// Life of an idle UDP flow unless told otherwise.
    pub const DEFAULT_UDP_IDLE: Duration = Duration::from_nanos(DATAGRAM_IDLE_NS);

    /// The defaults for a scope.
    pub fn new(cgroup: impl Into<PathBuf>) -> Self {
        Self {
            cgroup: cgroup.into(),
            max_filters: Self::DEFAULT_MAX_FILTERS,
            udp_idle: Self::DEFAULT_UDP_IDLE,
            refuse_unseen: false,
        }
    }
}

/// What an upgrade did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UpgradeReport {
    /// The build that ran before.
    pub from: BuildId,
    /// The build that runs now; the same if it was this library's already.
    pub to: BuildId,
    /// Number of links whose program was replaced.
    pub replaced: usize,
    /// Number of links whose cgroup is gone; nothing runs through them.
    pub defunct: usize,
}

/// An empty directory that lies in the instance's own while its policy is being changed.
pub(crate) const CHANGING: &str = "changing";

/// The directory in which the new programs of an upgrade are pinned until they take the old ones'
/// names.
pub(crate) const UPGRADE: &str = "upgrade";

/// An instance of the kernel engine that is up.
///
/// The instance is in the kernel: this value only knows where, and dropping it changes nothing.
/// Every method locks the instance for as long as it runs and shows what is there then, so several
/// processes may use one instance at the same time.
#[derive(Debug)]
pub struct Engine {
    location: Location,
    tables: Tables,
    /// What the instance is, or what is not as this version knows it.
    instance: Result<Instance, String>,
    scope: PathBuf,
}

impl Engine {
    /// Brings an instance up: loads the programs, pins them with their maps, and attaches them to
    /// the scope. The policy is empty. If it fails, nothing is left behind.
    ///
    /// # Errors
    /// Before anything is touched: [`Error::NotPrivileged`], [`Error::KernelTooOld`],
    /// [`Error::NoBtf`], [`Error::NoCgroup2`], [`Error::NotACgroup`], [`Error::BadMaxFilters`],
    /// [`Error::BadUdpIdle`], [`Error::AlreadyUp`]. Then [`Error::UnknownKernel`],
    /// [`Error::Object`], [`Error::Program`] if the kernel refuses the engine, and
    /// [`Error::Attach`] if it cannot be attached, for example since somebody else's program claims
    /// the cgroup for itself.
    pub fn up(location: &Location, options: &UpOptions) -> Result<Self, Error> {
        check_privileges()?;
        kernel::check_version()?;
        let capacities = Capacities::for_filters(options.max_filters)?;
        if options.udp_idle < Duration::from_millis(1) {
            return Err(Error::BadUdpIdle);
        }
        let scope = Place::at(&options.cgroup)?;
        let lock = location.lock_parent()?;
        let result = sweep(location).and_then(|_| {
            if location.directory().exists() {
                return Err(Error::AlreadyUp { instance: location.instance().to_owned() });
            }
            build(location, options, &capacities, &scope)
        });
        if let Err(error) = result {
            if let Err(second) = location.remove_parent(&lock) {
                tracing::warn!("{second}");
            }
            return Err(error);
        }
        Self::open(location)
    }

    /// Opens an instance that is up.
    ///
    /// One that another version of Carnet brought up can be opened too; but if this version does
    /// not know its layout, all that can be done with it is to take it down.
    ///
    /// # Errors
    /// [`Error::NotUp`]; [`Error::NotPrivileged`]; [`Error::NoCgroup2`].
    pub fn open(location: &Location) -> Result<Self, Error> {
        check_privileges()?;
        let _lock = location.lock_to_read()?;
        let tables = Tables::of(location);
        if tables.is_closed() {
            return Err(location.not_up());
        }
        let instance = tables.read_instance()?;
        let mount = cgroup::mount_point()?;
        let scope = match &instance {
            Ok(instance) if !instance.scope.as_os_str().is_empty() => mount.join(&instance.scope),
            _ => mount,
        };
        Ok(Self { location: location.clone(), tables, instance, scope })
    }

    /// Takes the instance down: detaches all programs and removes all that is pinned. Connections
    /// that are open go on.
    ///
    /// A single store puts the empty policy in force and says that the instance is not up any more.
    /// So at every moment all is as it was, or nothing is redirected. What is left is then removed.
    ///
    /// # Errors
    /// [`Error::Io`] if something cannot be detached or removed. [`Engine::sweep`] removes the rest.
    pub fn down(self) -> Result<(), Error> {
        let parent = self.location.lock_parent()?;
        let result = self.location.lock_to_change().and_then(|_lock| {
            // Where nothing can be removed, all is to stay as it is.
            create_directory(&self.location.path(CHANGING))?;
            // The tables of another version's instance, or those that are damaged, cannot be
            // written. Its hooks are then detached one after another.
            if let Err(error) = self.close() {
                tracing::warn!("{error}");
            }
            take_apart(&self.location)
        });
        result.and(self.location.remove_parent(&parent))
    }

    /// Removes what commands that were killed, or have failed, have left of an instance that is not
    /// up; gives whether there was anything.
    ///
    /// # Errors
    /// [`Error::NotPrivileged`]; [`Error::Io`] if something cannot be detached or removed.
    pub fn sweep(location: &Location) -> Result<bool, Error> {
        check_privileges()?;
        let parent = location.lock_parent()?;
        sweep(location).and_then(|found| location.remove_parent(&parent).map(|()| found))
    }

    /// Locks the instance against others that change it or read it.
    pub(crate) fn lock_to_change(&self) -> Result<Lock, Error> {
        self.while_up(self.location.lock_to_change()?)
    }

    /// Locks the instance against others that change it.
    pub(crate) fn lock_to_read(&self) -> Result<Lock, Error> {
        self.while_up(self.location.lock_to_read()?)
    }

    /// The lock, unless the command that was to take the instance down was killed.
    fn while_up(&self, lock: Lock) -> Result<Lock, Error> {
        if self.tables.is_closed() { Err(self.location.not_up()) } else { Ok(lock) }
    }

    /// Replaces the programs by those of this library, without a moment in which a connection
    /// passes by: each link gets its new program in one step. Policy, flows and records stay. With
    /// the build that runs already, the programs are loaded afresh.
    ///
    /// # Errors
    /// [`Error::UnknownLayout`] if the new programs cannot work with the maps that there are;
    /// otherwise as for [`Engine::up`]. The old programs go on then.
    pub fn upgrade(&mut self) -> Result<UpgradeReport, Error> {
        let _lock = self.lock_to_change()?;
        let mut instance = self.instance()?.clone();
        self.check_maps()?;
        self.recover()?;
        let policy = self.tables.in_force()?.policy;
        let plan = plan(&instance, &policy)?;
        let loaded = object::load(Some(&self.location.path("maps")), None)?;
        let links = Links::of(self.location.directory());

        // The new pins are made aside, so that all that is left to do after the links is to rename.
        let aside = self.location.path(UPGRADE);
        create_directory(&aside)?;
        let outcome = pin_programs(&loaded, &aside)
            .and_then(|()| Replacement::new(&self.location, &aside).carry_out(&links.pinned()?));
        let (replaced, defunct) = match outcome {
            Ok(counts) => counts,
            Err(error) => {
                remove_all(&aside)?;
                return Err(error);
            }
        };
        for (name, path) in list(&aside)? {
            let pin = self.location.path("programs").join(name);
            fs::rename(&path, &pin).map_err(Error::io("replace the pin", pin.display()))?;
        }
        remove_all(&aside)?;
        // Hooks that only one of the two builds has.
        links.attach_missing(&plan, |_| true)?;
        links.detach_superfluous(&plan)?;

        let from = instance.build;
        instance.build = BuildId::own();
        self.tables.write_instance(&instance)?;
        self.instance = Ok(instance);
        Ok(UpgradeReport { from, to: BuildId::own(), replaced, defunct })
    }

    /// Checks that the pinned maps are what the programs of this library expect.
    fn check_maps(&self) -> Result<(), Error> {
        let differs = |difference| Error::UnknownLayout {
            instance: self.location.instance().to_owned(),
            difference,
        };
        for wanted in object::map_definitions()? {
            let name = &wanted.name;
            let pin = self.location.path("maps").join(name);
            let info = MapData::from_pin(&pin).and_then(|map| {
                let info = map.info()?;
                Ok((info.map_type()? as u32, info.key_size(), info.value_size()))
            });
            let found = info.map_err(|_| differs(format!("it has no map {name}")))?;
            // The ring buffer's sizes are both 0 in the kernel, whatever the object says.
            let sizes = if found.1 == 0 { (0, 0) } else { (wanted.key_size, wanted.value_size) };
            let expected = (wanted.kind, sizes.0, sizes.1);
            if found != expected {
                let difference = format!(
                    "its map {name} has type {}, keys of {} bytes and values of {} bytes, not {}, \
                     {} and {}",
                    found.0, found.1, found.2, expected.0, expected.1, expected.2
                );
                return Err(differs(difference));
            }
        }
        Ok(())
    }

    /// Where the instance lives.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The redirected scope: a directory of the cgroup-v2 hierarchy.
    pub fn scope(&self) -> &Path {
        &self.scope
    }

    /// Whether the scope's processes are refused sockets whose flows no hook sees.
    ///
    /// # Errors
    /// [`Error::UnknownLayout`].
    pub fn refuses_unseen(&self) -> Result<bool, Error> {
        Ok(self.instance()?.refuse_unseen)
    }

    /// The policy that is in force.
    ///
    /// # Errors
    /// [`Error::NotUp`] if the instance was taken down meanwhile; [`Error::UnknownLayout`];
    /// [`Error::Document`].
    pub fn policy(&self) -> Result<Policy, Error> {
        Ok(self.in_force()?.policy)
    }

    /// The policy that is in force, compiled as it was for the kernel.
    ///
    /// # Errors
    /// As for [`Engine::policy`].
    pub fn compiled(&self) -> Result<CompiledPolicy, Error> {
        let InForce { policy, generation, .. } = self.in_force()?;
        Ok(compile(&policy, generation)?)
    }

    /// The counters, in the order of their numbers.
    ///
    /// # Errors
    /// [`Error::NotUp`], [`Error::UnknownLayout`], [`Error::Map`].
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, Error> {
        self.reading(Tables::counters)
    }

    pub(crate) fn in_force(&self) -> Result<InForce, Error> {
        self.reading(Tables::in_force)
    }

    /// Does something with the tables while nobody changes them.
    pub(crate) fn reading<T>(
        &self,
        read: impl FnOnce(&Tables) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let _lock = self.lock_to_read()?;
        self.instance()?;
        read(&self.tables)
    }

    /// What the instance is, if this version knows its layout.
    pub(crate) fn instance(&self) -> Result<&Instance, Error> {
        self.instance.as_ref().map_err(|difference| Error::UnknownLayout {
            instance: self.location.instance().to_owned(),
            difference: difference.clone(),
        })
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The pin of a program.
    pub(crate) fn program_path(&self, name: &str) -> PathBuf {
        self.location.path("programs").join(name)
    }

    pub(crate) fn links(&self) -> Links {
        Links::of(self.location.directory())
    }
}

/// Refuses to go on without the capabilities that all this needs.
pub(crate) fn check_privileges() -> Result<(), Error> {
    let needed = [
        (CapabilitySet::BPF, "CAP_BPF"),
        (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
        (CapabilitySet::PERFMON, "CAP_PERFMON"),
        (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    ];
    let held = capabilities(None)
        .map_err(Error::io("read the capabilities of", "this process"))?
        .effective;
    let missing = missing_capabilities(held, &needed);
    if missing.is_empty() { Ok(()) } else { Err(Error::NotPrivileged { missing }) }
}

/// The names of the capabilities that are not held. `CAP_SYS_ADMIN` stands for those of BPF.
fn missing_capabilities(held: CapabilitySet, needed: &[(CapabilitySet, &'static str)]) -> String {
    let implied = if held.contains(CapabilitySet::SYS_ADMIN) {
        CapabilitySet::BPF | CapabilitySet::PERFMON
    } else {
        CapabilitySet::empty()
    };
    let missing = needed.iter().filter(|(one, _)| !(held | implied).contains(*one));
    missing.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

/// Builds an instance aside and gives it its name at the end. The lock of all instances is held.
fn build(
    location: &Location,
    options: &UpOptions,
    capacities: &Capacities,
    scope: &Place,
) -> Result<(), Error> {
    let workshop = Workshop::new(location.workshop())?;
    let maps = workshop.path.join("maps");
    let programs = workshop.path.join("programs");
    for name in ["maps", "programs", "links", "reader"] {
        create_directory(&workshop.path.join(name))?;
    }
    let loaded = object::load(Some(&maps), Some(capacities))?;
    pin_programs(&loaded, &programs)?;
    let instance = Instance {
        max_filters: options.max_filters,
        build: BuildId::own(),
        refuse_unseen: options.refuse_unseen,
        scope_id: scope.id,
        scope: scope.path.clone(),
    };
    let tables = Tables::at(maps);
    tables.write_config(options.udp_idle)?;
    tables.create_keys()?;
    tables.create_instance(&instance)?;
    let plan = plan(&instance, &Policy::new())?;
    Links::of(&workshop.path).attach_missing(&plan, |_| false)?;
    workshop.rename(location.directory())
}

/// A directory in which an instance is built, and which goes with all that is in it if that fails.
struct Workshop {
    path: PathBuf,
    done: bool,
}

impl Workshop {
    fn new(path: PathBuf) -> Result<Self, Error> {
        create_directory(&path)?;
        Ok(Self { path, done: false })
    }

    fn rename(mut self, to: &Path) -> Result<(), Error> {
        fs::rename(&self.path, to).map_err(Error::io("create", to.display()))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = tear_down(&self.path)
        {
            tracing::warn!("{error}");
        }
    }
}

/// Removes what is left of an instance that is not up; gives whether there was anything. Whoever
/// left it is dead: the lock of all instances is ours.
fn sweep(location: &Location) -> Result<bool, Error> {
    let remains = location.workshop();
    let found = remains.exists();
    if found {
        tear_down(&remains)?;
    }
    if !Tables::of(location).is_closed() {
        return Ok(found);
    }
    take_apart(location)?;
    Ok(true)
}

/// Removes an instance, which loses its name first: one with a name is whole. The lock of all
/// instances is held.
fn take_apart(location: &Location) -> Result<(), Error> {
    let (directory, remains) = (location.directory(), location.workshop());
    if remains.exists() {
        tear_down(&remains)?;
    }
    fs::rename(directory, &remains).map_err(Error::io("remove", directory.display()))?;
    tear_down(&remains)
}

/// Detaches and removes everything below a directory, and it too.
fn tear_down(directory: &Path) -> Result<(), Error> {
    Links::of(directory).detach_all()?;
    remove_all(directory)
}

pub(crate) fn remove_all(directory: &Path) -> Result<(), Error> {
    fs::remove_dir_all(directory).map_err(Error::io("remove", directory.display()))
}

fn pin_programs(loaded: &aya::Ebpf, directory: &Path) -> Result<(), Error> {
    for (name, _) in loaded.programs() {
        let pin = directory.join(name);
        sys::pin(object::program(loaded, name)?.as_fd(), &pin)
            .map_err(Error::io("pin the program", pin.display()))?;
    }
    Ok(())
}

/// New programs for old ones.
struct Replacement {
    old: PathBuf,
    new: PathBuf,
}

impl Replacement {
    fn new(location: &Location, new: &Path) -> Self {
        Self { old: location.path("programs"), new: new.to_owned() }
    }

    /// Updates the links; gives how many got a new program, and how many have no cgroup any more.
    /// If one cannot be, the others get their old programs back.
    fn carry_out(&self, links: &[Pinned]) -> Result<(usize, usize), Error> {
        let mut replaced = Vec::new();
        let mut defunct = 0;
        for link in links {
            match update(link, &self.new) {
                Ok(Some(())) => replaced.push(link),
                Ok(None) => defunct += 1,
                Err(error) => {
                    for link in replaced {
                        if let Err(second) = update(link, &self.old) {
                            tracing::error!("{second}");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok((replaced.len(), defunct))
    }
}

/// Gives a link its program from a directory of pins; `None` if its cgroup is gone, or if there is
/// no such program.
fn update(link: &Pinned, programs: &Path) -> Result<Option<()>, Error> {
    let Some(hook) = object::hooks().find(|hook| hook.name == link.hook) else {
        return Ok(None);
    };
    let path = programs.join(hook.program);
    let program = sys::open_pin(&path).map_err(Error::io("open the program", path.display()))?;
    match sys::update_link(link.open()?.as_fd(), program.as_fd()) {
        Ok(()) => Ok(Some(())),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(None),
        Err(error) => Err(Error::io("update the link", link.path.display())(error)),
    }
}

#[cfg(test)]
mod tests {
    use carnet_core::object::{CgroupRef, NewService};
    use carnet_testbed::{BpfDirectory, Cgroup, require_root};

    use super::*;
    use crate::object::{Hook, SCOPE_HOOKS, SERVICE_HOOKS};

    /// Somebody else's program that claims a hook of a cgroup for itself, until the cgroup goes.
    fn claim(cgroup: &Cgroup, hook: &Hook) {
        let loaded = object::load(None, None).unwrap();
        let program = object::program(&loaded, hook.program).unwrap();
        let place = Place::at(cgroup.path()).unwrap().open().unwrap();
        sys::exclusive::attach(program.as_fd(), place.as_fd(), hook.attach_type).unwrap();
    }

    fn assert_claimed(error: &Error) {
        assert!(matches!(error, Error::Attach { .. }), "{error}");
        assert!(error.to_string().contains("attached exclusively"), "{error}");
    }

    #[test]
    fn where_somebody_else_claims_a_hook_nothing_is_left_behind() {
        require_root().unwrap();
        let scope = Cgroup::create("carnet-engine-claimed").unwrap();
        let bpffs = BpfDirectory::create("carnet-engine-claimed").unwrap();
        let location = Location::new(Some(bpffs.path().to_owned()), "one").unwrap();

        // The last hook that is attached.
        let claimed = scope.child("claimed").unwrap();
        claim(&claimed, &SCOPE_HOOKS[4]);
        let error = Engine::up(&location, &UpOptions::new(claimed.path())).unwrap_err();
        assert_claimed(&error);
        assert!(!bpffs.path().join("carnet").exists());
        let open = Place::at(claimed.path()).unwrap().open().unwrap();
        for Hook { attach_type, .. } in &SCOPE_HOOKS[..4] {
            let programs = sys::effective_programs(open.as_fd(), *attach_type).unwrap();
            assert!(programs.is_empty(), "{attach_type:?} {programs:?}");
        }

        // A service's.
        let calm = scope.child("calm").unwrap();
        let service = calm.child("service").unwrap();
        claim(&service, &SERVICE_HOOKS[1]);
        let mut engine = Engine::up(&location, &UpOptions::new(calm.path())).unwrap();
        let place = Place::at(service.path()).unwrap();
        let error = engine
            .transact(|policy| {
                policy.add_provider("acme", "").unwrap();
                let cgroup = CgroupRef { path: format!("/{}", place.path.display()), id: place.id };
                policy.add_service(NewService::new("scan", "acme", cgroup)).unwrap();
                Ok::<_, Error>(())
            })
            .unwrap_err();
        assert_claimed(&error);
        assert_eq!(engine.policy().unwrap(), Policy::new());
        assert!(engine.links().pinned().unwrap().iter().all(|link| link.cgroup == calm.id()));
        engine.down().unwrap();
        assert!(!bpffs.path().join("carnet").exists());
    }

    #[test]
    fn sys_admin_stands_for_the_capabilities_that_were_split_from_it() {
        let needed = [
            (CapabilitySet::BPF, "CAP_BPF"),
            (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
            (CapabilitySet::PERFMON, "CAP_PERFMON"),
        ];
        let missing = |held| missing_capabilities(held, &needed);
        assert_eq!(missing(CapabilitySet::empty()), "CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON");
        assert_eq!(missing(CapabilitySet::SYS_ADMIN), "CAP_NET_ADMIN");
        assert_eq!(missing(CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN), "");
    }
}

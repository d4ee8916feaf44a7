//! What a person names, as the kernel knows it: cgroups, executables, network namespaces,
//! processes.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    net::{SocketAddr, ToSocketAddrs as _},
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use carnet_core::{
    explain::Process,
    object::{CgroupCondition, CgroupRef, ExecutableCondition, NetnsCondition},
};
use carnet_engine::Engine;

use crate::failure::Failure;

/// A cgroup that exists.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// Its path below the root of the hierarchy, with a slash before it.
    pub(crate) path: String,
    /// The inode number of its directory.
    pub(crate) id: u64,
    /// Depth below the root.
    pub(crate) level: u32,
}

impl Cgroup {
    /// The cgroup with this directory, or with this path below the root of the hierarchy, as
    /// `/proc/PID/cgroup` and systemd write it.
    pub(crate) fn find(name: &Path) -> Result<Self, Failure> {
        let root = root()?;
        let below = root.join(name.strip_prefix("/").unwrap_or(name));
        let unknown = || {
            Failure::new(format_args!("there is no cgroup {}", name.display())).with_hint(
                format_args!(
                    "name a directory below {}, or a path as in /proc/PID/cgroup",
                    root.display()
                ),
            )
        };
        let named = fs::canonicalize(name).ok().filter(|path| path.starts_with(&root));
        let directory = match named {
            Some(directory) => directory,
            None => fs::canonicalize(&below).map_err(|_| unknown())?,
        };
        if !directory.starts_with(&root) || !directory.is_dir() {
            return Err(unknown());
        }
        let (id, level) = Engine::resolve_cgroup(&directory)?;
        let path = directory.strip_prefix(&root).unwrap_or(Path::new(""));
        let path = format!("/{}", path.display());
        Ok(Self { directory, path, id, level })
    }

    /// The cgroup of a systemd unit. systemd names it after the unit, somewhere below the slices.
    pub(crate) fn of_unit(unit: &str) -> Result<Self, Failure> {
        let root = root()?;
        let mut found = Vec::new();
        let mut waiting = vec![root.clone()];
        while let Some(directory) = waiting.pop() {
            // It may have gone meanwhile.
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    found.extend((entry.file_name() == *unit).then(|| entry.path()));
                    waiting.push(entry.path());
                }
            }
        }
        match &found[..] {
            [one] => Self::find(one),
            [] => Err(Failure::new(format_args!("no cgroup is that of a systemd unit {unit}"))
                .with_hint(
                    "write the whole name, such as squid.service, and start the unit first",
                )),
            several => {
                let below = |path: &PathBuf| {
                    format!("/{}", path.strip_prefix(&root).unwrap_or(path).display())
                };
                let paths: Vec<_> = several.iter().map(below).collect();
                Err(Failure::new(format_args!("several cgroups are named {unit}"))
                    .with_hint(format_args!("choose one with --cgroup: {}", paths.join(", "))))
            }
        }
    }

    pub(crate) fn reference(self) -> CgroupRef {
        CgroupRef { path: self.path, id: self.id }
    }

    pub(crate) fn condition(self) -> CgroupCondition {
        CgroupCondition { path: self.path, id: self.id, level: self.level }
    }

    /// Whether there are processes in it, or in a cgroup below it.
    pub(crate) fn populated(&self) -> Result<bool, Failure> {
        let path = self.directory.join("cgroup.events");
        let events =
            fs::read_to_string(&path).map_err(|error| Failure::because(path.display(), &error))?;
        Ok(events.lines().any(|line| line == "populated 1"))
    }

    /// The ids of its ancestors and its own, by level.
    pub(crate) fn lineage(&self) -> Result<Vec<u64>, Failure> {
        let root = root()?;
        let mut lineage = Vec::new();
        for ancestor in self.directory.ancestors().take_while(|a| a.starts_with(&root)) {
            let metadata = fs::metadata(ancestor)
                .map_err(|error| Failure::because(ancestor.display(), &error))?;
            lineage.push(metadata.ino());
        }
        lineage.reverse();
        Ok(lineage)
    }
}

/// The directory of the root of the cgroup-v2 hierarchy.
pub(crate) fn root() -> Result<PathBuf, Failure> {
    Ok(carnet_engine::cgroup::mount_point()?)
}

/// The path of an executable, as a filter shows it.
pub(crate) fn executable(name: &Path) -> Result<PathBuf, Failure> {
    let path = fs::canonicalize(name).map_err(|error| {
        let failure = Failure::because(format_args!("executable {}", name.display()), &error);
        match in_path(name) {
            Some(found) => failure.with_hint(format_args!("did you mean {}?", found.display())),
            None => failure,
        }
    })?;
    if !path.is_file() {
        return Err(Failure::new(format_args!("{} is no executable file", path.display())));
    }
    Ok(path)
}

/// The executable condition for a path that [`executable()`] returned.
pub(crate) fn executable_condition(
    engine: &Engine,
    path: &Path,
) -> Result<ExecutableCondition, Failure> {
    let file = engine.resolve_executable(path)?;
    Ok(ExecutableCondition { path: path.display().to_string(), file })
}

/// Where the shell would find a command.
fn in_path(name: &Path) -> Option<PathBuf> {
    let bare = matches!(name.components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    let directories = env::var_os("PATH").filter(|_| bare)?;
    env::split_paths(&directories).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// A network namespace as a person names it: `pid:N`, or a path such as `/run/netns/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NetworkNamespace {
    Of(Pid),
    At(PathBuf),
}

impl NetworkNamespace {
    pub(crate) fn condition(&self) -> Result<NetnsCondition, Failure> {
        Ok(NetnsCondition { name: self.to_string(), cookie: self.cookie()? })
    }

    /// Its cookie.
    pub(crate) fn cookie(&self) -> Result<u64, Failure> {
        Ok(Engine::resolve_netns(&self.path()?)?)
    }

    /// Its path.
    pub(crate) fn path(&self) -> Result<PathBuf, Failure> {
        match self {
            Self::Of(pid) => pid.entry("ns/net"),
            Self::At(path) => Ok(path.clone()),
        }
    }
}

impl fmt::Display for NetworkNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Of(pid) => write!(f, "pid:{pid}"),
            Self::At(path) => path.display().fmt(f),
        }
    }
}

impl FromStr for NetworkNamespace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("pid:") {
            Some(pid) => pid.parse().map(Self::Of),
            None if text.contains('/') => Ok(Self::At(text.into())),
            None => Err(format!(
                "write a path, such as /run/netns/{text}, or pid:N for that of a process"
            )),
        }
    }
}

/// What network namespaces are called: this command's, and those in `/run/netns`.
pub(crate) struct NamespaceNames {
    own: Option<u64>,
    names: BTreeMap<u64, String>,
}

impl NamespaceNames {
    /// The names as they are now. What cannot be asked has none.
    pub(crate) fn known() -> Self {
        let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let named = entries.filter_map(|entry| {
            let path = entry.path();
            Some((Engine::resolve_netns(&path).ok()?, path.display().to_string()))
        });
        Self { own: Engine::own_netns().ok(), names: named.collect() }
    }

    /// Whether it is this command's.
    pub(crate) fn is_own(&self, cookie: u64) -> bool {
        self.own == Some(cookie)
    }

    /// The name of the one with this cookie, or what can be said of one without.
    pub(crate) fn name(&self, cookie: u64) -> String {
        match self.names.get(&cookie) {
            Some(name) => name.clone(),
            None if self.is_own(cookie) => "this command's".into(),
            None => format!("cookie:{cookie}"),
        }
    }
}

/// The number of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pid(pub(crate) u32);

impl Pid {
    /// Path of something in the process's directory below `/proc`, if there is such a process.
    fn entry(self, name: &str) -> Result<PathBuf, Failure> {
        let directory = PathBuf::from(format!("/proc/{self}"));
        if !directory.exists() {
            return Err(Failure::new(format_args!("there is no process {self}")));
        }
        Ok(directory.join(name))
    }

    fn read(self, name: &str) -> Result<String, Failure> {
        let path = self.entry(name)?;
        fs::read_to_string(&path).map_err(|error| Failure::because(path.display(), &error))
    }

    /// Checks that there is such a process.
    pub(crate) fn check(self) -> Result<(), Failure> {
        self.entry("").map(|_| ())
    }

    /// Its cgroup.
    pub(crate) fn cgroup(self) -> Result<Cgroup, Failure> {
        let table = self.read("cgroup")?;
        match table.lines().find_map(|line| line.strip_prefix("0::")) {
            Some(path) => Cgroup::find(Path::new(path)),
            None => Err(Failure::new(format_args!("process {self} has no cgroup-v2 cgroup"))),
        }
    }

    /// What filters can test of it. A thread of the kernel, for example, has no executable.
    pub(crate) fn describe(self, engine: &Engine) -> Result<Process, Failure> {
        self.check()?;
        Ok(engine.describe_process(self.0)?)
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Pid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<i32>() {
            Ok(number @ 1..) => Ok(Self(number.unsigned_abs())),
            _ => Err(format!("write a number from 1 to {}", i32::MAX)),
        }
    }
}

/// A host and a port as a person writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort(String);

impl HostPort {
    /// The addresses: the one that was written, or those of the host.
    pub(crate) fn addresses(&self) -> Result<Vec<SocketAddr>, Failure> {
        let found = self.0.to_socket_addrs();
        let found =
            found.map_err(|error| Failure::because(format_args!("looking up {self}"), &error))?;
        let mut addresses = Vec::new();
        for address in found {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(Failure::new(format_args!("{self} has no address")));
        }
        Ok(addresses)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostPort {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or("write HOST:PORT")?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.contains(':') && !bracketed {
            return Err("write an IPv6 address in brackets, such as [2001:db8::1]:443");
        }
        if host.is_empty() || (bracketed && text.parse::<SocketAddr>().is_err()) {
            return Err("write HOST:PORT, such as 192.0.2.1:443");
        }
        match port.parse::<u16>() {
            Ok(1..) => Ok(Self(text.to_owned())),
            _ => Err("a port is a number from 1 to 65535"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        for good in ["192.0.2.1:443", "[2001:db8::1]:1", "example.org:65535"] {
            assert_eq!(good.parse::<HostPort>().unwrap().to_string(), good);
        }
        for bad in ["", ":80", "host", "host:", "host:0", "host:65536", "::1:80", "[x]:80", "[::1]"]
        {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn network_namespaces() {
        assert_eq!("pid:7".parse(), Ok(NetworkNamespace::Of(Pid(7))));
        assert_eq!("/run/netns/a".parse(), Ok(NetworkNamespace::At("/run/netns/a".into())));
        for bad in ["pid:", "pid:0", "pid:-1", "pid:x", "a", ""] {
            assert!(bad.parse::<NetworkNamespace>().is_err(), "{bad}");
        }
    }
}

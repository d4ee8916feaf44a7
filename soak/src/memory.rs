//! A cgroup of the memory controller's, in which all of a soak runs: what the kernel keeps for it is
//! counted there, be it for sockets, maps or programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Bytes of kernel memory.
pub(crate) type Bytes = u64;

/// How often the kernel's memory is read at rest; the least counts.
const READINGS: u32 = 20;
/// How long apart.
const APART: Duration = Duration::from_millis(250);

/// The cgroup. This process is in it, and whatever it starts.
#[derive(Debug)]
pub(crate) struct MemoryGroup {
    path: PathBuf,
    parent: PathBuf,
    /// Whether the hierarchy is of version 2.
    unified: bool,
}

impl MemoryGroup {
    /// Makes it and moves this process there; `None` where the kernel accounts no memory to cgroups.
    ///
    /// # Errors
    /// When it cannot be made or entered.
    pub(crate) fn enter() -> Result<Option<Self>> {
        let Some((parent, unified)) = own()? else {
            return Ok(None);
        };
        let path = parent.join(format!("carnet-soak-memory-{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let group = Self { path, parent, unified };
        move_to(&group.path)?;
        Ok(Some(group))
    }

    /// Kernel memory that is accounted to it.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn kernel(&self) -> Result<Bytes> {
        let read = |name: &str| {
            let path = self.path.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        if !self.unified {
            return Ok(read("memory.kmem.usage_in_bytes")?.trim().parse()?);
        }
        let text = read("memory.stat")?;
        let line = text.lines().find_map(|line| line.strip_prefix("kernel "));
        Ok(line.context("memory.stat does not tell of the kernel")?.trim().parse()?)
    }

    /// Kernel memory when nothing goes on: the least of some readings, between which the kernel gives back
    /// what it can.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn at_rest(&self) -> Result<Bytes> {
        let mut least = Bytes::MAX;
        for _ in 0..READINGS {
            self.reclaim();
            thread::sleep(APART);
            least = least.min(self.kernel()?);
        }
        Ok(least)
    }

    /// Has the kernel give back what it keeps only since there is room: names of files, for example.
    fn reclaim(&self) {
        let (name, value) =
            if self.unified { ("memory.reclaim", "256M") } else { ("memory.force_empty", "0") };
        // It reports an error if not all could be given back, which it never can.
        let _ = fs::write(self.path.join(name), value);
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let left = move_to(&self.parent);
        let removed = left.and_then(|()| {
            fs::remove_dir(&self.path).with_context(|| format!("removing {}", self.path.display()))
        });
        if let Err(error) = removed {
            eprintln!("{error:#}");
        }
    }
}

fn move_to(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), process::id().to_string())
        .with_context(|| format!("entering {}", cgroup.display()))
}

/// The directory of the cgroup of the memory controller in which this process is, and whether it is of
/// version 2.
fn own() -> Result<Option<(PathBuf, bool)>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mounts")?;
    let memberships = fs::read_to_string("/proc/self/cgroup").context("reading the cgroups")?;
    let member = |controller: &str| {
        memberships.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            controllers.split(',').any(|name| name == controller).then(|| path.to_owned())
        })
    };
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(at), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let found = match kind {
            "cgroup" if options.split(',').any(|option| option == "memory") => member("memory"),
            "cgroup2" => member(""),
            _ => None,
        };
        let Some(found) = found else { continue };
        let directory = Path::new(at).join(found.trim_start_matches('/'));
        let usage = if kind == "cgroup" { "memory.kmem.usage_in_bytes" } else { "memory.current" };
        if directory.join(usage).is_file() {
            return Ok(Some((directory, kind == "cgroup2")));
        }
    }
    Ok(None)
}

//! Child cgroups, and the processes in them.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    process::{self, Child, Command},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
};

use crate::{
    Error,
    mounts::mount_points,
    sys,
    unique::{check_component, unique_name},
};

const OWN_CGROUP: &str = "/proc/self/cgroup";

/// How long killed processes may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A cgroup (version 2) of one's own: a directory that this value made.
///
/// Dropping it kills every process in it and in the cgroups below it, and removes it and them,
/// children first. BPF programs attached to it are detached by the kernel.
///
/// The unit is the process: moving one moves all its threads. The calling process is therefore
/// never moved (it would take the whole test run with it); tests put child processes in.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Makes a child of the caller's own cgroup, with a unique name that begins with `prefix`.
    /// (Where the caller's own cgroup lies outside what is mounted here, a child of the mount's
    /// root.)
    ///
    /// # Errors
    /// [`Error::NoCgroup2`] if no cgroup2 hierarchy is mounted; [`Error::Argument`] if `prefix` is
    /// no file name; [`Error::Io`] if the directory cannot be made (`EACCES` without root).
    pub fn create(prefix: &str) -> Result<Self, Error> {
        check_component(prefix)?;
        let parent = own_cgroup()?;
        loop {
            let path = parent.join(unique_name(prefix));
            match fs::create_dir(&path) {
                Ok(()) => return Self::adopt(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create cgroup", path.display())(error)),
            }
        }
    }

    /// Makes a cgroup below this one. Whichever of the two is dropped first, both are removed.
    ///
    /// # Errors
    /// [`Error::Argument`] if `name` is no file name; [`Error::Io`] if the directory cannot be made
    /// (`EEXIST` if there is one of that name).
    pub fn child(&self, name: &str) -> Result<Self, Error> {
        check_component(name)?;
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(Error::io("create cgroup", path.display()))?;
        Self::adopt(path)
    }

    /// Takes charge of a directory that was just made.
    fn adopt(path: PathBuf) -> Result<Self, Error> {
        let mut cgroup = Self { path, id: 0 };
        let metadata = fs::metadata(&cgroup.path)
            .map_err(Error::io("examine cgroup", cgroup.path.display()))?;
        cgroup.id = metadata.ino();
        Ok(cgroup)
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id: the number by which BPF programs know it (`bpf_get_current_cgroup_id`).
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Moves a process, with all its threads, into this cgroup.
    ///
    /// # Errors
    /// [`Error::Argument`] for the calling process; [`Error::Io`] if there is no such process
    /// (`ESRCH`).
    pub fn add_process(&self, pid: u32) -> Result<(), Error> {
        if pid == 0 || pid == process::id() {
            return Err(Error::argument(
                pid.to_string(),
                "the id of another process than the calling one",
            ));
        }
        let file = self.path.join("cgroup.procs");
        fs::write(&file, pid.to_string())
            .map_err(Error::io("move a process into cgroup", self.path.display()))
    }

    /// Makes the process of `command` start in this cgroup: no instruction of the program runs
    /// outside it.
    ///
    /// # Errors
    /// [`Error::Io`] if the cgroup cannot be opened. A failure to enter is an error of
    /// `Command::spawn`.
    pub fn enter_command(&self, command: &mut Command) -> Result<(), Error> {
        let path = self.path.join("cgroup.procs");
        let processes =
            File::options().write(true).open(&path).map_err(Error::io("open", path.display()))?;
        sys::enter_cgroup_before_exec(command, processes);
        Ok(())
    }

    /// Starts a command in this cgroup. The child is killed when the cgroup is dropped; to have it
    /// waited for as well, use [`Process`](crate::Process).
    ///
    /// # Errors
    /// [`Error::Io`] if the cgroup cannot be opened or the process not started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, Error> {
        self.enter_command(command)?;
        let program = command.get_program().to_string_lossy().into_owned();
        command.spawn().map_err(Error::io("start", program))
    }

    /// The processes in this cgroup, without those in cgroups below it.
    ///
    /// # Errors
    /// [`Error::Io`] if the cgroup is gone.
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        processes_in(&self.path)
    }

    /// Kills every process in this cgroup and in those below it, and waits until they are gone.
    ///
    /// # Errors
    /// [`Error::Io`] if the cgroup is gone; [`Error::TimedOut`] if a process does not go.
    pub fn kill(&self) -> Result<(), Error> {
        let deadline = Instant::now() + KILL_DEADLINE;
        let switch = self.path.join("cgroup.kill");
        let signalled = match fs::metadata(&switch) {
            Ok(_) => {
                fs::write(&switch, "1").map_err(Error::io("write", switch.display()))?;
                true
            }
            // Before Linux 5.14.
            Err(_) => false,
        };
        let events_path = self.path.join("cgroup.events");
        let failed = |operation| Error::io(operation, events_path.display());
        let mut events = File::open(&events_path).map_err(failed("open"))?;
        loop {
            if !signalled {
                kill_one_by_one(&self.path)?;
            }
            // Reading arms the file: it becomes ready when its contents change after this.
            let mut text = String::new();
            events.rewind().map_err(failed("read"))?;
            events.read_to_string(&mut text).map_err(failed("read"))?;
            if text.lines().any(|line| line == "populated 0") {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::TimedOut {
                    what: format!("the killed processes in {} to end", self.path.display()),
                    after: KILL_DEADLINE,
                });
            }
            // A process that forked while it was being killed by hand needs another round soon.
            let pause = if signalled { left } else { left.min(Duration::from_millis(10)) };
            wait_for_change(&events, pause).map_err(failed("poll"))?;
        }
    }

    fn remove(&self) -> Result<(), Error> {
        if !self.path.exists() {
            // Removed with the parent.
            return Ok(());
        }
        self.kill()?;
        remove_tree(&self.path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("carnet-testbed: {error:?}");
        }
    }
}

/// The directory of the caller's own cgroup.
fn own_cgroup() -> Result<PathBuf, Error> {
    let mount = mount_points("cgroup2")?.into_iter().next().ok_or(Error::NoCgroup2)?;
    let table = fs::read_to_string(OWN_CGROUP).map_err(Error::io("read", OWN_CGROUP))?;
    let own = table.lines().find_map(|line| line.strip_prefix("0::/")).map(Path::new);
    // A cgroup outside the cgroup namespace reads "/../…"; one outside the mount does not exist.
    Ok(match own {
        Some(own)
            if own.components().all(|part| matches!(part, Component::Normal(_)))
                && mount.join(own).is_dir() =>
        {
            mount.join(own)
        }
        _ => mount,
    })
}

fn processes_in(cgroup: &Path) -> Result<Vec<u32>, Error> {
    let path = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(Error::io("read", path.display()))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// The cgroups directly below one.
fn children_of(cgroup: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = || Error::io("list", cgroup.display());
    let mut children = Vec::new();
    for entry in fs::read_dir(cgroup).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        if entry.file_type().map_err(failed())?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

/// Sends SIGKILL to each process in a cgroup and below it.
fn kill_one_by_one(cgroup: &Path) -> Result<(), Error> {
    for child in children_of(cgroup)? {
        kill_one_by_one(&child)?;
    }
    for pid in processes_in(cgroup)? {
        // 0 stands for a process of another pid namespace, which cannot be named from here.
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            match kill_process(pid, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(errno) => {
                    return Err(Error::io("kill a process in", cgroup.display())(errno.into()));
                }
            }
        }
    }
    Ok(())
}

/// Removes an empty cgroup and the empty cgroups below it.
fn remove_tree(cgroup: &Path) -> Result<(), Error> {
    for child in children_of(cgroup)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(cgroup) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove cgroup", cgroup.display())(error))
        }
        _ => Ok(()),
    }
}

/// Waits until a `cgroup.events` changes, or for `longest`.
fn wait_for_change(events: &File, longest: Duration) -> io::Result<()> {
    let timeout = Timespec::try_from(longest).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(events, PollFlags::PRI)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, process::Stdio};

    use super::*;

    #[test]
    fn killing_one_by_one_works_without_the_kernel_switch() {
        crate::require_root().unwrap();
        let cgroup = Cgroup::create("carnet-testbed-one-by-one").unwrap();
        let inner = cgroup.child("inner").unwrap();
        let mut children = [&cgroup, &inner]
            .map(|place| place.spawn(Command::new("cat").stdin(Stdio::piped())).unwrap());
        kill_one_by_one(cgroup.path()).unwrap();
        for child in &mut children {
            assert_eq!(child.wait().unwrap().signal(), Some(9));
        }
    }
}

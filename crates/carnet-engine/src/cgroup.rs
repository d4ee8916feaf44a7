//! Cgroups of the version-2 hierarchy: finding them, making them, having commands start in them.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use carnet_core::object::CgroupRef;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::statfs,
    thread::CapabilitySet,
};

use crate::{Error, mounts::mount_points, sys};

/// `CGROUP2_SUPER_MAGIC`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// The id of the hierarchy's root.
const ROOT_ID: u64 = 1;
/// How long killed processes may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Where the cgroup-v2 hierarchy is mounted, from `/proc/self/mounts`.
///
/// # Errors
/// [`Error::NoCgroup2`] if it is not; [`Error::Io`] if the mounts cannot be read.
pub fn mount_point() -> Result<PathBuf, Error> {
    mount_points("cgroup2")?.into_iter().next().ok_or(Error::NoCgroup2)
}

/// An existing cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// Its path below the hierarchy's root, without a slash before it.
    pub(crate) path: PathBuf,
    /// Its id: the inode number of its directory.
    pub(crate) id: u64,
}

impl Place {
    /// The cgroup with this directory.
    pub(crate) fn at(path: &Path) -> Result<Self, Error> {
        let mount = mount_point()?;
        let directory = fs::canonicalize(path).map_err(Error::io("find cgroup", path.display()))?;
        let not_one = || Error::NotACgroup { path: path.to_owned(), mount: mount.clone() };
        let below = directory.strip_prefix(&mount).map_err(|_| not_one())?.to_owned();
        let failed = || ("examine", directory.display().to_string());
        let kind = statfs(&directory).map_err(Error::io(failed().0, failed().1))?.f_type;
        let metadata = fs::metadata(&directory).map_err(Error::io(failed().0, failed().1))?;
        if kind as u64 & 0xffff_ffff != CGROUP2_MAGIC || !metadata.is_dir() {
            return Err(not_one());
        }
        let id = metadata.ino();
        Ok(Self { directory, path: below, id })
    }

    /// The cgroup that an object of the policy refers to; `None` if it is gone, even if there is
    /// another one of its path.
    pub(crate) fn referred_by(cgroup: &CgroupRef) -> Result<Option<Self>, Error> {
        let directory = mount_point()?.join(below_root(&cgroup.path));
        if !directory.is_dir() {
            return Ok(None);
        }
        Ok(Some(Self::at(&directory)?).filter(|place| place.id == cgroup.id))
    }

    /// Depth below the hierarchy's root.
    pub(crate) fn level(&self) -> Result<u32, Error> {
        let mount = mount_point()?;
        let root = fs::metadata(&mount).map_err(Error::io("examine", mount.display()))?.ino();
        if root != ROOT_ID {
            return Err(Error::CgroupNamespace { root });
        }
        Ok(self.path.components().count() as u32)
    }

    /// Opens its directory.
    pub(crate) fn open(&self) -> Result<File, Error> {
        File::open(&self.directory).map_err(Error::io("open cgroup", self.directory.display()))
    }
}

/// A path below the hierarchy's root as objects write it, without the slash before it.
pub(crate) fn below_root(path: &str) -> &Path {
    Path::new(path.trim_start_matches('/'))
}

/// A cgroup for processes that the caller starts.
///
/// It stays when this value is dropped: [`Cgroup::remove`] removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Makes a cgroup of this name below another one; an existing one is taken as it is.
    ///
    /// # Errors
    /// [`Error::NotACgroup`] if `parent` is no directory of the cgroup-v2 hierarchy; [`Error::Io`]
    /// if the cgroup cannot be made.
    pub fn create_under(parent: &Path, name: &str) -> Result<Self, Error> {
        let path = Place::at(parent)?.directory.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create cgroup", path.display())(error));
            }
            _ => {}
        }
        let Place { directory, id, .. } = Place::at(&path)?;
        Ok(Self { path: directory, id })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id: the inode number of its directory.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Makes the process of `command` start in this cgroup: no instruction of the program runs
    /// outside it.
    ///
    /// # Errors
    /// [`Error::Io`] if the cgroup cannot be opened. A failure to enter is an error of
    /// [`Command::spawn`].
    pub fn enter_command(&self, command: &mut Command) -> Result<(), Error> {
        let path = self.path.join("cgroup.procs");
        let processes =
            File::options().write(true).open(&path).map_err(Error::io("open", path.display()))?;
        sys::enter_before_exec(command, OwnedFd::from(processes));
        Ok(())
    }

    /// Kills every process in this cgroup and in those below it, waits until they are gone, and
    /// removes the cgroup and those below it.
    ///
    /// # Errors
    /// [`Error::Io`] if a process does not go within 10 seconds or a cgroup cannot be removed.
    pub fn remove(self) -> Result<(), Error> {
        self.kill()?;
        remove_tree(&self.path).map_err(Error::io("remove cgroup", self.path.display()))
    }

    fn kill(&self) -> Result<(), Error> {
        let failed = |operation| Error::io::<io::Error>(operation, self.path.display());
        fs::write(self.path.join("cgroup.kill"), "1").map_err(failed("kill the processes of"))?;
        let deadline = Instant::now() + KILL_DEADLINE;
        let mut events = File::open(self.path.join("cgroup.events"))
            .map_err(failed("watch the processes of"))?;
        loop {
            // Reading arms the file: it becomes ready when its contents change after this.
            let mut text = String::new();
            events.rewind().map_err(failed("watch the processes of"))?;
            events.read_to_string(&mut text).map_err(failed("watch the processes of"))?;
            if text.lines().any(|line| line == "populated 0") {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed("end the processes of")(io::ErrorKind::TimedOut.into()));
            }
            let left = Timespec::try_from(left).map_err(|_| {
                failed("watch the processes of")(io::ErrorKind::InvalidInput.into())
            })?;
            let mut polled = [PollFd::new(&events, PollFlags::PRI)];
            match poll(&mut polled, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed("watch the processes of")(errno.into())),
            }
        }
    }
}

/// Makes the process of `command`, and all that it starts, live without `CAP_NET_RAW`: no packet
/// sockets and no raw ones, whoever they become. (In a user namespace that they make they may have
/// it, for network namespaces that are made there.)
pub fn without_raw_sockets(command: &mut Command) {
    sys::drop_capability_before_exec(command, CapabilitySet::NET_RAW);
}

fn remove_tree(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

//! Where an instance lives, and the locks on it.
//!
//! An instance is a directory of a bpffs, `<bpffs>/carnet/<instance>`:
//!
//! | path | what |
//! |---|---|
//! | `maps/NAME` | the maps |
//! | `programs/NAME` | the programs |
//! | `links/cgroup-ID/HOOK` | the links, by the cgroup that they attach a program to |
//! | `reader/` | an empty directory: who reads the events holds a lock on it |
//! | `changing/` | an empty directory: a transaction is under way, or was killed |
//! | `upgrade/` | the new programs of an upgrade that is under way, or was killed |
//!
//! The locks are `flock(2)` on these directories, so that they go with whoever holds them and
//! nothing is left behind elsewhere. `carnet/` is locked while an instance comes or goes; the
//! instance's directory is locked by who changes it, and shared by who reads it.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock, statfs},
    mount::{MountFlags, mount},
};

use crate::{Error, mounts::mount_points};

/// Longest name of an instance, in characters.
pub(crate) const MAX_INSTANCE_NAME: usize = 64;

/// The directory of a bpffs in which instances live.
const PARENT: &str = "carnet";
/// Where a bpffs is mounted if there is none.
const USUAL_BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Where an instance's pins live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    parent: PathBuf,
    instance: String,
    directory: PathBuf,
}

impl Location {
    /// The place of the instance `instance` in the bpffs that is mounted at `bpffs`; with `None`
    /// in the first one that `/proc/self/mounts` lists. If there is none at all, one is mounted
    /// at `/sys/fs/bpf`, which is told through [`tracing`].
    ///
    /// # Errors
    /// [`Error::BadInstance`] if no instance can have the name; [`Error::NotBpffs`] if `bpffs` is
    /// something else; [`Error::NoBpffs`] if there is none and it cannot be mounted.
    pub fn new(bpffs: Option<PathBuf>, instance: &str) -> Result<Self, Error> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if instance.is_empty() || instance.len() > MAX_INSTANCE_NAME || !instance.bytes().all(known)
        {
            return Err(Error::BadInstance { name: instance.to_owned() });
        }
        Ok(Self::below(&find_bpffs(bpffs)?, instance))
    }

    fn below(bpffs: &Path, instance: &str) -> Self {
        let parent = bpffs.join(PARENT);
        let directory = parent.join(instance);
        Self { parent, instance: instance.to_owned(), directory }
    }

    /// All instances in a bpffs, by name. `bpffs` as for [`Location::new`].
    ///
    /// # Errors
    /// As for [`Location::new`], and [`Error::Io`] if the directory cannot be read.
    pub fn list(bpffs: Option<PathBuf>) -> Result<Vec<Self>, Error> {
        let bpffs = find_bpffs(bpffs)?;
        let parent = bpffs.join(PARENT);
        let failed = |error| Error::io::<io::Error>("list", parent.display())(error);
        let entries = match fs::read_dir(&parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            if let Some(name) = name.to_str().filter(|name| !name.starts_with(WORKSHOP)) {
                found.push(Self::below(&bpffs, name));
            }
        }
        found.sort_unstable_by(|a, b| a.instance.cmp(&b.instance));
        Ok(found)
    }

    /// The instance's name.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// The instance's directory, whether it is up or not.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory in which the instance is built before it gets its name, and taken apart when it
    /// has lost it. No instance can have this one.
    pub(crate) fn workshop(&self) -> PathBuf {
        self.parent.join(format!("{WORKSHOP}{}", self.instance))
    }

    /// Locks the directory of all instances, which is made if it is not there.
    pub(crate) fn lock_parent(&self) -> Result<Lock, Error> {
        loop {
            match DirBuilder::new().mode(0o700).create(&self.parent) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("create", self.parent.display())(error));
                }
                _ => {}
            }
            // Whoever held the lock before may have removed the directory.
            if let Some(lock) = Lock::take(&self.parent, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// Removes the directory of all instances if it is empty. Its lock is held.
    pub(crate) fn remove_parent(&self, _lock: &Lock) -> Result<(), Error> {
        match fs::remove_dir(&self.parent) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                Err(Error::io("remove", self.parent.display())(error))
            }
            _ => Ok(()),
        }
    }

    /// Locks the instance against others that change it or read it.
    pub(crate) fn lock_to_change(&self) -> Result<Lock, Error> {
        self.lock(FlockOperation::LockExclusive)
    }

    /// Locks the instance against others that change it.
    pub(crate) fn lock_to_read(&self) -> Result<Lock, Error> {
        self.lock(FlockOperation::LockShared)
    }

    fn lock(&self, operation: FlockOperation) -> Result<Lock, Error> {
        Lock::take(&self.directory, operation)?.ok_or_else(|| self.not_up())
    }

    /// Locks the events for the one who reads them.
    pub(crate) fn lock_reader(&self) -> Result<Lock, Error> {
        match Lock::take(&self.path("reader"), FlockOperation::NonBlockingLockExclusive) {
            Ok(lock) => lock.ok_or_else(|| self.not_up()),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                Err(Error::EventsTaken { instance: self.instance.clone() })
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn not_up(&self) -> Error {
        Error::NotUp { instance: self.instance.clone() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// Begins the name of a workshop; no name of an instance begins so.
const WORKSHOP: char = '+';

/// A lock on a directory, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _directory: File,
}

impl Lock {
    /// Locks a directory; `None` if there is none, or no longer when the lock is got.
    fn take(path: &Path, operation: FlockOperation) -> Result<Option<Self>, Error> {
        let directory = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            directory => directory.map_err(Error::io("open", path.display()))?,
        };
        flock(&directory, operation).map_err(Error::io("lock", path.display()))?;
        let held = directory.metadata().map_err(Error::io("examine", path.display()))?;
        let same = fs::metadata(path)
            .is_ok_and(|there| (there.dev(), there.ino()) == (held.dev(), held.ino()));
        Ok(same.then_some(Self { _directory: directory }))
    }
}

fn find_bpffs(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    if let Some(path) = given {
        let kind = statfs(&path).map_err(Error::io("examine", path.display()))?.f_type;
        return if kind as u64 & 0xffff_ffff == BPF_FS_MAGIC {
            Ok(path)
        } else {
            Err(Error::NotBpffs { path })
        };
    }
    if let Some(path) = mount_points("bpf")?.into_iter().next() {
        return Ok(path);
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RELATIME;
    mount("bpf", USUAL_BPFFS, "bpf", flags, c"mode=0700").map_err(|_| Error::NoBpffs)?;
    tracing::info!("no bpffs was mounted; mounted one at {USUAL_BPFFS}");
    Ok(PathBuf::from(USUAL_BPFFS))
}

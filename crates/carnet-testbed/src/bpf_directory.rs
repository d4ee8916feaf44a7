//! A bpffs of one's own.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{Error, unique::unique_name};

/// A private directory for pinned BPF objects: a bpffs instance of its own, mounted on a fresh
/// temporary directory that every child process sees as well.
///
/// It is a mount of its own even where `/sys/fs/bpf` has one: so tests behave the same on every
/// machine, cannot see each other's pins, and leave an existing bpffs alone.
///
/// Dropping it removes all pins in it, and with them the links and maps that nothing else holds,
/// unmounts it and removes the directory.
#[derive(Debug)]
pub struct BpfDirectory {
    path: PathBuf,
}

impl BpfDirectory {
    /// Mounts a new bpffs, without any pin, on a new directory whose name begins with `prefix`, in
    /// the directory for temporary files.
    ///
    /// # Errors
    /// [`Error::Argument`] if `prefix` is no file name; [`Error::Io`] if the directory cannot be
    /// made or mounted on (`EPERM` without root, `ENODEV` if the kernel has no bpffs).
    pub fn create(prefix: &str) -> Result<Self, Error> {
        crate::unique::check_component(prefix)?;
        let path = loop {
            let path = env::temp_dir().join(unique_name(prefix));
            match fs::create_dir(&path) {
                Ok(()) => break path,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create", path.display())(error)),
            }
        };
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        if let Err(errno) = mount("carnet-testbed", &path, "bpf", flags, c"mode=0755") {
            let error = Error::io("mount a bpffs on", path.display())(errno.into());
            if let Err(error) = fs::remove_dir(&path) {
                eprintln!("carnet-testbed: cannot remove {}: {error}", path.display());
            }
            return Err(error);
        }
        Ok(Self { path })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn remove(&self) -> Result<(), Error> {
        // Unlink first: an unmount alone is lazy if a child still holds the directory open, and
        // would leave its programs attached until then.
        let unlinked = remove_pins(&self.path);
        // A mount has no link to follow: the last component is a directory we made.
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        unmount(&self.path, flags)
            .map_err(|errno| Error::io("unmount", self.path.display())(errno.into()))?;
        fs::remove_dir(&self.path).map_err(Error::io("remove", self.path.display()))?;
        unlinked
    }
}

/// Removes what has been pinned in a bpffs. Names with a dot are the kernel's own (it may put
/// `maps.debug` and `progs.debug` into a new bpffs); nobody else can make or remove them.
fn remove_pins(directory: &Path) -> Result<(), Error> {
    let entries = fs::read_dir(directory).map_err(Error::io("list", directory.display()))?;
    for entry in entries {
        let entry = entry.map_err(Error::io("list", directory.display()))?;
        if entry.file_name().as_encoded_bytes().contains(&b'.') {
            continue;
        }
        let path = entry.path();
        let is_directory =
            fs::symlink_metadata(&path).map_err(Error::io("examine", path.display()))?.is_dir();
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io("remove", path.display()))?;
    }
    Ok(())
}

impl Drop for BpfDirectory {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("carnet-testbed: {error:?}");
        }
    }
}

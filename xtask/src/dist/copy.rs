//! A copy of the source elsewhere, which the second build and the SBOM are made from.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cannot;
use crate::process;

/// Removed with this value.
pub(super) struct Copy {
    /// All of it.
    pub(super) directory: PathBuf,
    /// The checkout's tracked files, as they are now.
    pub(super) source: PathBuf,
}

impl Copy {
    /// Copies the checkout into a directory below `beside` whose name is as long as chance has it.
    pub(super) fn make(root: &Path, beside: &Path) -> Result<Self> {
        let directory = beside.join(format!("elsewhere-{}", std::process::id()));
        fs::create_dir_all(&directory).with_context(|| cannot("create", &directory))?;
        let directory = directory.canonicalize().with_context(|| cannot("find", &directory))?;
        let copy = Self { source: directory.join("a/source"), directory };
        let mut list = Command::new("git");
        let listed = process::read(list.current_dir(root).args(["ls-files", "-z"]))?;
        for name in listed.split_terminator('\0') {
            let (from, to) = (root.join(name), copy.source.join(name));
            // What was removed and not committed yet is not part of the source.
            if !from.is_file() {
                continue;
            }
            let parent = to.parent().with_context(|| cannot("copy", &from))?;
            fs::create_dir_all(parent).with_context(|| cannot("create", parent))?;
            fs::copy(&from, &to).with_context(|| cannot("copy", &from))?;
        }
        Ok(copy)
    }

    /// A home for cargo whose paths are others, with what the real one has downloaded.
    pub(super) fn cargo_home(&self, real: &Path) -> Result<PathBuf> {
        let home = self.directory.join("another/home");
        fs::create_dir_all(&home).with_context(|| cannot("create", &home))?;
        for name in ["config.toml", "registry"] {
            let from = real.join(name);
            if from.exists() {
                symlink(&from, home.join(name)).with_context(|| cannot("link to", &from))?;
            }
        }
        Ok(home)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("    warning: {}: {error}", cannot("remove", &self.directory));
        }
    }
}

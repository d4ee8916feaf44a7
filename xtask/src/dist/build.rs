//! One build of the shipped programs, in which no directory of the machine is named.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cannot;
use crate::cargo::{self, Kind};

/// The system that the programs are built for: linked statically, with a C library of its own.
pub(super) const TARGET: &str = "x86_64-unknown-linux-musl";
/// The profile of the workspace that they are built with.
const PROFILE: &str = "dist";

/// Where a build takes place.
pub(super) struct Build<'a> {
    /// The checkout, or a copy of it.
    pub(super) root: &'a Path,
    /// What cargo builds goes here.
    pub(super) target: &'a Path,
    /// What cargo has downloaded is here.
    pub(super) home: &'a Path,
}

impl Build<'_> {
    /// Builds the programs, given by package and name, and gives their paths in the same order.
    pub(super) fn run(&self, programs: &[(&str, &str)], epoch: &str) -> Result<Vec<PathBuf>> {
        let mut cargo = cargo::cargo(self.root);
        cargo
            .env("CARGO_HOME", self.home)
            .env("CARGO_TARGET_DIR", self.target)
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags())
            .env("CFLAGS", self.c_flags())
            .env("SOURCE_DATE_EPOCH", epoch)
            // Where registries are and how to reach them is the user's business, flags are not.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_INCREMENTAL");
        let mut arguments = vec!["--locked", "--profile", PROFILE, "--target", TARGET, "--bins"];
        arguments.extend(programs.iter().flat_map(|(package, _)| ["--package", package]));
        let built = cargo::build_with(cargo, &arguments)?;
        programs
            .iter()
            .map(|(package, name)| {
                let found = built
                    .iter()
                    .find(|built| built.kind == Kind::Program && built.target == *name)
                    .with_context(|| format!("{package} has no program {name}"))?;
                self.check_paths(&found.executable)?;
                Ok(found.executable.clone())
            })
            .collect()
    }

    /// The directories that differ from machine to machine, and what stands for each.
    fn names(&self) -> [(&Path, &str); 3] {
        // Of several that fit the compiler takes the last.
        [(self.root, "carnet"), (self.target, "target"), (self.home, "cargo")]
    }

    /// The compiler's flags, separated as cargo wants them in `CARGO_ENCODED_RUSTFLAGS`.
    fn flags(&self) -> OsString {
        let flags = self.names().map(|(path, name)| renamed("--remap-path-prefix=", path, name));
        flags.join(std::ffi::OsStr::new("\u{1f}"))
    }

    /// The same for C.
    fn c_flags(&self) -> OsString {
        let flags = self.names().map(|(path, name)| renamed("-ffile-prefix-map=", path, name));
        flags.join(std::ffi::OsStr::new(" "))
    }

    /// Fails if the program names a directory of this machine.
    fn check_paths(&self, program: &Path) -> Result<()> {
        let bytes = fs::read(program).with_context(|| cannot("read", program))?;
        for (path, _) in self.names() {
            let path = path.as_os_str().as_encoded_bytes();
            if bytes.windows(path.len()).any(|window| window == path) {
                let path = String::from_utf8_lossy(path);
                bail!("{} names {path}, a path of this machine", program.display());
            }
        }
        Ok(())
    }
}

fn renamed(option: &str, path: &Path, name: &str) -> OsString {
    let mut flag = OsString::from(option);
    flag.push(path);
    flag.push("=");
    flag.push(name);
    flag
}

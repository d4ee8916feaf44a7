//! One build of the shipped programs, in which no directory of the machine is named.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cannot;
use crate::cargo::{self, Kind};
use crate::process;

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
        let cargo = || {
            let mut cargo = cargo::cargo(self.root);
            cargo
                .env("CARGO_HOME", self.home)
                .env("CARGO_TARGET_DIR", self.target)
                .env("SOURCE_DATE_EPOCH", epoch)
                // Where registries are and how to reach them is the user's business, flags are not.
                .env_remove("RUSTFLAGS")
                .env_remove("CARGO_INCREMENTAL");
            cargo
        };
        // First of all fetch: the registries' directories must be there to be named in the flags.
        process::run(cargo().args(["fetch", "--locked", "--target", TARGET]))?;
        let names = self.names()?;
        let mut build = cargo();
        build
            .env("CARGO_ENCODED_RUSTFLAGS", flags(&names, "--remap-path-prefix=", "\u{1f}"))
            .env("CFLAGS", flags(&names, "-ffile-prefix-map=", " "));
        let mut arguments = vec!["--locked", "--profile", PROFILE, "--target", TARGET, "--bins"];
        arguments.extend(programs.iter().flat_map(|(package, _)| ["--package", package]));
        let built = cargo::build_with(build, &arguments)?;
        programs
            .iter()
            .map(|(package, name)| {
                let found = built
                    .iter()
                    .find(|built| built.kind == Kind::Program && built.target == *name)
                    .with_context(|| format!("{package} has no program {name}"))?;
                check_paths(&found.executable, &names)?;
                Ok(found.executable.clone())
            })
            .collect()
    }

    /// The directories that differ from machine to machine, and what stands for each; a registry's own
    /// is named after where its packages come from, which may be a mirror.
    fn names(&self) -> Result<Vec<(PathBuf, &'static str)>> {
        let mut names = vec![
            (self.root.to_owned(), "carnet"),
            (self.target.to_owned(), "target"),
            (self.home.to_owned(), "cargo"),
        ];
        let sources = self.home.join("registry/src");
        for registry in sources.read_dir().with_context(|| cannot("list", &sources))? {
            names.push((registry?.path(), "registry"));
        }
        Ok(names)
    }
}

/// An option for each name, with something between them. Of several that fit, compilers take the last.
fn flags(names: &[(PathBuf, &str)], option: &str, between: &str) -> OsString {
    let flags: Vec<OsString> = names
        .iter()
        .map(|(path, name)| {
            let mut flag = OsString::from(option);
            flag.push(path);
            flag.push("=");
            flag.push(name);
            flag
        })
        .collect();
    flags.join(OsStr::new(between))
}

/// Fails if the program names a directory of this machine.
fn check_paths(program: &Path, names: &[(PathBuf, &str)]) -> Result<()> {
    let bytes = fs::read(program).with_context(|| cannot("read", program))?;
    for (path, _) in names {
        let path = path.as_os_str().as_encoded_bytes();
        if bytes.windows(path.len()).any(|window| window == path) {
            let path = String::from_utf8_lossy(path);
            bail!("{} names {path}, a path of this machine", program.display());
        }
    }
    Ok(())
}

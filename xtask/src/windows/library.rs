//! Rust's standard library for Windows: where it comes from.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::TARGET;
use crate::process::{self, find_program, is_root};
use crate::{cargo, host};

/// Debian's packages of a compiler that can build its own standard library.
const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// Where the standard library comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Library {
    /// The toolchain that started us has it.
    Toolchain,
    /// Debian's compiler builds it from source, for the test alone.
    Source,
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Toolchain => "of this toolchain",
            Self::Source => "built from Debian's rust-web-src",
        })
    }
}

impl Library {
    /// Finds or installs it. rustup's is preferred; where it cannot be had, Debian's source is.
    pub(super) fn find(root: &Path) -> Result<Self> {
        if is_there()? {
            return Ok(Self::Toolchain);
        }
        let rustup = find_program("rustup");
        if let Some(rustup) = &rustup {
            let mut add = Command::new(rustup);
            add.current_dir(root).args(["target", "add", TARGET]);
            match process::run(&mut add) {
                Ok(()) if is_there()? => return Ok(Self::Toolchain),
                Ok(()) => eprintln!("    rustup added it to another toolchain"),
                Err(error) => eprintln!("    {error:#}"),
            }
        }
        let packages = PACKAGES.map(str::to_owned);
        if host::is_debian() && is_root() {
            host::install_packages(&packages)?;
        }
        if !Path::new("/usr/lib/rustlib/src/rust/library/std").is_dir() {
            bail!(
                "no standard library for {TARGET}: `rustup target add {TARGET}` installs it; on \
                 Debian without rustup, so does apt-get install {}",
                packages.join(" ")
            );
        }
        Ok(Self::Source)
    }

    /// The cargo that builds with it.
    pub(super) fn cargo(self, root: &Path) -> Command {
        match self {
            Self::Toolchain => cargo::cargo(root),
            Self::Source => {
                let mut command = Command::new("/usr/bin/cargo");
                command
                    .current_dir(root)
                    .env("RUSTC", "/usr/bin/rustc")
                    // A release's compiler builds no standard library unless it is told this.
                    .env("RUSTC_BOOTSTRAP", "1")
                    // Of the toolchain that started us.
                    .env_remove("LD_LIBRARY_PATH")
                    .env_remove("RUSTUP_TOOLCHAIN");
                command
            }
        }
    }

    /// `what` to build, and how.
    pub(super) fn arguments(self, root: &Path, what: &[&str]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            what.iter().chain(&["--locked", "--target", TARGET]).map(OsString::from).collect();
        if matches!(self, Self::Source) {
            // Another compiler: what it builds must not replace what this one built.
            let directory: PathBuf = cargo::target_directory(root).join("windows");
            arguments.extend(["-Zbuild-std=std,test", "--target-dir"].map(OsString::from));
            arguments.push(directory.into());
        }
        arguments
    }
}

/// Whether the toolchain that started us has it.
fn is_there() -> Result<bool> {
    // Beside its cargo is its compiler.
    let rustc = match std::env::var_os("CARGO") {
        Some(cargo) => Path::new(&cargo).with_file_name("rustc"),
        None => PathBuf::from("rustc"),
    };
    let question = ["--print", "target-libdir", "--target", TARGET];
    let directory = process::read(Command::new(rustc).args(question))?;
    Ok(std::fs::read_dir(directory.trim()).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"libstd-"))
    }))
}

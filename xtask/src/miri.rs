//! `cargo xtask miri`: what runs without a kernel, under Miri, which finds undefined behaviour: an access
//! out of bounds or to memory that is gone, a reference that is not unique, a data race.
//!
//! Miri comes with rustup's nightly alone; the one that is pinned here is installed where there is none.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cargo;
use crate::process::{self, announce, find_program};

/// The toolchain. Any nightly of the same day is as good, under whichever name.
const TOOLCHAIN: &str = "nightly-2026-05-20";
/// The same one by its compiler's version.
const COMPILER: &str = "1.97.0-nightly (e50aa6fba 2026-05-19)";
/// What runs: packages, and of each the modules whose tests need no socket.
const RUNS: [(&str, &[&str]); 3] = [
    ("carnet-core", &[]),
    ("carnet", &["error::", "growth::", "winsock::"]),
    ("carnet-winsock", &["contract::", "memory::", "message::", "options::"]),
];
/// Random cases of each property: Miri is some hundred times slower than the processor.
const CASES: &str = "8";

pub(crate) fn run() -> Result<()> {
    let root = cargo::workspace_root()?;
    announce("the toolchain with Miri");
    let toolchain = toolchain()?;
    eprintln!("    {toolchain}: rustc {COMPILER}");
    for (package, modules) in RUNS {
        announce(format_args!("{package} under Miri"));
        let mut test = nightly(&root, toolchain);
        test.args(["miri", "test", "--locked", "--package", package, "--lib", "--"]).args(modules);
        // Properties keep their failures in a file, and tests ask for the time.
        test.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", CASES);
        process::run(test.env("CARGO_TARGET_DIR", cargo::target_directory(&root).join("miri")))?;
    }
    Ok(())
}

/// Cargo of a toolchain, without what the cargo that started us has set.
fn nightly(root: &Path, toolchain: &str) -> Command {
    let mut command = Command::new("rustup");
    command.current_dir(root).args(["run", toolchain, "cargo"]);
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("RUSTC");
    command
}

/// The name of the pinned toolchain here; it is installed if need be.
fn toolchain() -> Result<&'static str> {
    find_program("rustup")
        .context("rustup is not installed, and Miri is to be had from it only")?;
    let is_here = |toolchain: &&str| {
        let version = process::read(Command::new("rustup").args(["run", toolchain, "rustc", "-V"]));
        version.is_ok_and(|version| version.contains(COMPILER))
    };
    let components = ["miri", "rust-src"];
    let mut rustup = Command::new("rustup");
    let found = ["nightly", TOOLCHAIN].into_iter().find(|name| is_here(name));
    match found {
        Some(name) => rustup.args(["component", "add", "--toolchain", name]).args(components),
        None => rustup
            .args(["toolchain", "install", TOOLCHAIN, "--profile", "minimal"])
            .args(components.iter().flat_map(|component| ["--component", component])),
    };
    process::run(&mut rustup)?;
    Ok(found.unwrap_or(TOOLCHAIN))
}

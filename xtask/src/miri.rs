//! `cargo xtask miri`: what runs without a kernel, under Miri, which finds undefined behaviour: an access
//! out of bounds or to memory that is gone, a reference that is not unique, a data race.
//!
//! Miri comes with rustup's nightly alone; the one that is pinned here is installed where there is none.
//! Tests that are too slow for it say so where they are.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo;
use crate::process::{self, announce, find_program};

/// The toolchain. Any nightly of the same day is as good, under whichever name.
const TOOLCHAIN: &str = "nightly-2026-05-20";
/// The same one by its compiler's version.
const COMPILER: &str = "1.97.0-nightly (e50aa6fba 2026-05-19)";
/// What runs: of each package its library's tests or an integration test, and of these the modules whose
/// tests need no kernel and not long.
const RUNS: [(&str, &[&str], &[&str]); 4] = [
    ("carnet-core", &["--lib"], &[]),
    // Policies that are compiled to tables, and decisions by these over whole chains.
    ("carnet-core", &["--test", "rules"], &["explain::", "tree::the_worked", "tree::an_empty"]),
    ("carnet", &["--lib"], &["error::", "growth::", "winsock::"]),
    ("carnet-winsock", &["--lib"], &["contract::", "message::", "options::"]),
];
/// Random cases of each property: Miri is some hundred times slower than the processor.
const CASES: &str = "4";

pub(crate) fn run() -> Result<()> {
    let root = cargo::workspace_root()?;
    announce("the toolchain with Miri");
    let toolchain = toolchain()?;
    eprintln!("    {toolchain}: rustc {COMPILER}");
    let mut ran = Vec::new();
    for (package, target, modules) in RUNS {
        let name = format!("{package} {}", target.join(" "));
        announce(format_args!("{name} under Miri"));
        let mut test = nightly(&root, toolchain);
        test.args(["miri", "test", "--locked", "--package", package]).args(target);
        test.arg("--").args(modules);
        // Properties keep their failures in a file, and tests ask for the time.
        test.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", CASES);
        test.env("CARGO_TARGET_DIR", cargo::target_directory(&root).join("miri"));
        let mut outcome = None;
        let status = process::lines(&mut test, |line| {
            println!("{line}");
            outcome = outcome.or(Outcome::read(line));
        })?;
        let Some(outcome) = outcome.filter(|_| status.success()) else {
            bail!("{name} failed under Miri ({status})");
        };
        // A module that has another name now would be left out silently.
        ensure!(outcome.passed > 0, "{name}: no test is named {}", modules.join(" or "));
        ran.push((name, outcome));
    }
    announce("what ran under Miri, and found nothing");
    for (name, Outcome { passed, ignored, left_out }) in ran {
        println!(
            "    {name}: {passed} tests; {ignored} are not for Miri, {left_out} were left out"
        );
    }
    Ok(())
}

/// How many tests there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Outcome {
    passed: u32,
    ignored: u32,
    left_out: u32,
}

impl Outcome {
    /// The last line of a run of tests.
    fn read(line: &str) -> Option<Self> {
        let counts = line.strip_prefix("test result: ")?;
        let count = |what: &str| {
            let before = counts.split(what).next()?;
            before.trim_end().rsplit(' ').next()?.parse().ok()
        };
        Some(Self {
            passed: count("passed")?,
            ignored: count("ignored")?,
            left_out: count("filtered out")?,
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_a_run_says_how_many_tests_there_were() {
        let line = "test result: ok. 31 passed; 0 failed; 2 ignored; 0 measured; 5 filtered out; finished in 9s";
        assert_eq!(Outcome::read(line), Some(Outcome { passed: 31, ignored: 2, left_out: 5 }));
        assert_eq!(Outcome::read("test passed ... ok"), None);
    }
}

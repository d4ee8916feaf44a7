//! `bench` and `demo`: build a program as the current user, then start it as root.

use std::ffi::{OsStr, OsString};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Kind};
use crate::process::{self, Privilege, announce};

/// Builds everything in release mode (the benchmarks start Carnet's other programs, too) and runs
/// the package carnet-bench.
pub(crate) fn bench(arguments: &[OsString]) -> Result<()> {
    let build = ["--release", "--workspace", "--bins"];
    as_root("carnet-bench", &build, None, arguments)
}

/// Builds the command `carnet` in release mode and runs its demonstration.
pub(crate) fn demo(arguments: &[OsString]) -> Result<()> {
    let build = ["--release", "--package", "carnet-cli", "--bins"];
    as_root("carnet-cli", &build, Some("demo"), arguments)
}

fn as_root(
    package: &str,
    build: &[&str],
    subcommand: Option<&str>,
    arguments: &[OsString],
) -> Result<()> {
    let privilege = Privilege::find()?;
    let root = cargo::workspace_root()?;
    announce(format_args!("building {package}"));
    let built = cargo::build(&root, build)?;
    let program = built
        .iter()
        .find(|built| built.package == package && built.kind == Kind::Program)
        .with_context(|| format!("the package {package} has no program"))?;
    privilege.obtain()?;
    let terminal = std::env::var_os("TERM").unwrap_or_default();
    let environment: &[(&str, &OsStr)] = &[("TERM", &terminal)];
    let mut command = privilege.command(&program.executable, environment);
    command.args(subcommand).args(arguments);
    let status = process::status(&mut command)?;
    if !status.success() {
        bail!("{package} failed ({status})");
    }
    Ok(())
}

//! `cargo xtask bench`: builds the benchmarks as the current user, then starts them as root.

use std::ffi::{OsStr, OsString};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Kind};
use crate::process::{self, Privilege, announce};

/// The package that has the benchmarks.
const PACKAGE: &str = "carnet-bench";

/// Builds everything in release mode, since the benchmarks start Carnet's other programs too, and
/// runs them.
pub(crate) fn run(arguments: &[OsString]) -> Result<()> {
    let privilege = Privilege::find()?;
    let root = cargo::workspace_root()?;
    announce(format_args!("building {PACKAGE}"));
    let built = cargo::build(&root, &["--release", "--workspace", "--bins"])?;
    let program = built
        .iter()
        .find(|built| built.package == PACKAGE && built.kind == Kind::Program)
        .with_context(|| format!("the package {PACKAGE} has no program"))?;
    privilege.obtain()?;
    let terminal = std::env::var_os("TERM").unwrap_or_default();
    let environment: &[(&str, &OsStr)] = &[("TERM", &terminal)];
    let mut command = privilege.command(&program.executable, environment);
    command.args(arguments);
    let status = process::status(&mut command)?;
    if !status.success() {
        bail!("{PACKAGE} failed ({status})");
    }
    Ok(())
}

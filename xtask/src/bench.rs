//! `cargo xtask bench` and `cargo xtask soak`: builds a program of measurements as the current user, then
//! starts it as root.

use std::ffi::{OsStr, OsString};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Kind};
use crate::process::{self, Privilege, announce};

/// The package that has the benchmarks.
pub(crate) const BENCH: &str = "carnet-bench";
/// The package that has the load of long duration.
pub(crate) const SOAK: &str = "carnet-soak";

/// Builds everything in release mode, since these programs start Carnet's other programs too, and runs
/// that of a package.
pub(crate) fn run(package: &str, arguments: &[OsString]) -> Result<()> {
    let privilege = Privilege::find()?;
    let root = cargo::workspace_root()?;
    announce(format_args!("building {package}"));
    let built = cargo::build(&root, &["--release", "--workspace", "--bins"])?;
    let program = built
        .iter()
        .find(|built| built.package == package && built.kind == Kind::Program)
        .with_context(|| format!("the package {package} has no program"))?;
    privilege.obtain()?;
    let terminal = std::env::var_os("TERM").unwrap_or_default();
    let environment: &[(&str, &OsStr)] = &[("TERM", &terminal)];
    let mut command = privilege.command(&program.executable, environment);
    command.args(arguments);
    let status = process::status(&mut command)?;
    if !status.success() {
        bail!("{package} failed ({status})");
    }
    Ok(())
}

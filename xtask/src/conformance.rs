//! `cargo xtask conformance`: the conformance matrix, printed as a table.
//!
//! It is an ordinary test of `carnet-tests`, which `cargo xtask test` and `cargo xtask vm` run as
//! well. Here it is run alone, and writes to the terminal itself.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Kind};
use crate::process::{self, announce};
use crate::{host, test};

/// The package and the test program.
pub(crate) const SUITE: (&str, &str) = ("carnet-tests", "conformance");

pub(crate) fn run() -> Result<()> {
    let privilege = host::prepare()?;
    let root = cargo::workspace_root()?;
    announce("building the matrix");
    let (package, target) = SUITE;
    let built = cargo::build_all(&root)?;
    let suite = built
        .iter()
        .find(|built| built.kind == Kind::Tests && built.target == target)
        .with_context(|| format!("{package} has no tests {target}"))?;

    announce("the matrix, as root");
    privilege.obtain()?;
    let mut command: Command = test::as_root(privilege, suite);
    command.arg("--nocapture").current_dir(&suite.directory);
    let status = process::status(&mut command)?;
    if !status.success() {
        bail!("cells of the matrix are not as they should be");
    }
    Ok(())
}

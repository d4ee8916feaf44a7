//! `cargo xtask differential`: the kernel's decisions about random flows through real sockets, against
//! those of carnet-core on the host and of the naive model.
//!
//! It is an ordinary test of `carnet-tests`, which `cargo xtask test` runs with a few thousand cases.
//! Here it is run alone, with as many as asked for, and writes to the terminal itself.

use std::ffi::OsStr;

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Kind};
use crate::process::{self, announce};
use crate::{host, test};

/// The package and the test program.
const SUITE: (&str, &str) = ("carnet-tests", "differential");

#[derive(clap::Args)]
pub(crate) struct Options {
    /// How many flows are opened
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// The seed of an earlier run, which makes the same policies and flows; drawn unless given
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let privilege = host::prepare()?;
    let root = cargo::workspace_root()?;
    announce("building the test");
    let (package, target) = SUITE;
    let built = cargo::build_all(&root)?;
    let suite = built
        .iter()
        .find(|built| built.kind == Kind::Tests && built.target == target)
        .with_context(|| format!("{package} has no tests {target}"))?;

    announce("random policies and flows, as root");
    privilege.obtain()?;
    let cases = options.cases.to_string();
    let seed = options.seed.map(|seed| seed.to_string());
    let mut settings = vec![("CARNET_DIFFERENTIAL_CASES", OsStr::new(&cases))];
    settings.extend(seed.iter().map(|seed| ("CARNET_DIFFERENTIAL_SEED", OsStr::new(seed))));
    let mut command = test::as_root_with(privilege, suite, &settings);
    command.arg("--nocapture").current_dir(&suite.directory);
    if !process::status(&mut command)?.success() {
        bail!("decisions differ, or could not be compared: see above");
    }
    Ok(())
}

//! `cargo xtask differential`: the kernel's decisions about random flows through real sockets, against
//! those of carnet-core on the host and of the naive model.
//!
//! It is an ordinary test of `carnet-tests`, which `cargo xtask test` runs with a few thousand cases.
//! Here it is run alone, with as many as asked for, and writes to the terminal itself.

use std::ffi::OsStr;

use anyhow::{Result, bail};

use crate::test::Suite;
use crate::{cargo, process};

const SUITE: Suite = Suite { package: "carnet-tests", target: "differential" };

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
    let root = cargo::workspace_root()?;
    let cases = options.cases.to_string();
    let seed = options.seed.map(|seed| seed.to_string());
    let mut variables = vec![("CARNET_DIFFERENTIAL_CASES", OsStr::new(&cases))];
    variables.extend(seed.iter().map(|seed| ("CARNET_DIFFERENTIAL_SEED", OsStr::new(seed))));
    if !process::status(&mut SUITE.alone(&root, &variables)?)?.success() {
        bail!("decisions differ, or could not be compared: see above");
    }
    Ok(())
}

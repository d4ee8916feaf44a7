//! `cargo xtask conformance`: the conformance matrix, printed as a table.
//!
//! It is an ordinary test of `carnet-tests`, which `cargo xtask test` and `cargo xtask vm` run as
//! well. Here it is run alone, and writes to the terminal itself.

use anyhow::{Result, bail};

use crate::test::Suite;
use crate::{cargo, process};

pub(crate) const SUITE: Suite = Suite { package: "carnet-tests", target: "conformance" };

pub(crate) fn run() -> Result<()> {
    let root = cargo::workspace_root()?;
    if !process::status(&mut SUITE.alone(&root, &[])?)?.success() {
        bail!("cells of the matrix are not as they should be");
    }
    Ok(())
}

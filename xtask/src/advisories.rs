//! `cargo xtask advisories`: whether a dependency is known to be vulnerable, abandoned or withdrawn, by
//! RustSec's database, with cargo-deny.
//!
//! The database is in a git repository elsewhere. A machine without that network is told that nothing was
//! checked, and goes on; CI, which has it, asks for `--required`.

use std::path::Path;

use anyhow::{Context, Result};

use crate::bpf::MANIFEST as BPF_MANIFEST;
use crate::{cargo, ci, process};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Fail where the database cannot be reached
    #[arg(long)]
    required: bool,
}

impl Options {
    /// The options of `cargo xtask advisories`.
    pub(crate) fn lenient() -> Self {
        Self { required: false }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    ci::install_deny(&root)?;
    if let Err(error) = fetch(&root) {
        if options.required {
            return Err(error).context("the advisory database is not reachable");
        }
        eprintln!("    advisory database not reachable: not checked");
        return Ok(());
    }
    for manifest in ["Cargo.toml", BPF_MANIFEST] {
        let mut check = ci::deny(&root, manifest);
        process::run(check.args(["check", "advisories"]))?;
    }
    Ok(())
}

/// Brings the database up to date.
fn fetch(root: &Path) -> Result<()> {
    process::read(ci::deny(root, "Cargo.toml").args(["fetch", "db"])).map(drop)
}

//! The command `carnet`, as an administrator calls it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use carnet_testbed::BpfDirectory;
use serde_json::Value;

/// The instance's name.
pub(crate) const INSTANCE: &str = "soak";

/// The command, for one instance.
#[derive(Debug)]
pub(crate) struct Carnet {
    program: PathBuf,
    pins: PathBuf,
}

impl Carnet {
    /// The command that was built beside this program.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn new(pins: &BpfDirectory) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("carnet");
        if !program.is_file() {
            bail!("{} is missing: build it with `cargo build --workspace`", program.display());
        }
        Ok(Self { program, pins: pins.path().to_owned() })
    }

    /// Where it is.
    pub(crate) fn program(&self) -> &PathBuf {
        &self.program
    }

    /// Calls it; gives what it printed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub(crate) fn call(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(&self.program)
            .args(["--bpffs".as_ref(), self.pins.as_os_str()])
            .args(["--instance", INSTANCE])
            .args(arguments)
            .output()
            .context("starting carnet")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("carnet {}: {} {}", arguments.join(" "), output.status, said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Calls it and reads the JSON that it prints.
    ///
    /// # Errors
    /// When it fails or prints something else.
    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let printed = self.call(&[&["--json"], arguments].concat())?;
        serde_json::from_str(&printed)
            .with_context(|| format!("carnet {} printed no JSON", arguments.join(" ")))
    }

    /// Whether it has a subcommand.
    pub(crate) fn knows(&self, subcommand: &str) -> bool {
        self.call(&["help", subcommand]).is_ok()
    }
}

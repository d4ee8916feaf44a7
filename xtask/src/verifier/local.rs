//! What the verifier of the running kernel says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::cargo::{self, Kind};
use crate::host;
use crate::process::{self, Privilege, announce};

/// What `carnet status --json` says of the programs.
#[derive(Deserialize)]
pub(crate) struct Status {
    programs: Vec<Program>,
}

#[derive(Deserialize)]
struct Program {
    name: String,
    verified_instructions: u32,
}

impl Status {
    /// By program, the instructions that the verifier went through.
    pub(crate) fn verified(self) -> impl Iterator<Item = (String, u32)> {
        self.programs.into_iter().map(|program| (program.name, program.verified_instructions))
    }
}

/// The running kernel's release, and what it says of each program of an instance that is brought up for
/// that, over a cgroup without a process.
pub(super) fn measure(root: &Path) -> Result<(String, BTreeMap<String, u32>)> {
    announce("measuring on the running kernel");
    let privilege = Privilege::find()?;
    let built = cargo::build(root, &["--package", "carnet-cli", "--bins"])?;
    let command = built
        .iter()
        .find(|built| built.kind == Kind::Program && built.target == "carnet")
        .context("carnet-cli has no program carnet")?;
    privilege.obtain()?;
    let mounts = host::read_trimmed("/proc/self/mounts")?;
    let mount = host::cgroup2_mount(&mounts).map_err(anyhow::Error::msg)?;
    let name = format!("carnet-verifier-{}", std::process::id());
    let carnet = |arguments: &[&str]| {
        let mut carnet = privilege.command(&command.executable, &[]);
        process::read(carnet.args(["--instance", &name]).args(arguments))
    };
    let scope = Scope::make(privilege, mount.join(&name))?;
    carnet(&["up", "--cgroup", &scope.directory.display().to_string()])?;
    let said = carnet(&["status", "--json"]);
    carnet(&["down"])?;
    let status: Status =
        serde_json::from_str(&said?).context("cannot understand `carnet status`")?;
    Ok((host::read_trimmed("/proc/sys/kernel/osrelease")?, status.verified().collect()))
}

/// A cgroup, removed with this value.
struct Scope {
    privilege: Privilege,
    directory: PathBuf,
}

impl Scope {
    fn make(privilege: Privilege, directory: PathBuf) -> Result<Self> {
        process::read(privilege.command("mkdir", &[]).arg(&directory))?;
        Ok(Self { privilege, directory })
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let mut remove: Command = self.privilege.command("rmdir", &[]);
        if let Err(error) = process::read(remove.arg(&self.directory)) {
            eprintln!("    warning: {error:#}");
        }
    }
}

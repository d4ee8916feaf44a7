//! `cargo xtask ci`: what CI checks beside the tests. Every check is run, and all that fail are
//! named at the end.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bpf::MANIFEST as BPF_MANIFEST;
use crate::process::{self, announce};
use crate::{advisories, bpf, cargo, unsafety, workflows};

/// The cargo-deny that is installed when there is none.
const CARGO_DENY: &str = "0.20.2";

/// The fuzz targets' own workspace.
const FUZZ_MANIFEST: &str = "fuzz/Cargo.toml";

/// One check of the checkout at this path.
type Check = fn(&Path) -> Result<()>;

pub(crate) fn run() -> Result<()> {
    let root = cargo::workspace_root()?;
    let checks: [(&str, Check); 9] = [
        ("format", format),
        ("lints", lints),
        ("documentation", documentation),
        ("licences and sources of dependencies", dependencies),
        ("advisories about dependencies", |_| advisories::run(&advisories::Options::lenient())),
        ("unsafe code and its reasons", |_| unsafety::run(&unsafety::Options::check())),
        ("the workflows of CI", workflows::check),
        ("paths of this machine in tracked files", paths),
        ("the committed kernel engine", |_| bpf::run(bpf::Options::check())),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        announce(name);
        if let Err(error) = check(&root) {
            eprintln!("    failed: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("{} of {} checks failed: {}", failed.len(), checks.len(), failed.join("; "));
    }
    eprintln!("\n    all {} checks passed", checks.len());
    Ok(())
}

fn format(root: &Path) -> Result<()> {
    process::run(cargo::cargo(root).args(["fmt", "--all", "--", "--check"]))?;
    for manifest in [BPF_MANIFEST, FUZZ_MANIFEST] {
        process::run(cargo::cargo(root).args([
            "fmt",
            "--manifest-path",
            manifest,
            "--",
            "--check",
        ]))?;
    }
    Ok(())
}

fn lints(root: &Path) -> Result<()> {
    process::run(
        cargo::cargo(root)
            .args(["clippy", "--locked", "--workspace", "--all-targets", "--all-features"])
            .args(["--", "-D", "warnings"]),
    )
}

fn documentation(root: &Path) -> Result<()> {
    // The library and the command are both named carnet: documented apart, or one would overwrite
    // the other half-way.
    let document = |packages: &[&str]| {
        process::run(
            cargo::cargo(root)
                .args(["doc", "--locked", "--no-deps", "--all-features"])
                .args(packages)
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    };
    document(&["--package", "carnet-cli"])?;
    document(&["--workspace", "--exclude", "carnet-cli"])
}

fn dependencies(root: &Path) -> Result<()> {
    install_deny(root)?;
    for manifest in ["Cargo.toml", BPF_MANIFEST, FUZZ_MANIFEST] {
        process::run(deny(root, manifest).args(["check", "licenses", "bans", "sources"]))?;
    }
    Ok(())
}

/// Installs cargo-deny, unless it is there.
pub(crate) fn install_deny(root: &Path) -> Result<()> {
    if process::read(cargo::cargo(root).args(["deny", "--version"])).is_ok() {
        return Ok(());
    }
    process::run(
        cargo::cargo(root)
            .args(["install", "--locked", &format!("cargo-deny@{CARGO_DENY}"), "--target-dir"])
            .arg(cargo::target_directory(root).join("tools")),
    )
}

/// cargo-deny for the workspace of this manifest.
pub(crate) fn deny(root: &Path, manifest: &str) -> Command {
    let mut deny = cargo::cargo(root);
    deny.args(["deny", "--locked", "--config"]).arg(root.join("deny.toml"));
    deny.args(["--manifest-path", manifest]);
    deny
}

/// No tracked file, the committed object included, names this checkout's place or the user's home.
fn paths(root: &Path) -> Result<()> {
    let mut places = vec![root.display().to_string()];
    if let Some(home) = std::env::home_dir() {
        // With the dot: `/root/` alone may well stand in a text, a path into `~/.cargo` may not.
        places.push(format!("{}/.", home.display()));
    }
    let mut search = Command::new("git");
    search.current_dir(root).args(["grep", "-n", "--fixed-strings", "--text"]);
    for place in &places {
        search.args(["-e", place]);
    }
    let output = search.output().context("cannot start git")?;
    match output.status.code() {
        Some(1) => Ok(()),
        Some(0) => {
            bail!("take these out:\n{}", String::from_utf8_lossy(&output.stdout).trim_end())
        }
        _ => bail!("git grep failed: {}", String::from_utf8_lossy(&output.stderr).trim_end()),
    }
}

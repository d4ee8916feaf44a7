//! What the programs are made of: a bill of materials for each, in CycloneDX's format.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::build::TARGET;
use super::cannot;
use super::copy::Copy;
use crate::{cargo, process};

/// The cargo-cyclonedx that is installed when there is none, below the target directory.
const TOOL: (&str, &str) = ("cargo-cyclonedx", "0.5.9");

/// Writes one for each program, given by package and name, and gives the files' names.
pub(super) fn write(
    root: &Path,
    copy: &Copy,
    programs: &[(&str, &str)],
    epoch: &str,
    shipped: &Path,
) -> Result<Vec<String>> {
    let tool = tool(root)?;
    let mut names = Vec::new();
    for (package, name) in programs {
        // It writes beside the manifests of all packages: in the copy, that is nobody's business.
        let manifest = copy.source.join("crates").join(package).join("Cargo.toml");
        let mut make = std::process::Command::new(&tool);
        make.args(["cyclonedx", "--format", "json", "--spec-version", "1.5", "--target", TARGET]);
        make.args(["--no-build-deps", "--override-filename", "bom", "--manifest-path"]);
        process::run(make.arg(&manifest).env("SOURCE_DATE_EPOCH", epoch))?;
        let made = manifest.with_file_name("bom.json");
        let text = fs::read_to_string(&made).with_context(|| cannot("read", &made))?;
        let text = text.replace(&copy.source.display().to_string(), "/carnet");
        let listed = components(&text)?;
        ensure!(listed > 0, "the SBOM of {name} lists nothing");
        let file = format!("{name}.cdx.json");
        fs::write(shipped.join(&file), text).with_context(|| cannot("write", shipped))?;
        eprintln!("    {file}: {listed} packages");
        names.push(file);
    }
    Ok(names)
}

/// How many components the bill lists.
fn components(text: &str) -> Result<usize> {
    let bill: serde_json::Value = serde_json::from_str(text).context("the SBOM is no JSON")?;
    Ok(bill["components"].as_array().map_or(0, Vec::len))
}

/// Where cargo-cyclonedx is; it is installed if need be.
fn tool(root: &Path) -> Result<std::path::PathBuf> {
    let (name, version) = TOOL;
    if let Some(found) = process::find_program(name) {
        return Ok(found);
    }
    let tools = cargo::target_directory(root).join("tools");
    let found = tools.join("bin").join(name);
    if !found.exists() {
        let mut install = cargo::cargo(root);
        install.args(["install", "--locked", &format!("{name}@{version}"), "--root"]).arg(&tools);
        process::run(install.arg("--target-dir").arg(&tools))?;
    }
    Ok(found)
}

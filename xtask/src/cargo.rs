//! Starting cargo on this workspace, and reading what it built.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;

/// The checkout: the directory of the workspace's `Cargo.toml`.
pub(crate) fn workspace_root() -> Result<PathBuf> {
    let own = std::env::var_os("CARGO_MANIFEST_DIR")
        .context("CARGO_MANIFEST_DIR is not set: start this program as `cargo xtask`")?;
    let root = Path::new(&own).parent().context("xtask's directory has no parent")?;
    Ok(root.to_owned())
}

/// Where the build's results go: `CARGO_TARGET_DIR`, or `target` in the checkout.
pub(crate) fn target_directory(root: &Path) -> PathBuf {
    // join() keeps an absolute CARGO_TARGET_DIR as it is.
    root.join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| OsString::from("target")))
}

/// The cargo that started us, so that a `+toolchain` holds for everything below.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// What kind of program cargo built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An ordinary program.
    Program,
    /// A program that runs the tests of a library, a binary, or a file in `tests/`.
    Tests,
}

/// A program that cargo built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Built {
    /// The package's directory name is not its name; this is its name.
    pub(crate) package: String,
    /// The target's name within the package.
    pub(crate) target: String,
    pub(crate) kind: Kind,
    pub(crate) executable: PathBuf,
    /// The package's directory: tests run there.
    pub(crate) directory: PathBuf,
}

/// Runs `cargo build` with these arguments and gives the programs that it built.
pub(crate) fn build(root: &Path, arguments: &[&str]) -> Result<Vec<Built>> {
    build_with(cargo(root), arguments)
}

/// Builds all programs and tests of the workspace: what one command has built, the next need not build
/// again. A part of the packages would be built with other features of what they depend on.
pub(crate) fn build_all(root: &Path) -> Result<Vec<Built>> {
    build(root, &["--workspace", "--all-targets"])
}

/// As [`build`], with a cargo of the caller's choice.
pub(crate) fn build_with(
    mut command: Command,
    arguments: &[impl AsRef<OsStr>],
) -> Result<Vec<Built>> {
    command.arg("build").args(arguments);
    let shown: Vec<_> = arguments.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    eprintln!("    $ cargo build {}", shown.join(" "));
    command.arg("--message-format=json-render-diagnostics");
    let mut built = Vec::new();
    let mut unreadable = None;
    let status = process::lines(&mut command, |line| match read_message(line) {
        Ok(program) => built.extend(program),
        Err(error) => unreadable = Some(error),
    })?;
    if !status.success() {
        bail!("`cargo build` failed ({status})");
    }
    if let Some(error) = unreadable {
        return Err(error.context("cannot read what cargo said about its build"));
    }
    Ok(built)
}

/// One line of cargo's JSON messages, with the fields that are read here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    package_id: Option<String>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The program that the message speaks of, if it speaks of one.
fn read_message(line: &str) -> Result<Option<Built>> {
    let message: Message = serde_json::from_str(line)?;
    if message.reason != "compiler-artifact" {
        return Ok(None);
    }
    let (Some(id), Some(manifest), Some(target), Some(profile), Some(executable)) = (
        message.package_id,
        message.manifest_path,
        message.target,
        message.profile,
        message.executable,
    ) else {
        return Ok(None);
    };
    let is = |kind: &str| target.kind.iter().any(|found| found == kind);
    if is("custom-build") || is("bench") || (is("example") && profile.test) {
        return Ok(None);
    }
    Ok(Some(Built {
        package: package_name(&id).to_owned(),
        target: target.name,
        kind: if profile.test { Kind::Tests } else { Kind::Program },
        executable,
        directory: manifest.parent().context("a manifest without a directory")?.to_owned(),
    }))
}

/// The package's name in a package id: `path+file:///…/directory#name@version`, or without the
/// name where it is the directory's.
fn package_name(id: &str) -> &str {
    let (place, fragment) = id.rsplit_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _version)) => name,
        None => place.rsplit('/').next().unwrap_or(place),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_id_has_its_name_in_the_fragment_or_in_the_directory() {
        assert_eq!(package_name("path+file:///src/tests#carnet-tests@0.1.0"), "carnet-tests");
        assert_eq!(package_name("path+file:///src/crates/carnet#0.1.0"), "carnet");
    }

    #[test]
    fn a_test_program_is_read_from_cargos_message() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///c/tests#e2e@0.1.0",
            "manifest_path":"/c/tests/Cargo.toml","target":{"kind":["test"],"name":"chain"},
            "profile":{"test":true},"executable":"/c/target/debug/deps/chain-1"}"#;
        let built = read_message(line).unwrap().unwrap();
        assert_eq!((built.package.as_str(), built.target.as_str()), ("e2e", "chain"));
        assert_eq!(built.kind, Kind::Tests);
        assert_eq!(built.directory, Path::new("/c/tests"));
    }

    #[test]
    fn libraries_and_other_messages_are_passed_over() {
        let library = r#"{"reason":"compiler-artifact","package_id":"p#a@1","executable":null,
            "manifest_path":"/c/Cargo.toml","target":{"kind":["lib"],"name":"a"},
            "profile":{"test":false}}"#;
        assert_eq!(read_message(library).unwrap(), None);
        let end = r#"{"reason":"build-finished","success":true}"#;
        assert_eq!(read_message(end).unwrap(), None);
        assert!(read_message("not json").is_err());
    }
}

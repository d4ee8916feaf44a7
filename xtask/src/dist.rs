//! `cargo xtask dist`: what a release ships. Static programs that run on any Linux, what each is made of
//! (SBOM), and checksums.
//!
//! The build is reproducible: the same source and compiler give the same bytes in every directory of
//! every machine. `--check` builds a second time, from a copy of the source elsewhere and with another
//! home of cargo's, and compares.

mod bom;
mod build;
mod copy;
mod elf;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use self::build::{Build, TARGET};
use self::copy::Copy;
use crate::process::{self, Privilege, announce, find_program, is_root};
use crate::{bpf, cargo, host};

/// The programs that are shipped: package, and name of the program.
const PROGRAMS: [(&str, &str); 2] =
    [("carnet-cli", "carnet"), ("carnet-inspect", "carnet-inspect")];
/// Checksums of all other files, as `sha256sum --check` reads them.
const SUMS: &str = "SHA256SUMS";
/// What was built from what by what.
const BUILDINFO: &str = "BUILDINFO";
/// The C compiler for the static C library, and its Debian package: a dependency has C.
const COMPILER: (&str, &str) = ("musl-gcc", "musl-tools");

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Build a second time elsewhere, compare, and run the demonstration with what was built
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    // Canonical, for the paths that the compiler sees are, and they are to be replaced.
    let root = cargo::workspace_root()?.canonicalize()?;
    let directory = cargo::target_directory(&root).join("dist");
    announce("checking this machine");
    prepare(&root)?;
    let epoch = last_commit(&root, "%ct")?;

    announce(format_args!("building for {TARGET}"));
    let programs =
        Build { root: &root, target: &directory.join("build"), home: &bpf::cargo_home()? }
            .run(&PROGRAMS, &epoch)?;
    for program in &programs {
        elf::check_static(program)?;
    }
    let shipped = directory.join("shipped");
    fs::create_dir_all(&shipped).with_context(|| cannot("create", &shipped))?;
    let mut names = Vec::new();
    for program in &programs {
        let name = file_name(program)?;
        fs::copy(program, shipped.join(&name)).with_context(|| cannot("copy", program))?;
        names.push(name);
    }

    let copy = Copy::make(&root, &directory)?;
    announce("what the programs are made of");
    names.extend(bom::write(&root, &copy, &PROGRAMS, &epoch, &shipped)?);

    let info = build_info(&root, &epoch)?;
    fs::write(shipped.join(BUILDINFO), info).with_context(|| cannot("write", &shipped))?;
    names.push(BUILDINFO.to_owned());
    let sums = sums(&shipped, &names)?;
    fs::write(shipped.join(SUMS), &sums).with_context(|| cannot("write", &shipped))?;

    if options.check {
        announce("building again, elsewhere");
        let home = copy.cargo_home(&bpf::cargo_home()?)?;
        let target = copy.directory.join("target");
        let again =
            Build { root: &copy.source, target: &target, home: &home }.run(&PROGRAMS, &epoch)?;
        compare(&programs, &again)?;
        announce("the demonstration, with what was built");
        try_out(&shipped)?;
    }
    announce(format_args!("shipped: {}", shipped.display()));
    print!("{sums}");
    Ok(())
}

/// Installs the C compiler and the standard library for the target, where that may be done.
fn prepare(root: &Path) -> Result<()> {
    let (compiler, package) = COMPILER;
    if find_program(compiler).is_none() {
        ensure!(
            host::is_debian() && is_root(),
            "{compiler} is missing (on Debian: apt-get install --no-install-recommends {package})"
        );
        host::install_packages(&[package.to_owned()])?;
    }
    let rustc = || {
        let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc.current_dir(root);
        rustc
    };
    let libraries = process::read(rustc().args(["--print", "target-libdir", "--target", TARGET]))?;
    if !Path::new(libraries.trim()).is_dir() {
        let mut add = Command::new("rustup");
        process::run(add.current_dir(root).args(["target", "add", TARGET]))
            .with_context(|| format!("the standard library for {TARGET} is missing"))?;
    }
    eprintln!("    {}", process::read(rustc().arg("--version"))?.trim());
    Ok(())
}

/// What git says of the last commit, in its words for formats.
fn last_commit(root: &Path, format: &str) -> Result<String> {
    let mut log = Command::new("git");
    log.current_dir(root).args(["log", "-1", &format!("--format={format}")]);
    Ok(process::read(&mut log)?.trim().to_owned())
}

/// From what, by what, and when by the last commit's clock.
fn build_info(root: &Path, epoch: &str) -> Result<String> {
    let mut rustc = Command::new("rustc");
    let rustc = process::read(rustc.current_dir(root).arg("--version"))?;
    let mut changed = Command::new("git");
    let changed = process::read(changed.current_dir(root).args(["status", "--porcelain"]))?;
    let changed = if changed.is_empty() { "" } else { ", changed since" };
    Ok(format!(
        "version = \"{}\"\ncommit = \"{}{changed}\"\ndate = {epoch}\ntarget = \"{TARGET}\"\nrustc = \"{}\"\n",
        env!("CARGO_PKG_VERSION"),
        last_commit(root, "%H")?,
        rustc.trim(),
    ))
}

/// A line for each file, as sha256sum writes it.
fn sums(directory: &Path, names: &[String]) -> Result<String> {
    let mut sums = String::new();
    for name in names {
        let path = directory.join(name);
        let bytes = fs::read(&path).with_context(|| cannot("read", &path))?;
        // Writing into a String cannot fail.
        let _ = writeln!(sums, "{}  {name}", bpf::sha256(&bytes));
    }
    Ok(sums)
}

/// Fails unless both builds gave the same bytes.
fn compare(first: &[PathBuf], second: &[PathBuf]) -> Result<()> {
    for (one, other) in first.iter().zip(second) {
        let [first, second] =
            [one, other].map(|path| fs::read(path).with_context(|| cannot("read", path)));
        let (first, second) = (first?, second?);
        let same = first.iter().zip(&second).take_while(|(one, other)| one == other).count();
        if first != second {
            bail!(
                "the build is not reproducible: {} ({} bytes) and {} ({} bytes) differ from byte {same} on",
                one.display(),
                first.len(),
                other.display(),
                second.len()
            );
        }
        eprintln!("    the same {} bytes: {}", first.len(), file_name(one)?);
    }
    Ok(())
}

/// Runs what is shipped: each program says its version, and the command shows its demonstration.
fn try_out(shipped: &Path) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    for (_, name) in PROGRAMS {
        let said = process::read(Command::new(shipped.join(name)).arg("--version"))?;
        ensure!(said.contains(version), "{name} --version says {said:?}, not {version}");
    }
    let privilege = Privilege::find()?;
    privilege.obtain()?;
    process::run(privilege.command(shipped.join("carnet"), &[]).arg("demo"))
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

fn cannot(verb: &str, path: &Path) -> String {
    format!("cannot {verb} {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_builds_are_compared_byte_by_byte() {
        let directory =
            std::env::temp_dir().join(format!("carnet-xtask-dist-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let [one, other] = ["one", "other"].map(|name| directory.join(name));
        fs::write(&one, b"abc").unwrap();
        fs::write(&other, b"abc").unwrap();
        let compare = || compare(std::slice::from_ref(&one), std::slice::from_ref(&other));
        assert!(compare().is_ok());
        fs::write(&other, b"abd").unwrap();
        assert!(compare().unwrap_err().to_string().contains("differ from byte 2 on"));

        let sums = sums(&directory, &["one".to_owned()]).unwrap();
        assert_eq!(sums, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  one\n");
        fs::remove_dir_all(&directory).unwrap();
    }
}

//! `cargo xtask windows`: builds what runs on Windows, and runs its tests under Wine.
//!
//! Wine's own Winsock is the peer of the tests. Nothing redirects there, so what they show is the
//! calling contract and how the programs behave without a callout driver.

mod library;
mod wine;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::library::Library;
use self::wine::Wine;
use crate::cargo::{self, Kind};
use crate::process::{self, announce, find_program, is_root};
use crate::test::{self, Summary};
use crate::{contract, host};

/// What the programs are built for.
const TARGET: &str = "x86_64-pc-windows-gnu";
/// The compiler and linker, of Debian's package gcc-mingw-w64-x86-64.
const COMPILER: &str = "x86_64-w64-mingw32-gcc";
/// The packages that run on Windows, and their tests with all features.
const PACKAGES: [&str; 2] = ["carnet", "carnet-inspect"];
const WHAT: [&str; 6] =
    ["--package", PACKAGES[0], "--package", PACKAGES[1], "--all-targets", "--all-features"];
/// The programs that are needed, and the Debian packages that have them.
const PROGRAMS: [(&str, &[&str]); 2] =
    [(COMPILER, &["gcc-mingw-w64-x86-64"]), ("wine", &["wine", "wine64"])];
/// No test program takes as long.
const LIMIT: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Install what building and testing need (Debian, as root) and stop
    #[arg(long, conflicts_with = "arguments")]
    install: bool,
    /// Given to every test program, for example a part of a test's name or `--nocapture`
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    announce("checking this machine");
    install_programs()?;
    let library = Library::find(&root)?;
    eprintln!("    standard library for {TARGET}: {library}");
    if options.install {
        return Ok(());
    }
    announce(format_args!("lints for {TARGET}"));
    lint(&library, &root)?;
    announce(format_args!("building for {TARGET}"));
    let mut programs = cargo::build_with(library.cargo(&root), &library.arguments(&root, &WHAT))?;
    programs.retain(|program| program.kind == Kind::Tests);
    programs.sort_by(|a, b| (&a.package, &a.target).cmp(&(&b.package, &b.target)));
    contract::compile_for_windows(&root)?;

    announce("starting Wine");
    let directory = cargo::target_directory(&root).join("windows");
    let wine = Wine::start(&directory, &compile_dll(&root, &directory)?)?;
    let mut summary = Summary::default();
    for program in &programs {
        let command = wine.command(&program.executable, LIMIT);
        test::run_program(program, command, &options.arguments, &mut summary)?;
    }
    announce("the service in C");
    let service = cargo::target_directory(&root).join("service.exe");
    summary.add_check("tests/contract: service.c", service_starts(&wine, &service));
    drop(wine);

    announce("summary");
    println!("{summary}");
    summary.verdict(false)?;
    let all = options.arguments.is_empty();
    match PACKAGES.iter().find(|package| all && !summary.ran(package)) {
        Some(package) => bail!("no test of {package} was run"),
        None => Ok(()),
    }
}

/// Installs the programs that are missing, where it may.
fn install_programs() -> Result<()> {
    let missing: Vec<_> =
        PROGRAMS.iter().filter(|(program, _)| find_program(program).is_none()).collect();
    if missing.is_empty() {
        eprintln!("    programs: {}", PROGRAMS.map(|(program, _)| program).join(", "));
        return Ok(());
    }
    let packages: Vec<String> = missing
        .iter()
        .flat_map(|(_, packages)| packages.iter().map(|package| (*package).to_owned()))
        .collect();
    if host::is_debian() && is_root() {
        return host::install_packages(&packages);
    }
    bail!(
        "missing: {} (on Debian: apt-get install --no-install-recommends {})",
        missing.iter().map(|(program, _)| *program).collect::<Vec<_>>().join(", "),
        packages.join(" ")
    )
}

/// The lints of `cargo xtask ci`, which see no code that is for Windows only.
fn lint(library: &Library, root: &Path) -> Result<()> {
    let installed = || process::read(library.cargo(root).args(["clippy", "--version"])).is_ok();
    // rustup's would be found for Debian's compiler, too, with which it cannot work.
    if !(matches!(library, Library::Toolchain) && installed()) {
        eprintln!("    left out: this toolchain has no clippy");
        return Ok(());
    }
    let mut command = library.cargo(root);
    command.arg("clippy").args(library.arguments(root, &WHAT)).args(["--", "-D", "warnings"]);
    process::run(&mut command)
}

/// Compiles the DLL that an older Wine lacks; gives its directory.
fn compile_dll(root: &Path, directory: &Path) -> Result<std::path::PathBuf> {
    let output = directory.join("dll");
    std::fs::create_dir_all(&output)
        .with_context(|| format!("cannot create {}", output.display()))?;
    let mut compiler = std::process::Command::new(COMPILER);
    compiler
        .args(["-shared", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(output.join("bcryptprimitives.dll"))
        .arg(root.join("xtask/src/windows/bcryptprimitives.c"))
        .arg("-ladvapi32");
    process::run(&mut compiler)?;
    Ok(output)
}

/// Whether the service begins to listen: without a callout driver there is no more for it to do.
fn service_starts(wine: &Wine, service: &Path) -> Result<()> {
    let first = wine.first_line(service)?;
    if first != "ready" {
        bail!("it said {first:?} and not \"ready\"");
    }
    Ok(())
}

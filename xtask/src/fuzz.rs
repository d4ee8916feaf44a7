//! `cargo xtask fuzz`: arbitrary input for every parser, and arbitrary calls of the control interface.
//!
//! The parsers are targets of cargo-fuzz (libFuzzer), in `fuzz/`: a target is a property of its input,
//! and coverage leads the way. The control interface is answered by programs in the kernel, of which no
//! coverage is seen from here, and needs processes in cgroups and network namespaces: it is a seeded
//! driver, an ordinary test of `carnet-tests`, which `cargo xtask test` runs for a moment as well.
//! `docs/fuzzing.md` has the table of all parsers.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::process::{self, announce};
use crate::test::Suite;

/// The version of cargo-fuzz that is installed where there is none.
const CARGO_FUZZ: &str = "0.13.1";
/// The name under which the driver for the control interface is asked for.
const CONTROL: &str = "control_interface";
/// That driver.
const SUITE: Suite = Suite { package: "carnet-tests", target: "control_fuzz" };
/// Longest input that is tried.
const LONGEST: u32 = 8192;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long every target runs
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this one, of `fuzz/targets`, or `control_interface`
    #[arg(long)]
    target: Option<String>,
    /// Say what the targets are
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    let mut targets = targets(&root)?;
    targets.push(CONTROL.to_owned());
    if options.list {
        targets.iter().for_each(|target| println!("{target}"));
        return Ok(());
    }
    if let Some(wanted) = &options.target {
        targets.retain(|target| target == wanted);
        if targets.is_empty() {
            bail!("there is no target {wanted}: `cargo xtask fuzz --list` says what there is");
        }
    }
    let control = targets.last().is_some_and(|last| last == CONTROL);
    targets.truncate(targets.len() - usize::from(control));

    let mut reports = Vec::new();
    if !targets.is_empty() {
        prepare(&root)?;
        announce("building the targets");
        process::run(cargo_fuzz(&root, "build").args(&targets[..usize::from(targets.len() == 1)]))?;
    }
    for target in &targets {
        announce(format_args!("{target}, for {} s", options.seconds));
        reports.push(fuzz(&root, target, options.seconds)?);
    }
    let well = if control { drive(&root, options.seconds)? } else { true };
    if !reports.is_empty() {
        announce("summary");
        println!("{}", Table(&reports));
    }
    if reports.iter().any(|report| report.crash.is_some()) || !well {
        bail!("something was found: see above");
    }
    Ok(())
}

/// The names of the targets, sorted.
fn targets(root: &Path) -> Result<Vec<String>> {
    let directory = root.join("fuzz/targets");
    let entries = std::fs::read_dir(&directory)
        .with_context(|| format!("cannot list {}", directory.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        names.extend(path.file_stem().and_then(OsStr::to_str).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Installs what the targets are built with, where it is missing.
fn prepare(root: &Path) -> Result<()> {
    let nightly = Command::new("rustup").args(["run", "nightly", "rustc", "--version"]).output();
    if !nightly.is_ok_and(|output| output.status.success()) {
        bail!("libFuzzer needs a nightly compiler: `rustup toolchain install nightly`");
    }
    if process::find_program("cargo-fuzz").is_none()
        && process::read(cargo::cargo(root).args(["fuzz", "--version"])).is_err()
    {
        announce("installing cargo-fuzz");
        process::run(cargo::cargo(root).args([
            "install",
            "--locked",
            "cargo-fuzz",
            "--version",
            CARGO_FUZZ,
        ]))?;
    }
    Ok(())
}

/// A command of cargo-fuzz, with the nightly compiler.
///
/// Without AddressSanitizer: all that reads the input is safe code, which panics at what the sanitizer
/// would see. It would only slow the targets' build, and their runs.
fn cargo_fuzz(root: &Path, verb: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "fuzz", verb, "--fuzz-dir"]).arg(root.join("fuzz"));
    command.arg("--target-dir").arg(root.join("target/fuzz"));
    command.args(["--all-features", "--sanitizer", "none"]).current_dir(root);
    command
}

/// Runs a target: first its seeds, and what earlier runs have found worth keeping.
fn fuzz(root: &Path, target: &str, seconds: u64) -> Result<Report> {
    let corpus = root.join("target/fuzz/corpus").join(target);
    std::fs::create_dir_all(&corpus).context("cannot make a directory for the corpus")?;
    let mut command = cargo_fuzz(root, "run");
    command.arg(target).arg(corpus);
    let seeds = root.join("fuzz/seeds").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    command.arg("--").arg(format!("-max_total_time={seconds}"));
    command.args(["-print_final_stats=1", "-timeout=20", &format!("-max_len={LONGEST}")]);
    let mut child = command.stderr(Stdio::piped()).spawn().context("cannot start cargo-fuzz")?;
    let mut report = Report { target: target.to_owned(), ..Report::default() };
    let mut said = Vec::new();
    for line in BufReader::new(child.stderr.take().context("a pipe")?).lines() {
        let line = line.context("cannot read what libFuzzer says")?;
        report.hear(&line);
        said.push(line);
    }
    if !child.wait()?.success() {
        // What led to it stands at the end.
        said.iter().skip(said.len().saturating_sub(80)).for_each(|line| eprintln!("{line}"));
        report.crash.get_or_insert_with(|| "ended badly".to_owned());
    }
    Ok(report)
}

/// Runs the driver for the control interface. Gives whether all was well.
fn drive(root: &Path, seconds: u64) -> Result<bool> {
    let seconds = seconds.to_string();
    let variables = [("CARNET_CONTROL_FUZZ_SECONDS", OsStr::new(&seconds))];
    Ok(process::status(&mut SUITE.alone(root, &variables)?)?.success())
}

/// What libFuzzer said of a target.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    target: String,
    executions: u64,
    edges: u64,
    new: u64,
    /// The input that led to a crash, where there was one.
    crash: Option<String>,
}

impl Report {
    fn hear(&mut self, line: &str) {
        let number = |text: &str| text.split_whitespace().next()?.parse().ok();
        if let Some(edges) = line.split("cov: ").nth(1).and_then(number) {
            self.edges = edges;
        } else if let Some(text) = line.strip_prefix("stat::number_of_executed_units:") {
            self.executions = number(text).unwrap_or(0);
        } else if let Some(text) = line.strip_prefix("stat::new_units_added:") {
            self.new = number(text).unwrap_or(0);
        } else if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.crash = Some(path.trim().to_owned());
        }
    }
}

/// All of them as a table.
struct Table<'a>(&'a [Report]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:18} {:>12} {:>8} {:>8}  crash", "target", "executions", "edges", "new")?;
        for report in self.0 {
            let Report { target, executions, edges, new, crash } = report;
            let crash = crash.as_deref().unwrap_or("none");
            write!(f, "\n{target:18} {executions:12} {edges:8} {new:8}  {crash}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libfuzzers_words_are_understood() {
        let mut report = Report::default();
        for line in [
            "#2\tINITED cov: 211 ft: 212 corp: 1/1b exec/s: 0 rss: 40Mb",
            "#1048576\tpulse  cov: 734 ft: 1800 corp: 210/3kb lim: 4096 exec/s: 349525 rss: 60Mb",
            "stat::number_of_executed_units: 1234567",
            "stat::average_exec_per_sec:     20576",
            "stat::new_units_added:          89",
        ] {
            report.hear(line);
        }
        assert_eq!((report.executions, report.edges, report.new), (1_234_567, 734, 89));
        assert_eq!(report.crash, None);
        report.hear("artifact_prefix='a/'; Test unit written to a/crash-0123");
        assert_eq!(report.crash.as_deref(), Some("a/crash-0123"));
        assert!(Table(&[report]).to_string().ends_with("a/crash-0123"));
    }
}

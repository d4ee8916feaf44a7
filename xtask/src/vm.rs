//! `cargo xtask vm`: the demonstration and the tests on kernels that this machine does not run.
//!
//! What a kernel's verifier makes of a program shows only on that kernel. Debian's kernels are booted
//! in qemu, with a file system in memory that has what the tests need and nothing else.

mod image;
mod kernels;
mod machine;

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::image::Contents;
use self::machine::{Accelerator, Boot, EMULATOR, Machine};
use crate::cargo::{self, Kind};
use crate::conformance;
use crate::host::{self, PROGRAMS};
use crate::process::{announce, find_program, is_root};

/// The kernels of Debian's stable releases: the oldest that Carnet supports, and the next.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// What builds and runs a machine, and the Debian package of each.
const TOOLS: [(&str, &str); 4] = [
    (EMULATOR, "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("strip", "binutils"),
];
/// What every program needs, what compiles one without shared libraries, and a shell: that of Busybox
/// would take Busybox's own `ip` for the one that scripts mean.
const BASE: [&str; 4] = ["libc6", "libc6-dev", "libgcc-s1", "dash"];
/// The programs, as `cargo build` is told.
const PACKAGES: [&str; 4] = ["carnet-cli", "carnet-inspect", "carnet-testbed", "carnet-tests"];
/// The suites that are run, and what they are given besides: the matrix is to show itself.
const SUITES: [(&str, &str, &str); 3] = [
    ("carnet-tests", "e2e", ""),
    ("carnet-tests", "evasion", ""),
    (conformance::SUITE.0, conformance::SUITE.1, "--nocapture"),
];
/// No boot takes as long, even on a busy machine under emulation.
const LIMIT: Duration = Duration::from_secs(45 * 60);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Install and download what is needed (Debian) and stop
    #[arg(long, conflicts_with = "arguments")]
    install: bool,
    /// Boot the newest kernel of this series only; may be repeated
    #[arg(long = "kernel", value_name = "SERIES", default_values = SERIES)]
    kernels: Vec<String>,
    /// Run only this suite (e2e, conformance); may be repeated
    #[arg(long = "suite", value_name = "NAME", value_parser = SUITES.map(|(_, name, _)| name))]
    suites: Vec<String>,
    /// Emulate the processor, even where its own help (KVM) is to be had
    #[arg(long)]
    emulate: bool,
    /// Given to the tests, for example a part of a test's name
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    let directory = cargo::target_directory(&root).join("vm");
    announce("checking this machine");
    if !(cfg!(target_arch = "x86_64") && host::is_debian()) {
        bail!("this needs Debian on x86-64: it boots Debian's kernels with Debian's programs");
    }
    install()?;
    let kernels = options
        .kernels
        .iter()
        .map(|series| kernels::find(series, &directory.join("kernels")))
        .collect::<Result<Vec<_>>>()?;
    for kernel in &kernels {
        eprintln!("    kernel: {}", kernel.release);
    }
    let accelerator = if options.emulate { Accelerator::Emulation } else { Accelerator::find() };
    eprintln!("    processor: {accelerator}");
    if options.install {
        return Ok(());
    }

    announce("building what the machine runs");
    let mut arguments: Vec<&str> =
        PACKAGES.iter().flat_map(|package| ["--package", package]).collect();
    arguments.push("--bins");
    let wanted = |name: &str| options.suites.is_empty() || options.suites.iter().any(|s| s == name);
    let suites: Vec<_> = SUITES.iter().filter(|(_, target, _)| wanted(target)).collect();
    arguments.extend(suites.iter().flat_map(|(_, target, _)| ["--test", target]));
    let built = cargo::build(&root, &arguments)?;
    let suites = suites
        .into_iter()
        .map(|(package, target, given)| {
            let is_it = |built: &&cargo::Built| {
                built.kind == Kind::Tests && built.package == *package && built.target == *target
            };
            let found = built.iter().find(is_it);
            Ok((found.with_context(|| format!("{package} has no tests {target}"))?, *given))
        })
        .collect::<Result<Vec<_>>>()?;
    let contents = Contents {
        programs: built.iter().filter(|built| built.kind == Kind::Program).collect(),
        suites,
        arguments: options.arguments.clone(),
        packages: packages(),
        links: PROGRAMS.iter().filter_map(|(program, _)| find_program(program)).collect(),
        kernels: &kernels,
    };
    let initramfs = contents.write(&directory)?;

    let mut boots = Vec::new();
    for kernel in &kernels {
        announce(format_args!("Linux {}", kernel.release));
        let machine = Machine {
            accelerator,
            kernel,
            initramfs: &initramfs,
            directory: &directory,
            limit: LIMIT,
        };
        let boot = machine.boot()?;
        if !boot.problems.is_empty() || boot.heard.failed > 0 {
            boot.show_logs()?;
        }
        boots.push(boot);
    }
    announce("summary");
    let summary = Summary { boots };
    println!("{summary}");
    summary.verdict()
}

/// Debian's packages that are on board.
fn packages() -> Vec<String> {
    let programs = PROGRAMS.iter().map(|(_, package)| package);
    programs.chain(&BASE).map(|package| (*package).to_owned()).collect()
}

/// Installs what is missing, where it may.
fn install() -> Result<()> {
    let tools = TOOLS.iter().filter(|(tool, _)| find_program(tool).is_none());
    let missing: Vec<String> = tools
        .map(|(_, package)| (*package).to_owned())
        .chain(packages().into_iter().filter(|package| !host::is_installed(package)))
        .collect();
    if missing.is_empty() {
        eprintln!("    programs: {}", TOOLS.map(|(tool, _)| tool).join(", "));
        return Ok(());
    }
    if is_root() {
        return host::install_packages(&missing);
    }
    let missing = missing.join(" ");
    bail!("missing: apt-get install --no-install-recommends {missing}")
}

/// What came of all boots.
struct Summary {
    boots: Vec<Boot>,
}

impl Summary {
    fn passed(&self) -> u64 {
        let demo = |boot: &Boot| u64::from(boot.heard.is_well("demo"));
        self.boots.iter().map(|boot| boot.heard.passed + demo(boot)).sum()
    }

    fn failed(&self) -> u64 {
        self.boots.iter().map(|boot| boot.heard.failed + boot.problems.len() as u64).sum()
    }

    /// Fails when anything failed, or no test was run on one of the kernels.
    fn verdict(&self) -> Result<()> {
        if self.failed() > 0 {
            bail!("tests failed");
        }
        match self.boots.iter().find(|boot| boot.heard.passed == 0) {
            Some(boot) => bail!("no test was run on Linux {}", boot.release),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.boots.iter().map(|boot| boot.release.len()).max().unwrap_or(0);
        let header = "kernel";
        writeln!(f, "    {header:width$}    demo  passed  failed  skipped  seconds")?;
        for boot in &self.boots {
            let Boot { release, seconds, heard, problems, .. } = boot;
            let demo = if heard.is_well("demo") { "ok" } else { "failed" };
            let (passed, failed, skipped) = (heard.passed, heard.failed, heard.skipped);
            writeln!(
                f,
                "    {release:width$}  {demo:>6}  {passed:6}  {failed:6}  {skipped:7}  {seconds:7}"
            )?;
            for problem in problems {
                writeln!(f, "        failed: {problem}")?;
            }
            for test in &heard.failures {
                writeln!(f, "        failed: {test}")?;
            }
        }
        let programs: BTreeSet<&String> =
            self.boots.iter().flat_map(|boot| boot.heard.verified.keys()).collect();
        let widest = programs.iter().map(|name| name.len()).max().unwrap_or(0);
        write!(f, "\n    {:widest$}", "")?;
        for boot in &self.boots {
            write!(f, "  {:>width$}", boot.release)?;
        }
        writeln!(f, "  instructions that the verifier looked at")?;
        for program in programs {
            write!(f, "    {program:widest$}")?;
            for boot in &self.boots {
                match boot.heard.verified.get(program) {
                    Some(instructions) => write!(f, "  {instructions:>width$}")?,
                    None => write!(f, "  {:>width$}", "-")?,
                }
            }
            writeln!(f)?;
        }
        write!(f, "\n{} passed, {} failed", self.passed(), self.failed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(lines: &[&str]) -> Boot {
        Boot::heard_of("6.1.0-1-amd64", lines)
    }

    const WELL: [&str; 5] = [
        "carnet-vm: end demo 0",
        "carnet-vm: begin programs",
        r#"{"programs":[{"name":"connect4","verified_instructions":59519}]}"#,
        "carnet-vm: end programs 0",
        "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out",
    ];

    #[test]
    fn demonstrations_count_and_the_last_line_has_the_sum() {
        let boots = vec![boot(&[&WELL[..], &["carnet-vm: tainted 0"]].concat())];
        let summary = Summary { boots };
        let text = summary.to_string();
        assert!(text.ends_with("\n4 passed, 0 failed"), "{text}");
        assert!(text.contains("connect4          59519\n"), "{text}");
        assert!(summary.verdict().is_ok());
    }

    #[test]
    fn a_machine_that_ends_early_or_tests_nothing_is_not_green() {
        let early = Summary { boots: vec![boot(&WELL)] };
        assert!(early.to_string().ends_with("\n4 passed, 1 failed"), "{early}");
        assert_eq!(early.verdict().unwrap_err().to_string(), "tests failed");

        let nothing = [&WELL[..4], &["carnet-vm: tainted 0"]].concat();
        let nothing = Summary { boots: vec![boot(&nothing)] };
        let verdict = nothing.verdict().unwrap_err().to_string();
        assert_eq!(verdict, "no test was run on Linux 6.1.0-1-amd64");
    }
}

//! `cargo xtask vm`: the demonstration and the tests on kernels that this machine does not run.
//!
//! What a kernel's verifier makes of a program shows only on that kernel. Debian's kernels are booted
//! in qemu, with a file system in memory that has what the tests need and nothing else. One of them is
//! older than Carnet supports: there the command has to say so, and to leave the machine alone.

mod image;
mod kernels;
mod machine;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use self::image::Contents;
use self::kernels::Kernel;
use self::machine::{Accelerator, Boot, EMULATOR, Expectation, Machine};
use crate::cargo::{self, Kind};
use crate::conformance;
use crate::host::{self, PROGRAMS};
use crate::process::{announce, find_program, is_root};
use crate::test::Suite;
use crate::verifier::Ledger;

/// The kernels of Debian's releases: one that Carnet refuses, the oldest that it supports, and the next.
const SERIES: [&str; 3] = ["5.10", "6.1", "6.12"];
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
/// The suites that are run.
const SUITES: [Booted; 4] = [
    // A chain, trust, every way to fail, and filters of all kinds.
    Booted {
        suite: Suite { package: "carnet-tests", target: "e2e" },
        given: "",
        quick: Some("chains::two_services chains::trust_ failures:: filters::"),
    },
    Booted { suite: Suite { package: "carnet-tests", target: "evasion" }, given: "", quick: None },
    Booted { suite: Suite { package: "carnet-tests", target: "attacks" }, given: "", quick: None },
    // The matrix is to show itself.
    Booted { suite: conformance::SUITE, given: "--nocapture", quick: Some("") },
];
/// No boot takes as long, even on a busy machine under emulation.
const LIMIT: Duration = Duration::from_secs(45 * 60);

/// A program of tests that is run in the machine.
#[derive(Clone, Copy)]
struct Booted {
    suite: Suite,
    /// Words that it is always given.
    given: &'static str,
    /// Which of its tests `--quick` runs, as words that it is given; `None` if not any.
    quick: Option<&'static str>,
}

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Install and download what is needed (Debian) and stop
    #[arg(long, conflicts_with = "arguments")]
    install: bool,
    /// Boot the newest kernel of this series only, or `newest`; may be repeated
    #[arg(long = "kernel", value_name = "SERIES", default_values = SERIES)]
    kernels: Vec<String>,
    /// Run only this suite; may be repeated
    #[arg(long = "suite", value_name = "NAME", value_parser = SUITES.map(|booted| booted.suite.target))]
    suites: Vec<String>,
    /// Run a selection of tests that takes less than a minute a kernel
    #[arg(long, conflicts_with = "arguments")]
    quick: bool,
    /// Emulate the processor, even where its own help (KVM) is to be had
    #[arg(long)]
    emulate: bool,
    /// Given to the tests, for example a part of a test's name
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Options {
    /// The suites to run, and what each is given.
    fn suites(&self) -> Vec<(Suite, String)> {
        let wanted = |booted: &Booted| {
            self.suites.is_empty() || self.suites.iter().any(|name| name == booted.suite.target)
        };
        let given = |Booted { suite, given, quick }| {
            let selection = if self.quick { quick? } else { "" };
            Some((suite, format!("{given} {selection}")))
        };
        SUITES.into_iter().filter(wanted).filter_map(given).collect()
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    let house = House::prepare(&root, &options.kernels, options.emulate)?;
    if options.install {
        return Ok(());
    }
    let mut boots = house.boot_all(&options.suites(), &options.arguments)?;
    let ledger = Ledger::read(&root)?;
    for boot in &mut boots {
        if !boot.heard.verified.is_empty() {
            boot.problems.extend(ledger.problems(&boot.release, &boot.heard.verified));
        }
    }
    announce("summary");
    let summary = Summary { boots };
    println!("{summary}");
    summary.verdict()
}

/// What the verifiers of the supported kernels say of each program: by release and program, the number
/// of instructions that the verifier went through.
pub(crate) fn measure(root: &Path) -> Result<BTreeMap<String, BTreeMap<String, u32>>> {
    let supported = SERIES.iter().filter(|series| Expectation::of(series) == Expectation::Works);
    let kernels: Vec<String> =
        supported.chain([&kernels::NEWEST]).map(|series| (*series).to_owned()).collect();
    let house = House::prepare(root, &kernels, false)?;
    let boots = house.boot_all(&[], &[])?;
    let mut measured = BTreeMap::new();
    for Boot { release, problems, heard, .. } in boots {
        if let Some(problem) = problems.first() {
            bail!("Linux {release}: {problem}");
        }
        measured.insert(release, heard.verified);
    }
    Ok(measured)
}

/// What virtual machines are made of.
struct House<'a> {
    root: &'a Path,
    /// For all that is downloaded, built and written.
    directory: PathBuf,
    kernels: Vec<Kernel>,
    accelerator: Accelerator,
}

impl<'a> House<'a> {
    /// Installs and downloads what is needed.
    fn prepare(root: &'a Path, kernels: &[String], emulate: bool) -> Result<Self> {
        let directory = cargo::target_directory(root).join("vm");
        announce("checking this machine");
        if !(cfg!(target_arch = "x86_64") && host::is_debian()) {
            bail!("this needs Debian on x86-64: it boots Debian's kernels with Debian's programs");
        }
        install()?;
        let kernels = kernels
            .iter()
            .map(|series| kernels::find(series, &directory.join("kernels")))
            .collect::<Result<Vec<_>>>()?;
        for kernel in &kernels {
            eprintln!("    kernel: {}", kernel.release);
        }
        let accelerator = if emulate { Accelerator::Emulation } else { Accelerator::find() };
        eprintln!("    processor: {accelerator}");
        Ok(Self { root, directory, kernels, accelerator })
    }

    /// Boots every kernel and runs the suites there, each with the words that it is given, and with
    /// `arguments`, one to a word.
    fn boot_all(&self, suites: &[(Suite, String)], arguments: &[String]) -> Result<Vec<Boot>> {
        announce("building what the machine runs");
        let built = cargo::build_all(self.root)?;
        let contents = Contents {
            programs: built
                .iter()
                .filter(|built| {
                    built.kind == Kind::Program && PACKAGES.contains(&built.package.as_str())
                })
                .collect(),
            suites: suites
                .iter()
                .map(|(suite, given)| Ok((suite.find(&built)?, given.as_str())))
                .collect::<Result<_>>()?,
            arguments: arguments.to_vec(),
            packages: packages(),
            links: PROGRAMS.iter().filter_map(|(program, _)| find_program(program)).collect(),
            kernels: &self.kernels,
        };
        let initramfs = contents.write(&self.directory)?;

        let mut boots = Vec::new();
        for kernel in &self.kernels {
            announce(format_args!("Linux {}", kernel.release));
            let machine = Machine {
                accelerator: self.accelerator,
                kernel,
                expectation: Expectation::of(&kernel.release),
                initramfs: &initramfs,
                directory: &self.directory,
                limit: LIMIT,
            };
            let boot = machine.boot()?;
            if !boot.problems.is_empty() || boot.heard.failed > 0 {
                boot.show_logs()?;
            }
            boots.push(boot);
        }
        Ok(boots)
    }
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
        // The demonstration is one, and a refusal.
        let whole = |boot: &Boot| u64::from(boot.is_as_expected());
        self.boots.iter().map(|boot| boot.heard.passed + whole(boot)).sum()
    }

    fn failed(&self) -> u64 {
        self.boots.iter().map(|boot| boot.heard.failed + boot.problems.len() as u64).sum()
    }

    /// Fails when anything failed, or no test was run on one of the kernels.
    fn verdict(&self) -> Result<()> {
        if self.failed() > 0 {
            bail!("tests failed");
        }
        let tested = |boot: &&Boot| boot.expectation == Expectation::Works;
        match self.boots.iter().filter(tested).find(|boot| boot.heard.passed == 0) {
            Some(boot) => bail!("no test was run on Linux {}", boot.release),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.boots.iter().map(|boot| boot.release.len()).max().unwrap_or(0);
        let header = "kernel";
        writeln!(f, "    {header:width$}     demo  passed  failed  skipped  seconds")?;
        for boot in &self.boots {
            let Boot { release, seconds, heard, problems, .. } = boot;
            let demo = match (boot.is_as_expected(), boot.expectation) {
                (true, Expectation::Works) => "ok",
                (true, Expectation::Refuses) => "refused",
                (false, _) => "failed",
            };
            let (passed, failed, skipped) = (heard.passed, heard.failed, heard.skipped);
            writeln!(
                f,
                "    {release:width$}  {demo:>7}  {passed:6}  {failed:6}  {skipped:7}  {seconds:7}"
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

//! `cargo xtask test`: everything that runs on the local kernel.
//!
//! Everything is built once, as the current user. Then every test program is run in its package's
//! directory, as cargo would: those of [`PRIVILEGED`] packages as root, through sudo where need be.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Built, Kind};
use crate::host;
use crate::process::{self, Privilege, announce};

/// The packages whose tests make network namespaces and cgroups and attach BPF programs.
pub(crate) const PRIVILEGED: [&str; 4] =
    ["carnet-cli", "carnet-engine", "carnet-testbed", "carnet-tests"];

pub(crate) fn run(arguments: &[OsString]) -> Result<()> {
    let privilege = host::prepare()?;
    let root = cargo::workspace_root()?;
    announce("building the workspace and its tests");
    let mut programs = cargo::build_all(&root)?;
    programs.retain(|program| program.kind == Kind::Tests);
    programs.sort_by(|a, b| (&a.package, &a.target).cmp(&(&b.package, &b.target)));
    let (privileged, plain): (Vec<_>, Vec<_>) =
        programs.iter().partition(|program| PRIVILEGED.contains(&program.package.as_str()));

    let mut summary = Summary::default();
    announce("unit tests, as the current user");
    for program in plain {
        run_program(program, Command::new(&program.executable), arguments, &mut summary)?;
    }
    announce("examples in the documentation, as the current user");
    let mut doc_tests = cargo::cargo(&root);
    doc_tests.args(["test", "--workspace", "--doc", "--no-fail-fast", "--"]).args(arguments);
    summary.add("documentation", |outcome| {
        process::lines(&mut doc_tests, |line| outcome.hear(line))
    })?;

    announce("end-to-end tests, as root");
    privilege.obtain()?;
    for program in privileged {
        let command = as_root(privilege, program);
        run_program(program, command, arguments, &mut summary)?;
    }
    announce("summary");
    println!("{summary}");
    summary.verdict(arguments.is_empty())
}

/// The test program, to be run as root, with the variables that tests are promised by cargo or
/// that the user set for them.
pub(crate) fn as_root(privilege: Privilege, program: &Built) -> Command {
    as_root_with(privilege, program, &[])
}

/// The same, with more variables.
pub(crate) fn as_root_with(
    privilege: Privilege,
    program: &Built,
    more: &[(&str, &OsStr)],
) -> Command {
    let handed_on: Vec<(&str, OsString)> = ["RUST_BACKTRACE", "RUST_LOG", "CI", "TERM", "NO_COLOR"]
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
        .collect();
    let mut environment: Vec<(&str, &OsStr)> =
        handed_on.iter().map(|(name, value)| (*name, value.as_os_str())).collect();
    environment.push(("CARGO_MANIFEST_DIR", program.directory.as_os_str()));
    environment.extend(more);
    privilege.command(&program.executable, &environment)
}

/// A test program that has a command of its own, beside `cargo xtask test`.
#[derive(Clone, Copy)]
pub(crate) struct Suite {
    pub(crate) package: &'static str,
    pub(crate) target: &'static str,
}

impl Suite {
    /// Among what was built.
    pub(crate) fn find<'a>(&self, built: &'a [Built]) -> Result<&'a Built> {
        let Self { package, target } = self;
        built
            .iter()
            .find(|one| one.kind == Kind::Tests && one.package == *package && one.target == *target)
            .with_context(|| format!("{package} has no tests {target}"))
    }

    /// Builds it, and gives the command that runs it alone as root, with these variables; it writes to the
    /// terminal itself.
    pub(crate) fn alone(&self, root: &Path, variables: &[(&str, &OsStr)]) -> Result<Command> {
        let privilege = host::prepare()?;
        announce("building the tests");
        let built = cargo::build_all(root)?;
        let suite = self.find(&built)?;
        announce(format_args!("{}, as root", self.target));
        privilege.obtain()?;
        let mut command = as_root_with(privilege, suite, variables);
        command.arg("--nocapture").current_dir(&suite.directory);
        Ok(command)
    }
}

/// Runs a test program by `command` in its package's directory, and adds what came of it.
pub(crate) fn run_program(
    program: &Built,
    mut command: Command,
    arguments: &[OsString],
    summary: &mut Summary,
) -> Result<()> {
    let name = format!("{}: {}", program.package, program.target);
    println!("\n--- {name}");
    command.args(arguments).current_dir(&program.directory);
    command.env("CARGO_MANIFEST_DIR", &program.directory);
    summary.add(&name, |outcome| process::lines(&mut command, |line| outcome.hear(line)))
}

/// What came of one test program.
#[derive(Debug, Default)]
struct Outcome {
    name: String,
    passed: u64,
    failed: u64,
    ignored: u64,
    /// The names of the tests that failed.
    failures: Vec<String>,
    /// Whether the harness has said its result: a test can end its program before that.
    concluded: bool,
    /// How the program ended, if not well: a crash has no line of its own to count.
    ended_badly: Option<ExitStatus>,
}

impl Outcome {
    /// Prints a line of the test harness and takes from it what the summary needs.
    fn hear(&mut self, line: &str) {
        println!("{line}");
        if let Some(result) = line.strip_prefix("test result: ") {
            self.concluded = true;
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.ignored += count(result, "ignored");
        } else if let Some(test) = line.strip_prefix("test ")
            && let Some(test) = test.strip_suffix(" ... FAILED")
        {
            self.failures.push(test.to_owned());
        }
    }
}

/// The number before the word in a harness's line `ok. 3 passed; 0 failed; …`.
pub(crate) fn count(result: &str, word: &str) -> u64 {
    result
        .split([';', '.'])
        .filter_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
        .sum()
}

/// What came of all of them.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    outcomes: Vec<Outcome>,
}

impl Summary {
    fn add(
        &mut self,
        name: &str,
        run: impl FnOnce(&mut Outcome) -> Result<ExitStatus>,
    ) -> Result<()> {
        let mut outcome = Outcome { name: name.to_owned(), ..Outcome::default() };
        let status = run(&mut outcome)?;
        if !status.success() {
            outcome.ended_badly = Some(status);
        } else if !outcome.concluded {
            outcome.failed += 1;
            outcome.failures.push("the program ended without a result".to_owned());
        }
        self.outcomes.push(outcome);
        Ok(())
    }

    /// Adds a check that is no test program.
    pub(crate) fn add_check(&mut self, name: &str, result: Result<()>) {
        let mut outcome = Outcome { name: name.to_owned(), ..Outcome::default() };
        match result {
            Ok(()) => outcome.passed = 1,
            Err(error) => {
                outcome.failed = 1;
                outcome.failures.push(format!("{error:#}"));
            }
        }
        self.outcomes.push(outcome);
    }

    /// Whether a test of the package has passed.
    pub(crate) fn ran(&self, package: &str) -> bool {
        let of_package = format!("{package}: ");
        self.outcomes
            .iter()
            .any(|outcome| outcome.name.starts_with(&of_package) && outcome.passed > 0)
    }

    fn total(&self, of: impl Fn(&Outcome) -> u64) -> u64 {
        self.outcomes.iter().map(of).sum()
    }

    /// Fails when anything failed. `all` says that no test was left out on purpose: then every
    /// privileged package must have run one, or a green run would hide that nothing was tested.
    pub(crate) fn verdict(&self, all: bool) -> Result<()> {
        if self.outcomes.iter().any(|outcome| outcome.failed > 0 || outcome.ended_badly.is_some()) {
            bail!("tests failed");
        }
        if self.total(|outcome| outcome.passed) == 0 {
            bail!("no test was run");
        }
        if let Some(package) = PRIVILEGED.iter().find(|package| all && !self.ran(package)) {
            bail!("no test of {package} was run");
        }
        Ok(())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |outcome: &&Outcome| {
            outcome.passed + outcome.failed + outcome.ignored > 0 || outcome.ended_badly.is_some()
        };
        let width = self.outcomes.iter().map(|outcome| outcome.name.len()).max().unwrap_or(0);
        for outcome in self.outcomes.iter().filter(counted) {
            let Outcome { name, passed, failed, ignored, .. } = outcome;
            write!(
                f,
                "    {name:width$}  {passed:5} passed {failed:3} failed {ignored:3} skipped"
            )?;
            match outcome.ended_badly {
                Some(status) if *failed == 0 => writeln!(f, "  ended badly: {status}")?,
                _ => writeln!(f)?,
            }
            for test in &outcome.failures {
                writeln!(f, "        failed: {test}")?;
            }
        }
        let passed = self.total(|outcome| outcome.passed);
        let ended_badly =
            |outcome: &Outcome| u64::from(outcome.failed == 0 && outcome.ended_badly.is_some());
        let failed = self.total(|outcome| outcome.failed + ended_badly(outcome));
        let skipped = self.total(|outcome| outcome.ignored);
        write!(f, "\ntotal: {passed} passed, {failed} failed, {skipped} skipped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, lines: &[&str]) -> Summary {
        let mut summary = Summary::default();
        let end = if lines.iter().any(|line| line.contains("FAILED")) { "false" } else { "true" };
        summary
            .add(name, |outcome| {
                lines.iter().for_each(|line| outcome.hear(line));
                process::status(&mut Command::new(end))
            })
            .unwrap();
        summary
    }

    #[test]
    fn the_harness_is_counted_and_its_failures_are_named() {
        let summary = outcome(
            "carnet: chain",
            &[
                "test one ... ok",
                "test two ... FAILED",
                "test result: FAILED. 11 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out",
            ],
        );
        let text = summary.to_string();
        assert!(text.contains("failed: two"), "{text}");
        assert!(text.ends_with("total: 11 passed, 1 failed, 2 skipped"), "{text}");
        assert_eq!(summary.verdict(false).unwrap_err().to_string(), "tests failed");
    }

    #[test]
    fn a_program_that_crashes_is_a_failure_without_a_count() {
        let mut summary = Summary::default();
        summary.add("carnet: crash", |_| process::status(&mut Command::new("false"))).unwrap();
        assert!(summary.to_string().contains("ended badly"), "{summary}");
        assert!(summary.to_string().ends_with("total: 0 passed, 1 failed, 0 skipped"));
        assert!(summary.verdict(false).is_err());
    }

    #[test]
    fn a_program_that_a_test_ends_is_not_green() {
        let summary = outcome("carnet: exit", &["running 2 tests", "test one ... ok"]);
        let text = summary.to_string();
        assert!(text.contains("failed: the program ended without a result"), "{text}");
        assert!(summary.verdict(false).is_err());
    }

    #[test]
    fn a_check_counts_as_a_test_and_says_what_failed() {
        let mut summary = Summary::default();
        summary.add_check("tests: one", Ok(()));
        assert!(summary.verdict(false).is_ok() && summary.ran("tests"));
        summary.add_check("tests: two", Err(anyhow::anyhow!("it said nothing")));
        let text = summary.to_string();
        assert!(text.contains("failed: it said nothing"), "{text}");
        assert!(text.ends_with("total: 1 passed, 1 failed, 0 skipped"), "{text}");
        assert!(summary.verdict(false).is_err());
    }

    #[test]
    fn a_run_that_tested_nothing_of_the_kernel_is_not_green() {
        let summary = outcome("carnet-core: carnet_core", &["test result: ok. 3 passed; 0 failed"]);
        assert!(summary.verdict(false).is_ok());
        assert!(summary.verdict(true).unwrap_err().to_string().contains("no test of carnet-"));
        assert!(outcome("carnet: carnet", &[]).verdict(false).is_err());
    }
}

//! `cargo xtask contract`: the contract, clause by clause.
//!
//! `tests/contract/clauses.toml` says what each clause says and names the tests that show it; the
//! rows of the C programs beside it name the clauses that they show. Here the two are put together:
//! into a line per clause, of what the tests gave, and into the table `docs/contract.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Deserialize;

use crate::cargo::{self, Built, Kind};
use crate::process::{self, Privilege, announce, find_program, is_root};
use crate::{host, test, winsock};

/// Where the clauses and the C programs are.
const DIRECTORY: &str = "tests/contract";
/// The table.
const TABLE: &str = "docs/contract.md";
/// The service that has to compile for Windows, and the compiler, with its Debian package.
const SERVICE: &str = "tests/contract/service.c";
const MINGW: (&str, &str) = ("x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64");
/// The service compiled for both systems, under the names by which clauses speak of that.
const COMPILATIONS: [(&str, Compilation); 2] = [
    ("mingw-w64: service.c", compile_for_windows),
    ("pkg-config: service.c", compile_with_installed_library),
];
/// A compiler that takes unstable options, and the source of its standard library; where that is.
const DEBIANS_RUST: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
const DEBIANS_LIBRARY: &str = "/usr/lib/rustlib/src/rust/library";
/// The package whose test programs run the rows.
pub(crate) const TESTS: &str = "carnet-tests";

/// Compiles the service of the checkout at this path.
type Compilation = fn(&Path) -> Result<()>;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Write the table into docs/contract.md, and run nothing
    #[arg(long, conflicts_with = "sanitize")]
    table: bool,
    /// Run the C programs and the library under a sanitizer, instead of telling of the clauses
    #[arg(long, value_name = "WHICH")]
    sanitize: Option<Sanitizer>,
}

/// What watches the programs' memory or threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sanitizer {
    /// AddressSanitizer
    Address,
    /// ThreadSanitizer
    Thread,
}

impl Sanitizer {
    /// As compilers name it.
    fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Thread => "thread",
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    let contract = Contract::read(&root)?;
    let table = contract.table();
    if options.table {
        fs::write(root.join(TABLE), table).with_context(|| format!("cannot write {TABLE}"))?;
        eprintln!("    wrote {TABLE}");
        return Ok(());
    }
    let privilege = host::prepare()?;
    if let Some(sanitizer) = options.sanitize {
        return sanitize(&root, privilege, sanitizer);
    }
    let mut results = Results::default();
    for (name, check) in COMPILATIONS {
        announce(name);
        let compiled = check(&root);
        if let Err(error) = &compiled {
            eprintln!("    failed: {error:#}");
        }
        results.0.insert(name.to_owned(), compiled.is_ok());
    }
    contract.run_tests(&root, privilege, &mut results)?;

    announce("the contract, clause by clause");
    let failed = contract.tell(&results);
    let committed = fs::read_to_string(root.join(TABLE)).unwrap_or_default();
    if !failed.is_empty() {
        bail!("{} clauses are not shown: {}", failed.len(), failed.join(", "));
    }
    if committed != table {
        bail!("{TABLE} is not what is generated: run `cargo xtask contract --table` and commit it");
    }
    eprintln!("\n    all {} clauses; {TABLE} is up to date", contract.clauses.len());
    Ok(())
}

/// Compiles the service with the headers of mingw-w64 itself. Installs the compiler where it may.
pub(crate) fn compile_for_windows(root: &Path) -> Result<()> {
    let (compiler, package) = MINGW;
    if find_program(compiler).is_none() {
        if !(host::is_debian() && is_root()) {
            bail!("{compiler} is missing (on Debian: apt-get install {package})");
        }
        host::install_packages(&[package.to_owned()])?;
    }
    let output = cargo::target_directory(root).join("service.exe");
    process::run(
        Command::new(compiler)
            .current_dir(root)
            .args(["-Wall", "-Wextra", "-Werror", "-o"])
            .arg(output)
            .args([SERVICE, "-lws2_32"]),
    )
}

/// Compiles the service as a user of the installed library does, and starts it.
fn compile_with_installed_library(root: &Path) -> Result<()> {
    if find_program("pkg-config").is_none() {
        if !(host::is_debian() && is_root()) {
            bail!("pkg-config is missing (on Debian: apt-get install pkgconf)");
        }
        host::install_packages(&["pkgconf".to_owned()])?;
    }
    let prefix = cargo::target_directory(root).join("contract-install");
    winsock::build_and_install(root, &prefix, None)?;
    let lib = prefix.join("lib");
    let flags = process::read(
        Command::new("pkg-config")
            .args(["--cflags", "--libs", "carnet-winsock"])
            .env("PKG_CONFIG_PATH", lib.join("pkgconfig")),
    )?;
    let service = prefix.join("service");
    process::run(
        Command::new("cc")
            .current_dir(root)
            .args(["-Wall", "-Wextra", "-Werror", SERVICE, "-o"])
            .arg(&service)
            .args(flags.split_whitespace()),
    )?;
    let mut child = Command::new(&service)
        .env("LD_LIBRARY_PATH", &lib)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the service")?;
    let mut line = String::new();
    let read = match child.stdout.take() {
        Some(stdout) => BufReader::new(stdout).read_line(&mut line),
        None => Ok(0),
    };
    child.kill()?;
    child.wait()?;
    read?;
    if line.trim_end() != "ready" {
        bail!("the service says {line:?} instead of being ready");
    }
    Ok(())
}

/// The file of clauses.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    clause: Vec<Clause>,
    decision: Vec<Decision>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Clause {
    /// S1, S29a, Q1, U1, W1.
    id: String,
    /// In our own words.
    says: String,
    /// The files or directories in which it is implemented.
    #[serde(default, rename = "where")]
    places: Vec<String>,
    /// Tests that are no rows, as `PACKAGE: TEST`.
    #[serde(default)]
    tests: Vec<String>,
    /// The decisions that apply.
    #[serde(default)]
    decisions: Vec<String>,
    /// Why there is no test, or none of the whole.
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Decision {
    id: String,
    issue: String,
    decision: String,
}

/// The clauses, with the tests of each.
#[derive(Debug)]
struct Contract {
    clauses: Vec<Clause>,
    decisions: Vec<Decision>,
    /// `PROGRAM/ROW` of the rows that show a clause.
    rows: BTreeMap<String, Vec<String>>,
}

/// What became of each test and row.
#[derive(Debug, Default)]
pub(crate) struct Results(pub(crate) BTreeMap<String, bool>);

/// The numbers of all clauses, in order.
fn numbers() -> Vec<String> {
    let parts: [(&str, &str); 3] = [("S29", "abc"), ("S34", "abc"), ("S37", "ab")];
    [("S", 58), ("Q", 13), ("U", 9), ("W", 49)]
        .into_iter()
        .flat_map(|(letter, count)| (1..=count).map(move |number| format!("{letter}{number}")))
        .flat_map(|id| match parts.iter().find(|(whole, _)| *whole == id) {
            Some((_, letters)) => letters.chars().map(|letter| format!("{id}{letter}")).collect(),
            None => vec![id],
        })
        .collect()
}

/// The rows of a C program: the name and the clauses of each line `ROW(name, "S1 W2")`.
fn rows(source: &str) -> Result<Vec<(String, Vec<String>)>> {
    source
        .lines()
        .filter_map(|line| line.strip_prefix("ROW("))
        .map(|row| {
            let (name, rest) = row.split_once(", \"").context("no comma after its name")?;
            let clauses = rest.strip_suffix("\")").context("it does not end with \")")?;
            Ok((name.to_owned(), clauses.split(' ').map(str::to_owned).collect()))
        })
        .map(|row: Result<_>| row.context("a line that begins with ROW( is not ROW(name, \"…\")"))
        .collect()
}

impl Contract {
    fn read(root: &Path) -> Result<Self> {
        let path = root.join(DIRECTORY).join("clauses.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let file: File = toml::from_str(&text).context("cannot understand clauses.toml")?;
        let mut programs = BTreeMap::new();
        for entry in fs::read_dir(root.join(DIRECTORY))? {
            let path = entry?.path();
            if path.extension() == Some(OsStr::new("c"))
                && let Some(name) = path.file_stem().and_then(OsStr::to_str)
            {
                programs.insert(name.to_owned(), fs::read_to_string(&path)?);
            }
        }
        let contract = Self::put_together(file, &programs)?;
        for place in contract.clauses.iter().flat_map(|clause| &clause.places) {
            if !root.join(place).exists() {
                bail!("clauses.toml names {place}, which is not there");
            }
        }
        Ok(contract)
    }

    fn put_together(file: File, programs: &BTreeMap<String, String>) -> Result<Self> {
        let found: Vec<&str> = file.clause.iter().map(|clause| clause.id.as_str()).collect();
        let expected = numbers();
        if found != expected {
            let odd = |a: &[&str], b: &[&str]| -> Vec<String> {
                a.iter().filter(|id| !b.contains(id)).map(ToString::to_string).collect()
            };
            let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
            bail!(
                "clauses.toml does not have all clauses in order: missing {:?}, too many {:?}",
                odd(&expected, &found),
                odd(&found, &expected)
            );
        }
        let mut by_clause: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (program, source) in programs {
            for (row, clauses) in rows(source).with_context(|| format!("{program}.c"))? {
                for clause in clauses {
                    if !found.contains(&clause.as_str()) {
                        bail!("{program}.c: the row {row} shows {clause:?}, which is no clause");
                    }
                    by_clause.entry(clause).or_default().push(format!("{program}/{row}"));
                }
            }
        }
        let known: BTreeSet<&str> = file.decision.iter().map(|d| d.id.as_str()).collect();
        for clause in &file.clause {
            for decision in &clause.decisions {
                if !known.contains(decision.as_str()) {
                    bail!("{}: there is no decision {decision}", clause.id);
                }
            }
        }
        Ok(Self { clauses: file.clause, decisions: file.decision, rows: by_clause })
    }

    /// The tests and rows of a clause.
    fn tests_of<'a>(&'a self, clause: &'a Clause) -> impl Iterator<Item = &'a String> {
        self.rows.get(&clause.id).into_iter().flatten().chain(&clause.tests)
    }

    /// Runs all rows, and all tests that are named.
    fn run_tests(&self, root: &Path, privilege: Privilege, results: &mut Results) -> Result<()> {
        let mut named: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for test in self.clauses.iter().flat_map(|clause| &clause.tests) {
            let (package, name) = test.split_once(": ").with_context(|| {
                format!("clauses.toml names the test {test:?}, which is not `PACKAGE: TEST`")
            })?;
            if !COMPILATIONS.iter().any(|(name, _)| name == test) {
                named.entry(package).or_default().insert(name);
            }
        }
        announce("building the tests");
        let programs = cargo::build_all(root)?;

        announce("the rows, as root");
        privilege.obtain()?;
        let suite = rows_program(&programs)?;
        let mut command = test::as_root(privilege, suite);
        hear(&mut command, suite, &["--nocapture"], results)?;

        announce("the other tests");
        for program in programs.iter().filter(|program| program.kind == Kind::Tests) {
            let Some(names) = named.get(program.package.as_str()) else { continue };
            let mut command = if test::PRIVILEGED.contains(&program.package.as_str()) {
                test::as_root(privilege, program)
            } else {
                Command::new(&program.executable)
            };
            let mut arguments = vec!["--exact"];
            arguments.extend(names);
            hear(&mut command, program, &arguments, results)?;
        }
        Ok(())
    }

    /// Prints a line per clause; gives those that are not shown.
    fn tell(&self, results: &Results) -> Vec<String> {
        let mut failed = Vec::new();
        for clause in &self.clauses {
            let verdict = self.verdict(clause, results);
            if verdict.is_err() {
                failed.push(clause.id.clone());
            }
            let text = match &verdict {
                Ok(text) | Err(text) => text,
            };
            println!("{:5} {text}", clause.id);
        }
        failed
    }

    fn verdict(&self, clause: &Clause, results: &Results) -> Result<String, String> {
        let tests: Vec<&String> = self.tests_of(clause).collect();
        let bad: Vec<String> = tests
            .iter()
            .filter_map(|test| match results.0.get(*test) {
                Some(true) => None,
                Some(false) => Some(format!("{test} failed")),
                None => Some(format!("{test} was not run: is there such a test?")),
            })
            .collect();
        if !bad.is_empty() {
            return Err(format!("FAILED: {}", bad.join("; ")));
        }
        let decided = |also: &str| {
            let reasons = clause.decisions.iter().map(|id| format!("decision {id}"));
            let all: Vec<String> = reasons.chain(clause.reason.clone()).collect();
            if all.is_empty() { String::new() } else { format!("{also}{}", all.join("; ")) }
        };
        if !tests.is_empty() {
            let tests: Vec<&str> = tests.iter().map(|test| test.as_str()).collect();
            return Ok(format!("passed: {}{}", tests.join(", "), decided(" -- ")));
        }
        match &clause.reason {
            Some(_) => Ok(format!("decided: {}", decided(""))),
            None => Err("FAILED: no test shows it, and no reason is given".to_owned()),
        }
    }

    /// The document.
    fn table(&self) -> String {
        let mut text = String::from(INTRODUCTION);
        for (letter, title) in [
            ("S", "The control code that sets a record"),
            ("Q", "Its siblings that query"),
            ("U", "UDP"),
            ("W", "Winsock's calling contract"),
        ] {
            let _ = write!(text, "\n## {title}\n\n| clause | what it says | where | shown by |\n");
            text.push_str("|---|---|---|---|\n");
            for clause in self.clauses.iter().filter(|clause| clause.id.starts_with(letter)) {
                let places: Vec<String> = clause.places.iter().map(|place| link(place)).collect();
                let tests = self.tests_of(clause).map(|test| format!("`{test}`"));
                let decisions = clause.decisions.iter().map(|id| format!("decision {id}"));
                let shown: Vec<String> =
                    tests.chain(decisions).chain(clause.reason.clone()).collect();
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} |",
                    clause.id,
                    clause.says,
                    places.join(", "),
                    shown.join("; ")
                );
            }
        }
        text.push_str("\n## Decisions\n\nWhere the sources contradict each other or reality.\n\n");
        text.push_str("| | issue | decision |\n|---|---|---|\n");
        for Decision { id, issue, decision } in &self.decisions {
            let _ = writeln!(text, "| {id} | {issue} | {decision} |");
        }
        text
    }
}

/// What stands before the table.
const INTRODUCTION: &str = "\
# The contract

<!-- Generated by `cargo xtask contract --table` from tests/contract/clauses.toml and the rows of
the C programs beside it. Change those. -->

What Windows documents for `SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS` and its siblings, clause by
clause: what it says, in our words, where Carnet implements it, and the tests that show it.
`cargo xtask contract` runs them all and prints a line per clause; a clause without a passing test or
a reason fails it.

A test `program/row` is a row of the C program `tests/contract/program.c`, which runs against the
library's headers, the real kernel and redirected sockets; others are `package: test`.
";

/// A link from the table to a file of the checkout, by its last two components.
fn link(place: &str) -> String {
    let mut last: Vec<&str> = place.rsplit('/').take(3).collect();
    last.retain(|part| *part != "src" && *part != "include");
    last.truncate(2);
    last.reverse();
    format!("[{}](../{place})", last.join("/"))
}

fn rows_program(programs: &[Built]) -> Result<&Built> {
    programs
        .iter()
        .find(|program| program.package == TESTS && program.target == "contract")
        .context("cargo built no test program called contract")
}

/// Runs a test program, prints what it says, and notes what became of tests and rows.
pub(crate) fn hear(
    command: &mut Command,
    program: &Built,
    arguments: &[&str],
    results: &mut Results,
) -> Result<()> {
    println!("\n--- {}: {}", program.package, program.target);
    command.args(arguments).current_dir(&program.directory);
    command.env("CARGO_MANIFEST_DIR", &program.directory);
    process::lines(command, |line| {
        println!("{line}");
        results.note(&program.package, line);
    })?;
    Ok(())
}

impl Results {
    /// Takes what a line of a test program says: `contract: PROGRAM/ROW passed` of a row,
    /// `test NAME ... ok` of a test. What failed once has failed: a row may be run twice.
    pub(crate) fn note(&mut self, package: &str, line: &str) {
        let told = if let Some(row) = line.strip_prefix("contract: ") {
            row.split_once(' ').map(|(row, result)| (row.to_owned(), result == "passed"))
        } else if let Some(test) = line.strip_prefix("test ") {
            test.split_once(" ... ")
                .map(|(test, result)| (format!("{package}: {test}"), result == "ok"))
        } else {
            None
        };
        if let Some((name, passed)) = told {
            *self.0.entry(name).or_insert(true) &= passed;
        }
    }
}

/// The suite under a sanitizer: the C programs, and the library.
fn sanitize(root: &Path, privilege: Privilege, sanitizer: Sanitizer) -> Result<()> {
    let name = sanitizer.name();
    announce(format_args!("building the library for {name} sanitizer"));
    let library = instrumented_library(root, sanitizer)?;
    announce("building the tests");
    let programs = cargo::build_all(root)?;
    announce("the rows, as root");
    privilege.obtain()?;
    let suite = rows_program(&programs)?;
    let flags = OsString::from(format!("-fsanitize={name} -fno-omit-frame-pointer"));
    let options = OsString::from("halt_on_error=1:exitcode=66:second_deadlock_stack=1");
    let mut command = test::as_root_with(
        privilege,
        suite,
        &[
            ("CARNET_CONTRACT_LIBRARY", library.as_os_str()),
            ("CARNET_CONTRACT_CFLAGS", &flags),
            ("ASAN_OPTIONS", &options),
            ("TSAN_OPTIONS", &options),
        ],
    );
    let mut results = Results::default();
    hear(&mut command, suite, &["--nocapture", "--test-threads=2"], &mut results)?;
    let bad: Vec<&str> =
        results.0.iter().filter(|(_, passed)| !**passed).map(|(test, _)| test.as_str()).collect();
    if !bad.is_empty() || results.0.is_empty() {
        bail!("under {name} sanitizer: {}", bad.join(", "));
    }
    eprintln!("\n    {} tests and rows, clean under {name} sanitizer", results.0.len());
    Ok(())
}

/// Builds the library instrumented; gives its directory.
///
/// That wants a compiler that takes unstable options: Debian's of the package rustc-web, as for the
/// kernel engine, or a nightly one from rustup. ThreadSanitizer has to see the locks of the standard
/// library, too, which is therefore built along.
fn instrumented_library(root: &Path, sanitizer: Sanitizer) -> Result<PathBuf> {
    let name = sanitizer.name();
    let target = "x86_64-unknown-linux-gnu";
    let directory = cargo::target_directory(root).join(format!("sanitize-{name}"));
    if host::is_debian() && is_root() {
        host::install_packages(&DEBIANS_RUST.map(str::to_owned))?;
    }
    let mut build = if Path::new(DEBIANS_LIBRARY).is_dir() {
        let mut build = Command::new("/usr/bin/cargo");
        build.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
        build
    } else {
        let mut build = Command::new("rustup");
        build.args(["run", "nightly", "cargo"]);
        build
    };
    build.arg("build");
    if sanitizer == Sanitizer::Thread {
        build.arg("-Zbuild-std=std,panic_unwind");
    }
    process::run(
        build
            .current_dir(root)
            .args(["--locked", "--package", "carnet-winsock", "--features", "test-hooks"])
            .args(["--target", target, "--target-dir"])
            .arg(&directory)
            .env("RUSTFLAGS", format!("-Zsanitizer={name}")),
    )?;
    Ok(directory.join(target).join("debug"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clause(id: &str) -> Clause {
        let says = format!("what {id} says");
        Clause {
            id: id.to_owned(),
            says,
            places: vec![],
            tests: vec![],
            decisions: vec![],
            reason: None,
        }
    }

    fn contract(change: impl FnOnce(&mut File), program: &str) -> Result<Contract> {
        let mut file = File {
            clause: numbers().iter().map(|id| clause(id)).collect(),
            decision: vec![Decision {
                id: "X1".to_owned(),
                issue: "one".to_owned(),
                decision: "other".to_owned(),
            }],
        };
        change(&mut file);
        Contract::put_together(file, &BTreeMap::from([("program".into(), program.into())]))
    }

    #[test]
    fn all_clauses_are_numbered() {
        let all = numbers();
        assert_eq!(all.len(), 134);
        assert_eq!(all.first().map(String::as_str), Some("S1"));
        assert!(all.iter().any(|id| id == "S29c") && !all.iter().any(|id| id == "S29"));
        assert_eq!(all.last().map(String::as_str), Some("W49"));
    }

    #[test]
    fn rows_are_read_from_their_lines() {
        let source = "/* ROW(no) */\nROW(one, \"S1 W2\")\n{\n}\nROW(two, \"Q3\")\n";
        let found = rows(source).unwrap();
        assert_eq!(found[0], ("one".into(), vec!["S1".into(), "W2".into()]));
        assert_eq!(found[1], ("two".into(), vec!["Q3".into()]));
        assert!(rows("ROW(three, CLAUSES)\n").is_err());
    }

    #[test]
    fn a_clause_that_is_missing_or_unknown_is_an_error() {
        let missing = contract(|file| drop(file.clause.remove(0)), "").unwrap_err().to_string();
        assert!(missing.contains("missing [\"S1\"]"), "{missing}");
        let unknown = contract(|_| (), "ROW(one, \"S59\")\n").unwrap_err().to_string();
        assert!(unknown.contains("\"S59\""), "{unknown}");
        let undecided = contract(|file| file.clause[0].decisions.push("X9".into()), "");
        assert!(undecided.unwrap_err().to_string().contains("X9"));
    }

    #[test]
    fn a_clause_passes_with_all_its_tests_and_fails_without_any() {
        let contract = contract(
            |file| {
                file.clause[0].tests.push("p: t".into());
                file.clause[1].reason = Some("why".into());
            },
            "ROW(one, \"S1\")\n",
        )
        .unwrap();
        let mut results = Results::default();
        let verdict =
            |results: &Results, at: usize| contract.verdict(&contract.clauses[at], results);
        results.note("p", "test t ... ok");
        assert!(verdict(&results, 0).unwrap_err().contains("program/one was not run"));
        results.note("tests", "contract: program/one passed");
        assert!(verdict(&results, 0).unwrap().starts_with("passed: program/one, p: t"));
        results.note("tests", "contract: program/one FAILED");
        results.note("tests", "contract: program/one passed");
        assert!(verdict(&results, 0).unwrap_err().contains("program/one failed"));
        assert_eq!(verdict(&results, 1).unwrap(), "decided: why");
        assert!(verdict(&results, 2).unwrap_err().contains("no test"));
        assert_eq!(contract.tell(&results).len(), contract.clauses.len() - 1);
    }

    #[test]
    fn an_ignored_test_shows_nothing() {
        let mut results = Results::default();
        results.note("p", "test t ... ignored");
        assert_eq!(results.0.get("p: t"), Some(&false));
    }

    #[test]
    fn a_link_has_the_crate_and_the_file() {
        let shown = link("crates/carnet-bpf/src/setsockopt.rs");
        assert_eq!(shown, "[carnet-bpf/setsockopt.rs](../crates/carnet-bpf/src/setsockopt.rs)");
    }
}

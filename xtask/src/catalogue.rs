//! Lists of what was tried and what became of it, each with the tests that show it: the tests are run,
//! a line is printed for each entry, and a page of the documentation has the list as a table.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::cargo::{self, Kind};
use crate::contract::{Results, TESTS, hear};
use crate::process::announce;
use crate::{host, page, test};

/// A list, and where its table stands.
pub(crate) struct Catalogue {
    /// What it is of, in the plural.
    pub(crate) what: &'static str,
    /// Its file.
    pub(crate) list: &'static str,
    /// The page with the table.
    pub(crate) page: &'static str,
    /// What stands before and after the table there.
    pub(crate) marks: [&'static str; 2],
    /// The command that writes the table.
    pub(crate) command: &'static str,
    /// What an entry of the table is called.
    pub(crate) column: &'static str,
    /// The test program all of whose tests are to be in the list.
    pub(crate) program: &'static str,
}

/// What can become of an entry.
pub(crate) trait Outcome: Copy + DeserializeOwned {
    /// In words.
    fn words(self) -> &'static str;
    /// Whether an entry has to say why this is so.
    fn needs_reason(self) -> bool;
    /// Whether the reason is printed where the entry is told.
    fn tells_reason(self) -> bool;
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List<O> {
    #[serde(alias = "way", alias = "attack")]
    entries: Vec<Entry<O>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry<O> {
    /// A heading.
    group: String,
    /// What is done.
    #[serde(alias = "way", alias = "attack")]
    what: String,
    outcome: O,
    /// Why it is so, where that needs a reason; else what there is to know.
    reason: Option<String>,
    /// Tests of the package of end-to-end tests.
    tests: Vec<String>,
}

impl Catalogue {
    /// Runs the tests, tells what became of each entry, and checks the page; or, with `write`, writes
    /// the table into it and runs nothing.
    pub(crate) fn run<O: Outcome>(&self, write: bool) -> Result<()> {
        let root = cargo::workspace_root()?;
        let read = |path: &str| {
            fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))
        };
        let list = self.parse::<O>(&read(self.list)?)?;
        let Self { what, page, command, .. } = self;
        let committed = read(page)?;
        let fresh = page::with_part(page, &committed, self.marks, &list.table(self.column))?;
        if write {
            fs::write(root.join(page), fresh).with_context(|| format!("cannot write {page}"))?;
            eprintln!("    wrote {page}");
            return Ok(());
        }
        let results = self.run_tests(&root, &list.tests())?;
        announce(format_args!("the {what}"));
        let failed = list.tell(&results);
        let all = list.entries.len();
        if failed > 0 {
            bail!("{failed} of {all} {what} are not shown");
        }
        if fresh != committed {
            bail!("{page} is not what is generated: run `{command} --table` and commit it");
        }
        eprintln!("\n    all {all} {what}; {page} is up to date");
        Ok(())
    }

    fn parse<O: Outcome>(&self, text: &str) -> Result<List<O>> {
        let file = self.list;
        let list: List<O> =
            toml::from_str(text).with_context(|| format!("cannot understand {file}"))?;
        for Entry { what, outcome, reason, tests, .. } in &list.entries {
            if tests.is_empty() {
                bail!("{file}: no test shows {what:?}");
            }
            if outcome.needs_reason() && reason.is_none() {
                bail!("{file}: {what:?} is without a reason");
            }
        }
        Ok(list)
    }

    fn run_tests(&self, root: &Path, names: &BTreeSet<&str>) -> Result<Results> {
        let privilege = host::prepare()?;
        announce("building the tests");
        let programs = cargo::build_all(root)?;
        announce("the tests, as root");
        privilege.obtain()?;
        let mut results = Results::default();
        let of_tests =
            |program: &&cargo::Built| program.kind == Kind::Tests && program.package == TESTS;
        for program in programs.iter().filter(of_tests) {
            let mut command = test::as_root(privilege, program);
            // All of the list's own program: a test that is not in the list is found so.
            let mut arguments = Vec::new();
            if program.target != self.program {
                arguments.push("--exact");
                arguments.extend(names);
            }
            hear(&mut command, program, &arguments, &mut results)?;
        }
        let named: BTreeSet<String> = names.iter().map(|name| format!("{TESTS}: {name}")).collect();
        if let Some(stray) = results.0.keys().find(|test| !named.contains(*test)) {
            bail!("{} does not name the test {stray:?}", self.list);
        }
        Ok(results)
    }
}

impl<O: Outcome> List<O> {
    /// The names of all tests.
    fn tests(&self) -> BTreeSet<&str> {
        self.entries.iter().flat_map(|entry| &entry.tests).map(String::as_str).collect()
    }

    /// Prints a line for each entry; gives the number of those that are not shown.
    fn tell(&self, results: &Results) -> usize {
        let lengths = self.entries.iter().map(|entry| entry.what.chars().count());
        let width = lengths.max().unwrap_or(0);
        let mut failed = 0;
        let mut group = "";
        for entry in &self.entries {
            if entry.group != group {
                group = &entry.group;
                println!("\n{group}");
            }
            let verdict = entry.verdict(results);
            failed += usize::from(verdict.is_err());
            let (Ok(text) | Err(text)) = verdict;
            println!("  {:width$}  {text}", entry.what);
        }
        failed
    }

    fn table(&self, column: &str) -> String {
        let mut text = String::new();
        let mut group = "";
        for Entry { group: own, what, outcome, reason, tests } in &self.entries {
            if own != group {
                group = own;
                let _ = write!(
                    text,
                    "\n### {group}\n\n| {column} | what happens | tests |\n|---|---|---|\n"
                );
            }
            let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
            let tests: Vec<String> = tests.iter().map(|test| format!("`{test}`")).collect();
            let (outcome, tests) = (outcome.words(), tests.join(", "));
            let _ = writeln!(text, "| {what} | {outcome}{reason} | {tests} |");
        }
        text.push('\n');
        text
    }
}

impl<O: Outcome> Entry<O> {
    /// What becomes of it, as its tests show, or what is wrong.
    fn verdict(&self, results: &Results) -> Result<String, String> {
        let bad =
            self.tests.iter().filter_map(|test| match results.0.get(&format!("{TESTS}: {test}")) {
                Some(true) => None,
                Some(false) => Some(format!("{test} failed")),
                None => Some(format!("{test} was not run: is there such a test?")),
            });
        let bad: Vec<String> = bad.collect();
        if !bad.is_empty() {
            return Err(format!("FAILED: {}", bad.join("; ")));
        }
        let reason = self.reason.as_ref().filter(|_| self.outcome.tells_reason());
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        Ok(format!("{}{reason}", self.outcome.words()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CATALOGUE: Catalogue = Catalogue {
        what: "ways",
        list: "list.toml",
        page: "page.md",
        marks: ["<", ">"],
        command: "cargo xtask list",
        column: "way",
        program: "list",
    };

    const TEXT: &str = "[[way]]\ngroup = 'g'\nway = 'connect'\noutcome = 'redirected'\n\
                        tests = ['a::b']\n[[way]]\ngroup = 'g'\nway = 'fly'\n\
                        outcome = 'exception'\nreason = 'no wings'\ntests = ['a::b', 'c']\n";

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Verdict {
        Redirected,
        Exception,
    }

    impl Outcome for Verdict {
        fn words(self) -> &'static str {
            match self {
                Self::Redirected => "redirected",
                Self::Exception => "documented exception",
            }
        }

        fn needs_reason(self) -> bool {
            self == Self::Exception
        }

        fn tells_reason(self) -> bool {
            self == Self::Exception
        }
    }

    fn parse(text: &str) -> Result<List<Verdict>> {
        CATALOGUE.parse(text)
    }

    #[test]
    fn an_entry_is_shown_by_all_its_tests() {
        let list = parse(TEXT).unwrap();
        let mut results = Results::default();
        results.note(TESTS, "test a::b ... ok");
        assert_eq!(list.entries[0].verdict(&results), Ok("redirected".to_owned()));
        assert!(list.entries[1].verdict(&results).unwrap_err().contains("c was not run"));
        assert_eq!(list.tell(&results), 1);
        results.note(TESTS, "test c ... ok");
        let told = list.entries[1].verdict(&results);
        assert_eq!(told, Ok("documented exception: no wings".to_owned()));
        results.note(TESTS, "test a::b ... FAILED");
        assert_eq!(list.tell(&results), 2);
    }

    #[test]
    fn an_exception_has_a_reason_and_every_entry_a_test() {
        assert!(parse(&TEXT.replace("reason = 'no wings'\n", "")).is_err());
        assert!(parse(&TEXT.replace("'a::b'", "").replace("'c'", "")).is_err());
        assert!(parse(&TEXT.replace("'exception'", "'whatever'")).is_err());
    }

    #[test]
    fn a_list_of_attacks_is_read_the_same_way() {
        let text = TEXT.replace("[[way]]", "[[attack]]").replace("way =", "attack =");
        assert_eq!(parse(&text).unwrap().tests(), parse(TEXT).unwrap().tests());
    }

    #[test]
    fn the_table_says_of_each_entry_what_happens() {
        let table = parse(TEXT).unwrap().table("way");
        let row = "| fly | documented exception: no wings | `a::b`, `c` |";
        assert!(table.contains(row) && table.contains("| way | what happens |"), "{table}");
    }
}

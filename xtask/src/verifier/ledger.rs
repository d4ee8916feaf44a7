//! What is noted of each program, in a file beside the object.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::stack;

/// The file.
pub(super) const FILE: &str = "crates/carnet-engine/prebuilt/verifier.toml";
/// Instructions that the verifier goes through at most; the kernel's `BPF_COMPLEXITY_LIMIT_INSNS`.
const LIMIT: u32 = 1_000_000;
/// A program that takes more than this part of the limit is too near: the next kernel may count more.
const NEAR: u32 = LIMIT / 2;
/// Percent by which a count may differ from what is noted: a kernel's updates change its verifier, too.
const TOLERANCE: u32 = 10;
/// Counts that differ by no more than this are alike; a tenth of a small program is nothing.
const ALIKE: u32 = 100;

/// What is noted of all programs.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ledger {
    /// The kernel of each series on which it was measured.
    kernels: BTreeMap<String, String>,
    programs: BTreeMap<String, Noted>,
}

/// What is noted of a program.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    /// Bytes of stack of its deepest chain of calls, as Linux 6.1 counts them.
    stack: u32,
    /// By series, the instructions that the verifier went through.
    instructions: BTreeMap<String, u32>,
}

/// The series of a kernel's release: 6.1 of 6.1.0-56-amd64.
pub(super) fn series(release: &str) -> String {
    release.splitn(3, ['.', '-', '+']).take(2).collect::<Vec<_>>().join(".")
}

impl Ledger {
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(root.join(FILE)).with_context(|| {
            format!("cannot read {FILE}, which `cargo xtask verifier --update` writes")
        })?;
        toml::from_str(&text).with_context(|| format!("cannot understand {FILE}"))
    }

    pub(super) fn write(&self, root: &Path) -> Result<()> {
        let text = format!(
            "# Written by `cargo xtask verifier --update`: of each program, the stack of its deepest \
             chain of\n# calls in bytes, and the instructions that the verifiers of these kernels went \
             through.\n{}",
            toml::to_string(self)?
        );
        std::fs::write(root.join(FILE), text).with_context(|| format!("cannot write {FILE}"))
    }

    /// From the depth of each program's stack, and for each release the programs' instructions.
    pub(super) fn of(
        depths: &BTreeMap<String, u32>,
        measured: &BTreeMap<String, BTreeMap<String, u32>>,
    ) -> Self {
        let kernels = measured.keys().map(|release| (series(release), release.clone())).collect();
        let note = |(program, stack): (&String, &u32)| {
            let counts = measured.iter().filter_map(|(release, instructions)| {
                Some((series(release), *instructions.get(program)?))
            });
            (program.clone(), Noted { stack: *stack, instructions: counts.collect() })
        };
        Self { kernels, programs: depths.iter().map(note).collect() }
    }

    /// What is noted of a program for a series of kernels.
    pub(super) fn instructions(&self, program: &str, series: &str) -> Option<u32> {
        self.programs.get(program)?.instructions.get(series).copied()
    }

    /// What is wrong with the instructions that were counted on the kernel of this release.
    pub(crate) fn problems(&self, release: &str, counted: &BTreeMap<String, u32>) -> Vec<String> {
        let mut problems = self.strangers(counted.keys());
        for (program, count) in counted {
            let on = format!("{program}: {count} instructions on Linux {release}");
            if *count > NEAR {
                problems.push(format!("{on}, more than half of the {LIMIT} that are allowed"));
            }
            if let Some(noted) = self.instructions(program, &series(release)) {
                let allowed = (noted / 100 * TOLERANCE).max(ALIKE);
                if count.abs_diff(noted) > allowed {
                    problems.push(format!("{on}, not {noted} ± {allowed} as noted"));
                }
            }
        }
        problems
    }

    /// What is wrong with these depths.
    pub(super) fn stack_problems(&self, depths: &BTreeMap<String, u32>) -> Vec<String> {
        let mut problems = self.strangers(depths.keys());
        for (program, depth) in depths {
            if *depth > stack::LIMIT {
                let limit = stack::LIMIT;
                problems.push(format!("{program}: {depth} bytes of stack, {limit} are allowed"));
            }
            if let Some(Noted { stack, .. }) = self.programs.get(program)
                && stack != depth
            {
                problems.push(format!("{program}: {depth} bytes of stack, noted {stack}"));
            }
        }
        problems
    }

    /// Programs of which nothing is noted, and those that there are not.
    fn strangers<'a>(&self, programs: impl Iterator<Item = &'a String>) -> Vec<String> {
        let there: BTreeSet<&String> = programs.collect();
        let noted: BTreeSet<&String> = self.programs.keys().collect();
        let missing =
            there.difference(&noted).map(|name| format!("{name}: nothing is noted of it"));
        let gone = noted.difference(&there).map(|name| format!("{name}: noted, but not there"));
        missing.chain(gone).collect()
    }

    /// A row for each program, a column for each series.
    pub(super) fn table(&self) -> String {
        let order = |series: &String| -> Vec<u32> {
            series.split('.').filter_map(|number| number.parse().ok()).collect()
        };
        let mut kernels: Vec<_> = self.kernels.iter().collect();
        kernels.sort_by_key(|(series, _)| order(series));
        let mut text = String::from("| program | stack |");
        let mut rule = String::from("|---|--:|");
        for (_, release) in &kernels {
            let _ = write!(text, " {release} |");
            rule.push_str("--:|");
        }
        let _ = writeln!(text, "\n{rule}");
        for (program, noted) in &self.programs {
            let _ = write!(text, "| `{program}` | {} |", noted.stack);
            for (series, _) in &kernels {
                let count = noted.instructions.get(*series).map(ToString::to_string);
                let _ = write!(text, " {} |", count.as_deref().unwrap_or("-"));
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[(&str, u32)]) -> BTreeMap<String, u32> {
        counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    fn ledger() -> Ledger {
        let measured =
            [("6.12.9+deb13-amd64", 60_000), ("6.1.0-1-amd64", 50_000)].map(|(release, count)| {
                (release.to_owned(), counts(&[("connect4", count), ("flows", 27)]))
            });
        Ledger::of(&counts(&[("connect4", 480), ("flows", 32)]), &measured.into())
    }

    #[test]
    fn it_reads_back_as_it_was_written() {
        let text = toml::to_string(&ledger()).unwrap();
        assert_eq!(toml::from_str::<Ledger>(&text).unwrap(), ledger());
    }

    #[test]
    fn a_count_may_differ_by_a_tenth_and_a_small_one_by_a_hundred() {
        let problems = |release, connect4, flows| {
            ledger().problems(release, &counts(&[("connect4", connect4), ("flows", flows)]))
        };
        assert_eq!(problems("6.1.0-2-amd64", 55_000, 127), [""; 0]);
        assert_eq!(problems("6.18.1", 400_000, 9_000), [""; 0], "nothing is noted of 6.18");
        let more = problems("6.1.0-2-amd64", 55_001, 27);
        assert_eq!(
            more,
            ["connect4: 55001 instructions on Linux 6.1.0-2-amd64, not 50000 ± 5000 as noted"]
        );
        assert_eq!(problems("6.12.1", 53_999, 27).len(), 1, "fewer is noted, too");
        let near = problems("6.18.1", 500_001, 27);
        assert!(near[0].contains("more than half of the 1000000"), "{near:?}");
    }

    #[test]
    fn every_program_is_noted_and_none_that_is_not_there() {
        let problems = ledger().problems("6.1.0", &counts(&[("connect4", 50_000), ("new", 1)]));
        assert_eq!(problems, ["new: nothing is noted of it", "flows: noted, but not there"]);
    }

    #[test]
    fn the_stack_is_as_noted_and_within_its_limit() {
        let problems =
            |connect4| ledger().stack_problems(&counts(&[("connect4", connect4), ("flows", 32)]));
        assert_eq!(problems(480), [""; 0]);
        assert_eq!(problems(512), ["connect4: 512 bytes of stack, noted 480"]);
        assert_eq!(problems(544)[0], "connect4: 544 bytes of stack, 512 are allowed");
    }

    #[test]
    fn the_table_has_older_kernels_first() {
        let table = ledger().table();
        assert!(table.starts_with("| program | stack | 6.1.0-1-amd64 | 6.12.9+deb13-amd64 |\n"));
        assert!(table.contains("| `connect4` | 480 | 50000 | 60000 |\n"), "{table}");
        assert_eq!(series("6.18.44-fc-v657"), "6.18");
        assert_eq!(series("7.0-rc1"), "7.0");
    }
}

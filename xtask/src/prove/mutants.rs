//! Rules that are broken on purpose: `model/mutants.toml`.
//!
//! A rule of carnet-core is broken in a copy of it, with which the model is built again; a part of the
//! model is broken by an option of its program. Each must be noticed, by the property that is named.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::{Build, PACKAGE, explore};
use crate::cargo;

/// The list.
const LIST: &str = "model/mutants.toml";
/// What is copied.
const CORE: &str = "crates/carnet-core";
const REFERENCE: &str = "crates/carnet-reference";
const MODEL: &str = "model";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mutants {
    mutant: Vec<Mutant>,
}

/// A rule that is broken on purpose.
#[derive(Debug, Deserialize)]
pub(super) struct Mutant {
    /// What is wrong then.
    pub(super) name: String,
    /// Which rule that is: a clause of the contract, or what it is about.
    pub(super) rule: String,
    /// The configuration that shows it.
    pub(super) configuration: String,
    /// The number of the property that notices.
    pub(super) property: String,
    /// Whether it is part of a short run.
    #[serde(default)]
    pub(super) quick: bool,
    #[serde(flatten)]
    change: Change,
}

/// What is changed.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Change {
    /// A text of carnet-core's source.
    Text {
        /// A file in `src`.
        file: String,
        from: String,
        to: String,
    },
    /// The model of the protocol.
    Protocol { defect: String },
    /// The model of transactions and hooks.
    Banks {
        #[serde(rename = "bank-defect")]
        defect: String,
    },
}

/// How a broken rule was noticed.
#[derive(Debug)]
pub(super) struct Caught {
    /// Steps of the shortest way to it.
    pub(super) steps: usize,
}

impl Mutants {
    /// Reads the list, and checks that all texts are there.
    pub(super) fn read(root: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(root.join(LIST)).with_context(|| format!("cannot read {LIST}"))?;
        let list: Self =
            toml::from_str(&text).with_context(|| format!("cannot understand {LIST}"))?;
        for mutant in &list.mutant {
            mutant.broken_source(root)?;
        }
        Ok(list)
    }

    /// Breaks the rules one after the other, and prints what came of each; `None` for those that went
    /// unnoticed.
    pub(super) fn catch(
        &self,
        root: &Path,
        build: &Build,
        program: &Path,
        wanted: impl Fn(&Mutant) -> bool,
    ) -> Result<Vec<(&Mutant, Option<Caught>)>> {
        let copy = Copy::make(root)?;
        let chosen = self.mutant.iter().filter(|mutant| wanted(mutant));
        let caught = chosen.map(|mutant| {
            let caught = mutant.catch(root, &copy, build, program)?;
            let Mutant { rule, name, .. } = mutant;
            match &caught {
                Ok(Caught { steps }) => {
                    println!("{:4} after {steps:2} steps  {name} ({rule})", mutant.property);
                }
                Err(instead) => println!("UNNOTICED ({instead})  {name} ({rule})"),
            }
            Ok((mutant, caught.ok()))
        });
        caught.collect()
    }
}

impl Mutant {
    /// The file of carnet-core that is changed, and what is in it then; `None` where the model is broken.
    fn broken_source(&self, root: &Path) -> Result<Option<(PathBuf, String)>> {
        let Change::Text { file, from, to } = &self.change else {
            return Ok(None);
        };
        let file = Path::new("src").join(file);
        let source = fs::read_to_string(root.join(CORE).join(&file))
            .with_context(|| format!("{LIST}: cannot read {}", file.display()))?;
        let places = source.matches(from.as_str()).count();
        if places != 1 {
            bail!(
                "{LIST}: {:?}: its text is in {} {places} times, not once: {from}",
                self.name,
                file.display()
            );
        }
        Ok(Some((file, source.replacen(from.as_str(), to, 1))))
    }

    /// Breaks the rule. The inner error says what was found instead of the property that was to notice.
    fn catch(
        &self,
        root: &Path,
        copy: &Copy,
        build: &Build,
        program: &Path,
    ) -> Result<Result<Caught, String>> {
        let mut command = match self.broken_source(root)? {
            Some((file, source)) => {
                let broken = copy.with(&file, &source, || build.program(copy.cargo(), &[]));
                Command::new(broken.with_context(|| format!("{:?}", self.name))?)
            }
            None => Command::new(program),
        };
        match &self.change {
            Change::Text { .. } => {}
            Change::Protocol { defect } => drop(command.args(["--defect", defect])),
            Change::Banks { defect } => drop(command.args(["--bank-defect", defect])),
        }
        command.args(["--json", "--until-a-fault", "--configuration", &self.configuration]);
        let reports = explore(&mut command)?;
        let findings = || {
            let all = reports.iter().flat_map(|report| &report.properties);
            all.filter(|found| !found.holds && !found.reached)
        };
        let expected = |property: &str| property.split(' ').next() == Some(&self.property);
        Ok(match findings().find(|found| expected(&found.property)) {
            Some(found) => Ok(Caught { steps: found.counterexample.len() }),
            None => Err(match findings().next() {
                Some(other) => format!("but {}", other.property),
                None => "every property holds".to_owned(),
            }),
        })
    }
}

/// A workspace of the model and carnet-core alone, whose files may be changed; and what core's tests
/// depend on, which has to be there for cargo.
struct Copy {
    directory: PathBuf,
}

impl Copy {
    fn make(root: &Path) -> Result<Self> {
        let directory = cargo::target_directory(root).join("prove-copy");
        if directory.exists() {
            fs::remove_dir_all(&directory).context("cannot remove the last run's copy")?;
        }
        for package in [CORE, REFERENCE, MODEL] {
            copy_directory(&root.join(package), &directory.join(package))?;
        }
        let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
        let mut manifest: toml::Table = toml::from_str(&manifest)?;
        let workspace = manifest.get_mut("workspace").and_then(toml::Value::as_table_mut);
        let workspace = workspace.context("Cargo.toml has no workspace")?;
        workspace.insert("members".to_owned(), vec![CORE, REFERENCE, MODEL].into());
        workspace.remove("exclude");
        workspace.remove("default-members");
        build_fast(&mut manifest);
        fs::write(directory.join("Cargo.toml"), toml::to_string(&manifest)?)?;
        fs::copy(root.join("Cargo.lock"), directory.join("Cargo.lock"))?;
        Ok(Self { directory })
    }

    fn cargo(&self) -> Command {
        cargo::cargo(&self.directory)
    }

    /// Does something while a file of carnet-core has this text.
    fn with<T>(&self, file: &Path, text: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
        let place = self.directory.join(CORE).join(file);
        let whole = fs::read_to_string(&place)?;
        fs::write(&place, text)?;
        let done = action();
        fs::write(&place, whole)?;
        done
    }
}

/// Has the model and carnet-core built without optimisation: that takes longer than the exploration up to
/// a fault. Their dependencies are those that have been built already.
fn build_fast(manifest: &mut toml::Table) {
    let table = |name: &str, value: toml::Value| toml::Table::from_iter([(name.to_owned(), value)]);
    let packages = ["carnet-core", PACKAGE]
        .map(|package| (package.to_owned(), table("opt-level", 0.into()).into()));
    let profiles = manifest.get_mut("profile").and_then(toml::Value::as_table_mut);
    let release = profiles.and_then(|profiles| profiles.remove("release"));
    let mut release = release.and_then(|release| release.try_into().ok()).unwrap_or_default();
    toml::Table::insert(
        &mut release,
        "package".to_owned(),
        toml::Table::from_iter(packages).into(),
    );
    manifest.insert("profile".to_owned(), table("release", release.into()).into());
}

fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_directory(&from, &to)?;
        } else {
            fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sound_and_each_text_is_there_once() {
        let root = cargo::workspace_root().unwrap();
        let mut list = Mutants::read(&root).unwrap();
        assert!(list.mutant.len() >= 15);
        let text = |mutant: &&mut Mutant| matches!(mutant.change, Change::Text { .. });
        let mutant = list.mutant.iter_mut().find(text).unwrap();
        mutant.change = Change::Text {
            file: "chain.rs".to_owned(),
            from: "nowhere".to_owned(),
            to: "somewhere".to_owned(),
        };
        let error = mutant.broken_source(&root).unwrap_err();
        assert!(error.to_string().contains("0 times, not once"), "{error}");
    }
}

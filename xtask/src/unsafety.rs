//! `cargo xtask unsafe`: every piece of unsafe code that Carnet has, with its reason, and how much there
//! is in what it depends on.
//!
//! The compiler's lints see to it that there is a comment; here the comments are collected into a page
//! that can be read in one sitting, and a block without one, or a page that is not up to date, fails.

mod page;
mod scan;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use self::scan::{Found, Kind, scan};
use crate::bpf::MANIFEST as BPF_MANIFEST;
use crate::cargo;
use crate::process;

/// The page.
const PAGE: &str = "docs/unsafe.md";
/// The programs that are shipped: what they depend on is counted.
const SHIPPED: [&str; 2] = ["carnet-cli", "carnet-inspect"];
/// The system that they are built for.
const TARGET: &str = "x86_64-unknown-linux-musl";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Write docs/unsafe.md
    #[arg(long)]
    table: bool,
}

impl Options {
    /// The options of `cargo xtask unsafe`.
    pub(crate) fn check() -> Self {
        Self { table: false }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    let own = own(&root)?;
    let nameless: Vec<String> = own
        .iter()
        .flat_map(|package| package.places())
        .filter(|(_, found)| found.reason.is_empty())
        .map(|(file, found)| format!("{}:{}: {}", file.display(), found.line, found.item))
        .collect();
    if !nameless.is_empty() {
        bail!(
            "unsafe without a `// SAFETY:` comment or a `# Safety` section:\n  {}",
            nameless.join("\n  ")
        );
    }
    let dependencies = dependencies(&root)?;
    let fresh = page::write(&own, &dependencies);
    let path = root.join(PAGE);
    if options.table {
        fs::write(&path, fresh).with_context(|| format!("cannot write {PAGE}"))?;
        eprintln!("    wrote {PAGE}");
        return Ok(());
    }
    let page = fs::read_to_string(&path).with_context(|| format!("cannot read {PAGE}"))?;
    if page != fresh {
        bail!("{PAGE} is not what is generated: run `cargo xtask unsafe --table` and commit it");
    }
    let pieces: usize = own.iter().map(|package| package.places().count()).sum();
    eprintln!("    {pieces} pieces of unsafe code, each with its reason; {PAGE} is up to date");
    Ok(())
}

/// The unsafe code of a package.
struct Package {
    name: String,
    /// By file, relative to the checkout; files without any are not there.
    files: BTreeMap<PathBuf, Vec<Found>>,
}

impl Package {
    fn places(&self) -> impl Iterator<Item = (&Path, &Found)> {
        self.files
            .iter()
            .flat_map(|(file, found)| found.iter().map(move |found| (file.as_path(), found)))
    }
}

/// A dependency: its name and version, and how many pieces of each kind it has.
struct Dependency {
    package: String,
    pieces: BTreeMap<Kind, usize>,
}

/// What `cargo metadata` says that is read here.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Described>,
}

#[derive(Deserialize)]
struct Described {
    name: String,
    version: String,
    manifest_path: PathBuf,
}

impl Described {
    fn directory(&self) -> Result<&Path> {
        self.manifest_path.parent().context("a manifest without a directory")
    }
}

fn metadata(root: &Path, arguments: &[&str]) -> Result<Vec<Described>> {
    let mut metadata = cargo::cargo(root);
    metadata.args(["metadata", "--locked", "--format-version", "1"]).args(arguments);
    let metadata: Metadata = serde_json::from_str(&process::read(&mut metadata)?)
        .context("cannot understand `cargo metadata`")?;
    Ok(metadata.packages)
}

/// The packages of both workspaces that have unsafe code.
fn own(root: &Path) -> Result<Vec<Package>> {
    let mut packages = metadata(root, &["--no-deps"])?;
    packages.extend(metadata(root, &["--no-deps", "--manifest-path", BPF_MANIFEST])?);
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    let mut own = Vec::new();
    for package in packages {
        let mut files = BTreeMap::new();
        for file in sources(package.directory()?)? {
            let mut found = scanned(&file)?;
            let relative = file.strip_prefix(root).unwrap_or(&file).to_owned();
            let is_test = |part: &OsStr| part == "tests" || part == "tests.rs";
            let within = file.strip_prefix(package.directory()?).unwrap_or(&file);
            if within.iter().any(is_test) {
                found.iter_mut().for_each(|found| found.is_test = true);
            }
            if !found.is_empty() {
                files.insert(relative, found);
            }
        }
        if !files.is_empty() {
            own.push(Package { name: package.name, files });
        }
    }
    Ok(own)
}

/// What the shipped programs depend on.
fn dependencies(root: &Path) -> Result<Vec<Dependency>> {
    let mut tree = cargo::cargo(root);
    tree.args([
        "tree",
        "--locked",
        "--edges",
        "normal,no-proc-macro",
        "--target",
        TARGET,
        "--prefix",
        "none",
    ]);
    tree.args(["--format", "{p}"]).args(SHIPPED.iter().flat_map(|name| ["--package", name]));
    let tree = process::read(&mut tree)?;
    // A line is `name vVersion`, and more for what is not from a registry.
    let linked: std::collections::BTreeSet<String> = tree
        .lines()
        .filter(|line| !line.contains("(/"))
        .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
        .collect();
    let mut dependencies = Vec::new();
    for package in metadata(root, &[])? {
        if !linked.contains(&format!("{} v{}", package.name, package.version)) {
            continue;
        }
        let mut pieces = BTreeMap::new();
        let source = package.directory()?.join("src");
        for file in sources(if source.is_dir() { &source } else { package.directory()? })? {
            // Some have files that are text for macros and not Rust on their own.
            for found in scanned(&file).unwrap_or_default() {
                *pieces.entry(found.kind).or_default() += usize::from(!found.is_test);
            }
        }
        let package = format!("{} {}", package.name, package.version);
        dependencies.push(Dependency { package, pieces });
    }
    dependencies.sort_by(|a, b| a.package.cmp(&b.package));
    Ok(dependencies)
}

fn scanned(file: &Path) -> Result<Vec<Found>> {
    let cannot = || format!("cannot read {}", file.display());
    let text = fs::read_to_string(file).with_context(cannot)?;
    // Most files of most packages: not worth the parser's time.
    if !text.contains("unsafe") {
        return Ok(Vec::new());
    }
    scan(&text).with_context(cannot)
}

/// The files with Rust below a directory, in order; not those of packages below it.
fn sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        let cannot = || format!("cannot list {}", next.display());
        for entry in fs::read_dir(&next).with_context(cannot)? {
            let path = entry.with_context(cannot)?.path();
            if path.is_dir() {
                let other = path.join("Cargo.toml").exists() || path.ends_with("target");
                open.extend((!other).then_some(path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push(path);
            }
        }
    }
    sources.sort();
    Ok(sources)
}

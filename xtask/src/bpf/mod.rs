//! `cargo xtask bpf`: from `crates/carnet-bpf` to the object that carnet-engine embeds.
//!
//! The object is committed, so that building Carnet needs stable Rust only. What makes that honest
//! is that the build is reproducible: the same source and the pinned toolchain give the same bytes
//! in any directory of any machine, and `--check` compares them.

mod compiler_call;
mod install;
mod toolchain;

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub(crate) use self::compiler_call::compiler_call;
use self::toolchain::{Pins, Toolchain};
use crate::cargo;
use crate::process::{self, announce};

/// The manifest of the kernel engine, which is a workspace of its own.
pub(crate) const MANIFEST: &str = "crates/carnet-bpf/Cargo.toml";
/// The target that the kernel engine is built for: BPF, little-endian.
const TARGET: &str = "bpfel-unknown-none";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Change nothing: build, and fail unless the committed object is what the source builds
    #[arg(long)]
    check: bool,
    /// Install the pinned toolchain (Debian, as root) and stop
    #[arg(long, conflicts_with = "check")]
    install: bool,
}

impl Options {
    /// The options of `cargo xtask bpf --check`.
    pub(crate) fn check() -> Self {
        Self { check: true, install: false }
    }
}

/// What is committed beside the object: which bytes they are, and what built them.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Manifest {
    sha256: String,
    rustc: String,
    llvm: String,
    bpf_linker: String,
}

impl Manifest {
    fn of(object: &[u8], toolchain: &Toolchain) -> Self {
        Self {
            sha256: sha256(object),
            rustc: toolchain.rustc.clone(),
            llvm: toolchain.llvm.clone(),
            bpf_linker: toolchain.bpf_linker.clone(),
        }
    }

    fn to_text(&self) -> Result<String> {
        let body = toml::to_string(self)?;
        Ok(format!(
            "# Written by `cargo xtask bpf`: the object beside this file and its makers.\n{body}"
        ))
    }
}

pub(crate) fn run(options: Options) -> Result<()> {
    // Canonical, for the paths that the compiler sees are, and they are to be replaced.
    let root = cargo::workspace_root()?.canonicalize()?;
    let pins = Pins::read(&root)?;
    if options.install {
        return install::run(&root, &pins);
    }
    let toolchain = Toolchain::find(&pins)?;
    announce(format_args!("building the kernel engine with {toolchain}"));
    let unpinned = pins.mismatches(&toolchain);
    if !unpinned.is_empty() {
        let advice = format!(
            "this toolchain is not the pinned one: {}.\nInstall the pinned one (`cargo xtask bpf \
             --install` on Debian), or change the pin in {} and rebuild with `cargo xtask bpf`.",
            unpinned.join("; "),
            toolchain::PIN_FILE
        );
        ensure!(!options.check, "{advice}");
        eprintln!("    warning: {advice}\n    Do not commit this object without the pin.");
    }
    let object = build(&root, &toolchain, options.check)?;
    let directory = root.join("crates/carnet-engine/prebuilt");
    let object_file = directory.join("carnet.bpfel.o");
    let manifest_file = directory.join("carnet.bpfel.toml");
    if options.check {
        check(&object, &object_file, &manifest_file)?;
        eprintln!("    the committed object is what the source builds ({})", sha256(&object));
        return Ok(());
    }
    if std::fs::read(&object_file).is_ok_and(|committed| committed == object) {
        eprintln!("    unchanged: {}", object_file.display());
    }
    std::fs::create_dir_all(&directory).with_context(|| cannot("create", &directory))?;
    std::fs::write(&object_file, &object).with_context(|| cannot("write", &object_file))?;
    let manifest = Manifest::of(&object, &toolchain);
    std::fs::write(&manifest_file, manifest.to_text()?)
        .with_context(|| cannot("write", &manifest_file))?;
    eprintln!("    wrote {} ({} bytes)", object_file.display(), object.len());
    eprintln!("    wrote {} (sha256 {})", manifest_file.display(), manifest.sha256);
    Ok(())
}

/// Fails unless the committed files are those that this object would give.
fn check(object: &[u8], object_file: &Path, manifest_file: &Path) -> Result<()> {
    const FIX: &str = "Run `cargo xtask bpf` and commit what it writes.";
    let committed = std::fs::read(object_file)
        .map_err(|error| anyhow!("{}: {error}. {FIX}", cannot("read", object_file)))?;
    let manifest = std::fs::read_to_string(manifest_file)
        .map_err(|error| anyhow!("{}: {error}. {FIX}", cannot("read", manifest_file)))?;
    let manifest: Manifest = toml::from_str(&manifest)
        .map_err(|error| anyhow!("{}: {error}{FIX}", cannot("understand", manifest_file)))?;
    if committed != object {
        bail!(
            "{} is not what the source builds:\n  committed {} ({} bytes)\n  built     {} ({} \
             bytes)\n{FIX}",
            object_file.display(),
            sha256(&committed),
            committed.len(),
            sha256(object),
            object.len(),
        );
    }
    if manifest.sha256 != sha256(object) {
        bail!("{} names another object's sha256. {FIX}", manifest_file.display());
    }
    Ok(())
}

/// Builds the object and strips what the kernel does not read from it.
fn build(root: &Path, toolchain: &Toolchain, locked: bool) -> Result<Vec<u8>> {
    let package = root.join("crates/carnet-bpf");
    ensure!(
        package.join("Cargo.toml").exists(),
        "{} is missing: this checkout has no kernel engine",
        package.join("Cargo.toml").display()
    );
    let locked = locked.then_some("--locked");
    let cargo_home = cargo_home()?;
    // First of all fetch: the registries' directories must be there to be named in the flags.
    process::run(toolchain.cargo(&package).arg("fetch").args(locked))?;

    let target_directory = cargo::target_directory(root).join("bpf");
    process::run(
        toolchain
            .cargo(&package)
            .args(["build", "--release", "--target", TARGET, "--bin", "carnet-bpf"])
            .args(locked)
            .args(toolchain.build_arguments())
            .arg("--target-dir")
            .arg(&target_directory)
            .env("CARGO_ENCODED_RUSTFLAGS", flags(root, &cargo_home, toolchain)?)
            .envs(compiler_call::environment()?),
    )?;

    let linked = target_directory.join(TARGET).join("release/carnet-bpf");
    let stripped = target_directory.join("carnet.bpfel.o");
    // DWARF goes; .BTF and .BTF.ext, which the kernel reads, stay.
    process::run(toolchain.strip().arg("-g").arg("-o").arg(&stripped).arg(&linked))?;
    let object = std::fs::read(&stripped).with_context(|| cannot("read", &stripped))?;
    let own: [&Path; 2] = [root, &cargo_home];
    for path in own {
        if contains(&object, path.as_os_str().as_encoded_bytes()) {
            bail!("the object names {}, a path of this machine", path.display());
        }
    }
    Ok(object)
}

/// The compiler's flags, separated as cargo wants them in `CARGO_ENCODED_RUSTFLAGS`.
///
/// Paths reach the object through BTF's line information, so every directory that may differ from
/// machine to machine is given a name of its own.
fn flags(root: &Path, cargo_home: &Path, toolchain: &Toolchain) -> Result<OsString> {
    let mut flags: Vec<OsString> = [
        "-Clinker=bpf-linker",
        "-Clink-arg=--btf",
        "-Cdebuginfo=2",
        // v3: 32-bit arithmetic, in every kernel that Carnet supports.
        "-Ctarget-cpu=v3",
        // Chooses aya's pt_regs, which no program of Carnet reads: one object serves every
        // little-endian machine.
        "--cfg=bpf_target_arch=\"x86_64\"",
    ]
    .map(OsString::from)
    .into();
    let mut remap = |from: &Path, to: &str| {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(from);
        flag.push("=");
        flag.push(to);
        flags.push(flag);
    };
    remap(root, "carnet");
    remap(&toolchain.library_source, "rust");
    let sources = cargo_home.join("registry/src");
    for registry in sources.read_dir().with_context(|| cannot("list", &sources))? {
        remap(&registry?.path(), "registry");
    }
    Ok(flags.join(OsStr::new("\u{1f}")))
}

/// Where cargo keeps what it downloads.
pub(crate) fn cargo_home() -> Result<PathBuf> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => std::env::home_dir().context("neither CARGO_HOME nor HOME is set")?.join(".cargo"),
    };
    home.canonicalize().with_context(|| cannot("find", &home))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// The digest in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing into a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn cannot(verb: &str, path: &Path) -> String {
    format!("cannot {verb} {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(sha256: &str) -> Manifest {
        Manifest {
            sha256: sha256.to_owned(),
            rustc: "1.96.0".to_owned(),
            llvm: "22.1.8".to_owned(),
            bpf_linker: "0.10.3".to_owned(),
        }
    }

    #[test]
    fn a_manifest_reads_back_as_it_was_written() {
        let manifest = manifest(&sha256(b"object"));
        assert_eq!(toml::from_str::<Manifest>(&manifest.to_text().unwrap()).unwrap(), manifest);
    }

    #[test]
    fn sha256_is_written_in_hexadecimal() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b""), empty);
    }

    #[test]
    fn the_check_names_the_difference_and_the_command_that_ends_it() {
        let directory =
            std::env::temp_dir().join(format!("carnet-xtask-check-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (object, described) = (directory.join("o"), directory.join("toml"));
        let said = |built: &[u8]| check(built, &object, &described).map_err(|e| e.to_string());

        let missing = said(b"built").unwrap_err();
        assert!(missing.contains("cannot read") && missing.contains("cargo xtask bpf"));

        std::fs::write(&object, b"built").unwrap();
        std::fs::write(&described, manifest(&sha256(b"built")).to_text().unwrap()).unwrap();
        assert_eq!(said(b"built"), Ok(()));
        let differs = said(b"other").unwrap_err();
        assert!(differs.contains(&sha256(b"other")) && differs.contains("cargo xtask bpf"));

        std::fs::write(&described, manifest(&sha256(b"other")).to_text().unwrap()).unwrap();
        assert!(said(b"built").unwrap_err().contains("another object's sha256"));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}

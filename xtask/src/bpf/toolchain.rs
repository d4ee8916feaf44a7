//! Which toolchain builds the kernel engine: what is pinned, and what is here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::{TARGET, cannot, cargo_home};
use crate::process::{find_program, is_executable, read};

/// The one place that says which toolchain the committed object is built with.
pub(super) const PIN_FILE: &str = "crates/carnet-bpf/toolchain.toml";

/// The pinned versions. A pin holds for every version that continues it: 1.96 for 1.96.1.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Pins {
    pub(super) rustc: String,
    pub(super) llvm: String,
    pub(super) bpf_linker: String,
}

impl Pins {
    pub(super) fn read(root: &Path) -> Result<Self> {
        let file = root.join(PIN_FILE);
        let text = std::fs::read_to_string(&file).with_context(|| cannot("read", &file))?;
        toml::from_str(&text).with_context(|| cannot("understand", &file))
    }

    /// LLVM's major version: what the packages and directories of LLVM are named after.
    pub(super) fn llvm_major(&self) -> &str {
        self.llvm.split('.').next().unwrap_or(&self.llvm)
    }

    /// In words, one for each tool that is not the pinned one.
    pub(super) fn mismatches(&self, found: &Toolchain) -> Vec<String> {
        [
            ("rustc", &self.rustc, &found.rustc),
            ("LLVM", &self.llvm, &found.llvm),
            ("bpf-linker", &self.bpf_linker, &found.bpf_linker),
        ]
        .into_iter()
        .filter(|(_, pin, version)| !continues(pin, version))
        .map(|(tool, pin, version)| format!("{tool} is {version}, pinned is {pin}"))
        .collect()
    }
}

/// Whether the version begins with all the components of the pin.
pub(super) fn continues(pin: &str, version: &str) -> bool {
    let mut components = version.split('.');
    pin.split('.').all(|wanted| components.next() == Some(wanted))
}

/// Whose Rust compiler it is.
#[derive(Clone, Copy, Debug)]
enum Origin {
    /// Debian's rustc-web with a prebuilt `core` for BPF.
    Debian,
    /// rustup's nightly, which builds `core` from the component rust-src.
    Nightly,
}

/// A complete toolchain that was found on this machine.
#[derive(Debug)]
pub(super) struct Toolchain {
    origin: Origin,
    /// The compiler's version.
    pub(super) rustc: String,
    /// The version of the compiler's LLVM.
    pub(super) llvm: String,
    /// The linker's version.
    pub(super) bpf_linker: String,
    /// Where this toolchain keeps the source of the standard library, if it has it.
    pub(super) library_source: PathBuf,
    linker: PathBuf,
    strip: PathBuf,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = match self.origin {
            Origin::Debian => "Debian's",
            Origin::Nightly => "rustup's nightly",
        };
        let Self { rustc, llvm, bpf_linker, .. } = self;
        write!(f, "{origin} rustc {rustc}, LLVM {llvm}, bpf-linker {bpf_linker}")
    }
}

impl Toolchain {
    /// Looks for all that is needed; says everything that is missing at once.
    pub(super) fn find(pins: &Pins) -> Result<Self> {
        let compiler = Compiler::find();
        let linker = find_linker();
        let strip = find_strip(pins.llvm_major());
        match (compiler, linker, strip) {
            (Ok(compiler), Ok((linker, bpf_linker)), Some(strip)) => Ok(Self {
                origin: compiler.origin,
                rustc: compiler.version,
                llvm: compiler.llvm,
                bpf_linker,
                library_source: compiler.library_source,
                linker,
                strip,
            }),
            (compiler, linker, strip) => {
                let mut missing = Vec::new();
                missing.extend(compiler.err().map(|error| error.to_string()));
                missing.extend(linker.err().map(|error| error.to_string()));
                if strip.is_none() {
                    missing.push(format!(
                        "llvm-strip: neither on PATH nor in /usr/lib/llvm-{}/bin",
                        pins.llvm_major()
                    ));
                }
                bail!(
                    "the toolchain for the kernel engine is not complete:\n  - {}\n{}",
                    missing.join("\n  - "),
                    advice(pins)
                )
            }
        }
    }

    /// Cargo of this toolchain, in the directory, with an environment that does not reach the
    /// object: not the variables of the cargo that started us, nor the user's own flags.
    pub(super) fn cargo(&self, directory: &Path) -> Command {
        let mut command = match self.origin {
            Origin::Debian => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc");
                // aya-ebpf asks for unstable features, which a release's compiler refuses else.
                command.env("RUSTC_BOOTSTRAP", "aya_ebpf,carnet_bpf");
                command
            }
            Origin::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
        };
        let set: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
        for (name, _) in std::env::vars_os() {
            if reaches_the_build(&name.to_string_lossy()) && !set.contains(&name) {
                command.env_remove(name);
            }
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories = self.linker.parent().map(Path::to_owned).into_iter();
        // A directory with a colon in its name cannot stand in PATH; then PATH stays as it is.
        if let Ok(path) = std::env::join_paths(directories.chain(std::env::split_paths(&path))) {
            command.env("PATH", path);
        }
        command.current_dir(directory);
        command
    }

    /// What `cargo build` needs beside the target.
    pub(super) fn build_arguments(&self) -> &'static [&'static str] {
        match self.origin {
            Origin::Debian => &[],
            Origin::Nightly => &["-Zbuild-std=core"],
        }
    }

    /// `llvm-strip`, without arguments.
    pub(super) fn strip(&self) -> Command {
        Command::new(&self.strip)
    }
}

/// Whether a variable of this name changes what cargo and the compiler build. Where registries and
/// toolchains are, how to reach them, and how to print are the user's business and stay.
fn reaches_the_build(name: &str) -> bool {
    const KEPT: [&str; 6] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_TERM_",
    ];
    let of_rust = name.starts_with("CARGO")
        || ["RUSTC", "RUSTDOC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
    name == "LD_LIBRARY_PATH" || (of_rust && !KEPT.iter().any(|kept| name.starts_with(kept)))
}

/// A compiler with a `core` for BPF.
struct Compiler {
    origin: Origin,
    version: String,
    llvm: String,
    library_source: PathBuf,
}

impl Compiler {
    /// Debian's if it is there, otherwise rustup's nightly.
    fn find() -> Result<Self> {
        Self::debian().or_else(|debian| {
            Self::nightly().map_err(|nightly| {
                anyhow::anyhow!("rustc with a core for {TARGET}: {debian}; {nightly}")
            })
        })
    }

    fn debian() -> Result<Self> {
        let rustc = Path::new("/usr/bin/rustc");
        if !is_executable(rustc) || !is_executable(Path::new("/usr/bin/cargo")) {
            bail!("Debian's packages rustc-web and cargo-web are not installed");
        }
        let run = || without_ours(Command::new(rustc));
        let libraries = read(run().args(["--print", "target-libdir", "--target", TARGET]))
            .context("/usr/bin/rustc does not know the target")?;
        let has_core = std::fs::read_dir(libraries.trim()).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"libcore-"))
        });
        if !has_core {
            bail!("Debian's package libstd-rust-web-dev-bpf is not installed");
        }
        let compiler = Self::described(Origin::Debian, &run)?;
        // Where it is, its lines become part of the object: with it, or without it, but always alike.
        if !compiler.has_library_source() {
            bail!("Debian's package rust-web-src is not installed");
        }
        Ok(compiler)
    }

    fn nightly() -> Result<Self> {
        let Some(rustup) = find_program("rustup") else {
            bail!("rustup is not installed");
        };
        let run = || {
            let mut command = without_ours(Command::new(&rustup));
            command.args(["run", "nightly", "rustc"]);
            command
        };
        if read(run().arg("-V")).is_err() {
            bail!("rustup has no nightly");
        }
        let compiler = Self::described(Origin::Nightly, &run)?;
        if !compiler.has_library_source() {
            bail!("rustup's nightly has no rust-src");
        }
        Ok(compiler)
    }

    fn has_library_source(&self) -> bool {
        self.library_source.join("library/core").is_dir()
    }

    /// Asks the compiler that `run` starts what it is.
    fn described(origin: Origin, run: &dyn Fn() -> Command) -> Result<Self> {
        let (version, llvm) = versions(&read(run().arg("-vV"))?)?;
        let sysroot = read(run().args(["--print", "sysroot"]))?;
        let library_source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
        Ok(Self { origin, version, llvm, library_source })
    }
}

/// The command without the variables that cargo and rustup set for this process.
fn without_ours(mut command: Command) -> Command {
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("LD_LIBRARY_PATH");
    command
}

/// The versions of the compiler and of its LLVM in the answer to `rustc -vV`.
fn versions(answer: &str) -> Result<(String, String)> {
    let field = |name: &str| {
        answer
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(|value| value.trim().to_owned())
            .with_context(|| format!("`rustc -vV` says no \"{name}\""))
    };
    Ok((field("release")?, field("LLVM version")?))
}

/// Where bpf-linker is, and its version.
fn find_linker() -> Result<(PathBuf, String)> {
    let by_cargo = cargo_home().map(|home| home.join("bin/bpf-linker"));
    let linker = find_program("bpf-linker")
        .or_else(|| by_cargo.ok().filter(|path| is_executable(path)))
        .context("bpf-linker: neither on PATH nor where cargo installs programs")?;
    let version = linker_version(&linker)?;
    Ok((linker, version))
}

/// The version that bpf-linker says it has.
fn linker_version(linker: &Path) -> Result<String> {
    let answer = read(Command::new(linker).arg("--version"))?;
    answer
        .split_whitespace()
        .nth(1)
        .map(str::to_owned)
        .with_context(|| format!("`{} --version` says no version", linker.display()))
}

/// The version of the bpf-linker that is installed, if one is and it runs.
pub(super) fn installed_linker() -> Option<String> {
    find_linker().ok().map(|(_, version)| version)
}

fn find_strip(llvm_major: &str) -> Option<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{llvm_major}/bin/llvm-strip"));
    Some(debian)
        .filter(|path| is_executable(path))
        .or_else(|| find_program(&format!("llvm-strip-{llvm_major}")))
        .or_else(|| find_program("llvm-strip"))
}

/// How to get what is missing.
fn advice(pins: &Pins) -> String {
    let Pins { llvm, bpf_linker, .. } = pins;
    let major = pins.llvm_major();
    format!(
        "On Debian, `cargo xtask bpf --install` installs all of it (as root). Elsewhere: install \
         LLVM {llvm} with its headers, then\n\
         \x20   rustup toolchain install nightly --component rust-src\n\
         \x20   cargo install --locked bpf-linker@{bpf_linker} --no-default-features --features \
         llvm-{major}\n\
         Nobody needs this to build or use Carnet: the built object is in the repository."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_holds_for_the_versions_that_continue_it() {
        assert!(continues("1.96", "1.96.0"));
        assert!(continues("0.10.3", "0.10.3"));
        assert!(!continues("1.9", "1.96.0"));
        assert!(!continues("0.10.3", "0.10"));
    }

    #[test]
    fn versions_are_read_from_the_compilers_own_words() {
        let answer = "rustc 1.96.0 (ac68 2026-05-25)\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(versions(answer).unwrap(), ("1.96.0".to_owned(), "22.1.8".to_owned()));
        let error = versions("rustc 1.96.0").unwrap_err().to_string();
        assert!(error.contains("\"release\""), "{error}");
    }

    #[test]
    fn the_users_flags_stay_outside_and_the_users_registries_do_not() {
        for name in ["RUSTFLAGS", "CARGO_PROFILE_RELEASE_LTO", "CARGO", "RUSTUP_TOOLCHAIN"] {
            assert!(reaches_the_build(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "RUSTUP_HOME", "RUST_BACKTRACE", "PATH"] {
            assert!(!reaches_the_build(name), "{name}");
        }
    }

    #[test]
    fn the_committed_pins_can_be_read() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let pins = Pins::read(root).unwrap();
        assert!(pins.llvm_major().parse::<u32>().is_ok());
    }
}

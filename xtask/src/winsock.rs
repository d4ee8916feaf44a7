//! `cargo xtask winsock`: builds the C library `carnet-winsock` and lays it out under a prefix, with
//! headers and a pkg-config file; or checks it longer than its tests do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::process::{self, announce};

const CRATE: &str = "crates/carnet-winsock";
/// The SONAME that its build script sets.
const SONAME: &str = "libcarnet_winsock.so.0";

/// Calls for each thread of the fuzzer in a check; some twenty seconds.
const FUZZ_ROUNDS: &str = "1000000";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Install it to where `lib`, `include` and `lib/pkgconfig` are, for example /usr/local
    #[arg(long, value_name = "DIRECTORY", required_unless_present = "check")]
    prefix: Option<PathBuf>,
    /// Put before the prefix when files are written, not when it is noted in them (for packagers)
    #[arg(long, value_name = "DIRECTORY", requires = "prefix")]
    destdir: Option<PathBuf>,
    /// Explore every interleaving of its completion core with loom, and fuzz its entry points
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let root = cargo::workspace_root()?;
    if options.check {
        check(&root)?;
    }
    match &options.prefix {
        Some(prefix) => build_and_install(&root, prefix, options.destdir.as_deref()),
        None => Ok(()),
    }
}

fn check(root: &Path) -> Result<()> {
    let test = ["test", "--locked", "--release", "--package", "carnet-winsock"];
    announce("exploring the completion core with loom");
    // In a place of its own: everything is built differently.
    process::run(
        cargo::cargo(root)
            .args(test)
            .args(["--lib", "completion"])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", cargo::target_directory(root).join("loom")),
    )?;
    announce("arbitrary arguments");
    process::run(
        cargo::cargo(root)
            .args(test)
            .args(["--test", "fuzz", "--", "--nocapture"])
            .env("CARNET_FUZZ_ROUNDS", FUZZ_ROUNDS),
    )
}

pub(crate) fn build_and_install(root: &Path, prefix: &Path, destdir: Option<&Path>) -> Result<()> {
    if !prefix.is_absolute() {
        bail!("the prefix `{}` is not an absolute path", prefix.display());
    }
    announce("building carnet-winsock");
    process::run(cargo::cargo(root).args([
        "build",
        "--locked",
        "--package",
        "carnet-winsock",
        "--profile",
        "dist",
    ]))?;
    let built = cargo::target_directory(root).join("dist");
    let place = match destdir {
        Some(before) => before.join(prefix.strip_prefix("/")?),
        None => prefix.to_owned(),
    };
    announce(format_args!("installing it under {}", place.display()));
    for file in install(&root.join(CRATE), &built, prefix, &place)? {
        eprintln!("    {}", file.display());
    }
    Ok(())
}

/// Lays the library out in `place`, to be used as `prefix`: the files that are there now.
fn install(source: &Path, built: &Path, prefix: &Path, place: &Path) -> Result<Vec<PathBuf>> {
    let lib = place.join("lib");
    let include = place.join("include/carnet-winsock");
    let pkgconfig = lib.join("pkgconfig");
    for directory in [&lib, &include, &pkgconfig] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let mut files = Vec::new();
    let mut copy = |from: &Path, to: PathBuf| {
        // Not over a library that a program has mapped.
        if to.exists() {
            fs::remove_file(&to).with_context(|| format!("cannot replace {}", to.display()))?;
        }
        fs::copy(from, &to)
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        files.push(to);
        anyhow::Ok(())
    };
    copy(&built.join("libcarnet_winsock.so"), lib.join(SONAME))?;
    copy(&built.join("libcarnet_winsock.a"), lib.join("libcarnet_winsock.a"))?;
    for entry in fs::read_dir(source.join("include"))? {
        let entry = entry?;
        copy(&entry.path(), include.join(entry.file_name()))?;
    }
    // What a linker looks for.
    let link = lib.join("libcarnet_winsock.so");
    if link.symlink_metadata().is_ok() {
        fs::remove_file(&link)?;
    }
    symlink(SONAME, &link)?;
    files.push(link);
    let template = fs::read_to_string(source.join("carnet-winsock.pc.in"))?;
    let description = pkgconfig.join("carnet-winsock.pc");
    fs::write(&description, fill(&template, prefix)?)?;
    files.push(description);
    Ok(files)
}

/// The pkg-config file of this version for a prefix.
fn fill(template: &str, prefix: &Path) -> Result<String> {
    let prefix = prefix.to_str().context("the prefix is not UTF-8")?;
    Ok(template.replace("@PREFIX@", prefix).replace("@VERSION@", env!("CARGO_PKG_VERSION")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pkg_config_file_is_filled_in() {
        let template = include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../crates/carnet-winsock/carnet-winsock.pc.in"
        ));
        let text = fill(template, Path::new("/opt/x")).unwrap();
        assert!(text.starts_with("prefix=/opt/x\n"), "{text}");
        assert!(text.contains(&format!("\nVersion: {}\n", env!("CARGO_PKG_VERSION"))), "{text}");
        assert!(!text.contains('@'), "{text}");
    }

    #[test]
    fn the_soname_is_the_one_that_the_library_is_built_with() {
        let build =
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/carnet-winsock/build.rs"));
        assert!(build.contains(&format!("-soname,{SONAME}")));
    }

    #[test]
    fn everything_is_laid_out_and_can_be_laid_out_again() {
        let place = std::env::temp_dir().join(format!("carnet-winsock-{}", std::process::id()));
        let (built, prefix) = (place.join("built"), place.join("prefix"));
        fs::create_dir_all(&built).unwrap();
        for file in ["libcarnet_winsock.so", "libcarnet_winsock.a"] {
            fs::write(built.join(file), file).unwrap();
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(CRATE);
        for _ in 0..2 {
            let files = install(&source, &built, &prefix, &prefix).unwrap();
            for file in [
                "lib/libcarnet_winsock.so",
                "lib/libcarnet_winsock.so.0",
                "lib/libcarnet_winsock.a",
                "lib/pkgconfig/carnet-winsock.pc",
                "include/carnet-winsock/winsock2.h",
                "include/carnet-winsock/mstcpip.h",
            ] {
                assert!(files.contains(&prefix.join(file)), "{file}");
                assert!(prefix.join(file).is_file(), "{file}");
            }
        }
        assert_eq!(
            fs::read_link(prefix.join("lib/libcarnet_winsock.so")).unwrap(),
            Path::new(SONAME)
        );
        fs::remove_dir_all(&place).unwrap();
    }
}

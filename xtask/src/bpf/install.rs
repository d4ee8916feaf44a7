//! `cargo xtask bpf --install`: the pinned toolchain, from Debian's packages and crates.io.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::toolchain::{Pins, Toolchain, continues, installed_linker};
use crate::process::{self, announce, is_root};
use crate::{cargo, host};

pub(super) fn run(root: &Path, pins: &Pins) -> Result<()> {
    let major = pins.llvm_major();
    announce("installing the toolchain for the kernel engine");
    if !host::is_debian() || !is_root() {
        // Perhaps all is there already; if not, the words say what to install.
        Toolchain::find(pins)?;
        bail!(
            "only on Debian and as root can this command install packages; this machine has a \
             toolchain, `cargo xtask bpf --check` says whether it is the pinned one"
        );
    }
    let packages: Vec<String> =
        ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "rust-web-src"]
            .map(str::to_owned)
            .into_iter()
            .chain([
                format!("llvm-{major}"),
                format!("llvm-{major}-dev"),
                format!("libpolly-{major}-dev"),
            ])
            // What LLVM's libraries want when bpf-linker is linked with them.
            .chain(["zlib1g-dev", "libzstd-dev", "libxml2-dev"].map(str::to_owned))
            .collect();
    host::install_packages(&packages)?;

    let wanted = &pins.bpf_linker;
    if installed_linker().is_some_and(|version| continues(wanted, &version)) {
        eprintln!("    bpf-linker {wanted} is installed");
    } else {
        let llvm = PathBuf::from(format!("/usr/lib/llvm-{major}"));
        process::run(
            cargo::cargo(root)
                // By force: one that is there is another version, or does not start.
                .args(["install", "--locked", "--force", &format!("bpf-linker@{wanted}")])
                .args(["--no-default-features", "--features", &format!("llvm-{major}")])
                .arg("--target-dir")
                .arg(cargo::target_directory(root).join("tools"))
                // Where LLVM is, for bpf-linker and for llvm-sys, which wants to be told under a name
                // with its own version in it: 221 for LLVM 22.1.
                .env("LLVM_PREFIX", &llvm)
                .env(format!("LLVM_SYS_{major}1_PREFIX"), &llvm),
        )?;
    }
    let toolchain = Toolchain::find(pins)?;
    let unpinned = pins.mismatches(&toolchain);
    if !unpinned.is_empty() {
        bail!("installed, but not as pinned: {}", unpinned.join("; "));
    }
    eprintln!("    ready: {toolchain}");
    Ok(())
}

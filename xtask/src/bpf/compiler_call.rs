//! What stands between cargo and the compiler while the kernel engine is built.
//!
//! Cargo gives the compiler a `-C metadata=…` that depends on the absolute path of a package that
//! lies outside the workspace being built, as carnet-core does for carnet-bpf. The compiler puts it
//! into symbol names, and so two checkouts in two directories would give two different objects.
//! Hence xtask names itself as `RUSTC_WRAPPER`: called by cargo in place of the compiler, it calls
//! the compiler with metadata made of the package's name and version only.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result};

/// Set in cargo's environment: this program is being called as the compiler.
const MARK: &str = "CARNET_XTASK_CALLED_AS_COMPILER";

/// The variables that make cargo call this program in place of the compiler.
pub(super) fn environment() -> Result<[(&'static str, OsString); 2]> {
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    Ok([("RUSTC_WRAPPER", own.into()), (MARK, "1".into())])
}

/// When called by cargo in place of the compiler: becomes the compiler, and returns only if that
/// fails. Otherwise `None`.
pub(crate) fn compiler_call() -> Option<Result<()>> {
    std::env::var_os(MARK)?;
    let mut arguments = std::env::args_os().skip(1);
    let Some(compiler) = arguments.next() else {
        return Some(Err(anyhow::anyhow!("{MARK} is set, but no compiler is named")));
    };
    let variable = |name| std::env::var(name).unwrap_or_default();
    let metadata = format!("{}-{}", variable("CARGO_PKG_NAME"), variable("CARGO_PKG_VERSION"));
    let error = Command::new(&compiler)
        .args(arguments.map(|argument| with_metadata(argument, &metadata)))
        .exec();
    Some(Err(error).with_context(|| format!("cannot start {}", compiler.display())))
}

/// The argument, with the metadata in it replaced if there is any.
fn with_metadata(argument: OsString, metadata: &str) -> OsString {
    const KEY: &[u8] = b"metadata=";
    if argument.as_encoded_bytes().starts_with(KEY) {
        let mut replaced = OsString::from("metadata=");
        replaced.push(OsStr::new(metadata));
        return replaced;
    }
    argument
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_metadata_is_replaced() {
        let replaced = |argument: &str| with_metadata(argument.into(), "carnet-core-0.1.0");
        assert_eq!(replaced("metadata=0123456789abcdef"), "metadata=carnet-core-0.1.0");
        assert_eq!(replaced("extra-filename=-0123"), "extra-filename=-0123");
        assert_eq!(replaced("--crate-name"), "--crate-name");
    }
}

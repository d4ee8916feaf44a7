//! Having privileges, and giving them up in a child.

use std::process::Command;

use rustix::{
    process::{Gid, Uid},
    thread::{CapabilitySet, capabilities},
};

use crate::{Error, sys};

/// Succeeds if this process may make namespaces, cgroups and mounts and load BPF programs.
///
/// # Errors
/// [`Error::NotPrivileged`] names what is missing. Tests unwrap it: without root they are to fail,
/// not to pass without having tested anything.
pub fn require_root() -> Result<(), Error> {
    let needed = [
        (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
        (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
        (CapabilitySet::BPF, "CAP_BPF"),
        (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
        (CapabilitySet::KILL, "CAP_KILL"),
    ];
    let held = capabilities(None)
        .map_err(|errno| Error::io("read the capabilities of", "this process")(errno.into()))?
        .effective;
    let missing: Vec<_> = needed
        .iter()
        .filter(|(capability, _)| !held.contains(*capability))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Error::NotPrivileged { missing: missing.join(", ") })
    }
}

/// Makes `command` run as a user and group without supplementary groups or capabilities.
///
/// Unlike `CommandExt::uid`, which takes effect first, this takes effect in the order of the calls:
/// call it after [`enter_command`](crate::NetworkNamespace::enter_command), which needs root.
pub fn run_as(command: &mut Command, uid: u32, gid: u32) {
    sys::become_user_before_exec(command, Uid::from_raw(uid), Gid::from_raw(gid));
}

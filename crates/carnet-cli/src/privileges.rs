//! Whether the process may do what a command needs, before it begins.

use rustix::thread::{CapabilitySet, capabilities};

use crate::failure::Failure;

/// What administering the engine takes.
const ADMINISTER: CapabilitySet = CapabilitySet::BPF
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::DAC_OVERRIDE);

/// Names of the capabilities that can be missing.
const NAMES: [(CapabilitySet, &str); 5] = [
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
];

/// Checks that the process may administer the engine.
pub(crate) fn administer() -> Result<(), Failure> {
    require(ADMINISTER)
}

/// Checks that the process may, besides, look into other processes.
pub(crate) fn examine_processes() -> Result<(), Failure> {
    require(ADMINISTER | CapabilitySet::SYS_PTRACE)
}

fn require(needed: CapabilitySet) -> Result<(), Failure> {
    let effective = capabilities(None)
        .map_err(|errno| Failure::because("asking for the process's capabilities", &errno))?
        .effective;
    let missing = missing(needed, effective);
    if missing.is_empty() {
        return Ok(());
    }
    let arguments: Vec<_> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    Err(Failure::new(format_args!("this needs root: missing is {}", missing.join(", ")))
        .with_hint(format_args!("sudo carnet {}", arguments.join(" "))))
}

fn missing(needed: CapabilitySet, effective: CapabilitySet) -> Vec<&'static str> {
    // What the newer capabilities allow, the old one for everything allows too.
    let covered = if effective.contains(CapabilitySet::SYS_ADMIN) {
        effective | CapabilitySet::BPF | CapabilitySet::PERFMON
    } else {
        effective
    };
    let lacks = |(set, _): &(CapabilitySet, _)| needed.contains(*set) && !covered.contains(*set);
    NAMES.iter().filter(|entry| lacks(entry)).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let all = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_DAC_OVERRIDE"];
        assert_eq!(missing(ADMINISTER, CapabilitySet::empty()), all);
        let old = CapabilitySet::SYS_ADMIN;
        assert_eq!(missing(ADMINISTER, old), ["CAP_NET_ADMIN", "CAP_DAC_OVERRIDE"]);
        assert_eq!(missing(ADMINISTER, CapabilitySet::all()), [""; 0]);
    }
}

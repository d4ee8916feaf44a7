//! Whether Carnet can work here, what is missing, and who else is at work.

use std::{fs, os::fd::AsFd as _, path::Path};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

use crate::{
    cgroup::{Place, mount_point},
    engine::check_privileges,
    kernel::{self, KernelTypes},
    mounts::mount_points,
    object::{self, Hook, hooks},
    sys,
};

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// As it should be.
    Ok,
    /// Carnet cannot work without it.
    Missing,
    /// Carnet works, but somebody should know this.
    Warning,
}

/// One thing that was examined.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What was examined.
    pub name: String,
    /// How it is to be taken.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do about it, if there is something to do.
    pub advice: Option<String>,
}

impl Finding {
    fn ok(name: &str, detail: impl ToString) -> Self {
        Self { name: name.into(), state: State::Ok, detail: detail.to_string(), advice: None }
    }

    fn new(state: State, name: &str, detail: impl ToString, advice: &str) -> Self {
        let advice = Some(advice.to_owned());
        Self { name: name.into(), state, detail: detail.to_string(), advice }
    }

    /// From what was found, or from the error that says what to do.
    fn from(name: &str, found: Result<impl ToString, crate::Error>) -> Self {
        match found {
            Ok(detail) => Self::ok(name, detail),
            // The engine's errors say what was found before the colon, and what to do after it.
            Err(error) => {
                let text = error.to_string();
                let (detail, advice) = text.split_once(": ").unwrap_or((&text, ""));
                let advice = (!advice.is_empty()).then(|| advice.to_owned());
                Self { name: name.into(), state: State::Missing, detail: detail.into(), advice }
            }
        }
    }
}

/// Examines this machine and, if one is given, a cgroup: that of an instance, or where one is to
/// be brought up. Changes nothing; what it loads to try is gone when it returns.
pub fn examine(cgroup: Option<&Path>) -> Vec<Finding> {
    let mut findings = vec![
        Finding::from("kernel", kernel::check_version().map(|()| kernel::release())),
        Finding::from("privileges", check_privileges().map(|()| "sufficient")),
        Finding::from("cgroups", mount_point().map(|path| path.display().to_string())),
        bpffs(),
    ];
    let types = KernelTypes::read().and_then(|types| types.offsets().map(|_| types));
    if let Ok(types) = &types {
        findings.extend([iterators(types), multipath_tcp(types)]);
    }
    findings.push(Finding::from("type information", types.map(|_| kernel::BTF_PATH)));
    findings.extend([program_types(), map_types(), helpers(), engine(), unseen_protocols()]);
    if let Some(path) = cgroup {
        findings.push(neighbours(path));
    }
    findings
}

fn bpffs() -> Finding {
    const NAME: &str = "bpffs";
    match mount_points("bpf") {
        Ok(points) => match points.first() {
            Some(point) => Finding::ok(NAME, point.display()),
            None => Finding::new(
                State::Warning,
                NAME,
                "none is mounted",
                "the first command that needs one mounts it at /sys/fs/bpf; to have it there \
                 after a restart, add it to /etc/fstab",
            ),
        },
        Err(error) => Finding::from(NAME, Err::<&str, _>(error)),
    }
}

/// What of a list the kernel lacks, as a finding.
fn complete<'a>(name: &str, parts: impl IntoIterator<Item = (&'a str, bool)>) -> Finding {
    let (there, lacking): (Vec<_>, Vec<_>) = parts.into_iter().partition(|(_, there)| *there);
    let join = |parts: Vec<(&str, bool)>| {
        parts.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", ")
    };
    if lacking.is_empty() {
        return Finding::ok(name, join(there));
    }
    let detail = format!("without {}", join(lacking));
    let advice = "run a kernel with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_BPF_JIT, and \
                  this command as root";
    Finding::new(State::Missing, name, detail, advice)
}

fn program_types() -> Finding {
    let types = [
        ("cgroup_sock_addr", ProgramType::CgroupSockAddr),
        ("cgroup_sockopt", ProgramType::CgroupSockopt),
        ("cgroup_sock", ProgramType::CgroupSock),
        ("sock_ops", ProgramType::SockOps),
    ];
    let there = |program| is_program_supported(program).unwrap_or(false);
    complete("program types", types.map(|(name, program)| (name, there(program))))
}

fn iterators(types: &KernelTypes) -> Finding {
    let iterators = ["bpf_sk_storage_map", "task_file"];
    let there = |name| types.has_function(&format!("bpf_iter_{name}"));
    complete("iterators", iterators.map(|name| (name, there(name))))
}

fn map_types() -> Finding {
    let types = [
        ("array", MapType::Array),
        ("percpu_array", MapType::PerCpuArray),
        ("hash", MapType::Hash),
        ("lru_hash", MapType::LruHash),
        ("sk_storage", MapType::SkStorage),
        ("ringbuf", MapType::RingBuf),
        ("array_of_maps", MapType::ArrayOfMaps),
    ];
    let there = |map| is_map_supported(map).unwrap_or(false);
    complete("map types", types.map(|(name, map)| (name, there(map))))
}

fn helpers() -> Finding {
    let helpers = [
        ("sk_storage_get", BpfHelper::BPF_FUNC_sk_storage_get),
        ("sk_lookup_tcp", BpfHelper::BPF_FUNC_sk_lookup_tcp),
        ("set_retval", BpfHelper::BPF_FUNC_set_retval),
        ("loop", BpfHelper::BPF_FUNC_loop),
        ("get_current_task", BpfHelper::BPF_FUNC_get_current_task),
        ("probe_read_kernel", BpfHelper::BPF_FUNC_probe_read_kernel),
        ("get_netns_cookie", BpfHelper::BPF_FUNC_get_netns_cookie),
        ("ktime_get_boot_ns", BpfHelper::BPF_FUNC_ktime_get_boot_ns),
        ("ringbuf_reserve", BpfHelper::BPF_FUNC_ringbuf_reserve),
    ];
    let there = |helper| is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or(false);
    complete("helpers", helpers.map(|(name, helper)| (name, there(helper))))
}

/// Whether the kernel takes the whole engine: the verifier's word is the only one that counts.
fn engine() -> Finding {
    const NAME: &str = "kernel engine";
    match object::load(None, None) {
        Ok(loaded) => {
            let count = loaded.programs().count();
            Finding::ok(NAME, format!("the kernel takes all {count} programs"))
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let detail = format!("{error}: {}", cause.unwrap_or_default());
            let advice = "report this with the text above and the kernel's version";
            Finding::new(State::Missing, NAME, detail.trim_end_matches(": "), advice)
        }
    }
}

fn multipath_tcp(types: &KernelTypes) -> Finding {
    let detail = if types.has_struct("mptcp_sock") {
        "its connections are redirected like others"
    } else {
        "the kernel has none"
    };
    Finding::ok("Multipath TCP", detail)
}

/// Ways to the network that no connect hook sees.
fn unseen_protocols() -> Finding {
    const NAME: &str = "unseen protocols";
    const TABLE: &str = "/proc/net/protocols";
    let table = fs::read_to_string(TABLE).unwrap_or_default();
    let unseen = unseen_in(&table);
    if unseen.is_empty() {
        return Finding::ok(
            NAME,
            "no SCTP, DCCP or SMC; raw and packet sockets, which take CAP_NET_RAW, are not \
             redirected",
        );
    }
    Finding::new(
        State::Warning,
        NAME,
        format!("{} connections pass unseen", unseen.join(", ")),
        "unless they are needed, keep their modules from being loaded (modprobe.d)",
    )
}

/// The protocols of `/proc/net/protocols` whose connections are not seen.
fn unseen_in(table: &str) -> Vec<&'static str> {
    let has = |name: &&str| {
        table.lines().filter_map(|line| line.split_whitespace().next()).any(|protocol| {
            protocol == *name
                || protocol.strip_suffix("v6").or(protocol.strip_suffix('6')) == Some(*name)
        })
    };
    ["SCTP", "DCCP", "SMC"].into_iter().filter(has).collect()
}

/// Other programs at the hooks of a cgroup: each sees what those before it made of an address.
fn neighbours(path: &Path) -> Finding {
    const NAME: &str = "other programs";
    let place = match Place::at(path) {
        Ok(place) => place,
        Err(error) => return Finding::from(NAME, Err::<&str, _>(error)),
    };
    let others = match others_at(&place) {
        Ok(others) => others,
        Err(error) => {
            let advice = "run this as root, outside a container";
            return Finding::new(State::Warning, NAME, error, advice);
        }
    };
    if others.is_empty() {
        return Finding::ok(NAME, format!("none at the hooks of {}", place.directory.display()));
    }
    Finding::new(
        State::Warning,
        NAME,
        format!("{} at the hooks of {}", others.join(", "), place.directory.display()),
        "they may rewrite destinations before or after Carnet; programs of cgroups below run \
         before those of cgroups above, at one cgroup in the order in which they were attached",
    )
}

fn others_at(place: &Place) -> std::io::Result<Vec<String>> {
    let cgroup = place.open().map_err(std::io::Error::other)?;
    let mut others = Vec::new();
    for Hook { name, attach_type, .. } in hooks() {
        for id in sys::effective_programs(cgroup.as_fd(), *attach_type)? {
            // It may have gone meanwhile.
            let Ok(program) = sys::program_by_id(id) else { continue };
            let info = sys::program_info(program.as_fd())?;
            let called = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
            if !called.starts_with(OWN_PREFIX) {
                let called = String::from_utf8_lossy(called);
                others.push(format!("{called} (program {id}, {name})"));
            }
        }
    }
    Ok(others)
}

/// Begins the names of Carnet's programs, those of other instances included.
const OWN_PREFIX: &[u8] = b"carnet_";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unseen_protocols_are_found_in_the_kernels_table() {
        let table = "protocol  size sockets\nSCTPv6 1\nTCP 2\nSMC6 1\nPACKET 1\n";
        assert_eq!(unseen_in(table), ["SCTP", "SMC"]);
        assert!(unseen_in("protocol size\nTCPv6 1\n").is_empty());
    }

    #[test]
    fn an_error_is_parted_into_what_is_and_what_to_do() {
        let finding = Finding::from("bpffs", Err::<&str, _>(crate::Error::NoBpffs));
        assert_eq!(finding.state, State::Missing);
        assert_eq!(finding.detail, "no bpffs is mounted");
        assert!(finding.advice.unwrap().starts_with("mount one"));
        assert_eq!(Finding::from("kernel", Ok("6.1")).state, State::Ok);
    }
}

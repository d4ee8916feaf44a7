//! Whether Carnet can work here, what is missing, and who else is at work.

mod neighbours;
mod netfilter;

#[cfg(fuzzing)]
pub(crate) use netfilter::fuzzing;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

use crate::{
    cgroup::mount_point,
    engine::check_privileges,
    existing::unlisted,
    kernel::{self, KernelTypes},
    listeners::socket_kind,
    members::{Member, Members, sockets_of},
    mounts::mount_points,
    object,
    sockets::{Listed, PROTOCOLS},
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
///
/// Of a cgroup also the other programs at its hooks are named, and the processes in it are examined:
/// what sockets they have whose flows pass unseen, and which were made elsewhere.
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
    let members = cgroup.map(Members::below);
    findings.extend(netfilter::examine(members.as_ref().and_then(|found| found.as_ref().ok())));
    if let (Some(path), Some(members)) = (cgroup, members) {
        findings.extend(neighbours::examine(path));
        findings.extend(held(members));
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

/// What to do about a kernel that is too old.
fn run_newer() -> String {
    let (major, minor) = kernel::OLDEST;
    format!("run Linux {major}.{minor} or newer")
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
    let advice = format!(
        "{} with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_BPF_JIT, and this command as root",
        run_newer()
    );
    Finding::new(State::Missing, name, detail, &advice)
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
    // What such a kernel says of it is nothing to report.
    if kernel::check_version().is_err() {
        return Finding::new(State::Missing, NAME, "not tried", &run_newer());
    }
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
    let has_any = types.has_struct("mptcp_sock");
    Finding::ok("Multipath TCP", multipath_words(has_any, &kernel::release()))
}

/// What is said of Multipath TCP on a kernel of this release that has any, or has not.
fn multipath_words(has_any: bool, release: &str) -> &'static str {
    match (has_any, kernel::is_since(release, MULTIPATH_FAST_OPEN)) {
        (false, _) => "the kernel has none",
        (true, true) => "its connections are redirected like others",
        (true, false) => {
            "its connections are redirected like others; fast open came to it with Linux 6.2 only"
        }
    }
}

/// The first kernel with fast open for Multipath TCP.
const MULTIPATH_FAST_OPEN: (u32, u32) = (6, 2);

/// Protocols whose connections no hook sees, as `/proc/net/protocols` and the aliases of their
/// modules call them.
const UNSEEN: [(&str, &str); 5] = [
    ("SCTP", "net-pf-2-proto-132"),
    ("DCCP", "net-pf-2-proto-33"),
    ("SMC", "net-pf-43"),
    ("TIPC", "net-pf-30"),
    ("RDS", "net-pf-21"),
];

/// Ways to the network that no connect hook sees.
fn unseen_protocols() -> Finding {
    const NAME: &str = "unseen protocols";
    const TABLE: &str = "/proc/net/protocols";
    let table = fs::read_to_string(TABLE).unwrap_or_default();
    let aliases = Path::new("/lib/modules").join(kernel::release()).join("modules.alias");
    let aliases = fs::read_to_string(aliases).unwrap_or_default();
    let (there, loadable) = unseen_in(&table, &aliases);
    if there.is_empty() && loadable.is_empty() {
        return Finding::ok(
            NAME,
            "no SCTP, DCCP, SMC, TIPC or RDS; raw, packet and XDP sockets, which take \
             CAP_NET_RAW, are not redirected",
        );
    }
    let mut found = Vec::new();
    if !there.is_empty() {
        found.push(format!("{} connections pass unseen", there.join(", ")));
    }
    if !loadable.is_empty() {
        found.push(format!("so would {}, whose modules can be loaded", loadable.join(", ")));
    }
    Finding::new(
        State::Warning,
        NAME,
        found.join("; "),
        "carnet up --refuse-unseen refuses sockets of SCTP and DCCP; keep the modules of the \
         others from being loaded unless they are needed (modprobe.d)",
    )
}

/// The protocols whose connections are not seen: those of `/proc/net/protocols`, and those whose
/// modules the kernel would load on demand.
fn unseen_in(table: &str, aliases: &str) -> (Vec<&'static str>, Vec<&'static str>) {
    let protocols: BTreeSet<&str> =
        table.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let has = |name: &str| {
        ["", "6", "v6"].iter().any(|suffix| protocols.contains(&*format!("{name}{suffix}")))
    };
    let there = UNSEEN.iter().map(|(name, _)| *name).filter(|name| has(name)).collect();
    let can_load = |alias: &str| {
        aliases.lines().any(|line| {
            let found = line.split_whitespace().nth(1).unwrap_or_default();
            found.strip_prefix(alias).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        })
    };
    let loadable = UNSEEN.iter().filter(|(name, alias)| !has(name) && can_load(alias));
    (there, loadable.map(|(name, _)| *name).collect())
}

/// Most sockets that are named in a finding.
const NAMED: usize = 5;
/// Most sockets that are examined.
const EXAMINED: usize = 16_384;

/// The sockets of the processes in a cgroup: those whose flows are not seen, and those that were
/// made outside it, whose flows are not its.
fn held(members: Result<Members, crate::Error>) -> Vec<Finding> {
    const UNSEEN: &str = "unseen sockets";
    const FOREIGN: &str = "sockets from elsewhere";
    let found = members.and_then(|members| Held::by(&members));
    let held = match found {
        Ok(held) => held,
        Err(error) => {
            let unknown =
                Finding { state: State::Warning, ..Finding::from(UNSEEN, Err::<&str, _>(error)) };
            return vec![unknown];
        }
    };
    let cut = if held.cut { ", and more that was not examined" } else { "" };
    let finding = |name: &str, sockets: &[String], ok: &str, what: &str, advice: &str| {
        if sockets.is_empty() {
            return Finding::ok(name, format!("{ok}{cut}"));
        }
        let rest = sockets.len().saturating_sub(NAMED);
        let mut list = sockets.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
        if rest > 0 {
            list += &format!("; and {rest} more");
        }
        Finding::new(State::Warning, name, format!("{what}: {list}{cut}"), advice)
    };
    let mut findings = vec![
        finding(
            UNSEEN,
            &held.unseen,
            "none in the processes of the cgroup",
            "processes of the cgroup have sockets whose flows no hook sees",
            "end them, then carnet up --refuse-unseen keeps them from making others; packet and \
             XDP sockets take CAP_NET_RAW, so start the processes without it (carnet run does, \
             systemd: CapabilityBoundingSet=~CAP_NET_RAW)",
        ),
        finding(
            FOREIGN,
            &held.foreign,
            "none in the processes of the cgroup",
            "processes of the cgroup have sockets that were made outside it, and whose flows are \
             not redirected",
            "start the processes in the cgroup instead of moving them there (carnet run), or \
             redirect a cgroup that also has those in which the sockets were made",
        ),
    ];
    if let Some(error) = held.unlisted {
        findings.pop();
        let unknown = Finding::from(FOREIGN, Err::<&str, _>(error));
        findings.push(Finding { state: State::Warning, ..unknown });
    }
    findings
}

/// What sockets the processes of a cgroup have that deserve a word.
#[derive(Debug, Default)]
struct Held {
    unseen: Vec<String>,
    foreign: Vec<String>,
    /// Why it is not known which are foreign.
    unlisted: Option<crate::Error>,
    cut: bool,
}

impl Held {
    fn by(members: &Members) -> Result<Self, crate::Error> {
        let mut held = Self { cut: members.cut, ..Self::default() };
        // The cgroups of internet sockets, by inode.
        let mut cgroups = BTreeMap::new();
        for namespace in members.namespaces()? {
            for protocol in PROTOCOLS {
                match namespace.diagnosis.list(protocol) {
                    Ok(listed) => {
                        cgroups.extend(listed.into_iter().map(|socket| (socket.inode, socket)));
                    }
                    Err(error) => held.unlisted = Some(unlisted(error)),
                }
            }
        }
        let mut seen = BTreeSet::new();
        for Member { pid } in &members.processes {
            for (descriptor, inode) in sockets_of(*pid) {
                if !seen.insert(inode) {
                    continue;
                }
                if seen.len() > EXAMINED {
                    held.cut = true;
                    return Ok(held);
                }
                held.examine(*pid, descriptor, cgroups.get(&inode), members);
            }
        }
        Ok(held)
    }

    fn examine(&mut self, pid: u32, descriptor: i32, listed: Option<&Listed>, members: &Members) {
        // It may have been closed meanwhile.
        let Some(kind) = socket_kind(pid, descriptor) else { return };
        let who = command_of(pid);
        if kind.is_unseen() {
            self.unseen.push(format!("{who} has a {kind}"));
        } else if let Some(socket) = listed
            && socket.cgroup != 0
            && !members.cgroups.contains_key(&socket.cgroup)
        {
            let peer = socket.peer();
            let to = if peer.port() == 0 { String::new() } else { format!(" to {peer}") };
            self.foreign.push(format!("{who} has a {kind} at {}{to}", socket.local()));
        }
    }
}

/// How a process is shown.
fn command_of(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{}[{pid}]", name.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unseen_protocols_are_found_in_the_kernels_table() {
        let table = "protocol  size sockets\nSCTPv6 1\nTCP 2\nSMC6 1\nPACKET 1\n";
        assert_eq!(unseen_in(table, ""), (vec!["SCTP", "SMC"], vec![]));
        assert_eq!(unseen_in("protocol size\nTCPv6 1\n", ""), (vec![], vec![]));
        let aliases = "# Aliases\nalias net-pf-2-proto-132 sctp\nalias net-pf-10-proto-33 x\n\
                       alias net-pf-2-proto-33-type-6 dccp_ipv4\nalias net-pf-430 x\n";
        assert_eq!(unseen_in(table, aliases), (vec!["SCTP", "SMC"], vec!["DCCP"]));
        assert_eq!(unseen_in("", aliases), (vec![], vec!["SCTP", "DCCP"]));
    }

    #[test]
    fn what_an_older_kernel_lacks_is_named() {
        assert!(multipath_words(true, "6.1.0-56-amd64").ends_with("Linux 6.2 only"));
        assert!(multipath_words(true, "6.12.1").ends_with("like others"));
        assert_eq!(multipath_words(false, "6.1.0"), "the kernel has none");
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

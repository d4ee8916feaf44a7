//! Other BPF programs at the hooks of a cgroup: who runs before Carnet's and who after, and what that
//! means.
//!
//! Of each hook the kernel runs all programs: those of a cgroup before those of the cgroups above it, at one
//! cgroup in the order in which they were attached, unless somebody asked newer kernels for another. So
//! what counts is the order that the kernel tells.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type;

use super::{Finding, State};
use crate::{
    cgroup::Place,
    object::{Hook, hooks},
    sys,
};

/// Begins the names of Carnet's programs, those of other instances included.
const OWN_PREFIX: &str = "carnet_";
/// How the names of others' programs begin, and whose they are then. The kernel keeps fifteen bytes of a name.
const KNOWN: [(&str, &str); 2] =
    [("sd_", "of systemd"), ("cgroup_sock_cre", "named as that of mitmproxy's local capture")];
/// Most cgroups below that are looked at.
const EXAMINED: usize = 4096;

/// Where programs see new sockets.
const SOCKETS: bpf_attach_type = bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE;
/// Where programs see the packets of a cgroup's sockets.
const PACKETS: [(bpf_attach_type, &str); 2] = [
    (bpf_attach_type::BPF_CGROUP_INET_INGRESS, "ingress"),
    (bpf_attach_type::BPF_CGROUP_INET_EGRESS, "egress"),
];

/// Those at the hooks of this cgroup, of those above it and of those below.
pub(super) fn examine(path: &Path) -> Vec<Finding> {
    const NAME: &str = "other programs";
    let place = match Place::at(path) {
        Ok(place) => place,
        Err(error) => return vec![Finding::from(NAME, Err::<&str, _>(error))],
    };
    match Neighbours::of(&place) {
        Ok(neighbours) => neighbours.findings(&place),
        Err(error) => {
            let advice = "run this as root, outside a container";
            vec![Finding::new(State::Warning, NAME, error, advice)]
        }
    }
}

/// Programs, as they are shown, by when they run.
#[derive(Debug, Default)]
struct Neighbours {
    /// When a socket is made. It is not decided about then.
    sockets: Vec<String>,
    before: Vec<String>,
    after: Vec<String>,
    packets: Vec<String>,
}

impl Neighbours {
    fn of(place: &Place) -> std::io::Result<Self> {
        let mut found = Self::default();
        let above: Vec<_> = place.directory.ancestors().map(Path::to_owned).collect();
        let here = fs::File::open(&place.directory)?;
        for Hook { name, attach_type, .. } in hooks() {
            let programs = sys::effective_programs(here.as_fd(), *attach_type)?;
            let mut carnet_has_run = false;
            for program in programs.into_iter().filter_map(Program::known) {
                if program.is_own() {
                    carnet_has_run = true;
                    continue;
                }
                let list = match *attach_type {
                    SOCKETS => &mut found.sockets,
                    _ if carnet_has_run => &mut found.after,
                    _ => &mut found.before,
                };
                list.push(program.shown(name, attached_at(&above, *attach_type, program.id)));
            }
        }
        for (attach_type, name) in PACKETS {
            for program in sys::effective_programs(here.as_fd(), attach_type)? {
                let Some(program) = Program::known(program) else { continue };
                let at = attached_at(&above, attach_type, program.id);
                found.packets.push(program.shown(name, at));
            }
        }
        for directory in below(&place.directory) {
            found.add_below(&directory);
        }
        Ok(found)
    }

    /// Those of a cgroup below, which run first. It may go meanwhile.
    fn add_below(&mut self, directory: &Path) {
        for Hook { name, attach_type, .. } in hooks() {
            for program in attached_to(directory, *attach_type) {
                if program.is_own() {
                    continue;
                }
                let list =
                    if *attach_type == SOCKETS { &mut self.sockets } else { &mut self.before };
                list.push(program.shown(name, Some(directory)));
            }
        }
        for (attach_type, name) in PACKETS {
            for program in attached_to(directory, attach_type) {
                self.packets.push(program.shown(name, Some(directory)));
            }
        }
    }

    fn findings(&self, place: &Place) -> Vec<Finding> {
        let finding = |name: &str, programs: &[String], advice: &str| {
            if programs.is_empty() {
                return Finding::ok(name, format!("none at {}", place.directory.display()));
            }
            Finding::new(State::Warning, name, programs.join(", "), advice)
        };
        vec![
            finding(
                "programs on new sockets",
                &self.sockets,
                "they can bind a socket to a device, from which no service is reached. Carnet lets go \
                 of it for processes with CAP_NET_RAW, and refuses what others connect (carnet \
                 status: bound to a device): have them leave alone what filters redirect",
            ),
            finding(
                "programs before Carnet's",
                &self.before,
                "Carnet decides about the destination that they leave, and that is what services get \
                 as the original one; what they refuse stays refused",
            ),
            finding(
                "programs after Carnet's",
                &self.after,
                "they have the last word about what passes, and about UDP. TCP connections that \
                 Carnet redirects or refuses and that they change are refused (carnet status: \
                 diverted, refusals_cleared). Carnet's run after those that are there already when \
                 it is brought up; programs of cgroups above always run later: to be after them, \
                 bring Carnet up at that cgroup",
            ),
            finding(
                "programs on packets",
                &self.packets,
                "to them a redirected connection is one to its service on loopback: let loopback \
                 pass (systemd: IPAddressAllow=localhost, RestrictNetworkInterfaces= with lo); the \
                 service's own cgroup needs the true destinations",
            ),
        ]
    }
}

/// A loaded program.
#[derive(Debug)]
struct Program {
    id: u32,
    name: String,
}

impl Program {
    /// The one with this number, unless it has gone meanwhile.
    fn known(id: u32) -> Option<Self> {
        let program = sys::program_by_id(id).ok()?;
        let info = sys::program_info(program.as_fd()).ok()?;
        let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Self { id, name: String::from_utf8_lossy(name).into_owned() })
    }

    fn is_own(&self) -> bool {
        self.name.starts_with(OWN_PREFIX)
    }

    fn shown(&self, hook: &str, at: Option<&Path>) -> String {
        let name = if self.name.is_empty() { "a program without a name" } else { &self.name };
        let whose = KNOWN.iter().find(|(prefix, _)| name.starts_with(prefix));
        let whose = whose.map(|(_, whose)| format!(" {whose}")).unwrap_or_default();
        let at = at.map(|at| format!(" at {}", at.display())).unwrap_or_default();
        format!("{name}{whose} (program {}, {hook}{at})", self.id)
    }
}

/// The programs that are attached to a cgroup itself; none if it is gone.
fn attached_to(directory: &Path, attach_type: bpf_attach_type) -> Vec<Program> {
    let Ok(cgroup) = fs::File::open(directory) else { return Vec::new() };
    let ids = sys::attached_programs(cgroup.as_fd(), attach_type).unwrap_or_default();
    ids.into_iter().filter_map(Program::known).collect()
}

/// To which of these cgroups a program is attached.
fn attached_at(cgroups: &[PathBuf], attach_type: bpf_attach_type, id: u32) -> Option<&Path> {
    let is_there = |directory: &&PathBuf| {
        let cgroup = fs::File::open(directory);
        let ids = cgroup.and_then(|cgroup| sys::attached_programs(cgroup.as_fd(), attach_type));
        ids.is_ok_and(|ids| ids.contains(&id))
    };
    cgroups.iter().find(is_there).map(PathBuf::as_path)
}

/// The cgroups below one.
fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if found.len() < EXAMINED {
                found.push(entry.path());
                waiting.push(entry.path());
            }
        }
    }
    found
}

//! The kernel engine as it was built, and how it is loaded.

use std::path::Path;

use aya::{
    Btf, Ebpf, EbpfLoader, VerifierLogLevel,
    programs::{Program, ProgramError, ProgramFd},
};
use aya_obj::{Object, generated::bpf_attach_type};
use sha2::{Digest as _, Sha256};

use crate::{Error, kernel::KernelTypes, sys::Wire, tables::Capacities};

/// What `cargo xtask bpf` built of `crates/carnet-bpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../prebuilt/carnet.bpfel.o");

/// Version of what maps mean, beyond their sizes: records, rows, names. To be raised with every
/// change after which programs and maps of before and after do not understand each other.
pub(crate) const LAYOUT: u32 = 9;

/// Which build of the kernel engine something is: the SHA-256 of its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BuildId(pub [u8; 32]);

impl BuildId {
    /// The build that is part of this library.
    pub fn own() -> Self {
        Self(Sha256::digest(OBJECT).into())
    }
}

impl std::fmt::Display for BuildId {
    /// 64 hexadecimal digits.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A program that is attached to cgroups.
#[derive(Debug)]
pub(crate) struct Hook {
    /// Its name, and that of its pin.
    pub(crate) program: &'static str,
    /// The name of its links' pins.
    pub(crate) name: &'static str,
    /// Where it hooks in.
    pub(crate) attach_type: bpf_attach_type,
}

/// What runs for every socket of the redirected scope.
pub(crate) static SCOPE_HOOKS: [Hook; 10] = [
    hook("carnet_connect4", "connect4", bpf_attach_type::BPF_CGROUP_INET4_CONNECT),
    hook("carnet_connect6", "connect6", bpf_attach_type::BPF_CGROUP_INET6_CONNECT),
    hook("carnet_getpeer4", "getpeername4", bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME),
    hook("carnet_getpeer6", "getpeername6", bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME),
    hook("carnet_sockops", "sockops", bpf_attach_type::BPF_CGROUP_SOCK_OPS),
    hook("carnet_sendmsg4", "sendmsg4", bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG),
    hook("carnet_sendmsg6", "sendmsg6", bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG),
    hook("carnet_recvmsg4", "recvmsg4", bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG),
    hook("carnet_recvmsg6", "recvmsg6", bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG),
    hook("carnet_release", "sock_release", bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE),
];

/// What runs for the sockets of services only, since it makes every socket option dearer.
pub(crate) static SERVICE_HOOKS: [Hook; 3] = [
    hook("carnet_getsockopt", "getsockopt", bpf_attach_type::BPF_CGROUP_GETSOCKOPT),
    hook("carnet_setsockopt", "setsockopt", bpf_attach_type::BPF_CGROUP_SETSOCKOPT),
    hook("carnet_cookie", "sock_cookie", bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE),
];

/// What runs for the sockets of services whose programs do not register their listeners.
pub(crate) static PORT_HOOKS: [Hook; 2] = [
    hook("carnet_bind4", "post_bind4", bpf_attach_type::BPF_CGROUP_INET4_POST_BIND),
    hook("carnet_bind6", "post_bind6", bpf_attach_type::BPF_CGROUP_INET6_POST_BIND),
];

/// What runs for the sockets of services that ask `getsockname()` for the destination.
pub(crate) static TPROXY_HOOKS: [Hook; 2] = [
    hook("carnet_getsock4", "getsockname4", bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME),
    hook("carnet_getsock6", "getsockname6", bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME),
];

/// What runs for every socket of the scope that is made, where the operator asks for it.
pub(crate) static REFUSE_UNSEEN: Hook =
    hook("carnet_socket", "sock_create", bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE);

const fn hook(program: &'static str, name: &'static str, attach_type: bpf_attach_type) -> Hook {
    Hook { program, name, attach_type }
}

/// All hooks.
pub(crate) fn hooks() -> impl Iterator<Item = &'static Hook> {
    let of_services = SERVICE_HOOKS.iter().chain(&PORT_HOOKS).chain(&TPROXY_HOOKS);
    SCOPE_HOOKS.iter().chain(of_services).chain([&REFUSE_UNSEEN])
}

/// The iterator over flows.
pub(crate) const FLOWS: &str = "carnet_flows";
/// The iterator over open files.
pub(crate) const FILES: &str = "carnet_files";

/// A map as the object defines it.
pub(crate) struct MapDefinition {
    pub(crate) name: String,
    pub(crate) kind: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
}

/// The maps that outlive the programs that use them: all but the sections of constants and such,
/// which are each build's own.
pub(crate) fn map_definitions() -> Result<Vec<MapDefinition>, Error> {
    let object =
        Object::parse(OBJECT).map_err(|error| Error::Object { source: Box::new(error.into()) })?;
    let maps = object.maps.iter().filter(|(name, _)| !name.starts_with('.'));
    Ok(maps
        .map(|(name, map)| MapDefinition {
            name: name.clone(),
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
        })
        .collect())
}

/// Loads all programs over the maps that are pinned in `maps`; those that are not are made, with
/// `capacities`, and pinned there. Without `maps` nothing is pinned.
pub(crate) fn load(maps: Option<&Path>, capacities: Option<&Capacities>) -> Result<Ebpf, Error> {
    let types = KernelTypes::read()?;
    let offsets = Wire(types.offsets()?);
    let mptcp_mark = types.mptcp_mark();
    let object = |error| Error::Object { source: Box::new(error) };
    let btf = Btf::from_sys_fs().map_err(|error| object(error.into()))?;
    let definitions = map_definitions()?;

    let mut loader = EbpfLoader::new();
    loader
        .btf(Some(&btf))
        // Asked for only after a failure. More than this is the whole walk, megabytes of it.
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("OFFSETS", &offsets, true)
        .override_global("MPTCP_MARK", &mptcp_mark, true);
    if let Some(maps) = maps {
        for MapDefinition { name, .. } in &definitions {
            loader.map_pin_path(name, maps.join(name));
        }
    }
    for (name, entries) in capacities.into_iter().flat_map(Capacities::map_entries) {
        loader.map_max_entries(name, entries);
    }
    let mut loaded = loader.load(OBJECT).map_err(object)?;
    for (name, program) in loaded.programs_mut() {
        load_program(name, program, &btf).map_err(|error| Error::Program {
            program: name.to_owned(),
            source: Box::new(error),
        })?;
    }
    Ok(loaded)
}

fn load_program(name: &str, program: &mut Program, btf: &Btf) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::Iter(program) if name == FLOWS => program.load("bpf_sk_storage_map", btf),
        Program::Iter(program) => program.load("task_file", btf),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The descriptor of a program of [`load`].
pub(crate) fn program<'a>(loaded: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, Error> {
    let found = match loaded.program(name) {
        Some(Program::CgroupSockAddr(program)) => program.fd(),
        Some(Program::CgroupSockopt(program)) => program.fd(),
        Some(Program::CgroupSock(program)) => program.fd(),
        Some(Program::SockOps(program)) => program.fd(),
        Some(Program::Iter(program)) => program.fd(),
        _ => Err(ProgramError::NotLoaded),
    };
    found.map_err(|error| Error::Program { program: name.to_owned(), source: Box::new(error) })
}

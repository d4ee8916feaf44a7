//! The error of every operation.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use carnet_core::{
    abi::LISTENER_SLOTS,
    compile::CompileError,
    object::{DocumentError, Protocol},
};
use thiserror::Error;

/// Why an operation of the engine failed.
///
/// `Display` says what was attempted on what, and what to do about it; the cause is the
/// [source](std::error::Error::source).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A call to the operating system failed.
    #[error("cannot {operation} {subject}")]
    Io {
        /// What was attempted, as a verb phrase.
        operation: &'static str,
        /// What it was attempted on.
        subject: String,
        /// The cause.
        source: io::Error,
    },

    /// The process lacks capabilities.
    #[error(
        "root is needed (or {missing}): run this as root, e.g. with sudo; in a container, outside \
         it"
    )]
    NotPrivileged {
        /// The capabilities that are missing, comma-separated.
        missing: String,
    },

    /// The kernel is too old.
    #[error("Linux {found} is too old: Carnet needs {}.{} or newer", needed.0, needed.1)]
    KernelTooOld {
        /// What runs.
        found: String,
        /// What is needed: major and minor number.
        needed: (u32, u32),
    },

    /// The kernel does not describe its own types.
    #[error(
        "the kernel has no type information ({path} is missing): run a kernel that was built with \
         CONFIG_DEBUG_INFO_BTF=y, as those of the distributions are"
    )]
    NoBtf {
        /// Where it should be.
        path: &'static str,
    },

    /// The kernel's type information cannot be understood.
    #[error("the kernel's type information cannot be understood: {problem}")]
    BadBtf {
        /// What is wrong with it.
        problem: &'static str,
    },

    /// The kernel's structures are not as they are known.
    #[error(
        "this kernel's struct {structure} has no {member}: this version of Carnet does not know \
         the kernel; use a newer one"
    )]
    UnknownKernel {
        /// The structure.
        structure: &'static str,
        /// The member.
        member: &'static str,
    },

    /// No bpffs is mounted, and none could be.
    #[error("no bpffs is mounted: mount one (mount -t bpf bpf /sys/fs/bpf)")]
    NoBpffs,

    /// A directory is not on a bpffs.
    #[error("{path} is not on a bpffs: name the mount point of one (mount -t bpf none DIRECTORY)")]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },

    /// A name that instances cannot have.
    #[error(
        "{name:?} cannot be the name of an instance: use up to {} of the characters A-Z a-z 0-9 _ -",
        crate::location::MAX_INSTANCE_NAME
    )]
    BadInstance {
        /// The name.
        name: String,
    },

    /// There is no such instance.
    #[error("instance {instance:?} is not up: bring it up first (carnet up)")]
    NotUp {
        /// The instance.
        instance: String,
    },

    /// There is such an instance already.
    #[error("instance {instance:?} is already up: take it down first (carnet down), or upgrade it")]
    AlreadyUp {
        /// The instance.
        instance: String,
    },

    /// What is pinned is not as this version knows it.
    #[error(
        "instance {instance:?} was brought up by another version of Carnet: {difference}. Use that \
         version, or take the instance down (carnet down) and bring it up again; policy and flows \
         are lost by that"
    )]
    UnknownLayout {
        /// The instance.
        instance: String,
        /// What differs.
        difference: String,
    },

    /// No cgroup-v2 hierarchy is mounted.
    #[error(
        "no cgroup-v2 hierarchy is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified)"
    )]
    NoCgroup2,

    /// A path is not a cgroup.
    #[error("{path} is not a cgroup: name a directory of the cgroup-v2 hierarchy at {mount}")]
    NotACgroup {
        /// The path.
        path: PathBuf,
        /// Where the hierarchy is mounted.
        mount: PathBuf,
    },

    /// The mounted hierarchy's root is not the real one.
    #[error(
        "this process sees only a part of the cgroup hierarchy (its root has the id {root}): run \
         this outside the container"
    )]
    CgroupNamespace {
        /// The id of what is seen as the root.
        root: u64,
    },

    /// A service's cgroup is not there, or not the one that the policy names.
    #[error(
        "the cgroup {path} of service {service:?} is gone: make it and give it to the service \
         again, or remove the service"
    )]
    CgroupGone {
        /// The service's name.
        service: String,
        /// The cgroup's path below the hierarchy's root.
        path: String,
    },

    /// A service's cgroup lies around the redirected scope.
    #[error(
        "cgroup {path} cannot be that of service {service:?}: the redirected scope {scope} lies \
         within it, so every redirected process would be the service's; give it a cgroup beside \
         the scope or in it"
    )]
    ServiceAroundScope {
        /// The service's name.
        service: String,
        /// The cgroup's path below the hierarchy's root.
        path: String,
        /// The scope's path below the hierarchy's root.
        scope: String,
    },

    /// A program cannot be attached.
    #[error("cannot attach {program} to the cgroup {cgroup}{}", attach_advice(source))]
    Attach {
        /// The program.
        program: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// The cause.
        source: io::Error,
    },

    /// The kernel engine's maps cannot be made or its programs not be prepared.
    #[error("the kernel engine cannot be prepared")]
    Object {
        /// The cause.
        source: Box<EbpfError>,
    },

    /// The kernel refuses a program.
    #[error("the kernel refuses the program {program}")]
    Program {
        /// The program.
        program: String,
        /// The cause, with the verifier's words.
        source: Box<ProgramError>,
    },

    /// A map cannot be used.
    #[error("cannot use the map {map}")]
    Map {
        /// The map.
        map: &'static str,
        /// The cause.
        source: MapError,
    },

    /// The policy does not fit into a table.
    #[error(
        "the policy needs {needed} {what}, and there is room for {capacity}: remove filters, name \
         fewer values in them, or bring the instance up with more room (carnet up --max-filters)"
    )]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How many the policy needs.
        needed: usize,
        /// How many there can be.
        capacity: usize,
    },

    /// A number of filters for which no tables can be made.
    #[error("there cannot be tables for {given} filters: name a number from 1 to {largest}")]
    BadMaxFilters {
        /// What was asked for.
        given: u32,
        /// Most filters that there can be tables for.
        largest: u32,
    },

    /// A life of idle UDP flows of less than a millisecond.
    #[error("idle UDP flows cannot end at once: give them a millisecond or more")]
    BadUdpIdle,

    /// An overlap of keys that is longer than records live.
    #[error(
        "a key cannot be accepted for {} seconds after its rotation, since its records live for {} \
         seconds: name a shorter overlap",
        given.as_secs_f64(),
        longest.as_secs()
    )]
    BadOverlap {
        /// What was asked for.
        given: Duration,
        /// The longest that there can be.
        longest: Duration,
    },

    /// The policy cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),

    /// The policy in the kernel cannot be read.
    #[error(transparent)]
    Document(#[from] DocumentError),

    /// Somebody reads the events.
    #[error(
        "the events of instance {instance:?} already have a reader, and there can be only one: \
         stop the other one (carnet trace)"
    )]
    EventsTaken {
        /// The instance.
        instance: String,
    },

    /// The kernel cannot end connections.
    #[error(
        "this kernel cannot end connections that are there (it was built without \
         CONFIG_INET_DIAG_DESTROY): leave that out, and have the processes started anew"
    )]
    CannotEnd,

    /// The kernel does not list sockets.
    #[error(
        "this kernel does not list sockets: it takes CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG \
         (modules tcp_diag and udp_diag)"
    )]
    NoSocketList,

    /// There is no such service.
    #[error("there is no service {name:?}: add it first (carnet service add)")]
    NoService {
        /// The name that was asked for.
        name: String,
    },

    /// No process of a service has such a socket.
    #[error(
        "service {service:?} has no {} {address}{}: write the address as `ss -ltunp` shows it",
        if *protocol == Protocol::TCP {
            "TCP socket that listens at"
        } else {
            "UDP socket that is not connected and bound to"
        },
        if *limited { " in that network namespace" } else { "" }
    )]
    NoSocket {
        /// The service's name.
        service: String,
        /// TCP or UDP.
        protocol: Protocol,
        /// The address.
        address: SocketAddr,
        /// Whether only sockets of one network namespace were wanted.
        limited: bool,
    },

    /// A service has no listener that flows of another network namespace could reach.
    #[error(
        "service {service:?} has registered no listening TCP socket that takes connections to \
         {address} in the network namespace {home}: start it there first, and let it register, or \
         register it (carnet service register {service} --pid)"
    )]
    NoListener {
        /// The service's name.
        service: String,
        /// The address.
        address: SocketAddr,
        /// Where it was looked for.
        home: String,
    },

    /// An address by which a listener in another network namespace cannot be reached.
    #[error("flows of the network namespace {flows} cannot reach a listener at {address}: {why}")]
    NotReachable {
        /// The network namespace of the flows.
        flows: String,
        /// The address.
        address: SocketAddr,
        /// Why not, and what to do.
        why: String,
    },

    /// A service has all the listeners that it can have.
    #[error(
        "service {service:?} has {LISTENER_SLOTS} listeners of this family for this network \
         namespace, the most there can be: take one back (carnet service unregister)"
    )]
    NoListenerSlot {
        /// The service's name.
        service: String,
    },

    /// A listening socket cannot be registered.
    #[error(
        "the listener {listener} of process {pid} cannot be registered{}",
        registration_advice(source)
    )]
    Register {
        /// The process.
        pid: u32,
        /// Where it listens.
        listener: String,
        /// The cause.
        source: io::Error,
    },

    /// A path is not a regular file.
    #[error("{path} is not a file that can be executed")]
    NotExecutable {
        /// The path.
        path: PathBuf,
    },

    /// The kernel did not say what a file is.
    #[error("the kernel does not say what {path} is: run this in the initial pid namespace")]
    NotIdentified {
        /// The path.
        path: PathBuf,
    },
}

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub(crate) fn io<E: Into<io::Error>>(
        operation: &'static str,
        subject: impl ToString,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { operation, subject: subject.to_string(), source: source.into() }
    }

    /// An [`Error::Map`], for `map_err`.
    pub(crate) fn map<E: Into<MapError>>(map: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Map { map, source: source.into() }
    }
}

fn attach_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => {
            ": another program is attached exclusively there or above (without \
             BPF_F_ALLOW_MULTI), or this process lacks CAP_NET_ADMIN; `bpftool cgroup tree` shows \
             which"
        }
        Some(libc::E2BIG) => ": it has the most programs that a cgroup can have (64)",
        _ => "",
    }
}

fn registration_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP) => {
            ": its socket was not made in the service's cgroup; start the process there (carnet \
             service run)"
        }
        Some(libc::EINVAL) => ": it is bound to a device",
        Some(libc::ENOSPC) => {
            ": the service has 8 listeners of this family and protocol in this network namespace, \
             the most there can be"
        }
        _ => "",
    }
}

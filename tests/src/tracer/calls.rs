//! Which system calls count, and what they are called.
//!
//! The list is of those that do not: whatever is not known changes something.

use std::{fs::File, os::unix::fs::FileExt as _};

use nix::unistd::Pid;

use super::Call;

/// A call that counts.
pub(super) struct Counted {
    pub(super) call: Call,
    /// Whether it gives a new BPF object.
    pub(super) makes_object: bool,
}

/// Calls that read, or change nothing but the process itself. Descriptors and locks are the
/// process's own as well: death closes them.
#[rustfmt::skip]
const PRIVATE: [i64; 62] = [
    libc::SYS_read, libc::SYS_pread64, libc::SYS_readv, libc::SYS_lseek, libc::SYS_close,
    libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_statfs, libc::SYS_fstatfs,
    libc::SYS_readlinkat, libc::SYS_getdents64, libc::SYS_faccessat, libc::SYS_faccessat2,
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_madvise,
    libc::SYS_brk, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_sigaltstack,
    libc::SYS_rt_sigreturn, libc::SYS_getrandom, libc::SYS_clock_gettime, libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep, libc::SYS_futex, libc::SYS_ppoll, libc::SYS_set_tid_address,
    libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_prlimit64, libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield, libc::SYS_gettid, libc::SYS_getpid, libc::SYS_getppid, libc::SYS_getuid,
    libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_capget, libc::SYS_uname,
    libc::SYS_fcntl, libc::SYS_dup, libc::SYS_dup3, libc::SYS_pipe2, libc::SYS_ioctl,
    libc::SYS_prctl, libc::SYS_execve, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_getcwd,
    libc::SYS_flock, libc::SYS_getsockname, libc::SYS_getsockopt, libc::SYS_recvmsg,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_restart_syscall,
];
/// The same, of old names that not every processor has.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const OLD: [i64; 10] = [
    libc::SYS_access, libc::SYS_poll, libc::SYS_readlink, libc::SYS_stat, libc::SYS_lstat,
    libc::SYS_arch_prctl, libc::SYS_dup2, libc::SYS_pipe, libc::SYS_getpgrp, libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: [i64; 0] = [];

/// Commands of bpf(2) that read, by their numbers: looking up, listing, asking, opening.
const READING: [u64; 15] = [1, 4, 7, 11, 12, 13, 14, 15, 16, 19, 20, 23, 24, 30, 31];
/// Those that give a new map, program or link.
const MAKING: [u64; 3] = [0, 5, 28];
/// Those that make what only the new descriptor holds: maps, programs, types. A link is more: it attaches.
const OWN: [u64; 3] = [0, 5, 18];
/// Those with a path, at the begin of their attributes.
const PINNING: u64 = 6;

/// Says whether a call counts.
pub(super) fn counted(pid: Pid, number: u64, arguments: [u64; 6]) -> Option<Counted> {
    let number = number.cast_signed();
    let plain =
        |text: String| Some(Counted { call: Call { text, is_own: false }, makes_object: false });
    match number {
        libc::SYS_bpf if READING.contains(&arguments[0]) => None,
        libc::SYS_bpf => {
            let path = match arguments[0] {
                PINNING => format!(" {}", pointed_path(pid, arguments[1])),
                _ => String::new(),
            };
            let text = format!("bpf {}{path}", bpf_command(arguments[0]));
            let is_own = OWN.contains(&arguments[0]);
            let makes_object = MAKING.contains(&arguments[0]);
            Some(Counted { call: Call { text, is_own }, makes_object })
        }
        libc::SYS_openat => {
            let writes = (libc::O_CREAT | libc::O_TRUNC | libc::O_TMPFILE) & !libc::O_DIRECTORY;
            let flags = arguments[2] as i32;
            (flags & writes != 0)
                .then(|| format!("openat {}", text_at(pid, arguments[1])))
                .and_then(plain)
        }
        _ if PRIVATE.contains(&number) || OLD.contains(&number) => None,
        _ => {
            let (name, path) = named(number);
            let path = path.and_then(|at| arguments.get(at)).map(|address| text_at(pid, *address));
            let path = path.map(|path| format!(" {path}")).unwrap_or_default();
            plain(format!("{name}{path}"))
        }
    }
}

/// The name of a call, and which argument is a path.
fn named(number: i64) -> (String, Option<usize>) {
    #[cfg(target_arch = "x86_64")]
    match number {
        libc::SYS_mkdir => return ("mkdir".into(), Some(0)),
        libc::SYS_rmdir => return ("rmdir".into(), Some(0)),
        libc::SYS_unlink => return ("unlink".into(), Some(0)),
        libc::SYS_rename => return ("rename".into(), Some(0)),
        _ => {}
    }
    let (name, path) = match number {
        libc::SYS_mkdirat => ("mkdir", Some(1)),
        libc::SYS_unlinkat => ("unlink", Some(1)),
        libc::SYS_renameat | libc::SYS_renameat2 => ("rename", Some(1)),
        libc::SYS_mount => ("mount", Some(1)),
        libc::SYS_write => ("write", None),
        libc::SYS_socket => ("socket", None),
        libc::SYS_sendto => ("sendto", None),
        libc::SYS_sendmsg => ("sendmsg", None),
        libc::SYS_setsockopt => ("setsockopt", None),
        libc::SYS_bind => ("bind", None),
        libc::SYS_pidfd_open => ("pidfd_open", None),
        libc::SYS_setns => ("setns", None),
        other => return (format!("call {other}"), None),
    };
    (name.into(), path)
}

fn bpf_command(number: u64) -> String {
    let name = match number {
        0 => "MAP_CREATE",
        2 => "MAP_UPDATE_ELEM",
        3 => "MAP_DELETE_ELEM",
        5 => "PROG_LOAD",
        6 => "OBJ_PIN",
        18 => "BTF_LOAD",
        22 => "MAP_FREEZE",
        26 => "MAP_UPDATE_BATCH",
        28 => "LINK_CREATE",
        29 => "LINK_UPDATE",
        33 => "ITER_CREATE",
        34 => "LINK_DETACH",
        other => return format!("command {other}"),
    };
    name.into()
}

/// The path whose address is at an address.
fn pointed_path(pid: Pid, address: u64) -> String {
    let mut pointer = [0; 8];
    let read = memory(pid).and_then(|memory| memory.read_exact_at(&mut pointer, address).ok());
    read.map(|()| text_at(pid, u64::from_ne_bytes(pointer))).unwrap_or_default()
}

/// The text at an address of a process.
fn text_at(pid: Pid, address: u64) -> String {
    let mut bytes = [0; 256];
    let read = memory(pid).and_then(|memory| memory.read_at(&mut bytes, address).ok());
    let text = bytes[..read.unwrap_or(0)].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn memory(pid: Pid) -> Option<File> {
    File::open(format!("/proc/{pid}/mem")).ok()
}

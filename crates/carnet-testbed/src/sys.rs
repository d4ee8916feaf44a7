//! The calls that Rust cannot check: leaving the network namespace, setting up a child between fork
//! and exec, and one socket option that no safe library offers.
#![expect(unsafe_code, reason = "unshare, pre_exec and getsockopt(SO_NETNS_COOKIE) are unsafe")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    process::{Gid, Uid},
    thread::{
        LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
    },
};

/// Moves the calling thread into a new network namespace.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: only CLONE_FILES is dangerous, as it splits the table of descriptors; the network
    // namespace of a thread concerns no memory and no descriptor that exists.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)
}

/// Makes the command's process enter a network namespace before it executes.
pub(crate) fn enter_network_namespace_before_exec(command: &mut Command, namespace: OwnedFd) {
    let enter = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(io::Error::from)
    };
    // SAFETY: the closure makes one system call and neither allocates nor takes a lock, which is
    // what a process forked from a threaded one is limited to.
    unsafe { command.pre_exec(enter) };
}

/// Makes the command's process write itself ("0") to an open `cgroup.procs` before it executes.
pub(crate) fn enter_cgroup_before_exec(command: &mut Command, processes: File) {
    let enter =
        move || rustix::io::write(&processes, b"0").map(|_written| ()).map_err(io::Error::from);
    // SAFETY: as above: one system call, no allocation, no lock.
    unsafe { command.pre_exec(enter) };
}

/// Makes the command's process take a user and group, without supplementary groups, before it
/// executes.
pub(crate) fn become_user_before_exec(command: &mut Command, uid: Uid, gid: Gid) {
    let become_user = move || {
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: as above: three system calls, no allocation, no lock.
    unsafe { command.pre_exec(become_user) };
}

/// The cookie of the network namespace that a socket lives in: the number by which BPF programs
/// know the namespace.
pub(crate) fn network_namespace_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the pointers are to live local variables, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

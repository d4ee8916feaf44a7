//! What of ptrace(2) is not safe: being traced from the begin, and what a thread calls.
//! And opening a BPF object by its id, for which aya has no function that is there for all kinds.
#![expect(unsafe_code, reason = "pre_exec, a union of the kernel's, bpf(2)")]

use std::{
    io,
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

use nix::{sys::ptrace, unistd::Pid};

/// Where a thread has stopped.
pub(super) enum Stop {
    /// It enters a call: number and arguments.
    Entry(u64, [u64; 6]),
    /// It comes back from one, with this.
    Exit(i64),
    /// Elsewhere.
    Other,
}

/// Makes the process of `command` be traced by the thread that starts it.
pub(super) fn trace_before_exec(command: &mut Command) {
    // SAFETY: between fork and exec only what is async-signal-safe may be done: this is one system
    // call.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(io::Error::from)) };
}

/// The call at which a thread has stopped.
pub(super) fn call(pid: Pid) -> io::Result<Stop> {
    let info = match ptrace::syscall_info(pid) {
        // It has been killed since.
        Err(nix::errno::Errno::ESRCH) => return Ok(Stop::Other),
        info => info?,
    };
    // SAFETY: `op` says which member the kernel has written.
    let stop = unsafe {
        match info.op {
            libc::PTRACE_SYSCALL_INFO_ENTRY => Stop::Entry(info.u.entry.nr, info.u.entry.args),
            libc::PTRACE_SYSCALL_INFO_EXIT => Stop::Exit(info.u.exit.sval),
            _ => Stop::Other,
        }
    };
    Ok(stop)
}

/// Opens a BPF object by a command of bpf(2) that does so for an id.
pub(super) fn open_by_id(command: i32, id: u32) -> io::Result<OwnedFd> {
    // The id, the next one, flags.
    let mut attributes = [id, 0, 0];
    // SAFETY: the kernel reads and writes no more than these attributes, which have no addresses.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes))
    };
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel gave a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Has the kernel not carry out the call that a thread enters.
#[cfg(target_arch = "x86_64")]
pub(super) fn skip_call(pid: Pid) -> io::Result<()> {
    let mut registers = ptrace::getregs(pid)?;
    registers.orig_rax = u64::MAX;
    Ok(ptrace::setregs(pid, registers)?)
}

/// Makes the call from which a thread comes back have failed.
#[cfg(target_arch = "x86_64")]
pub(super) fn fail_call(pid: Pid, errno: i32) -> io::Result<()> {
    let mut registers = ptrace::getregs(pid)?;
    registers.rax = i64::from(-errno).cast_unsigned();
    Ok(ptrace::setregs(pid, registers)?)
}

/// The registers of other processors are not known here.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn skip_call(_pid: Pid) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn fail_call(_pid: Pid, _errno: i32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

//! Runs a command and harms it at one of its system calls.
//!
//! Only calls that can change something outside of the process are counted. A command that is killed
//! at another one leaves behind just what it leaves behind when it is killed at the next that counts:
//! all that lies between is gone with the process. So to be killed at each of those, and not to be
//! killed at all, is to be killed at any call.
//!
//! strace can do the like (`--inject`), but counts by thread and takes no look at arguments: it
//! cannot tell a `bpf` that reads from one that writes, or say which objects of the kernel a command
//! has made.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read as _},
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
    thread,
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

mod calls;
mod sys;

use calls::Counted;

/// What is done to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Nothing.
    None,
    /// It is killed when it enters this call of those that count, the first of which is 1. The call
    /// is not carried out.
    Kill(usize),
    /// This call fails with this errno, and is not carried out.
    Fail(usize, i32),
}

/// What became of a command.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if it was killed.
    pub status: Option<i32>,
    /// What it wrote to its standard output.
    pub output: String,
    /// What it wrote to its standard error.
    pub errors: String,
    /// The calls that count, in their order. The last one is that at which it was killed.
    pub calls: Vec<Call>,
    /// What of BPF it has made.
    pub made: HashSet<Object>,
}

/// A call that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its name, and what is to be said of its arguments.
    pub text: String,
    /// Whether it makes something that only a descriptor of the process holds, so that death takes it
    /// back.
    pub is_own: bool,
}

/// A BPF object of the kernel, by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// A map.
    Map(u32),
    /// A program.
    Program(u32),
    /// A link.
    Link(u32),
}

impl Object {
    /// Whether the kernel still has it.
    pub fn is_there(self) -> bool {
        // BPF_PROG_GET_FD_BY_ID and its like.
        let (command, id) = match self {
            Self::Program(id) => (13, id),
            Self::Map(id) => (14, id),
            Self::Link(id) => (30, id),
        };
        sys::open_by_id(command, id).is_ok()
    }
}

/// Runs a command to its end.
///
/// # Errors
/// What keeps it from being started or traced.
pub fn run(command: &mut Command, harm: Harm) -> io::Result<Ended> {
    // The tracer is a thread, and so it waits for nobody but the command.
    thread::scope(|scope| scope.spawn(|| trace(command, harm)).join().expect("a tracer"))
}

fn trace(command: &mut Command, harm: Harm) -> io::Result<Ended> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // In a group of its own, so that what it starts can be killed with it.
    command.process_group(0);
    sys::trace_before_exec(command);
    let mut child = command.spawn()?;
    let streams = (child.stdout.take(), child.stderr.take());
    let read = |stream: Option<Box<dyn io::Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What cannot be read any more has ended.
            let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = read(streams.0.map(|stream| Box::new(stream) as _));
    let errors = read(streams.1.map(|stream| Box::new(stream) as _));
    let first = Pid::from_raw(child.id().cast_signed());
    let mut tracer = Tracer {
        first,
        harm,
        calls: Vec::new(),
        made: HashSet::new(),
        inside: HashSet::new(),
        failing: HashSet::new(),
        alive: HashSet::from([first]),
    };
    let status = tracer.follow()?;
    let text = |reader: thread::JoinHandle<String>| reader.join().expect("a reader");
    Ok(Ended {
        status,
        output: text(output),
        errors: text(errors),
        calls: tracer.calls,
        made: tracer.made,
    })
}

struct Tracer {
    first: Pid,
    harm: Harm,
    calls: Vec<Call>,
    made: HashSet<Object>,
    /// Threads between entry and exit of a call that makes BPF objects.
    inside: HashSet<Pid>,
    /// Threads whose call is to fail.
    failing: HashSet<Pid>,
    alive: HashSet<Pid>,
}

impl Tracer {
    /// Follows the command, and all threads and processes that it starts, until all have ended;
    /// gives the exit status of the first.
    fn follow(&mut self) -> io::Result<Option<i32>> {
        let mut result = None;
        let mut begun = false;
        while !self.alive.is_empty() {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            let stop = match waitpid(None, Some(flags)) {
                Err(Errno::ECHILD) => break,
                stop => stop?,
            };
            match stop {
                WaitStatus::Exited(pid, status) => {
                    self.alive.remove(&pid);
                    if pid == self.first {
                        result = Some(status);
                    }
                }
                WaitStatus::Signaled(pid, ..) => {
                    self.alive.remove(&pid);
                }
                // The stop at exec, with which tracing begins.
                WaitStatus::Stopped(pid, Signal::SIGTRAP) if pid == self.first && !begun => {
                    begun = true;
                    let followed = Options::PTRACE_O_TRACECLONE
                        | Options::PTRACE_O_TRACEEXEC
                        | Options::PTRACE_O_TRACEFORK
                        | Options::PTRACE_O_TRACEVFORK;
                    let options =
                        followed | Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
                    ptrace::setoptions(pid, options)?;
                    go_on(pid, None)?;
                }
                WaitStatus::PtraceSyscall(pid) => {
                    self.at_call(pid)?;
                    go_on(pid, None)?;
                }
                WaitStatus::PtraceEvent(pid, ..) => go_on(pid, None)?,
                // A new thread or process begins with this one.
                WaitStatus::Stopped(pid, Signal::SIGSTOP) if self.alive.insert(pid) => {
                    go_on(pid, None)?;
                }
                WaitStatus::Stopped(pid, signal) => go_on(pid, Some(signal))?,
                _ => {}
            }
        }
        Ok(result)
    }

    /// A thread enters a call, or comes back from it.
    fn at_call(&mut self, pid: Pid) -> io::Result<()> {
        match sys::call(pid)? {
            sys::Stop::Entry(number, arguments) => {
                let Some(call) = calls::counted(pid, number, arguments) else { return Ok(()) };
                let Counted { call, makes_object } = call;
                self.calls.push(call);
                let count = self.calls.len();
                match self.harm {
                    Harm::Kill(at) if at == count => {
                        kill(Pid::from_raw(-self.first.as_raw()), Signal::SIGKILL)?;
                    }
                    Harm::Fail(at, _) if at == count => {
                        sys::skip_call(pid)?;
                        self.failing.insert(pid);
                    }
                    _ if makes_object => {
                        self.inside.insert(pid);
                    }
                    _ => {}
                }
            }
            sys::Stop::Exit(value) => {
                if self.failing.remove(&pid)
                    && let Harm::Fail(_, errno) = self.harm
                {
                    sys::fail_call(pid, errno)?;
                } else if self.inside.remove(&pid) && value >= 0 {
                    self.made.extend(object(pid, value));
                }
            }
            sys::Stop::Other => {}
        }
        Ok(())
    }
}

/// Lets a thread go on to its next call. It may be gone: killed.
fn go_on(pid: Pid, signal: Option<Signal>) -> io::Result<()> {
    match ptrace::syscall(pid, signal) {
        Err(Errno::ESRCH) => Ok(()),
        result => Ok(result?),
    }
}

/// The object behind a descriptor of a process, if it is one of BPF.
fn object(pid: Pid, descriptor: i64) -> Option<Object> {
    let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).ok()?;
    text.lines().find_map(|line| {
        let (name, number) = line.split_once(':')?;
        let id = number.trim().parse().ok()?;
        match name {
            "map_id" => Some(Object::Map(id)),
            "link_id" => Some(Object::Link(id)),
            // A link names its program, too, but after itself.
            "prog_id" => Some(Object::Program(id)),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_command_is_killed_before_the_call_and_not_after_it() {
        let directory = std::env::temp_dir().join(format!("carnet-tracer-{}", std::process::id()));
        let script = format!("mkdir {0}; rmdir {0}", directory.display());
        let whole = run(&mut shell(&script), Harm::None).unwrap();
        assert_eq!(whole.status, Some(0), "{whole:?}");
        let at = |name: &str| {
            whole.calls.iter().position(|call| call.text.starts_with(name)).expect("the call") + 1
        };
        let (mkdir, rmdir) = (at("mkdir"), at("rmdir"));
        let killed = run(&mut shell(&script), Harm::Kill(mkdir)).unwrap();
        assert_eq!((killed.status, killed.calls.len()), (None, mkdir));
        assert!(!directory.exists());
        let killed = run(&mut shell(&script), Harm::Kill(rmdir)).unwrap();
        assert_eq!(killed.status, None);
        assert!(directory.exists());
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_call_fails_with_the_errno() {
        let directory = std::env::temp_dir().join(format!("carnet-failing-{}", std::process::id()));
        let script = format!("exec mkdir {}", directory.display());
        let whole = run(&mut shell(&script), Harm::None).unwrap();
        fs::remove_dir(&directory).unwrap();
        let at = whole.calls.iter().position(|call| call.text.starts_with("mkdir")).unwrap() + 1;
        let failed = run(&mut shell(&script), Harm::Fail(at, libc::ENOSPC)).unwrap();
        assert_eq!(failed.status, Some(1));
        assert!(failed.errors.contains("No space left"), "{failed:?}");
        assert!(!directory.exists());
    }
}

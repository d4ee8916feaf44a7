//! A child process that does not outlive its owner, and whose output can be waited for.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

use crate::Error;

/// A child process, killed and collected when dropped.
///
/// Its standard input is a pipe that stays open until [`close_input`](Self::close_input) or drop;
/// its standard output is read continuously, so that it never blocks, and kept. Standard error is
/// as the command says. Only the process itself is killed: what it starts belongs in a
/// [`Cgroup`](crate::Cgroup).
#[derive(Debug)]
pub struct Process {
    program: String,
    child: Child,
    input: Option<ChildStdin>,
    output: Arc<Output>,
}

/// What a process has printed so far.
#[derive(Debug, Default)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct OutputState {
    lines: Vec<String>,
    closed: bool,
}

impl Process {
    /// Starts a command.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self, Error> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::io("start", &program))?;
        let output = Arc::new(Output::default());
        let input = child.stdin.take();
        let stdout = child.stdout.take();
        let process = Self { program, child, input, output: Arc::clone(&output) };
        if let Some(stdout) = stdout {
            thread::Builder::new()
                .name(format!("output of {}", process.id()))
                .spawn(move || output.read_from(stdout))
                .map_err(Error::io("read the output of", &process.program))?;
        }
        Ok(process)
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The lines that it has printed to its standard output so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.output.lock().lines.clone()
    }

    /// Waits for a line of its standard output that the predicate accepts, and returns the first
    /// such line, be it old or new.
    ///
    /// # Errors
    /// [`Error::TimedOut`]; [`Error::ProcessEnded`] if the output ends without such a line. `what`
    /// names the line in these.
    pub fn wait_for_line(
        &self,
        what: &str,
        timeout: Duration,
        mut accepts: impl FnMut(&str) -> bool,
    ) -> Result<String, Error> {
        let deadline = Instant::now() + timeout;
        let mut seen = 0;
        let mut state = self.output.lock();
        loop {
            if let Some(line) = state.lines[seen..].iter().find(|line| accepts(line)) {
                return Ok(line.clone());
            }
            seen = state.lines.len();
            if state.closed {
                return Err(self.ended(None, what, &state));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let output = state.lines.join("\n");
                return Err(Error::TimedOut {
                    what: format!("{what} from {}; its output: {output:?}", self.program),
                    after: timeout,
                });
            }
            state = self
                .output
                .changed
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// [`Error::Io`] if it does not read any more, or its input was closed.
    pub fn write_line(&mut self, line: &str) -> Result<(), Error> {
        let failed = Error::io("write to the input of", &self.program);
        let Some(input) = &mut self.input else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        writeln!(input, "{line}").map_err(failed)
    }

    /// Closes its standard input, which many programs take as the request to end.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// [`Error::Io`] if it has been collected already (`ESRCH`).
    pub fn terminate(&self) -> Result<(), Error> {
        self.signal(Signal::TERM)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`Error::Io`] if it has been collected already (`ESRCH`).
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        kill_process(self.pid(), signal)
            .map_err(|errno| Error::io("signal", &self.program)(errno.into()))
    }

    /// Waits until it ends. Its output is complete then.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if it still runs after `timeout`; [`Error::Io`].
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus, Error> {
        let deadline = Instant::now() + timeout;
        let timed_out = |what: &str, program: &str| Error::TimedOut {
            what: format!("{what} of {program}"),
            after: timeout,
        };
        if let Some(status) = self.child.try_wait().map_err(Error::io("wait for", &self.program))? {
            self.wait_for_output(deadline)
                .ok_or_else(|| timed_out("the end of the output", &self.program))?;
            return Ok(status);
        }
        let failed = |errno: rustix::io::Errno| Error::io("wait for", &self.program)(errno.into());
        let handle = pidfd_open(self.pid(), PidfdFlags::empty()).map_err(failed)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let longest = Timespec::try_from(left)
                .map_err(|_| Error::argument(format!("{timeout:?}"), "a timeout"))?;
            match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&longest)) {
                Ok(0) => return Err(timed_out("the end", &self.program)),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        let status = self.child.wait().map_err(Error::io("wait for", &self.program))?;
        self.wait_for_output(deadline)
            .ok_or_else(|| timed_out("the end of the output", &self.program))?;
        Ok(status)
    }

    /// Waits until the output is complete; `None` if a process that inherited it still holds it.
    fn wait_for_output(&self, deadline: Instant) -> Option<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .output
            .changed
            .wait_timeout_while(self.output.lock(), left, |state| !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        state.closed.then_some(())
    }

    /// An [`Error::ProcessEnded`].
    pub(crate) fn ended_early(&self, status: ExitStatus, expected: &str) -> Error {
        self.ended(Some(status), expected, &self.output.lock())
    }

    fn ended(&self, status: Option<ExitStatus>, expected: &str, state: &OutputState) -> Error {
        Error::ProcessEnded {
            program: self.program.clone(),
            status,
            expected: expected.into(),
            output: state.lines.join("\n"),
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects lines until the output ends; runs on a thread of its own.
    fn read_from(&self, stdout: ChildStdout) {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        // An output that cannot be read any more has ended, as far as a test is concerned.
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            line.clear();
            self.lock().lines.push(text);
            self.changed.notify_all();
        }
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has been collected already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

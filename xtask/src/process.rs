//! Starting other programs: said on the terminal before, checked after.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

/// Prints the headline of a step.
pub(crate) fn announce(step: impl fmt::Display) {
    eprintln!("\n==> {step}");
}

/// Prints the command, runs it, and fails unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("    $ {}", Shown(command));
    let status = status(command)?;
    if !status.success() {
        bail!("`{}` failed ({status})", Shown(command));
    }
    Ok(())
}

/// Runs the command with its streams inherited and gives its exit status.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("cannot start `{}`", Shown(command)))
}

/// Runs the command and gives what it wrote to its standard output; fails unless it succeeds.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", Shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", Shown(command), output.status, said.trim());
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` did not print UTF-8", Shown(command)))
}

/// Runs the command and hands every line of its standard output to `each`; standard error is
/// inherited.
pub(crate) fn lines(command: &mut Command, mut each: impl FnMut(&str)) -> Result<ExitStatus> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", Shown(command)))?;
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            each(String::from_utf8_lossy(&line).trim_end_matches('\n'));
            line.clear();
        }
    }
    child.wait().with_context(|| format!("cannot wait for `{}`", Shown(command)))
}

/// How a program is started as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// This process is root: directly.
    Root,
    /// Through sudo.
    Sudo,
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "this user",
            Self::Sudo => "through sudo",
        })
    }
}

impl Privilege {
    /// Finds out how root is had here; fails in words when it is not.
    pub(crate) fn find() -> Result<Self> {
        if is_root() {
            return Ok(Self::Root);
        }
        if find_program("sudo").is_none() {
            bail!(
                "root is needed (attaching BPF programs, making network namespaces): \
                 run this command as root, or install sudo"
            );
        }
        Ok(Self::Sudo)
    }

    /// Makes sure that sudo will let us through, asking for a password where there is a terminal.
    pub(crate) fn obtain(self) -> Result<()> {
        if self == Self::Root {
            return Ok(());
        }
        eprintln!("    root is needed from here on: asking sudo");
        let question = if std::io::stdin().is_terminal() { "-v" } else { "-n" };
        let mut sudo = Command::new("sudo");
        sudo.arg(question);
        if question == "-n" {
            sudo.arg("true");
        }
        if !status(&mut sudo)?.success() {
            bail!("sudo refused: run this command as root, or as a user who may use sudo");
        }
        Ok(())
    }

    /// A command that runs `program` as root with these environment variables.
    ///
    /// sudo clears the environment, so what the program is to see is named here.
    pub(crate) fn command(
        self,
        program: impl AsRef<OsStr>,
        environment: &[(&str, &OsStr)],
    ) -> Command {
        match self {
            Self::Root => {
                let mut command = Command::new(program);
                command.envs(environment.iter().copied());
                command
            }
            Self::Sudo => {
                let mut command = Command::new("sudo");
                command.args(["--", "env"]);
                for (name, value) in environment {
                    let mut pair = OsStr::new(name).to_owned();
                    pair.push("=");
                    pair.push(value);
                    command.arg(pair);
                }
                command.arg(program);
                command
            }
        }
    }
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where the program is, looking in `PATH` and in the administrator's directories, which an
/// ordinary user's `PATH` often lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| is_executable(candidate))
}

/// Whether there is a file at the path that somebody may execute.
pub(crate) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// A command as it would be typed.
struct Shown<'a>(&'a Command);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The cargo that started us names itself by its full path; it would be typed as `cargo`.
        let program = match self.0.get_program() {
            program if std::env::var_os("CARGO").is_some_and(|own| own == program) => {
                OsStr::new("cargo")
            }
            program => program,
        };
        let words = std::iter::once(program).chain(self.0.get_args());
        for (position, word) in words.enumerate() {
            let word = word.to_string_lossy();
            let separator = if position == 0 { "" } else { " " };
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%".contains(c);
            if !word.is_empty() && word.chars().all(plain) {
                write!(f, "{separator}{word}")?;
            } else {
                write!(f, "{separator}'{}'", word.replace('\'', r"'\''"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'a b'", ""]);
        assert_eq!(Shown(&command).to_string(), r"sh -c 'echo '\''a b'\''' ''");
    }

    #[test]
    fn through_sudo_the_environment_is_named() {
        let command = Privilege::Sudo.command("/bin/t", &[("A", OsStr::new("1"))]);
        assert_eq!(Shown(&command).to_string(), "sudo -- env A=1 /bin/t");
    }

    #[test]
    fn a_failing_program_is_an_error_that_names_it() {
        let failure = run(&mut Command::new("false")).unwrap_err().to_string();
        assert!(failure.starts_with("`false` failed"), "{failure}");
        assert!(read(&mut Command::new("/nowhere/program")).is_err());
    }

    #[test]
    fn lines_are_handed_over_one_by_one_even_without_a_last_newline() {
        let mut seen = Vec::new();
        let mut command = Command::new("printf");
        let status = lines(command.arg(r"one\n\ntwo"), |line| seen.push(line.to_owned())).unwrap();
        assert!(status.success());
        assert_eq!(seen, ["one", "", "two"]);
    }
}

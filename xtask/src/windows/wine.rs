//! Wine, without a display and with a directory of its own, for as long as its owner lives.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process;

/// Wine's own programs are done long before.
const LIMIT: Duration = Duration::from_secs(180);

/// A Wine that is running.
pub(super) struct Wine {
    /// What Windows would have on its disk.
    prefix: PathBuf,
    /// The directory with our DLL.
    dll: PathBuf,
    /// A program that waits: without one, Wine ends its services, and the next program starts them
    /// anew with its own output, which then has no end while they live.
    holder: Option<Child>,
}

impl Wine {
    /// Starts it, in `directory`. Programs find DLLs that Wine lacks in `dll`.
    pub(super) fn start(directory: &Path, dll: &Path) -> Result<Self> {
        let prefix = directory.join("wine");
        fs::create_dir_all(&prefix)
            .with_context(|| format!("cannot create {}", prefix.display()))?;
        let mut wine = Self { prefix, dll: dll.to_owned(), holder: None };
        eprintln!(
            "    {}",
            process::read(&mut wine.bounded("wine", LIMIT, &["--version"]))?.trim()
        );
        process::run(&mut wine.silent(&["wineboot", "--init"]))?;
        // Consoles are windows, which then need no display.
        let driver = ["reg", "add", r"HKCU\Software\Wine\Drivers", "/v", "Graphics"];
        process::run(wine.silent(&driver).args(["/d", "null", "/f"]))?;
        let mut holder = wine.environment(Command::new("wine"));
        holder.arg("cmd").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        wine.holder = Some(holder.spawn().context("cannot start wine")?);
        Ok(wine)
    }

    /// A command that runs a program of Windows and ends it after `limit`.
    pub(super) fn command(&self, program: &Path, limit: Duration) -> Command {
        let mut command = self.bounded("wine", limit, &[]);
        command.arg(program).stdin(Stdio::null());
        command
    }

    /// The first line that the program writes. It is ended then.
    pub(super) fn first_line(&self, program: &Path) -> Result<String> {
        let mut child = self
            .command(program, LIMIT)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut line = String::new();
        let read = match child.stdout.take() {
            Some(stdout) => BufReader::new(stdout).read_line(&mut line),
            None => Ok(0),
        };
        // timeout(1) hands the signal on to what it runs.
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&child),
            rustix::process::Signal::TERM,
        )?;
        child.wait()?;
        read.with_context(|| format!("cannot read what {} writes", program.display()))?;
        Ok(line.trim_end().to_owned())
    }

    /// One of Wine's own programs, of which nothing is to be seen.
    fn silent(&self, arguments: &[&str]) -> Command {
        let mut command = self.bounded("wine", LIMIT, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// A command that is ended after `limit`, and killed if that does not help.
    fn bounded(&self, program: &str, limit: Duration, arguments: &[&str]) -> Command {
        let mut command = self.environment(Command::new("timeout"));
        command.arg("--kill-after=10").arg(limit.as_secs().to_string());
        command.arg(program).args(arguments);
        command
    }

    /// The command, in this Wine.
    fn environment(&self, mut command: Command) -> Command {
        // A directory of ours as Windows names it.
        let mut path = OsString::from("Z:");
        path.push(&self.dll);
        command
            .env("WINEPREFIX", &self.prefix)
            .env("WINEPATH", path)
            .env("WINEDEBUG", "-all")
            // No programs for .NET and HTML are offered for download, no menus are made.
            .env("WINEDLLOVERRIDES", "mscoree=;mshtml=;winemenubuilder.exe=")
            .env_remove("DISPLAY")
            .env_remove("WAYLAND_DISPLAY");
        command
    }
}

impl Drop for Wine {
    fn drop(&mut self) {
        // The server ends everything that runs in its directory, the holder included.
        let ended = process::run(&mut self.bounded("wineserver", LIMIT, &["-k"]));
        if let Err(error) = ended {
            eprintln!("    warning: Wine goes on: {error:#}");
        }
        if let Some(mut holder) = self.holder.take() {
            // It fails if the holder has ended, as it should have.
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

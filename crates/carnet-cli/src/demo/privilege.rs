//! Becoming root: the demonstration is built and started as a user, and asks for more only here.

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    arguments::Color,
    console::{FAINT, plain, styled},
    failure::Failure,
    session::Session,
};

/// Returns if the process may do what the demonstration does; else it goes on as root in its place.
pub(super) fn obtain(session: &mut Session<'_>) -> Result<(), Failure> {
    let Err(missing) = carnet_testbed::require_root() else {
        return Ok(());
    };
    let carnet = super::executable()?;
    if rustix::process::geteuid().is_root() {
        let carnet_testbed::Error::NotPrivileged { missing } = missing else {
            return Err(missing.into());
        };
        return Err(Failure::new(format_args!(
            "this root may not do everything: missing is {missing}"
        ))
        .with_hint("a container has to be given these capabilities, or be privileged"));
    }
    let command = format!("{} demo", plain(carnet.display()));
    let Some(sudo) = find("sudo", env::var_os("PATH")) else {
        return Err(Failure::new(
            "the demonstration needs root: it makes a cgroup and network namespaces, and loads BPF \
             programs",
        )
        .with_hint(format_args!("there is no sudo here; become root and run: {command}")));
    };
    session.console.note(styled(
        FAINT,
        format_args!(
            "Root is needed from here on, for a cgroup, network namespaces and BPF programs:\n  \
             sudo {command}"
        ),
    ))?;
    let mut command = Command::new(sudo);
    command.arg("--").arg(carnet).args(env::args_os().skip(1));
    // sudo clears the environment.
    if session.global.color == Color::Auto && env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
    {
        command.args(["--color", "never"]);
    }
    // It returns only if it fails.
    Err(Failure::because("starting sudo", &command.exec()))
}

/// The program of this name in the directories of `path`.
fn find(name: &str, path: Option<OsString>) -> Option<PathBuf> {
    env::split_paths(&path?).map(|directory| directory.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_the_path_only() {
        let path = OsString::from("/nonexistent:/usr/bin:/bin");
        assert!(find("sh", Some(path.clone())).is_some_and(|found| found.ends_with("sh")));
        assert_eq!(find("no-such-program", Some(path)), None);
        assert_eq!(find("sh", None), None);
    }
}

//! Facts about the machine that the tests run on, and installing what they lack.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo;
use crate::process::{self, Privilege, announce, find_program, is_root};

/// The oldest kernel that Carnet supports.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// The real programs that the end-to-end tests put at both ends of a connection, and the Debian
/// package of each.
pub(crate) const PROGRAMS: [(&str, &str); 12] = [
    ("cc", "gcc"),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("haproxy", "haproxy"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nginx", "nginx"),
    ("ntpdig", "ntpsec-ntpdig"),
    ("python3", "python3"),
    ("socat", "socat"),
    ("unshare", "util-linux"),
];

/// What is installed where it may be, and else left out: without Go its service is not tested.
const WELCOME: (&str, &str) = ("go", "golang-go");

/// A QUIC library for Python, which no release of Debian's has had so far: it is put into an
/// environment of its own below `target`, where Python's registry can be reached, and else left out.
const QUIC_LIBRARY: &str = "aioquic==1.7.2";
/// Where that environment is, below the target directory. The tests look there.
const QUIC_ENVIRONMENT: &str = "tools/quic";

/// Checks all that the tests need of the machine, says all that is missing at once, and installs
/// the missing programs where it may. Gives the way to become root.
pub(crate) fn prepare() -> Result<Privilege> {
    announce("checking this machine");
    let privilege = Privilege::find();
    let checks = [
        kernel(&read_trimmed("/proc/sys/kernel/osrelease")?),
        cgroup2_mount(&read_trimmed("/proc/self/mounts")?)
            .map(|directory| format!("cgroup2: {}", directory.display())),
        type_information(),
        privilege.as_ref().map(|found| format!("root: {found}")).map_err(ToString::to_string),
    ];
    let mut missing = Vec::new();
    for check in checks {
        match check {
            Ok(fact) => eprintln!("    {fact}"),
            Err(problem) => missing.push(problem),
        }
    }
    let absent: Vec<_> =
        PROGRAMS.into_iter().filter(|(program, _)| find_program(program).is_none()).collect();
    if absent.is_empty() {
        eprintln!("    programs: {}", PROGRAMS.map(|(program, _)| program).join(", "));
    } else if missing.is_empty() && is_debian() && is_root() {
        let packages: Vec<String> =
            absent.iter().map(|(_, package)| (*package).to_owned()).collect();
        install_packages(&packages)?;
    } else {
        let list = |names: Vec<&str>| names.join(" ");
        missing.push(format!(
            "these programs, which the tests put at both ends of connections, are missing: {} \
             (on Debian: apt-get install --no-install-recommends {})",
            list(absent.iter().map(|(program, _)| *program).collect()),
            list(absent.iter().map(|(_, package)| *package).collect()),
        ));
    }
    let (program, package) = WELCOME;
    if missing.is_empty() && find_program(program).is_none() {
        if is_debian() && is_root() {
            install_packages(&[package.to_owned()])?;
        } else {
            eprintln!("    without {program} (Debian: {package}) its service is not tested");
        }
    }
    if missing.is_empty()
        && let Err(error) = prepare_quic()
    {
        eprintln!("    without {QUIC_LIBRARY} no QUIC client is tested: {error:#}");
    }
    if !missing.is_empty() {
        bail!("the tests cannot run on this machine:\n  - {}", missing.join("\n  - "));
    }
    privilege
}

/// Puts the QUIC library where the tests look for it, unless it is there.
fn prepare_quic() -> Result<()> {
    python_environment(QUIC_ENVIRONMENT, &[QUIC_LIBRARY])
}

/// Makes a Python environment below the target directory with these packages of PyPI, each of them with
/// its version (`name==version`), unless it is there.
pub(crate) fn python_environment(directory: &str, packages: &[&str]) -> Result<()> {
    let python3 = find_program("python3").context("python3 is not installed")?;
    python_environment_of(&python3, directory, packages)
}

/// The same with this Python.
pub(crate) fn python_environment_of(
    python3: &Path,
    directory: &str,
    packages: &[&str],
) -> Result<()> {
    let root = cargo::workspace_root()?;
    let directory = cargo::target_directory(&root).join(directory);
    let python = directory.join("bin/python3");
    const CHECK: &str = "import sys, importlib.metadata as m\n\
                         for p in sys.argv[1:]: n, v = p.split('=='); assert m.version(n) == v";
    let mut check = Command::new(&python);
    if process::read(check.args(["-c", CHECK]).args(packages)).is_ok() {
        return Ok(());
    }
    if is_debian() && is_root() {
        install_packages(&["python3-venv".to_owned()])?;
    }
    process::run(Command::new(python3).args(["-m", "venv", "--clear"]).arg(&directory))?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "--disable-pip-version-check", "install", "--quiet"]);
    process::run(install.args(packages))
}

/// A Python that is at least as new as this: the system's, or one of pyenv's.
pub(crate) fn python_since((major, minor): (u32, u32)) -> Option<PathBuf> {
    let check = format!("import sys; sys.exit(sys.version_info < ({major}, {minor}))");
    let home = std::env::var_os("HOME").unwrap_or_default();
    let versions = std::fs::read_dir(Path::new(&home).join(".pyenv/versions"));
    let of_pyenv = versions.into_iter().flatten().flatten();
    let of_pyenv = of_pyenv.map(|version| version.path().join("bin/python3"));
    let mut candidates = find_program("python3").into_iter().chain(of_pyenv);
    candidates.find(|python| process::read(Command::new(python).args(["-c", &check])).is_ok())
}

/// A fact to print, or what is missing, in words.
pub(crate) type Check = Result<String, String>;

/// Whether Carnet supports the kernel with this release.
pub(crate) fn kernel(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Err(format!("the kernel's version is not understood: {release:?}"));
    };
    if (major, minor) < OLDEST_KERNEL {
        let (oldest_major, oldest_minor) = OLDEST_KERNEL;
        return Err(format!(
            "the kernel is {release}; Carnet needs Linux {oldest_major}.{oldest_minor} or newer"
        ));
    }
    Ok(format!("kernel: {release}"))
}

/// Finds the mount of the unified hierarchy in the text of `/proc/self/mounts`.
pub(crate) fn cgroup2_mount(mounts: &str) -> Result<PathBuf, String> {
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (_device, directory, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(directory))
        })
        .ok_or_else(|| {
            "cgroup version 2 is not mounted (mount -t cgroup2 none /sys/fs/cgroup)".to_owned()
        })
}

fn type_information() -> Check {
    let file = "/sys/kernel/btf/vmlinux";
    if Path::new(file).exists() {
        Ok(format!("type information: {file}"))
    } else {
        Err(format!("{file} is missing: this kernel was built without CONFIG_DEBUG_INFO_BTF"))
    }
}

/// A file's text without the end of its last line.
pub(crate) fn read_trimmed(path: &str) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim_end().to_owned())
}

/// Whether packages are installed with apt-get here.
pub(crate) fn is_debian() -> bool {
    Path::new("/etc/debian_version").exists() && find_program("apt-get").is_some()
}

/// Installs those of the packages that are not installed. Starts no service and asks no question.
pub(crate) fn install_packages(packages: &[String]) -> Result<()> {
    let missing: Vec<&String> = packages.iter().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        eprintln!("    installed: {}", packages.join(" "));
        return Ok(());
    }
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args([
            "-q",
            "-o",
            "DPkg::Lock::Timeout=300",
            "-o",
            "Dpkg::Use-Pty=0",
        ]);
        command
    };
    process::run(apt_get().arg("update"))?;
    let _quiet = ServicesStayDown::ask(Path::new("/usr/sbin/policy-rc.d"))?;
    process::run(apt_get().args(["install", "-y", "--no-install-recommends"]).args(missing))
}

pub(crate) fn is_installed(package: &str) -> bool {
    process::read(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]))
        .is_ok_and(|status| status == "installed")
}

/// While it lives, no package that is installed starts its service.
///
/// Debian asks a program of a fixed name whether a service may be started (policy-rc.d in the
/// manual of invoke-rc.d). One that is there already is the administrator's and decides alone.
struct ServicesStayDown {
    /// The program that was put there, to be removed.
    ours: Option<PathBuf>,
}

impl ServicesStayDown {
    fn ask(policy: &Path) -> Result<Self> {
        // It says no only while this process lives, should it ever be left behind.
        let program = format!(
            "#!/bin/sh\n# Put here by `cargo xtask` while it installs packages; may be removed.\n\
             [ -e /proc/{} ] || exit 0\nexit 101\n",
            std::process::id()
        );
        match OpenOptions::new().write(true).create_new(true).mode(0o755).open(policy) {
            Ok(mut file) => {
                let guard = Self { ours: Some(policy.to_owned()) };
                file.write_all(program.as_bytes())
                    .with_context(|| format!("cannot write {}", policy.display()))?;
                Ok(guard)
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Self { ours: None }),
            Err(error) => Err(error).with_context(|| format!("cannot create {}", policy.display())),
        }
    }
}

impl Drop for ServicesStayDown {
    fn drop(&mut self) {
        if let Some(policy) = &self.ours
            && let Err(error) = std::fs::remove_file(policy)
        {
            eprintln!("    warning: cannot remove {}: {error}", policy.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart_by_number() {
        assert!(kernel("6.1.0-18-amd64").is_ok());
        assert!(kernel("6.18.44-custom").is_ok());
        assert!(kernel("10.0-rc1").is_ok());
        let old = kernel("5.15.0-91-generic").unwrap_err();
        assert!(old.contains("6.1 or newer"), "{old}");
        assert!(kernel("unknown").is_err());
    }

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(hybrid).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert!(cgroup2_mount("proc /proc proc rw 0 0\n").is_err());
    }

    #[test]
    fn a_policy_of_ours_is_removed_and_the_administrators_is_kept() {
        let policy =
            std::env::temp_dir().join(format!("carnet-xtask-policy-{}", std::process::id()));
        drop(ServicesStayDown::ask(&policy).unwrap());
        assert!(!policy.exists());

        std::fs::write(&policy, "administrator's").unwrap();
        drop(ServicesStayDown::ask(&policy).unwrap());
        assert_eq!(std::fs::read_to_string(&policy).unwrap(), "administrator's");
        std::fs::remove_file(&policy).unwrap();
    }

    #[test]
    fn while_packages_are_installed_the_policy_says_no() {
        let policy = std::env::temp_dir().join(format!("carnet-xtask-no-{}", std::process::id()));
        let _quiet = ServicesStayDown::ask(&policy).unwrap();
        let answer = Command::new("sh").arg(&policy).args(["nginx", "start"]).status().unwrap();
        assert_eq!(answer.code(), Some(101));
    }
}

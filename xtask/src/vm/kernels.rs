//! Debian's kernels: found, downloaded and unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process;

/// The modules that the tests need beside what is built in, below `kernel/` of the modules'
/// directory. They are loaded in the order of their names, and what they need besides is built in.
const MODULES: [&str; 4] =
    ["net/ipv4/inet_diag", "net/ipv4/tcp_diag", "net/ipv4/udp_diag", "drivers/net/veth"];

/// A kernel that can be booted.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What `uname -r` says of it.
    pub(super) release: String,
    /// The file to boot.
    pub(super) image: PathBuf,
    /// Its [`MODULES`], as the package has them: perhaps compressed.
    pub(super) modules: Vec<PathBuf>,
}

/// The newest kernel of a series such as `6.1`, in a directory below `cache`.
pub(super) fn find(series: &str, cache: &Path) -> Result<Kernel> {
    let mut listed = newest(series)?;
    if listed.is_none() {
        // An image of a container has no lists to begin with.
        update()?;
        listed = newest(series)?;
    }
    let Some(Candidate { package, release }) = listed else {
        bail!(
            "Debian's archive, as this machine uses it, has no kernel {series} \
             (apt-cache search --names-only '^linux-image-{series}')"
        );
    };
    let file = Download::of(&package)?;
    let directory = cache.join(file.name.trim_end_matches(".deb"));
    if !directory.exists() {
        let file = match file.fetch(&package, cache) {
            Ok(()) => file,
            // The archive keeps no old files; the list may be old.
            Err(error) => {
                eprintln!("    {error:#}");
                update()?;
                let file = Download::of(&package)?;
                file.fetch(&package, cache)?;
                file
            }
        };
        unpack(&cache.join(&file.name), &directory)?;
    }
    open(release, &directory)
}

/// A package that has a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    package: String,
    release: String,
}

/// The newest kernel of the series that apt knows.
fn newest(series: &str) -> Result<Option<Candidate>> {
    let pattern = format!("^linux-image-{}\\..*-amd64", series.replace('.', "\\."));
    let found =
        process::read(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    let packages = found.lines().filter_map(|line| line.split_whitespace().next());
    Ok(newest_of(packages, series))
}

fn newest_of<'a>(packages: impl Iterator<Item = &'a str>, series: &str) -> Option<Candidate> {
    packages
        .filter_map(|package| Some((package, release_of(package, series)?)))
        // Of two with the same kernel, the shorter name: that of the signed one.
        .max_by_key(|(package, release)| (numbers(release), std::cmp::Reverse(package.len())))
        .map(|(package, release)| Candidate { package: package.into(), release: release.into() })
}

/// The release in a package's name, if it is an ordinary kernel of the series.
fn release_of<'a>(package: &'a str, series: &str) -> Option<&'a str> {
    let name = package.strip_prefix("linux-image-")?;
    let release = name.strip_suffix("-unsigned").unwrap_or(name);
    let version = release.strip_suffix("-amd64")?;
    let of_series = version.strip_prefix(series)?.starts_with('.');
    let special = version.split('-').any(|part| part == "rt" || part == "cloud");
    (of_series && !special).then_some(release)
}

/// The numbers in a release, in order: what makes one newer than another.
fn numbers(release: &str) -> Vec<u64> {
    let version = release.strip_suffix("-amd64").unwrap_or(release);
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn update() -> Result<()> {
    process::run(Command::new("apt-get").args(["-q", "update"]))
}

/// A package's file in the archive.
#[derive(Debug, PartialEq, Eq)]
struct Download {
    name: String,
}

impl Download {
    fn of(package: &str) -> Result<Self> {
        let mut command = Command::new("apt-get");
        let said = process::read(command.args(["download", "--print-uris", package]))?;
        let name = said
            .split_whitespace()
            .nth(1)
            .with_context(|| format!("apt-get does not say where {package} is: {said:?}"))?;
        Ok(Self { name: name.to_owned() })
    }

    /// apt compares the file with the digest in the archive's signed list.
    fn fetch(&self, package: &str, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let mut command = Command::new("apt-get");
        // Its own user could not write here.
        command.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]);
        process::run(command.current_dir(directory))
    }
}

/// Takes what is needed out of the package, whole or not at all, and removes the package.
fn unpack(package: &Path, directory: &Path) -> Result<()> {
    let partial = directory.with_extension("partial");
    remove(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start `dpkg-deb`")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--wildcards", "--directory"]).arg(&partial).arg("./boot/vmlinuz-*");
    // Debian 13 has them below /usr.
    tar.args(MODULES.map(|module| format!("*/kernel/{module}.ko*")));
    if let Some(output) = archive.stdout.take() {
        tar.stdin(output);
    }
    let unpacked = process::run(&mut tar);
    let read = archive.wait().context("cannot wait for `dpkg-deb`")?;
    unpacked?;
    if !read.success() {
        bail!("`dpkg-deb --fsys-tarfile {}` failed ({read})", package.display());
    }
    fs::rename(&partial, directory)
        .with_context(|| format!("cannot rename {}", partial.display()))?;
    fs::remove_file(package).with_context(|| format!("cannot remove {}", package.display()))
}

/// The kernel that was unpacked into the directory.
fn open(release: String, directory: &Path) -> Result<Kernel> {
    let image = directory.join("boot").join(format!("vmlinuz-{release}"));
    let kernel = ["usr/lib", "lib"]
        .map(|lib| directory.join(lib).join("modules").join(&release).join("kernel"))
        .into_iter()
        .find(|path| path.is_dir())
        .with_context(|| incomplete(directory, "modules"))?;
    let modules = MODULES
        .into_iter()
        .map(|module| {
            ["ko", "ko.xz"]
                .map(|extension| kernel.join(format!("{module}.{extension}")))
                .into_iter()
                .find(|file| file.is_file())
                .with_context(|| incomplete(directory, module))
        })
        .collect::<Result<_>>()?;
    if !image.is_file() {
        bail!(incomplete(directory, "boot/vmlinuz"));
    }
    Ok(Kernel { release, image, modules })
}

fn incomplete(directory: &Path, what: &str) -> String {
    format!("{} has no {what}: remove it, and it is unpacked anew", directory.display())
}

/// Removes a directory, if it is there.
pub(super) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: [&str; 10] = [
        "linux-image-6.1.0-9-amd64",
        "linux-image-6.1.0-50-amd64",
        "linux-image-6.1.0-50-amd64-unsigned",
        "linux-image-6.1.0-50-amd64-dbg",
        "linux-image-6.1.0-51-rt-amd64",
        "linux-image-6.1.0-51-cloud-amd64-unsigned",
        "linux-image-6.12.9+bpo-amd64",
        "linux-image-6.12.107+deb12-amd64",
        "linux-image-6.12.113+deb12-amd64-unsigned",
        "linux-image-amd64",
    ];

    fn newest(series: &str) -> Option<String> {
        newest_of(LISTED.into_iter(), series).map(|candidate| candidate.package)
    }

    #[test]
    fn the_newest_ordinary_kernel_is_taken_signed_where_it_can_be() {
        assert_eq!(newest("6.1").unwrap(), "linux-image-6.1.0-50-amd64");
        assert_eq!(newest("6.12").unwrap(), "linux-image-6.12.113+deb12-amd64-unsigned");
        assert_eq!(newest("6.11"), None);
        assert_eq!(newest("6"), newest("6.12"));
    }

    #[test]
    fn the_release_is_what_the_kernel_calls_itself() {
        let release = |package| release_of(package, "6.12");
        assert_eq!(
            release("linux-image-6.12.113+deb12-amd64-unsigned"),
            Some("6.12.113+deb12-amd64")
        );
        assert_eq!(release("linux-image-6.12.113+deb12-rt-amd64"), None);
        assert_eq!(release("linux-image-6.12.113+deb12-amd64-dbg"), None);
    }
}

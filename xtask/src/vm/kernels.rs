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

/// What stands for the newest kernel of all, in the place of a series.
pub(super) const NEWEST: &str = "newest";

/// The newest kernel of a series such as `6.1`, in a directory below `cache`.
pub(super) fn find(series: &str, cache: &Path) -> Result<Kernel> {
    let mut archives = vec![Archive::Debian(cache.join("apt"))];
    if series != NEWEST {
        archives.insert(0, Archive::Machine);
    }
    // An image of a container has no lists to begin with.
    for fresh in [false, true] {
        for archive in &archives {
            if fresh {
                archive.update()?;
            }
            if let Some(candidate) = archive.newest(series)? {
                return candidate.obtain(archive, cache);
            }
        }
    }
    bail!("Debian's archive has no kernel {series} ({})", SUITES.join(", "))
}

/// A package that has a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    package: String,
    release: String,
}

impl Candidate {
    /// Downloads and unpacks the kernel, unless that was done before.
    fn obtain(self, archive: &Archive, cache: &Path) -> Result<Kernel> {
        let name = archive.file(&self.package)?;
        let directory = cache.join(name.trim_end_matches(".deb"));
        if !directory.exists() {
            let partial = directory.with_extension("partial");
            remove(&partial)?;
            for (package, patterns) in self.parts(archive) {
                // The archive keeps no old files; the list may be old.
                if let Err(error) = archive.download(&package, cache) {
                    eprintln!("    {error:#}");
                    archive.update()?;
                    archive.download(&package, cache)?;
                }
                unpack(&cache.join(archive.file(&package)?), &patterns, &partial)?;
            }
            fs::rename(&partial, &directory)
                .with_context(|| format!("cannot rename {}", partial.display()))?;
        }
        open(self.release, &directory)
    }

    /// The packages that have it, and what is taken from each: of newer kernels, Debian packs the image
    /// and the modules apart.
    fn parts(&self, archive: &Archive) -> Vec<(String, Vec<String>)> {
        // Debian 13 has them below /usr.
        let modules = MODULES.map(|module| format!("*/kernel/{module}.ko*"));
        let split = ["binary", "modules"].map(|part| format!("linux-{part}-{}", self.release));
        if split.iter().all(|package| archive.file(package).is_ok()) {
            let [binary, others] = split;
            let image = "*/vmlinuz".to_owned();
            return vec![(binary, vec![image]), (others, modules.into())];
        }
        let all = std::iter::once("./boot/vmlinuz-*".to_owned()).chain(modules).collect();
        vec![(self.package.clone(), all)]
    }
}

/// The releases of Debian's in which the kernels are that the machine's own may not have.
const SUITES: [&str; 4] = ["bullseye", "bookworm", "trixie", "trixie-backports"];

/// Where packages are looked for.
#[derive(Debug)]
enum Archive {
    /// Where this machine has its own from.
    Machine,
    /// All of [`SUITES`], with lists in this directory that the machine's apt knows nothing of.
    Debian(PathBuf),
}

impl Archive {
    /// A program of apt's that looks there.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // apt's own user could not write where the kernels go.
        command.args(["-o", "APT::Sandbox::User=root"]);
        if let Self::Debian(directory) = self {
            for (option, value) in [
                ("Dir::Etc::SourceList", directory.join("sources.list")),
                ("Dir::Etc::SourceParts", PathBuf::from("-")),
                ("Dir::State::Lists", directory.join("lists")),
                ("Dir::Cache", directory.join("cache")),
            ] {
                command.arg("-o").arg(format!("{option}={}", value.display()));
            }
            let lists_alone =
                ["Acquire::Languages=none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=0"];
            command.args(lists_alone.iter().flat_map(|option| ["-o", option]));
        }
        command
    }

    fn update(&self) -> Result<()> {
        if let Self::Debian(directory) = self {
            for part in ["lists/partial", "cache/archives/partial"] {
                let part = directory.join(part);
                fs::create_dir_all(&part)
                    .with_context(|| format!("cannot create {}", part.display()))?;
            }
            let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
            let mirror = "http://deb.debian.org/debian";
            let sources =
                SUITES.map(|suite| format!("deb [signed-by={keys}] {mirror} {suite} main\n"));
            let list = directory.join("sources.list");
            fs::write(&list, sources.concat())
                .with_context(|| format!("cannot write {}", list.display()))?;
        }
        process::run(self.command("apt-get").args(["-q", "update"]))
    }

    /// The newest kernel of the series that apt knows.
    fn newest(&self, series: &str) -> Result<Option<Candidate>> {
        if matches!(self, Self::Debian(directory) if !directory.join("sources.list").exists()) {
            return Ok(None);
        }
        let mut search = self.command("apt-cache");
        search.args(["search", "--names-only", "^linux-image-[0-9].*-amd64"]);
        let found = process::read(&mut search)?;
        let packages = found.lines().filter_map(|line| line.split_whitespace().next());
        Ok(newest_of(packages, series))
    }

    /// The name of the package's file.
    fn file(&self, package: &str) -> Result<String> {
        let mut command = self.command("apt-get");
        let said = process::read(command.args(["download", "--print-uris", package]))?;
        let name = said
            .split_whitespace()
            .nth(1)
            .with_context(|| format!("apt-get does not say where {package} is: {said:?}"))?;
        Ok(name.to_owned())
    }

    /// apt compares the file with the digest in the archive's signed list.
    fn download(&self, package: &str, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let mut command = self.command("apt-get");
        process::run(command.args(["-q", "download", package]).current_dir(directory))
    }
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
    let of_series = match series {
        NEWEST => version.starts_with(|c: char| c.is_ascii_digit()),
        _ => version.strip_prefix(series)?.starts_with('.'),
    };
    let special = version.split('-').any(|part| part == "rt" || part == "cloud");
    (of_series && !special).then_some(release)
}

/// The numbers in a release, in order: what makes one newer than another.
fn numbers(release: &str) -> Vec<u64> {
    let version = release.strip_suffix("-amd64").unwrap_or(release);
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Takes what the patterns say out of the package, and removes the package.
fn unpack(package: &Path, patterns: &[String], directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start `dpkg-deb`")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--wildcards", "--directory"]).arg(directory).args(patterns);
    if let Some(output) = archive.stdout.take() {
        tar.stdin(output);
    }
    let unpacked = process::run(&mut tar);
    let read = archive.wait().context("cannot wait for `dpkg-deb`")?;
    unpacked?;
    if !read.success() {
        bail!("`dpkg-deb --fsys-tarfile {}` failed ({read})", package.display());
    }
    fs::remove_file(package).with_context(|| format!("cannot remove {}", package.display()))
}

/// The kernel that was unpacked into the directory.
fn open(release: String, directory: &Path) -> Result<Kernel> {
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
    let image = [
        directory.join("boot").join(format!("vmlinuz-{release}")),
        directory.join("usr/lib/modules").join(&release).join("vmlinuz"),
    ];
    let image = image
        .into_iter()
        .find(|file| file.is_file())
        .with_context(|| incomplete(directory, "vmlinuz"))?;
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
        assert_eq!(newest(NEWEST), newest("6.12"));
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

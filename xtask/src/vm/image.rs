//! What the machine has on board: an initial file system with the programs to run and Debian's own.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::kernels::{self, Kernel};
use crate::cargo::Built;
use crate::process;

/// The machine's first process.
const INIT: &str = include_str!("init.sh");
/// Found on the host beside what the packages have: the links of a merged /usr, and who is who.
const FILES: [&str; 6] = ["/bin", "/lib", "/lib64", "/sbin", "/etc/group", "/etc/passwd"];
/// Directories that no program of the tests reads.
const UNREAD: [&str; 2] = ["/usr/share", "/var"];
/// Of the compiler, what it optimizes across files with: the largest of all.
const UNUSED: [&str; 2] = ["lto1", "lto-dump"];

/// What the machine runs.
pub(super) struct Contents<'a> {
    /// Programs and suites, which lie side by side.
    pub(super) programs: Vec<&'a Built>,
    /// Of them, the suites to run, and words that each is given besides.
    pub(super) suites: Vec<(&'a Built, &'a str)>,
    /// What is given to every suite.
    pub(super) arguments: Vec<String>,
    /// Installed packages, which come along with all that they depend on.
    pub(super) packages: Vec<String>,
    /// Installed programs that are links which no package has.
    pub(super) links: Vec<PathBuf>,
    /// For these kernels.
    pub(super) kernels: &'a [Kernel],
}

impl Contents<'_> {
    /// Writes the file system that the kernels start with; `directory` is for this alone.
    pub(super) fn write(&self, directory: &Path) -> Result<PathBuf> {
        let own = directory.join("files");
        kernels::remove(&own)?;
        self.stage(&own)?;
        let image = directory.join("initramfs");
        let output =
            File::create(&image).with_context(|| format!("cannot create {}", image.display()))?;
        // The kernel reads several archives from one file, and makes no parents of what it unpacks:
        // /usr is in the first.
        archive(Path::new("/"), self.system()?.iter(), &output)?;
        archive(&own, walk(&own)?.iter(), &output)?;
        Ok(image)
    }

    /// Puts what no package has into a directory.
    fn stage(&self, own: &Path) -> Result<()> {
        for name in ["carnet", "dev", "etc", "modules", "proc", "root", "run", "sys", "tmp"] {
            let path = own.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        fs::create_dir_all(own.join("usr/bin")).context("cannot create usr/bin")?;
        let busybox = process::find_program("busybox").context("busybox is not installed")?;
        copy(&busybox, &own.join("usr/bin/busybox"))?;
        write(&own.join("init"), INIT)?;
        fs::set_permissions(own.join("init"), fs::Permissions::from_mode(0o755))
            .context("cannot make init executable")?;

        let carnet = own.join("carnet");
        let suites = self.suites.iter().map(|(suite, _)| suite);
        for program in self.programs.iter().chain(suites) {
            // Debug information is most of it, and has to go through the machine's memory twice.
            let mut strip = Command::new("strip");
            strip.args(["--strip-debug", "-o"]).arg(carnet.join(&program.target));
            process::read(strip.arg(&program.executable))?;
        }
        let lines = |words: &mut dyn Iterator<Item = &str>| -> String {
            words.map(|word| format!("{word}\n")).collect()
        };
        let suites: String = self
            .suites
            .iter()
            .map(|(suite, given)| format!("{} {given}\n", suite.target))
            .collect();
        write(&carnet.join("suites"), &suites)?;
        let arguments = lines(&mut self.arguments.iter().map(String::as_str));
        write(&carnet.join("arguments"), &arguments)?;
        self.kernels.iter().try_for_each(|kernel| stage_modules(kernel, &own.join("modules")))
    }

    /// The paths of all that the packages have, and of all directories on the way there.
    fn system(&self) -> Result<BTreeSet<PathBuf>> {
        let mut depends = Command::new("apt-cache");
        depends.args(["depends", "--recurse", "--installed"]).args(
            ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"]
                .map(|kind| format!("--no-{kind}")),
        );
        let said = process::read(depends.args(&self.packages))?;
        // Packages begin a line, virtual ones in brackets; what they depend on is indented. Those that
        // could stand in for an installed one are among them.
        let format = "-f=${db:Status-Status} ${Package}\n";
        let known = process::read(Command::new("dpkg-query").args(["-W", format]))?;
        let installed: BTreeSet<&str> =
            known.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
        let packages: BTreeSet<&str> = said
            .lines()
            .filter(|line| !line.starts_with([' ', '|', '<']) && installed.contains(line))
            .collect();
        let files = process::read(Command::new("dpkg-query").arg("--listfiles").args(packages))?;

        let mut paths = BTreeSet::new();
        let listed = files.lines().map(Path::new).filter(|path| path.is_absolute());
        for path in listed.chain(FILES.map(Path::new)) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let unread = UNREAD.iter().any(|directory| path.starts_with(directory));
            if !unread && !UNUSED.iter().any(|unused| name.contains(unused)) {
                insert(path, &mut paths)?;
            }
        }
        for link in &self.links {
            insert(link, &mut paths)?;
        }
        Ok(paths)
    }
}

/// Inserts a path by its real directory, with all directories above; of a link also where it leads.
fn insert(path: &Path, paths: &mut BTreeSet<PathBuf>) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    // dpkg lists what a diversion or the administrator has removed.
    let Ok(parent) = parent.canonicalize() else { return Ok(()) };
    let path = parent.join(name);
    let Ok(found) = path.symlink_metadata() else { return Ok(()) };
    for above in parent.ancestors().filter(|above| above.parent().is_some()) {
        paths.insert(above.to_owned());
    }
    if !paths.insert(path.clone()) || !found.is_symlink() {
        return Ok(());
    }
    let target =
        fs::read_link(&path).with_context(|| format!("cannot read the link {}", path.display()))?;
    insert(&parent.join(target), paths)
}

/// All paths below the directory, parents first, relative to it.
fn walk(directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        let entries = fs::read_dir(&next)
            .with_context(|| format!("cannot read the directory {}", next.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", next.display()))?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
            paths.insert(entry.path().strip_prefix(directory)?.to_owned());
        }
    }
    Ok(paths)
}

/// Appends an archive of these paths, which are relative to `directory`. Everything is root's.
fn archive<'a>(
    directory: &Path,
    paths: impl Iterator<Item = &'a PathBuf>,
    output: &File,
) -> Result<()> {
    let mut names = Vec::new();
    for path in paths {
        names.extend(path.strip_prefix("/").unwrap_or(path).as_os_str().as_bytes());
        names.push(0);
    }
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--owner=+0:+0", "--null", "--quiet"])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(output.try_clone().context("cannot duplicate a file descriptor")?)
        .spawn()
        .context("cannot start `cpio`")?;
    if let Some(mut input) = cpio.stdin.take() {
        input.write_all(&names).context("cannot tell `cpio` what to archive")?;
    }
    let status = cpio.wait().context("cannot wait for `cpio`")?;
    if !status.success() {
        bail!("`cpio --create` in {} failed ({status})", directory.display());
    }
    Ok(())
}

/// Puts a kernel's modules, unpacked, into a directory of its own.
fn stage_modules(kernel: &Kernel, modules: &Path) -> Result<()> {
    let directory = modules.join(&kernel.release);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    for module in &kernel.modules {
        let name = module.file_stem().context("a module without a name")?;
        if module.extension().is_some_and(|extension| extension == "xz") {
            let file = directory.join(name);
            let output =
                File::create(&file).with_context(|| format!("cannot create {}", file.display()))?;
            process::run(Command::new("busybox").arg("xzcat").arg(module).stdout(output))?;
        } else {
            copy(module, &directory.join(module.file_name().unwrap_or(name)))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

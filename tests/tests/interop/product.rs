//! Real programs as services: how each is started, and what its own log says of the flows that it had.

use std::{
    env, fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use carnet_testbed::{NetworkNamespace, Process};
use carnet_tests::{Lab, Must as _, PATIENCE, contract::Scratch, until};

use crate::far_side::FarSide;

/// A program that can be a service.
pub(crate) struct Product {
    pub(crate) name: &'static str,
    /// Whether it takes flows over IPv6.
    pub(crate) ipv6: bool,
    /// Whether it asks `getsockname()` for the destination.
    pub(crate) tproxy: bool,
    /// Whether it knows nothing of Carnet.
    pub(crate) unmodified: bool,
    /// Where flows go that it passes on.
    pub(crate) onwards: Onwards,
    /// What it needs on the other side of the cable.
    pub(crate) far_side: Option<fn(&NetworkNamespace) -> FarSide>,
    /// What it says on its standard error when it can pass flows on, if it listens before that.
    pub(crate) ready: Option<&'static str>,
    /// Writes its configuration and gives the command.
    pub(crate) command: fn(&Site) -> Command,
    /// The file of its log, in its directory; else what it prints.
    pub(crate) log: Option<&'static str>,
    /// What a line of the log says of a flow, if it tells of one.
    pub(crate) read: fn(&str) -> Option<Logged>,
}

/// Where the flows go that a product passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Onwards {
    /// Each to its destination.
    ToDestination,
    /// Each to this address.
    Through(SocketAddr),
    /// Into connections of the product's own, which many of them share: no service after it gets flows.
    Shared,
}

/// Where one runs.
pub(crate) struct Site<'a> {
    /// Its own name among those that run.
    pub(crate) name: &'a str,
    /// A directory that every user may write to.
    pub(crate) directory: &'a Path,
    /// The port at which it takes flows.
    pub(crate) port: u16,
    /// What its configuration says of the other side of the cable.
    pub(crate) far_side: &'a str,
}

impl Site<'_> {
    /// A port for other things than flows, which nobody else has.
    pub(crate) fn other_port(&self) -> u16 {
        self.port + 1000
    }

    /// Writes a file of its configuration.
    #[track_caller]
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let file = self.directory.join(name);
        fs::write(&file, text).must("write a configuration");
        file
    }
}

/// What a log says of one flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Logged {
    /// The destination.
    pub(crate) to: SocketAddr,
    /// The path that was asked for, if it looks that far.
    pub(crate) path: Option<String>,
}

/// One at work.
pub(crate) struct AtWork {
    product: &'static Product,
    process: Process,
    scratch: Scratch,
}

impl AtWork {
    /// Starts a product as the service of this name, which has been added. It listens on return.
    #[track_caller]
    pub(crate) fn start(
        lab: &Lab,
        name: &str,
        product: &'static Product,
        port: u16,
        far_side: &str,
    ) -> Self {
        let scratch = Scratch::new();
        let open = fs::Permissions::from_mode(0o777);
        fs::set_permissions(scratch.path(), open).must("open a directory to all users");
        let mut command =
            (product.command)(&Site { name, directory: scratch.path(), port, far_side });
        command.stdin(Stdio::null());
        let errors = fs::File::create(scratch.path().join("stderr")).must("make a file");
        command.stderr(errors).current_dir(scratch.path());
        lab.cgroup_of(name).enter_command(&mut command).must("enter the service's cgroup");
        lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
        let process = Process::spawn(&mut command).must("start a product");
        let this = Self { product, process, scratch };
        let families = if product.ipv6 { 2 } else { 1 };
        let state = || (listeners(lab, port), this.errors());
        until(product.name, state, |(count, said)| {
            *count == families && product.ready.is_none_or(|word| said.contains(word))
        });
        this
    }

    /// What it has written to its standard error, for when something is wrong.
    fn errors(&self) -> String {
        fs::read_to_string(self.scratch.path().join("stderr")).unwrap_or_default()
    }

    /// What its log says so far.
    #[track_caller]
    pub(crate) fn logged(&self) -> Vec<Logged> {
        self.log().iter().filter_map(|line| (self.product.read)(line)).collect()
    }

    /// The lines of its log so far.
    #[track_caller]
    pub(crate) fn log(&self) -> Vec<String> {
        match self.product.log {
            None => self.process.lines(),
            Some(file) => {
                let text = fs::read(self.scratch.path().join(file)).unwrap_or_default();
                String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()
            }
        }
    }

    /// The number of its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills it, and waits until it is gone.
    #[track_caller]
    pub(crate) fn kill(mut self) {
        self.process.signal(rustix::process::Signal::KILL).must("kill a product");
        self.process.wait(PATIENCE).must("wait for a product's end");
    }
}

/// Of how many families, IPv4 and IPv6, sockets of the clients' namespace listen at a port.
#[track_caller]
pub(crate) fn listeners(lab: &Lab, port: u16) -> usize {
    let read = || {
        ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")))
    };
    let tables = lab.network().topology.client.run(read).must("enter the namespace");
    let listens = |line: &str| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1).unwrap_or_default();
        // TCP_LISTEN
        local.ends_with(&format!(":{port:04X}")) && fields.nth(1) == Some("0A")
    };
    let listened = |table: &String| table.lines().any(listens);
    tables.into_iter().filter(|table| table.as_ref().is_ok_and(listened)).count()
}

/// The products that are wanted: those that are named in the environment, or all.
pub(crate) fn is_wanted(product: &Product) -> bool {
    let named = env::var("CARNET_INTEROP_PRODUCTS").unwrap_or_default();
    named.is_empty() || named.split(',').any(|name| name == product.name)
}

/// A program that `cargo xtask interop` installs from Debian's packages.
#[track_caller]
pub(crate) fn installed(name: &str) -> PathBuf {
    let places = ["/usr/sbin", "/usr/bin"];
    let found = places.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed: `cargo xtask interop` does that"))
}

/// A program that it installs from PyPI, into an environment of its own below the target directory.
#[track_caller]
pub(crate) fn from_pypi(name: &str) -> PathBuf {
    let found = tool(&format!("tools/interop/bin/{name}"));
    found.unwrap_or_else(|| panic!("{name} is not installed: `cargo xtask interop` does that"))
}

/// A file below the target directory, if it is there.
#[track_caller]
pub(crate) fn tool(path: &str) -> Option<PathBuf> {
    let executable = env::current_exe().must("find the running executable");
    executable.ancestors().map(|place| place.join(path)).find(|path| path.is_file())
}

//! `carnet export` and `carnet apply`: the policy as a file, and back.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use carnet_core::{
    object::{Identities, Policy},
    record::FileId,
};
use carnet_engine::Engine;
use serde::Serialize;

use super::DONE;
use crate::{
    failure::Failure,
    lookup::{self, Cgroup, NetworkNamespace},
    session::Session,
};

/// Print the policy as a file that `carnet apply` reads
///
/// An instance is gone after a restart of the machine, and its policy with it: keep this to bring it
/// back. What `carnet up` was told and the listeners that were registered are not in it.
#[derive(Debug, clap::Args)]
pub(crate) struct Export {}

/// Make the policy what a file says that `carnet export` has printed
///
/// In one step: every connection is decided by the policy of before or by that of the file. Cgroups,
/// executables and network namespaces are looked up anew by their paths, and all of them have to be
/// there. What stays the same keeps its id and its redirect handle, and to apply the same file again
/// changes nothing.
#[derive(Debug, clap::Args)]
pub(crate) struct Apply {
    /// The file; - is the standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// JSON of `apply`: how many objects there are now.
#[derive(Serialize)]
struct Applied {
    /// Providers.
    providers: usize,
    /// Sublayers.
    sublayers: usize,
    /// Services.
    services: usize,
    /// Filters.
    filters: usize,
}

/// JSON, whether asked for or not: [`Policy`].
pub(super) fn export(_: Export, session: &mut Session<'_>) -> Result<u8, Failure> {
    let policy = session.engine()?.policy()?;
    session.console.json(&policy)?;
    Ok(DONE)
}

pub(super) fn apply(arguments: Apply, session: &mut Session<'_>) -> Result<u8, Failure> {
    let mut engine = session.engine()?;
    let mut wanted = read(&arguments.file)?;
    wanted.identify(&mut Machine { engine: &engine })?;
    session.change(&mut engine, |policy| policy.replace(&wanted))?;
    let applied = Applied {
        providers: wanted.providers().len(),
        sublayers: wanted.sublayers().len(),
        services: wanted.services().len(),
        filters: wanted.filters().len(),
    };
    let Applied { services, filters, .. } = applied;
    let file = arguments.file.display();
    session.changed(
        &applied,
        format_args!("{file} is in force: {services} services, {filters} filters"),
    )?;
    Ok(DONE)
}

fn read(file: &Path) -> Result<Policy, Failure> {
    let mut text = Vec::new();
    let read = if file == Path::new("-") {
        io::stdin().read_to_end(&mut text).map(drop)
    } else {
        fs::read(file).map(|bytes| text = bytes)
    };
    read.map_err(|error| Failure::because(file.display(), &error))?;
    Policy::from_bytes(&text).map_err(|error| {
        Failure::because(format_args!("{} is no policy", file.display()), &error)
            .with_hint("carnet export prints one")
    })
}

/// What paths stand for on this machine, now.
struct Machine<'a> {
    engine: &'a Engine,
}

impl Identities for Machine<'_> {
    type Error = Failure;

    fn cgroup(&mut self, path: &str) -> Result<(u64, u32), Failure> {
        Cgroup::find(Path::new(path)).map(|cgroup| (cgroup.id, cgroup.level))
    }

    fn executable(&mut self, path: &str) -> Result<FileId, Failure> {
        let path = lookup::executable(Path::new(path))?;
        lookup::executable_condition(self.engine, &path).map(|condition| condition.file)
    }

    fn network_namespace(&mut self, name: &str) -> Result<u64, Failure> {
        let namespace: NetworkNamespace = name.parse().map_err(Failure::new)?;
        namespace.cookie()
    }
}

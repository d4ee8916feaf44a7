//! `carnet up`: loads an engine instance and attaches it to a cgroup.

use std::{path::PathBuf, time::Duration};

use carnet_engine::{Engine, UpOptions};
use serde::Serialize;

use super::DONE;
use crate::{
    failure::Failure,
    lookup::{self, Cgroup},
    session::Session,
};

/// Bring an engine instance up
///
/// From then on, connections of the processes in the cgroup and below it are redirected as the
/// filters say; at first there are none. It stays up until `carnet down` or a restart.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Redirect the connections of this cgroup; by default those of the whole machine
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// Make room for this many filters
    #[arg(long, value_name = "NUMBER", default_value_t = UpOptions::DEFAULT_MAX_FILTERS, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_filters: u32,

    /// End a UDP flow of a socket that is not connected after so many seconds without a datagram
    #[arg(long, value_name = "SECONDS", default_value_t = UpOptions::DEFAULT_UDP_IDLE.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
    udp_idle: u64,

    /// Refuse the cgroup's processes to make sockets that connect past Carnet: raw sockets, ping,
    /// UDP-Lite, SCTP
    ///
    /// That is all internet sockets but those of TCP, Multipath TCP and UDP. Packet
    /// sockets are none; they take CAP_NET_RAW, which `carnet run` then withholds. The services in
    /// the cgroup are refused them too. `carnet trace` shows who tried.
    #[arg(long)]
    refuse_unseen: bool,
}

/// JSON of `up`.
#[derive(Serialize)]
struct Up<'a> {
    /// The instance's name.
    instance: &'a str,
    /// The cgroup whose connections are redirected: its directory.
    cgroup: PathBuf,
}

pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let location = session.location()?;
    let cgroup = match &arguments.cgroup {
        Some(path) => Cgroup::find(path)?.directory,
        None => lookup::root()?,
    };
    let options = UpOptions {
        cgroup: cgroup.clone(),
        max_filters: arguments.max_filters,
        udp_idle: Duration::from_secs(arguments.udp_idle),
        refuse_unseen: arguments.refuse_unseen,
    };
    let engine = Engine::up(&location, &options)?;
    let instance = engine.location().instance();
    let line = format!("instance {instance} is up on {}", cgroup.display());
    session.changed(&Up { instance, cgroup }, line)?;
    Ok(DONE)
}

//! The command line, for the `carnet-inspect` program and for `carnet inspect`.

use crate::log::Format;
use crate::sys;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

/// What `carnet-inspect` is told to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Listen on this address (repeatable); an IPv6 address takes IPv6 only
    ///
    /// Port 0 lets the system choose, which is what a service wants whose listeners are registered.
    #[arg(long, value_name = "ADDRESS:PORT", default_values = [DEFAULT_V4, DEFAULT_V6])]
    pub listen: Vec<SocketAddr>,

    /// Name of the service in the log
    #[arg(long, default_value = "carnet-inspect")]
    pub name: String,

    /// Allow and refuse connections by the rules in this file (TOML)
    ///
    /// On Linux, SIGHUP reads it again.
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,

    /// Form of the log, which has one line for each connection
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Format::Human)]
    pub log: Format,

    /// Append the log to this file instead of writing it to the standard output
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// Serve at most this many connections at once; more wait to be accepted
    #[arg(long, value_name = "NUMBER", default_value = "8192")]
    pub max_connections: NonZeroU32,

    /// Number of worker threads; by default one for each processor
    #[arg(long, value_name = "NUMBER")]
    pub workers: Option<NonZeroUsize>,

    /// Hold a client's first bytes back for at most this long while a rule needs more of them
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = humantime::parse_duration)]
    pub inspect_timeout: Duration,

    /// Give connecting onwards up after this long
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub connect_timeout: Duration,

    /// When told to end, let live connections go on for at most this long
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_timeout: Duration,

    /// Hand connections on to a service at this address that expects the PROXY protocol (version 2)
    ///
    /// It is told the application's address and the original destination, to which it is to connect by
    /// itself. No UDP flows are taken then. Another host's gateway gets the records with --chain-key.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub send_proxy: Option<SocketAddr>,

    /// What only this system has.
    #[command(flatten)]
    pub system: sys::Options,
}

/// The addresses that are listened on by default.
pub(crate) const DEFAULT_V4: &str = "127.0.0.1:0";
/// See [`DEFAULT_V4`]; left out where the system has no IPv6.
pub(crate) const DEFAULT_V6: &str = "[::1]:0";

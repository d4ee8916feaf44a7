//! The command line: global options and the list of commands.

use std::path::PathBuf;

use carnet_core::object::{Policy, PolicyError};

use crate::{commands, demo};

/// Redirects connections through inspection services that co-operate
///
/// Connections that match a filter are diverted in the kernel to a service; the service connects
/// onwards with the connection's redirect record, and so every service sees it exactly once.
///
/// There is no daemon: each command does its work and ends, and redirection goes on.
#[derive(Debug, clap::Parser)]
#[command(name = "carnet", version, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// The engine instance
    #[arg(long, global = true, value_name = "NAME", default_value = "default")]
    pub(crate) instance: String,

    /// The BPF file system in which instances are pinned; by default the first that is mounted
    #[arg(long, global = true, value_name = "DIRECTORY")]
    pub(crate) bpffs: Option<PathBuf>,

    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Print in colour: always, never, or auto: on a terminal
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "WHEN",
        default_value_t,
        hide_possible_values = true
    )]
    pub(crate) color: Color,
}

/// When to print in colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The commands. What is not described here is described where its arguments are.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Up(commands::up::Arguments),
    Down(commands::down::Arguments),
    Status(commands::status::Arguments),
    Upgrade(commands::upgrade::Arguments),
    RotateKey(commands::rotate_key::Arguments),
    /// Add, list and remove providers: who brings sublayers and services
    #[command(subcommand)]
    Provider(commands::provider::Command),
    /// Add, list and remove sublayers: groups of filters that decide together
    #[command(subcommand)]
    Sublayer(commands::sublayer::Command),
    /// Add, list, remove and run redirect services
    #[command(subcommand)]
    Service(commands::service::Command),
    /// Add, list and remove filters: what happens to which connections
    #[command(subcommand)]
    Filter(commands::filter::Command),
    Export(commands::export::Export),
    Apply(commands::export::Apply),
    Flows(commands::flows::Arguments),
    Trace(commands::trace::Arguments),
    Explain(commands::explain::Arguments),
    /// Be a redirect service that inspects and logs connections
    Inspect(carnet_inspect::cli::Arguments),
    Run(commands::run::Arguments),
    Doctor(commands::doctor::Arguments),
    Demo(demo::Arguments),
}

/// Reads the name of an object that is to be made.
pub(crate) fn new_name(text: &str) -> Result<String, PolicyError> {
    // The rule for names is the policy's own, and the same for all kinds of object.
    Policy::new().add_provider(text, "").map(|provider| provider.name.clone())
}

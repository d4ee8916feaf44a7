//! Carnet under load: `cargo xtask soak`.
//!
//! Two parts, on the real kernel, in network namespaces and cgroups of their own: crowds of
//! connections that are all there at once, and half an hour at full rate while services and policy
//! change. `docs/soak.md` says what is checked.
//!
//! | module | job |
//! |---|---|
//! | [`crowd`], [`crowd_site`], [`crowd_peers`] | very many connections at once; where; both ends |
//! | [`soak`] | the long run: load, churn, samples, judgement |
//! | [`churn`] | what happens meanwhile |
//! | [`site`], [`command`] | where it takes place; the command `carnet` |
//! | [`client`], [`relay`], [`server`] | the processes: load, services, destination |
//! | [`board`], [`proof`] | what is demanded of a flow, and whether it fulfils that |
//! | [`sample`], [`memory`] | what the kernel keeps |
//! | [`report`] | tables |

mod board;
mod churn;
mod client;
mod command;
mod crowd;
mod crowd_peers;
mod crowd_site;
mod memory;
mod proof;
mod relay;
mod report;
mod sample;
mod server;
mod site;
mod soak;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::report::Report;

/// Carnet under load; needs root
#[derive(Parser)]
#[command(name = "carnet-soak", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything and print what was measured; fails if anything is lost, uninspected or kept
    #[command(name = "run", bin_name = "cargo xtask soak")]
    Run(Options),

    // The processes of which a run consists beside itself.
    /// Make flows and check them
    #[command(hide = true)]
    Client(client::Arguments),
    /// Be a service that marks what it relays
    #[command(hide = true)]
    Relay(relay::Arguments),
    /// Be the destination
    #[command(hide = true)]
    Server(server::Arguments),
    /// Make many connections at once
    #[command(hide = true)]
    CrowdClient(crowd_peers::ClientArguments),
    /// Echo
    #[command(hide = true)]
    CrowdServer(crowd_peers::ServerArguments),
}

/// What is to be done.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How long the long run is under load
    #[arg(long, default_value_t = 30.0, value_parser = minutes)]
    minutes: f64,
    /// How many connections are there at once
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// What chance begins with; drawn and printed unless given
    #[arg(long)]
    seed: Option<u64>,
    /// Less of everything: is all in order? 20 seconds under load, 2000 connections
    #[arg(long, conflicts_with_all = ["minutes", "connections"])]
    quick: bool,
    /// Run one part only
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Keep the tables in soak/results
    #[arg(long)]
    save: bool,
    /// Have a service leave its mark out once in so many flows, which must be found
    #[arg(long, hide = true)]
    forget_mark: Option<u64>,
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Very many connections at once, several times
    Crowd,
    /// The long run
    Churn,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "write a number of minutes".to_owned())?;
    let possible = (0.1..=24.0 * 60.0).contains(&minutes);
    if possible { Ok(minutes) } else { Err("from 0.1 to 1440".to_owned()) }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(options) => run(options),
        Command::Client(arguments) => client::run(&arguments),
        Command::Relay(arguments) => relay::run(arguments),
        Command::Server(arguments) => server::run(arguments),
        Command::CrowdClient(arguments) => crowd_peers::client(&arguments),
        Command::CrowdServer(arguments) => crowd_peers::server(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut options: Options) -> Result<()> {
    carnet_testbed::require_root()?;
    carnet_testbed::interrupt::prepare()?;
    if options.quick {
        options.minutes = 1.0 / 3.0;
        options.connections = 2000;
    }
    let seed = *options.seed.get_or_insert_with(|| fastrand::u64(..1 << 31));
    eprintln!("seed {seed}");
    carnet_testbed::datagrams::raise_file_limit()?;
    let memory = memory::MemoryGroup::enter()?;
    let crowds = (options.only != Some(Part::Churn))
        .then(|| crowd::run(&options, memory.as_ref()))
        .transpose()?;
    let soak = (options.only != Some(Part::Crowd))
        .then(|| soak::run(&options, memory.as_ref()))
        .transpose()?;
    let report = Report { seed, crowds, soak };
    print!("{report}");
    if options.save {
        println!("\nkept in {}", report.save()?.display());
    }
    match report.violations() {
        0 => Ok(()),
        count => bail!("{count} violations"),
    }
}

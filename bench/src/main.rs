//! Carnet's benchmarks: `cargo xtask bench connect`.
//!
//! They run on the real kernel, in network namespaces and cgroups of their own, and leave nothing
//! behind. What is compared is measured in turn, in one run.
//!
//! | module | job |
//! |---|---|
//! | [`connect`] | the benchmark `connect`: what is measured, how much of it |
//! | [`hooks`], [`reference`](mod@reference) | its first part: nanoseconds of each hook, and of one that does nothing |
//! | [`latency`] | its second part: connect() as the application sees it |
//! | [`services`] | its third part: whole connections through services |
//! | [`site`] | where one thing is measured: namespaces, cgroups, engine, services |
//! | [`client`], [`server`], [`relay`], [`firewall`] | the load, what answers it, a relay that does little else, and nftables for comparison |
//! | [`processor`] | the processor time of a load |
//! | [`statistics`], [`about`], [`report`] | medians, the circumstances, the tables |

mod about;
mod client;
mod connect;
mod firewall;
mod hooks;
mod latency;
mod processor;
mod reference;
mod relay;
mod report;
mod server;
mod services;
mod site;
mod statistics;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Carnet's benchmarks; they need root
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", version)]
#[command(max_term_width = 100)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what redirecting connections costs
    Connect(connect::Options),

    // The processes that a benchmark consists of beside itself.
    /// Make connections and print how long they took
    #[command(hide = true)]
    Client(client::Load),
    /// Be a redirect service that accepts connections and closes them
    #[command(hide = true)]
    Sink,
    /// Be a relay that does nothing but relay
    #[command(hide = true)]
    Relay(relay::Arguments),
    /// Be carnet-inspect
    #[command(hide = true)]
    Inspect(Box<carnet_inspect::cli::Arguments>),
}

fn main() -> ExitCode {
    let result = match Options::parse().command {
        Command::Connect(options) => connect::run(&options),
        Command::Client(load) => said_on_the_output(client::run(&load)),
        Command::Sink => said_on_the_output(server::sink()),
        Command::Relay(arguments) => said_on_the_output(relay::run(arguments)),
        Command::Inspect(arguments) => said_on_the_output(carnet_inspect::run(*arguments)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A child's failure, as its parent gets to read it.
fn said_on_the_output(result: Result<()>) -> Result<()> {
    result.inspect_err(|error| println!("failed: {error:#}"))
}

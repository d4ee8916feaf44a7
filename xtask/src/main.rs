//! `cargo xtask`: Carnet's own commands, so that every step of development and CI is one command
//! that sets up what it needs and says in words what is missing.
//!
//! | module | job |
//! |---|---|
//! | [`bpf`] | builds the kernel engine, reproducibly, and checks the committed object against it |
//! | [`test`](mod@test) | runs everything that runs on the local kernel |
//! | [`contract`] | Windows' contract, clause by clause: tests and table |
//! | [`conformance`] | prints the matrix of all ways to open a flow |
//! | [`differential`] | the kernel's decisions against the core's and a naive model's |
//! | [`fuzz`] | arbitrary input for every parser, and for the control interface |
//! | [`evasion`] | every way to open a flow, and what becomes of it |
//! | [`interop`] | programs that know nothing of Carnet, alone and in chains |
//! | [`faults`] | what happens when something dies, fails or is missing |
//! | [`attacks`] | every attack that was tried, and what becomes of it |
//! | [`prove`] | explores the model of the protocol, and breaks its rules |
//! | [`winsock`] | builds, installs and checks the C library |
//! | [`windows`] | builds for Windows, and tests under Wine |
//! | [`unsafety`] | lists unsafe code with its reasons |
//! | [`verifier`] | what the verifier makes of each program, against what is noted |
//! | [`vm`] | boots other kernels, and tests there |
//! | [`miri`] | what needs no kernel, under Miri |
//! | [`advisories`] | what is known about dependencies |
//! | [`workflows`] | whether CI uses nothing that can change under it |
//! | [`dist`] | what a release ships, built reproducibly |
//! | [`ci`] | what CI checks beside the tests |
//! | [`bench`](mod@bench) | build the benchmarks, or the soak, and start them as root |
//! | [`catalogue`] | what was tried, each with its tests: ways, attacks |
//! | [`page`] | writes the parts of pages that are generated |
//! | [`cargo`], [`process`], [`host`] | starting cargo, starting anything, facts about the machine |

mod advisories;
mod attacks;
mod bench;
mod bpf;
mod cargo;
mod catalogue;
mod ci;
mod conformance;
mod contract;
mod differential;
mod dist;
mod evasion;
mod faults;
mod fuzz;
mod host;
mod interop;
mod miri;
mod page;
mod process;
mod prove;
mod test;
mod unsafety;
mod verifier;
mod vm;
mod windows;
mod winsock;
mod workflows;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Carnet's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel engine into the object that carnet-engine embeds
    Bpf(bpf::Options),
    /// Run every test that runs on the local kernel: the whole workspace, end-to-end tests as root
    Test {
        /// Given to every test program, for example a part of a test's name or `--nocapture`
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run the contract suite and print a line per clause of Windows' documentation
    Contract(contract::Options),
    /// Run the conformance matrix and print it: families, protocols, binds, destinations, services
    Conformance,
    /// Compare three deciders about random flows through real sockets: kernel, core, naive model
    Differential(differential::Options),
    /// Fuzz every parser and the control interface, and print a table
    Fuzz(fuzz::Options),
    /// Try every way to open a flow, and print what becomes of each
    Evasion(evasion::Options),
    /// Run real transparent proxies, unmodified, alone and in chains; install what is missing of them
    Interop(interop::Options),
    /// Kill, starve and break everything, and print what came of it: no flow lost, none uninspected
    Faults(faults::Options),
    /// Carry out every attack on the records and what guards them, and print what becomes of each
    Attacks(attacks::Options),
    /// Explore the model of the protocol exhaustively, and show that it notices broken rules
    Prove(prove::Options),
    /// Build and install the C library carnet-winsock, or check it thoroughly
    Winsock(winsock::Options),
    /// Build what runs on Windows, and run its tests under Wine
    Windows(windows::Options),
    /// Run the demonstration and the end-to-end tests on other kernels, in virtual machines
    Vm(vm::Options),
    /// List every piece of unsafe code with its reason, and how much the dependencies have
    Unsafe(unsafety::Options),
    /// Measure what the verifier makes of each program, and compare it with what is noted
    Verifier(verifier::Options),
    /// Build what a release ships: static programs, what they are made of, checksums
    Dist(dist::Options),
    /// Check whether advisories concern a dependency, where their database can be reached
    Advisories(advisories::Options),
    /// Run what needs no kernel under Miri, which finds undefined behaviour
    Miri,
    /// Check what CI checks beside the tests: format, lints, docs, licences, advisories, the committed object
    Ci,
    /// Build and run the benchmarks as root; everything given is handed on to them
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Load of long duration, as root: 50,000 connections at once, then half an hour of churn at full
    /// rate; everything given is handed on (`--help`)
    #[command(disable_help_flag = true)]
    Soak {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let result = bpf::compiler_call().unwrap_or_else(|| run(Options::parse().command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Bpf(options) => bpf::run(options),
        Command::Test { arguments } => test::run(&arguments),
        Command::Contract(options) => contract::run(&options),
        Command::Conformance => conformance::run(),
        Command::Differential(options) => differential::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Evasion(options) => evasion::run(&options),
        Command::Interop(options) => interop::run(&options),
        Command::Faults(options) => faults::run(&options),
        Command::Attacks(options) => attacks::run(&options),
        Command::Prove(options) => prove::run(&options),
        Command::Winsock(options) => winsock::run(&options),
        Command::Windows(options) => windows::run(&options),
        Command::Vm(options) => vm::run(&options),
        Command::Unsafe(options) => unsafety::run(&options),
        Command::Verifier(options) => verifier::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Advisories(options) => advisories::run(&options),
        Command::Miri => miri::run(),
        Command::Ci => ci::run(),
        Command::Bench { arguments } => bench::run(bench::BENCH, &arguments),
        Command::Soak { arguments } => {
            let arguments: Vec<_> = [OsString::from("run")].into_iter().chain(arguments).collect();
            bench::run(bench::SOAK, &arguments)
        }
    }
}

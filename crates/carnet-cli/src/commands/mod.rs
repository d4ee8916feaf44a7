//! The commands, one module each: its arguments, and what it does.

pub(crate) mod doctor;
pub(crate) mod down;
pub(crate) mod explain;
pub(crate) mod export;
pub(crate) mod filter;
pub(crate) mod flows;
mod inspect;
pub(crate) mod provider;
pub(crate) mod rotate_key;
pub(crate) mod run;
pub(crate) mod service;
mod service_kind;
mod service_run;
mod service_wait;
pub(crate) mod status;
pub(crate) mod sublayer;
pub(crate) mod trace;
pub(crate) mod up;
pub(crate) mod upgrade;

use crate::{arguments::Command, demo, failure::Failure, session::Session};

/// Exit status of a command that has done its work.
const DONE: u8 = 0;

/// Runs a command, and returns the exit status.
pub(crate) fn run(command: Command, session: &mut Session<'_>) -> Result<u8, Failure> {
    match command {
        Command::Up(arguments) => up::run(arguments, session),
        Command::Down(arguments) => down::run(arguments, session),
        Command::Status(arguments) => status::run(arguments, session),
        Command::Upgrade(arguments) => upgrade::run(arguments, session),
        Command::RotateKey(arguments) => rotate_key::run(arguments, session),
        Command::Provider(command) => provider::run(command, session),
        Command::Sublayer(command) => sublayer::run(command, session),
        Command::Service(command) => service::run(command, session),
        Command::Filter(command) => filter::run(command, session),
        Command::Export(arguments) => export::export(arguments, session),
        Command::Apply(arguments) => export::apply(arguments, session),
        Command::Flows(arguments) => flows::run(arguments, session),
        Command::Trace(arguments) => trace::run(arguments, session),
        Command::Explain(arguments) => explain::run(arguments, session),
        Command::Inspect(arguments) => inspect::run(arguments, session),
        Command::Run(arguments) => run::run(arguments, session),
        Command::Doctor(arguments) => doctor::run(arguments, session),
        Command::Demo(arguments) => demo::run(arguments, session),
    }
}

//! The `carnet` command: parses arguments, calls the engine, prints.
//!
//! Everything is reachable in-process: [`run`] takes the arguments and a [`Console`], which is the
//! process's own for the program and a buffer for tests. Nouns (`provider`, `flows`, …) have their
//! verbs as subcommands; there is one module for each command under `commands`.
//!
//! | exit status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | it failed: one line `error: …` says why, often a line `hint: …` what to do |
//! | 2 | the command line cannot be understood; nothing was changed |
//! | other | `run` and `service run` end with the status of the command that they run, 128 and the number of the signal if one ended it |
//!
//! With `--json`, every command that prints data prints JSON instead: one document, or for `trace`
//! one for each line. The shapes are the `Serialize` types beside each command, and for the objects
//! of a policy those of [`carnet_core::object`].

mod arguments;
mod child;
mod commands;
mod console;
mod demo;
mod failure;
mod lookup;
mod moment;
mod names;
mod privileges;
mod session;
mod table;

use std::ffi::OsString;

use clap::{CommandFactory as _, FromArgMatches as _, error::ErrorKind};

pub use crate::console::Console;
use crate::{
    arguments::Arguments,
    failure::{Failure, Kind},
    session::Session,
};

/// Exit status of a command line that cannot be understood.
const USAGE: u8 = 2;

/// The command line's definition, for help texts and completions.
pub fn definition() -> clap::Command {
    Arguments::command()
}

/// Runs one command line, of which the first argument is the program's name, and returns its exit
/// status. See the [crate's documentation](crate) for what the numbers mean.
pub fn run(arguments: impl IntoIterator<Item = OsString>, console: &mut Console) -> u8 {
    let parsed = definition()
        .try_get_matches_from(arguments)
        .and_then(|matches| Arguments::from_arg_matches(&matches));
    let arguments = match parsed {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error, console),
    };
    console.set_color(arguments.global.color);
    let result =
        commands::run(arguments.command, &mut Session { console, global: &arguments.global });
    match result {
        Ok(status) => status,
        Err(failure) => report(&failure, console),
    }
}

/// Prints what clap has to say: a help text that was asked for, or what cannot be understood.
fn refuse(error: &clap::Error, console: &mut Console) -> u8 {
    let text = error.render();
    let (printed, status) = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            (console.write_out(format_args!("{}", text.ansi())), 0)
        }
        _ => (console.write_error(format_args!("{}", text.ansi())), USAGE),
    };
    // Where nobody reads, there is nobody to tell either.
    printed.map_or(status, |()| status)
}

fn report(failure: &Failure, console: &mut Console) -> u8 {
    let status = match failure.kind() {
        // Whoever read the output has seen enough: `carnet trace | head`.
        Kind::NobodyReads => return 0,
        Kind::Usage => USAGE,
        Kind::Failed => 1,
    };
    // See `refuse`.
    let _ = console.error(failure.message());
    if let Some(hint) = failure.hint() {
        let _ = console.hint(hint);
    }
    status
}

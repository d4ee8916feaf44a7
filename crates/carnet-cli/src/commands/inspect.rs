//! `carnet inspect`: the reference redirect service, [`carnet_inspect`].

use carnet_inspect::{cli::Arguments, log::Format};

use super::DONE;
use crate::{failure::Failure, session::Session};

/// JSON: the service's log, [`carnet_inspect::log::Entry`] on each line.
pub(super) fn run(mut arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    if session.global.json {
        arguments.log = Format::Json;
    }
    // Its log is on the process's own standard output: it is a service, not a command that prints.
    carnet_inspect::run(arguments).map_err(|error| Failure::new(format_args!("{error:#}")))?;
    Ok(DONE)
}

//! `carnet down`: detaches and removes an engine instance.

use carnet_engine::{Engine, Error};
use serde::Serialize;

use super::DONE;
use crate::{failure::Failure, session::Session};

/// Take an engine instance down: nothing is redirected any more
///
/// Its policy is gone with it. Connections that are open go on; their services relay them.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

/// JSON of `down`.
#[derive(Serialize)]
struct Down<'a> {
    /// The instance's name.
    instance: &'a str,
}

pub(super) fn run(_arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let location = session.location()?;
    let is_up = !matches!(Engine::open(&location), Err(Error::NotUp { .. }));
    // What a command that was killed has left is taken down, too.
    if is_up || !Engine::sweep(&location)? {
        session.engine()?.down()?;
    }
    let instance = session.global.instance.as_str();
    session.changed(&Down { instance }, format_args!("instance {instance} is down"))?;
    Ok(DONE)
}

//! `carnet rotate-key`: a new key for the records.

use std::time::Duration;

use carnet_engine::Engine;
use serde::Serialize;

use super::DONE;
use crate::{failure::Failure, session::Session};

/// Issue redirect records under a new key
///
/// Records under the key before it are accepted for a while, so that no flow under way is lost;
/// older keys are accepted no longer. The key is in the kernel and nobody is shown it.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Accept the key before for so many seconds; 0 refuses its records at once
    ///
    /// 0 is for a key that somebody may have got to know. A service that has queried a record and has
    /// not set it yet is refused then, and has to query it again.
    #[arg(long, value_name = "SECONDS", default_value_t = Engine::DEFAULT_KEY_OVERLAP.as_secs(), value_parser = clap::value_parser!(u64).range(..=Engine::MAX_KEY_OVERLAP.as_secs()))]
    overlap: u64,
}

/// JSON of `rotate-key`.
#[derive(Serialize)]
struct Rotated {
    /// Number of the key that issues records from now on.
    generation: u64,
    /// Number of the key before.
    previous: u64,
    /// For how many seconds that one is still accepted.
    overlap_seconds: u64,
}

pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let overlap = arguments.overlap;
    let key = session.engine()?.rotate_key(Duration::from_secs(overlap))?;
    let generation = key.generation;
    let rotated = Rotated { generation, previous: generation - 1, overlap_seconds: overlap };
    let instance = &session.global.instance;
    let previous = match overlap {
        0 => "is refused".into(),
        seconds => format!("is accepted for {seconds} seconds"),
    };
    let line = format!(
        "instance {instance}: key {generation} issues records, key {} {previous}",
        rotated.previous
    );
    session.changed(&rotated, line)?;
    Ok(DONE)
}

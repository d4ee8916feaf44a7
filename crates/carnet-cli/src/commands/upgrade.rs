//! `carnet upgrade`: this version's programs in place of those that run.

use serde::Serialize;

use super::DONE;
use crate::{failure::Failure, session::Session};

/// Replace the programs of an engine instance by this version's, without a gap
///
/// Policy and flows stay. An instance whose tables this version does not know is refused.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

/// JSON of `upgrade`.
#[derive(Serialize)]
struct Upgraded {
    /// The build that ran before.
    from: String,
    /// The build that runs now.
    to: String,
    /// Number of attached programs that were replaced.
    replaced: usize,
    /// Number of attached programs whose cgroup is gone.
    defunct: usize,
}

pub(super) fn run(_arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let report = session.engine()?.upgrade()?;
    let upgraded = Upgraded {
        from: report.from.to_string(),
        to: report.to.to_string(),
        replaced: report.replaced,
        defunct: report.defunct,
    };
    let Upgraded { from, to, replaced, .. } = &upgraded;
    let instance = &session.global.instance;
    // The first digits tell builds apart well enough for people.
    let line = format!("instance {instance}: {replaced} programs replaced, {from:.12} by {to:.12}");
    session.changed(&upgraded, line)?;
    Ok(DONE)
}

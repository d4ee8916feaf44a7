//! `carnet doctor`: what this machine offers to the engine, and what is missing.

use std::path::PathBuf;

use carnet_engine::doctor::{self, State};
use serde::Serialize;

use super::DONE;
use crate::{
    console::{BAD, FAINT, GOOD, WARNING, plain, styled, wrapped},
    failure::Failure,
    lookup::Cgroup,
    session::Session,
};

/// Examine what this machine offers, and what is missing
///
/// The exit status is 1 if anything is missing that Carnet cannot do without.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Look at what else is attached to this cgroup, and at the sockets of its processes; by default
    /// at that of the instance, if it is up
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
}

/// JSON of `doctor`: an array of these.
#[derive(Serialize)]
struct Finding {
    /// What was examined.
    name: String,
    /// `ok`, `warning` or `missing`.
    state: &'static str,
    /// What was found.
    detail: String,
    /// What to do about it; null if nothing.
    advice: Option<String>,
}

pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let cgroup = match &arguments.cgroup {
        Some(path) => Some(Cgroup::find(path)?.directory),
        // Not being up, or not being allowed to know, is none of the doctor's business.
        None => session.engine().ok().map(|engine| engine.scope().to_owned()),
    };
    let findings = doctor::examine(cgroup.as_deref());
    let missing = findings.iter().any(|finding| finding.state == State::Missing);
    if session.global.json {
        let findings: Vec<_> = findings
            .into_iter()
            .map(|finding| Finding {
                state: word(finding.state),
                name: finding.name,
                detail: finding.detail,
                advice: finding.advice,
            })
            .collect();
        session.console.json(&findings)?;
    } else {
        for finding in findings {
            let style = match finding.state {
                State::Ok => GOOD,
                State::Warning => WARNING,
                State::Missing => BAD,
            };
            let word = styled(style, format_args!("{:7}", word(finding.state)));
            let found = format!("{}: {}", finding.name, plain(finding.detail));
            session.console.line(format_args!("{word}  {}", wrapped(&found, 9)))?;
            if let Some(advice) = finding.advice {
                let advice = styled(FAINT, wrapped(&plain(advice), 9));
                session.console.line(format_args!("         {advice}"))?;
            }
        }
    }
    Ok(if missing { 1 } else { DONE })
}

fn word(state: State) -> &'static str {
    match state {
        State::Ok => "ok",
        State::Warning => "warning",
        State::Missing => "missing",
    }
}

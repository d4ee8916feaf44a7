use crate::{failure::Failure, session::Session};
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}
pub(super) fn run(_arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    session.engine()?;
    Ok(0)
}

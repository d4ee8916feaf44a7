//! `carnet provider`: vendors, who bring sublayers and services.

use super::DONE;
use crate::{
    arguments::new_name, console::plain, failure::Failure, session::Session, table::Table,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Add a provider
    Add {
        /// Its name
        #[arg(value_parser = new_name)]
        name: String,

        /// What people should know of it
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        description: String,
    },
    /// List the providers
    Ls,
    /// Remove a provider that has no sublayers and services
    Rm {
        /// Its name or id
        #[arg(value_name = "NAME|ID")]
        provider: String,
    },
}

/// JSON: the provider that was added or removed; for `ls` an array of them
/// ([`carnet_core::object::Provider`]).
pub(super) fn run(command: Command, session: &mut Session<'_>) -> Result<u8, Failure> {
    let mut engine = session.engine()?;
    match command {
        Command::Add { name, description } => {
            let added =
                session.change(&mut engine, |p| p.add_provider(&name, &description).cloned())?;
            session.changed(&added, format_args!("provider {} added", added.name))?;
        }
        Command::Ls => {
            let policy = engine.policy()?;
            let mut table = Table::new(["ID", "NAME", "DESCRIPTION"]);
            for provider in policy.providers() {
                let description = plain(&provider.description);
                table.row([provider.id.to_string(), provider.name.clone(), description]);
            }
            session.list(policy.providers(), "providers", &table)?;
        }
        Command::Rm { provider } => {
            let removed = session.change(&mut engine, |p| p.remove_provider(&provider))?;
            session.changed(&removed, format_args!("provider {} removed", removed.name))?;
        }
    }
    Ok(DONE)
}

//! `carnet sublayer`: groups of filters that decide together.

use super::DONE;
use crate::{arguments::new_name, failure::Failure, session::Session, table::Table};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Add a sublayer
    Add {
        /// Its name
        #[arg(value_parser = new_name)]
        name: String,

        /// The provider that brings it
        #[arg(long, value_name = "NAME|ID")]
        provider: String,

        /// Heavier sublayers are consulted first
        #[arg(long, value_name = "0-65535", default_value_t = 0x8000)]
        weight: u16,
    },
    /// List the sublayers, in the order in which they are consulted
    Ls,
    /// Remove a sublayer that has no filters
    Rm {
        /// Its name or id
        #[arg(value_name = "NAME|ID")]
        sublayer: String,
    },
}

/// JSON: the sublayer that was added or removed; for `ls` an array of them
/// ([`carnet_core::object::Sublayer`]).
pub(super) fn run(command: Command, session: &mut Session<'_>) -> Result<u8, Failure> {
    let mut engine = session.engine()?;
    match command {
        Command::Add { name, provider, weight } => {
            let added = session
                .change(&mut engine, |p| p.add_sublayer(&name, &provider, weight).cloned())?;
            session.changed(&added, format_args!("sublayer {} added", added.name))?;
        }
        Command::Ls => {
            let policy = engine.policy()?;
            let mut table = Table::new(["ID", "NAME", "PROVIDER", "WEIGHT"]);
            let sublayers = policy.sublayers_in_order();
            for sublayer in &sublayers {
                table.row([
                    sublayer.id.to_string(),
                    sublayer.name.clone(),
                    sublayer.provider.clone(),
                    sublayer.weight.to_string(),
                ]);
            }
            session.list(&sublayers, "sublayers", &table)?;
        }
        Command::Rm { sublayer } => {
            let removed = session.change(&mut engine, |p| p.remove_sublayer(&sublayer))?;
            session.changed(&removed, format_args!("sublayer {} removed", removed.name))?;
        }
    }
    Ok(DONE)
}

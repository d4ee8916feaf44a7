//! What every command is given: where to print, and which instance is meant.

use std::fmt;

use carnet_core::object::{Policy, PolicyError};
use carnet_engine::{Engine, Location};
use serde::Serialize;

use crate::{
    arguments::Global, console::Console, failure::Failure, names, privileges, table::Table,
};

/// One run of the command.
pub(crate) struct Session<'a> {
    pub(crate) console: &'a mut Console,
    pub(crate) global: &'a Global,
}

impl Session<'_> {
    /// Where the instance's pins are, or will be. Checks privileges first: without them even
    /// looking fails, and not in words.
    pub(crate) fn location(&self) -> Result<Location, Failure> {
        privileges::administer()?;
        Ok(Location::new(self.global.bpffs.clone(), &self.global.instance)?)
    }

    /// The instance, which has to be up.
    pub(crate) fn engine(&self) -> Result<Engine, Failure> {
        Engine::open(&self.location()?).map_err(|error| {
            let not_up = matches!(error, carnet_engine::Error::NotUp { .. });
            let failure = Failure::from(error);
            match self.others().filter(|_| not_up) {
                Some(names) => failure.with_hint(format_args!("up is --instance {names}")),
                None => failure,
            }
        })
    }

    /// The instances that are up, if there are any.
    fn others(&self) -> Option<String> {
        let locations = Location::list(self.global.bpffs.clone()).ok()?;
        let names: Vec<_> = locations.iter().map(Location::instance).collect();
        (!names.is_empty()).then(|| names.join(", "))
    }

    /// Changes the policy: all of `change`, or nothing.
    pub(crate) fn change<T>(
        &self,
        engine: &mut Engine,
        change: impl FnOnce(&mut Policy) -> Result<T, PolicyError>,
    ) -> Result<T, Failure> {
        engine.transact(|policy| change(policy).map_err(|error| names::failure(policy, error)))
    }

    /// What a policy was asked for, or which names are near the one that it does not have.
    pub(crate) fn known<T>(policy: &Policy, found: Result<T, PolicyError>) -> Result<T, Failure> {
        found.map_err(|error| names::failure(policy, error))
    }

    /// Prints what was changed: the object as JSON, or a line for people.
    pub(crate) fn changed(
        &mut self,
        object: &impl Serialize,
        line: impl fmt::Display,
    ) -> Result<(), Failure> {
        if self.global.json {
            self.console.json(object)?;
        } else {
            self.console.line(line)?;
        }
        Ok(())
    }

    /// Prints objects: as a JSON array, or as a table.
    pub(crate) fn list<const N: usize>(
        &mut self,
        objects: &[impl Serialize],
        what: &str,
        table: &Table<N>,
    ) -> Result<(), Failure> {
        if self.global.json {
            self.console.json(&objects)?;
        } else if objects.is_empty() {
            self.console.note(format_args!("there are no {what}"))?;
        } else {
            self.console.line(table)?;
        }
        Ok(())
    }
}

//! Changing the policy, all of it or not at all.
//!
//! The tables exist twice. A transaction writes the bank that is not in force, together with what
//! both banks share and the new policy needs in addition, and then puts it in force with a single
//! store. Until then nothing that it did makes a difference to any connection, and it is taken
//! back on an error. Afterwards it waits until no hook runs any more that may have begun under the
//! old policy, and removes what only that needed. The order of the steps is core's.
//!
//! While it does so, a mark lies in the instance's directory. Who finds the mark holds the lock, so
//! the command that made it has died: what it added is removed before anything else is done.

use std::{fs, path::PathBuf};

use carnet_core::{
    compile::{CompiledPolicy, compile},
    object::Policy,
    transaction::{AFTERWARDS, Step, UNTIL_IN_FORCE},
};

use crate::{
    Engine, Error, Location,
    engine::{CHANGING, UPGRADE, remove_all},
    links::{create_directory, plan},
    sys::GracePeriod,
    tables::{InForce, other},
};

impl Engine {
    /// Changes the policy. `change` gets the one in force; what it makes of it is in force when this
    /// returns, for every connection that begins afterwards. If `change` fails, or the new policy
    /// cannot be put in force, nothing has changed.
    ///
    /// Nobody else can read or change the policy while `change` runs.
    ///
    /// # Errors
    /// What `change` returned. Otherwise [`Error::NotUp`], [`Error::UnknownLayout`];
    /// [`Error::Compile`] and [`Error::TooLarge`] if the policy is too large;
    /// [`Error::CgroupGone`], [`Error::ServiceAroundScope`] and [`Error::Attach`] if the hooks for a
    /// service's cgroup cannot be attached; [`Error::Map`].
    pub fn transact<T, E: From<Error>>(
        &mut self,
        change: impl FnOnce(&mut Policy) -> Result<T, E>,
    ) -> Result<T, E> {
        let _lock = self.lock_to_change()?;
        self.instance()?;
        self.recover()?;
        let before = self.tables().in_force()?;
        let mut policy = before.policy.clone();
        let result = change(&mut policy)?;
        if policy != before.policy {
            self.install(&before, &policy)?;
        }
        Ok(result)
    }

    /// Removes what a command that was killed has left in the instance. The instance is locked.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Map`], [`Error::Document`].
    pub(crate) fn recover(&self) -> Result<(), Error> {
        let aside = self.location().path(UPGRADE);
        if aside.exists() {
            remove_all(&aside)?;
        }
        let mark = Mark::of(self.location());
        if mark.is_there() {
            // The command may have died right after it put its policy in force: hooks may still read
            // the bank that was in force before.
            GracePeriod::prepare()
                .and_then(|grace| grace.wait())
                .map_err(Error::io("wait for", "a grace period"))?;
            let InForce { bank, policy, .. } = self.tables().in_force()?;
            self.tables().add_cgroups(&policy)?;
            self.tidy(&policy, other(bank))?;
            mark.remove()?;
        }
        Ok(())
    }

    /// Puts a policy in force. The instance is locked.
    fn install(&self, before: &InForce, after: &Policy) -> Result<(), Error> {
        let bank = other(before.bank);
        let compiled = compile(after, before.generation.wrapping_add(1))?;
        let document = after.to_bytes();
        self.tables().check_room(&compiled, &document)?;
        // All that can fail is prepared before the store.
        let grace = GracePeriod::prepare().map_err(Error::io("prepare", "a grace period"))?;
        let mark = Mark::of(self.location());
        let take = |step| match step {
            Step::Wait => grace.wait().map_err(Error::io("wait for", "a grace period")),
            Step::Prepare => {
                mark.make()?;
                self.prepare(&before.policy, after, &compiled)
            }
            Step::Write => self.tables().write_bank(bank, &compiled, &document),
            Step::Flip => self.tables().flip(bank),
            Step::Tidy => {
                self.tables().add_cgroups(after)?;
                self.tidy(after, before.bank)?;
                mark.remove()
            }
        };
        for step in UNTIL_IN_FORCE {
            if let Err(error) = take(step) {
                // While it waits, nothing has been done, and hooks may read that bank.
                if mark.is_there()
                    && let Err(second) =
                        self.tidy(&before.policy, bank).and_then(|()| mark.remove())
                {
                    tracing::warn!("{second}");
                }
                return Err(error);
            }
        }
        // The new policy is in force: what cannot be tidied now, the next transaction tidies.
        if let Err(error) = AFTERWARDS.into_iter().try_for_each(take) {
            tracing::warn!("{error}");
        }
        Ok(())
    }

    /// Puts the empty policy in force for good. The instance is locked.
    pub(crate) fn close(&self) -> Result<(), Error> {
        self.instance()?;
        let nothing = Policy::new();
        let before = self.tables().in_force()?;
        let bank = other(before.bank);
        let compiled = compile(&nothing, before.generation.wrapping_add(1))?;
        let grace = GracePeriod::prepare().map_err(Error::io("prepare", "a grace period"))?;
        UNTIL_IN_FORCE.into_iter().chain(AFTERWARDS).try_for_each(|step| match step {
            Step::Wait => grace.wait().map_err(Error::io("wait for", "a grace period")),
            Step::Write => self.tables().write_bank(bank, &compiled, &nothing.to_bytes()),
            Step::Flip => self.tables().close(bank),
            // It needs nothing, and what there is goes with the instance.
            Step::Prepare | Step::Tidy => Ok(()),
        })
    }

    /// Adds what the new policy needs and the old one does not have.
    fn prepare(
        &self,
        before: &Policy,
        after: &Policy,
        compiled: &CompiledPolicy,
    ) -> Result<(), Error> {
        let plan = plan(self.instance()?, after)?;
        let had = |id| before.services().iter().any(|service| service.cgroup.id == id);
        // A service whose cgroup has gone does not keep the administrator from changing others.
        self.links().attach_missing(&plan, |id| had(id) || id == self.scope_id())?;
        self.tables().add_contexts(before, compiled)?;
        // A cgroup that goes from one service to another is the old one's for as long as that is
        // in force.
        let is_new = |id| !had(id);
        self.tables().add_cgroups_where(after, is_new)
    }

    /// Removes what neither `policy`, which is in force, nor anybody else needs. `bank` is not in
    /// force.
    fn tidy(&self, policy: &Policy, bank: u32) -> Result<(), Error> {
        self.tables().clear_services(bank)?;
        self.tables().retain_contexts(policy)?;
        self.tables().retain_cgroups(policy)?;
        self.tables().retain_listeners(policy)?;
        self.links().detach_superfluous(&plan(self.instance()?, policy)?)
    }

    fn scope_id(&self) -> u64 {
        self.instance().map_or(0, |instance| instance.scope_id)
    }
}

/// [`CHANGING`].
struct Mark(PathBuf);

impl Mark {
    fn of(location: &Location) -> Self {
        Self(location.path(CHANGING))
    }

    fn is_there(&self) -> bool {
        self.0.exists()
    }

    fn make(&self) -> Result<(), Error> {
        create_directory(&self.0)
    }

    fn remove(&self) -> Result<(), Error> {
        fs::remove_dir(&self.0).map_err(Error::io("remove", self.0.display()))
    }
}

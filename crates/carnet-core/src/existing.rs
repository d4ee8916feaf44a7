//! Which connections that are there already a filter ends that is added.
//!
//! A change of the policy is for connections that begin after it. Where the operator wants a new
//! block to end others too, the decision function says which: those that it would refuse now, with
//! the new filter having a say in it.

use crate::{
    arbitration::Verdict,
    chain::Chain,
    classify::{Listeners, Observer, Outcome, Reason, classify},
    compile::CompiledPolicy,
    explain::HostConnection,
    table::FilterRow,
};

/// Whether `connection`, whose record read `chain` when it began, would be refused under the policy
/// `compiled`, and the filter with the id `filter` is one of those that say so.
///
/// A service that has no listener refuses no connection that is there: it has been delivered.
pub fn is_ended_by(
    filter: u64,
    compiled: &CompiledPolicy,
    connection: &HostConnection,
    chain: &Chain,
) -> bool {
    let mut say = Say { filter, blocks: false };
    let decision = classify(compiled, connection, chain, &mut AllLive, &mut say);
    decision.blocks() && decision.reason == Reason::Filter && say.blocks
}

struct AllLive;

impl Listeners for AllLive {
    fn is_live(&mut self, _handle: u64) -> bool {
        true
    }
}

/// Whether a certain filter has decided for its sublayer, to block.
struct Say {
    filter: u64,
    blocks: bool,
}

impl Observer for Say {
    fn matched(&mut self, filter: &FilterRow, outcome: Outcome) {
        if filter.id == self.filter {
            self.blocks |=
                matches!(outcome, Outcome::Decided(Verdict::SoftBlock | Verdict::HardBlock));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{borrow::ToOwned as _, net::SocketAddr, string::String, vec};

    use super::is_ended_by;
    use crate::{
        chain::Chain,
        compile::compile,
        explain::HostConnection,
        object::{CgroupRef, Conditions, FilterAction, NewFilter, NewService, Policy, Weight},
    };

    const BLOCK: FilterAction = FilterAction::Block { hard: true, veto: false };

    /// A policy with the sublayers `heavy` and `light`.
    fn policy() -> Policy {
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        policy.add_sublayer("heavy", "p", 2).unwrap();
        policy.add_sublayer("light", "p", 1).unwrap();
        policy
    }

    fn add(policy: &mut Policy, sublayer: &str, port: u16, action: FilterAction) -> u64 {
        let conditions = Conditions { ports: vec![port.into()], ..Conditions::default() };
        let sublayer = sublayer.to_owned();
        let new =
            NewFilter { name: None::<String>, sublayer, weight: Weight::Auto, conditions, action };
        policy.add_filter(new).unwrap().id
    }

    fn ends(policy: &Policy, filter: u64, port: u16) -> bool {
        let destination: SocketAddr = ([192, 0, 2, 1], port).into();
        let connection = HostConnection {
            protocol: 6,
            destination: destination.into(),
            ..HostConnection::default()
        };
        is_ended_by(filter, &compile(policy, 1).unwrap(), &connection, &Chain::empty(0))
    }

    #[test]
    fn a_block_ends_what_it_matches() {
        let mut policy = policy();
        let filter = add(&mut policy, "light", 80, BLOCK);
        assert!(ends(&policy, filter, 80));
        assert!(!ends(&policy, filter, 81));
        // Another one of the same effect is not this one.
        let other = add(&mut policy, "light", 81, BLOCK);
        assert!(!ends(&policy, filter, 81));
        assert!(ends(&policy, other, 81));
    }

    #[test]
    fn a_block_that_is_overruled_ends_nothing() {
        let mut policy = policy();
        add(&mut policy, "heavy", 80, FilterAction::Permit { hard: true });
        let filter = add(&mut policy, "light", 80, BLOCK);
        assert!(!ends(&policy, filter, 80));
        let veto = add(&mut policy, "light", 80, FilterAction::Block { hard: true, veto: true });
        // In its sublayer the older one has decided already.
        assert!(!ends(&policy, veto, 80));
        policy.remove_filter(&std::string::ToString::to_string(&filter)).unwrap();
        assert!(ends(&policy, veto, 80));
        let soft = add(&mut policy, "heavy", 81, FilterAction::Block { hard: false, veto: false });
        assert!(ends(&policy, soft, 81));
        add(&mut policy, "light", 81, FilterAction::Permit { hard: false });
        assert!(!ends(&policy, soft, 81));
    }

    #[test]
    fn a_block_ends_what_another_one_would_refuse_as_well() {
        let mut policy = policy();
        add(&mut policy, "heavy", 80, BLOCK);
        let filter = add(&mut policy, "light", 80, BLOCK);
        assert!(ends(&policy, filter, 80));
    }

    #[test]
    fn a_dead_service_ends_nothing() {
        let mut policy = policy();
        let cgroup = CgroupRef { path: "/s".into(), id: 1 };
        policy.add_service(NewService::new("s", "p", cgroup)).unwrap();
        let redirect = FilterAction::Redirect { service: "s".into(), context: None };
        add(&mut policy, "heavy", 80, redirect);
        let soft = add(&mut policy, "light", 81, BLOCK);
        assert!(!ends(&policy, soft, 80));
    }
}

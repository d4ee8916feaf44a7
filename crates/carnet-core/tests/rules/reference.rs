//! The decision against the naive model of it (the crate `carnet-reference`).

use carnet_core::{
    chain::Chain,
    classify::{Unobserved, classify},
    compile::compile,
    object::Policy,
};
use carnet_reference::{Answer, History, answer};
use proptest::prelude::*;

use crate::support::{Host, check_bounds, connections, policies, record};

/// Handles of the policy's services, by their number in it, and some that it does not have.
fn history(policy: &Policy, picks: &[usize], extra_legs: u32, forgotten_legs: u32) -> History {
    let handle = |pick: &usize| {
        policy.services().get(*pick).map_or(1 << 40 | *pick as u64, |service| service.handle)
    };
    let handles: Vec<u64> = picks.iter().map(handle).collect();
    let legs = handles.len() as u32 + extra_legs;
    History { handles, legs, forgotten_legs }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn the_decision_is_that_of_the_reference_model(
        policy in policies(),
        questions in prop::collection::vec(
            (
                connections(),
                prop::collection::vec(0_usize..9, 0..6),
                prop_oneof![3 => Just(0_u32), 1 => 0_u32..18],
                prop_oneof![2 => Just(0_u32), 1 => 0_u32..18],
                prop_oneof![Just(u8::MAX), any::<u8>()],
            ),
            24,
        ),
    ) {
        let compiled = compile(&policy, 1).unwrap();
        check_bounds(&compiled);
        for (connection, picks, extra_legs, forgotten_legs, alive) in questions {
            let history = history(&policy, &picks, extra_legs, forgotten_legs);
            let live = |handle| {
                let at = policy.services().iter().position(|s| s.handle == handle);
                alive & 1 << at.unwrap() != 0
            };
            let expected = answer(&policy, &connection, &history, &live);

            let record = record(&history.handles, history.legs);
            let chain = Chain::of_record(&compiled, &record);
            let mut host = Host { live: &live, forgotten_legs };
            let decision = classify(&compiled, &connection, &chain, &mut host, &mut Unobserved);
            let given = Answer::of_core(&policy, &decision);
            prop_assert_eq!(given, expected, "{:?} after {:?}", connection, history);
        }
    }
}

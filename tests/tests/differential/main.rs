//! The differential test: random policies and random flows, and three who decide about each.
//!
//! - The kernel: real sockets are connected, or send, in network namespaces with real services. What
//!   it decided is read from the errno, from who accepted, from what that service is told, and from the
//!   event; all of them have to agree.
//! - carnet-core on the host: the decision function over the host's tables.
//! - The naive model of the crate `carnet-reference`, which reads the administrator's objects.
//!
//! `cargo xtask differential` runs many cases, `cargo xtask test` some thousand. The seed is printed.
//! On a mismatch the policy is made as small as it can be with the mismatch, and everything is said in
//! words.

mod case;
mod judge;
mod random;
mod run;
mod shrink;
mod stage;
mod tally;

use std::{env, str::FromStr, time::Instant};

use carnet_tests::{Must as _, rounds};
use random::Random;
use stage::Stage;
use tally::Tally;

/// Flows under one policy that are open at the same time.
const BATCH: usize = 96;
/// Batches under one policy.
const BATCHES: usize = 3;
/// Most filters of a policy.
const MOST_FILTERS: u64 = 200;
/// Mismatches after which there is no need for more.
const ENOUGH: usize = 3;

#[test]
fn kernel_core_and_reference_decide_alike() {
    let seed = setting("CARNET_DIFFERENTIAL_SEED").unwrap_or_else(|| fastrand::u64(..));
    let cases = setting("CARNET_DIFFERENTIAL_CASES").unwrap_or_else(|| rounds(3000) as usize);
    println!("seed {seed}, {cases} cases");
    let mut random = Random::new(seed);
    let mut stage = Stage::new();
    stage.collect_records(&mut random);
    let began = Instant::now();
    let mut tally = Tally::default();
    while tally.cases() < cases && tally.mismatches() < ENOUGH {
        stage.change_policy(&mut random, MOST_FILTERS);
        tally.policy(&stage.policy);
        for _ in 0..BATCHES {
            let batch = case::batch(&stage, &mut random, BATCH);
            let results = run::carry_out(&mut stage, &batch);
            for (at, result) in results.iter().enumerate() {
                tally.count(&stage.policy, &batch[at], result);
            }
            if let Some(at) = results.iter().position(|result| !result.agrees()) {
                println!("\n{}", shrink::shrink(&mut stage, &batch, at, &results[at]));
                break;
            }
        }
    }
    println!("\n{tally}\n{:.1} s; seed {seed}", began.elapsed().as_secs_f64());
    assert!(tally.mismatches() == 0, "decisions differ: see above; seed {seed}");
    let missing = tally.missing();
    let enough = tally.cases() >= 3000;
    assert!(!enough || missing.is_empty(), "outcomes that no case had: {missing:?}; seed {seed}");
}

/// A number from the environment.
fn setting<T: FromStr>(name: &str) -> Option<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text = env::var(name).ok()?;
    Some(text.parse().must(&format!("read the number in {name}")))
}

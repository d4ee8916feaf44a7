//! Carnet end to end: what the tests in `tests/e2e` need.
//!
//! - [`Lab`]: a scope of its own with an engine, two network namespaces, a destination that echoes,
//!   and whatever services a test wants. Nothing of it outlives the value.
//! - [`Running`]: a redirect service at work (the program `test-service`, on the library `carnet`),
//!   which reports what it knows of every connection.
//! - [`hosts::Hosts`]: two labs, as two hosts, and what goes from one to the other.
//! - [`puppet::Puppet`]: a process that makes single socket calls as the test tells it to.
//! - [`caller::Caller`]: a process that makes many calls at an order, one after another.
//! - [`tracer`]: runs a command and kills it at a system call.
//! - [`web`]: a web server and a client whose flows can be told apart in logs.
//! - [`dns`]: a resolver that answers anything.
//! - [`foreign`]: BPF programs of others, beside Carnet's.
//! - [`netfilter`]: rules of nftables.
//! - [`contract`]: the C programs of the contract suite, and what they ask of a lab.
//!
//! All of it panics when something does not work that is not what is being tested, and says what.
//! Everything that waits is bounded. Root is needed: a test without root fails, in words.

use std::{
    env,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

pub mod caller;
pub mod contract;
pub mod dns;
pub mod foreign;
pub mod hosts;
mod lab;
pub mod netfilter;
mod orders;
pub mod puppet;
pub mod service;
pub mod sys;
pub mod tracer;
pub mod web;

pub use lab::{Anything, Lab, Network, Occupied, Places, Plan, Trace, handed_on, reference_of};
pub use service::{Report, Running};

/// The longest that a test waits for anything that takes moments, even on an emulated processor.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How many rounds a test of load goes: so many, or fewer where `cargo xtask vm` says so, since the
/// processor is emulated there.
pub fn rounds(ordinarily: u32) -> u32 {
    let set = env::var("CARNET_TESTS_ROUNDS").ok().and_then(|number| number.parse().ok());
    set.unwrap_or(ordinarily)
}

/// Success, or a panic that says what did not work and why, with all causes.
pub trait Must<T> {
    /// The value. `what` completes the sentence "cannot …".
    #[track_caller]
    fn must(self, what: &str) -> T;
}

impl<T, E: Into<Anything>> Must<T> for Result<T, E> {
    fn must(self, what: &str) -> T {
        match self {
            Ok(value) => value,
            Err(error) => {
                let error: Anything = error.into();
                let mut message = error.to_string();
                let mut cause = error.source();
                while let Some(error) = cause {
                    message = format!("{message}: {error}");
                    cause = error.source();
                }
                panic!("cannot {what}: {message}");
            }
        }
    }
}

/// A program of this workspace, which lies in the directory of the running executable or in the one
/// above.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    let executable = env::current_exe().must("find the running executable");
    let places = executable.ancestors().skip(1).take(2).map(|place| place.join(name));
    let found = places.clone().find(|path| path.is_file());
    found.unwrap_or_else(|| {
        let places: Vec<_> = places.collect();
        panic!("{name} is none of {places:?}: build it with `cargo build --workspace`")
    })
}

/// Waits until a condition holds that nothing announces; panics after [`PATIENCE`]. `state` is what
/// the condition is about.
#[track_caller]
pub fn until<T: std::fmt::Debug>(
    what: &str,
    mut state: impl FnMut() -> T,
    holds: impl Fn(&T) -> bool,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = state();
        if holds(&now) {
            return now;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for {what}: {now:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

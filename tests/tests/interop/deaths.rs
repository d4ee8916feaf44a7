//! A program of a chain that is killed while flows pass.

use std::time::{Duration, Instant};

use carnet_core::{classify::Reason, event::EventKind, object::FailurePolicy};
use carnet_tests::{Plan, until, web};

use crate::{
    chains::destinations,
    product::Product,
    products::{ENVOY, HAPROXY, MITMPROXY, SQUID},
    scene::{Member, Scene},
};

/// How many flows there are at a time.
const AT_A_TIME: u32 = 4;
/// How many flows have to have passed before a program is killed.
const BEFORE: usize = 40;
const FLOWS: u32 = 400;
/// A refusal that takes longer has not come at once.
const AT_ONCE: Duration = Duration::from_secs(5);

/// The chain of which one is killed.
fn chain(of: [&'static Product; 3], on_failure: FailurePolicy) -> Scene {
    let plan = Plan { on_failure, ..Plan::default() };
    Scene::with(&of.map(|product| Member::Product(product)), &plan)
}

fn flows(first: u32, count: u32) -> web::Plan {
    let to = destinations();
    web::Plan { first, to: to.clone(), workers: AT_A_TIME, ..web::Plan::new(to[0], count) }
}

/// Kills each of three products while flows pass.
#[track_caller]
fn passed_over(of: [&'static Product; 3]) {
    let mut scene = chain(of, FailurePolicy::Skip);
    let mut first = 0;
    for (place, product) in of.iter().enumerate() {
        scene.server.forget();
        let client = web::start_client(&scene.lab, &flows(first, FLOWS));
        first += FLOWS;
        let passed = || scene.server.requests().len();
        until("some flows to pass", passed, |count| *count >= BEFORE);
        scene.kill(place);
        let gone = web::now();
        let fetched = web::finish_client(client, carnet_tests::PATIENCE);
        let lost = fetched.iter().filter(|flow| flow.failure.is_some());
        let later: Vec<_> = lost.clone().filter(|flow| flow.began > gone).collect();
        assert!(later.is_empty(), "{} is gone, and lost are {later:?}", product.name);
        // What was inside is lost, and no worker has more than one flow at a time; but while the kernel
        // takes the program's sockets away one by one, the next one may still get in.
        let lost = lost.count();
        assert!(lost <= 2 * AT_A_TIME as usize, "{}: {lost} flows were lost", product.name);
        assert_eq!(fetched.len(), FLOWS as usize);
        scene.skip_logs();
        // The others go on without it,
        scene.fetch(&flows(first, 12)).unwrap_or_else(|fault| panic!("{}: {fault}", product.name));
        first += 12;
        // and with it, as soon as it is back, without a word from anybody.
        scene.start(place);
        scene.fetch(&flows(first, 12)).unwrap_or_else(|fault| panic!("{}: {fault}", product.name));
        first += 12;
        println!("{} killed in place {}: {lost} of {FLOWS} flows lost", product.name, place + 1);
    }
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn under_skip_only_what_was_inside_is_lost() {
    passed_over([&SQUID, &HAPROXY, &ENVOY]);
    passed_over([&ENVOY, &MITMPROXY, &SQUID]);
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn under_block_new_flows_are_refused_at_once_with_the_reason() {
    let of = [&HAPROXY, &SQUID, &ENVOY];
    for place in 0..of.len() {
        let mut scene = chain(of, FailurePolicy::Block);
        scene.fetch(&flows(0, 12)).unwrap_or_else(|fault| panic!("{fault}"));
        scene.server.forget();
        let mut trace = scene.lab.trace();
        let name = scene.links[place].name.clone();
        scene.kill(place);
        let begun = Instant::now();
        let fetched = web::fetch(&scene.lab, &flows(12, 3));
        assert!(begun.elapsed() < AT_ONCE, "{name}: it took {:?}", begun.elapsed());
        assert!(fetched.iter().all(|flow| flow.failure.is_some()), "{name}: {fetched:?}");
        if place == 0 {
            let refused = fetched.iter().all(|flow| flow.refused == Some(libc::ECONNREFUSED));
            assert!(refused, "{name}: {fetched:?}");
        }
        assert_eq!(scene.server.requests(), [], "{name}: a flow arrived");
        let refusal = trace.first(EventKind::Blocked);
        assert_eq!(refusal.handle, scene.lab.handle_of(&name), "{refusal:#?}");
        assert_eq!(refusal.reason, Reason::ServiceUnavailable as u32);
        // It comes back, and so do the flows.
        scene.start(place);
        scene.skip_logs();
        scene.fetch(&flows(15, 12)).unwrap_or_else(|fault| panic!("{name}: {fault}"));
    }
}

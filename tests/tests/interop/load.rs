//! Many flows through three programs that know nothing of Carnet.

use std::fs;

use carnet_tests::{rounds, until, web};

use crate::{
    chains::destinations,
    products::{ENVOY, HAPROXY, SQUID},
    scene::{Member, Scene},
};

/// How many flows at a time.
const AT_A_TIME: u32 = 32;
/// What the programs may still close after their last flow.
const SLACK: usize = 2;

/// The descriptors of sockets that each of some processes has.
fn sockets_of(processes: &[u32]) -> Vec<usize> {
    let count = |pid: &u32| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let target = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
        let is_socket = |path: &std::path::PathBuf| path.to_string_lossy().starts_with("socket:");
        entries.filter_map(target).filter(is_socket).count()
    };
    processes.iter().map(count).collect()
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn ten_thousand_flows_through_three_unmodified_products() {
    let members = [&SQUID, &HAPROXY, &ENVOY].map(|product| Member::Product(product));
    let mut scene = Scene::new(&members);
    let mut plan = web::Plan {
        to: destinations(),
        workers: AT_A_TIME,
        ..web::Plan::new(destinations()[0], 10 * AT_A_TIME)
    };
    // What a program opens at its first flows and keeps.
    scene.fetch(&plan).unwrap_or_else(|fault| panic!("{fault}"));
    let processes = scene.processes();
    let before = sockets_of(&processes);
    plan.first = plan.count;
    plan.count = rounds(10_000);
    let begun = std::time::Instant::now();
    scene.fetch(&plan).unwrap_or_else(|fault| panic!("{fault}"));
    let (count, took) = (plan.count, begun.elapsed());
    println!("{count} flows through squid -> haproxy -> envoy in {:.1} s", took.as_secs_f64());

    let grown =
        |now: &Vec<usize>| now.iter().zip(&before).any(|(now, before)| *now > before + SLACK);
    until("the programs to close their sockets", || sockets_of(&processes), |now| !grown(now));
    scene.lab.settle_sockets();
}

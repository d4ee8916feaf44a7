//! The programs are replaced and the policy is changed by the real command, again and again, while
//! connections and datagrams go through two services at full rate.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use carnet_testbed::{DatagramClients, datagrams::DatagramPlan};
use carnet_tests::{Must as _, PATIENCE, Running, handed_on};

use crate::{
    row::{Row, thorough},
    stage::Stage,
};

/// Connections, and clients of UDP, in a wave.
const CONNECTIONS: u64 = 100;
const CLIENTS: u32 = 50;

#[test]
fn nothing_is_lost_under_load() {
    let mut row = Row::new("upgrade", "upgrade and transactions under load, TCP and UDP");
    let times = if thorough() { 25 } else { 3 };
    let stage = Stage::new();
    for (name, weight) in [("alpha", 10), ("bravo", 5)] {
        stage.lab.service(name, weight);
        stage.start(name);
    }
    let done = AtomicBool::new(false);
    let going_on = || !done.load(Ordering::Acquire);
    let (tcp, udp) = thread::scope(|scope| {
        let tcp = scope.spawn(|| {
            let client =
                stage.lab.client(stage.lab.v4()).count(CONNECTIONS).parallel(8).bytes(4000);
            let mut reports = Vec::new();
            while going_on() {
                reports.extend(client.run().must("run the clients"));
            }
            reports
        });
        let udp = scope.spawn(|| {
            let to = vec![stage.datagrams.address()];
            let (window, timeout) = (64, Duration::from_secs(30));
            let plan = DatagramPlan {
                to,
                clients: CLIENTS,
                rounds: 20,
                window,
                connected: false,
                timeout,
            };
            let mut reports = Vec::new();
            while going_on() {
                let namespace = &stage.lab.network().topology.client;
                let clients =
                    DatagramClients::start(&plan, Some(namespace), Some(stage.lab.apps()));
                reports.push(clients.must("start clients").finish(PATIENCE).must("run clients"));
            }
            reports
        });
        for _ in 0..times {
            row.try_one();
            for line in [
                "upgrade",
                "filter add --sublayer bravo --name other --block --to 203.0.113.1",
                "filter rm other",
            ] {
                let (success, said) = stage.run(&line.split(' ').collect::<Vec<_>>());
                row.check(success, || format!("{line} failed: {said}"));
            }
        }
        done.store(true, Ordering::Release);
        (tcp.join().expect("the connections' thread"), udp.join().expect("the datagrams' thread"))
    });
    for report in &tcp {
        if report.ok {
            row.flow();
        } else {
            row.lost(format!("{report:?}"));
        }
    }
    for report in &udp {
        if report.is_perfect() {
            (0..CLIENTS).for_each(|_| row.flow());
        } else {
            row.lost(format!("{report:?}"));
        }
    }
    // Each flow passed both, each once.
    let count = tcp.len() + udp.len() * CLIENTS as usize;
    let handles = ["alpha", "bravo"].map(|name| stage.lab.handle_of(name));
    let running: Vec<Running> = std::mem::take(&mut *stage.services()).into_values().collect();
    let chain: Vec<_> = handles.into_iter().zip(running.into_iter().map(Running::finish)).collect();
    let once = std::panic::catch_unwind(|| handed_on(&chain, count));
    if once.is_err() {
        row.uninspected("not every flow passed both services, each once: see above".into());
    }
    row.came("every flow inspected once by both");
    row.conclude();
}

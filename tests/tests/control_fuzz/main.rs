//! Arbitrary calls of the control interface: levels, option names, lengths and pointers, from many
//! threads, on sockets of every kind, while flows come and go.
//!
//! Three processes hammer at an instance: one in a service's cgroup, where the hooks are, one among the
//! applications and one outside of the scope. What has to hold for every call is in `worker.rs` and
//! `twins.rs`. Afterwards the kernel's log has no complaint, and the instance redirects as before.
//!
//! This is a driver of its own and no target of libFuzzer: the code that answers runs in the kernel,
//! where no coverage is seen, and who may do what hangs on processes, cgroups and namespaces. The seed
//! is printed. `cargo xtask fuzz --target control_interface --seconds N` makes it longer than the few
//! seconds of `cargo xtask test`.

mod memory;
mod sockets;
mod tally;
mod twins;
mod worker;

use std::{env, fs, io::Read as _, os::unix::fs::OpenOptionsExt as _, process::Command};

use carnet_testbed::Process;
use carnet_tests::{Lab, Must as _, PATIENCE, Plan};
use tally::Tally;

/// How long the hammering goes on without another wish.
const SECONDS: u64 = 3;
/// What the kernel says when something is wrong with it.
const COMPLAINTS: [&str; 7] =
    ["WARNING:", "BUG:", "Oops", "general protection", "KASAN", "UBSAN", "blocked for more than"];

#[test]
fn nothing_shakes_the_control_interface() {
    let seconds = env::var("CARNET_CONTROL_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let seconds = seconds.unwrap_or(SECONDS);
    let seed = fastrand::u64(..);
    println!("seed {seed}, {seconds} s");
    let mut log = kernel_log();
    let lab = Lab::new();
    let context = Some(b"context".to_vec());
    lab.service_with("alpha", Plan { context, gateway: true, ..Plan::default() });
    let outside = carnet_testbed::Cgroup::create("carnet-e2e-outside").must("make a cgroup");
    let inside = lab.cgroup_of("alpha");
    let places = [("a service", &*inside), ("an application", lab.apps()), ("outside", &outside)];
    let mut workers = Vec::new();
    for (number, (name, cgroup)) in places.into_iter().enumerate() {
        // It begins outside, where it makes the twins of its sockets, and is moved then.
        let mut command = Command::new(env::current_exe().must("find the running program"));
        command.args(["worker", "--exact", "--ignored", "--nocapture"]);
        command
            .env(worker::SEED, (seed ^ number as u64).to_string())
            .env(worker::SECONDS, seconds.to_string())
            .env(worker::DESTINATIONS, format!("{} {}", lab.v4(), lab.v6()));
        outside.enter_command(&mut command).must("enter a cgroup");
        lab.network().topology.client.enter_command(&mut command).must("enter a namespace");
        let process = Process::spawn(&mut command).must("start a worker");
        process.wait_for_line("a worker", PATIENCE, |line| line == worker::READY).must("wait");
        cgroup.add_process(process.id()).must("move a worker");
        workers.push((name, process));
    }
    for (_, process) in &mut workers {
        process.close_input();
    }
    let limit = PATIENCE + std::time::Duration::from_secs(seconds);
    for (name, mut process) in workers {
        let status = process.wait(limit).must("wait for a worker: does a call hang?");
        let lines = process.lines();
        assert!(status.success(), "{name}: {status}\n{}", lines.join("\n"));
        let tally = lines.iter().find_map(|line| Tally::from_line(line)).expect("a tally");
        println!("\n{name}:\n{tally}");
        assert!(tally.calls() > 0);
    }

    let complaints: Vec<_> = log.as_mut().map(new_complaints).unwrap_or_default();
    assert!(complaints.is_empty(), "the kernel complains: {complaints:#?}");
    if log.is_none() {
        println!("the kernel's log cannot be read here");
    }
    // A well-behaved flow gets through a well-behaved service.
    lab.settle();
    let service = lab.start("alpha");
    for to in [lab.v4(), lab.v6()] {
        lab.exchange(to);
    }
    lab.settle();
    let handle = lab.handle_of("alpha");
    carnet_tests::handed_on(&[(handle, service.finish())], 2);
}

/// The hammering, which the test starts in processes of their own.
#[test]
#[ignore = "a part of the other test"]
fn worker() {
    worker::work();
}

/// The kernel's log from now on.
fn kernel_log() -> Option<fs::File> {
    let mut options = fs::File::options();
    let mut log = options.read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok()?;
    std::io::Seek::seek(&mut log, std::io::SeekFrom::End(0)).ok()?;
    Some(log)
}

fn new_complaints(log: &mut fs::File) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut entry = [0; 8192];
    // An entry a read; an error at the end.
    while let Ok(length @ 1..) = log.read(&mut entry) {
        let text = String::from_utf8_lossy(&entry[..length]);
        if COMPLAINTS.iter().any(|complaint| text.contains(complaint)) {
            complaints.push(text.into_owned());
        }
    }
    complaints
}

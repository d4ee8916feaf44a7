//! OpenSnitch, an application firewall, in the clients' network namespace: it is asked about each leg of a
//! flow, and refuses what its rules do not allow.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use carnet_engine::doctor::{self, Finding};
use carnet_testbed::{Cgroup, Process, Topology};
use carnet_tests::{Lab, Must as _, contract::Scratch, program, until, web};

use crate::{
    product::installed,
    products::HAPROXY,
    scene::{Member, Scene, port_of},
};

const FLOWS: u32 = 3;
/// How long a flow waits whose packets OpenSnitch drops.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is not allowed is dropped. Nobody is asked.
const CONFIGURATION: &str = r#"{
  "Server": { "Address": "unix://DIRECTORY/nobody", "LogFile": "DIRECTORY/log" },
  "DefaultAction": "deny", "DefaultDuration": "once", "InterceptUnknown": true,
  "ProcMonitorMethod": "proc", "LogLevel": 0, "Firewall": "iptables",
  "Stats": { "MaxEvents": 150, "MaxStats": 25 }
}"#;

/// Allows what a program connects to.
fn rule(name: &str, program: &Path, to: SocketAddr) -> String {
    let is = |operand: &str, data: String| serde_json::json!({ "type": "simple", "operand": operand, "sensitive": false, "data": data });
    let list = [
        is("process.path", program.display().to_string()),
        is("dest.ip", to.ip().to_string()),
        is("dest.port", to.port().to_string()),
    ];
    let operator = serde_json::json!({ "type": "list", "operand": "list", "list": list });
    let rule = serde_json::json!({
        "name": name, "enabled": true, "action": "allow", "duration": "always", "operator": operator,
        "created": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
    });
    rule.to_string()
}

/// Starts it, in a cgroup with which Carnet has nothing to do. It is asked from then on.
#[track_caller]
fn start(lab: &Lab, cgroup: &Cgroup, scratch: &Scratch) -> Process {
    let directory = scratch.path();
    let configuration = CONFIGURATION.replace("DIRECTORY", &directory.display().to_string());
    fs::write(directory.join("default-config.json"), configuration).must("write a file");
    fs::write(directory.join("system-fw.json"), r#"{ "SystemRules": [] }"#).must("write a file");
    let script = "mount --bind \"$1\" /etc/opensnitchd; exec \"$2\" -rules-path \"$1/rules\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-euc", script, "sh"]).arg(directory);
    command.arg(installed("opensnitchd"));
    cgroup.enter_command(&mut command).must("enter the cgroup");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start OpenSnitch");
    let scope = lab.scope().path();
    let findings = || doctor::examine(Some(scope));
    until("OpenSnitch to be asked", findings, |findings| {
        finds(findings, "packet queue", "opensnitchd")
            && finds(findings, "packet filters", "mangle")
    });
    process
}

/// Whether the doctor has found this, in whatever network namespace.
fn finds(findings: &[Finding], name: &str, what: &str) -> bool {
    findings.iter().any(|finding| finding.name == name && finding.detail.contains(what))
}

/// How many packets OpenSnitch has been asked about: those of its queue, as the kernel counts them.
#[track_caller]
fn asked(lab: &Lab) -> u64 {
    let read = || fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
    let table = lab.network().topology.client.run(read).must("enter the namespace");
    let table = table.must("read the kernel's list of queues");
    let queue = table.lines().find(|line| line.trim_start().starts_with("0 "));
    let count = queue.and_then(|line| line.split_whitespace().nth(7));
    count.and_then(|count| count.parse().ok()).expect("the queue's count")
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn opensnitch_is_asked_about_each_leg() {
    let mut scene = Scene::new(&[Member::Product(&HAPROXY)]);
    let [v4, v6] = [Topology::DESTINATION_V4.into(), IpAddr::from(Topology::DESTINATION_V6)]
        .map(|ip| SocketAddr::new(ip, web::PORT));
    let scratch = Scratch::new();
    let rules = scratch.path().join("rules");
    fs::create_dir(&rules).must("make a directory");
    let service = (Ipv4Addr::LOCALHOST, port_of(0)).into();
    for (name, program, to) in [
        ("application", program("test-web-client"), service),
        ("service", installed("haproxy"), v4),
    ] {
        let file = rules.join(format!("{name}.json"));
        fs::write(file, rule(name, &program, to)).must("write a rule");
    }
    let apart = Cgroup::create("carnet-interop-opensnitch").must("make a cgroup");
    let _opensnitch = start(&scene.lab, &apart, &scratch);

    // The application's leg to the service is allowed, and the service's to the destination,
    let before = asked(&scene.lab);
    scene.fetch(&web::Plan::new(v4, FLOWS)).unwrap_or_else(|fault| panic!("{fault}"));
    let packets = asked(&scene.lab) - before;
    // One SYN of each leg, or more where its answer takes long.
    assert!(packets >= u64::from(2 * FLOWS), "{packets}");

    // and nothing over IPv6.
    scene.server.forget();
    let plan = web::Plan { first: FLOWS, patience: PATIENCE, ..web::Plan::new(v6, 1) };
    let fetched = web::fetch(&scene.lab, &plan);
    assert!(fetched.iter().all(|flow| flow.failure.is_some()), "{fetched:?}");
    assert_eq!(scene.server.requests(), []);
    let log = fs::read_to_string(scratch.path().join("log")).must("read OpenSnitch's log");
    let leg = format!("-> ::1:{}", port_of(0));
    assert!(log.lines().any(|line| line.contains(&leg)), "{log}");
}

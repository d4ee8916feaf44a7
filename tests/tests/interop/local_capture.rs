//! mitmproxy's local capture beside Carnet: the true program, at a cgroup of the test's own.
//!
//! mitmproxy attaches a BPF program to what is mounted at `/sys/fs/cgroup`, elsewhere the root cgroup. Here
//! that is the scope, in a mount and a cgroup namespace of mitmproxy's own. The program binds the new sockets
//! of the programs that are to be captured to a device, from which mitmproxy reads their packets.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Output},
};

use carnet_core::{
    event::Counter,
    object::{CgroupCondition, Conditions},
};
use carnet_engine::{
    Engine,
    doctor::{self, State},
};
use carnet_testbed::{Cgroup, Process, Topology};
use carnet_tests::{Lab, Must as _, PATIENCE, Plan, contract::Scratch, until, web::WebServer};

use crate::{
    chains::destinations,
    product::{Logged, installed, tool},
    products::MITMPROXY,
};

/// Has mitmproxy see the cgroup that it is in as the root of all, and moves it to another one, with whose
/// connections Carnet has nothing to do.
const STAGE: &str = "echo $$ > \"$1\"; shift; umount --lazy /sys/fs/cgroup; \
                     mount -t cgroup2 none /sys/fs/cgroup; test -d /sys/fs/cgroup/apps; exec \"$@\"";

/// mitmproxy 12, where the set-up found a Python that is new enough for it.
fn mitmproxy() -> Option<PathBuf> {
    let program = tool("tools/local-capture/bin/mitmdump");
    if program.is_none() {
        println!("skipped: there is no Python 3.12 for mitmproxy 12, see `cargo xtask interop`");
    }
    program
}

/// Starts mitmproxy, which captures what `curl` connects to from the lab's scope.
#[track_caller]
fn start(program: PathBuf, lab: &Lab, cgroup: &Cgroup, scratch: &Scratch) -> Process {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--cgroup", "sh", "-euc", STAGE, "sh"]);
    command.arg(cgroup.path().join("cgroup.procs")).arg(program);
    command.args(["--mode", "local:curl", "--set", "flow_detail=1", "--set"]);
    command.arg(format!("confdir={}", scratch.path().display())).env("PYTHONUNBUFFERED", "1");
    lab.scope().enter_command(&mut command).must("enter the scope");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start mitmproxy");
    let has_started = |line: &str| line.contains("Local redirector started");
    process.wait_for_line("mitmproxy's start", PATIENCE, has_started).must("wait for mitmproxy");
    process
}

/// Runs curl in a cgroup, as this user.
#[track_caller]
fn curl(lab: &Lab, cgroup: &Cgroup, user: u32, to: SocketAddr, path: &str) -> Output {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={user}")).args(["--clear-groups", "--inh-caps=-all"]);
    command.arg(installed("curl")).args(["-q", "-sS", "--noproxy", "*", "--max-time", "60"]);
    command.arg(format!("http://{to}{path}"));
    cgroup.enter_command(&mut command).must("enter the cgroup");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    command.output().must("run curl")
}

/// The flows in mitmproxy's log.
fn captured(mitmproxy: &Process) -> Vec<Logged> {
    mitmproxy.lines().iter().filter_map(|line| (MITMPROXY.read)(line)).collect()
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn mitmproxys_local_capture_takes_what_no_filter_redirects() {
    let Some(program) = mitmproxy() else { return };
    let lab = Lab::new();
    let addresses = [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
    let server = WebServer::start(&lab.network().topology.destination, &addresses);
    // Only what comes out of one of the scope's cgroups goes to the service.
    let path = lab.apps().path();
    let (id, level) = Engine::resolve_cgroup(path).must("resolve the cgroup");
    let cgroups = vec![CgroupCondition { path: path.display().to_string(), id, level }];
    let conditions = Conditions { cgroups, ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.start("alpha");
    let others = lab.scope().child("others").must("make a cgroup");
    let apart = Cgroup::create("carnet-interop-mitmproxy").must("make a cgroup");
    let scratch = Scratch::new();
    let mitmproxy = start(program, &lab, &apart, &scratch);

    let findings = doctor::examine(Some(lab.scope().path()));
    let finding = findings.iter().find(|finding| finding.name == "programs on new sockets");
    let finding = finding.expect("the finding");
    assert_eq!(finding.state, State::Warning, "{finding:?}");
    assert!(finding.detail.contains("mitmproxy's local capture"), "{finding:?}");

    for (turn, to) in destinations().into_iter().enumerate() {
        // Where no filter wants the flow, mitmproxy gets it,
        let path = format!("/captured-{turn}");
        let output = curl(&lab, &others, 65534, to, &path);
        assert_eq!(String::from_utf8_lossy(&output.stdout), path, "{to}: {output:?}");
        // and else the service. The device is let go of for who may,
        let path = format!("/redirected-{turn}");
        let output = curl(&lab, lab.apps(), 0, to, &path);
        assert_eq!(String::from_utf8_lossy(&output.stdout), path, "{to}: {output:?}");
        // and who may not is refused at once.
        let output = curl(&lab, lab.apps(), 65534, to, "/refused");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("Couldn't connect"), "{to}: {said}");
        assert_eq!(lab.counter(Counter::BoundToDevice), turn as u64 + 1, "{to}");
    }

    lab.settle();
    let arrived: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
    let due = [0, 1, 2].map(|turn| [format!("/captured-{turn}"), format!("/redirected-{turn}")]);
    assert_eq!(arrived, due.as_flattened());
    let logged = until("mitmproxy's log", || captured(&mitmproxy), |logged| logged.len() >= 3);
    let paths: Vec<_> = logged.into_iter().filter_map(|one| one.path).collect();
    assert_eq!(paths, due.map(|[captured, _]| captured));
    let originals: Vec<_> = service.finish().into_iter().map(|report| report.original).collect();
    assert_eq!(originals, destinations());
}

//! A true systemd, as the first process of a pid namespace: it starts the instance with the packaged unit, a
//! proxy in a slice of its own, and applications, with its own BPF programs at their cgroups.
//!
//! It keeps to the cgroup in which it was started, as in a container, cannot write to the kernel's parameters,
//! and knows the units of the test alone.

use std::{
    env, fs,
    process::{Command, Output},
};

use carnet_engine::doctor;
use carnet_testbed::{Cgroup, Process, Topology};
use carnet_tests::{Must as _, contract::Scratch, program, until, web::WebServer};

use crate::{product::installed, products::HAPROXY};

/// The units, and what they need, by their names. `DIRECTORY` is where that lies, `ROOT` systemd's cgroup.
const FILES: [(&str, &str); 8] = [
    ("units/carnet@.service", include_str!("../../../packaging/systemd/carnet@.service")),
    ("units/carnet@default.service.d/proxy.conf", include_str!("units/proxy.conf")),
    ("units/carnet-proxy.slice", include_str!("units/carnet-proxy.slice")),
    ("units/proxy.service", include_str!("units/proxy.service")),
    ("units/open.service", include_str!("units/open.service")),
    ("units/closed.service", include_str!("units/closed.service")),
    ("haproxy.cfg", include_str!("units/haproxy.cfg")),
    ("default.env", "CARNET_UP=--cgroup ROOT/system.slice\n"),
];

/// What has to be there before a systemd starts.
const STAGE: &str = "mount -t tmpfs run /run\n\
                     mount -t bpf bpf /sys/fs/bpf\n\
                     umount --lazy /sys/fs/cgroup\n\
                     mount -t cgroup2 cgroup /sys/fs/cgroup\n\
                     mount --bind /proc/sys /proc/sys\n\
                     mount -o remount,bind,ro /proc/sys\n\
                     exec /lib/systemd/systemd --system --unit=default.target --log-target=console";

/// The policy, which is said once. From then on it is in a file. systemd makes `/system.slice` for the first
/// unit in it; in this first run there is none.
const POLICY: &str = "systemctl start carnet-proxy.slice\n\
                      mkdir /sys/fs/cgroup$ROOT/system.slice\n\
                      carnet up --cgroup $ROOT/system.slice\n\
                      carnet provider add me\n\
                      carnet sublayer add web --provider me\n\
                      carnet service add haproxy --provider me --unmodified --tproxy \
                      --listen-port 15001 --on-failure block --unit carnet-proxy.slice\n\
                      carnet filter add --sublayer web --redirect haproxy --port 80\n\
                      carnet export > default.json\n\
                      carnet down";

/// A machine, as far as systemd can tell.
struct Machine {
    systemd: Option<Process>,
    cgroup: Cgroup,
    scratch: Scratch,
    topology: Topology,
}

impl Machine {
    /// Writes its files; it is not started yet.
    #[track_caller]
    fn new() -> Self {
        let topology = Topology::client_and_destination().must("make a network");
        let cgroup = Cgroup::create("carnet-interop-systemd").must("make a cgroup");
        let scratch = Scratch::new();
        let machine = Self { systemd: None, cgroup, scratch, topology };
        FILES.iter().for_each(|(name, text)| machine.write(name, text));
        machine
    }

    /// Its cgroup, as `/proc/PID/cgroup` has it.
    #[track_caller]
    fn root(&self) -> String {
        let mount = carnet_engine::cgroup::mount_point().must("find the cgroup2 hierarchy");
        let below = self.cgroup.path().strip_prefix(mount).must("name a cgroup");
        format!("/{}", below.display())
    }

    #[track_caller]
    fn write(&self, name: &str, text: &str) {
        let file = self.scratch.path().join(name);
        fs::create_dir_all(file.parent().expect("a directory")).must("make a directory");
        let text = text
            .replace("/etc/carnet", "DIRECTORY")
            .replace("ROOT", &self.root())
            .replace("DIRECTORY", &self.scratch.path().display().to_string())
            .replace("/usr/bin/carnet", &program("carnet").display().to_string())
            .replace("HAPROXY", &installed("haproxy").display().to_string())
            .replace("CURL", &installed("curl").display().to_string());
        fs::write(file, text).must("write a file");
    }

    /// Starts it, anew if it runs, with what this target wants. All that it had in the kernel is gone.
    #[track_caller]
    fn boot(&mut self, target: &str) {
        self.cgroup.kill().must("end all processes");
        self.write("units/default.target", target);
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--ipc"]);
        command.args(["--uts", "sh", "-euc", STAGE]).env("container", "other");
        command.env("SYSTEMD_UNIT_PATH", self.scratch.path().join("units"));
        self.cgroup.enter_command(&mut command).must("enter the cgroup");
        self.topology.client.enter_command(&mut command).must("enter the namespace");
        self.systemd = Some(Process::spawn(&mut command).must("start systemd"));
        let state = || self.systemctl("is-system-running --quiet").status.success();
        until("systemd to have started", state, |runs| *runs);
    }

    /// Runs lines of a shell in it.
    #[track_caller]
    fn run(&self, script: &str) -> Output {
        let systemd = self.systemd.as_ref().expect("a machine that runs").id();
        let children = format!("/proc/{systemd}/task/{systemd}/children");
        let children = fs::read_to_string(children).must("find the first process");
        let mut command = Command::new("nsenter");
        command.args(["--target", children.trim(), "--mount", "--pid", "--net"]);
        command.args(["--wd=."]).args(["bash", "-euc", script]).current_dir(self.scratch.path());
        let path = env::var_os("PATH").unwrap_or_default();
        let own = program("carnet").parent().expect("a directory").to_owned();
        let path = env::join_paths([own].into_iter().chain(env::split_paths(&path)));
        command.env("PATH", path.must("write a path")).env("ROOT", self.root());
        command.output().must("run a shell")
    }

    #[track_caller]
    fn systemctl(&self, arguments: &str) -> Output {
        self.run(&format!("systemctl {arguments}"))
    }

    /// Runs lines of a shell in it, which have to succeed.
    #[track_caller]
    fn succeeds(&self, script: &str) {
        let output = self.run(script);
        let log = self.systemd.as_ref().map(Process::lines);
        assert!(output.status.success(), "{script}: {output:#?} {log:#?}");
    }

    /// How many flows the proxy has logged.
    fn logged(&self) -> usize {
        let text = fs::read_to_string(self.scratch.path().join("proxy.log")).unwrap_or_default();
        text.lines().filter_map(HAPROXY.read).count()
    }
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn systemd_starts_the_instance_and_a_proxy_and_filters_addresses_beside_it() {
    let mut machine = Machine::new();
    let server =
        WebServer::start(&machine.topology.destination, &[Topology::DESTINATION_V4.into()]);
    let arrived = || {
        let requests = server.requests().into_iter();
        requests.map(|request| request.path).collect::<Vec<_>>()
    };
    machine.boot("[Unit]\nDescription=Nothing\n");
    machine.succeeds(POLICY);

    // At the next start it is all there.
    machine.boot("[Unit]\nWants=proxy.service\n");
    machine.succeeds("carnet service wait haproxy");
    machine.succeeds("systemctl start open.service");
    assert_eq!(arrived(), ["/open"]);
    until("the proxy's log", || machine.logged(), |logged| *logged == 1);

    // To systemd's filter a redirected connection is one to loopback, where this unit may not go.
    assert!(!machine.systemctl("start closed.service").status.success());
    assert_eq!(arrived(), ["/open"]);
    let findings = doctor::examine(Some(machine.cgroup.path()));
    let finding = findings.iter().find(|finding| finding.name == "programs on packets");
    let finding = finding.expect("the finding");
    let filter = "sd_fw_egress of systemd";
    let named = finding.detail.contains(filter) && finding.detail.contains("proxy.service");
    assert!(named, "{finding:?}");

    // A unit that is started anew has a new cgroup, and its slice the same.
    let process = || machine.systemctl("show --property MainPID --value proxy.service").stdout;
    let killed = process();
    machine.succeeds("systemctl kill --signal=KILL proxy.service");
    let is_new = |process: &Vec<u8>| *process != killed && process != b"0\n";
    until("the proxy to be started anew", process, is_new);
    machine.succeeds("carnet service wait haproxy");
    machine.succeeds("systemctl start open.service");
    assert_eq!(arrived(), ["/open", "/open"]);
    // Its log has begun anew as well.
    until("the proxy's log", || machine.logged(), |logged| *logged == 1);

    machine.succeeds("systemctl reload carnet@default.service");
    machine.succeeds("carnet service wait haproxy");
    machine.succeeds("systemctl start open.service");
    assert_eq!(arrived().len(), 3);
    until("the proxy's log", || machine.logged(), |logged| *logged == 2);
    machine.succeeds("systemctl stop proxy.service carnet@default.service");
    assert!(!machine.run("carnet status").status.success());
}

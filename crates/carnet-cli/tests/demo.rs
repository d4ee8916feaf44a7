//! `carnet demo` as a person runs it: what it shows, and that nothing is left of it.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use carnet_testbed::{Cgroup, Process, require_root};
use rustix::process::Signal;
use serde_json::Value;

/// How long the demonstration may take on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(60);

fn carnet() -> Command {
    Command::new(env!("CARGO_BIN_EXE_carnet"))
}

/// A place for a demonstration, in which whatever it makes is seen: a cgroup of its own, and a
/// directory for temporary files.
struct Place {
    cgroup: Cgroup,
    temporary: PathBuf,
}

impl Place {
    fn new(name: &str) -> Self {
        require_root().unwrap();
        let cgroup = Cgroup::create(name).unwrap();
        let temporary = std::env::temp_dir().join(cgroup.path().file_name().unwrap());
        fs::create_dir(&temporary).unwrap();
        Self { cgroup, temporary }
    }

    fn command(&self) -> Command {
        let mut command = carnet();
        command.arg("demo").env("TMPDIR", &self.temporary).stdin(Stdio::null());
        // The demonstration makes its own cgroup below the one in which it runs.
        self.cgroup.enter_command(&mut command).unwrap();
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    /// Fails if the demonstration has left a cgroup, a process, a mount or a file.
    fn assert_empty(&self) {
        let below: Vec<_> = entries(self.cgroup.path()).filter(|path| path.is_dir()).collect();
        assert!(below.is_empty(), "cgroups are left: {below:?}");
        assert_eq!(self.cgroup.processes().unwrap(), [0_u32; 0], "processes are left");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.temporary.to_str().unwrap()), "a mount is left: {mounts}");
        assert_eq!(entries(&self.temporary).count(), 0, "files are left");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What is in it has been reported.
        let _ = fs::remove_dir(&self.temporary);
    }
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} in {value}"))
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("{key} in {value}"))
}

/// The steps of a flow in a few words each.
fn told(flow: &Value) -> Vec<String> {
    let steps = list(flow, "steps").iter();
    steps
        .map(|step| match text(step, "step") {
            "inspect" => format!("{} saw {}", text(step, "service"), text(step, "protocol")),
            _ => {
                let to = step["service"].as_str().unwrap_or("destination");
                let (process, verdict) = (text(step, "process"), text(step, "verdict"));
                format!("{process} {} {verdict} {to}", text(step, "record"))
            }
        })
        .collect()
}

fn through_both(protocol: &str) -> Vec<String> {
    vec![
        "demo-client none redirected alpha".into(),
        format!("alpha saw {protocol}"),
        "alpha set redirected beta".into(),
        format!("beta saw {protocol}"),
        "beta set onward destination".into(),
    ]
}

#[test]
fn it_shows_what_it_claims_and_leaves_nothing_behind() {
    let place = Place::new("carnet-demo-test");
    let output = place.output(&["--json"]);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaints}{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(complaints, "");
    place.assert_empty();

    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], true);
    assert_eq!(list(&report, "left_behind"), [0; 0]);
    let services: Vec<_> = list(&report, "services").iter().map(|s| text(s, "service")).collect();
    assert_eq!(services, ["alpha", "beta"]);
    let [once, dead, forgotten] = list(&report, "parts") else { panic!("{report}") };

    let addresses = ["192.0.2.2:80", "[2001:db8::2]:80", "[::ffff:192.0.2.2]:443"];
    for (flow, address) in list(once, "flows").iter().zip(addresses) {
        let protocol = if address.ends_with(":443") { "tls" } else { "http" };
        assert_eq!(told(flow), through_both(protocol));
        assert_eq!((text(flow, "address"), text(flow, "peer")), (address, address));
        assert_eq!(flow["reached"], 1);
        assert_eq!(flow["outcome"]["identical"], true);
        let flows: BTreeSet<_> =
            list(flow, "steps").iter().map(|step| step["flow"].as_u64()).collect();
        assert_eq!(flows.len(), 1, "one flow has one number: {flow}");
        for line in list(flow, "steps").iter().filter(|step| step["step"] == "inspect") {
            assert_eq!(line["pid"], flow["application"]["pid"]);
            assert_eq!(text(line, "executable"), env!("CARGO_BIN_EXE_carnet"));
            assert_eq!(text(line, "host"), "shop.example");
        }
    }

    let [skip, block] = list(dead, "flows") else { panic!("{dead}") };
    assert_eq!(
        told(skip),
        ["demo-client none redirected beta", "beta saw http", "beta set onward destination"]
    );
    assert_eq!(skip["steps"][0]["skipped"][0], "alpha");
    assert_eq!(skip["outcome"]["identical"], true);
    assert_eq!(told(block), ["demo-client none refused alpha"]);
    assert_eq!(block["steps"][0]["reason"], "service_unavailable");
    assert_eq!((&block["outcome"]["at"], &block["reached"]), (&"connect".into(), &0.into()));
    assert_eq!(block["outcome"]["errno"], 111);

    let [looped, again] = list(forgotten, "flows") else { panic!("{forgotten}") };
    let connects: Vec<_> =
        told(looped).into_iter().filter(|step| !step.starts_with("alpha saw")).collect();
    let (last, legs) = connects.split_last().unwrap();
    assert_eq!(legs[0], "demo-client none redirected alpha");
    assert!(legs.len() > 2, "{legs:?}");
    assert!(legs[1..].iter().all(|leg| leg == "alpha forgotten redirected alpha"), "{legs:?}");
    assert_eq!(last, "alpha forgotten refused alpha");
    assert_eq!(looped["reached"], 0);
    assert_eq!(told(again), through_both("http"));
}

#[test]
fn it_reads_well_on_a_narrow_terminal() {
    let place = Place::new("carnet-demo-page");
    let output = place.output(&[]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{page}{}", String::from_utf8_lossy(&output.stderr));
    assert!(!page.contains('\u{1b}'), "colours without a terminal: {page}");
    // The last line is a command, and as long as the path of the program.
    let (last, lines) = page.trim_end().rsplit_once('\n').map(|(l, last)| (last, l)).unwrap();
    assert!(lines.lines().all(|line| line.chars().count() <= 80), "{page}");
    assert!(last.starts_with("Try next: ") && last.ends_with("curl https://example.com"), "{last}");
}

#[test]
fn it_cleans_up_when_it_is_interrupted() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let place = Place::new("carnet-demo-signal");
        let mut demo = Process::spawn(place.command().stderr(Stdio::null())).unwrap();
        // The first thing in the scope that is there while it works.
        wait_for_cgroup(place.cgroup.path());
        demo.signal(signal).unwrap();
        let status = demo.wait(PATIENCE).unwrap();
        assert_eq!(status.code(), Some(128 + signal.as_raw()), "{signal:?}");
        place.assert_empty();
    }
}

/// Waits until there is a cgroup below this one.
fn wait_for_cgroup(cgroup: &Path) {
    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        fs::inotify,
    };
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, cgroup, inotify::WatchFlags::CREATE).unwrap();
    if entries(cgroup).any(|entry| entry.is_dir()) {
        return;
    }
    let patience = Timespec::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&patience)), Ok(1));
}

#[test]
fn without_root_and_sudo_it_says_what_to_do() {
    let bin = Bin::new("carnet-demo-alone");
    let output = bin.as_nobody(&[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: the demonstration needs root"), "{said}");
    assert!(said.contains(&format!("run: {} demo", bin.program().display())), "{said}");
}

#[test]
fn without_root_it_goes_on_through_sudo_and_says_so() {
    let bin = Bin::new("carnet-demo-sudo");
    let sudo = bin.0.join("sudo");
    fs::write(&sudo, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").unwrap();
    fs::set_permissions(&sudo, Permissions::from_mode(0o755)).unwrap();
    let output = bin.as_nobody(&["--json"]);
    let program = bin.program();
    let passed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert_eq!(passed, format!("--\n{}\ndemo\n--json\n", program.display()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&format!("sudo {} demo", program.display())), "{said}");
}

/// A directory with the program in it that every user can look into, and that is all there is in
/// the `PATH`.
struct Bin(PathBuf);

impl Bin {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let bin = Self(path);
        fs::copy(env!("CARGO_BIN_EXE_carnet"), bin.program()).unwrap();
        bin
    }

    fn program(&self) -> PathBuf {
        self.0.join("carnet")
    }

    /// Runs the demonstration as a user without privileges.
    fn as_nobody(&self, arguments: &[&str]) -> Output {
        require_root().unwrap();
        let mut command = Command::new(self.program());
        command.arg("demo").args(arguments).env("PATH", &self.0).env_remove("NO_COLOR");
        carnet_testbed::run_as(command.stdin(Stdio::null()), 65534, 65534);
        command.output().unwrap()
    }
}

impl Drop for Bin {
    fn drop(&mut self) {
        // It may have been removed from outside.
        let _ = fs::remove_dir_all(&self.0);
    }
}

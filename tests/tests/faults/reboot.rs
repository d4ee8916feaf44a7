//! The machine restarts: what lies in the kernel is gone, and the systemd unit brings it back.
//!
//! The restart is played: the bpffs is unmounted and mounted anew, empty, and the services' cgroups
//! are made anew. Then the unit's own lines are run, in its order.

use std::{collections::BTreeMap, env, fs, path::PathBuf, process::Command};

use carnet_core::object::{CgroupCondition, Conditions};
use carnet_engine::Engine;
use carnet_tests::{Must as _, Plan, program, until};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    row::Row,
    stage::{Protocol, Stage, State},
};

/// The unit.
#[track_caller]
fn unit() -> String {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("run by cargo")).join("..");
    fs::read_to_string(root.join("packaging/systemd/carnet@.service")).must("read the unit")
}

/// `/etc/carnet`, which is gone afterwards.
struct Settings(PathBuf);

impl Settings {
    fn new(stage: &Stage) -> Self {
        let path = env::temp_dir().join(format!("carnet-faults-etc-{}", stage.lab.scope().id()));
        fs::create_dir(&path).must("make a directory");
        Self(path)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// The commands of a setting of the unit, as systemd would run them: `%i` is the instance, `$WORD`
/// comes from the environment file and is split into words.
fn commands(stage: &Stage, settings: &Settings, setting: &str) -> Vec<Vec<String>> {
    let instance = stage.lab.location().instance();
    let file = fs::read_to_string(settings.0.join(format!("{instance}.env"))).unwrap_or_default();
    let environment: BTreeMap<&str, &str> =
        file.lines().filter_map(|line| line.split_once('=')).collect();
    let text = unit();
    let lines = text.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    let split = |line: &str| -> Vec<String> {
        let line =
            line.replace("%i", instance).replace("/etc/carnet", &settings.0.display().to_string());
        let word = |word: &str| match word.strip_prefix('$') {
            Some(name) => environment.get(name).copied().unwrap_or_default().to_owned(),
            None => word.to_owned(),
        };
        let words: Vec<String> = line.split(' ').map(word).collect();
        words.join(" ").split_whitespace().map(str::to_owned).collect()
    };
    lines.map(split).collect()
}

/// Runs them. Only where the program and the bpffs are is other than on a machine of its own.
fn carry_out(stage: &Stage, settings: &Settings, setting: &str) -> Result<(), String> {
    let all = commands(stage, settings, setting);
    assert!(!all.is_empty(), "the unit has no {setting}");
    for words in all {
        let ignored = words[0].starts_with('-');
        assert_eq!(words[0].trim_start_matches('-'), "/usr/bin/carnet");
        let mut command = Command::new(program("carnet"));
        command.arg("--bpffs").arg(stage.lab.pins().path()).args(&words[1..]);
        let ended = command.output().must("run a command of the unit");
        if !ended.status.success() && !ignored {
            return Err(format!("{words:?}: {}", String::from_utf8_lossy(&ended.stderr)));
        }
    }
    Ok(())
}

/// The kernel forgets everything.
fn restart(stage: &Stage) {
    stage.forget("alpha");
    stage.forget("bravo");
    let path = stage.lab.pins().path();
    unmount(path, UnmountFlags::DETACH).must("unmount the bpffs");
    mount("reboot", path, "bpf", MountFlags::empty(), c"mode=0755").must("mount a bpffs");
    for name in ["alpha", "bravo"] {
        let cgroup = stage.lab.cgroup_of(name);
        cgroup.kill().must("empty a cgroup");
        fs::remove_dir(cgroup.path()).must("remove a cgroup");
        fs::create_dir(cgroup.path()).must("make a cgroup");
    }
    // The kernel takes hooks off a moment after the last pin is gone; until then they refuse.
    let way = || stage.way(Protocol::Tcp);
    let _empty =
        until("nothing to be redirected", way, |way| way.as_ref().is_ok_and(Vec::is_empty));
}

/// Alpha sees every flow; bravo those of the clients' cgroup.
fn stage() -> Stage {
    let stage = Stage::new();
    stage.lab.service("alpha", 10);
    let directory = stage.lab.scope().path().to_owned();
    let (id, level) = Engine::resolve_cgroup(&directory).must("resolve a cgroup");
    let root = carnet_engine::cgroup::mount_point().must("find the cgroups");
    let path = format!("/{}", directory.strip_prefix(root).must("name a cgroup").display());
    let conditions =
        Conditions { cgroups: vec![CgroupCondition { path, id, level }], ..Conditions::default() };
    let context = Some(b"kept".to_vec());
    stage.lab.service_with("bravo", Plan { weight: 5, conditions, context, ..Plan::default() });
    stage.start("alpha");
    stage.start("bravo");
    stage
}

#[test]
fn the_unit_brings_everything_back() {
    let mut row = Row::new("reboot", "state gone, the systemd unit restores it");
    row.try_one();
    let stage = stage();
    let settings = Settings::new(&stage);
    let instance = stage.lab.location().instance();
    let up = format!("CARNET_UP=--cgroup {} --udp-idle 30\n", stage.lab.scope().path().display());
    fs::write(settings.0.join(format!("{instance}.env")), up).must("write the environment");
    let policy = stage.must_run(&["export"]);
    fs::write(settings.0.join(format!("{instance}.json")), policy).must("write the policy");
    let pins = stage.pins().len();
    stage.expect(&mut row, &["alpha", "bravo"], "before");

    restart(&stage);
    row.check(stage.state() == State::Down, || "it survived the restart".into());
    stage.expect(&mut row, &[], "after the restart");

    let restored = carry_out(&stage, &settings, "ExecStart");
    row.check(restored.is_ok(), || format!("{restored:?}"));
    // Until its services are there, their failure policy decides: block.
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let refused = stage.way(protocol);
        let is_refused = refused.as_ref().is_err_and(|what| what.contains("refused"));
        row.check(is_refused, || format!("without services: {refused:?}"));
    }
    stage.start("alpha");
    stage.start("bravo");
    stage.expect(&mut row, &["alpha", "bravo"], "restored");
    row.check(stage.pins().len() == pins, || "pins are missing or too many".into());
    let status = stage.must_run(&["export"]);
    row.check(status.contains("kept"), || "the context is gone".into());
    row.came("restored");

    // Once more changes nothing, and takes no flow from a service.
    let before = stage.must_run(&["export"]);
    let reloaded = carry_out(&stage, &settings, "ExecReload");
    row.check(reloaded.is_ok(), || format!("{reloaded:?}"));
    row.check(stage.must_run(&["export"]) == before, || "a reload changed the policy".into());
    stage.expect(&mut row, &["alpha", "bravo"], "reloaded");
    row.came("reloaded");

    let stopped = carry_out(&stage, &settings, "ExecStop");
    row.check(stopped.is_ok(), || format!("{stopped:?}"));
    stage.expect(&mut row, &[], "stopped");
    row.check(stage.pins().is_empty(), || format!("{:?} are left", stage.pins()));
    row.came("stopped");
    row.conclude();
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let mut row = Row::new("reboot", "policy that cannot be restored: the unit fails");
    let stage = stage();
    let settings = Settings::new(&stage);
    let instance = stage.lab.location().instance();
    let up = format!("CARNET_UP=--cgroup {}\n", stage.lab.scope().path().display());
    fs::write(settings.0.join(format!("{instance}.env")), up).must("write the environment");
    let policy = stage.must_run(&["export"]);
    stage.must_run(&["down"]);
    let gone = policy.replace("service-alpha", "service-gone");
    for (what, text) in
        [("no file", None), ("no JSON", Some("{".into())), ("no cgroup", Some(gone))]
    {
        row.try_one();
        let file = settings.0.join(format!("{instance}.json"));
        match text {
            Some(text) => fs::write(&file, text).must("write the policy"),
            None => drop(fs::remove_file(&file)),
        }
        let started = carry_out(&stage, &settings, "ExecStart");
        row.check(started.as_ref().is_err_and(|said| said.contains("error: ")), || {
            format!("{what}: {started:?}")
        });
        // What systemd runs then.
        let after = carry_out(&stage, &settings, "ExecStopPost");
        row.check(after.is_ok() && stage.pins().is_empty(), || format!("{what}: pins are left"));
        row.came("failed in words");
    }
    row.conclude();
}

#[test]
fn systemd_understands_the_unit() {
    let mut row = Row::new("reboot", "the unit, as systemd-analyze reads it");
    row.try_one();
    let Ok(found) = Command::new("systemd-analyze").arg("--version").output() else {
        // It is systemd's own, which is not everywhere where these tests run.
        row.came("systemd-analyze is not installed");
        return row.conclude();
    };
    assert!(found.status.success(), "{found:?}");
    let directory = env::temp_dir().join(format!("carnet-faults-unit-{}", std::process::id()));
    fs::create_dir(&directory).must("make a directory");
    // The program has to be where the unit says it is.
    let text = unit().replace("/usr/bin/carnet", &program("carnet").display().to_string());
    let path = directory.join("carnet@default.service");
    fs::write(&path, &text).must("write the unit");
    let verify = |path: &PathBuf| {
        let mut command = Command::new("systemd-analyze");
        let ended = command.args(["verify", "--man=no"]).arg(path).output();
        let ended = ended.must("run systemd-analyze");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        // It reads all units that this one names, of which some may be somebody else's.
        let own: Vec<String> =
            said.lines().filter(|line| line.contains("carnet")).map(str::to_owned).collect();
        own
    };
    let said = verify(&path);
    row.check(said.is_empty(), || format!("{said:?}"));
    // And it would say so.
    fs::write(&path, text.replace("Type=oneshot", "Tpye=oneshot")).must("write the unit");
    row.check(!verify(&path).is_empty(), || "a mistake was not noticed".into());
    fs::remove_dir_all(&directory).must("remove the directory");
    row.came("understood");
    row.conclude();
}

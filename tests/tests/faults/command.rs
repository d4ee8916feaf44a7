//! The command is killed at each of its system calls, and each of its calls fails.
//!
//! Whatever happens to it, its change is made whole or not at all, as its own listings and real
//! flows show; the same command goes through afterwards; and nothing of what it made is left.

use std::{collections::HashSet, env, fs};

use carnet_core::object::FailurePolicy;
use carnet_testbed::Cgroup;
use carnet_tests::{
    Must as _, Plan,
    tracer::{self, Harm, Object},
    until,
};

use crate::{
    row::{Row, sample},
    stage::{Stage, State},
};

/// How many calls of a command are tried where not all are: of those that load programs, which take
/// half a second, and of others.
const FEW: usize = 4;
const MANY: usize = 6;

/// A command that is harmed.
struct Subject<'a> {
    name: &'static str,
    arguments: Vec<String>,
    /// The services that see a flow before and after.
    ways: [&'static [&'static str]; 2],
    /// Brings the state of before back.
    back: Box<dyn Fn(&Stage) + 'a>,
    /// How many calls are tried in a short run.
    most: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kill,
    Fail,
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// Harms the command at its calls, one after another.
fn harm(stage: &Stage, subject: &Subject<'_>, kind: Kind) {
    let (group, what) = match kind {
        Kind::Kill => ("command killed", "killed at each system call"),
        Kind::Fail => ("call fails", "each system call fails"),
    };
    let mut row = Row::new(group, format!("{}: {what}", subject.name));
    let command = || stage.carnet(&subject.arguments);

    let old = stage.state();
    let old_pins = stage.pins();
    let whole = tracer::run(&mut command(), Harm::None).must("trace the command");
    assert_eq!(whole.status, Some(0), "{}", whole.errors);
    let (new, new_pins) = (stage.state(), stage.pins());
    let mut made: HashSet<Object> = whole.made;
    (subject.back)(stage);
    assert_eq!((stage.state(), stage.pins()), (old.clone(), old_pins.clone()), "the way back");

    let count = whole.calls.len();
    assert!(count > 2, "{:?}", whole.calls);
    // A kill where it only makes what is its own is one at the next call; a failure is not.
    let places = |call: &tracer::Call| kind == Kind::Fail || !call.is_own;
    let places: Vec<usize> = (1..=count).filter(|at| places(&whole.calls[at - 1])).collect();
    for at in sample(places.len(), subject.most).into_iter().map(|number| places[number - 1]) {
        row.try_one();
        let harm = match kind {
            Kind::Kill => Harm::Kill(at),
            Kind::Fail => Harm::Fail(at, errno_for(at, &whole.calls[at - 1].text)),
        };
        let ended = tracer::run(&mut command(), harm).must("trace the command");
        let call = ended.calls.get(at - 1).map_or("its end", |call| &call.text);
        let when = format!("{harm:?} ({call})");
        made.extend(&ended.made);

        let now = stage.state();
        // Where a command changes nothing that is listed, both are the same.
        let (is_old, is_new) = (now == old, now == new);
        row.check(is_old || is_new, || format!("{when}: neither old nor new: {now:#?}"));
        row.came(if is_new && !(is_old && ended.status != Some(0)) { "new" } else { "old" });
        stage.expect(&mut row, subject.ways[usize::from(is_new && !is_old)], &when);
        match ended.status {
            None => row.check(kind == Kind::Kill, || format!("{when}: it was killed")),
            Some(0) => row.check(is_new, || format!("{when}: success, but nothing has changed")),
            Some(status) => {
                row.check(status == 1 && ended.errors.contains("error: "), || {
                    format!("{when}: exit status {status}, {:?}", ended.errors)
                });
                let tells = call.starts_with("write");
                row.check(is_old || tells || subject.name == "down", || {
                    format!("{when}: it failed, but has changed something")
                });
            }
        }
        if kind == Kind::Fail {
            // What it could not take back, it says, and the next change finds it here.
            let pins = stage.pins();
            let mut stray =
                pins.iter().filter(|pin| !old_pins.contains(*pin) && !new_pins.contains(*pin));
            let marked = |pin: &String| pin.contains("/changing") || pin.contains("/upgrade");
            let told = ended.errors.contains("WARN") || ended.errors.contains("error: ");
            row.check(subject.name == "down" || stray.all(|pin| marked(pin) && told), || {
                format!("{when}: pins are left: {pins:?}")
            });
        }

        // The same command goes through, if there still is something to do.
        let words: Vec<&str> = subject.arguments.iter().map(String::as_str).collect();
        let (again, _) = stage.run(&words);
        row.check(again || (is_new && !is_old), || format!("{when}: it does not go through again"));
        let then = stage.state();
        row.check(then == new, || format!("{when}: after another time: {then:#?}"));
        let pins = stage.pins();
        row.check(pins == new_pins, || {
            let difference: Vec<_> = pins.symmetric_difference(&new_pins).collect();
            format!("{when}: pins that are left or missing: {difference:?}")
        });
        stage.expect(&mut row, subject.ways[1], &format!("{when}, once more"));
        (subject.back)(stage);
        let (state, pins) = (stage.state(), stage.pins());
        row.check(state == old, || format!("{when}: and back: {state:#?}"));
        row.check(pins == old_pins, || {
            let difference: Vec<_> = pins.symmetric_difference(&old_pins).collect();
            format!("{when}: pins that are left or missing: {difference:?}")
        });
        if state != old {
            break;
        }
    }
    // The kernel takes things apart in the background.
    let left = || made.iter().copied().filter(|one| one.is_there()).collect::<Vec<_>>();
    if subject.name == "upgrade" {
        stage.must_run(&["upgrade"]);
    }
    until("all that the commands made to be gone", left, Vec::is_empty);
    row.conclude();
}

/// With what a call fails: the kernel has no memory, the file system no room, or it may not be.
fn errno_for(at: usize, call: &str) -> i32 {
    match (call.starts_with("bpf"), at % 2) {
        (true, 0) => libc::ENOMEM,
        (_, 1) => libc::EPERM,
        _ => libc::ENOSPC,
    }
}

/// Alpha sees every flow, and bravo is there to be redirected to.
fn stage_with_services() -> Stage {
    let stage = Stage::new();
    prepare(&stage);
    stage
}

fn prepare(stage: &Stage) {
    stage.lab.service("alpha", 10);
    let plan = Plan { weight: 5, on_failure: FailurePolicy::Block, ..Plan::default() };
    stage.lab.service_with("bravo", plan);
    stage.must_run(&["filter", "rm", "bravo"]);
    stage.start("alpha");
    stage.start("bravo");
}

/// A change of the policy, and the one that takes it back, are harmed.
fn policy(
    kind: Kind,
    name: [&'static str; 2],
    there: &str,
    back: &str,
    ways: [&'static [&'static str]; 2],
    stage: &Stage,
) {
    let run = |line: &str| {
        let line = line.to_owned();
        Box::new(move |stage: &Stage| {
            let words: Vec<_> = line.split(' ').collect();
            stage.must_run(&words);
        })
    };
    let forth =
        Subject { name: name[0], arguments: words(there), ways, back: run(back), most: MANY };
    harm(stage, &forth, kind);
    stage.must_run(&there.split(' ').collect::<Vec<_>>());
    let ways = [ways[1], ways[0]];
    let subject =
        Subject { name: name[1], arguments: words(back), ways, back: run(there), most: MANY };
    harm(stage, &subject, kind);
    stage.must_run(&back.split(' ').collect::<Vec<_>>());
}

/// A filter whose addition was killed leaves nothing to the next one, which gets the same id.
#[test]
fn a_killed_filters_context_is_nobody_elses() {
    const ADD: &str = "filter add --sublayer bravo --name new --redirect bravo --context ";
    let mut row = Row::new("command killed", "filter add, then another with another context");
    let stage = stage_with_services();
    let old = stage.state();
    let first = words(&format!("{ADD}first"));
    let whole = tracer::run(&mut stage.carnet(&first), Harm::None).must("trace the command");
    stage.must_run(&["filter", "rm", "new"]);
    for at in sample(whole.calls.len(), MANY) {
        row.try_one();
        tracer::run(&mut stage.carnet(&first), Harm::Kill(at)).must("trace the command");
        let expected: &[u8] = if stage.state() == old {
            stage.must_run(&format!("{ADD}second").split(' ').collect::<Vec<_>>());
            b"second"
        } else {
            b"first"
        };
        stage.expect(&mut row, BOTH, "with the filter");
        let reports = stage.services()["bravo"].reports(0);
        for report in reports.iter().rev().take(2) {
            row.check(report.context.as_deref() == Some(expected), || {
                format!("killed at call {at}: {:?} instead of {expected:?}", report.context)
            });
        }
        stage.must_run(&["filter", "rm", "new"]);
    }
    row.came("its own context");
    row.conclude();
}

/// A command may have died right after it put its policy in force, and hooks may still read the bank
/// that was in force before. Whoever writes that bank waits for them first.
#[test]
fn the_idle_bank_is_written_after_a_wait() {
    let stage = stage_with_services();
    for line in ["provider add new", "down"] {
        let ended = tracer::run(&mut stage.carnet(&words(line)), Harm::None);
        let ended = ended.must("trace the command");
        assert_eq!(ended.status, Some(0), "{}", ended.errors);
        let calls: Vec<&str> = ended.calls.iter().map(|call| call.text.as_str()).collect();
        // The wait is an update, of a map of the command's own.
        let first = |name| calls.iter().position(|call| *call == name).expect(name);
        let (wait, write) = (first("bpf MAP_UPDATE_ELEM"), first("bpf MAP_UPDATE_BATCH"));
        assert!(wait < write, "{line}: {calls:#?}");
    }
}

const ALPHA: &[&str] = &["alpha"];
const BOTH: &[&str] = &["alpha", "bravo"];

fn filters(kind: Kind) {
    let stage = stage_with_services();
    let there = "filter add --sublayer bravo --name new --redirect bravo --context word";
    let names = ["filter add", "filter rm"];
    policy(kind, names, there, "filter rm new", [ALPHA, BOTH], &stage);
}

fn objects(kind: Kind) {
    let stage = stage_with_services();
    let both = [ALPHA, ALPHA];
    policy(
        kind,
        ["provider add", "provider rm"],
        "provider add new",
        "provider rm new",
        both,
        &stage,
    );
    let there = "sublayer add new --provider alpha";
    policy(kind, ["sublayer add", "sublayer rm"], there, "sublayer rm new", both, &stage);
}

fn services(kind: Kind) {
    let stage = stage_with_services();
    let inside = stage.lab.scope().child("inside").must("make a cgroup");
    // Its sockets get hooks of their own.
    let outside = Cgroup::create("carnet-faults").must("make a cgroup");
    for (names, cgroup) in [
        (["service add", "service rm"], &inside),
        (["service add (outside the scope)", "service rm (outside the scope)"], &outside),
    ] {
        let there =
            format!("service add new --provider alpha --cgroup {}", cgroup.path().display());
        policy(kind, names, &there, "service rm new", [ALPHA, ALPHA], &stage);
    }
}

fn up(kind: Kind) {
    let stage = Stage::new();
    stage.lab.down();
    let back = Box::new(|stage: &Stage| {
        stage.must_run(&["down"]);
    });
    let arguments = words(&format!("up --cgroup {}", stage.lab.scope().path().display()));
    let subject = Subject { name: "up", arguments, ways: [&[], &[]], back, most: FEW };
    assert_eq!(stage.state(), State::Down);
    harm(&stage, &subject, kind);
}

fn upgrade(kind: Kind) {
    let stage = stage_with_services();
    let back = Box::new(|_: &Stage| {});
    let (arguments, ways) = (words("upgrade"), [ALPHA, ALPHA]);
    harm(&stage, &Subject { name: "upgrade", arguments, ways, back, most: FEW }, kind);
}

/// A new key changes nothing that is listed, and no flow.
fn keys(kind: Kind) {
    let stage = stage_with_services();
    for (name, line) in
        [("rotate-key", "rotate-key"), ("rotate-key --overlap 0", "rotate-key --overlap 0")]
    {
        let back = Box::new(|_: &Stage| {});
        let (arguments, ways) = (words(line), [ALPHA, ALPHA]);
        harm(&stage, &Subject { name, arguments, ways, back, most: MANY }, kind);
    }
}

/// A whole policy in one transaction.
fn whole_policies(kind: Kind) {
    let stage = stage_with_services();
    let directory = env::temp_dir().join(format!("carnet-faults-apply-{}", stage.lab.scope().id()));
    fs::create_dir(&directory).must("make a directory");
    let file = |name: &str| directory.join(name).display().to_string();
    let [before, after] = [file("before.json"), file("after.json")];
    fs::write(&before, stage.must_run(&["export"])).must("write a policy");
    for line in [
        "provider add acme",
        "sublayer add acme --provider acme --weight 3",
        "filter add --sublayer acme --redirect bravo --context word",
        "filter add --sublayer alpha --block --to 203.0.113.1",
    ] {
        stage.must_run(&line.split(' ').collect::<Vec<_>>());
    }
    fs::write(&after, stage.must_run(&["export"])).must("write a policy");
    stage.must_run(&["apply", &before]);
    let (there, back) = (format!("apply {after}"), format!("apply {before}"));
    policy(kind, ["apply", "apply (back)"], &there, &back, [ALPHA, BOTH], &stage);
    fs::remove_dir_all(&directory).must("remove the directory");
}

fn down(kind: Kind) {
    let stage = stage_with_services();
    let back = Box::new(|stage: &Stage| {
        stage.must_run(&["up", "--cgroup", &stage.lab.scope().path().display().to_string()]);
        prepare(stage);
    });
    let (arguments, ways): (_, [&[&str]; 2]) = (words("down"), [ALPHA, &[]]);
    harm(&stage, &Subject { name: "down", arguments, ways, back, most: FEW }, kind);
}

macro_rules! both_ways {
    ($($subject:ident: $killed:ident, $failing:ident;)*) => {
        $(
            #[test]
            fn $killed() {
                $subject(Kind::Kill);
            }

            #[test]
            #[cfg(target_arch = "x86_64")]
            fn $failing() {
                $subject(Kind::Fail);
            }
        )*
    };
}

both_ways! {
    up: killed_up, failing_up;
    upgrade: killed_upgrade, failing_upgrade;
    filters: killed_filter, failing_filter;
    objects: killed_object, failing_object;
    services: killed_service, failing_service;
    down: killed_down, failing_down;
    keys: killed_rotate_key, failing_rotate_key;
    whole_policies: killed_apply, failing_apply;
}

//! The machine does not give what is needed: the bpffs is read-only or gone, a cgroup is removed,
//! descriptors, memory, ports or room in a map or on a disk run out, clocks differ.

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
};

use aya::maps::{HashMap, Map, MapData};
use carnet_core::{
    flow::{DatagramLeg, Handover, PeerKey, Tuple},
    object::FailurePolicy,
};
use carnet_testbed::Process;
use carnet_tests::{Must as _, PATIENCE, Plan, program, puppet::Puppet, until};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use crate::{
    row::{Row, sample},
    stage::{Protocol, Stage, State},
};

const GROUP: &str = "environment";

/// Alpha sees every flow.
fn stage() -> Stage {
    let stage = Stage::new();
    stage.lab.service("alpha", 10);
    stage.start("alpha");
    stage
}

/// A command that cannot do its work says so, and has changed nothing.
fn refuses(stage: &Stage, row: &mut Row, mut command: Command, when: &str) {
    row.try_one();
    let before = stage.state();
    let ended = command.stdin(Stdio::null()).output().must("run the command");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    row.check(!ended.status.success(), || format!("{when}: {command:?} succeeded"));
    row.check(said.contains("error"), || format!("{when}: {command:?} said {said:?}"));
    let after = stage.state();
    row.check(after == before, || format!("{when}: {command:?} has changed {after:#?}"));
    row.came("refused in words");
}

/// The commands that change something.
fn changes(stage: &Stage) -> Vec<Command> {
    let lines = [
        "upgrade".to_owned(),
        "provider add another".to_owned(),
        "filter rm alpha".to_owned(),
        format!("service add beta --provider alpha --cgroup {}", stage.lab.apps().path().display()),
        "down".to_owned(),
    ];
    lines
        .iter()
        .map(|line| stage.carnet(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()))
        .collect()
}

#[test]
fn the_bpffs_is_read_only() {
    let mut row = Row::new(GROUP, "bpffs read-only");
    let stage = stage();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let remount = |flags| mount_remount(stage.lab.pins().path(), flags, c"").must("remount");
    remount(flags | MountFlags::RDONLY);
    for command in changes(&stage) {
        refuses(&stage, &mut row, command, "read-only");
        stage.expect(&mut row, &["alpha"], "read-only");
    }
    remount(flags);
    let (success, _) = stage.run(&["provider", "add", "another"]);
    row.check(success, || "no change after it was writable again".into());
    row.conclude();
}

#[test]
fn the_bpffs_is_unmounted() {
    let mut row = Row::new(GROUP, "bpffs unmounted: as if taken down");
    let stage = stage();
    row.try_one();
    let path = stage.lab.pins().path();
    unmount(path, UnmountFlags::DETACH).must("unmount the bpffs");
    let (success, _) = stage.run(&["status"]);
    row.check(!success, || "there is a status without a bpffs".into());
    // The kernel drops the last pins in the background.
    let way = || stage.way(Protocol::Tcp);
    let _empty =
        until("nothing to be redirected", way, |way| way.as_ref().is_ok_and(Vec::is_empty));
    stage.expect(&mut row, &[], "unmounted");
    mount("again", path, "bpf", MountFlags::empty(), c"mode=0755").must("mount a bpffs");
    row.check(stage.state() == State::Down, || "it is up on an empty bpffs".into());
    stage.must_run(&["up", "--cgroup", &stage.lab.scope().path().display().to_string()]);
    stage.lab.service("alpha", 10);
    stage.start("alpha");
    stage.expect(&mut row, &["alpha"], "mounted and up again");
    row.came("up again");
    row.conclude();
}

#[test]
fn a_services_cgroup_is_removed() {
    let mut row = Row::new(GROUP, "cgroup of a service removed");
    for (on_failure, while_gone) in [(FailurePolicy::Skip, true), (FailurePolicy::Block, false)] {
        row.try_one();
        let stage = Stage::new();
        stage.lab.service_with("alpha", Plan { weight: 10, on_failure, ..Plan::default() });
        stage.start("alpha");
        stage.expect(&mut row, &["alpha"], "before");
        stage.forget("alpha");
        let cgroup = stage.lab.cgroup_of("alpha");
        cgroup.kill().must("empty the cgroup");
        fs::remove_dir(cgroup.path()).must("remove the cgroup");
        let way = stage.way(Protocol::Tcp);
        match way {
            Ok(way) if while_gone && way.is_empty() => row.came("skipped"),
            Err(what) if !while_gone && what.contains("refused") => row.came("refused"),
            other => row.uninspected(format!("{on_failure}: the next flow: {other:?}")),
        }
        // Others can still be changed, and the programs replaced.
        for line in ["provider add another", "upgrade", "provider rm another"] {
            let (success, said) = stage.run(&line.split(' ').collect::<Vec<_>>());
            row.check(success, || format!("{line} failed: {said}"));
        }
        // Made anew it is another cgroup of the same path: the policy finds it when it is applied.
        let policy = stage.must_run(&["export"]);
        fs::create_dir(cgroup.path()).must("make the cgroup anew");
        let file = env::temp_dir().join(format!("carnet-faults-{}", cgroup.id()));
        fs::write(&file, policy).must("write the policy");
        let (success, said) = stage.run(&["apply", &file.display().to_string()]);
        fs::remove_file(&file).must("remove the policy");
        row.check(success, || format!("apply failed: {said}"));
        stage.start("alpha");
        stage.expect(&mut row, &["alpha"], "made anew and applied");
        row.came("back by apply");
    }
    row.conclude();
}

#[test]
fn the_scope_is_removed() {
    let mut row = Row::new(GROUP, "the redirected cgroup removed");
    row.try_one();
    let stage = stage();
    let inner = stage.lab.scope().child("inner").must("make a cgroup");
    let second = |line: &str| {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        let ended = stage.carnet_of("second", &words).output().must("run the command");
        (ended.status.success(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    let up = format!("up --cgroup {}", inner.path().display());
    let (success, said) = second(&up);
    assert!(success, "a second instance: {said}");
    drop(inner);
    for line in ["status", "provider add acme", "export", "upgrade", "down"] {
        let (success, said) = second(line);
        row.check(success, || format!("{line} failed: {said}"));
    }
    row.check(!stage.pins().iter().any(|pin| pin.contains("second")), || "pins are left".into());
    stage.expect(&mut row, &["alpha"], "the other instance");
    row.came("commands go on");
    row.conclude();
}

/// The command with a limit of the shell's.
fn limited(stage: &Stage, limit: &str, line: &str) -> Command {
    let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
    let command = stage.carnet(&words);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit {limit} && exec \"$@\""), "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

/// Runs commands within limits that are too tight for them, in the end.
fn within(row: &mut Row, limits: impl Iterator<Item = String>, in_words: bool) {
    let stage = stage();
    let old = stage.state();
    for limit in limits {
        for line in ["provider add another", "upgrade"] {
            row.try_one();
            let ended = limited(&stage, &limit, line).output().must("run the command");
            let said = String::from_utf8_lossy(&ended.stderr).into_owned();
            let is_old = stage.state() == old;
            row.came(if ended.status.success() { "done" } else { "failed" });
            if ended.status.success() {
                row.check(line == "upgrade" || !is_old, || format!("{limit}: nothing has changed"));
            } else {
                row.check(is_old, || format!("{limit}: {line} failed and has changed something"));
                // Without memory, or the libraries that the program is linked to, none can be had.
                row.check(!in_words || said.contains("error"), || format!("{limit}: {said:?}"));
            }
            stage.run(&["provider", "rm", "another"]);
        }
        stage.expect(row, &["alpha"], &limit);
    }
}

#[test]
fn the_command_is_out_of_descriptors() {
    let mut row = Row::new(GROUP, "command out of descriptors");
    let limits = sample(30, 8).into_iter().map(|number| format!("-n {}", number + 2));
    within(&mut row, limits, true);
    row.conclude();
}

#[test]
fn the_command_is_out_of_memory() {
    let mut row = Row::new(GROUP, "command out of memory");
    // Kilobytes of address space: from too little for its libraries to enough for everything.
    let limits = sample(40, 8).into_iter().map(|number| format!("-v {}", 8000 + 1500 * number));
    within(&mut row, limits, false);
    row.conclude();
}

/// A cookie that no socket has.
const NOBODY: u64 = 1 << 62;

/// A map of the kernel's, with keys and values as bytes.
type Bytes<const KEY: usize, const VALUE: usize> = HashMap<MapData, [u8; KEY], [u8; VALUE]>;

/// Fills a map, whatever is in it, until it takes no more; gives the keys.
fn fill<const KEY: usize, const VALUE: usize>(
    stage: &Stage,
    name: &str,
) -> (Bytes<KEY, VALUE>, Vec<[u8; KEY]>) {
    let pin = stage.lab.location().directory().join("maps").join(name);
    let map = Map::HashMap(MapData::from_pin(pin).must("open a map"));
    let mut map = Bytes::<KEY, VALUE>::try_from(map).must("read a map");
    let mut keys = Vec::new();
    loop {
        // No network namespace has a cookie like that.
        let mut key = [0xff; KEY];
        key[..8].copy_from_slice(&(u64::MAX - keys.len() as u64).to_ne_bytes());
        if map.insert(key, [0; VALUE], 0).is_err() {
            return (map, keys);
        }
        keys.push(key);
    }
}

/// A flow for which a map has no room, which is for `room` entries at least, is turned away: not inspected, and not let
/// by. `places` is a table of them that comes before the map, and is full too. `arrived` counts what the destination
/// has got.
fn no_room<const KEY: usize, const VALUE: usize>(
    mut row: Row,
    map: &str,
    places: Option<&str>,
    room: usize,
    protocol: Protocol,
    arrived: impl Fn(&Stage) -> usize,
) {
    row.try_one();
    let stage = stage();
    let taken = places.map(|table| stage.lab.occupy(table, NOBODY.to_ne_bytes()));
    let (mut map, keys) = fill::<KEY, VALUE>(&stage, map);
    row.check(keys.len() >= room, || format!("{} entries", keys.len()));
    match stage.way(protocol) {
        Err(_) => row.came("refused"),
        Ok(way) => row.uninspected(format!("a flow went through {way:?}")),
    }
    row.check(arrived(&stage) == 0, || "it went by".into());
    for key in keys {
        map.remove(&key).must("remove an entry");
    }
    if let Some(taken) = taken {
        taken.leave();
    }
    stage.expect(&mut row, &["alpha"], "with room again");
    row.came("carried again");
    row.conclude();
}

#[test]
fn the_map_of_connections_under_way_is_full() {
    // The service cannot know of the connection, so it turns it away.
    let row = Row::new(GROUP, "maps WAITING and HANDOVER full: the service turns the flow away");
    no_room::<{ size_of::<Tuple>() }, { size_of::<Handover>() }>(
        row,
        "HANDOVER",
        Some("WAITING"),
        8_192,
        Protocol::Tcp,
        |stage| stage.lab.network().echo().connections().len(),
    );
}

#[test]
fn the_map_of_datagram_flows_is_full() {
    // Before the flow lies the kernel's timer.
    const VALUE: usize = 16 + size_of::<DatagramLeg>();
    let row = Row::new(GROUP, "map DATAGRAM_LEGS full: the flow is refused");
    no_room::<{ size_of::<PeerKey>() }, VALUE>(
        row,
        "DATAGRAM_LEGS",
        None,
        60_001,
        Protocol::Udp,
        |stage| stage.datagrams.datagrams().len(),
    );
}

#[test]
fn the_map_of_listeners_is_full() {
    let mut row =
        Row::new(GROUP, "map LISTENERS full: registering fails, what is registered stays");
    row.try_one();
    let stage = stage();
    let (mut map, keys) = fill::<
        { size_of::<carnet_core::flow::ListenerKey>() },
        { size_of::<carnet_core::flow::ListenerEntry>() },
    >(&stage, "LISTENERS");
    let puppet = stage.lab.puppet_of("alpha");
    let listener = puppet.listen((std::net::Ipv4Addr::LOCALHOST, 0).into());
    let registered = listener.register(&[]);
    row.check(registered.is_err(), || "a listener was registered".into());
    stage.expect(&mut row, &["alpha"], "full");
    for key in keys {
        map.remove(&key).must("remove an entry");
    }
    row.check(listener.register(&[]) == Ok(()), || "no listener is registered any more".into());
    row.came("refused, then registered");
    row.conclude();
}

#[test]
fn there_are_no_ports() {
    let mut row = Row::new(GROUP, "out of ephemeral ports");
    row.try_one();
    let stage = stage();
    let client = &stage.lab.network().topology.client;
    client.set_sysctl("ipv4/ip_local_port_range", "40000 40001").must("narrow the range");
    // Those that fit go on, and those that do not fail.
    let mut held = Vec::new();
    let mut failed = false;
    for _ in 0..6 {
        match stage.client.connect(stage.lab.v4()) {
            Ok(connection) => held.push(connection),
            Err(_) => failed = true,
        }
    }
    // What a service says of a flow reaches us a moment after the flow.
    let told = || stage.services()["alpha"].reports(0);
    let reports = until("alpha to tell of each", told, |reports| reports.len() >= held.len());
    let onward = reports.iter().filter(|report| report.onward.is_ok()).count();
    row.check(failed || onward < held.len(), || "there were ports enough".into());
    let arrived = stage.lab.network().echo().connections().len();
    if arrived > onward {
        row.uninspected(format!("{arrived} connections arrived, alpha had {onward}"));
    }
    drop(held);
    stage.lab.settle();
    client.set_sysctl("ipv4/ip_local_port_range", "32768 60999").must("widen the range");
    stage.expect(&mut row, &["alpha"], "with ports again");
    row.came("refused, then carried");
    row.conclude();
}

/// Carnet's own service, started by a shell that says how.
fn inspect(stage: &Stage, script: &str, log: &Path) -> Process {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(program("carnet-inspect"));
    command.args(["--name", "alpha", "--log", "json", "--ready-fd", "1"]);
    command.arg("--log-file").arg(log).stderr(Stdio::null());
    stage.lab.cgroup_of("alpha").enter_command(&mut command).must("enter the cgroup");
    stage.lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start carnet-inspect");
    let is_ready = |line: &str| line.starts_with("ready ");
    process.wait_for_line("the line \"ready\"", PATIENCE, is_ready).must("wait for the service");
    process
}

#[test]
fn the_service_is_out_of_descriptors() {
    let mut row = Row::new(GROUP, "carnet-inspect out of descriptors");
    row.try_one();
    let stage = Stage::new();
    stage.lab.service("alpha", 10);
    let log = Path::new("/dev/null");
    // What it takes for itself, and for a few connections.
    let mut service = inspect(&stage, "ulimit -n 32 && exec \"$@\"", log);
    let to = stage.lab.v4();
    let held: Vec<_> = (0..40).filter_map(|_| stage.client.connect(to).ok()).collect();
    // The first was there when there were descriptors.
    held[0].send(b"word").must("send");
    row.check(held[0].receive(4) == Ok(b"word".to_vec()), || "the first is not served".into());
    let arrived = stage.lab.network().echo().connections().len();
    row.check(arrived < held.len(), || "there were descriptors enough".into());
    drop(held);
    stage.lab.settle();
    let again = stage.client.connect(to).must("connect");
    again.send(b"word").must("send");
    row.check(again.receive(4) == Ok(b"word".to_vec()), || "it does not serve again".into());
    drop(again);
    service.terminate().must("end the service");
    service.wait(PATIENCE).must("wait for its end");
    row.came("waited, then carried");
    row.conclude();
}

#[test]
fn the_disk_of_the_log_is_full() {
    let mut row = Row::new(GROUP, "carnet-inspect: disk of the log full");
    row.try_one();
    let stage = Stage::new();
    stage.lab.service("alpha", 10);
    // Writing to it fails as to a full disk.
    let service = inspect(&stage, "exec \"$@\"", Path::new("/dev/full"));
    for _ in 0..5 {
        let connection = stage.client.connect(stage.lab.v4()).must("connect");
        connection.send(b"word").must("send");
        match connection.receive(4) {
            Ok(word) if word == b"word" => row.flow(),
            other => row.lost(format!("a flow without a log: {other:?}")),
        }
    }
    drop(service);
    row.came("carried without a log");
    row.conclude();
}

#[test]
fn the_service_lives_in_another_time() {
    let mut row = Row::new(GROUP, "clocks: service in a time namespace a year ahead");
    row.try_one();
    let stage = Stage::new();
    stage.lab.service("alpha", 10);
    // Records are an hour's, by the kernel's own boot-time clock: nobody else's counts.
    let mut command = Command::new("unshare");
    command.args(["--time", "--boottime", "31536000", "--monotonic", "31536000", "--fork"]);
    command.args(["--kill-child", "--"]).arg(program("test-puppet"));
    let (client, cgroup) = (&stage.lab.network().topology.client, stage.lab.cgroup_of("alpha"));
    let service = Puppet::start_by(command, client, &cgroup, None);
    let listener = service.serve((std::net::Ipv4Addr::LOCALHOST, 0).into());
    let _connection = stage.client.connect(stage.lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    let record = accepted.query(carnet_core::abi::QUERY_REDIRECT_RECORDS).must("ask");
    let onward = service.tcp(stage.lab.v4());
    row.check(onward.set_record(&record) == Ok(()), || "the record is refused".into());
    match onward.connect(stage.lab.v4()) {
        Ok(()) => row.flow(),
        Err(error) => row.lost(format!("connecting onwards: {error}")),
    }
    row.came("record accepted");
    row.conclude();
}

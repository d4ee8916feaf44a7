//! The program: its options, signals and privileges. It runs without an engine here, so every
//! connection is one that was not redirected; that too leaves its line in the log. On Windows
//! `windows.rs` has it tested.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Lines, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_carnet-inspect");

/// The program, running; it is killed with the test.
struct Running {
    child: Child,
    errors: Lines<BufReader<ChildStderr>>,
    addresses: Vec<SocketAddr>,
}

impl Running {
    /// Starts it and waits until it is ready.
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(["--original-destination", "conntrack"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut running = Self { child, errors, addresses: Vec::new() };
        let ready = running.said("ready ");
        let addresses = ready.split_once("ready ").unwrap().1;
        running.addresses = addresses.split(' ').map(|text| text.parse().unwrap()).collect();
        running
    }

    /// The next thing it says on its standard error that contains `part`.
    fn said(&mut self, part: &str) -> String {
        let line = self.errors.by_ref().map(Result::unwrap).find(|line| line.contains(part));
        line.unwrap_or_else(|| panic!("it ended without saying {part:?}"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn stdout(&mut self) -> BufReader<ChildStdout> {
        BufReader::new(self.child.stdout.take().unwrap())
    }

    /// Makes a connection and waits until it was refused.
    fn visit(&self) {
        // The reset can be there before the connection is.
        let read = TcpStream::connect(self.addresses[0]).and_then(|mut s| s.read(&mut [0]));
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    /// Asks it to end, and expects that it does so in order.
    fn end(mut self) {
        self.signal(Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It fails if the program has ended, as it should have.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file for one test; it is removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The output of a run that is expected to fail.
fn failure(arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = Command::new(PROGRAM).args(arguments).output().unwrap();
    assert!(!status.success(), "{arguments:?} succeeded");
    String::from_utf8(stderr).unwrap()
}

#[test]
fn it_logs_a_direct_connection_and_ends_in_order() {
    let mut program = Running::start(&["--log", "json", "--name", "mine"]);
    assert!(!program.addresses.is_empty());
    program.visit();
    let mut line = String::new();
    program.stdout().read_line(&mut line).unwrap();
    let value: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&value["service"], &value["verdict"]), (&"mine".into(), &"refuse".into()));
    assert!(value["ended"].as_str().unwrap().contains("not redirected"), "{line}");
    program.end();
}

#[test]
fn it_listens_where_it_is_told_and_tells_when_it_is_ready() {
    let mut program = Running::start(&[
        "--listen",
        "127.0.0.1:0",
        "--listen",
        "127.0.0.2:0",
        "--workers",
        "1",
        "--ready-fd",
        "1",
    ]);
    let mut line = String::new();
    program.stdout().read_line(&mut line).unwrap();
    let [first, second] = program.addresses.as_slice() else { panic!("{line}") };
    assert_eq!(
        (first.ip().to_string(), second.ip().to_string()),
        ("127.0.0.1".into(), "127.0.0.2".into())
    );
    assert_eq!(line, format!("ready {first} {second}\n"));
    program.end();
}

#[test]
fn hangup_reads_the_rules_again_and_keeps_the_old_ones_if_there_is_a_mistake() {
    let rules = Scratch::new("rules.toml");
    fs::write(&rules.0, "default = \"allow\"\n").unwrap();
    let mut program = Running::start(&["--rules", rules.path()]);

    fs::write(&rules.0, "[[rule]]\naction = \"refuse\"\nport = 80\n").unwrap();
    program.signal(Signal::HUP);
    program.said("1 rules read from");

    fs::write(&rules.0, "[[rule]]\naction = \"refuse\"\nprot = 80\n").unwrap();
    program.signal(Signal::HUP);
    let message = program.said("the old rules stay in force");
    assert!(message.contains(rules.path()), "{message}");
    program.said("unknown field `prot`");
    program.end();
}

#[test]
fn it_appends_to_its_log_file() {
    let log = Scratch::new("flows.log");
    fs::write(&log.0, "before\n").unwrap();
    let program = Running::start(&["--log-file", log.path()]);
    program.visit();
    program.end();
    let text = fs::read_to_string(&log.0).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "before");
    assert!(lines[1].contains(" carnet-inspect: 127.0.0.1:"), "{text}");
    assert_eq!(lines.len(), 2, "{text}");
}

#[test]
fn it_becomes_another_user_in_all_threads() {
    let arguments = ["--user", "3999999:3999998", "--workers", "3"];
    if !geteuid().is_root() {
        let message = failure(&[&["--no-register"][..], &arguments].concat());
        assert!(message.contains("becoming user 3999999"), "{message}");
        return;
    }
    let program = Running::start(&arguments);
    program.visit();
    let tasks = format!("/proc/{}/task", program.child.id());
    let mut threads = 0;
    for task in fs::read_dir(tasks).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), ["3999999"; 4]);
        assert_eq!(field("Gid:"), ["3999998"; 4]);
        assert_eq!(field("Groups:"), ["3999998"]);
        assert_eq!(field("CapPrm:"), ["0000000000000000"]);
        assert_eq!(field("NoNewPrivs:"), ["1"]);
        threads += 1;
    }
    assert!(threads > 3, "{threads} threads");
    program.end();
}

#[test]
fn without_an_engine_it_says_so() {
    let message = failure(&[]);
    assert!(message.contains("no Carnet engine"), "{message}");
    assert!(message.contains("carnet service run"), "{message}");
}

#[test]
fn what_it_cannot_do_is_refused_in_words() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (arguments, reason) in [
        (&["--listen", taken.as_str(), "--no-register"][..], taken.as_str()),
        (&["--listen", "localhost"], "invalid"),
        (&["--rules", "/nonexistent/rules"], "/nonexistent/rules"),
        (&["--no-register", "--log-file", "/nonexistent/log"], "/nonexistent/log"),
        (&["--no-register", "--ready-fd", "999"], "--ready-fd 999"),
        (&["--user", "no-such-user-here"], "there is no user"),
        (&["--max-connections", "0"], "--max-connections"),
        (&["--workers", "0"], "--workers"),
        (&["--drain-timeout", "soon"], "--drain-timeout"),
        (&["--log", "xml"], "xml"),
        (&["--forget-records", "--original-destination", "conntrack"], "cannot be used with"),
    ] {
        let message = failure(arguments);
        assert!(message.contains(reason), "{arguments:?}: {message}");
    }
}

#[test]
fn chains_are_refused_in_words_where_they_cannot_be() {
    use std::os::unix::fs::PermissionsExt as _;
    let keys = Scratch::new("keys");
    fs::write(&keys.0, "07".repeat(32)).unwrap();
    let mode = |mode| fs::set_permissions(&keys.0, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o600);
    let from = ["--original-destination", "proxy"];
    let to = ["--send-proxy", "192.0.2.1:1"];
    let key = ["--chain-key", keys.path()];
    for (arguments, words) in [
        (&[&from[..], &to, &key].concat(), "not both"),
        (&key.to_vec(), "--chain-key is for --send-proxy, or for --original-destination proxy"),
        (&[&["--original-destination", "conntrack"][..], &to, &key].concat(), "needs records"),
        (&[&to[..], &key, &["--chain-optional"]].concat(), "--chain-optional says what comes"),
        (&[&from[..], &["--chain-optional"]].concat(), "--chain-key"),
        // It has no engine here.
        (&[&from[..], &key].concat(), "start the engine with `carnet up`"),
    ] {
        let message = failure(arguments);
        assert!(message.contains(words), "{arguments:?}: {message}");
    }
    mode(0o644);
    for way in [&from, &to] {
        let message = failure(&[&way[..], &key].concat());
        assert!(message.contains("mode 0644") && message.contains("chmod 600"), "{message}");
    }
    mode(0o600);
    fs::write(&keys.0, "not a key").unwrap();
    let message = failure(&[&to[..], &key].concat());
    assert!(
        message.contains("line 1 of the chain keys") && !message.contains("not a key"),
        "{message}"
    );
    let message = failure(&[&to[..], &["--chain-key", "/nowhere"]].concat());
    assert!(message.contains("reading the chain keys"), "{message}");
    let message = failure(&[&to[..], &["--chain-key", "/dev/null"]].concat());
    assert!(message.contains("no regular file"), "{message}");
}

//! The program on Windows: it starts, says what a callout driver has to do, closes connections that
//! none redirected, and ends in order. Without such a driver every connection is one of those.
#![cfg(windows)]
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(unsafe_code, reason = "the console is a matter of foreign functions")]

use std::fs;
use std::io::{BufRead, BufReader, Error, ErrorKind, Lines, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::windows::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use windows_sys::Win32::System::Console::{
    AttachConsole, CTRL_C_EVENT, FreeConsole, GenerateConsoleCtrlEvent, SetConsoleCtrlHandler,
};
use windows_sys::Win32::System::Threading::CREATE_NO_WINDOW;
use windows_sys::core::BOOL;

const PROGRAM: &str = env!("CARGO_BIN_EXE_carnet-inspect");

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

/// The program, running; it is killed with the test.
struct Running {
    child: Child,
    errors: Lines<BufReader<ChildStderr>>,
    addresses: Vec<SocketAddr>,
    /// What it said before it was ready.
    first: Vec<String>,
}

impl Running {
    /// Starts it and waits until it is ready.
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(arguments)
            // A console of its own, on which Ctrl-C can be pressed.
            .creation_flags(CREATE_NO_WINDOW)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut running = Self { child, errors, addresses: Vec::new(), first: Vec::new() };
        let ready = loop {
            let line = running.errors.next().unwrap().unwrap();
            if let Some((_, addresses)) = line.split_once("ready ") {
                break addresses.to_owned();
            }
            running.first.push(line);
        };
        running.addresses = ready.split(' ').map(|text| text.parse().unwrap()).collect();
        running
    }

    /// The next thing it says on its standard error that contains `part`.
    fn said(&mut self, part: &str) -> String {
        let line = self.errors.by_ref().map(Result::unwrap).find(|line| line.contains(part));
        line.unwrap_or_else(|| panic!("it ended without saying {part:?}"))
    }

    /// Makes a connection and waits until it was closed.
    fn visit(&self, address: SocketAddr) {
        let mut client = TcpStream::connect(address).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        match client.read(&mut [0]) {
            Ok(length) => assert_eq!(length, 0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }

    /// Presses Ctrl-C on its console.
    fn press_ctrl_c(&self) {
        let helper = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "helper_that_presses_ctrl_c"])
            .env(CONSOLE, self.child.id().to_string())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(helper.status.success(), "{helper:?}");
    }

    /// Asks it to end, and expects that it does so in order. Gives its log.
    fn end(mut self) -> String {
        self.press_ctrl_c();
        self.said("ending: ");
        let mut log = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut log).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
        log
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It fails if the program has ended, as it should have.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The variable that names the process on whose console Ctrl-C is pressed.
const CONSOLE: &str = "CARNET_TEST_CONSOLE";
/// Whether this process has got a Ctrl-C.
static HEEDED: AtomicBool = AtomicBool::new(false);

/// Only who is on a console can press its keys, and joining one changes what a process prints to:
/// so this is done in a process of its own.
#[test]
#[ignore = "no test: started by the others"]
fn helper_that_presses_ctrl_c() {
    // Nothing to do for who runs the ignored tests, too.
    let Ok(id) = std::env::var(CONSOLE) else { return };
    let id = id.parse().unwrap();
    // SAFETY: these have no preconditions; `heed` may be called at any time.
    unsafe {
        FreeConsole();
        assert_ne!(AttachConsole(id), 0, "{}", Error::last_os_error());
        // This process is on that console now, and so is meant too.
        assert_ne!(SetConsoleCtrlHandler(Some(heed), 1), 0);
        let sent = GenerateConsoleCtrlEvent(CTRL_C_EVENT, 0);
        assert_ne!(sent, 0, "{}", Error::last_os_error());
    }
    let pressed = Instant::now();
    while !HEEDED.load(Ordering::SeqCst) {
        assert!(pressed.elapsed() < LONG, "Ctrl-C did not arrive");
        thread::yield_now();
    }
}

/// Handles Ctrl-C by going on.
///
/// # Safety
/// Asks for nothing; its type is the interface's.
unsafe extern "system" fn heed(_event: u32) -> BOOL {
    HEEDED.store(true, Ordering::SeqCst);
    1
}

/// The output of a run that is expected to fail.
fn failure(arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = Command::new(PROGRAM).args(arguments).output().unwrap();
    assert!(!status.success(), "{arguments:?} succeeded");
    String::from_utf8(stderr).unwrap()
}

#[test]
fn it_says_who_has_to_redirect_and_that_nobody_did() {
    let mut program = Running::start(&["--log", "json", "--name", "mine"]);
    let expected = format!("to this process, {}", program.child.id());
    assert!(program.first.iter().any(|line| line.contains(&expected)), "{:?}", program.first);

    for address in program.addresses.clone() {
        program.visit(address);
    }
    program.visit(program.addresses[0]);
    let visits = program.addresses.len() + 1;
    let message = program.said("no callout driver");
    assert!(message.contains("redirected"), "{message}");

    program.press_ctrl_c();
    // It is said once only: the next thing is that it ends.
    let next = program.errors.next().unwrap().unwrap();
    assert!(next.contains("ending: "), "{next}");
    let mut log = String::new();
    program.child.stdout.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(program.child.wait().unwrap().success());
    assert_eq!(log.lines().count(), visits, "{log}");
    for line in log.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!((&value["service"], &value["verdict"]), (&"mine".into(), &"refuse".into()));
        assert_eq!(value["destination"], serde_json::Value::Null);
        let ended = value["ended"].as_str().unwrap();
        assert!(ended.contains("not supported") || ended.contains("not redirected"), "{line}");
    }
}

#[test]
fn it_listens_where_it_is_told_and_appends_to_its_log() {
    let log = std::env::temp_dir().join(format!("carnet-flows-{}.log", std::process::id()));
    fs::write(&log, "before\n").unwrap();
    let program = Running::start(&["--listen", "127.0.0.1:0", "--log-file", log.to_str().unwrap()]);
    let [address] = program.addresses.as_slice() else { panic!("{:?}", program.addresses) };
    program.visit(*address);
    assert_eq!(program.end(), "");
    let text = fs::read_to_string(&log).unwrap();
    fs::remove_file(&log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), lines[0]), (2, "before"), "{text}");
    assert!(lines[1].contains(" carnet-inspect: 127.0.0.1:"), "{text}");
}

#[test]
fn what_came_before_the_end_is_logged() {
    let program = Running::start(&["--listen", "127.0.0.1:0"]);
    let mut client = TcpStream::connect(program.addresses[0]).unwrap();
    // It may be closed already.
    let _ = client.write_all(b"GET / HTTP/1.1\r\n");
    assert_eq!(program.end().lines().count(), 1);
}

#[test]
fn what_it_cannot_do_is_refused_in_words() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (arguments, reason) in [
        (&["--listen", taken.as_str()][..], taken.as_str()),
        (&["--listen", "localhost"], "invalid"),
        (&["--rules", "C:\\nonexistent\\rules"], "C:\\nonexistent\\rules"),
        (&["--log-file", "C:\\nonexistent\\log"], "C:\\nonexistent\\log"),
        (&["--max-connections", "0"], "--max-connections"),
        // What Linux alone has is no option here.
        (&["--user", "nobody"], "--user"),
        (&["--ready-fd", "1"], "--ready-fd"),
        (&["--original-destination", "conntrack"], "--original-destination"),
    ] {
        let message = failure(arguments);
        assert!(message.contains(reason), "{arguments:?}: {message}");
    }
}

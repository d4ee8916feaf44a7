//! The C programs of the contract suite: compiling them, and the lab that they ask for what only a
//! network and an engine can give.
//!
//! A program (`tests/contract`) prints a line as each of its rows begins and ends, and requests to
//! the lab in between; see `harness.h`. It runs in a service's cgroup and in the clients' network
//! namespace.

mod datagrams;

use std::{
    env,
    fmt::Write as _,
    fs::{self, Permissions},
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            fs::{PermissionsExt as _, symlink},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use carnet_core::{abi, event::Counter, object::Conditions};

use self::datagrams::Datagrams;
use crate::{
    Lab, Must as _, Plan,
    puppet::{Hand, Puppet},
};

/// The service in whose cgroup the programs run.
pub const SERVICE: &str = "alpha";
/// Another service, to which records are delivered that are not the programs'.
const STRANGER: &str = "bravo";
/// The longest that a program may be silent: under a checker of memory accesses it is slow.
const SILENCE: Duration = Duration::from_secs(120);

/// Where another build of the library is, for a checker that wants it instrumented.
const LIBRARY: &str = "CARNET_CONTRACT_LIBRARY";
/// Arguments for the C compiler, separated by blanks.
const FLAGS: &str = "CARNET_CONTRACT_CFLAGS";

/// How a C program gets the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// It is plain C.
    None,
    /// The shared library, found by its SONAME.
    Shared,
    /// The static library.
    Static,
}

/// A directory of temporary files; removed when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one.
    #[track_caller]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "carnet-contract-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let directory = env::temp_dir().join(name);
        fs::create_dir(&directory).must("make a directory");
        let scratch = Self(directory);
        scratch.open_to_all(&scratch.0);
        scratch
    }

    /// Lets every user read and execute what is in it, whatever the umask says.
    #[track_caller]
    pub fn open_to_all(&self, path: &Path) {
        fs::set_permissions(path, Permissions::from_mode(0o755)).must("set permissions");
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It lies in the directory of temporary files anyway.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A compiled C program; removed when dropped.
#[derive(Debug)]
pub struct Program {
    directory: Scratch,
    path: PathBuf,
}

impl Program {
    /// Compiles sources below the workspace's root, with warnings as errors.
    #[track_caller]
    pub fn compile(sources: &[&str], link: Link) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
        let directory = Scratch::new();
        let program = Self { path: directory.path().join("program"), directory };

        let mut command = Command::new("cc");
        command.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]);
        command.arg(&program.path).args(sources.iter().map(|source| root.join(source)));
        let flags = env::var(FLAGS).unwrap_or_default();
        let flags: Vec<&str> = flags.split_whitespace().collect();
        if flags.contains(&"-fsanitize=thread") {
            command.arg(root.join("tests/contract/tsan.c"));
        }
        command.args(flags);
        let library = |name: &str| library_directory().join(name);
        match link {
            Link::None => {}
            Link::Shared => {
                // By the name that the loader will look for.
                let shared = library("libcarnet_winsock.so");
                for name in ["libcarnet_winsock.so", "libcarnet_winsock.so.0"] {
                    symlink(&shared, program.directory.path().join(name)).must("link the library");
                }
                command.arg("-L").arg(program.directory.path()).arg("-lcarnet_winsock");
                command.arg(format!("-Wl,-rpath,{}", program.directory.path().display()));
            }
            Link::Static => {
                command.arg(library("libcarnet_winsock.a")).args(["-ldl", "-lm", "-lrt"]);
            }
        }
        if link != Link::None {
            command.arg("-I").arg(root.join("crates/carnet-winsock/include"));
            command.arg("-I").arg(root.join("tests/contract"));
        }
        let output = command.output().must("start the C compiler, cc");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{sources:?} does not compile:\n{said}");
        program.directory.open_to_all(&program.path);
        program
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that runs it in a service's cgroup and in the clients' namespace.
    #[track_caller]
    pub fn command(&self, lab: &Lab, service: &str) -> Command {
        let mut command = Command::new(&self.path);
        lab.cgroup_of(service).enter_command(&mut command).must("enter the service's cgroup");
        let namespace = &lab.network().topology.client;
        namespace.enter_command(&mut command).must("enter the namespace");
        command
    }
}

/// Where the library is: cargo puts what a test is built with beside the test, since the library
/// is a dependency of it.
#[track_caller]
fn library_directory() -> PathBuf {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        if let Some(directory) = env::var_os(LIBRARY) {
            return PathBuf::from(directory);
        }
        let executable = env::current_exe().must("find the running executable");
        let has_it = |place: &&Path| place.join("libcarnet_winsock.so").is_file();
        let found = executable.ancestors().skip(1).take(2).find(has_it);
        found.expect("libcarnet_winsock.so beside this test or above").to_owned()
    };
    FOUND.get_or_init(find).clone()
}

/// A C program of rows at work.
struct Actor {
    child: Child,
    strings: BufReader<UnixStream>,
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Actor {
    #[track_caller]
    fn start(mut command: Command) -> Self {
        let (ours, theirs) = UnixStream::pair().must("make a socket pair");
        ours.set_read_timeout(Some(SILENCE)).must("limit the wait for rows");
        let output = theirs.as_fd().try_clone_to_owned().must("copy a descriptor");
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::from(output));
        let child = command.spawn().must("start a program");
        // The command holds the other end, too: the end of the program has to be seen.
        drop(command);
        Self { child, strings: BufReader::new(ours) }
    }
}

/// What a program asks of its lab.
struct Stage<'a> {
    lab: &'a Lab,
    client: &'a Puppet,
    open: Vec<Hand<'a>>,
    direct: Vec<TcpStream>,
    datagrams: Option<Datagrams<'a>>,
    program: u32,
}

impl Stage<'_> {
    #[track_caller]
    fn answer(&mut self, request: &str) -> String {
        let (lab, client) = (self.lab, self.client);
        let of_family = |family: &str| if family == "6" { lab.v6() } else { lab.v4() };
        match request.split(' ').collect::<Vec<_>>()[..] {
            ["destination", family] => {
                let address = of_family(family);
                format!("{} {}", address.ip(), address.port())
            }
            ["register"] => {
                let registered = lab.engine().register_listener_of(SERVICE, self.program);
                registered.must("register the program's listeners").len().to_string()
            }
            ["connect", family] => {
                self.open.push(self.client.connect(of_family(family)).must("connect a client"));
                "done".into()
            }
            ["direct", port] => {
                let port: u16 = port.parse().must("read a port");
                let to = SocketAddr::from(([127, 0, 0, 1], port));
                let namespace = &lab.network().topology.client;
                let connection = namespace.run(|| TcpStream::connect(to));
                self.direct.push(connection.must("enter the namespace").must("connect"));
                "done".into()
            }
            ["close"] => {
                self.open.clear();
                self.direct.clear();
                "done".into()
            }
            ["record", "stranger"] => hexadecimal(&strangers_record(lab)),
            ["record", "foreign"] => {
                let other = Lab::beside(lab.network());
                hexadecimal(&strangers_record(&other))
            }
            ["count", name] => {
                let counter = [
                    Counter::RecordsSet,
                    Counter::RecordsForged,
                    Counter::RecordsMalformed,
                    Counter::AccessDenied,
                    Counter::Onward,
                    Counter::Redirected,
                    Counter::Forgotten,
                ]
                .into_iter()
                .find(|counter| format!("{counter:?}") == name);
                lab.counter(counter.expect("a counter that programs may ask for")).to_string()
            }
            ["detach"] => {
                lab.down();
                "done".into()
            }
            ["attach"] => {
                lab.up();
                lab.service(SERVICE, 100);
                "done".into()
            }
            ["udp", ref request @ ..] => {
                self.datagrams.get_or_insert_with(|| Datagrams::new(lab, client)).answer(request)
            }
            ["leave"] => {
                lab.apps().add_process(self.program).must("move the program");
                "done".into()
            }
            _ => panic!("the program asks for {request:?}"),
        }
    }
}

/// A record that is delivered to another service than the programs'.
#[track_caller]
fn strangers_record(lab: &Lab) -> Vec<u8> {
    let other = lab.network().another_echo();
    let conditions =
        Conditions { ports: vec![other.address().port().into()], ..Conditions::default() };
    lab.service_with(STRANGER, Plan { weight: 999, conditions, ..Plan::default() });
    let (service, client) = (lab.puppet_of(STRANGER), lab.puppet());
    let listener = service.serve(SocketAddr::from(([127, 0, 0, 1], 0)));
    let _connection = client.connect(other.address()).must("connect");
    let accepted = listener.accept().must("accept");
    accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query a record")
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        // Writing to a string does not fail.
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

/// Runs a program of rows to its end, in a lab whose redirects have this context, and reports each row on a
/// line of its own, as `contract: PROGRAM/ROW passed` or `… FAILED`. Panics unless all have passed.
#[track_caller]
pub fn run_rows(name: &str, link: Link, context: Option<&[u8]>) {
    let plan = Plan { context: context.map(<[u8]>::to_vec), ..Plan::default() };
    run_rows_in(&Lab::new(), plan, name, link);
}

/// The same in this lab, where the programs' service is yet to be made.
#[track_caller]
pub fn run_rows_in(lab: &Lab, plan: Plan, name: &str, link: Link) {
    let source = format!("tests/contract/{name}.c");
    let program =
        Program::compile(&[&source, "tests/contract/suite.c", "tests/contract/harness.c"], link);
    lab.service_with(SERVICE, plan);
    let client = lab.puppet();
    let mut actor = Actor::start(program.command(lab, SERVICE));
    let program = actor.child.id();
    let mut stage = Stage {
        lab,
        client: &client,
        open: Vec::new(),
        direct: Vec::new(),
        datagrams: None,
        program,
    };

    let mut line = String::new();
    let mut failures = Vec::new();
    let (mut begun, mut passed) = (String::new(), 0);
    let complete = loop {
        line.clear();
        let read = actor.strings.read_line(&mut line);
        if !matches!(read, Ok(length) if length > 0) {
            println!("contract: {name}/{begun} FAILED");
            failures.push(format!("{begun}: the program has ended or hangs: {read:?}"));
            break false;
        }
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("begin", row) => row.clone_into(&mut begun),
            ("ok", row) => {
                println!("contract: {name}/{row} passed");
                passed += 1;
                begun.clear();
            }
            ("failed", detail) => {
                println!("contract: {name}/{begun} FAILED");
                failures.push(detail.to_owned());
            }
            ("lab", request) => {
                let answer = stage.answer(request) + "\n";
                let sent = actor.strings.get_mut().write_all(answer.as_bytes());
                sent.must("answer the program");
            }
            ("end", "") => break true,
            _ => panic!("{name} prints {line:?}"),
        }
    };
    if complete {
        let status = actor.child.wait().must("wait for the program's end");
        if status.success() != failures.is_empty() {
            failures.push(format!("the program ended with {status}"));
        }
    }
    assert!(failures.is_empty(), "{name}:\n  {}", failures.join("\n  "));
    assert!(passed > 0, "{name} has no row");
}

//! The commands on a real engine: an instance for each test, in a cgroup and a BPF file system of
//! its own. Connections are made over the loopback only.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use carnet_testbed::{
    BpfDirectory, Cgroup, EchoServer, NetworkNamespace, PeerClient, Process, require_root,
};
use serde_json::{Value, json};

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a test's instance lives.
struct World {
    bpffs: BpfDirectory,
    cgroup: Cgroup,
}

impl World {
    /// A world in which nothing is up.
    fn new(name: &str) -> Self {
        require_root().unwrap();
        let name = format!("carnet-cli-{name}");
        Self { bpffs: BpfDirectory::create(&name).unwrap(), cgroup: Cgroup::create(&name).unwrap() }
    }

    /// A world in which the instance `test` is up.
    fn up(name: &str) -> Self {
        let world = Self::new(name);
        world.succeeds(&["up", "--cgroup", world.cgroup.path().to_str().unwrap()]);
        world
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carnet"));
        command.arg("--bpffs").arg(self.bpffs.path()).args(["--instance", "test"]).args(arguments);
        command
    }

    /// Runs a command to its end: its status, standard output and standard error.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        // Not `Command::output`, which waits forever.
        let errors = Scratch::new();
        let mut command = self.command(arguments);
        let mut process = Process::spawn(command.stderr(errors.writer())).unwrap();
        process.close_input();
        let status = process.wait(PATIENCE).unwrap();
        (status.code().unwrap(), process.lines().join("\n"), errors.read())
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let (status, out, error) = self.run(arguments);
        assert_eq!((status, error.as_str()), (0, ""), "{arguments:?}");
        out
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.succeeds(&[&["--json"], arguments].concat())).unwrap()
    }

    /// Runs a command that has to fail and to say this.
    fn fails(&self, arguments: &[&str], words: &[&str]) {
        let (status, _, error) = self.run(arguments);
        assert_eq!(status, 1, "{arguments:?}: {error}");
        for word in words {
            assert!(error.contains(word), "{arguments:?}: {error}");
        }
    }

    /// Adds a provider, a sublayer of it and a filter that sends a port to a service that there is.
    fn redirect(&self, service: &str, port: u16) {
        self.succeeds(&["sublayer", "add", service, "--provider", "acme"]);
        let port = port.to_string();
        self.succeeds(&[
            "filter",
            "add",
            "--sublayer",
            service,
            "--redirect",
            service,
            "--port",
            &port,
            "--name",
            service,
        ]);
    }

    /// Starts `carnet inspect` as a service, and waits until it is ready.
    fn inspector(&self, name: &str, options: &[&str]) -> Process {
        let program = env!("CARGO_BIN_EXE_carnet");
        let run = ["service", "run", name, "--provider", "acme", "--", program, "inspect"];
        let ready = ["--listen", "127.0.0.1:0", "--ready-fd", "1", "--log", "json"];
        let mut command = self.command(&[&run[..], &ready, options].concat());
        let process = Process::spawn(command.stderr(Stdio::null())).unwrap();
        process.wait_for_line("readiness", PATIENCE, |line| line.starts_with("ready ")).unwrap();
        process
    }

    /// Starts `carnet trace`, and waits until it misses nothing. Its standard error is among its
    /// lines.
    fn trace(&self, options: &[&str]) -> Process {
        let carnet = self.command(&[&["trace"], options].concat());
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 2>&1", "sh"]).arg(carnet.get_program());
        let process = Process::spawn(command.args(carnet.get_args())).unwrap();
        let waiting = |line: &str| line.starts_with("waiting");
        process.wait_for_line("readiness", PATIENCE, waiting).unwrap();
        process
    }

    /// Starts a program in the scope that connects, says so and holds the connection until its
    /// input ends.
    fn client(&self, port: u16) -> Process {
        let script = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port}; echo hello >&3; read -u 3 answer; \
             echo \"$answer\"; cat"
        );
        let mut command = Command::new("bash");
        self.cgroup.enter_command(command.args(["-c", &script]).stderr(Stdio::null())).unwrap();
        Process::spawn(&mut command).unwrap()
    }

    /// The pins of all instances.
    fn pins(&self) -> Vec<String> {
        // Names with a dot are the kernel's own.
        let names = names(self.bpffs.path()).into_iter();
        names.filter(|name| !name.contains('.')).collect()
    }

    /// The cgroups below the scope.
    fn cgroups(&self) -> Vec<String> {
        let names = names(self.cgroup.path()).into_iter();
        names.filter(|name| self.cgroup.path().join(name).is_dir()).collect()
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A file of no name, for what a process has to say on its standard error.
struct Scratch(fs::File);

impl Scratch {
    fn new() -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        Self(rustix::fs::memfd_create("standard error", flags).unwrap().into())
    }

    fn writer(&self) -> Stdio {
        self.0.try_clone().unwrap().into()
    }

    fn read(&self) -> String {
        let mut bytes = vec![0; usize::try_from(self.0.metadata().unwrap().len()).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&self.0, &mut bytes, 0).unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

fn echo() -> EchoServer {
    EchoServer::start([(Ipv4Addr::LOCALHOST, 0).into()]).unwrap()
}

#[test]
fn a_key_is_rotated_and_never_shown() {
    let world = World::up("key");
    let key = |status: &Value| status["key"].clone();
    let status = world.json(&["status"]);
    assert_eq!(key(&status)["generation"], 1);
    assert_eq!(key(&status)["previous_accepted_seconds"], 0);

    let rotated = world.json(&["rotate-key", "--overlap", "3600"]);
    assert_eq!(rotated, json!({ "generation": 2, "previous": 1, "overlap_seconds": 3600 }));
    let status = world.json(&["status"]);
    assert_eq!(key(&status)["generation"], 2);
    let left = key(&status)["previous_accepted_seconds"].as_u64().unwrap();
    assert!((3500..=3600).contains(&left), "{status}");
    assert!(key(&status)["age_seconds"].as_u64().unwrap() < 100, "{status}");
    // That is all there is to see of it.
    assert_eq!(key(&status).as_object().unwrap().len(), 3);
    assert!(world.succeeds(&["status"]).contains("key          number 2, for "));

    let line = world.succeeds(&["rotate-key"]);
    assert_eq!(line, "instance test: key 3 issues records, key 2 is accepted for 600 seconds");
    let line = world.succeeds(&["rotate-key", "--overlap", "0"]);
    assert_eq!(line, "instance test: key 4 issues records, key 3 is refused");
    assert_eq!(key(&world.json(&["status"]))["previous_accepted_seconds"], 0);

    let (status, _, error) = world.run(&["rotate-key", "--overlap", "3601"]);
    assert!(status == 2 && error.contains("3600"), "{error}");
    world.succeeds(&["down"]);
    world.fails(&["rotate-key"], &["carnet up"]);
}

/// What it starts does not get at the maps through descriptors that the command left open.
#[test]
fn a_service_inherits_no_descriptor_of_the_engine() {
    let world = World::up("inherit");
    world.succeeds(&["provider", "add", "acme"]);
    let list = "for fd in /proc/$$/fd/*; do readlink $fd; done; :";
    let (status, out, error) =
        world.run(&["service", "run", "scan", "--provider", "acme", "--", "bash", "-c", list]);
    assert_eq!(status, 0, "{error}");
    assert!(out.lines().count() >= 3, "{out}");
    // The three standard ones are there.
    assert!(!out.contains("bpf"), "{out}");
    assert!(!out.contains(world.bpffs.path().to_str().unwrap()), "{out}");
    assert!(!out.contains(world.cgroup.path().to_str().unwrap()), "{out}");
}

#[test]
fn a_policy_is_built_shown_explained_and_taken_down() {
    let world = World::up("policy");
    world.fails(&["up", "--cgroup", world.cgroup.path().to_str().unwrap()], &["already up"]);
    world.fails(&["status", "--instance", "tset"], &["not up", "hint: up is --instance test"]);
    let service = world.cgroup.child("tls").unwrap();
    let service = service.path().to_str().unwrap();

    let provider = world.json(&["provider", "add", "acme", "--description", "Acme Inc."]);
    assert_eq!(provider["name"], "acme");
    world.succeeds(&["sublayer", "add", "late", "--provider", "acme", "--weight", "1"]);
    world.succeeds(&["sublayer", "add", "early", "--provider", "acme", "--weight", "2"]);
    let add = ["service", "add", "tls", "--provider", "acme", "--on-failure", "skip", "--gateway"];
    assert_eq!(world.succeeds(&[&add[..], &["--cgroup", service]].concat()), "service tls added");
    let executable = fs::canonicalize("/bin/sh").unwrap();
    let pid = std::process::id().to_string();
    let own = format!("pid:{pid}");
    world.succeeds(&[
        "filter",
        "add",
        "--name",
        "web",
        "--sublayer",
        "early",
        "--redirect",
        "tls",
        "--context",
        "hex:00ff",
        "--protocol",
        "tcp",
        "--to",
        "192.0.2.0/24",
        "--to",
        "2001:db8::/32",
        "--port",
        "80",
        "--port",
        "443-444",
        "--uid",
        "0-1000",
        "--cgroup",
        service,
        "--exe",
        "/bin/sh",
        "--netns",
        "/proc/self/ns/net",
        "--netns",
        &own,
    ]);
    world.succeeds(&[
        "filter",
        "add",
        "--name",
        "no-mail",
        "--sublayer",
        "late",
        "--block",
        "--port",
        "25",
    ]);

    let sublayers = world.json(&["sublayer", "ls"]);
    assert_eq!((&sublayers[0]["name"], &sublayers[1]["name"]), (&json!("early"), &json!("late")));
    let services = world.json(&["service", "ls"]);
    assert_eq!(
        (&services[0]["on_failure"], &services[0]["gateway"]),
        (&json!("skip"), &json!(true))
    );
    assert_eq!(services[0]["listeners"], json!([]));
    let filters = world.json(&["filter", "ls"]);
    let conditions = &filters[0]["conditions"];
    assert_eq!(filters[0]["name"], "web");
    assert_eq!(filters[0]["action"]["redirect"]["context"]["hex"], "00ff");
    assert_eq!(conditions["destinations"], json!(["192.0.2.0/24", "2001:db8::/32"]));
    assert_eq!(conditions["ports"], json!(["80", "443-444"]));
    assert_eq!(conditions["executables"][0]["path"], json!(executable));
    assert_eq!(filters[1]["name"], "no-mail");
    let table = world.succeeds(&["filter", "ls"]);
    assert!(table.lines().next().unwrap().starts_with("ID"), "{table}");
    assert!(table.contains("block"), "{table}");

    // Nothing listens for the service, which is then passed over.
    let explained = world.json(&[
        "explain",
        "--to",
        "192.0.2.7:443",
        "--exe",
        "/bin/sh",
        "--uid",
        "1000",
        "--cgroup",
        service,
        "--netns",
        "/proc/self/ns/net",
    ]);
    assert_eq!(explained["arrives"], true);
    assert_eq!(explained["legs"][0]["matched"][0]["filter"], "web");
    let refused = world.json(&["explain", "--to", "192.0.2.7:25"]);
    assert_eq!(refused["arrives"], false);
    assert_eq!(refused["legs"][0]["reason"], "filter");
    let of_process = world.json(&["explain", "--to", "192.0.2.7:443", "--pid", &pid]);
    assert_eq!(of_process["legs"][0]["unknown"], json!([]));

    let status = world.json(&["status"]);
    assert_eq!(status["instance"], "test");
    assert_eq!(status["up_to_date"], true);
    assert_eq!(status["generation"], 6);
    assert!(status["links"].as_array().unwrap().iter().any(|link| link["service"] == "tls"));
    let status = world.succeeds(&["status"]);
    assert!(status.lines().all(|line| line.chars().count() <= 100), "{status}");
    assert!(world.json(&["upgrade"])["replaced"].as_u64().unwrap() > 0);
    assert_eq!(world.json(&["flows"]), json!([]));
    let (status, out, _) = world.run(&["trace", "--timeout", "10ms"]);
    assert_eq!((status, out.as_str()), (0, ""));

    world.fails(&["provider", "rm", "acme"], &["acme", "used by"]);
    world.fails(&["service", "rm", "tls"], &["used by filter web"]);
    for object in [
        ["filter", "web"],
        ["filter", "no-mail"],
        ["service", "tls"],
        ["sublayer", "early"],
        ["sublayer", "late"],
        ["provider", "acme"],
    ] {
        let [kind, name] = object;
        assert_eq!(world.succeeds(&[kind, "rm", name]), format!("{kind} {name} removed"));
        assert!(!world.json(&[kind, "ls"]).to_string().contains(name));
    }
    assert_eq!(world.succeeds(&["down"]), "instance test is down");
    world.fails(&["status"], &["carnet up"]);
    assert_eq!(world.pins(), [""; 0]);
}

#[test]
fn what_is_refused_changes_nothing() {
    let world = World::up("refused");
    world.succeeds(&["provider", "add", "acme"]);
    world.succeeds(&["sublayer", "add", "first", "--provider", "acme"]);
    let before = world.json(&["status"])["generation"].clone();
    let cgroup = world.cgroup.path().to_str().unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        (&["provider", "add", "acme"], &["already a provider", "acme"]),
        (&["provider", "rm", "acne"], &["no provider", "did you mean acme?"]),
        (&["provider", "rm", "77"], &["no provider"]),
        (&["sublayer", "add", "x", "--provider", "zebra"], &["carnet provider add zebra"]),
        (&["sublayer", "rm", "frist"], &["did you mean first?"]),
        (
            &["service", "add", "s", "--provider", "acme", "--cgroup", "/nonexistent"],
            &["no cgroup /nonexistent", "hint: "],
        ),
        (&["service", "add", "s", "--provider", "acme", "--cgroup", "/tmp"], &["/tmp"]),
        (
            &["service", "add", "s", "--provider", "acme", "--cgroup", cgroup, "--trust", "s"],
            &["cannot trust itself"],
        ),
        (
            &["service", "add", "s", "--provider", "acme", "--cgroup", cgroup, "--trust", "t"],
            &["no service", "carnet service add t"],
        ),
        (&["service", "rm", "s"], &["no service"]),
        (&["service", "run", "s", "--provider", "zebra", "--", "true"], &["no provider"]),
        (&["service", "run", "s", "--", "true"], &["--provider PROVIDER"]),
        (&["service", "register", "s", "--pid", "1"], &["no service"]),
        (&["service", "register", "s", "--pid", "2147483647"], &["no process 2147483647"]),
        (&["filter", "add", "--sublayer", "second", "--permit"], &["carnet sublayer add second"]),
        (&["filter", "add", "--sublayer", "first", "--redirect", "s"], &["no service"]),
        (
            &["filter", "add", "--sublayer", "first", "--permit", "--exe", "/nonexistent"],
            &["/nonexistent"],
        ),
        (&["filter", "add", "--sublayer", "first", "--permit", "--exe", "/tmp"], &["/tmp"]),
        (&["filter", "add", "--sublayer", "first", "--permit", "--exe", "sh"], &["did you mean /"]),
        (
            &["filter", "add", "--sublayer", "first", "--permit", "--cgroup", "/nonexistent"],
            &["no cgroup"],
        ),
        (
            &["filter", "add", "--sublayer", "first", "--permit", "--netns", "/dev/null"],
            &["/dev/null"],
        ),
        (
            &["filter", "add", "--sublayer", "first", "--permit", "--netns", "pid:2147483647"],
            &["no process"],
        ),
        (&["filter", "rm", "web"], &["no filter"]),
        (&["explain", "--to", "192.0.2.1:1", "--dead", "s"], &["no service"]),
        (&["explain", "--to", "192.0.2.1:1", "--pid", "2147483647"], &["no process"]),
        (&["run", "--cgroup", "/", "--", "true"], &["outside"]),
        (&["run", "--", "/nonexistent/command"], &["/nonexistent/command"]),
    ];
    for (arguments, words) in cases {
        let (status, _, error) = world.run(arguments);
        assert!(status == 1 || status == 2, "{arguments:?}: {status}, {error}");
        for word in *words {
            assert!(error.contains(word), "{arguments:?}: {error}");
        }
    }
    assert_eq!(world.json(&["status"])["generation"], before);
    assert_eq!(world.cgroups(), [""; 0]);
    world.succeeds(&["down"]);
}

#[test]
fn a_service_runs_in_a_cgroup_of_its_own() {
    let world = World::up("service");
    let server = echo();
    let port = server.address().port();
    world.succeeds(&["provider", "add", "acme"]);
    let mut service = world.inspector("web", &[]);
    world.redirect("web", port);
    // One for connections, and one for UDP flows at the same address.
    let services = world.json(&["service", "ls"]);
    let listeners = services[0]["listeners"].as_array().unwrap();
    assert_eq!(listeners.len(), 2);
    assert_eq!(listeners[0]["address"], listeners[1]["address"]);
    let protocols = [&listeners[0]["protocol"], &listeners[1]["protocol"]];
    assert_eq!(protocols, ["tcp", "udp"]);
    world.fails(&["service", "run", "web", "--", "true"], &["running already"]);

    let mut trace = world.trace(&["--json", "--count", "2"]);
    world.fails(&["trace", "--count", "1"], &["already have a reader"]);
    let mut client = world.client(port);
    client.wait_for_line("the echo", PATIENCE, |line| line == "hello").unwrap();

    let flows = world.json(&["flows"]);
    assert_eq!(flows.as_array().unwrap().len(), 1, "{flows}");
    assert_eq!(flows[0]["services"], json!(["web"]));
    assert_eq!(flows[0]["onward"], true);
    assert_eq!(flows[0]["application"]["pid"], client.id());
    assert_eq!(flows[0]["destination"], server.address().to_string());
    let table = world.succeeds(&["flows"]);
    assert!(table.contains(&format!("bash[{}]", client.id())), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");

    trace.wait(PATIENCE).unwrap();
    let events: Vec<Value> =
        trace.lines()[1..].iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&events[0]["event"], &events[0]["service"]), (&json!("redirected"), &json!("web")));
    assert_eq!(events[0]["filter"], "web");
    assert_eq!(events[0]["command"], "bash");
    assert_eq!(events[1]["event"], "onward");

    let pid = client.id().to_string();
    let to = server.address().to_string();
    let explained = world.json(&["explain", "--to", &to, "--pid", &pid]);
    assert_eq!(explained["services"], json!(["web"]));
    assert_eq!(explained["if_dead"][0]["arrives"], false);
    let explained = world.json(&["explain", "--to", &to, "--pid", &pid, "--dead", "web"]);
    assert_eq!(explained["legs"][0]["reason"], "service_unavailable");

    client.close_input();
    assert!(client.wait(PATIENCE).unwrap().success());
    service.terminate().unwrap();
    assert_eq!(service.wait(PATIENCE).unwrap().code(), Some(0));
    assert_eq!(world.cgroups(), [""; 0]);
    assert_eq!(world.json(&["service", "ls"])[0]["listeners"], json!([]));

    // It can run again, and its exit status is passed on; other changes are possible meanwhile.
    world.succeeds(&["sublayer", "add", "other", "--provider", "acme"]);
    assert_eq!(world.run(&["service", "run", "web", "--", "sh", "-c", "exit 7"]).0, 7);
    assert_eq!(world.run(&["service", "run", "web", "--keep", "--", "true"]).0, 0);
    assert_eq!(world.cgroups(), ["carnet-test-web"]);
    world.succeeds(&["down"]);
    assert_eq!(world.pins(), [""; 0]);
}

#[test]
fn a_service_that_forgets_the_record_is_named() {
    let world = World::up("forgets");
    let server = echo();
    let port = server.address().port();
    world.succeeds(&["provider", "add", "acme"]);
    let _service = world.inspector("web", &["--forget-records"]);
    world.redirect("web", port);
    let trace = world.trace(&["--color", "never"]);
    let mut client = world.client(port);
    let forgot = |line: &str| line.contains("service web forgot to set the record");
    trace.wait_for_line("who forgot", PATIENCE, forgot).unwrap();
    trace.wait_for_line("the loop", PATIENCE, |line| line.contains("loop ended")).unwrap();
    client.close_input();
    client.wait(PATIENCE).unwrap();
    assert!(server.connections().is_empty());
}

#[test]
fn listeners_of_an_unmodified_program_are_registered() {
    let world = World::up("register");
    let server = echo();
    let port = server.address().port();
    world.succeeds(&["provider", "add", "acme"]);
    let _service = world.inspector("web", &["--no-register"]);
    world.redirect("web", port);
    let cgroup = world.cgroup.path().join("carnet-test-web");
    let pid = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().trim().to_owned();
    let registered = world.json(&["service", "register", "web", "--pid", &pid]);
    assert_eq!(registered["listeners"].as_array().unwrap().len(), 2);
    let mut client = world.client(port);
    client.wait_for_line("the echo", PATIENCE, |line| line == "hello").unwrap();
    assert_eq!(world.json(&["flows"])[0]["services"], json!(["web"]));
    client.close_input();
    client.wait(PATIENCE).unwrap();
    let own = std::process::id().to_string();
    let (status, _, error) = world.run(&["service", "register", "web", "--pid", &own]);
    assert_eq!(status, 1, "{error}");
}

#[test]
fn a_program_that_does_not_register_is_registered_by_its_port() {
    let world = World::up("port");
    let server = echo();
    let port = server.address().port();
    world.succeeds(&["provider", "add", "acme"]);
    world.fails(&["service", "wait", "web", "--timeout", "0"], &["no service \"web\""]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (own, listen) = (free.port().to_string(), free.to_string());
    let program = env!("CARGO_BIN_EXE_carnet");
    let run = ["service", "run", "web", "--provider", "acme", "--unmodified", "--listen-port"];
    let inspect = [&own, "--", program, "inspect", "--no-register", "--listen", &listen];
    let mut command = world.command(&[&run[..], &inspect].concat());
    for _ in 0..2 {
        let mut service = Process::spawn(command.stderr(Stdio::null())).unwrap();
        world.succeeds(&["service", "wait", "web", "--timeout", "100"]);
        let listed = &world.json(&["service", "ls"])[0];
        assert_eq!(listed["listeners"][0]["address"], json!(listen));
        assert_eq!(
            (&listed["unmodified"], &listed["listen_port"]),
            (&json!(true), &json!(free.port()))
        );
        if world.json(&["filter", "ls"]).as_array().unwrap().is_empty() {
            world.redirect("web", port);
        }
        let mut client = world.client(port);
        client.wait_for_line("the echo", PATIENCE, |line| line == "hello").unwrap();
        client.close_input();
        client.wait(PATIENCE).unwrap();
        service.terminate().unwrap();
        service.wait(PATIENCE).unwrap();
    }
    let gone = ["service", "wait", "web", "--timeout", "0"];
    world.fails(&gone, &["service web listens nowhere", &format!("a socket to port {own}")]);
}

#[test]
fn a_service_is_named_by_its_systemd_unit() {
    let world = World::up("unit");
    world.succeeds(&["provider", "add", "acme"]);
    let slice = world.cgroup.child("made-up.slice").unwrap();
    let unit = format!("carnet-{}.service", world.cgroup.id());
    let add = ["service", "add", "web", "--provider", "acme", "--unit", &unit];
    world.fails(&add, &["no cgroup is that of a systemd unit", "start the unit first"]);
    let cgroup = slice.child(&unit).unwrap();
    let added = world.json(&add);
    assert_eq!(added["cgroup"]["id"], json!(cgroup.id()));
    let other = world.cgroup.child(&unit).unwrap();
    let add = ["service", "add", "mail", "--provider", "acme", "--unit", &unit];
    world.fails(&add, &["several cgroups are named", "choose one with --cgroup"]);
    drop(other);
}

#[test]
fn what_listens_in_another_network_namespace_is_told_from_what_is_dead() {
    let world = World::up("netns");
    world.succeeds(&["provider", "add", "acme"]);
    let _service = world.inspector("web", &["--no-register"]);
    world.redirect("web", 8080);
    let cgroup = world.cgroup.path().join("carnet-test-web");
    let pid = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().trim().to_owned();
    let register = ["service", "register", "web", "--pid", &pid];
    let elsewhere = NetworkNamespace::create("elsewhere").unwrap();
    let held = format!("/proc/{}/fd/{}", std::process::id(), elsewhere.as_fd().as_raw_fd());
    let words = ["listens on no TCP or UDP socket in that network namespace"];
    world.fails(&[&register[..], &["--netns", &held]].concat(), &words);
    let words = ["no UDP socket that is not connected and bound to 127.0.0.1:53"];
    world.fails(&[&register[..], &["--udp", "127.0.0.1:53"]].concat(), &words);
    let own = format!("pid:{pid}");
    let registered = world.json(&[&register[..], &["--netns", &own]].concat());
    let listening = &registered["listeners"][0];
    assert_eq!((&listening["protocol"], &listening["netns"]), (&json!("tcp"), &listening["home"]));
    assert_eq!(world.json(&["service", "ls"])[0]["listeners"], registered["listeners"]);

    let question = ["explain", "--to", "192.0.2.7:8080", "--netns"];
    let here = world.json(&[&question[..], &[own.as_str()]].concat());
    assert_eq!((&here["arrives"], &here["services"]), (&json!(true), &json!(["web"])));
    let there = world.json(&[&question[..], &[held.as_str()]].concat());
    assert_eq!(there["arrives"], false);
    assert_eq!(there["legs"][0]["states"][0]["elsewhere"], true);
    let told = world.succeeds(&[&question[..], &[held.as_str()]].concat());
    assert!(told.contains("web has no live listener in this network namespace"), "{told}");

    let trace = world.trace(&["--color", "never"]);
    let client = PeerClient::new("192.0.2.7:8080".parse().unwrap())
        .in_namespace(&elsewhere)
        .in_cgroup(&world.cgroup)
        .timeout(PATIENCE);
    assert_eq!(client.run().unwrap()[0].errno.as_deref(), Some("ECONNREFUSED"));
    let cookie = elsewhere.cookie().unwrap();
    let words = format!(
        "refused: service web has no live listener in the network namespace cookie:{cookie}, \
         though it has in others by filter web"
    );
    trace.wait_for_line("why", PATIENCE, |line| line.contains(&words)).unwrap();

    // The service listens on the loopback, so nobody reaches it from there.
    let address = listening["address"].as_str().unwrap();
    let reach = ["service", "register", "web", "--netns", &held, "--listen", address];
    world.fails(&reach, &["cannot reach a listener at", "no loopback"]);
    let unreach = ["service", "unregister", "web", "--listen", address];
    world.fails(&unreach, &["no flows of another network namespace reach service web"]);
}

#[test]
fn a_command_runs_in_the_scope_of_the_instance() {
    let world = World::up("run");
    let path = world.succeeds(&["run", "--", "cat", "/proc/self/cgroup"]);
    let scope = world.cgroup.path().file_name().unwrap().to_str().unwrap();
    assert!(path.lines().any(|line| line.contains(&format!("{scope}/run-"))), "{path}");
    assert_eq!(world.run(&["run", "--", "sh", "-c", "exit 9"]).0, 9);
    assert_eq!(world.run(&["run", "--", "sh", "-c", "kill -TERM $$"]).0, 128 + 15);
    // What a command leaves running is gone with it.
    world.succeeds(&["run", "--", "sh", "-c", "sleep 1000 > /dev/null & true"]);
    assert_eq!(world.cgroups(), [""; 0]);

    let running = Process::spawn(&mut world.command(&["run", "--", "sh", "-c", "echo on; cat"]));
    let mut running = running.unwrap();
    running.wait_for_line("the command", PATIENCE, |line| line == "on").unwrap();
    running.terminate().unwrap();
    assert_eq!(running.wait(PATIENCE).unwrap().code(), Some(128 + 15));
    assert_eq!(world.cgroups(), [""; 0]);
    world.succeeds(&["down"]);
}

#[test]
fn a_command_runs_with_an_instance_for_it_alone() {
    let world = World::new("run-alone");
    let server = echo();
    let port = server.address().port();
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}; echo hello >&3; read -u 3 answer; echo $answer; exit 5"
    );
    let cgroup = world.cgroup.path().to_str().unwrap();
    for json in [false, true] {
        let option: &[&str] = if json { &["--json"] } else { &[] };
        let run = ["run", "--cgroup", cgroup, "--", "bash", "-c", &script];
        let (status, out, error) = world.run(&[option, &run].concat());
        assert_eq!((status, out.as_str()), (5, "hello"), "{error}");
        // One line for the one connection, and nothing else.
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(&server.address().to_string()), "{error}");
        if json {
            let entry: Value = serde_json::from_str(&error).unwrap();
            assert_eq!(entry["executable"], json!(bash()));
        }
        assert_eq!(world.cgroups(), [""; 0]);
        assert_eq!(world.pins(), [""; 0]);
    }
    let (status, _, error) = world.run(&["run", "--cgroup", cgroup, "--", "/nonexistent/command"]);
    assert_eq!(status, 1, "{error}");
    assert_eq!(world.cgroups(), [""; 0]);
    assert_eq!(world.pins(), [""; 0]);
}

/// The shell, as the kernel shows it.
fn bash() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|directory| directory.join("bash"));
    fs::canonicalize(found.into_iter().find(|path| path.is_file()).unwrap()).unwrap()
}

/// A program that tries to make the sockets that its arguments name (family, type, protocol), and
/// says of each `made` or the number of the error.
const SOCKETS: &str = "import socket, sys\n\
    for name in sys.argv[1:]:\n\
    \x20   try: socket.socket(*map(int, name.split(','))); print('made')\n\
    \x20   except OSError as error: print(error.errno)";
/// A raw socket and a packet socket, for that program.
const RAW: &str = "2,3,1";
const PACKET: &str = "17,3,0";

#[test]
fn sockets_that_nobody_would_see_are_refused() {
    let world = World::new("unseen");
    let scope = world.cgroup.path().to_str().unwrap();
    let run = ["run", "--", "python3", "-I", "-c", SOCKETS, RAW, PACKET, "2,1,0", "10,2,0"];
    world.succeeds(&["up", "--cgroup", scope]);
    assert_eq!(world.json(&["status"])["refuse_unseen"], false);
    assert_eq!(world.succeeds(&run), "made\nmade\nmade\nmade");
    world.succeeds(&["down"]);

    world.succeeds(&["up", "--cgroup", scope, "--refuse-unseen"]);
    assert_eq!(world.json(&["status"])["refuse_unseen"], true);
    assert!(
        world.succeeds(&["status"]).contains("sockets that connect past the hooks are refused")
    );
    let mut trace = world.trace(&["--count", "1"]);
    // Refused by the hook; packet sockets do not come there.
    let mut command = Command::new("python3");
    command.args(["-I", "-c", SOCKETS, RAW, PACKET, "2,1,0"]);
    world.cgroup.enter_command(&mut command).unwrap();
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "1\nmade\nmade\n");
    trace.wait(PATIENCE).unwrap();
    let told = trace.lines().join("\n");
    assert!(told.contains("raw IPv4 socket of protocol 1 refused"), "{told}");
    assert!(told.contains("python3"), "{told}");
    let counted = world.json(&["status"])["counters"].clone();
    let refused = counted.as_array().unwrap().iter().find(|c| c["name"] == "sockets_refused");
    assert_eq!(refused.unwrap()["value"], 1);

    // A command that is run has not the capability for either.
    assert_eq!(world.succeeds(&run), "1\n1\nmade\nmade");
    assert_eq!(world.json(&["upgrade"])["defunct"], 0);
    assert_eq!(world.json(&["status"])["refuse_unseen"], true);
    assert_eq!(world.succeeds(&run), "1\n1\nmade\nmade");
    world.succeeds(&["down"]);
}

#[test]
fn a_block_ends_connections_that_are_there_if_it_is_told_to() {
    let world = World::up("end-existing");
    world.succeeds(&["provider", "add", "acme"]);
    world.succeeds(&["sublayer", "add", "rules", "--provider", "acme"]);
    let (server, other) = (echo(), echo());
    let clients = [&server, &server, &other].map(|to| {
        let client = world.client(to.address().port());
        client.wait_for_line("the answer", PATIENCE, |line| line == "hello").unwrap();
        client
    });
    let port = server.address().port().to_string();
    let block = ["filter", "add", "--sublayer", "rules", "--block", "--port", &port];
    let plain = world.json(&block);
    assert!(plain.get("ended").is_none(), "{plain}");
    assert_eq!(plain["sublayer"], "rules");
    world.succeeds(&["filter", "rm", &plain["id"].to_string()]);

    let added = world.json(&[&block[..], &["--end-existing"]].concat());
    assert_eq!(added["ended"], json!({ "connections": 2, "flows": 0 }), "{added}");
    assert_eq!(added["action"], plain["action"]);
    for connection in server.wait_for_finished(2, PATIENCE).unwrap() {
        assert_ne!(connection.state, carnet_testbed::ConnectionState::Open);
    }
    assert!(other.connections()[0].state == carnet_testbed::ConnectionState::Open);
    world.succeeds(&["filter", "rm", &added["id"].to_string()]);
    let said = world.succeeds(&[&block[..], &["--end-existing", "--name", "again"]].concat());
    assert_eq!(said, "filter again added, 0 connections ended, of 0 redirected flows");
    drop(clients);
    world.succeeds(&["down"]);
}

#[test]
fn the_doctor_finds_sockets_that_pass_by() {
    let world = World::up("doctor-sockets");
    let finding = |name: &str| {
        let (_, out, _) = world.run(&["--json", "doctor"]);
        let findings: Value = serde_json::from_str(&out).unwrap();
        let found = findings.as_array().unwrap().iter().find(|finding| finding["name"] == name);
        found.unwrap().clone()
    };
    for name in ["unseen sockets", "sockets from elsewhere"] {
        assert_eq!(finding(name)["state"], "ok", "{}", finding(name));
    }
    let server = echo();
    let port = server.address().port();
    let script = format!(
        "import socket, sys\n\
         held = [socket.socket(2, 3, 1), socket.socket(17, 3, 0)]\n\
         held.append(socket.create_connection(('127.0.0.1', {port})))\n\
         print('ready', flush=True)\n\
         sys.stdin.read()"
    );
    let mut command = Command::new("python3");
    let stray = Process::spawn(command.args(["-I", "-c", &script])).unwrap();
    stray.wait_for_line("readiness", PATIENCE, |line| line == "ready").unwrap();
    world.cgroup.add_process(stray.id()).unwrap();

    let unseen = finding("unseen sockets");
    assert_eq!(unseen["state"], "warning");
    let detail = unseen["detail"].as_str().unwrap();
    let who = format!("python3[{}] has a ", stray.id());
    assert!(detail.contains(&format!("{who}raw IPv4 socket of protocol 1")), "{detail}");
    assert!(detail.contains(&format!("{who}packet socket (AF_PACKET)")), "{detail}");
    assert!(unseen["advice"].as_str().unwrap().contains("--refuse-unseen"));
    let foreign = finding("sockets from elsewhere");
    let detail = foreign["detail"].as_str().unwrap();
    assert!(detail.contains(&format!("{who}TCP IPv4 socket at 127.0.0.1:")), "{detail}");
    assert!(detail.contains(&format!("to 127.0.0.1:{port}")), "{detail}");
    drop(stray);
    world.succeeds(&["down"]);
}

#[test]
fn the_doctor_examines_this_machine() {
    let world = World::up("doctor");
    let (status, out, error) = world.run(&["--json", "doctor"]);
    let findings: Value = serde_json::from_str(&out).unwrap();
    let findings = findings.as_array().unwrap();
    assert!(findings.len() > 5, "{out}");
    let missing = findings.iter().any(|finding| finding["state"] == "missing");
    assert_eq!((status == 1, error.as_str()), (missing, ""), "{out}");
    // An instance is up here, so nothing that it needs is missing.
    assert!(!missing, "{out}");
    let (_, out, _) = world.run(&["doctor"]);
    assert!(out.contains("ok"), "{out}");
}

#[test]
fn a_policy_is_exported_and_applied() {
    let world = World::up("export");
    let service = world.cgroup.child("tls").unwrap();
    let path = service.path().to_str().unwrap();
    world.succeeds(&["provider", "add", "acme"]);
    world.succeeds(&["service", "add", "tls", "--provider", "acme", "--cgroup", path]);
    world.redirect("tls", 443);
    let exported = world.succeeds(&["export"]);
    let before: Value = serde_json::from_str(&exported).unwrap();
    let file = world.bpffs.path().parent().unwrap().join(format!("carnet-cli-{}", service.id()));
    fs::write(&file, &exported).unwrap();
    let name = file.to_str().unwrap();

    // The same again changes nothing: not even a transaction takes place.
    let generation = || world.json(&["status"])["generation"].clone();
    let (same, applied) = (generation(), world.json(&["apply", name]));
    assert_eq!(applied, json!({"providers": 1, "sublayers": 1, "services": 1, "filters": 1}));
    assert_eq!((generation(), world.json(&["export"])), (same, before.clone()));

    // What was removed comes back with other numbers, what was added goes, and what stayed stays.
    world.succeeds(&["filter", "rm", "tls"]);
    world.succeeds(&["provider", "add", "other"]);
    world.succeeds(&["apply", name]);
    let after = world.json(&["export"]);
    assert_eq!(after["providers"], before["providers"]);
    assert_eq!(after["services"], before["services"]);
    assert!(after["filters"][0]["id"].as_u64() > before["filters"][0]["id"].as_u64());

    // To an instance that knows nothing, and from the standard input.
    world.succeeds(&["down"]);
    world.succeeds(&["up", "--cgroup", world.cgroup.path().to_str().unwrap()]);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec \"$@\" < {name}"), "sh"]);
    let carnet = world.command(&["apply", "-"]);
    let status = shell.arg(carnet.get_program()).args(carnet.get_args()).status().unwrap();
    assert!(status.success());
    assert_eq!(world.json(&["service", "ls"])[0]["cgroup"]["id"], service.id());

    let policy = world.json(&["export"]);
    world.fails(&["apply", "/nonexistent/policy"], &["/nonexistent/policy"]);
    fs::write(&file, "{}").unwrap();
    world.fails(&["apply", name], &["is no policy", "hint: carnet export"]);
    fs::write(&file, exported.replace("/tls\"", "/gone\"")).unwrap();
    world.fails(&["apply", name], &["there is no cgroup"]);
    assert_eq!(world.json(&["export"]), policy);
    fs::remove_file(&file).unwrap();
}

#[test]
fn what_a_killed_up_has_left_is_taken_down() {
    let world = World::new("remains");
    // As if it had been killed in the middle: no instance can have this name.
    let remains = world.bpffs.path().join("carnet/+test/maps");
    fs::create_dir_all(&remains).unwrap();
    world.fails(&["status"], &["not up"]);
    world.succeeds(&["down"]);
    assert!(!world.bpffs.path().join("carnet").exists());
    world.fails(&["down"], &["not up"]);
}

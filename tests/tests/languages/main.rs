//! The redirect services of `docs/languages.md`, in C, Python and Go, on plain socket options: each
//! serves real connections, alone and in a chain with the others, and stands in the document as it
//! was run. And a client in Go, which has its own resolver.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use carnet_core::event::Counter;
use carnet_testbed::{DatagramServer, Process};
use carnet_tests::{
    Lab, Must as _, PATIENCE,
    contract::{Link, Program, Scratch},
    dns,
    service::Behaviour,
};

/// Where the workspace is.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root")
}

fn source(file: &str) -> PathBuf {
    root().join("examples/languages").join(file)
}

/// A service to be started, and what has to stay where it is meanwhile.
struct Service {
    command: Command,
    _files: Box<dyn Send>,
}

fn c() -> Option<Service> {
    let compiled = Program::compile(&["examples/languages/service.c"], Link::None);
    Some(Service { command: Command::new(compiled.path()), _files: Box::new(compiled) })
}

fn python() -> Option<Service> {
    // The checkout may be hidden from the user as whom the service runs.
    let scratch = Scratch::new();
    let script = scratch.path().join("service.py");
    fs::copy(source("service.py"), &script).must("copy the script");
    scratch.open_to_all(&script);
    let mut command = Command::new("python3");
    command.arg("-B").arg(script);
    Some(Service { command, _files: Box::new(scratch) })
}

/// `None` where there is no Go.
fn go() -> Option<Service> {
    compile_go(&source("service.go"))
}

/// A program in Go, without shared libraries.
fn compile_go(source: &Path) -> Option<Service> {
    // Go compiles its own library, too: what it keeps of that is worth keeping.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let scratch = Scratch::new();
    let program = scratch.path().join("program");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(source);
    build.env("GOCACHE", cache.join("go-cache")).env("GOPATH", cache.join("go"));
    build.env("GOTOOLCHAIN", "local").env("GOPROXY", "off").env("CGO_ENABLED", "0");
    build.env("GO111MODULE", "off");
    match build.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: there is no Go on this machine for {}", source.display());
            return None;
        }
        output => {
            let output = output.must("start go");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{} does not compile:\n{said}", source.display());
        }
    }
    scratch.open_to_all(&program);
    Some(Service { command: Command::new(program), _files: Box::new(scratch) })
}

/// Starts a service, of this name in the policy, in its cgroup.
#[track_caller]
fn start(lab: &Lab, name: &str, service: &mut Service) -> Process {
    let command = &mut service.command;
    lab.cgroup_of(name).enter_command(command).must("enter the service's cgroup");
    let namespace = &lab.network().topology.client;
    namespace.enter_command(command).must("enter the namespace");
    // Without any privilege: none is needed.
    carnet_testbed::run_as(command, 65534, 65534);
    let process = Process::spawn(command).must("start the service");
    process.wait_for_line("ready", PATIENCE, |line| line == "ready").must("see it ready");
    process
}

/// Has clients exchange bytes through the services, in this order, and checks the bytes and that
/// every flow passed every service.
#[track_caller]
fn pass_through(services: Vec<Service>) {
    let lab = Lab::new();
    let length = services.len() as u64;
    let mut running = Vec::new();
    for (place, mut service) in services.into_iter().enumerate() {
        let name = format!("service-{place}");
        lab.service(&name, 100 - place as u16);
        running.push((start(&lab, &name, &mut service), service));
    }
    for to in [lab.v4(), lab.v6()] {
        let client = lab.client(to).count(4).parallel(4).bytes(300_001);
        let reports = client.run().must("run a client");
        assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
    }
    lab.settle();
    for (counter, value) in [
        (Counter::Redirected, 8 * length),
        (Counter::Delivered, 8 * length),
        (Counter::RecordsSet, 8 * length),
        (Counter::Onward, 8),
        (Counter::Passed, 0),
        (Counter::Forgotten, 0),
    ] {
        assert_eq!(lab.counter(counter), value, "{counter:?}");
    }
    assert_eq!(lab.network().echo().connections().len(), 8);
    // A destination that refuses: the client is told by the end of its connection, and the service
    // goes on.
    let nobody = SocketAddr::new(lab.v4().ip(), 1);
    let reports = lab.client(nobody).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    lab.exchange(lab.v4());
}

#[test]
fn the_service_in_c() {
    pass_through(c().into_iter().collect());
}

#[test]
fn the_service_in_python() {
    pass_through(python().into_iter().collect());
}

#[test]
fn the_service_in_go() {
    if let Some(service) = go() {
        pass_through(vec![service]);
    }
}

#[test]
fn all_three_in_a_chain() {
    pass_through([c(), python(), go()].into_iter().flatten().collect());
}

/// Go programs do not ask the C library for names.
#[test]
fn a_go_program_with_its_own_resolver() {
    let resolver = root().join("tests/languages/resolver.go");
    let Some(Service { mut command, _files }) = compile_go(&resolver) else {
        return;
    };
    let lab = Lab::new();
    let loopback = SocketAddr::from(([127, 0, 0, 53], 53));
    let client = &lab.network().topology.client;
    let server = DatagramServer::start_with(client, [loopback], dns::answer);
    let server = server.must("start a resolver");
    lab.service("alpha", 1);
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    command.arg(loopback.to_string());
    lab.apps().enter_command(&mut command).must("enter the cgroup");
    client.enter_command(&mut command).must("enter the namespace");
    let output = command.output().must("run the program");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("[{}]\n", dns::ANSWER));
    let reports = service.finish();
    assert!(reports.iter().all(|report| report.original == loopback), "{reports:#?}");
    let onward: Vec<_> = reports.iter().filter_map(|report| report.onward.ok()).collect();
    let questions = server.datagrams();
    assert!(!questions.is_empty() && questions.iter().all(|q| onward.contains(&q.peer)));
}

#[test]
fn the_document_has_what_is_run() {
    let document = fs::read_to_string(root().join("docs/languages.md")).must("read the document");
    for (language, file) in [("c", "service.c"), ("python", "service.py"), ("go", "service.go")] {
        let text = fs::read_to_string(source(file)).must("read a source");
        let quoted = format!("\n```{language}\n{text}```\n");
        assert!(
            document.contains(&quoted),
            "docs/languages.md does not have examples/languages/{file} as it is: \
             copy the file into its block"
        );
    }
}

//! Real programs at both ends, and Carnet's own service between them.

use std::{
    env, fs,
    net::{SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use carnet_testbed::{DatagramClients, DatagramServer, Process, Topology, datagrams::DatagramPlan};
use carnet_tests::{Lab, Must as _, PATIENCE, program, puppet::Puppet, rounds, until};

/// A directory that is gone afterwards.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    #[track_caller]
    pub(crate) fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("carnet-e2e-{}-{name}", std::process::id()));
        fs::create_dir(&path).must("make a directory");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A program of the system, by its real path: what the kernel calls it.
#[track_caller]
pub(crate) fn installed(name: &str) -> PathBuf {
    let places = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"];
    let found = places.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file());
    let path = found.unwrap_or_else(|| {
        panic!("{name} is in none of {places:?}: install it, as `cargo xtask test` does")
    });
    fs::canonicalize(path).must("find a program")
}

/// Runs a program to its end inside the scope; gives its process id and what it printed.
#[track_caller]
pub(crate) fn run_inside(lab: &Lab, command: &mut Command) -> (u32, String) {
    lab.apps().enter_command(command).must("enter the cgroup");
    run(lab, command)
}

/// Runs a program to its end among the clients, but outside of every scope.
#[track_caller]
pub(crate) fn run(lab: &Lab, command: &mut Command) -> (u32, String) {
    lab.network().topology.client.enter_command(command).must("enter the namespace");
    let mut process = Process::spawn(command).must("start a program");
    let status = process.wait(PATIENCE).must("wait for a program");
    let output = process.lines().join("\n");
    assert!(status.success(), "{command:?} ended with {status}: {output}");
    (process.id(), output)
}

/// nginx at the destination, with one file; killed when dropped.
#[track_caller]
fn web_server(lab: &Lab, directory: &Directory) -> (Process, SocketAddr) {
    // A port that was free a moment ago, in a namespace that nobody else uses.
    let destination = &lab.network().topology.destination;
    let address = destination
        .run(|| std::net::TcpListener::bind((Topology::DESTINATION_V4, 0))?.local_addr())
        .must("enter the namespace")
        .must("find a free port");
    let root = directory.0.display();
    let page: String = (0..20_000).map(|line| format!("line {line} of a page\n")).collect();
    fs::write(directory.0.join("page.txt"), page).must("write a page");
    let configuration = format!(
        "daemon off; master_process off; pid {root}/pid; error_log stderr;\n\
         events {{}}\n\
         http {{ access_log off; root {root}; client_body_temp_path {root}/t1;\n\
         proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3; uwsgi_temp_path {root}/t4;\n\
         scgi_temp_path {root}/t5; server {{ listen {address}; }} }}\n"
    );
    let file = directory.0.join("nginx.conf");
    fs::write(&file, configuration).must("write nginx's configuration");
    let mut command = Command::new(installed("nginx"));
    command.arg("-c").arg(&file).arg("-p").arg(&directory.0).arg("-e").arg("stderr");
    destination.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start nginx");
    let reach =
        || destination.run(|| TcpStream::connect(address)).must("enter the namespace").is_ok();
    until("nginx to listen", reach, |reached| *reached);
    (process, address)
}

/// Carnet's own service, which writes its log to a file.
#[track_caller]
fn inspect(lab: &Lab, name: &str, log: &Path) -> Process {
    inspect_with(lab, name, log, &[])
}

/// Carnet's own service with more arguments.
#[track_caller]
pub(crate) fn inspect_with(lab: &Lab, name: &str, log: &Path, arguments: &[&str]) -> Process {
    let mut command = Command::new(program("carnet-inspect"));
    command.args(arguments);
    command.args(["--name", name, "--log", "json", "--ready-fd", "1", "--user", "65534"]);
    command.arg("--log-file").arg(log).stderr(Stdio::null());
    lab.cgroup_of(name).enter_command(&mut command).must("enter the service's cgroup");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start carnet-inspect");
    let is_ready = |line: &str| line.starts_with("ready ");
    process.wait_for_line("the line \"ready\"", PATIENCE, is_ready).must("wait for the service");
    process
}

/// Ends a service in order, and gives the lines of its log.
#[track_caller]
pub(crate) fn end(mut service: Process, log: &Path) -> Vec<serde_json::Value> {
    service.terminate().must("end the service");
    service.wait(PATIENCE).must("wait for the service's end");
    let text = fs::read_to_string(log).must("read the log");
    text.lines().map(|line| serde_json::from_str(line).must("read a line of the log")).collect()
}

#[test]
fn curl_and_python_through_two_inspecting_services() {
    let lab = Lab::new();
    let directory = Directory::new("web");
    let (_nginx, address) = web_server(&lab, &directory);
    let url = format!("http://{address}/page.txt");
    let curl = || {
        let mut command = Command::new(installed("curl"));
        // The address as the server's name; nothing of the tester's own configuration.
        command.args(["-q", "--silent", "--show-error", "--fail", "--noproxy", "*"]);
        command.args(["--max-time", "100", &url]);
        command
    };
    let python = || {
        let mut command = Command::new(installed("python3"));
        let script = "import sys, urllib.request as request\n\
                      opener = request.build_opener(request.ProxyHandler({}))\n\
                      sys.stdout.write(opener.open(sys.argv[1], timeout=100).read().decode())";
        command.args(["-I", "-c", script, &url]);
        command
    };
    let (_, expected) = run(&lab, &mut curl());
    assert_eq!(expected.lines().count(), 20_000);

    let names = ["alpha", "bravo"];
    names.iter().zip([2, 1]).for_each(|(name, weight)| lab.service(name, weight));
    let logs = names.map(|name| directory.0.join(format!("{name}.log")));
    let services = [inspect(&lab, names[0], &logs[0]), inspect(&lab, names[1], &logs[1])];
    let runs: Vec<_> = [("curl", curl()), ("python3", python())]
        .into_iter()
        .map(|(name, mut command)| {
            let (pid, page) = run_inside(&lab, &mut command);
            assert!(page == expected, "{name} gets another page with Carnet than without");
            (pid, installed(name))
        })
        .collect();
    lab.settle();

    for (place, (service, log)) in services.into_iter().zip(&logs).enumerate() {
        let lines = end(service, log);
        assert_eq!(lines.len(), runs.len(), "{lines:#?}");
        for (line, (pid, executable)) in lines.iter().zip(&runs) {
            assert_eq!(line["service"], names[place], "{line:#}");
            assert_eq!(line["hops"], place + 1, "{line:#}");
            assert_eq!(line["pid"], *pid, "{line:#}");
            assert_eq!(line["executable"], executable.display().to_string(), "{line:#}");
            assert_eq!(line["destination"], address.to_string(), "{line:#}");
            assert_eq!(line["protocol"], "http", "{line:#}");
            assert_eq!(line["host"], address.ip().to_string(), "{line:#}");
            assert_eq!(line["verdict"], "allow", "{line:#}");
        }
    }
}

/// What a UDP client does in the next test: sends each datagram, connected or not, and prints who
/// answered and what.
const UDP_CLIENT: &str = r"
import socket, sys
port = int(sys.argv[1])
for address in sys.argv[2:5]:
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    for connected in (True, False):
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(100)
        if connected:
            s.connect((address, port))
        for datagram in map(bytes.fromhex, sys.argv[5:]):
            s.send(datagram) if connected else s.sendto(datagram, (address, port))
            answer, source = s.recvfrom(65535)
            assert source[:2] == (address, port), source
            assert not connected or s.getpeername()[:2] == (address, port)
            print(answer.hex())
";

#[test]
fn dns_and_quic_through_two_inspecting_services() {
    /// A DNS question for the address of `name`.
    fn question(name: &str) -> Vec<u8> {
        let labels = name.split('.').flat_map(|l| [&[l.len() as u8][..], l.as_bytes()].concat());
        let header = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        header.into_iter().chain(labels).chain([0, 0, 1, 0, 1]).collect()
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();

    let lab = Lab::new();
    let directory = Directory::new("datagrams");
    // Whoever asks the destination gets the question back, as an answer.
    let destination = &lab.network().topology.destination;
    let sockets = destination
        .run(|| {
            let first = UdpSocket::bind((Topology::DESTINATION_V4, 0))?;
            let port = first.local_addr()?.port();
            Ok::<_, std::io::Error>([first, UdpSocket::bind((Topology::DESTINATION_V6, port))?])
        })
        .must("enter the namespace")
        .must("find a free port");
    let port = sockets[0].local_addr().must("name a socket").port();
    let asked = Arc::new(Mutex::new(Vec::new()));
    for socket in sockets {
        let asked = Arc::clone(&asked);
        // It ends with the test's process.
        thread::spawn(move || {
            let mut buffer = [0; 65_535];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                asked.lock().expect("no panic").push(buffer[..length].to_vec());
                buffer[2] |= 0x80;
                socket.send_to(&buffer[..length], from).must("answer");
            }
        });
    }

    let rules = directory.0.join("rules.toml");
    let text = "[[rule]]\nname = \"bad\"\naction = \"refuse\"\nhost = \"*.bad.test\"\n\
                [[rule]]\nname = \"no QUIC\"\naction = \"refuse\"\nprotocol = \"quic\"\n";
    fs::write(&rules, text).must("write rules");
    let names = ["alpha", "bravo"];
    names.iter().zip([2, 1]).for_each(|(name, weight)| lab.service(name, weight));
    let logs = names.map(|name| directory.0.join(format!("{name}.log")));
    let idle = ["--udp-idle", "1s"];
    let with_rules = [&idle[..], &["--rules", rules.to_str().expect("a path")]].concat();
    let services = [
        inspect_with(&lab, names[0], &logs[0], &idle),
        inspect_with(&lab, names[1], &logs[1], &with_rules),
    ];

    let (good, bad) = (question("www.good.test"), question("www.bad.test"));
    let quic: String = include_str!("../../../crates/carnet-inspect/tests/client-initial.hex")
        .split_whitespace()
        .collect();
    let mut command = Command::new(installed("python3"));
    command.args(["-I", "-c", UDP_CLIENT, &port.to_string()]);
    let (v4, v6) = (Topology::DESTINATION_V4, Topology::DESTINATION_V6);
    command.args([v4.to_string(), format!("::ffff:{v4}"), v6.to_string()]);
    command.args([&hex(&good), &hex(&bad), &hex(&good), &quic]);
    let (pid, output) = run_inside(&lab, &mut command);

    let (mut answer, mut refusal) = (good.clone(), bad.clone());
    answer[2] |= 0x80;
    (refusal[2], refusal[3]) = (0x81, 5);
    let answers: Vec<&str> = output.lines().collect();
    for four in answers.chunks(4) {
        assert_eq!(four[..3], [hex(&answer), hex(&refusal), hex(&answer)]);
        // CONNECTION_REFUSED, in a server's Initial packet.
        assert!(four[3].starts_with('c') && four[3][2..10] == *"00000001", "{}", four[3]);
    }
    assert_eq!(answers.len(), 24);
    assert_eq!(*asked.lock().expect("no panic"), vec![good; 12]);

    for (place, (service, log)) in services.into_iter().zip(&logs).enumerate() {
        let lines = end(service, log);
        assert_eq!(lines.len(), 6, "{lines:#?}");
        for line in &lines {
            assert_eq!(
                (&line["service"], &line["hops"]),
                (&names[place].into(), &(place + 1).into())
            );
            assert_eq!(
                (&line["transport"], &line["pid"]),
                (&"udp".into(), &pid.into()),
                "{line:#}"
            );
            let destination: SocketAddr =
                line["destination"].as_str().expect("it").parse().must("read it");
            assert_eq!(destination.port(), port, "{line:#}");
            assert_eq!(line["protocol"], "dns", "{line:#}");
            // Only the second one has rules.
            let (verdict, host, counted) = match place {
                0 => ("allow", "www.good.test", [4, 4, 0]),
                _ => ("refuse", "www.bad.test", [2, 2, 2]),
            };
            assert_eq!(
                (&line["verdict"], &line["host"]),
                (&verdict.into(), &host.into()),
                "{line:#}"
            );
            let counts = ["up", "down", "refused"].map(|count| &line["datagrams"][count]);
            assert_eq!(counts.map(|count| count.as_i64().expect("a number")), counted, "{line:#}");
        }
    }
}

#[test]
fn a_udp_socket_that_is_connected_elsewhere_is_served_by_the_other_server() {
    const TURNS: usize = 50;
    // Sockets one after the other at one port, each connected to one server after the other.
    const CLIENT: &str = r"
import socket, sys
address, ports, turns = sys.argv[1], sys.argv[2:4], int(sys.argv[4])
own = 0
for sockets in range(turns):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(100)
    s.bind(('0.0.0.0', own))
    own = s.getsockname()[1]
    for port in ports:
        s.connect((address, int(port)))
        s.send(b'who?')
        answer = s.recv(100).decode()
        assert answer == port, (answer, port)
    s.close()
    ports.reverse()
";
    let lab = Lab::new();
    let directory = Directory::new("elsewhere");
    let address = Topology::DESTINATION_V4;
    let ports = [(); 2].map(|()| {
        let destination = &lab.network().topology.destination;
        let socket = destination.run(|| UdpSocket::bind((address, 0))).must("enter the namespace");
        let socket = socket.must("bind a socket");
        let port = socket.local_addr().must("name a socket").port().to_string();
        let name = port.clone();
        // It ends with the test's process.
        thread::spawn(move || {
            while let Ok((_, from)) = socket.recv_from(&mut [0; 100]) {
                socket.send_to(name.as_bytes(), from).must("answer");
            }
        });
        port
    });
    lab.service("alpha", 1);
    let log = directory.0.join("alpha.log");
    let service = inspect_with(&lab, "alpha", &log, &["--udp-idle", "1s"]);
    let mut command = Command::new(installed("python3"));
    command.args(["-I", "-c", CLIENT, &address.to_string(), &ports[0], &ports[1]]);
    command.arg(TURNS.to_string());
    run_inside(&lab, &mut command);
    let lines = end(service, &log);
    for port in ports {
        let there = format!("{address}:{port}");
        let its = lines.iter().filter(|line| line["destination"] == there);
        let up: u64 = its.map(|line| line["datagrams"]["up"].as_u64().expect("a number")).sum();
        assert_eq!(up, TURNS as u64, "{lines:#?}");
    }
}

#[test]
fn many_udp_clients_through_two_inspecting_services() {
    const CLIENTS: u32 = 200;
    // Longer than any client waits for its turn on a slow machine: what comes for a flow that has ended
    // may be lost. At the end the services wait for it.
    const IDLE: &str = "20s";
    let rounds = rounds(20);
    let lab = Lab::new();
    let directory = Directory::new("many");
    let topology = &lab.network().topology;
    let servers: Vec<_> = (0..3)
        .map(|_| {
            let address = (Topology::DESTINATION_V4, 0).into();
            DatagramServer::start_in(&topology.destination, [address]).must("start a server")
        })
        .collect();
    let names = ["alpha", "bravo"];
    names.iter().zip([2, 1]).for_each(|(name, weight)| lab.service(name, weight));
    let logs = names.map(|name| directory.0.join(format!("{name}.log")));
    let services = [0, 1].map(|n| inspect_with(&lab, names[n], &logs[n], &["--udp-idle", IDLE]));
    let mut due = 0;
    for connected in [false, true] {
        let plan = DatagramPlan {
            to: servers.iter().map(DatagramServer::address).collect(),
            clients: CLIENTS,
            rounds,
            window: 256,
            connected,
            timeout: PATIENCE,
        };
        let clients = DatagramClients::start(&plan, Some(&topology.client), Some(lab.apps()));
        let report = clients.must("start clients").finish(PATIENCE).must("run clients");
        assert!(report.is_perfect(), "{report:#?}");
        assert_eq!(report.answered, u64::from(3 * CLIENTS * rounds));
        due += report.answered;
    }
    for (service, log) in services.into_iter().zip(&logs) {
        let lines = end(service, log);
        let sum = |count: &str| -> u64 {
            let counts = lines.iter().map(|line| &line["datagrams"][count]);
            counts.map(|count| count.as_u64().expect("a number")).sum()
        };
        assert_eq!((sum("up"), sum("down"), sum("lost")), (due, due, 0));
        assert!(lines.len() >= 6 * CLIENTS as usize, "{} flows", lines.len());
    }
}

#[test]
fn a_static_program_cannot_slip_by() {
    let lab = Lab::new();
    let directory = Directory::new("static");
    let source = directory.0.join("client.c");
    // System calls of its own, no library that could be interposed.
    fs::write(
        &source,
        r#"
        #include <arpa/inet.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/socket.h>
        #include <sys/time.h>
        #include <unistd.h>
        int main(int argc, char **argv) {
            if (argc != 3) return 2;
            struct timeval limit = {100, 0};
            struct sockaddr_in to = {AF_INET, htons(atoi(argv[2]))};
            if (inet_pton(AF_INET, argv[1], &to.sin_addr) != 1) return 2;
            int s = socket(AF_INET, SOCK_STREAM, 0);
            setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
            setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
            if (connect(s, (struct sockaddr *)&to, sizeof to)) return 3;
            if (write(s, "static\n", 7) != 7) return 4;
            char word[8] = {0};
            if (recv(s, word, 7, MSG_WAITALL) != 7) return 5;
            fputs(word, stdout);
            return 0;
        }
        "#,
    )
    .must("write a program");
    let client = directory.0.join("client");
    // The linker that Rust needs, too.
    let compiled = Command::new("cc")
        .arg("-static")
        .arg("-o")
        .args([&client, &source])
        .status()
        .must("compile a program (cc)");
    assert!(compiled.success(), "cc -static: {compiled}");

    let services = lab.start_chain(&["alpha"]);
    let mut command = Command::new(&client);
    command.args([lab.v4().ip().to_string(), lab.v4().port().to_string()]);
    let (pid, output) = run_inside(&lab, &mut command);
    assert_eq!(output, "static");
    lab.settle();
    for service in services {
        let reports = service.finish();
        assert_eq!(reports.len(), 1);
        assert_eq!(reports[0].pid, pid);
        assert_eq!(reports[0].executable.as_deref(), Some(&*client));
        assert_eq!(reports[0].command, "client");
    }
}

/// The engine remembers the paths of executables, but not for long.
#[test]
fn an_executable_that_is_renamed_while_it_runs_is_told_by_its_new_name() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let service = lab.start("alpha");
    let directory = Directory::new("renamed");
    let [old, new] = ["old", "new"].map(|name| directory.0.join(name));
    fs::copy(program("test-puppet"), &old).must("copy a program");
    let client = &lab.network().topology.client;
    let puppet = Puppet::start_by(Command::new(&old), client, lab.apps(), None);
    let connect = || puppet.connect(lab.v4()).must("connect");
    let first = [connect(), connect()];
    fs::rename(&old, &new).must("rename the program");
    thread::sleep(Duration::from_millis(1100));
    let second = [connect(), connect()];
    let reports = service.reports(4);
    let paths: Vec<_> = reports.iter().map(|report| report.executable.clone()).collect();
    assert_eq!(paths, [&old, &old, &new, &new].map(|path| Some(path.clone())));
    drop((first, second));
}

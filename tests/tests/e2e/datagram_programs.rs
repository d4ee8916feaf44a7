//! Real programs over UDP: resolvers and others that ask, and proxies that know nothing of Carnet.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use carnet_core::{event::Counter, object::Conditions};
use carnet_testbed::{DatagramServer, Process, Topology, answer_of};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan, Running,
    dns::{ANSWER, answer},
    puppet::Hand,
    rounds,
    service::Behaviour,
    until,
};

use crate::programs::{Directory, end, inspect_with, installed, run, run_inside};

/// Where distributions have their own resolver.
const LOOPBACK_RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), 53);
/// Asks the C library, which asks the server of `/etc/resolv.conf`, for the IPv4 addresses of a name.
const GETADDRINFO: &str = "import socket
print(sorted({a[4][0] for a in socket.getaddrinfo('www.example', 80, socket.AF_INET)}))";
/// A UDP proxy as there are many: one socket to the server for each source that it hears.
const PROXY: &str = "import select, socket, sys
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind(('127.0.0.1', 0))
server = (sys.argv[1], int(sys.argv[2]))
sessions, sources = {}, {}
print('listening', flush=True)
while True:
    for ready in select.select([listener, *sources], [], [])[0]:
        data, source = ready.recvfrom(65535)
        if ready is not listener:
            listener.sendto(data, sources[ready])
            continue
        if source not in sessions:
            sessions[source] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sessions[source].connect(server)
            sources[sessions[source]] = source
        sessions[source].send(data)
";

/// A lab in which a service gets what goes to these UDP ports.
fn scene(ports: &[u16]) -> Lab {
    let lab = Lab::new();
    let ports = ports.iter().map(|port| (*port).into()).collect();
    let conditions = Conditions { ports, ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    lab
}

#[track_caller]
fn start(lab: &Lab) -> Running {
    lab.start_with("alpha", &Behaviour::with_datagrams())
}

#[test]
fn dig_and_the_c_library_through_a_resolver_on_loopback() {
    let lab = scene(&[53]);
    let client = &lab.network().topology.client;
    let server = DatagramServer::start_with(client, [LOOPBACK_RESOLVER], answer);
    let server = server.must("start a resolver");
    let service = start(&lab);
    let mut dig = Command::new(installed("dig"));
    dig.args(["@127.0.0.53", "+short", "+tries=1", "+time=60", "www.example", "A"]);
    let (pid, output) = run_inside(&lab, &mut dig);
    assert_eq!(output, ANSWER.to_string());
    let reports = service.reports(1);
    assert_eq!((reports[0].original, reports[0].pid), (LOOPBACK_RESOLVER, pid));

    // In a mount namespace with a configuration of its own, which is this alone.
    let script = "mount -t tmpfs none /etc && \
                  echo nameserver 127.0.0.53 >/etc/resolv.conf && exec \"$@\"";
    let mut library = Command::new("unshare");
    library.args(["-m", "sh", "-c", script, "sh"]).arg(installed("python3"));
    library.args(["-I", "-c", GETADDRINFO]);
    let (_, output) = run_inside(&lab, &mut library);
    assert_eq!(output, format!("['{ANSWER}']"));
    let reports = service.finish();
    assert!(reports.len() > 1 && reports.iter().all(|report| report.original == LOOPBACK_RESOLVER));
    // All questions came through the service.
    let onward: Vec<_> = reports.iter().filter_map(|report| report.onward.ok()).collect();
    assert!(server.datagrams().iter().all(|question| onward.contains(&question.peer)));
}

/// An NTP server of stratum 1 (RFC 5905): its clock is this machine's.
fn time(_: SocketAddr, question: &[u8]) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Seconds since 1900, and a fraction.
    let seconds = (now.as_secs() + 2_208_988_800) as u32;
    let fraction = ((u64::from(now.subsec_nanos()) << 32) / 1_000_000_000) as u32;
    let now = [seconds.to_be_bytes(), fraction.to_be_bytes()].concat();
    let asked = question.get(40..48).unwrap_or(&[0; 8]);
    let head = [[0x24, 1, 6, 0xec], [0; 4], [0, 0, 0, 1], *b"TEST"].concat();
    [&head, &now, asked, &now, &now].map(|part| part.to_vec()).concat()
}

#[test]
fn an_ntp_client() {
    let lab = scene(&[123]);
    let destination = &lab.network().topology.destination;
    let to = (Topology::DESTINATION_V4, 123).into();
    let server = DatagramServer::start_with(destination, [to], time).must("start a time server");
    let service = start(&lab);
    let mut command = Command::new(installed("ntpdig"));
    command.args(["-t", "60", &Topology::DESTINATION_V4.to_string()]);
    let (pid, output) = run_inside(&lab, &mut command);
    assert!(output.contains("192.0.2.2") && output.contains(" s1 "), "{output}");
    let reports = service.finish();
    assert_eq!((reports[0].original, reports[0].pid), (to, pid));
    let onward: Vec<_> = reports.iter().filter_map(|report| report.onward.ok()).collect();
    assert!(server.datagrams().iter().all(|question| onward.contains(&question.peer)));
}

/// A proxy that knows nothing of Carnet, started in the service's cgroup and registered for it.
#[track_caller]
fn start_proxy(lab: &Lab, command: &mut Command) -> Process {
    lab.cgroup_of("alpha").enter_command(command).must("enter the service's cgroup");
    lab.network().topology.client.enter_command(command).must("enter the namespace");
    let process = Process::spawn(command).must("start a proxy");
    let register = || lab.engine().register_listener_of("alpha", process.id());
    let is_there = |registered: &Result<Vec<SocketAddr>, _>| {
        registered.as_ref().is_ok_and(|places| !places.is_empty())
    };
    until("the proxy to have its socket", register, is_there).must("register it");
    process
}

/// Where nobody is: the proxy sends everything to the server that it was told of.
const SOMEWHERE: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 77), Ipv4Addr::new(198, 51, 100, 7)];
const PORT: u16 = 4000;

/// Sends a word and gets the server's answer from where it was sent to.
#[track_caller]
fn answers(socket: &Hand<'_>, to: SocketAddr, server: SocketAddr, word: &[u8]) {
    socket.send_to(to, word).must("send");
    let answer = socket.receive_from();
    assert_eq!(answer, Ok((answer_of(server, word), to)));
}

#[test]
fn a_proxy_with_a_session_per_source_works_unmodified() {
    let lab = scene(&[PORT]);
    let server = DatagramServer::start_in(
        &lab.network().topology.destination,
        [(Topology::DESTINATION_V4, 0).into()],
    )
    .must("start a server");
    let at = server.address();
    let mut proxy = Command::new(installed("python3"));
    proxy.args(["-I", "-u", "-c", PROXY, &at.ip().to_string(), &at.port().to_string()]);
    let _proxy = start_proxy(&lab, &mut proxy);
    let client = lab.puppet();
    let sockets: Vec<_> = (0..8).map(|_| client.udp(at)).collect();
    for round in 0..3 {
        for (number, socket) in sockets.iter().enumerate() {
            for ip in SOMEWHERE {
                let word = format!("{round} {number} {ip}").into_bytes();
                answers(socket, (ip, PORT).into(), at, &word);
            }
        }
    }
    let connected = client.udp(at);
    let to = (SOMEWHERE[0], PORT).into();
    connected.connect(to).must("connect");
    for word in [b"one", b"two"] {
        connected.send(word).must("send");
        assert_eq!(connected.receive_from(), Ok((answer_of(at, word), to)));
    }
    // A session a flow: the proxy has told them by their sources.
    let mut peers: Vec<_> = server.datagrams().iter().map(|datagram| datagram.peer).collect();
    peers.sort_unstable();
    peers.dedup();
    assert_eq!(peers.len(), sockets.len() * SOMEWHERE.len() + 1);
}

/// dnsmasq answers with the address of its socket as the source, which it tells the kernel with
/// every datagram.
#[test]
fn dnsmasq_works_unmodified() {
    let lab = scene(&[PORT]);
    let destination = &lab.network().topology.destination;
    let server =
        DatagramServer::start_with(destination, [(Topology::DESTINATION_V4, 0).into()], answer)
            .must("start a resolver");
    let mut dnsmasq = Command::new(installed("dnsmasq"));
    dnsmasq.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]);
    dnsmasq.args(["--bind-interfaces", "--listen-address=127.0.0.1", "--port=5300"]);
    dnsmasq.args(["--user=root", "--pid-file", "--log-facility=/dev/null", "--cache-size=0"]);
    let at = server.address();
    dnsmasq.arg(format!("--server={}#{}", at.ip(), at.port()));
    let _dnsmasq = start_proxy(&lab, &mut dnsmasq);
    for _ in 0..3 {
        let mut dig = Command::new(installed("dig"));
        dig.args(["@192.0.2.77", "-p", &PORT.to_string(), "+short", "+tries=1", "+time=60"]);
        dig.args(["www.example", "A"]);
        assert_eq!(run_inside(&lab, &mut dig).1, ANSWER.to_string());
    }
    assert_eq!(server.datagrams().len(), 3);
    // From outside of the scope there is nobody at that address.
    let mut dig = Command::new(installed("dig"));
    dig.args(["@127.0.0.1", "-p", "5300", "+short", "+tries=1", "+time=60", "www.example", "A"]);
    assert_eq!(run(&lab, &mut dig).1, ANSWER.to_string());
}

/// socat that answers each datagram from a process of its own.
#[test]
fn socat_works_unmodified() {
    let lab = scene(&[PORT]);
    let server = DatagramServer::start_in(
        &lab.network().topology.destination,
        [(Topology::DESTINATION_V4, 0).into()],
    )
    .must("start a server");
    let at = server.address();
    let mut socat = Command::new(installed("socat"));
    socat.args(["-T60", "UDP4-RECVFROM:5400,bind=127.0.0.1,fork"]);
    socat.arg(format!("UDP4:{}:{}", at.ip(), at.port()));
    let _socat = start_proxy(&lab, &mut socat);
    let client = lab.puppet();
    for _ in 0..2 {
        let socket = client.udp(at);
        for ip in SOMEWHERE {
            answers(&socket, (ip, PORT).into(), at, ip.to_string().as_bytes());
        }
    }
}

/// Python with a QUIC library, where the set-up could get it.
fn python_with_quic() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory");
    let python = target.join("tools/quic/bin/python3");
    let imported =
        Command::new(&python).args(["-c", "import aioquic"]).stderr(Stdio::null()).status();
    if !imported.is_ok_and(|status| status.success()) {
        println!("skipped: there is no aioquic in {}: see `cargo xtask test`", python.display());
        return None;
    }
    Some(python)
}

#[test]
fn a_quic_client_whose_quic_is_refused_falls_back_to_tcp() {
    let Some(python) = python_with_quic() else {
        return;
    };
    let lab = Lab::new();
    let directory = Directory::new("quic");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/quic.py");
    let (address, port) = (Topology::DESTINATION_V4.to_string(), "4433");
    let mut server = Command::new(&python);
    server.arg(&script).args(["serve", &address, port]);
    let destination = &lab.network().topology.destination;
    destination.enter_command(&mut server).must("enter the namespace");
    let server = Process::spawn(&mut server).must("start a server");
    server.wait_for_line("ready", PATIENCE, |line| line == "ready").must("see it ready");

    let rules = directory.0.join("rules.toml");
    let text = "[[rule]]\nname = \"no QUIC there\"\naction = \"refuse\"\nprotocol = \"quic\"\n\
                host = \"refused.example\"\n";
    fs::write(&rules, text).must("write rules");
    lab.service("alpha", 1);
    let log = directory.0.join("alpha.log");
    let rules = rules.to_str().expect("a path");
    let alpha = inspect_with(&lab, "alpha", &log, &["--udp-idle", "1s", "--rules", rules]);
    for (name, how) in [("www.example", "quic hello"), ("refused.example", "tcp hello")] {
        let mut client = Command::new(&python);
        client.arg(&script).args(["ask", &address, port, name]);
        assert_eq!(run_inside(&lab, &mut client).1, how, "{name}");
    }
    let lines = end(alpha, &log);
    let mut told: Vec<_> = lines
        .iter()
        .map(|line| ["transport", "protocol", "host", "verdict"].map(|key| line[key].as_str()))
        .collect();
    told.sort_unstable();
    let refused = Some("refused.example");
    assert_eq!(
        told,
        [
            [Some("tcp"), Some("tls"), refused, Some("allow")],
            [Some("udp"), Some("quic"), refused, Some("refuse")],
            [Some("udp"), Some("quic"), Some("www.example"), Some("allow")],
        ],
        "{lines:#?}"
    );
}

/// Sends a datagram from each of many sockets, and closes them at once. Prints the errors that there were.
const FIRE_AND_FORGET: &str = r#"
import collections, socket, sys
errors = collections.Counter()
for _ in range(int(sys.argv[1])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.sendto(b"farewell", (sys.argv[2], 514))
        except OSError as error:
            errors[error.errno] += 1
print(dict(errors))
"#;

/// A flow can be asked about for a while after its end, and there is room for 65,536. Those that have
/// ended make room when there is none.
#[test]
fn more_clients_that_send_and_close_than_there_is_room_for() {
    const CLIENTS: u32 = 140_000;
    let lab = Lab::new();
    lab.service("alpha", 1);
    // It does not read: what is lost is lost in its buffer.
    let alpha = lab.puppet_of("alpha");
    let registered = alpha.udp(LOOPBACK_RESOLVER);
    registered.bind("127.0.0.1:0".parse().expect("an address")).must("bind");
    registered.register(&[]).must("register");
    let clients = rounds(CLIENTS);
    let mut client = Command::new(installed("python3"));
    client.args(["-I", "-c", FIRE_AND_FORGET, &clients.to_string()]);
    client.arg(Topology::DESTINATION_V4.to_string());
    let (_, errors) = run_inside(&lab, &mut client);
    assert_eq!(errors, "{}");
    assert_eq!(lab.counter(Counter::Redirected), u64::from(clients));
}

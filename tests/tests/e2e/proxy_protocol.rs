//! The PROXY protocol both ways, with HAProxy at the other end.

use std::{
    fs::{self, Permissions},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use carnet_core::{
    event::Counter,
    object::{CgroupCondition, Conditions},
};
use carnet_engine::Engine;
use carnet_testbed::{NetworkNamespace, Process, Topology};
use carnet_tests::{Lab, Must as _, PATIENCE, Plan, program, until};

use crate::programs::{Directory, end, inspect_with, installed};

/// A port that was free a moment ago, in a namespace that nobody else uses.
#[track_caller]
fn free_port(namespace: &NetworkNamespace, address: &str) -> SocketAddr {
    let address: SocketAddr = address.parse().expect("an address");
    let bound = namespace.run(|| std::net::TcpListener::bind(address)?.local_addr());
    bound.must("enter the namespace").must("find a free port")
}

/// HAProxy in the clients' namespace and in a service's cgroup, with this frontend and this backend. It
/// prints a line for each connection, in the form of `log`.
#[track_caller]
fn haproxy(lab: &Lab, service: &str, directory: &Directory, parts: [&str; 3]) -> Process {
    let [log, frontend, backend] = parts;
    let configuration = format!(
        "global\n log stdout format raw local0\n\
         defaults\n mode tcp\n timeout connect 60s\n timeout client 60s\n timeout server 60s\n\
         frontend in\n log global\n log-format \"{log}\"\n {frontend}\n default_backend out\n\
         backend out\n {backend}\n"
    );
    let file = directory.0.join("haproxy.cfg");
    fs::write(&file, configuration).must("write HAProxy's configuration");
    let mut command = Command::new(installed("haproxy"));
    command.arg("-db").arg("-f").arg(&file).stderr(Stdio::inherit());
    lab.cgroup_of(service).enter_command(&mut command).must("enter the service's cgroup");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    Process::spawn(&mut command).must("start HAProxy")
}

/// Waits until somebody listens there.
#[track_caller]
fn listens(namespace: &NetworkNamespace, address: SocketAddr) {
    let reach =
        || namespace.run(|| TcpStream::connect(address)).must("enter the namespace").is_ok();
    until("the program to listen", reach, |reached| *reached);
}

/// A lab with a service that gets what the clients connect to: what it connects to by itself is its own
/// affair.
#[track_caller]
fn lab_for_clients(service: &str) -> Lab {
    let lab = Lab::new();
    let (id, level) = Engine::resolve_cgroup(lab.apps().path()).must("resolve the cgroup");
    let path = lab.apps().path().display().to_string();
    let conditions =
        Conditions { cgroups: vec![CgroupCondition { path, id, level }], ..Conditions::default() };
    lab.service_with(service, Plan { conditions, ..Plan::default() });
    lab
}

/// HAProxy, which connects to where the header says, and in front of it Carnet's own service, whose log is
/// in this file.
#[track_caller]
fn haproxy_behind_a_front(
    lab: &Lab,
    service: &str,
    directory: &Directory,
    log: &Path,
    more: &[&str],
) -> [Process; 2] {
    let client = &lab.network().topology.client;
    let place = free_port(client, "127.0.0.1:0");
    let frontend = format!("bind {place} accept-proxy");
    let line = "%ci:%cp %[dst] %[dst_port] %[fc_pp_unique_id]";
    let haproxy = haproxy(lab, service, directory, [line, &frontend, "server original 0.0.0.0"]);
    listens(client, place);
    let to = place.to_string();
    [haproxy, inspect_with(lab, service, log, &[&["--send-proxy", &to], more].concat())]
}

#[test]
fn a_front_and_its_proxy_are_one_service_of_a_chain() {
    let lab = Lab::new();
    let prefixes = ["192.0.2.0/24", "2001:db8::/32"];
    // Not what the front says to its proxy.
    let destinations = prefixes.map(|prefix| prefix.parse().must("parse a prefix")).to_vec();
    let conditions = Conditions { destinations, ..Conditions::default() };
    for (name, weight, unmodified) in
        [("alpha", 30, false), ("front", 20, true), ("bravo", 10, false)]
    {
        let conditions = conditions.clone();
        lab.service_with(name, Plan { weight, unmodified, conditions, ..Plan::default() });
    }
    let directory = Directory::new("chain");
    let log = directory.0.join("front.log");
    let alpha = lab.start("alpha");
    let [_haproxy, front] = haproxy_behind_a_front(&lab, "front", &directory, &log, &[]);
    let bravo = lab.start("bravo");
    for to in [lab.v4(), lab.v6()] {
        lab.exchange(to);
    }
    lab.settle();
    assert_eq!(end(front, &log).len(), 2);
    let handles = ["alpha", "front", "bravo"].map(|name| lab.handle_of(name));
    let [before, after] = [alpha.finish(), bravo.finish()];
    assert_eq!((before.len(), after.len()), (2, 2), "{before:#?} {after:#?}");
    for (report, first) in after.iter().zip(&before) {
        let record = report.parsed();
        assert_eq!(record.hops[..3].iter().map(|hop| hop.handle).collect::<Vec<_>>(), handles);
        assert_eq!((report.flow, report.original), (first.flow, first.original));
    }
    assert_eq!(lab.network().echo().connections().len(), 2);
}

#[test]
fn a_service_that_expects_the_header_gets_it() {
    let lab = lab_for_clients("front");
    let directory = Directory::new("send-proxy");
    let own_log = directory.0.join("front.log");
    let [haproxy, front] = haproxy_behind_a_front(&lab, "front", &directory, &own_log, &[]);
    let mapped = match lab.v4() {
        SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        SocketAddr::V6(_) => unreachable!("an IPv4 address"),
    };
    for destination in [lab.v4(), lab.v6(), mapped] {
        lab.exchange(destination);
    }
    lab.settle();
    let lines = end(front, &own_log);
    assert_eq!(lines.len(), 3, "{lines:#?}");
    for (line, destination) in lines.iter().zip([lab.v4(), lab.v6(), lab.v4()]) {
        assert_eq!(line["destination"], destination.to_string(), "{line:#}");
        assert_eq!(line["hops"], 1, "{line:#}");
        // HAProxy was told the same, and which flow it is.
        let client: SocketAddr = line["client"].as_str().unwrap_or("").parse().must("parse");
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let expected = format!(
            "{}:{} {} {} {}",
            client.ip(),
            client.port(),
            destination.ip(),
            destination.port(),
            line["flow"]
        );
        haproxy
            .wait_for_line(&expected, PATIENCE, |told| told.trim_matches('"') == expected)
            .must("wait for HAProxy's line");
    }
    // And it has reached the destinations, which are none of its configuration.
    assert_eq!(lab.network().echo().connections().len(), 3);
}

#[test]
fn a_service_that_knows_nothing_of_chains_takes_the_header_with_a_record() {
    let lab = lab_for_clients("front");
    let directory = Directory::new("chain-to-haproxy");
    let (log, keys) = (directory.0.join("front.log"), directory.0.join("keys"));
    fs::write(&keys, "01".repeat(32)).must("write keys");
    fs::set_permissions(&keys, Permissions::from_mode(0o600)).must("set permissions");
    let more = ["--chain-key", &keys.display().to_string()];
    let [haproxy, front] = haproxy_behind_a_front(&lab, "front", &directory, &log, &more);
    for destination in [lab.v4(), lab.v6()] {
        lab.exchange(destination);
    }
    lab.settle();
    let lines = end(front, &log);
    assert_eq!(lines.len(), 2, "{lines:#?}");
    for (line, destination) in lines.iter().zip([lab.v4(), lab.v6()]) {
        // The record, and the flow's number beside it.
        let expected = format!("{} {} {}", destination.ip(), destination.port(), line["flow"]);
        let told = |told: &str| told.trim_matches('"').ends_with(&expected);
        haproxy.wait_for_line(&expected, PATIENCE, told).must("wait for HAProxy's line");
    }
    assert_eq!(lab.counter(Counter::RecordsExported), 2);
    assert_eq!(lab.network().echo().connections().len(), 2);
}

/// Carnet's service on another host, which takes what proxies at these addresses say.
#[track_caller]
fn inspect_on_another_host(lab: &Lab, on: SocketAddr, from: &str, log: &Path) -> Process {
    let mut command = Command::new(program("carnet-inspect"));
    command.args(["--original-destination", "proxy", "--proxy-from", from, "--listen"]);
    command.arg(on.to_string()).args(["--log", "json", "--ready-fd", "1", "--log-file"]);
    command.arg(log).stderr(Stdio::null());
    lab.network().topology.destination.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start carnet-inspect");
    let is_ready = |line: &str| line.starts_with("ready ");
    process.wait_for_line("the line \"ready\"", PATIENCE, is_ready).must("wait for the service");
    process
}

#[test]
fn an_unmodified_proxy_hands_flows_on_to_another_host() {
    let lab = lab_for_clients("haproxy");
    let directory = Directory::new("accept-proxy");
    let topology = &lab.network().topology;
    let other = free_port(&topology.destination, &format!("{}:0", Topology::DESTINATION_V4));
    let log = directory.0.join("other.log");
    let from = Topology::CLIENT_V4.to_string();
    let inspect = inspect_on_another_host(&lab, other, &from, &log);

    let place = free_port(&topology.client, "127.0.0.1:0");
    let backend = format!("server other {other} send-proxy-v2");
    let frontend = format!("bind {place}");
    let haproxy = haproxy(&lab, "haproxy", &directory, ["%ci:%cp %[dst]", &frontend, &backend]);
    let register = || lab.engine().register_listener_of("haproxy", haproxy.id());
    let registered = |places: &Result<Vec<SocketAddr>, _>| {
        places.as_ref().is_ok_and(|places| places.contains(&place))
    };
    until("HAProxy to listen", register, registered).must("register it");

    lab.exchange(lab.v4());
    lab.settle();
    let lines = end(inspect, &log);
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(lines[0]["destination"], lab.v4().to_string(), "{lines:#?}");
    assert_eq!(lines[0]["verdict"], "allow", "{lines:#?}");
    // Whoever else comes is not believed.
    let stranger = directory.0.join("stranger.log");
    let inspect = inspect_on_another_host(&lab, other, "198.51.100.0/24", &stranger);
    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    let lines = end(inspect, &stranger);
    // HAProxy may try again.
    assert!(!lines.is_empty(), "a connection was refused");
    assert!(lines.iter().all(|line| line["verdict"] == "refuse"), "{lines:#?}");
    assert_eq!(lab.network().echo().connections().len(), 1);
}

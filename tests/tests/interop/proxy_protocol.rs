//! The PROXY protocol both ways, with Envoy at the other end: its listener filter, and its transport socket.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use carnet_core::object::Conditions;
use carnet_testbed::{NetworkNamespace, Process, Topology};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan,
    contract::Scratch,
    program, until,
    web::{self, WebServer},
};

use crate::{
    chains::destinations,
    product::{from_pypi, listeners},
};

/// Where Envoy listens.
const ENVOY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15_001);
/// Where Carnet's service on the other host listens.
const OTHER_HOST: SocketAddr = SocketAddr::new(IpAddr::V4(Topology::DESTINATION_V4), 15_003);

/// What goes to the other side of the cable; not what is said on loopback.
fn beyond_the_cable() -> Conditions {
    let prefixes = ["192.0.2.0/24", "2001:db8::/32"];
    let destinations = prefixes.map(|prefix| prefix.parse().must("parse a prefix")).to_vec();
    Conditions { destinations, ..Conditions::default() }
}

/// A web server on the other side of the cable.
#[track_caller]
fn web_server(lab: &Lab) -> WebServer {
    let addresses = [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
    WebServer::start(&lab.network().topology.destination, &addresses)
}

/// Sends a flow to each address of the web server, one after another; each has to arrive once. Their clients
/// keep their side open until they are answered: Envoy ends a connection of which it hears the end before it
/// has read the header.
#[track_caller]
fn fetch(lab: &Lab, server: &WebServer) -> Vec<SocketAddr> {
    let to = destinations();
    let plan = web::Plan { to: to.clone(), ..web::Plan::new(to[0], to.len() as u32) };
    let fetched = web::fetch(lab, &plan);
    assert!(fetched.iter().all(|flow| flow.failure.is_none()), "{fetched:?}");
    lab.settle();
    let paths: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths, [0, 1, 2].map(web::path_of));
    to
}

/// Starts Envoy in the cgroup of a service, with this listener filter and this cluster. What it logs of each
/// connection is in the file that is given back.
#[track_caller]
fn envoy(
    lab: &Lab,
    service: &str,
    scratch: &Scratch,
    listener_filter: &str,
    cluster: &str,
) -> (Process, PathBuf) {
    let log = scratch.path().join("access.log");
    let text = include_str!("proxy_protocol.yaml")
        .replace("PORT", &ENVOY.port().to_string())
        .replace("LOG", &log.display().to_string())
        .replace("LISTENER_FILTER", listener_filter)
        .replace("CLUSTER", cluster);
    let file = scratch.path().join("envoy.yaml");
    fs::write(&file, text).must("write Envoy's configuration");
    let mut command = Command::new(from_pypi("envoy"));
    command.arg("-c").arg(file).args(["--concurrency", "1", "--disable-hot-restart"]);
    command.args(["--log-level", "error", "--file-flush-interval-msec", "100"]);
    lab.cgroup_of(service).enter_command(&mut command).must("enter the service's cgroup");
    let client = &lab.network().topology.client;
    client.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start Envoy");
    until("Envoy to listen", || listeners(lab, ENVOY.port()), |families| *families == 2);
    (process, log)
}

/// Starts Carnet's own service, which writes its log to this file.
#[track_caller]
fn inspect(namespace: &NetworkNamespace, command: &mut Command, log: &Path) -> Process {
    command.args(["--log", "json", "--ready-fd", "1", "--log-file"]).arg(log);
    namespace.enter_command(command.stderr(Stdio::null())).must("enter the namespace");
    let process = Process::spawn(command).must("start carnet-inspect");
    let is_ready = |line: &str| line.starts_with("ready ");
    process.wait_for_line("the line \"ready\"", PATIENCE, is_ready).must("wait for the service");
    process
}

/// Ends it, and gives the lines of its log.
#[track_caller]
fn end(mut service: Process, log: &Path) -> Vec<serde_json::Value> {
    service.terminate().must("end the service");
    service.wait(PATIENCE).must("wait for the service's end");
    let text = fs::read_to_string(log).must("read the log");
    text.lines().map(|line| serde_json::from_str(line).must("read a line of the log")).collect()
}

/// What Envoy has logged, once that are so many flows.
#[track_caller]
fn logged(log: &Path, count: usize) -> Vec<String> {
    let read = || {
        let text = fs::read_to_string(log).unwrap_or_default();
        text.lines().filter(|line| line.starts_with("flow ")).map(str::to_owned).collect()
    };
    until("Envoy to write its log", read, |lines: &Vec<String>| lines.len() >= count)
}

/// An address of a log, in its IPv4 form if it has one.
#[track_caller]
fn address(text: &str) -> SocketAddr {
    let address: SocketAddr = text.parse().must("read an address in a log");
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn envoy_takes_the_header_of_a_front_and_the_chain_goes_on() {
    let lab = Lab::new();
    let server = web_server(&lab);
    for (name, weight, unmodified) in [("front", 20, true), ("bravo", 10, false)] {
        let conditions = beyond_the_cable();
        lab.service_with(name, Plan { weight, unmodified, conditions, ..Plan::default() });
    }
    let scratch = Scratch::new();
    let filter = "name: envoy.filters.listener.proxy_protocol, typed_config: { \
                  \"@type\": type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol, \
                  rules: [ { tlv_type: 5, on_tlv_present: { key: flow } } ] }";
    let cluster = "type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED";
    let (_envoy, told) = envoy(&lab, "front", &scratch, filter, cluster);
    let log = scratch.path().join("front.log");
    let mut command = Command::new(program("carnet-inspect"));
    command.args(["--name", "front", "--user", "65534", "--send-proxy", &ENVOY.to_string()]);
    lab.cgroup_of("front").enter_command(&mut command).must("enter the service's cgroup");
    let front = inspect(&lab.network().topology.client, &mut command, &log);
    let bravo = lab.start("bravo");

    let to = fetch(&lab, &server);
    let told = logged(&told, to.len());
    let lines = end(front, &log);
    assert_eq!((told.len(), lines.len()), (3, 3), "{told:#?} {lines:#?}");
    let handles = ["front", "bravo"].map(|name| lab.handle_of(name));
    for (((told, line), report), to) in told.iter().zip(&lines).zip(bravo.finish()).zip(to) {
        // Envoy was told the destination, the client and which flow it is.
        let words: Vec<_> = told.split(' ').collect();
        let [_, destination, client, flow] = words[..] else { panic!("{told}") };
        assert_eq!(address(destination), address(&to.to_string()), "{told}");
        assert_eq!(address(client), address(line["client"].as_str().unwrap_or_default()), "{told}");
        assert_eq!(flow, line["flow"].to_string(), "{told}");
        // What it connected is that flow, which has had both.
        let record = report.parsed();
        assert_eq!(record.hops[..2].iter().map(|hop| hop.handle).collect::<Vec<_>>(), handles);
        assert_eq!(flow, report.flow.to_string(), "{report:#?}");
    }
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn envoy_hands_flows_on_to_another_host() {
    let lab = Lab::new();
    let server = web_server(&lab);
    let plan = Plan {
        unmodified: true,
        listen_port: ENVOY.port().try_into().ok(),
        conditions: beyond_the_cable(),
        ..Plan::default()
    };
    lab.service_with("envoy", plan);
    let scratch = Scratch::new();
    let log = scratch.path().join("other.log");
    let mut command = Command::new(program("carnet-inspect"));
    command.args(["--original-destination", "proxy", "--listen", &OTHER_HOST.to_string()]);
    command.args(["--proxy-from", &Topology::CLIENT_V4.to_string()]);
    let other = inspect(&lab.network().topology.destination, &mut command, &log);
    let filter = "name: envoy.filters.listener.original_dst, typed_config: { \
                  \"@type\": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst }";
    let cluster = format!(
        "type: STATIC, load_assignment: {{ cluster_name: onwards, endpoints: [ {{ lb_endpoints: [ \
         {{ endpoint: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }} }} ] }} ] }}, \
         transport_socket: {{ name: envoy.transport_sockets.upstream_proxy_protocol, typed_config: {{ \
         \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport, \
         config: {{ version: V2 }}, transport_socket: {{ name: envoy.transport_sockets.raw_buffer, typed_config: {{ \
         \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer }} }} }} }}",
        OTHER_HOST.ip(),
        OTHER_HOST.port()
    );
    let (_envoy, told) = envoy(&lab, "envoy", &scratch, filter, &cluster);

    let to = fetch(&lab, &server);
    assert_eq!(logged(&told, to.len()).len(), 3);
    let lines = end(other, &log);
    assert_eq!(lines.len(), 3, "{lines:#?}");
    for (line, to) in lines.iter().zip(to) {
        let named = address(line["destination"].as_str().unwrap_or_default());
        assert_eq!(
            (named, &line["verdict"]),
            (address(&to.to_string()), &"allow".into()),
            "{line:#}"
        );
    }
}

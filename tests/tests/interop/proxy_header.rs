//! Programs that take the PROXY protocol get a header with the record of a chain, of which they know nothing.

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

use carnet_core::{event::Counter, object::Conditions};
use carnet_testbed::Process;
use carnet_tests::{Lab, Must as _, PATIENCE, Plan, contract::Scratch, program, until};

use crate::{
    product::{AtWork, Product, Site},
    products::ENVOY,
};

const PORT: u16 = 15_001;

/// Envoy, which takes the destination from the header.
const ENVOY_BEHIND_A_FRONT: Product = Product { command: envoy, ..ENVOY };

fn envoy(site: &Site) -> Command {
    let command = (ENVOY.command)(site);
    let file = site.directory.join("envoy.yaml");
    let text = fs::read_to_string(&file).must("read Envoy's configuration");
    let original = "original_dst\n      typed_config:\n        \"@type\": \
        type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst";
    let header = "proxy_protocol\n      typed_config:\n        \"@type\": \
        type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol";
    assert!(text.contains(original), "{text}");
    fs::write(&file, text.replace(original, header)).must("write Envoy's configuration");
    command
}

/// Carnet's own service in front of it, which says the record as well.
#[track_caller]
fn front(lab: &Lab, service: &str, directory: &Scratch) -> Process {
    let keys = directory.path().join("keys");
    fs::write(&keys, "01".repeat(32)).must("write keys");
    fs::set_permissions(&keys, Permissions::from_mode(0o600)).must("set permissions");
    let mut command = Command::new(program("carnet-inspect"));
    command.args(["--send-proxy", &format!("127.0.0.1:{PORT}"), "--ready-fd", "1"]);
    command.arg("--chain-key").arg(&keys).stderr(Stdio::null());
    lab.cgroup_of(service).enter_command(&mut command).must("enter the service's cgroup");
    lab.network().topology.client.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start carnet-inspect");
    let is_ready = |line: &str| line.starts_with("ready ");
    process.wait_for_line("the line \"ready\"", PATIENCE, is_ready).must("wait for the service");
    process
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn envoy_takes_a_header_with_a_record() {
    let lab = Lab::new();
    let destinations = ["192.0.2.0/24", "2001:db8::/32"];
    let destinations = destinations.map(|prefix| prefix.parse().must("parse a prefix")).to_vec();
    let conditions = Conditions { destinations, ..Conditions::default() };
    lab.service_with("front", Plan { unmodified: true, conditions, ..Plan::default() });
    let envoy = AtWork::start(&lab, "front", &ENVOY_BEHIND_A_FRONT, PORT, "");
    let directory = Scratch::new();
    let _front = front(&lab, "front", &directory);
    // Envoy gives connections up whose other side has sent all that it will before the header was read.
    let client = lab.puppet();
    for to in [lab.v4(), lab.v6()] {
        let connection = client.connect(to).must("connect");
        connection.send(b"hello").must("send");
        assert_eq!(connection.receive(5), Ok(b"hello".to_vec()), "{to}");
    }
    let logged = || envoy.logged().iter().map(|one| one.to).collect::<Vec<SocketAddr>>();
    let mut told = until("Envoy's log", logged, |told| told.len() == 2);
    told.sort_unstable();
    assert_eq!(told, [lab.v4(), lab.v6()]);
    assert_eq!(lab.counter(Counter::RecordsExported), 2);
    assert_eq!(lab.network().echo().connections().len(), 2);
}

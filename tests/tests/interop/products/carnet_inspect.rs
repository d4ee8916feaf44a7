//! carnet-inspect, which co-operates: it sets the records of what it connects.

use std::process::Command;

use carnet_tests::program;

use crate::product::{Logged, Onwards, Product, Site};

pub(crate) const CARNET_INSPECT: Product = Product {
    name: "carnet-inspect",
    ipv6: true,
    tproxy: false,
    unmodified: false,
    onwards: Onwards::ToDestination,
    far_side: None,
    ready: None,
    command,
    log: Some("inspect.log"),
    read,
};

fn command(site: &Site) -> Command {
    let mut command = Command::new(program("carnet-inspect"));
    command.args(["--name", site.name, "--log", "json", "--user", "65534", "--log-file"]);
    command.arg(site.directory.join("inspect.log"));
    for address in ["127.0.0.1", "[::1]"] {
        command.args(["--listen", &format!("{address}:{}", site.port)]);
    }
    command
}

fn read(line: &str) -> Option<Logged> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let to = line["destination"].as_str()?.parse().ok()?;
    Some(Logged { to, path: None })
}

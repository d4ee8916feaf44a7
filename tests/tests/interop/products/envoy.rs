//! Envoy, as a relay with the listener filter and the cluster for original destinations:
//! `SO_ORIGINAL_DST` at the level of the socket's family.

use std::process::Command;

use crate::product::{Logged, Onwards, Product, Site, from_pypi};

pub(crate) const ENVOY: Product = Product {
    name: "envoy",
    ipv6: true,
    tproxy: false,
    unmodified: true,
    onwards: Onwards::ToDestination,
    far_side: None,
    ready: None,
    command,
    log: Some("access.log"),
    read,
};

fn command(site: &Site) -> Command {
    let text = include_str!("envoy.yaml")
        .replace("PORT", &site.port.to_string())
        .replace("DIRECTORY", &site.directory.display().to_string());
    let mut command = Command::new(from_pypi("envoy"));
    command.arg("-c").arg(site.write("envoy.yaml", &text));
    command.args(["--concurrency", "2", "--disable-hot-restart", "--log-level", "warning"]);
    command.args(["--file-flush-interval-msec", "100"]);
    command
}

/// `flow 192.0.2.2:80`
fn read(line: &str) -> Option<Logged> {
    let to = line.strip_prefix("flow ")?.parse().ok()?;
    Some(Logged { to, path: None })
}

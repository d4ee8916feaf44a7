//! SSLsplit, as a relay of plain TCP: `SO_ORIGINAL_DST` at the level of the socket's family.

use std::process::Command;

use crate::product::{Logged, Onwards, Product, Site, installed};

pub(crate) const SSLSPLIT: Product = Product {
    name: "sslsplit",
    ipv6: true,
    tproxy: false,
    unmodified: true,
    onwards: Onwards::ToDestination,
    far_side: None,
    ready: None,
    command,
    log: Some("connections.log"),
    read,
};

fn command(site: &Site) -> Command {
    let port = site.port.to_string();
    let mut command = Command::new(installed("sslsplit"));
    command.args(["-D", "-l"]).arg(site.directory.join("connections.log"));
    for address in ["127.0.0.1", "::1"] {
        command.args(["tcp", address, &port, "netfilter"]);
    }
    command
}

/// `tcp 127.0.0.1 45678 192.0.2.2 80 -`
fn read(line: &str) -> Option<Logged> {
    let mut words = line.split_whitespace().skip_while(|word| *word != "tcp");
    let (ip, port) = (words.nth(3)?, words.next()?);
    let to = (ip.parse::<std::net::IpAddr>().ok()?, port.parse().ok()?).into();
    Some(Logged { to, path: None })
}

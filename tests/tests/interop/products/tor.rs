//! Tor's `TransPort`: `SO_ORIGINAL_DST` at the level of the socket's family. It goes onwards through circuits
//! of a network of the tests' own, on the other side of the cable.

use std::process::Command;

use crate::{
    product::{Logged, Onwards, Product, Site, installed},
    tor_network,
};

pub(crate) const TOR: Product = Product {
    name: "tor",
    ipv6: true,
    tproxy: false,
    unmodified: true,
    onwards: Onwards::Shared,
    far_side: Some(tor_network::start),
    ready: Some("Bootstrapped 100%"),
    command,
    log: Some("app.log"),
    read,
};

fn command(site: &Site) -> Command {
    let (port, directory) = (site.port, site.directory.display());
    let network = site.far_side;
    let text = format!(
        "{network}\
         DataDirectory {directory}/data\n\
         SocksPort 0\n\
         TransPort 127.0.0.1:{port}\n\
         TransPort [::1]:{port}\n\
         SafeLogging 0\n\
         Log notice stderr\n\
         Log [app]debug file {directory}/app.log\n"
    );
    let mut command = Command::new(installed("tor"));
    command.args(["--defaults-torrc", "/dev/null", "-f"]).arg(site.write("torrc", &text));
    command
}

/// `… [debug] connection_ap_handshake_rewrite(): Client asked for 192.0.2.2:80`
fn read(line: &str) -> Option<Logged> {
    let to = line.split_once(": Client asked for ")?.1.trim().parse().ok()?;
    Some(Logged { to, path: None })
}

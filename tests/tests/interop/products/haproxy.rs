//! HAProxy, as a relay with `option transparent`: `getsockname()`, and over IPv4 `SO_ORIGINAL_DST` as well.

use std::process::Command;

use crate::product::{Logged, Onwards, Product, Site, installed};

pub(crate) const HAPROXY: Product = Product {
    name: "haproxy",
    ipv6: true,
    tproxy: true,
    unmodified: true,
    onwards: Onwards::ToDestination,
    far_side: None,
    ready: None,
    command,
    // It does not wait for a pipe that is full, nor for another of its threads, and loses lines: so it has
    // a file and one thread.
    log: Some("stderr"),
    read,
};

fn command(site: &Site) -> Command {
    let port = site.port;
    let text = format!(
        "global\n    \
           maxconn 2000\n    \
           nbthread 1\n    \
           log stderr format raw local0\n\
         defaults\n    \
           mode tcp\n    \
           log global\n    \
           log-format \"flow %[dst] %[dst_port]\"\n    \
           timeout connect 60s\n    \
           timeout client 120s\n    \
           timeout server 120s\n\
         listen in\n    \
           bind 127.0.0.1:{port}\n    \
           bind [::1]:{port}\n    \
           option transparent\n"
    );
    let mut command = Command::new(installed("haproxy"));
    command.arg("-db").arg("-f").arg(site.write("haproxy.cfg", &text));
    command
}

/// `flow 192.0.2.2 80`
fn read(line: &str) -> Option<Logged> {
    let (ip, port) = line.strip_prefix("flow ")?.split_once(' ')?;
    let to = (ip.parse::<std::net::IpAddr>().ok()?, port.parse().ok()?).into();
    Some(Logged { to, path: None })
}

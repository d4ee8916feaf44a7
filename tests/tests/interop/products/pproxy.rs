//! pproxy, with its `redir` server: `SO_ORIGINAL_DST`.

use std::process::Command;

use crate::product::{Logged, Onwards, Product, Site, from_pypi};

pub(crate) const PPROXY: Product = Product {
    name: "pproxy",
    ipv6: true,
    tproxy: false,
    unmodified: true,
    onwards: Onwards::ToDestination,
    far_side: None,
    ready: None,
    command,
    log: None,
    read,
};

fn command(site: &Site) -> Command {
    let port = site.port;
    let mut command = Command::new(from_pypi("pproxy"));
    command.args(["-v", "-l", &format!("redir://127.0.0.1:{port}")]);
    command.args(["-l", &format!("redir://[::1]:{port}")]).env("PYTHONUNBUFFERED", "1");
    command
}

/// `redir 127.0.0.1:45678 -> 192.0.2.2:80`
fn read(line: &str) -> Option<Logged> {
    // It writes no brackets around an IPv6 address.
    let (ip, port) = line.strip_prefix("redir ")?.split_once(" -> ")?.1.trim().rsplit_once(':')?;
    let to = (ip.parse::<std::net::IpAddr>().ok()?, port.parse().ok()?).into();
    Some(Logged { to, path: None })
}

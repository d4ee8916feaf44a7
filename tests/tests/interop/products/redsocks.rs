//! redsocks: `SO_ORIGINAL_DST` over IPv4, and onwards through a SOCKS server, here pproxy's on the other
//! side of the cable.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
};

use carnet_testbed::Topology;

use crate::{
    far_side::socks_server,
    product::{Logged, Onwards, Product, Site, installed},
};

/// Where the SOCKS server is.
pub(crate) const SOCKS: SocketAddr = SocketAddr::new(IpAddr::V4(Topology::DESTINATION_V4), 1080);

pub(crate) const REDSOCKS: Product = Product {
    name: "redsocks",
    ipv6: false,
    tproxy: false,
    unmodified: true,
    onwards: Onwards::Through(SOCKS),
    far_side: Some(socks_server),
    ready: None,
    command,
    log: Some("redsocks.log"),
    read,
};

fn command(site: &Site) -> Command {
    let (port, directory) = (site.port, site.directory.display());
    let (ip, socks) = (SOCKS.ip(), SOCKS.port());
    let text = format!(
        "base {{ log_debug = off; log_info = on; log = \"file:{directory}/redsocks.log\"; \
         daemon = off; redirector = iptables; }}\n\
         redsocks {{ local_ip = 127.0.0.1; local_port = {port}; ip = {ip}; port = {socks}; \
         type = socks5; }}\n"
    );
    let mut command = Command::new(installed("redsocks"));
    command.arg("-c").arg(site.write("redsocks.conf", &text));
    command
}

/// `… [127.0.0.1:45678->192.0.2.2:80]: accepted`
fn read(line: &str) -> Option<Logged> {
    let (flow, _) = line.split_once("]: accepted")?;
    let to = flow.rsplit_once("->")?.1.parse().ok()?;
    Some(Logged { to, path: None })
}

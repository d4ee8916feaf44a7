//! mitmproxy, in its transparent mode: `SO_ORIGINAL_DST` at the level of the address that `getsockname()`
//! shows.

use std::process::Command;

use super::of_url;
use crate::product::{Logged, Onwards, Product, Site, from_pypi};

pub(crate) const MITMPROXY: Product = Product {
    name: "mitmproxy",
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
    let mut command = Command::new(from_pypi("mitmdump"));
    command.arg("--set").arg(format!("confdir={}", site.directory.join("ca").display()));
    command.args(["--set", "flow_detail=1"]);
    for address in ["127.0.0.1", "::1"] {
        command.arg("--mode").arg(format!("transparent@{address}:{}", site.port));
    }
    command.env("PYTHONUNBUFFERED", "1");
    command
}

/// `[11:01:12.345] 127.0.0.1:34567: GET http://192.0.2.2/flow-1`
fn read(line: &str) -> Option<Logged> {
    let (to, path) = of_url(line.split_once(": GET ")?.1.trim())?;
    Some(Logged { to, path: Some(path) })
}

//! e2guardian, a content filter. It asks nobody for the destination: it connects to whom the request names
//! (`Host`), as it does behind netfilter's redirect.

use std::{fs, process::Command};

use carnet_tests::Must as _;

use super::of_url;
use crate::product::{Logged, Onwards, Product, Site, installed};

/// Where Debian's package has its configuration.
const PACKAGED: &str = "/etc/e2guardian";

pub(crate) const E2GUARDIAN: Product = Product {
    name: "e2guardian",
    ipv6: false,
    tproxy: false,
    unmodified: true,
    onwards: Onwards::ToDestination,
    far_side: None,
    ready: None,
    command,
    log: Some("access.log"),
    read,
};

/// As Debian has it, but for its place.
fn command(site: &Site) -> Command {
    let own = [
        ("filterip", "127.0.0.1".to_owned()),
        ("filterports", site.port.to_string()),
        ("transparenthttpsport", site.other_port().to_string()),
        ("loglocation", format!("'{}/access.log'", site.directory.display())),
        ("logfileformat", "1".to_owned()),
        ("pidfilename", format!("'{}/pid'", site.directory.display())),
        ("httpworkers", "50".to_owned()),
    ];
    let packaged = |name: &str| {
        let read = fs::read_to_string(format!("{PACKAGED}/{name}"));
        read.must("read e2guardian's configuration")
    };
    let is_own = |line: &&str| own.iter().any(|(option, _)| line.starts_with(option));
    let kept: String = packaged("e2guardian.conf")
        .lines()
        .filter(|line| !is_own(line))
        .fold(String::new(), |text, line| text + line + "\n");
    let text = own.iter().fold(kept, |text, (option, value)| text + option + " = " + value + "\n");
    // It looks for the first group's beside its own.
    site.write("e2guardianf1.conf", &packaged("e2guardianf1.conf"));
    let mut command = Command::new(installed("e2guardian"));
    command.arg("-N").arg("-c").arg(site.write("e2guardian.conf", &text));
    command
}

/// `2026.11.26 08:29:34 - 127.0.0.1 http://192.0.2.2/flow-1 - GET …`
fn read(line: &str) -> Option<Logged> {
    let url = line.split(' ').find(|word| word.starts_with("http://"))?;
    let (to, path) = of_url(url)?;
    Some(Logged { to, path: Some(path) })
}

//! squid, with an `intercept` port: `SO_ORIGINAL_DST`. It compares the request's host with the destination.

use std::process::Command;

use super::of_url;
use crate::product::{Logged, Onwards, Product, Site, installed};

pub(crate) const SQUID: Product = Product {
    name: "squid",
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

/// The same as it is by itself: connections onwards are kept for other clients' requests.
pub(crate) const SQUID_WITH_POOL: Product = Product { command: command_with_pool, ..SQUID };

/// Connections onwards are not kept, so that the next service has as many flows as this one.
fn command(site: &Site) -> Command {
    configured(site, "server_persistent_connections off\n")
}

fn command_with_pool(site: &Site) -> Command {
    configured(site, "")
}

fn configured(site: &Site, more: &str) -> Command {
    let (port, other, name) = (site.port, site.other_port(), site.name);
    let directory = site.directory.display();
    let text = format!(
        "http_port 127.0.0.1:{other}\n\
         http_port 127.0.0.1:{port} intercept\n\
         http_port [::1]:{port} intercept\n\
         http_access allow all\n\
         cache deny all\n\
         {more}\
         visible_hostname {name}\n\
         pinger_enable off\n\
         shutdown_lifetime 0 seconds\n\
         dns_nameservers 127.0.0.1\n\
         pid_filename none\n\
         coredump_dir {directory}\n\
         cache_log {directory}/cache.log\n\
         logformat flow flow %ru\n\
         access_log stdio:{directory}/access.log flow\n"
    );
    let mut command = Command::new(installed("squid"));
    command.arg("-N").arg("-f").arg(site.write("squid.conf", &text));
    command
}

/// `flow http://192.0.2.2/flow-1`
fn read(line: &str) -> Option<Logged> {
    let (to, path) = of_url(line.strip_prefix("flow ")?)?;
    Some(Logged { to, path: Some(path) })
}

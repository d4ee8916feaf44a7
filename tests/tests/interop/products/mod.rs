//! The products, one file each.

mod carnet_inspect;
mod e2guardian;
mod envoy;
mod haproxy;
mod mitmproxy;
mod pproxy;
mod redsocks;
mod squid;
mod sslsplit;
mod tor;

use std::net::{IpAddr, SocketAddr};

use carnet_tests::web::PORT;

pub(crate) use self::{
    carnet_inspect::CARNET_INSPECT,
    e2guardian::E2GUARDIAN,
    envoy::ENVOY,
    haproxy::HAPROXY,
    mitmproxy::MITMPROXY,
    pproxy::PPROXY,
    redsocks::{REDSOCKS, SOCKS},
    squid::{SQUID, SQUID_WITH_POOL},
    sslsplit::SSLSPLIT,
    tor::TOR,
};
use crate::product::Product;

/// All that know nothing of Carnet, and lose no flow by themselves.
pub(crate) const ALL: [&Product; 8] =
    [&MITMPROXY, &SQUID, &HAPROXY, &ENVOY, &REDSOCKS, &PPROXY, &E2GUARDIAN, &TOR];

/// The address, with HTTP's port, and the path of a URL that names the address.
fn of_url(url: &str) -> Option<(SocketAddr, String)> {
    let (host, path) = url.strip_prefix("http://")?.split_once('/')?;
    // mitmproxy writes no brackets around an IPv6 address.
    let ip: IpAddr = host.trim_matches(['[', ']']).parse().ok()?;
    Some(((ip, PORT).into(), format!("/{path}")))
}

//! Several programs in one chain, none of which knows of the others.

use std::net::SocketAddr;

use carnet_testbed::Topology;
use carnet_tests::web;

use crate::{
    product::Product,
    products::{CARNET_INSPECT, E2GUARDIAN, ENVOY, HAPROXY, MITMPROXY, REDSOCKS, SQUID, TOR},
    scene::{Member, Scene},
};

/// Flows of a chain, and how many of them at a time.
const FLOWS: u32 = 24;
const AT_A_TIME: u32 = 4;

/// The web server over IPv4, over IPv6, and over IPv4 from an IPv6 socket.
pub(crate) fn destinations() -> Vec<SocketAddr> {
    let mapped = Topology::DESTINATION_V4.to_ipv6_mapped();
    vec![
        (Topology::DESTINATION_V4, web::PORT).into(),
        (Topology::DESTINATION_V6, web::PORT).into(),
        (mapped, web::PORT).into(),
    ]
}

/// Sends flows of all families, some at a time, through a chain; in it each has to be once in every log.
#[track_caller]
fn passes(products: &[&'static Product]) {
    let to = destinations();
    // All of a chain take what its weakest takes.
    let to: Vec<_> = match products.iter().all(|product| product.ipv6) {
        true => to,
        false => to.into_iter().filter(|to| to.ip().to_canonical().is_ipv4()).collect(),
    };
    let members: Vec<_> = products.iter().copied().map(Member::Product).collect();
    let mut scene = Scene::new(&members);
    let plan = web::Plan { to, workers: AT_A_TIME, ..web::Plan::new(destinations()[0], FLOWS) };
    let names: Vec<_> = products.iter().map(|product| product.name).collect();
    let names = names.join(" -> ");
    scene.fetch(&plan).unwrap_or_else(|fault| panic!("{names}: {fault}"));
    println!("{names}: {FLOWS} flows, each once in every log");
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn mitmproxy_then_squid_then_haproxy() {
    passes(&[&MITMPROXY, &SQUID, &HAPROXY]);
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn envoy_then_carnet_inspect_then_mitmproxy() {
    passes(&[&ENVOY, &CARNET_INSPECT, &MITMPROXY]);
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn squid_then_e2guardian_then_haproxy() {
    // e2guardian finds the server by what the request names, and writes the request anew.
    passes(&[&SQUID, &E2GUARDIAN, &HAPROXY]);
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn two_of_the_same_product() {
    for product in [&SQUID, &HAPROXY, &ENVOY, &MITMPROXY, &E2GUARDIAN] {
        passes(&[product, product]);
    }
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn every_order_of_three() {
    let three = [&SQUID, &HAPROXY, &ENVOY];
    for first in 0..3 {
        for second in (0..3).filter(|second| *second != first) {
            passes(&[three[first], three[second], three[3 - first - second]]);
        }
    }
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn one_that_connects_elsewhere_is_last() {
    // What redsocks connects goes to its SOCKS server, what tor connects to relays: in protocols of their own.
    passes(&[&HAPROXY, &ENVOY, &REDSOCKS]);
    passes(&[&HAPROXY, &ENVOY, &TOR]);
}

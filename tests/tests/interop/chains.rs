//! Several programs in one chain, none of which knows of the others.

use std::net::SocketAddr;

use carnet_testbed::Topology;
use carnet_tests::web;

use crate::{
    product::Product,
    products::{CARNET_INSPECT, ENVOY, HAPROXY, MITMPROXY, REDSOCKS, SQUID},
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
    let members: Vec<_> = products.iter().map(|product| Member::Product(product)).collect();
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
fn two_of_the_same_product() {
    for product in [&SQUID, &HAPROXY, &ENVOY, &MITMPROXY] {
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
fn one_with_an_upstream_of_its_own_is_last() {
    // What redsocks connects goes to its SOCKS server, in its protocol.
    let to = vec![destinations()[0]];
    let members = [&HAPROXY, &ENVOY, &REDSOCKS].map(|product| Member::Product(product));
    let mut scene = Scene::new(&members);
    let plan = web::Plan { workers: AT_A_TIME, ..web::Plan::new(to[0], FLOWS) };
    scene.fetch(&plan).unwrap_or_else(|fault| panic!("{fault}"));
}

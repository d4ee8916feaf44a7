//! A proxy that keeps its connections onwards for requests of other clients.

use carnet_tests::web;

use crate::{
    chains::destinations,
    products::{HAPROXY, SQUID_WITH_POOL},
    scene::{Member, Scene},
};

const FLOWS: u32 = 30;

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn a_pooled_connection_passes_the_next_service_once_whosever_requests_it_carries() {
    let members = [&SQUID_WITH_POOL, &HAPROXY].map(|product| Member::Product(product));
    let mut scene = Scene::new(&members);
    let to = destinations()[0];
    let fetched = web::fetch(&scene.lab, &web::Plan::new(to, FLOWS));
    assert!(fetched.iter().all(|flow| flow.failure.is_none()), "{fetched:?}");
    assert_eq!(scene.server.requests().len(), FLOWS as usize);
    let first = scene.links[0].logged();
    assert_eq!(first.len(), FLOWS as usize, "{first:?}");
    // Its connections end when squid ends.
    scene.kill(0);
    scene.lab.settle();
    let second = scene.links[1].logged();
    assert!((1..FLOWS as usize).contains(&second.len()), "{second:?}");
    assert!(second.iter().all(|one| one.to == to), "{second:?}");
}

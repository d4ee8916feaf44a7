//! Each product with each family at each position of a chain, as one table.

use std::{fmt, net::SocketAddr, thread};

use carnet_testbed::Topology;
use carnet_tests::web;

use crate::{
    product::{Onwards, Product, is_wanted},
    products,
    scene::{Member, Scene},
};

/// Flows of a cell.
const FLOWS: u32 = 3;

/// The client's socket and what it reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
    /// An IPv6 socket with an IPv4-mapped destination.
    Mapped,
}

impl Family {
    const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    fn destination(self) -> SocketAddr {
        match self {
            Self::V4 => (Topology::DESTINATION_V4, web::PORT).into(),
            Self::V6 => (Topology::DESTINATION_V6, web::PORT).into(),
            Self::Mapped => (Topology::DESTINATION_V4.to_ipv6_mapped(), web::PORT).into(),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Mapped => "mapped",
        })
    }
}

/// Where in a chain the product stands; the others co-operate.
const POSITIONS: [(&str, usize, usize); 4] =
    [("alone", 0, 0), ("first", 0, 2), ("middle", 1, 1), ("last", 2, 0)];

/// What became of a cell.
type Cell = Result<&'static str, String>;

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn each_product_in_each_family_at_each_position() {
    let columns = Family::ALL.map(|family| POSITIONS.map(|(position, ..)| (family, position)));
    let mut faults = Vec::new();
    println!();
    print!("{:16}", "");
    columns.as_flattened().iter().for_each(|(family, _)| print!("{family:8}"));
    print!("\n{:16}", "");
    columns.as_flattened().iter().for_each(|(_, position)| print!("{position:8}"));
    println!();
    for product in products::ALL.into_iter().filter(|product| is_wanted(product)) {
        print!("{:16}", product.name);
        let rows = POSITIONS.map(|(_, before, after)| at_position(product, before, after));
        for (number, family) in Family::ALL.into_iter().enumerate() {
            for ((position, ..), row) in POSITIONS.iter().zip(&rows) {
                match &row[number] {
                    Ok(word) => print!("{word:8}"),
                    Err(fault) => {
                        print!("{:8}", "FAILED");
                        let name = product.name;
                        faults.push(format!("{name}, {family}, {position}: {fault}"));
                    }
                }
            }
        }
        println!();
    }
    assert!(faults.is_empty(), "{} cells failed:\n{}", faults.len(), faults.join("\n"));
}

/// One product with services before and after it, over each family.
fn at_position(product: &'static Product, before: usize, after: usize) -> [Cell; 3] {
    if after > 0 && product.onwards == Onwards::Shared {
        return [(); 3].map(|()| Ok("is last"));
    }
    let members = |count| std::iter::repeat_n(Member::Honest, count);
    let chain = members(before).chain([Member::Product(product)]).chain(members(after));
    let chain: Vec<_> = chain.collect();
    // What does not even start fails its own cells alone.
    let carry_out = move || {
        let mut scene = Scene::new(&chain);
        let mut first = 0;
        Family::ALL.map(|family| {
            if family == Family::V6 && !product.ipv6 {
                return Ok("no IPv6");
            }
            let plan = web::Plan { first, ..web::Plan::new(family.destination(), FLOWS) };
            first += FLOWS;
            scene.fetch(&plan).map(|()| "ok")
        })
    };
    thread::spawn(carry_out).join().unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        [(); 3].map(|()| Err(format!("panicked: {said}")))
    })
}

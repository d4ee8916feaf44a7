//! A redirect service on the library `carnet` that reports all it knows: see
//! `carnet_tests::service`.

use clap::Parser;

/// Accept redirected connections, print a line of JSON about each, connect onwards and relay.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    behaviour: carnet_tests::service::Behaviour,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    carnet_tests::service::serve(&Arguments::parse().behaviour)
}

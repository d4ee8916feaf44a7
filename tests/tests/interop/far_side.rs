//! What products need on the other side of the cable, out of every scope.

use carnet_testbed::{NetworkNamespace, Process};
use carnet_tests::{Must as _, contract::Scratch, until};

use crate::{product::from_pypi, products::SOCKS};

/// What runs there for a product.
pub(crate) struct FarSide {
    pub(crate) _processes: Vec<Process>,
    /// Where these have their files.
    pub(crate) _scratch: Option<Scratch>,
    /// What the product's configuration says of it.
    pub(crate) configuration: String,
}

/// A SOCKS server.
#[track_caller]
pub(crate) fn socks_server(destination: &NetworkNamespace) -> FarSide {
    let mut command = std::process::Command::new(from_pypi("pproxy"));
    command.args(["-l", &format!("socks5://{SOCKS}")]).env("PYTHONUNBUFFERED", "1");
    destination.enter_command(&mut command).must("enter the namespace");
    let process = Process::spawn(&mut command).must("start a SOCKS server");
    let reach = || destination.run(|| std::net::TcpStream::connect(SOCKS));
    until("the SOCKS server", || reach().must("enter the namespace").is_ok(), |reached| *reached);
    FarSide { _processes: vec![process], _scratch: None, configuration: String::new() }
}

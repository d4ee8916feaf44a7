//! Every way to open a flow that we know of, on the real kernel: each is redirected to the service
//! with its true destination, or refused, or an exception that the documentation names.
//!
//! `tests/evasion.toml` lists the ways with the tests that show them, some of which are elsewhere;
//! `cargo xtask evasion` runs them and prints the list.

mod cgroups;
mod existing;
mod foreign;
mod interference;
mod programs;
mod tcp;
mod udp;
mod unseen;

use std::net::SocketAddr;

use carnet_core::object::{Conditions, FilterAction, NewFilter, Weight};
use carnet_testbed::AcceptedConnection;
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan, Report, Running,
    puppet::{Hand, Puppet},
    until,
};

/// A lab with one service, which gets every connection, at work, and a client.
struct Scene {
    lab: Lab,
    service: Running,
    client: Puppet,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        Self::with(Conditions::default())
    }

    /// One whose service gets what meets these conditions.
    #[track_caller]
    fn with(conditions: Conditions) -> Self {
        let lab = Lab::new();
        lab.service_with("alpha", Plan { conditions, ..Plan::default() });
        let service = lab.start("alpha");
        let client = lab.puppet();
        Self { lab, service, client }
    }

    /// The destination in every form that an application may ask for.
    fn destinations(&self) -> [SocketAddr; 3] {
        destinations(&self.lab)
    }

    /// Has `open` connect to the destination in each of its forms, and checks that each of the
    /// connections has come to the service.
    #[track_caller]
    fn redirects<'a>(&'a self, open: impl Fn(&'a Puppet, SocketAddr) -> Hand<'a>) {
        for to in self.destinations() {
            let connection = open(&self.client, to);
            self.arrived(&connection, to);
        }
    }

    /// Checks that a connection works, shows its peer as the one that it asked for, and has come to
    /// the service with that as its original destination; gives what the service says of it.
    #[track_caller]
    fn arrived(&self, connection: &Hand<'_>, to: SocketAddr) -> Report {
        echoes(connection);
        assert_eq!(connection.peer(), Ok(to));
        let local = connection.local().must("ask for the local address");
        let report = self.report_of(local);
        assert_eq!(report.original, to, "{report:#?}");
        report
    }

    /// Checks that a connection has gone straight to the destination.
    #[track_caller]
    fn went_straight(&self, connection: &Hand<'_>) {
        echoes(connection);
        let local = connection.local().must("ask for the local address");
        let echo = self.lab.network().echo();
        let is_there =
            |all: &[AcceptedConnection]| all.iter().any(|c| canonical(c.peer) == canonical(local));
        echo.wait_for("a connection", PATIENCE, is_there).must("see the connection");
        assert!(self.service.reports(0).iter().all(|r| canonical(r.peer) != canonical(local)));
    }

    /// What the service says of the connection that begins here.
    #[track_caller]
    fn report_of(&self, local: SocketAddr) -> Report {
        let is_it = |report: &Report| canonical(report.peer) == canonical(local);
        let reports = || self.service.reports(0);
        let reports = until("the service's report", reports, |reports| reports.iter().any(is_it));
        reports.into_iter().find(is_it).expect("the report that was waited for")
    }
}

/// The same of a lab.
fn destinations(lab: &Lab) -> [SocketAddr; 3] {
    let v4 = lab.v4();
    let SocketAddr::V4(plain) = v4 else { panic!("{v4} is not IPv4") };
    let mapped = SocketAddr::new(plain.ip().to_ipv6_mapped().into(), plain.port());
    [v4, lab.v6(), mapped]
}

/// An address, IPv4 as such even if it is mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Sends a word and gets it back.
#[track_caller]
fn echoes(connection: &Hand<'_>) {
    connection.send(b"marco").must("send");
    assert_eq!(connection.receive(5), Ok(b"marco".to_vec()));
}

/// Adds a filter that blocks what meets these conditions, in a sublayer of its own; gives its id.
#[track_caller]
fn block(lab: &Lab, name: &str, conditions: Conditions) -> u64 {
    lab.change(|policy| {
        policy.add_sublayer(name, "alpha", 7)?;
        let action = FilterAction::Block { hard: true, veto: false };
        let (sublayer, weight) = (name.into(), Weight::Auto);
        let name = Some(name.into());
        Ok(policy.add_filter(NewFilter { name, sublayer, weight, conditions, action })?.id)
    })
}

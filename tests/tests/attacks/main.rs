//! Attacks on the records and on what guards them, on the real kernel, each of them carried out: by
//! applications, by services of other vendors, by services that have been taken over, by other users.
//!
//! `tests/attacks.toml` lists the attacks with the tests that show what becomes of them, some of which
//! are elsewhere; `cargo xtask attacks` runs them and prints the list.

mod authority;
mod cgroups;
mod chains;
mod context;
mod forgery;
mod portable;
mod replay;
mod secrets;

use std::net::SocketAddr;

use carnet_core::abi;
use carnet_tests::{
    Lab, Must as _, Plan,
    puppet::{Errno, Family, Hand, Kind, Puppet},
};

/// The protocols whose flows have records.
const PROTOCOLS: [Kind; 2] = [Kind::Tcp, Kind::Udp];
/// An ordinary user.
const NOBODY: u32 = 65534;

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

fn fails<T>(errno: i32) -> Result<T, Errno> {
    Err(Errno(errno))
}

/// A lab with services of one provider each, all of which get every flow, the first one first. Each has
/// its name as context.
fn lab_of(services: &[&str]) -> Lab {
    let lab = Lab::new();
    for (weight, name) in (1..=services.len() as u16).rev().zip(services) {
        let context = Some(name.as_bytes().to_vec());
        lab.service_with(name, Plan { weight, context, ..Plan::default() });
    }
    lab
}

/// A puppet at work as a service: it listens for connections and for datagrams.
struct Service<'a> {
    puppet: &'a Puppet,
    tcp: Hand<'a>,
    udp: Hand<'a>,
}

/// A flow that a service has got.
struct Delivery<'a> {
    /// The record that came with it.
    record: Vec<u8>,
    /// The socket that answers questions about it.
    accepted: Hand<'a>,
    /// The client's.
    client: Hand<'a>,
}

impl<'a> Service<'a> {
    #[track_caller]
    fn at_work(puppet: &'a Puppet) -> Self {
        let udp = puppet.udp(loopback());
        udp.bind(loopback()).must("bind");
        udp.register(&[]).must("register the UDP socket");
        Self { puppet, tcp: puppet.serve(loopback()), udp }
    }

    /// Gets a flow that a client begins.
    #[track_caller]
    fn deliver<'b>(&self, client: &'b Puppet, to: SocketAddr, kind: Kind) -> Delivery<'b>
    where
        'a: 'b,
    {
        self.accept(fresh(client, kind), to, kind)
    }

    /// Gets a flow that begins with a socket which is there.
    #[track_caller]
    fn accept<'b>(&self, client: Hand<'b>, to: SocketAddr, kind: Kind) -> Delivery<'b>
    where
        'a: 'b,
    {
        client.connect(to).must("connect");
        let accepted = if kind == Kind::Tcp {
            self.tcp.accept().must("accept")
        } else {
            client.send(b"hello").must("send");
            let (_, peer) = self.udp.receive_from().must("receive a datagram");
            let asking = self.puppet.udp(peer);
            asking.connect(peer).must("ask about a flow");
            asking
        };
        let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query the record");
        Delivery { record, accepted, client }
    }

    /// A socket of the service for the way onwards.
    #[track_caller]
    fn fresh(&self, kind: Kind) -> Hand<'a> {
        fresh(self.puppet, kind)
    }
}

/// A new socket.
#[track_caller]
fn fresh(puppet: &Puppet, kind: Kind) -> Hand<'_> {
    puppet.open(Family::V4, kind).must("open a socket")
}

/// Checks that a socket takes this record.
#[track_caller]
fn accepts(socket: &Hand<'_>, record: &[u8]) {
    assert_eq!(socket.set_record(record), Ok(()));
}

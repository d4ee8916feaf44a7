//! What C programs ask of their lab about UDP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use carnet_core::event::{Event, EventKind};
use carnet_testbed::{DatagramServer, Topology};

use crate::{
    Lab, Must as _,
    lab::Trace,
    puppet::{Family, Hand, Kind, Puppet},
};

/// How many ports of each family the servers have.
const PORTS: usize = 4;

/// Servers at the destination, and the clients' sockets.
pub(super) struct Datagrams<'a> {
    client: &'a Puppet,
    servers: DatagramServer,
    /// By number; a closed one leaves its place.
    sockets: Vec<Option<(Family, Hand<'a>)>>,
    trace: Trace,
}

impl<'a> Datagrams<'a> {
    #[track_caller]
    pub(super) fn new(lab: &'a Lab, client: &'a Puppet) -> Self {
        let both: [IpAddr; 2] = [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
        let addresses = (0..PORTS).flat_map(|_| both).map(|ip| SocketAddr::new(ip, 0));
        let servers = DatagramServer::start_in(&lab.network().topology.destination, addresses);
        let servers = servers.must("start servers");
        Self { client, servers, sockets: Vec::new(), trace: lab.trace() }
    }

    /// Answers a request, the word `udp` left out.
    #[track_caller]
    pub(super) fn answer(&mut self, request: &[&str]) -> String {
        match *request {
            ["server", index] => spaced(self.servers.addresses()[number(index)]),
            ["open", family] => {
                let family = if family == "6" { Family::V6 } else { Family::V4 };
                let socket = self.client.open(family, Kind::Udp).must("open a socket");
                self.sockets.push(Some((family, socket)));
                (self.sockets.len() - 1).to_string()
            }
            ["bind", socket, port] => {
                let (family, socket) = self.socket(socket);
                let ip: IpAddr = match family {
                    Family::V6 => Ipv6Addr::LOCALHOST.into(),
                    _ => Ipv4Addr::LOCALHOST.into(),
                };
                socket.bind(SocketAddr::new(ip, number(port) as u16)).must("bind");
                socket.local().must("ask for the port").port().to_string()
            }
            ["connect", socket, ip, port] => {
                self.socket(socket).1.connect(address(ip, port)).must("connect");
                "done".into()
            }
            ["send", socket, ip, port, text] => {
                let sent = self.socket(socket).1.send_to(address(ip, port), text.as_bytes());
                sent.must("send");
                "done".into()
            }
            ["write", socket, text] => {
                self.socket(socket).1.send(text.as_bytes()).must("send");
                "done".into()
            }
            ["read", socket] => {
                let (bytes, source) = self.socket(socket).1.receive_from().must("receive");
                let source = SocketAddr::new(source.ip().to_canonical(), source.port());
                format!("{} {}", spaced(source), String::from_utf8_lossy(&bytes))
            }
            ["close", socket] => {
                self.sockets[number(socket)] = None;
                "done".into()
            }
            ["onward", ip, first, count] => {
                let (first, count) = (address(ip, first), number(count));
                self.onward(first, count)
            }
            _ => panic!("the program asks for udp {request:?}"),
        }
    }

    #[track_caller]
    fn socket(&self, index: &str) -> &(Family, Hand<'a>) {
        self.sockets[number(index)].as_ref().expect("an open socket")
    }

    /// The flows that went onwards to so many ports from this address on, one for each: their numbers,
    /// each once, in the order of the ports.
    #[track_caller]
    fn onward(&mut self, first: SocketAddr, count: usize) -> String {
        let ports = usize::from(first.port())..usize::from(first.port()) + count;
        let is_it = |event: &&Event| {
            let to = SocketAddr::from(event.requested);
            event.kind == EventKind::Onward as u32
                && to.ip() == first.ip()
                && ports.contains(&to.port().into())
        };
        let enough = |events: &[Event]| events.iter().filter(is_it).count() >= count;
        let events = self.trace.until("onward flows", enough);
        let mut found: Vec<_> = events.iter().filter(is_it).collect();
        assert_eq!(found.len(), count, "one flow for each port: {found:#?}");
        found.sort_by_key(|event| event.requested.port);
        let mut flows: Vec<u64> = found.iter().map(|event| event.flow).collect();
        flows.dedup();
        let flows: Vec<_> = flows.iter().map(u64::to_string).collect();
        flows.join(" ")
    }
}

#[track_caller]
fn number(text: &str) -> usize {
    text.parse().must("read a number")
}

#[track_caller]
fn address(ip: &str, port: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().must("read an address"), number(port) as u16)
}

fn spaced(address: SocketAddr) -> String {
    format!("{} {}", address.ip(), address.port())
}

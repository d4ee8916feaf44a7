//! Carries the cells out: what clients see, and in the end what services, servers and the engine
//! have seen.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use carnet_core::{
    event::{Counter, Event},
    object::{CgroupCondition, Conditions, FilterAction, NewFilter, Weight},
};
use carnet_engine::Engine;
use carnet_testbed::{AcceptedConnection, DatagramServer, EchoServer, ReceivedDatagram, answer_of};
use carnet_tests::{
    Lab, Must as _, Network, Plan, Report,
    puppet::{Errno, Hand, Kind, Puppet, Receiving, Result},
    service::{Behaviour, Line},
};

use crate::cells::{Bind, Cell, Destination, Family, Place, Protocol, User, Will};

/// How many cells are carried out at a time.
const WORKERS: usize = 4;
/// How long a client waits for an answer; and how long when many have not come.
const PATIENT: Duration = Duration::from_secs(20);
const IMPATIENT: Duration = Duration::from_millis(300);
/// How many have to be missing for that.
const MANY: usize = 8;

/// What a client saw of one flow.
#[derive(Debug)]
pub(crate) struct Sight {
    /// The cell's number.
    pub(crate) cell: usize,
    pub(crate) will: Will,
    /// Where it wanted to go.
    pub(crate) to: SocketAddr,
    /// The client's process.
    pub(crate) pid: u32,
    /// What it sent.
    pub(crate) marker: Vec<u8>,
    /// What became of the call that begins the flow: connect() or sendto().
    pub(crate) begun: Result<()>,
    /// Its own address, once begun.
    pub(crate) local: Result<SocketAddr>,
    /// getpeername().
    pub(crate) peer: Result<SocketAddr>,
    /// What came back, and from where if the call tells. `None` where nothing can.
    pub(crate) answer: Option<Result<(Vec<u8>, Option<SocketAddr>)>>,
}

/// All that was seen.
pub(crate) struct Evidence {
    pub(crate) sights: Vec<Sight>,
    /// What the service in each place reported, and what else it said.
    pub(crate) services: Vec<(Place, u64, Vec<Report>, Vec<Line>)>,
    pub(crate) connections: Vec<AcceptedConnection>,
    pub(crate) datagrams: Vec<ReceivedDatagram>,
    pub(crate) events: Vec<Event>,
    pub(crate) counters: Vec<(Counter, u64)>,
}

/// The laboratory.
struct Stage {
    lab: Lab,
    echoes: [EchoServer; 2],
    answering: [DatagramServer; 2],
}

/// Carries out all cells that can be.
pub(crate) fn carry_out(cells: &[Cell]) -> Evidence {
    let Stage { lab, echoes, answering } = Stage::new();
    let services = Place::ALL.map(|place| {
        let behaviour = Behaviour::at(&place.addresses());
        (place, lab.handle_of(place.service()), lab.start_with(place.service(), &behaviour))
    });
    let mut trace = lab.trace();
    let next = AtomicUsize::new(0);
    let missing = AtomicUsize::new(0);
    let (sights, events) = thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| scope.spawn(|| Worker::new(&lab, cells, &missing).work(&next)))
            .collect();
        let events =
            trace.collect_while(|| workers.iter().any(|worker| !worker.is_finished())).to_vec();
        let sights = workers.into_iter().flat_map(|worker| worker.join().expect("a worker"));
        (sights.collect(), events)
    });
    let services = services
        .map(|(place, handle, service)| {
            let (reports, faults) = service.finish_with_faults();
            (place, handle, reports, faults)
        })
        .into();
    Evidence {
        sights,
        services,
        connections: echoes.iter().flat_map(EchoServer::connections).collect(),
        datagrams: answering.iter().flat_map(DatagramServer::datagrams).collect(),
        events,
        counters: lab.engine().counters().must("read the counters"),
    }
}

impl Stage {
    fn new() -> Self {
        let network = Arc::new(Network::new());
        let lab = Lab::beside(&network);
        let ports = || Will::ALL.into_iter().flat_map(|will| Place::ALL.map(|at| will.port(at)));
        let addresses = |destinations: &[Destination]| -> Vec<SocketAddr> {
            ports()
                .flat_map(|port| destinations.iter().flat_map(move |to| to.addresses(port)))
                .collect()
        };
        let hosts = [
            (&network.topology.client, addresses(&[Destination::Loopback, Destination::Local])),
            (&network.topology.destination, addresses(&[Destination::OtherHost])),
        ];
        let echoes = hosts.clone().map(|(host, addresses)| {
            EchoServer::start_in(host, addresses).must("start echo servers")
        });
        let answering = hosts.map(|(host, addresses)| {
            DatagramServer::start_in(host, addresses).must("start datagram servers")
        });
        for place in Place::ALL {
            let ports = Will::ALL.map(|will| will.port(place).into()).to_vec();
            let conditions = Conditions { ports, ..Conditions::default() };
            let context = Some(place.context());
            lab.service_with(place.service(), Plan { conditions, context, ..Plan::default() });
        }
        let services = Place::ALL.map(|place| {
            let path = lab.cgroup_of(place.service()).path().to_owned();
            let (id, level) = Engine::resolve_cgroup(&path).must("resolve a cgroup");
            CgroupCondition { path: path.display().to_string(), id, level }
        });
        let ports = |will: Will| Place::ALL.map(|place| will.port(place).into()).to_vec();
        lab.change(|policy| {
            policy.add_provider("warden", "")?;
            policy.add_sublayer("warden", "warden", 1)?;
            for (will, cgroups) in
                [(Will::BlockAsked, vec![]), (Will::BlockOnward, services.to_vec())]
            {
                policy.add_filter(NewFilter {
                    name: None,
                    sublayer: "warden".into(),
                    weight: Weight::Auto,
                    conditions: Conditions { ports: ports(will), cgroups, ..Conditions::default() },
                    action: FilterAction::BLOCK,
                })?;
            }
            Ok(())
        });
        Self { lab, echoes, answering }
    }
}

/// Carries out cells, one after the other.
struct Worker<'a> {
    cells: &'a [Cell],
    /// A client of each user.
    puppets: [Puppet; 2],
    /// Answers that have not come, of all workers.
    missing: &'a AtomicUsize,
}

impl<'a> Worker<'a> {
    fn new(lab: &Lab, cells: &'a [Cell], missing: &'a AtomicUsize) -> Self {
        let client = &lab.network().topology.client;
        let puppets = User::ALL.map(|user| {
            let id = (user == User::Ordinary).then_some(user.id());
            Puppet::start(client, lab.apps(), id)
        });
        Self { cells, puppets, missing }
    }

    fn work(&self, next: &AtomicUsize) -> Vec<Sight> {
        let mut sights = Vec::new();
        // UDP sockets stay open: a flow that its socket has left cannot be asked about.
        let mut open = Vec::new();
        while let Some(cell) = self.cells.get(next.fetch_add(1, Ordering::Relaxed)) {
            if cell.impossible().is_none() {
                for will in Will::ALL {
                    self.carry_out(cell, will, &mut open, &mut sights);
                }
            }
        }
        // Where no answer can come nothing tells the client that the service has looked at its
        // datagrams; but it looks at them in order, and answers the last.
        for place in Place::ALL {
            for family in [Family::V4, Family::V6] {
                let last = Cell {
                    family,
                    protocol: Protocol::Udp,
                    bind: Bind::Nothing,
                    destination: Destination::OtherHost,
                    place,
                    user: User::Root,
                };
                self.carry_out(&last, Will::Redirect, &mut open, &mut sights);
            }
        }
        sights
    }

    fn carry_out<'s>(
        &'s self,
        cell: &Cell,
        will: Will,
        open: &mut Vec<Hand<'s>>,
        sights: &mut Vec<Sight>,
    ) {
        let number = self.cells.iter().position(|other| other == cell).expect("a known cell");
        let puppet = &self.puppets[cell.user as usize];
        let mut shared = None;
        for to in cell.targets(will) {
            let socket = shared.take().unwrap_or_else(|| prepare(puppet, cell));
            let mut sight = Sight {
                cell: number,
                will,
                to,
                pid: puppet.id(),
                marker: format!("cell {number}, flow {}", sights.len()).into_bytes(),
                begun: Ok(()),
                local: Err(Errno(0)),
                peer: Err(Errno(0)),
                answer: None,
            };
            // Somebody is at the destination, and the way there is not blocked.
            let answered = will == Will::Redirect && cell.destination != Destination::Nobody;
            match cell.protocol {
                Protocol::Tcp => connection(&socket, &mut sight),
                _ => self.datagram(&socket, cell.protocol, answered, &mut sight),
            }
            sights.push(sight);
            match cell.protocol {
                Protocol::Tcp => {}
                Protocol::ConnectedUdp => open.push(socket),
                // One socket talks to both of its destinations.
                Protocol::Udp => shared = Some(socket),
            }
        }
        open.extend(shared);
    }

    /// One datagram, and its answer.
    fn datagram(&self, socket: &Hand<'_>, protocol: Protocol, answered: bool, sight: &mut Sight) {
        let connected = protocol == Protocol::ConnectedUdp;
        sight.begun = if connected {
            socket.connect(sight.to)
        } else {
            socket.send_to(sight.to, &sight.marker)
        };
        if sight.begun.is_err() {
            return;
        }
        sight.local = socket.local();
        sight.peer = socket.peer();
        if connected && let Err(errno) = socket.send(&sight.marker) {
            sight.answer = Some(Err(errno));
            return;
        }
        if answered {
            let many = self.missing.load(Ordering::Relaxed) >= MANY;
            let limit = if many { IMPATIENT } else { PATIENT };
            socket.receive_within(limit).must("limit the wait for an answer");
            let answer = socket.receive_by(Receiving::From);
            if answer.is_err() {
                self.missing.fetch_add(1, Ordering::Relaxed);
            }
            sight.answer = Some(answer);
        }
    }
}

/// A socket as the cell wants it.
fn prepare<'a>(puppet: &'a Puppet, cell: &Cell) -> Hand<'a> {
    let kind = if cell.protocol == Protocol::Tcp { Kind::Tcp } else { Kind::Udp };
    let socket = puppet.open(cell.socket(), kind).must("open a socket");
    if cell.family != Family::V4 {
        socket.only_v6(cell.family == Family::V6).must("set IPV6_V6ONLY");
    }
    if let Some(own) = cell.own_address() {
        socket.bind(own).must("bind a socket");
    }
    socket
}

/// One connection: a few bytes there and back.
fn connection(socket: &Hand<'_>, sight: &mut Sight) {
    sight.begun = socket.connect(sight.to);
    if sight.begun.is_err() {
        return;
    }
    sight.local = socket.local();
    sight.peer = socket.peer();
    let answer = socket
        .send(&sight.marker)
        .and_then(|()| socket.end_sending())
        .and_then(|()| socket.receive(sight.marker.len()));
    sight.answer = Some(answer.map(|bytes| (bytes, None)));
}

/// What is to come back to a client.
pub(crate) fn expected_answer(protocol: Protocol, to: SocketAddr, marker: &[u8]) -> Vec<u8> {
    if protocol == Protocol::Tcp {
        return marker.to_vec();
    }
    answer_of(SocketAddr::new(to.ip().to_canonical(), to.port()), marker)
}

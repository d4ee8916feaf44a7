//! A service or a client is killed at each step of the protocol.
//!
//! Afterwards nothing of its flow is left in the kernel, new flows are decided at once as the failure
//! policy says, the flows of other services go on, and a new process takes the dead one's place.

use std::{
    net::{Ipv4Addr, SocketAddr},
    panic,
    time::Duration,
};

use carnet_core::{
    abi,
    object::{Conditions, FailurePolicy},
};
use carnet_testbed::EchoServer;
use carnet_tests::{
    Must as _, Plan, Running,
    puppet::{Hand, Puppet},
};

use crate::{
    row::Row,
    stage::{Protocol, Stage},
};

/// What a flow is to send.
const WORD: &[u8] = b"word";

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Service,
    Client,
}

/// The steps, in their order. The victim is killed after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The service has a socket that it has not registered.
    Bound,
    Registered,
    /// The client has connected, or sent its first datagram.
    Begun,
    /// The service has accepted the connection, or received the datagram.
    Accepted,
    /// It has asked for the record.
    Asked,
    /// It has set the record on the socket for the connection onwards.
    Set,
    /// It has connected onwards, or sent the datagram onwards.
    Onward,
    /// The first bytes have gone there and back.
    Relayed,
}

impl Step {
    const ALL: [Self; 8] = [
        Self::Bound,
        Self::Registered,
        Self::Begun,
        Self::Accepted,
        Self::Asked,
        Self::Set,
        Self::Onward,
        Self::Relayed,
    ];

    /// Those at which there is a flow.
    fn has_flow(self) -> bool {
        !matches!(self, Self::Bound | Self::Registered)
    }
}

/// The words of a test's failure.
type Walk = Result<(), String>;

/// One flow through a service that is a puppet, step by step.
struct Walker<'a> {
    stage: &'a Stage,
    service: &'a Puppet,
    client: &'a Puppet,
    last: Step,
}

impl<'a> Walker<'a> {
    /// Goes on to the last step. What the flow has is kept open: it goes with its process.
    fn walk(&self, protocol: Protocol) -> Result<Option<Hand<'a>>, String> {
        let said = |what: &'static str| move |error| format!("{what}: {error}");
        let loopback = (Ipv4Addr::LOCALHOST, 0).into();
        let listener = match protocol {
            Protocol::Tcp => self.service.listen(loopback),
            Protocol::Udp => {
                let socket = self.service.udp(loopback);
                socket.bind(loopback).must("bind");
                socket
            }
        };
        let listener = keep(listener);
        if self.last == Step::Bound {
            return Ok(None);
        }
        listener.register(&[]).map_err(said("register"))?;
        if self.last == Step::Registered {
            return Ok(None);
        }
        let to = self.destination(protocol);
        let client = match protocol {
            Protocol::Tcp => self.client.connect(to).map_err(said("connect"))?,
            Protocol::Udp => {
                let socket = self.client.udp(to);
                socket.send_to(to, WORD).map_err(said("send"))?;
                socket
            }
        };
        client.receive_within(Duration::from_secs(20)).must("limit the wait");
        self.serve(protocol, listener, &client, to)?;
        Ok(Some(client))
    }

    fn destination(&self, protocol: Protocol) -> SocketAddr {
        match protocol {
            Protocol::Tcp => self.stage.lab.v4(),
            Protocol::Udp => self.stage.datagrams.address(),
        }
    }

    /// The service's part.
    fn serve(
        &self,
        protocol: Protocol,
        listener: &Hand<'a>,
        client: &Hand<'a>,
        to: SocketAddr,
    ) -> Walk {
        let said = |what: &'static str| move |error| format!("{what}: {error}");
        if self.last == Step::Begun {
            return Ok(());
        }
        // A socket that knows of the flow, and where its datagrams come from.
        let (flow, source) = match protocol {
            Protocol::Tcp => (listener.accept().map_err(said("accept"))?, None),
            Protocol::Udp => {
                let (_, source) = listener.receive_from().map_err(said("receive"))?;
                if self.last == Step::Accepted {
                    return Ok(());
                }
                let asking = self.service.udp(to);
                asking.connect(source).map_err(said("connect to ask"))?;
                (asking, Some(source))
            }
        };
        let flow = keep(flow);
        if self.last == Step::Accepted {
            return Ok(());
        }
        let record = flow.query(abi::QUERY_REDIRECT_RECORDS).map_err(said("ask"))?;
        if self.last == Step::Asked {
            return Ok(());
        }
        let onward = keep(match protocol {
            Protocol::Tcp => self.service.tcp(to),
            Protocol::Udp => self.service.udp(to),
        });
        onward.set_record(&record).map_err(said("set the record"))?;
        if self.last == Step::Set {
            return Ok(());
        }
        onward.connect(to).map_err(said("connect onwards"))?;
        if protocol == Protocol::Udp {
            onward.send(WORD).map_err(said("send onwards"))?;
        }
        if self.last == Step::Onward {
            return Ok(());
        }
        match source {
            None => {
                client.send(WORD).map_err(said("send"))?;
                let bytes = flow.receive(WORD.len()).map_err(said("receive"))?;
                onward.send(&bytes).map_err(said("send onwards"))?;
                let bytes = onward.receive(WORD.len()).map_err(said("receive back"))?;
                flow.send(&bytes).map_err(said("send back"))?;
                client.receive(WORD.len()).map_err(said("get an answer"))?;
            }
            Some(source) => {
                let (answer, _) = onward.receive_from().map_err(said("receive back"))?;
                listener.send_to(source, &answer).map_err(said("send back"))?;
                let (_, from) = client.receive_from().map_err(said("get an answer"))?;
                if from != to {
                    return Err(format!("an answer from {from} instead of {to}"));
                }
            }
        }
        Ok(())
    }
}

/// A socket that is not closed when it is dropped, but with its process.
fn keep(hand: Hand<'_>) -> &Hand<'_> {
    Box::leak(Box::new(hand))
}

/// A flow through bravo alone, which is to go on whatever happens.
struct Bystander<'a>(Hand<'a>);

impl<'a> Bystander<'a> {
    fn new(client: &'a Puppet, to: SocketAddr) -> Self {
        let connection = client.connect(to).must("connect through the other service");
        connection.receive_within(Duration::from_secs(20)).must("limit the wait");
        Self(connection)
    }

    fn goes_on(&self, row: &mut Row, when: &str) {
        let echoed = self.0.send(WORD).and_then(|()| self.0.receive(WORD.len()));
        match echoed {
            Ok(word) if word == WORD => row.flow(),
            other => row.lost(format!("{when}: the other service's flow: {other:?}")),
        }
    }
}

/// Alpha takes what goes to the lab's servers, and bravo everything.
fn stage(on_failure: FailurePolicy) -> (Stage, EchoServer) {
    let stage = Stage::new();
    let beside = stage.lab.network().another_echo();
    let ports = [stage.lab.v4().port(), stage.datagrams.address().port()];
    let ports = ports.map(Into::into).to_vec();
    let conditions = Conditions { ports, ..Conditions::default() };
    stage.lab.service_with("alpha", Plan { weight: 10, on_failure, conditions, ..Plan::default() });
    stage.lab.service("bravo", 5);
    stage.start("bravo");
    (stage, beside)
}

fn killed(victim: Victim, on_failure: FailurePolicy, protocol: Protocol) {
    let (stage, beside) = stage(on_failure);
    let name =
        format!("{victim:?}, {protocol:?}, {on_failure}: killed at each step").to_lowercase();
    let mut row = Row::new("process killed", name);
    let other = stage.lab.puppet();
    for step in Step::ALL.into_iter().filter(|step| victim == Victim::Service || step.has_flow()) {
        row.try_one();
        let when = format!("{victim:?} killed after {step:?}");
        let bystander = Bystander::new(&other, beside.address());
        let (service, client) = (stage.lab.puppet_of("alpha"), stage.lab.puppet());
        let walker = Walker { stage: &stage, service: &service, client: &client, last: step };
        let flow = match walker.walk(protocol) {
            Ok(flow) => flow,
            Err(what) => {
                row.lost(format!("{when}: before that, {what}"));
                continue;
            }
        };
        match victim {
            Victim::Service => service.kill(),
            Victim::Client => client.kill(),
        }
        bystander.goes_on(&mut row, &when);
        if victim == Victim::Service {
            ends(&mut row, protocol, flow.as_ref(), &when);
            decided(&stage, &mut row, on_failure, protocol, &when);
            stage.start("alpha");
            stage.expect(&mut row, &["alpha", "bravo"], &format!("{when}, started anew"));
            stage.forget("alpha");
        }
        // The puppets' ends take all sockets along.
        drop(bystander);
        std::mem::forget(flow);
        service.kill();
        client.kill();
        settles(&stage, &mut row, &when);
    }
    row.conclude();
}

/// A client of a service that is gone does not wait for ever.
fn ends(row: &mut Row, protocol: Protocol, flow: Option<&Hand<'_>>, when: &str) {
    let (Some(flow), Protocol::Tcp) = (flow, protocol) else { return };
    match flow.receive(1) {
        Ok(bytes) if bytes.is_empty() => row.came("connection ended"),
        Err(errno) if errno.0 == libc::ECONNRESET => row.came("connection reset"),
        other => row.failed(format!("{when}: the client sees {other:?}")),
    }
}

/// A new flow, while there is no service.
fn decided(stage: &Stage, row: &mut Row, failure: FailurePolicy, protocol: Protocol, when: &str) {
    match (failure, stage.way(protocol)) {
        (FailurePolicy::Skip, Ok(way)) if way == ["bravo"] => {
            row.flow();
            row.came("next flow skips it");
        }
        (FailurePolicy::Block, Err(what)) if what.contains("Connection refused") => {
            row.came("next flow refused");
        }
        (_, Ok(way)) => row.uninspected(format!("{when}: the next flow went through {way:?}")),
        (_, Err(what)) => row.lost(format!("{when}: the next flow: {what}")),
    }
}

/// Nothing is left of any flow, but for the sockets that the other service has onwards: it keeps those
/// of UDP for as long as it lives.
fn settles(stage: &Stage, row: &mut Row, when: &str) {
    let alive: Vec<u32> = stage.services().values().map(Running::id).collect();
    let settle = || stage.lab.settle_but_for(&alive);
    let settled = panic::catch_unwind(panic::AssertUnwindSafe(settle));
    row.check(settled.is_ok(), || format!("{when}: something of its flow is left"));
}

macro_rules! killed {
    ($($name:ident: $victim:ident, $failure:ident, $protocol:ident;)*) => {$(
        #[test]
        fn $name() {
            killed(Victim::$victim, FailurePolicy::$failure, Protocol::$protocol);
        }
    )*};
}

killed! {
    service_tcp_block: Service, Block, Tcp;
    service_tcp_skip: Service, Skip, Tcp;
    service_udp_block: Service, Block, Udp;
    service_udp_skip: Service, Skip, Udp;
    client_tcp: Client, Block, Tcp;
    client_udp: Client, Block, Udp;
}

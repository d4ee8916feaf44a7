//! UDP flows from end to end, without an engine: a source of the test's own tells where they were
//! going, and the address of each client's socket stands for its flow.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use carnet::{Error, Operation};
use carnet_inspect::config;
use carnet_inspect::log::{Format, Log, Writer};
use carnet_inspect::origin::{App, FlowId, FlowSource, Origin, Route};
use carnet_inspect::service::{Control, DatagramLimits, Options, Service};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, ErrorKind, PipeReader, Read};
use std::net::{SocketAddr, UdpSocket as StdUdpSocket};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);
/// An idle time that a test waits for.
const BRIEF: Duration = Duration::from_millis(300);

/// Tells where the flows of these peers were going. Others were not redirected. The number of a flow
/// is the port that it goes to.
#[derive(Default)]
struct Told {
    flows: Mutex<HashMap<SocketAddr, SocketAddr>>,
    /// Where a next service takes what goes to a destination, if there is one.
    next: Mutex<HashMap<SocketAddr, SocketAddr>>,
}

impl FlowSource for Told {
    fn origin(&self, _: &TcpStream) -> Result<Origin, Error> {
        Err(Error::NotRedirected { operation: Operation::OriginalDestination })
    }

    fn datagram_origin(&self, peer: SocketAddr) -> Result<Origin, Error> {
        let operation = Operation::OriginalDestination;
        let destination =
            *self.flows.lock().unwrap().get(&peer).ok_or(Error::NotRedirected { operation })?;
        let next = self.next.lock().unwrap().get(&destination).copied().unwrap_or(destination);
        Ok(Origin {
            destination,
            app: Some(App {
                pid: 4242,
                uid: 1000,
                executable: Some("/usr/bin/dig".into()),
                command: "dig".into(),
            }),
            flow: Some(FlowId { id: destination.port().into(), hops: 1 }),
            route: Route::Plain(next),
        })
    }

    fn is_current(&self, peer: SocketAddr, flow: FlowId) -> bool {
        let told = self.flows.lock().unwrap();
        told.get(&peer).is_some_and(|destination| u64::from(destination.port()) == flow.id)
    }
}

/// A running service and its log.
struct Bed {
    address: SocketAddr,
    source: Arc<Told>,
    control: Control,
    running: JoinHandle<io::Result<()>>,
    lines: BufReader<PipeReader>,
    writer: Writer,
}

impl Bed {
    async fn new(rules: &str) -> Self {
        Self::with(rules, options()).await
    }

    async fn with(rules: &str, options: Options) -> Self {
        let (lines, target) = io::pipe().unwrap();
        let (log, writer) = Log::start(Format::Json, target).unwrap();
        let source = Arc::new(Told::default());
        let rules = config::parse(rules).unwrap();
        let service = Service::new(options, Arc::<Told>::clone(&source), rules, log);
        let control = service.control();
        let socket = StdUdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let running = tokio::spawn(service.run(vec![], vec![socket], || ready.send(()).unwrap()));
        is_ready.await.unwrap();
        Self { address, source, control, running, lines: BufReader::new(lines), writer }
    }

    /// A client whose datagrams go to `destination`.
    async fn client(&self, destination: SocketAddr) -> UdpSocket {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(self.address).await.unwrap();
        let peer = client.local_addr().unwrap();
        self.source.flows.lock().unwrap().insert(peer, destination);
        client
    }

    /// A client, and the server that its datagrams go to.
    async fn pair(&self) -> (UdpSocket, UdpSocket) {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        (self.client(server.local_addr().unwrap()).await, server)
    }

    /// The next line of the log.
    async fn line(&mut self) -> Value {
        // A blocking read, which holds up nobody else: the service has threads of its own.
        tokio::task::block_in_place(|| {
            let mut line = String::new();
            self.lines.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        })
    }

    /// Stops the service. Gives the lines of the log that were not read.
    async fn stop(mut self) -> Vec<Value> {
        self.control.stop();
        timeout(LONG, self.running).await.unwrap().unwrap().unwrap();
        let rest: Vec<_> = self.lines.by_ref().lines().map(Result::unwrap).collect();
        self.writer.finish();
        rest.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn options() -> Options {
    Options {
        name: "test".into(),
        max_connections: NonZeroU32::new(100).unwrap(),
        inspect_timeout: LONG,
        connect_timeout: LONG,
        drain_timeout: LONG,
        datagrams: DatagramLimits { idle: LONG, ..DatagramLimits::default() },
    }
}

fn brief() -> Options {
    Options { datagrams: DatagramLimits { idle: BRIEF, ..DatagramLimits::default() }, ..options() }
}

/// The next datagram, and who sent it.
async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (length, from) = timeout(LONG, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    buffer.truncate(length);
    (buffer, from)
}

/// Sends a datagram to the server and one back.
async fn round(client: &UdpSocket, server: &UdpSocket, up: &[u8], down: &[u8]) {
    client.send(up).await.unwrap();
    let (received, from) = receive(server).await;
    assert!(received == up, "{} bytes of {} up", received.len(), up.len());
    server.send_to(down, from).await.unwrap();
    let (received, _) = receive(client).await;
    assert!(received == down, "{} bytes of {} down", received.len(), down.len());
}

/// A DNS question for the address of `name`.
fn query(name: &str) -> Vec<u8> {
    let labels =
        name.split('.').flat_map(|label| [&[label.len() as u8][..], label.as_bytes()].concat());
    let header = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    header.into_iter().chain(labels).chain([0, 0, 1, 0, 1]).collect()
}

/// The sample of a client's first datagram in RFC 9001, appendix A.2: for example.com.
fn client_initial() -> Vec<u8> {
    let digits = include_str!("client-initial.hex").chars().filter_map(|c| c.to_digit(16));
    let digits: Vec<u8> = digits.map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

const NO_BAD_NAMES: &str = "[[rule]]\nname = \"bad\"\naction = \"refuse\"\nhost = \"*.bad.test\"\n";
const NO_QUIC: &str = "[[rule]]\nname = \"no QUIC\"\naction = \"refuse\"\nprotocol = \"quic\"\n";
const NO_EXAMPLE: &str =
    "[[rule]]\nname = \"example\"\naction = \"refuse\"\nhost = \"example.com\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_are_relayed_as_they_are_and_logged() {
    let mut bed = Bed::with("", brief()).await;
    let (client, server) = bed.pair().await;
    let (mut up, mut down) = (0, 0);
    for (length, answer) in [(5, 1), (0, 0), (1, 1472), (9000, 3), (65_507, 65_507), (0, 7)] {
        round(&client, &server, &vec![7; length], &vec![9; answer]).await;
        (up, down) = (up + length, down + answer);
    }
    // Several at once stay several.
    for n in 0..10 {
        client.send(&[n; 100]).await.unwrap();
    }
    for n in 0..10 {
        assert_eq!(receive(&server).await.0, [n; 100]);
    }
    let line = bed.line().await;
    for (key, expected) in [
        ("service", Value::from("test")),
        ("flow", server.local_addr().unwrap().port().into()),
        ("hops", 1.into()),
        ("pid", 4242.into()),
        ("executable", "/usr/bin/dig".into()),
        ("transport", "udp".into()),
        ("client", client.local_addr().unwrap().to_string().into()),
        ("destination", server.local_addr().unwrap().to_string().into()),
        ("protocol", "unknown".into()),
        ("verdict", "allow".into()),
        ("bytes_up", (up + 1000).into()),
        ("bytes_down", down.into()),
        ("ended", Value::Null),
    ] {
        assert_eq!(line[key], expected, "{key} in {line}");
    }
    let counted: Value = serde_json::json!({ "up": 16, "down": 6, "refused": 0, "lost": 0 });
    assert_eq!(line["datagrams"], counted);
    assert!(line["seconds"].as_f64().unwrap() >= BRIEF.as_secs_f64(), "{line}");
    assert_eq!(bed.stop().await, Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_can_come_from_the_first_datagram_on_and_unasked() {
    let bed = Bed::new("").await;
    let (client, server) = bed.pair().await;
    client.send(b"subscribe").await.unwrap();
    let (_, from) = receive(&server).await;
    for n in 0..50 {
        server.send_to(&[n], from).await.unwrap();
        assert_eq!(receive(&client).await.0, [n]);
    }
    let lines = bed.stop().await;
    assert_eq!(
        (&lines[0]["datagrams"]["up"], &lines[0]["datagrams"]["down"]),
        (&1.into(), &50.into())
    );
    assert_eq!(lines[0]["ended"], "the service was stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_do_not_cross() {
    const CLIENTS: usize = 60;
    const ROUNDS: usize = 20;
    let bed = Bed::new(NO_BAD_NAMES).await;
    let mut servers = Vec::new();
    let mut serving = Vec::new();
    for name in 0..3_u8 {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        servers.push(server.local_addr().unwrap());
        serving.push(tokio::spawn(async move {
            loop {
                let (datagram, from) = receive(&server).await;
                server.send_to(&[&[name][..], &datagram].concat(), from).await.unwrap();
            }
        }));
    }
    let mut clients = Vec::new();
    for id in 0..CLIENTS {
        let server = id % servers.len();
        let client = bed.client(servers[server]).await;
        clients.push(tokio::spawn(async move {
            for n in 0..ROUNDS {
                let asked = format!("client {id} asks {n}");
                client.send(asked.as_bytes()).await.unwrap();
                let (answer, _) = receive(&client).await;
                assert_eq!(answer, [&[server as u8][..], asked.as_bytes()].concat());
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    serving.iter().for_each(JoinHandle::abort);
    let lines = bed.stop().await;
    assert_eq!(lines.len(), CLIENTS);
    for line in lines {
        let counted = &line["datagrams"];
        assert_eq!((&counted["up"], &counted["down"]), (&ROUNDS.into(), &ROUNDS.into()), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_is_refused_is_answered_and_others_go_on() {
    let bed = Bed::new(NO_BAD_NAMES).await;
    let (client, server) = bed.pair().await;
    round(&client, &server, &query("good.test"), b"an address").await;
    client.send(&query("www.bad.test")).await.unwrap();
    let (answer, from) = receive(&client).await;
    assert_eq!(from, bed.address);
    assert_eq!(answer[..4], [0x12, 0x34, 0x81, 5]);
    // The next thing that the server gets is the next question that is not refused.
    round(&client, &server, &query("other.test"), b"another").await;
    let lines = bed.stop().await;
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    assert_eq!((&line["verdict"], &line["rule"]), (&"refuse".into(), &"bad".into()));
    assert_eq!((&line["protocol"], &line["host"]), (&"dns".into(), &"www.bad.test".into()));
    assert_eq!(line["question"], "www.bad.test A");
    assert_eq!(
        line["datagrams"],
        serde_json::json!({ "up": 2, "down": 2, "refused": 1, "lost": 0 })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_can_be_refused_outright_and_by_name() {
    for (rules, rule) in [(NO_QUIC, "no QUIC"), (NO_EXAMPLE, "example")] {
        let bed = Bed::new(rules).await;
        let (client, server) = bed.pair().await;
        client.send(&client_initial()).await.unwrap();
        // A server's Initial packet of version 1; unit tests read it.
        let (answer, _) = receive(&client).await;
        assert_eq!((answer[0] & 0xf0, &answer[1..5]), (0xc0, &[0, 0, 0, 1][..]));
        // What follows does not pass either; a client without QUIC does.
        client.send(b"\x40 the next packet").await.unwrap();
        let other = bed.client(server.local_addr().unwrap()).await;
        round(&other, &server, b"something else", b"an answer").await;
        let mut lines = bed.stop().await;
        lines.retain(|line| line["protocol"] == "quic");
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!((&line["verdict"], &line["rule"]), (&"refuse".into(), &rule.into()));
        assert_eq!((&line["host"], &line["alpn"][0]), (&"example.com".into(), &"alpn".into()));
        assert_eq!(line["bytes_up"], 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_passes_and_its_name_is_logged() {
    for rules in ["", NO_BAD_NAMES] {
        let bed = Bed::new(rules).await;
        let (client, server) = bed.pair().await;
        round(&client, &server, &client_initial(), b"hello").await;
        round(&client, &server, b"\x40 the next packet", b"and the next").await;
        let lines = bed.stop().await;
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!((&line["protocol"], &line["host"]), (&"quic".into(), &"example.com".into()));
        assert_eq!(line["verdict"], "allow");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_refused_gets_nothing() {
    let mut bed = Bed::with("default = \"refuse\"", brief()).await;
    let (client, server) = bed.pair().await;
    client.send(b"something").await.unwrap();
    client.send(&query("good.test")).await.unwrap();
    // Only the question has an answer.
    assert_eq!(receive(&client).await.0[3], 5);
    let line = bed.line().await;
    assert_eq!((&line["verdict"], &line["question"]), (&"refuse".into(), &"good.test A".into()));
    assert_eq!(line["datagrams"]["refused"], 2);
    assert_eq!(server.try_recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(bed.stop().await, Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_not_redirected_gets_nothing() {
    let bed = Bed::new("").await;
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    stranger.send_to(&query("good.test"), bed.address).await.unwrap();
    let (client, server) = bed.pair().await;
    round(&client, &server, b"something", b"an answer").await;
    assert_eq!(stranger.try_recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    // Its address may be that of a flow later.
    let told = (stranger.local_addr().unwrap(), server.local_addr().unwrap());
    bed.source.flows.lock().unwrap().extend([told]);
    stranger.connect(bed.address).await.unwrap();
    round(&stranger, &server, b"something", b"an answer").await;
    let lines = bed.stop().await;
    assert_eq!(lines.len(), 3);
    let line = lines.iter().find(|line| line["destination"].is_null()).unwrap();
    assert_eq!(line["verdict"], "refuse");
    assert!(line["ended"].as_str().unwrap().contains("not redirected"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_without_a_server_is_told_in_the_log() {
    let mut bed = Bed::with("", brief()).await;
    let (client, server) = bed.pair().await;
    let destination = server.local_addr().unwrap();
    drop(server);
    for _ in 0..3 {
        client.send(b"is somebody there?").await.unwrap();
    }
    // Datagrams are taken in order: after this, those before have been sent.
    let (other, other_server) = bed.pair().await;
    round(&other, &other_server, b"a question", b"an answer").await;
    // The flow does not suffer from it when there is somebody later.
    let server = UdpSocket::bind(destination).await.unwrap();
    round(&client, &server, b"now?", b"yes").await;
    let mut lines = [bed.line().await, bed.line().await];
    lines.sort_by_key(|line| line["destination"] != destination.to_string());
    assert_eq!(lines[0]["verdict"], "allow");
    assert_eq!(lines[0]["ended"], "refused by the destination");
    assert_eq!(lines[0]["datagrams"]["down"], 1);
    assert_eq!(lines[1]["ended"], Value::Null);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_whose_next_service_is_replaced_begins_anew() {
    let mut bed = Bed::new("").await;
    let (client, server) = bed.pair().await;
    round(&client, &server, b"first", b"answer").await;
    let destination = server.local_addr().unwrap();
    drop(server);
    // Another process of it, which listens elsewhere.
    let next = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    bed.source.next.lock().unwrap().insert(destination, next.local_addr().unwrap());
    // A young flow stays for a moment. Its client never falls silent.
    let again = async {
        loop {
            client.send(b"again").await.unwrap();
            let mut buffer = [0; 5];
            let received = next.recv_from(&mut buffer);
            if let Ok(received) = timeout(Duration::from_millis(20), received).await {
                return received.unwrap().1;
            }
        }
    };
    let onward = timeout(LONG, again).await.unwrap();
    next.send_to(b"from here", onward).await.unwrap();
    assert_eq!(receive(&client).await.0, b"from here");
    let line = bed.line().await;
    assert_eq!(line["destination"], destination.to_string());
    assert_eq!(line["ended"], "refused by the destination");
    assert_eq!(bed.stop().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_cannot_be_reached_is_told_in_the_log() {
    let bed = Bed::new("").await;
    // Nobody may send there without asking for it.
    let client = bed.client("255.255.255.255:9".parse().unwrap()).await;
    let (other, server) = bed.pair().await;
    client.send(b"lost").await.unwrap();
    client.send(b"lost").await.unwrap();
    round(&other, &server, b"not lost", b"indeed").await;
    let lines = bed.stop().await;
    let line = lines.iter().find(|line| line["destination"] == "255.255.255.255:9").unwrap();
    assert!(
        line["ended"].as_str().unwrap().starts_with("connecting to 255.255.255.255:9"),
        "{line}"
    );
    assert_eq!(
        line["datagrams"],
        serde_json::json!({ "up": 0, "down": 0, "refused": 0, "lost": 2 })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_that_was_idle_begins_anew() {
    let mut bed = Bed::with("", brief()).await;
    let (client, server) = bed.pair().await;
    for n in 1..=2 {
        for _ in 0..n {
            round(&client, &server, b"a question", b"an answer").await;
        }
        assert_eq!(bed.line().await["datagrams"]["up"], n);
    }
    assert_eq!(bed.stop().await, Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_another_flow_has_taken_over_is_its() {
    let mut bed = Bed::new("").await;
    let (client, server) = bed.pair().await;
    client.send(b"first").await.unwrap();
    let (_, old_onward) = receive(&server).await;
    // Its address and port go to another destination from now on.
    let other = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (peer, destination) = (client.local_addr().unwrap(), other.local_addr().unwrap());
    bed.source.flows.lock().unwrap().insert(peer, destination);
    server.send_to(b"late", old_onward).await.unwrap();
    let line = bed.line().await;
    assert_eq!(line["destination"], server.local_addr().unwrap().to_string());
    assert_eq!(
        line["datagrams"],
        serde_json::json!({ "up": 1, "down": 0, "refused": 0, "lost": 1 })
    );
    round(&client, &other, b"second", b"answer").await;
    // And back again, told by the client's datagram.
    bed.source.flows.lock().unwrap().insert(peer, server.local_addr().unwrap());
    round(&client, &server, b"third", b"answer").await;
    let line = bed.line().await;
    assert_eq!(line["destination"], destination.to_string());
    assert!(line["ended"].as_str().unwrap().contains("connected it elsewhere"), "{line}");
    assert_eq!(bed.stop().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_keep_a_flow_alive() {
    let bed = Bed::with("", brief()).await;
    let (client, server) = bed.pair().await;
    client.send(b"subscribe").await.unwrap();
    let (_, from) = receive(&server).await;
    let mut ticks = tokio::time::interval(BRIEF / 4);
    for n in 0..12 {
        ticks.tick().await;
        server.send_to(&[n], from).await.unwrap();
        assert_eq!(receive(&client).await.0, [n]);
    }
    let lines = bed.stop().await;
    assert_eq!((lines.len(), &lines[0]["datagrams"]["down"]), (1, &12.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn those_idle_for_longest_give_way() {
    let limits = DatagramLimits { flows: NonZeroU32::new(2).unwrap(), idle: LONG };
    let mut bed = Bed::with("", Options { datagrams: limits, ..options() }).await;
    let mut pairs = Vec::new();
    for _ in 0..3 {
        let (client, server) = bed.pair().await;
        // Times are told apart by milliseconds.
        tokio::time::sleep(Duration::from_millis(5)).await;
        round(&client, &server, b"a question", b"an answer").await;
        pairs.push((client, server));
    }
    let line = bed.line().await;
    assert_eq!(line["client"], pairs[0].0.local_addr().unwrap().to_string());
    assert_eq!(line["ended"], "it gave way to another flow");
    for (client, server) in &pairs[1..] {
        round(client, server, b"still there", b"indeed").await;
    }
    assert_eq!(bed.stop().await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_lets_live_flows_end_and_serves_those_that_begin() {
    let mut bed = Bed::with("", brief()).await;
    let (client, server) = bed.pair().await;
    round(&client, &server, b"a question", b"an answer").await;
    bed.control.drain();
    round(&client, &server, b"another", b"another answer").await;
    let (late, late_server) = bed.pair().await;
    round(&late, &late_server, b"me too", b"you too").await;
    assert!(!bed.running.is_finished());
    timeout(LONG, &mut bed.running).await.unwrap().unwrap().unwrap();
    let lines = [bed.line().await, bed.line().await];
    let up = lines.iter().map(|line| line["datagrams"]["up"].as_u64().unwrap());
    assert_eq!(up.sum::<u64>(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_rules_hold_for_new_flows() {
    let bed = Bed::new("").await;
    let (client, server) = bed.pair().await;
    round(&client, &server, b"a question", b"an answer").await;
    bed.control.replace_rules(config::parse("default = \"refuse\"").unwrap());
    let other = bed.client(server.local_addr().unwrap()).await;
    other.send(&query("good.test")).await.unwrap();
    assert_eq!(receive(&other).await.0[3], 5);
    round(&client, &server, b"another", b"answer").await;
    assert_eq!(bed.stop().await.len(), 2);
}

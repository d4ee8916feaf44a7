//! The service from end to end, without an engine: a source of the test's own tells where
//! connections were going.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use carnet::{Error, Operation};
use carnet_inspect::config;
use carnet_inspect::log::{Format, Log, Writer};
use carnet_inspect::origin::{App, FlowId, FlowSource, Origin, Route};
use carnet_inspect::relay::reset_on_close;
use carnet_inspect::service::{Control, DatagramLimits, Options, Service};
use serde_json::Value;
use std::future::Future;
use std::io::{self, BufRead, BufReader, ErrorKind, PipeReader};
use std::net::{SocketAddr, TcpListener as StdListener};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

/// Tells that every connection was going to the same place, or that none was redirected.
struct Fixed(Option<SocketAddr>);

impl FlowSource for Fixed {
    fn origin(&self, _: &TcpStream) -> Result<Origin, Error> {
        let operation = Operation::OriginalDestination;
        let destination = self.0.ok_or(Error::NotRedirected { operation })?;
        Ok(Origin {
            destination,
            app: Some(App {
                pid: 4242,
                uid: 1000,
                executable: Some("/usr/bin/curl".into()),
                command: "curl".into(),
            }),
            flow: Some(FlowId { id: 17, hops: 1 }),
            route: Route::Plain(destination),
        })
    }
}

/// A running service, the destination of its connections, and its log.
struct Bed {
    address: SocketAddr,
    destination: TcpListener,
    control: Control,
    running: JoinHandle<io::Result<()>>,
    lines: BufReader<PipeReader>,
    writer: Writer,
}

impl Bed {
    async fn new(rules: &str) -> Self {
        Self::with(rules, Some(options())).await
    }

    /// Without options: of a service whose connections are not redirected.
    async fn with(rules: &str, options_if_redirected: Option<Options>) -> Self {
        let destination = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = options_if_redirected.is_some().then(|| destination.local_addr().unwrap());
        let (lines, target) = io::pipe().unwrap();
        let (log, writer) = Log::start(Format::Json, target).unwrap();
        let rules = config::parse(rules).unwrap();
        let options = options_if_redirected.unwrap_or_else(options);
        let service = Service::new(options, Arc::new(Fixed(to)), rules, log);
        let control = service.control();
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let running = tokio::spawn(service.run(vec![listener], vec![], || ready.send(()).unwrap()));
        is_ready.await.unwrap();
        Self { address, destination, control, running, lines: BufReader::new(lines), writer }
    }

    async fn client(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A client that expects to be refused at once: the reset can be there before it is connected.
    async fn refused_client(&self) {
        match TcpStream::connect(self.address).await {
            Ok(mut client) => expect_reset(&mut client).await,
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }

    /// A client, and the server that it was connected to.
    async fn pair(&self) -> (TcpStream, TcpStream) {
        let (client, server) = tokio::join!(self.client(), self.destination.accept());
        (client, server.unwrap().0)
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

    /// Ends the service, and checks that there is nothing in the log that was not read.
    async fn end(mut self) {
        self.control.drain();
        timeout(LONG, self.running).await.unwrap().unwrap().unwrap();
        self.writer.finish();
        assert_eq!(self.lines.fill_buf().unwrap(), b"");
    }
}

fn options() -> Options {
    Options {
        name: "test".into(),
        max_connections: NonZeroU32::new(100).unwrap(),
        inspect_timeout: LONG,
        connect_timeout: LONG,
        drain_timeout: LONG,
        datagrams: DatagramLimits::default(),
    }
}

async fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut received = vec![0; bytes.len()];
    timeout(LONG, stream.read_exact(&mut received)).await.unwrap().unwrap();
    assert_eq!(received, bytes);
}

/// Reads up to the end; an error is what ended it.
async fn rest(stream: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = timeout(LONG, stream.read_to_end(&mut bytes)).await.unwrap();
    (bytes, end.err().map(|error| error.kind()))
}

async fn expect_reset(stream: &mut TcpStream) {
    let (bytes, error) = rest(stream).await;
    assert_eq!(bytes, b"");
    match error {
        // Under Wine a socket that was reset reads as one that has ended.
        None if cfg!(windows) => assert!(!resets_arrive().await),
        error => assert_eq!(error, Some(ErrorKind::ConnectionReset)),
    }
}

/// Whether a reset is seen by the other side of a connection that nobody relays.
async fn resets_arrive() -> bool {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    reset_on_close(&accepted);
    drop(accepted);
    rest(&mut client).await.1 == Some(ErrorKind::ConnectionReset)
}

/// A ClientHello that names `host`, in one record.
fn client_hello(host: &str) -> Vec<u8> {
    fn prefixed(width: usize, content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32).to_be_bytes()[4 - width..], content].concat()
    }
    let name = prefixed(2, &[&[0][..], &prefixed(2, host.as_bytes())].concat());
    let extensions = prefixed(2, &[&[0, 0][..], &prefixed(2, &name)].concat());
    let body = [&[3, 3][..], &[9; 32], &[0, 0, 2, 0x13, 1, 1, 0], &extensions].concat();
    [&[22, 3, 1][..], &prefixed(2, &[&[1][..], &prefixed(3, &body)].concat())].concat()
}

const REQUEST: &[u8] = b"GET /page HTTP/1.1\r\nHost: www.bad.test\r\nAccept: */*\r\n\r\n";
const NO_BAD_HOSTS: &str =
    "http-response = true\n[[rule]]\nname = \"bad\"\naction = \"refuse\"\nhost = \"*.bad.test\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_is_relayed_and_logged() {
    let mut bed = Bed::new("").await;
    let (mut client, mut server) = bed.pair().await;
    client.write_all(REQUEST).await.unwrap();
    expect(&mut server, REQUEST).await;
    server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    drop(server);
    assert_eq!(rest(&mut client).await.0.len(), 27);
    drop(client);
    let line = bed.line().await;
    for (key, expected) in [
        ("service", Value::from("test")),
        ("flow", 17.into()),
        ("hops", 1.into()),
        ("pid", 4242.into()),
        ("uid", 1000.into()),
        ("executable", "/usr/bin/curl".into()),
        ("destination", bed.destination.local_addr().unwrap().to_string().into()),
        ("protocol", "http".into()),
        ("host", "www.bad.test".into()),
        ("request", "GET /page HTTP/1.1".into()),
        ("verdict", "allow".into()),
        ("rule", Value::Null),
        ("bytes_up", REQUEST.len().into()),
        ("bytes_down", 27.into()),
        ("ended", Value::Null),
    ] {
        assert_eq!(line[key], expected, "{key} in {line}");
    }
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_speak_first() {
    // Also while rules about hosts are there, which hold the client's bytes back.
    for rules in ["", NO_BAD_HOSTS] {
        let mut bed = Bed::new(rules).await;
        let (mut client, mut server) = bed.pair().await;
        server.write_all(b"220 mail.test ESMTP\r\n").await.unwrap();
        expect(&mut client, b"220 mail.test ESMTP\r\n").await;
        client.write_all(b"EHLO client.test\r\n").await.unwrap();
        expect(&mut server, b"EHLO client.test\r\n").await;
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut server).await, (vec![], None));
        server.write_all(b"221 bye\r\n").await.unwrap();
        drop(server);
        assert_eq!(rest(&mut client).await, (b"221 bye\r\n".to_vec(), None));
        let line = bed.line().await;
        assert_eq!((&line["protocol"], &line["verdict"]), (&"unknown".into(), &"allow".into()));
        bed.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_hello_in_pieces_is_held_until_it_is_decided() {
    let mut bed = Bed::new(NO_BAD_HOSTS).await;
    let hello = client_hello("good.test");
    let (mut client, mut server) = bed.pair().await;
    client.set_nodelay(true).unwrap();
    let (first, second) = hello.split_at(20);
    client.write_all(first).await.unwrap();
    // The server's word that arrives after the first piece shows that nothing was let through:
    // what was sent on would be there before it was asked for the second one.
    server.write_all(b"!").await.unwrap();
    expect(&mut client, b"!").await;
    assert_eq!(server.try_read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
    client.write_all(second).await.unwrap();
    client.write_all(b"and more").await.unwrap();
    expect(&mut server, &[&hello[..], b"and more"].concat()).await;
    drop((client, server));
    let line = bed.line().await;
    assert_eq!((&line["protocol"], &line["host"]), (&"tls".into(), &"good.test".into()));
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_http_gets_a_response_and_the_server_nothing() {
    let mut bed = Bed::new(NO_BAD_HOSTS).await;
    let (mut client, mut server) = bed.pair().await;
    client.write_all(REQUEST).await.unwrap();
    client.write_all(b"a body that nobody reads").await.unwrap();
    let (response, error) = rest(&mut client).await;
    assert!(response.starts_with(b"HTTP/1.1 403 Forbidden\r\n"), "{response:?}");
    assert_eq!(error, None);
    expect_reset(&mut server).await;
    drop(client);
    let line = bed.line().await;
    assert_eq!((&line["verdict"], &line["rule"]), (&"refuse".into(), &"bad".into()));
    assert_eq!((&line["bytes_up"], &line["host"]), (&0.into(), &"www.bad.test".into()));
    assert_eq!(line["ended"], "answered 403");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_tls_is_reset() {
    let mut bed = Bed::new(NO_BAD_HOSTS).await;
    let (mut client, mut server) = bed.pair().await;
    client.write_all(&client_hello("www.bad.test")).await.unwrap();
    expect_reset(&mut client).await;
    expect_reset(&mut server).await;
    let line = bed.line().await;
    assert_eq!((&line["verdict"], &line["bytes_up"]), (&"refuse".into(), &0.into()));
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_refused_is_not_connected_to() {
    let mut bed = Bed::new("[[rule]]\naction = \"refuse\"\nexecutable = \"/usr/bin/c*\"\n").await;
    bed.refused_client().await;
    let line = bed.line().await;
    assert_eq!((&line["verdict"], &line["rule"]), (&"refuse".into(), &"rule 1".into()));
    // The service is done with it, and nobody has come.
    let accepted = now(bed.destination.accept()).await;
    assert!(accepted.is_none());
    bed.end().await;
}

/// What a future gives without waiting.
async fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        value = future => Some(value),
        () = async {} => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_recognised_in_time_goes_on_as_unknown() {
    let options = Options { inspect_timeout: Duration::from_millis(50), ..options() };
    let mut bed = Bed::with(NO_BAD_HOSTS, Some(options)).await;
    let (mut client, mut server) = bed.pair().await;
    client.write_all(b"GET /half-a-requ").await.unwrap();
    expect(&mut server, b"GET /half-a-requ").await;
    client.write_all(b"est").await.unwrap();
    drop(client);
    assert_eq!(rest(&mut server).await, (b"est".to_vec(), None));
    drop(server);
    assert_eq!(bed.line().await["protocol"], "unknown");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_bytes_of_a_client_that_ends_are_delivered() {
    let mut bed = Bed::new(NO_BAD_HOSTS).await;
    let (mut client, mut server) = bed.pair().await;
    client.write_all(b"GET /never-comp").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut server).await, (b"GET /never-comp".to_vec(), None));
    server.write_all(b"what?").await.unwrap();
    drop(server);
    assert_eq!(rest(&mut client).await, (b"what?".to_vec(), None));
    assert_eq!(bed.line().await["bytes_down"], 5);
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_was_not_redirected_is_refused() {
    let mut bed = Bed::with("", None).await;
    bed.refused_client().await;
    let line = bed.line().await;
    assert_eq!((&line["verdict"], &line["destination"]), (&"refuse".into(), &Value::Null));
    assert!(line["ended"].as_str().unwrap().contains("was not redirected"), "{line}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_cannot_be_reached_is_told_by_a_reset() {
    let mut bed = Bed::new("").await;
    // Nobody listens there any more.
    bed.destination = TcpListener::bind("127.0.0.1:0").await.unwrap();
    bed.refused_client().await;
    let line = bed.line().await;
    assert_eq!(line["verdict"], "allow");
    assert!(line["ended"].as_str().unwrap().starts_with("connecting to 127.0.0.1:"), "{line}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(windows, ignore = "under Wine a reset reads as an end")]
async fn a_reset_reaches_the_other_side() {
    let mut bed = Bed::new("").await;
    for client_resets in [true, false] {
        let (client, server) = bed.pair().await;
        let (mut broken, mut other) =
            if client_resets { (client, server) } else { (server, client) };
        broken.write_all(b"hello").await.unwrap();
        expect(&mut other, b"hello").await;
        reset_on_close(&broken);
        drop(broken);
        expect_reset(&mut other).await;
        let side = if client_resets { "client" } else { "server" };
        assert_eq!(bed.line().await["ended"], format!("reset by the {side}"));
    }
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_lets_live_flows_end() {
    let mut bed = Bed::new("").await;
    let (mut client, mut server) = bed.pair().await;
    // Those who still come before the listener is closed are served, or reset if nobody accepts them
    // any more.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let destination = std::mem::replace(&mut bed.destination, nobody);
    let at_the_destination = tokio::spawn(async move {
        while let Ok(accepted) = destination.accept().await {
            drop(accepted);
        }
    });
    bed.control.drain();
    let refused = async {
        while let Ok(late) = TcpStream::connect(bed.address).await {
            drop(late);
        }
    };
    timeout(LONG, refused).await.unwrap();
    client.write_all(b"still here").await.unwrap();
    expect(&mut server, b"still here").await;
    assert!(!bed.running.is_finished());
    drop((client, server));
    loop {
        if bed.line().await["bytes_up"] == 10 {
            break;
        }
    }
    timeout(LONG, &mut bed.running).await.unwrap().unwrap().unwrap();
    at_the_destination.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_ends_live_flows_and_logs_them() {
    let mut bed = Bed::new("").await;
    let (mut client, mut server) = bed.pair().await;
    client.write_all(b"hello").await.unwrap();
    expect(&mut server, b"hello").await;
    bed.control.drain();
    bed.control.stop();
    expect_reset(&mut client).await;
    let line = bed.line().await;
    assert_eq!((&line["ended"], &line["bytes_up"]), (&"the service was stopped".into(), &5.into()));
    timeout(LONG, bed.running).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_drain_has_a_time_limit() {
    let options = Options { drain_timeout: Duration::from_millis(50), ..options() };
    let mut bed = Bed::with("", Some(options)).await;
    let (mut client, _server) = bed.pair().await;
    bed.control.drain();
    expect_reset(&mut client).await;
    assert_eq!(bed.line().await["ended"], "the service was stopped");
    timeout(LONG, bed.running).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_connections_than_allowed_wait_for_their_turn() {
    let options = Options { max_connections: NonZeroU32::MIN, ..options() };
    let mut bed = Bed::with("", Some(options)).await;
    let (mut first, mut first_server) = bed.pair().await;
    let mut second = bed.client().await;
    second.write_all(b"me too").await.unwrap();
    // The first is served all the while.
    first.write_all(b"one").await.unwrap();
    expect(&mut first_server, b"one").await;
    assert!(now(bed.destination.accept()).await.is_none());
    drop((first, first_server));
    let (mut server, _) = timeout(LONG, bed.destination.accept()).await.unwrap().unwrap();
    expect(&mut server, b"me too").await;
    drop((second, server));
    assert_eq!(bed.line().await["bytes_up"], 3);
    assert_eq!(bed.line().await["bytes_up"], 6);
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_rules_hold_for_new_connections() {
    let mut bed = Bed::new("").await;
    let (mut client, mut server) = bed.pair().await;
    bed.control.replace_rules(config::parse("default = \"refuse\"").unwrap());
    bed.refused_client().await;
    assert_eq!(bed.line().await["verdict"], "refuse");
    client.write_all(REQUEST).await.unwrap();
    expect(&mut server, REQUEST).await;
    drop((client, server));
    assert_eq!(bed.line().await["verdict"], "allow");
    bed.end().await;
}

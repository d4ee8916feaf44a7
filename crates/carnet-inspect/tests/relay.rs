//! The relay over real loopback connections: every byte, both ends of both streams.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use carnet_inspect::relay::{BUFFER, Leg, LegEnd, Side, Stop, both, reset_on_close};
use std::io::ErrorKind;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// More than is copied before splicing begins, and more than sockets and pipes hold.
const LARGE: usize = 5_000_000;

/// A relay between two loopback connections.
struct Relay {
    /// The far end of the accepted side.
    client: TcpStream,
    /// The far end of the onward side.
    server: TcpStream,
    /// How it ended, and how much it carried up and down. Both inner sockets are closed by then.
    ended: JoinHandle<(Result<(), Stop>, u64, u64)>,
}

impl Relay {
    async fn start() -> Self {
        let (client, inner_client) = connection().await;
        let (inner_server, server) = connection().await;
        let ended = tokio::spawn(async move {
            let (up, down) = (AtomicU64::new(0), AtomicU64::new(0));
            let leg = async |from, to, carried| {
                Leg::new(from, to, carried).relay(vec![0; BUFFER]).await.map_err(LegEnd::from)
            };
            let result = both(
                leg(&inner_client, &inner_server, &up),
                leg(&inner_server, &inner_client, &down),
            )
            .await;
            (result, up.into_inner(), down.into_inner())
        });
        Self { client, server, ended }
    }
}

/// The two ends of a connection.
async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connecting = TcpStream::connect(listener.local_addr().unwrap());
    let (connected, accepted) = tokio::join!(connecting, listener.accept());
    (connected.unwrap(), accepted.unwrap().0)
}

/// Bytes that show when one is lost, doubled or moved.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

/// Writes everything in pieces of uneven sizes, and the end.
async fn send(stream: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) {
    let mut rest = bytes;
    for piece in [1, 7, 1460, 4096, 100_000].into_iter().cycle() {
        let (now, later) = rest.split_at(rest.len().min(piece));
        stream.write_all(now).await.unwrap();
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    stream.shutdown().await.unwrap();
}

async fn receive(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn every_byte_arrives_in_both_directions_at_once() {
    for (up, down) in [(0, 0), (1, 0), (0, 1), (1000, 70_000), (LARGE, 3 * LARGE)] {
        let Relay { mut client, mut server, ended } = Relay::start().await;
        let (request, response) = (pattern(up, 1), pattern(down, 2));
        let (mut client_in, mut client_out) = client.split();
        let (mut server_in, mut server_out) = server.split();
        let ((), (), received_up, received_down) = tokio::join!(
            send(&mut client_out, &request),
            send(&mut server_out, &response),
            receive(&mut server_in),
            receive(&mut client_in),
        );
        assert!(received_up == request, "{up} bytes up");
        assert!(received_down == response, "{down} bytes down");
        let (result, carried_up, carried_down) = ended.await.unwrap();
        assert!(result.is_ok(), "{result:?}");
        assert_eq!((carried_up, carried_down), (up as u64, down as u64));
    }
}

#[tokio::test]
async fn a_half_closed_connection_goes_on_the_other_way() {
    for length in [1000, LARGE] {
        let bytes = pattern(length, 3);
        // First the client ends and the server goes on, then the other way round.
        for client_ends in [true, false] {
            let Relay { client, server, ended } = Relay::start().await;
            let (mut first, mut second) =
                if client_ends { (client, server) } else { (server, client) };
            send(&mut first, b"that is all").await;
            assert_eq!(receive(&mut second).await, b"that is all");
            let ((), received) = tokio::join!(send(&mut second, &bytes), receive(&mut first));
            assert!(received == bytes);
            assert!(ended.await.unwrap().0.is_ok());
        }
    }
}

#[tokio::test]
async fn a_slow_reader_slows_the_writer_down() {
    let Relay { mut client, mut server, ended } = Relay::start().await;
    let bytes = pattern(64_000_000, 4);
    let mut written = 0;
    // Nobody reads. The writer must come to stand, with much of this unsent.
    while written < bytes.len() {
        let room = tokio::time::timeout(Duration::from_millis(500), client.writable()).await;
        if room.is_err() {
            break;
        }
        match client.try_write(&bytes[written..]) {
            Ok(length) => written += length,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    assert!(written < 40_000_000, "{written} bytes were taken without a reader");
    let rest = async {
        client.write_all(&bytes[written..]).await.unwrap();
        client.shutdown().await.unwrap();
    };
    let ((), received) = tokio::join!(rest, receive(&mut server));
    assert!(received == bytes);
    server.shutdown().await.unwrap();
    assert!(ended.await.unwrap().0.is_ok());
}

#[tokio::test]
#[cfg_attr(windows, ignore = "under Wine a reset reads as an end")]
async fn a_reset_of_either_side_ends_the_relay() {
    for side in [Side::Client, Side::Server] {
        for length in [10, LARGE] {
            let Relay { client, server, ended } = Relay::start().await;
            let (mut broken, mut other) =
                if side == Side::Client { (client, server) } else { (server, client) };
            let bytes = pattern(length, 5);
            let mut received = vec![0; length];
            let (sent, got) =
                tokio::join!(broken.write_all(&bytes), other.read_exact(&mut received));
            sent.unwrap();
            got.unwrap();
            assert!(received == bytes);
            reset_on_close(&broken);
            drop(broken);
            let (result, ..) = ended.await.unwrap();
            assert!(
                matches!(&result, Err(Stop::Broken(s, e))
                    if *s == side && e.kind() == ErrorKind::ConnectionReset),
                "{side:?}: {result:?}"
            );
        }
    }
}

#[tokio::test]
#[cfg_attr(windows, ignore = "under Wine a reset reads as an end")]
async fn a_reset_is_noticed_while_the_other_side_is_silent() {
    let Relay { mut client, mut server, ended } = Relay::start().await;
    // The server has said all; the client neither speaks nor ends.
    server.write_all(b"bye").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(receive(&mut client).await, b"bye");
    reset_on_close(&server);
    drop(server);
    let (result, ..) = ended.await.unwrap();
    assert!(matches!(result, Err(Stop::Deaf(Side::Server, _))), "{result:?}");
}

#[tokio::test]
async fn the_answer_of_a_server_that_reads_no_more_still_arrives() {
    let Relay { mut client, mut server, ended } = Relay::start().await;
    let request = pattern(LARGE, 6);
    let answer = pattern(10_000, 7);
    let (mut client_in, mut client_out) = client.split();
    // The server reads a part, answers, and closes with the rest unread: that resets it.
    let serving = async {
        let mut part = vec![0; 1000];
        server.read_exact(&mut part).await.unwrap();
        // So little is on its way at once; closing would throw away what is not sent yet.
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
        drop(server);
    };
    let (_, (), received) = tokio::join!(
        async {
            // It may fail, as the server does not take it all.
            let _ = client_out.write_all(&request).await;
        },
        serving,
        async {
            let mut received = Vec::new();
            let _ = client_in.read_to_end(&mut received).await;
            received
        }
    );
    assert!(received == answer, "{} of {} bytes", received.len(), answer.len());
    let (result, ..) = ended.await.unwrap();
    assert!(matches!(result, Err(Stop::Deaf(Side::Server, _))), "{result:?}");
}

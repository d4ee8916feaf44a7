//! The datagrams of a flow: DNS and QUIC. Some are Initial packets with arbitrary frames, which a
//! fuzzer would never protect rightly by itself.
#![no_main]

use arbitrary::Arbitrary;
use carnet_inspect::inspect::{Datagrams, Told, packets, refusal};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Datagram<'a> {
    Any(&'a [u8]),
    Initial { second_version: bool, connection: u8, number: u8, frames: Frames<'a> },
}

#[derive(Arbitrary, Debug)]
enum Frames<'a> {
    Any(&'a [u8]),
    Message(Vec<(u16, &'a [u8])>),
}

fuzz_target!(|input: Vec<Datagram<'_>>| {
    let mut datagrams = Datagrams::new();
    for datagram in &input {
        let bytes = match datagram {
            Datagram::Any(bytes) => bytes.to_vec(),
            Datagram::Initial { second_version, connection, number, frames } => {
                let frames = match frames {
                    Frames::Any(bytes) => bytes.to_vec(),
                    Frames::Message(pieces) => pieces
                        .iter()
                        .flat_map(|(from, piece)| packets::crypto(usize::from(*from), piece))
                        .collect(),
                };
                let id = [*connection; 8];
                match packets::initial(*second_version, &id, *number, &frames) {
                    Some(packet) => packet,
                    None => continue,
                }
            }
        };
        if let Told::Asks(seen) = datagrams.feed(&bytes) {
            assert!(seen.host.is_none_or(|host| host.len() <= bytes.len().max(1 << 16)));
        }
        if let Some(answer) = refusal(&bytes) {
            // Who is refused gets no more than it sent, and nobody takes the answer for a question.
            assert!(answer.len() <= bytes.len());
            assert_eq!(refusal(&answer), None, "two that refuse would answer each other for ever");
        }
    }
});

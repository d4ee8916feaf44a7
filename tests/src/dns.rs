//! A resolver for tests: every name has one address.

use std::net::{Ipv4Addr, SocketAddr};

/// The IPv4 address of every name.
pub const ANSWER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);

const HEADER: usize = 12;
const TYPE_A: [u8; 2] = [0, 1];

/// The answer to a question (RFC 1035), for a `DatagramServer`: [`ANSWER`] for an IPv4 address, and
/// nothing for whatever else is asked.
pub fn answer(_: SocketAddr, question: &[u8]) -> Vec<u8> {
    // The question's name ends with an empty label; type and class come behind it.
    let name = question.get(HEADER..).unwrap_or_default();
    let end = name.iter().position(|byte| *byte == 0).map_or(0, |end| HEADER + end + 1);
    let Some(asked) = question.get(..end + 4).filter(|_| end > 0) else {
        return Vec::new();
    };
    let is_address = asked[end..end + 2] == TYPE_A;
    let mut answer = asked.to_vec();
    // An answer without error, with recursion; one question, as many answers, nothing else.
    answer[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    if is_address {
        // The question's name, type A, class IN, a minute, four bytes.
        answer.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(ANSWER.octets());
    }
    answer
}

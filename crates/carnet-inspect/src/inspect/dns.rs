//! DNS queries (RFC 1035): the question, and the answer that refuses it.

use super::{Look, Protocol, Seen, unknown};
use domain::base::iana::{Class, Rcode};
use domain::base::{Message, MessageBuilder, Question};

/// The first byte of the longest query in a stream: of its length, which is less than 4096 then. What
/// begins otherwise can be another protocol.
pub(super) const LONGEST: u8 = 0x0f;
/// Bytes of the shortest query: the header, the root, type and class.
const SHORTEST: usize = 17;

/// Takes a query out of a stream, where its length comes before it (RFC 1035, section 4.2.2).
pub(super) fn look_in_stream(bytes: &[u8]) -> Look {
    let more = |least| Look::More { so_far: Seen::default(), least };
    let Some((length, rest)) = bytes.split_first_chunk() else { return more(2) };
    let length = usize::from(u16::from_be_bytes(*length));
    let message = rest.get(..length).unwrap_or(rest);
    // What cannot become a query is told as early as possible: answers, and more than one question.
    let odd = |at: usize, is_odd: fn(u8) -> bool| message.get(at).is_some_and(|&byte| is_odd(byte));
    if length < SHORTEST
        || odd(2, |flags| flags & 0x80 != 0)
        || odd(4, |n| n != 0)
        || odd(5, |n| n != 1)
    {
        return unknown();
    }
    match look(message) {
        Some(seen) => Look::Settled(seen),
        None if message.len() == length => unknown(),
        None => more(bytes.len() + 1),
    }
}

/// What a query asks. None for what is not a query with one question: more than one have no
/// meaning (RFC 9619), and are refused by servers.
///
/// What follows the question is not looked at: servers are not strict about it either.
pub(super) fn look(datagram: &[u8]) -> Option<Seen> {
    let query = query(datagram)?;
    let question: Question<_> = query.first_question()?;
    let name = question.qname().to_string();
    let name = if name.is_empty() { ".".to_owned() } else { name };
    let mut text = format!("{name} {}", question.qtype());
    if question.qclass() != Class::IN {
        text = format!("{text} {}", question.qclass());
    }
    Some(Seen {
        host: Some(name.to_ascii_lowercase()),
        question: Some(text),
        ..Seen::of(Protocol::Dns)
    })
}

/// The answer REFUSED to a query. None for what is not one.
pub(super) fn refusal(datagram: &[u8]) -> Option<Vec<u8>> {
    let query = query(datagram)?;
    query.first_question()?;
    let answer = MessageBuilder::new_vec().start_answer(query, Rcode::REFUSED).ok()?;
    Some(answer.finish())
}

fn query(datagram: &[u8]) -> Option<&Message<[u8]>> {
    let message = Message::from_slice(datagram).ok()?;
    let is_query = !message.header().qr() && message.header_counts().qdcount() == 1;
    is_query.then_some(message)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A query: its flags, the labels of its name, its type and class.
    pub(crate) fn encode(flags: u16, labels: &[&[u8]], kind: u16, class: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34];
        bytes.extend(flags.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 0, 0, 0, 0]);
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label);
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(class.to_be_bytes());
        bytes
    }

    fn told(bytes: &[u8]) -> Option<(String, String)> {
        let seen = look(bytes)?;
        assert_eq!(seen.protocol, Protocol::Dns);
        Some((seen.host.unwrap(), seen.question.unwrap()))
    }

    #[test]
    fn questions_are_told() {
        let www: &[&[u8]] = &[b"Www", b"Example", b"ORG"];
        for (query, host, question) in [
            (encode(0x0100, www, 28, 1), "www.example.org", "Www.Example.ORG AAAA"),
            (encode(0x0120, www, 65, 1), "www.example.org", "Www.Example.ORG HTTPS"),
            (encode(0x0140, www, 65400, 1), "www.example.org", "Www.Example.ORG TYPE65400"),
            (encode(0, &[], 2, 1), ".", ". NS"),
            (encode(0, &[b"version", b"bind"], 16, 3), "version.bind", "version.bind TXT CH"),
            (encode(0, &[b"a.b\n", b"c"], 1, 1), "a\\.b\\010.c", "a\\.b\\010.c A"),
        ] {
            assert_eq!(told(&query), Some((host.to_owned(), question.to_owned())));
            // Records that are announced and not there make no difference.
            let mut odd = query.clone();
            odd[11] = 1;
            assert_eq!(told(&odd), told(&query));
            odd.push(7);
            assert_eq!(told(&odd), told(&query));
        }
    }

    #[test]
    fn what_is_no_query_is_none() {
        let query = encode(0x0100, &[b"a", b"test"], 1, 1);
        for end in 0..query.len() {
            assert_eq!(look(&query[..end]), None, "{end} bytes");
        }
        let changed = |at: usize, value: u8| {
            let mut bytes = query.clone();
            bytes[at] = value;
            bytes
        };
        for bytes in [
            changed(2, 0x81),
            changed(5, 0),
            changed(5, 2),
            changed(4, 1),
            changed(12, 0x80),
            // The name is a pointer to itself.
            [&query[..12], &[0xc0, 12, 0, 1, 0, 1]].concat(),
        ] {
            assert_eq!(look(&bytes), None, "{bytes:?}");
            assert_eq!(refusal(&bytes), None, "{bytes:?}");
        }
        // A client of NTP.
        let mut ntp = [0; 48];
        (ntp[0], ntp[2], ntp[3]) = (0x23, 6, 0x20);
        assert_eq!(look(&ntp), None);
    }

    #[test]
    fn a_refusal_answers_the_question() {
        let mut query = encode(0x0110, &[b"a", b"test"], 28, 1);
        query[11] = 1;
        query.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
        let answer = refusal(&query).unwrap();
        assert_eq!(answer[..12], [0x12, 0x34, 0x81, 0x05, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer[12..], query[12..24]);
    }

    #[test]
    fn a_query_in_a_stream_is_told_as_soon_as_its_question_is_there() {
        let query = encode(0x0100, &[b"a", b"test"], 28, 1);
        let length = [0, query.len() as u8 + 11];
        let stream = [&length[..], &query].concat();
        for end in 0..stream.len() {
            assert!(matches!(look_in_stream(&stream[..end]), Look::More { .. }), "{end} bytes");
        }
        let Look::Settled(seen) = look_in_stream(&stream) else { panic!("not settled") };
        assert_eq!(seen.question.as_deref(), Some("a.test AAAA"));
        // Its length ends within the question.
        let short = [&[0, query.len() as u8 - 1][..], &query].concat();
        let Look::Settled(seen) = look_in_stream(&short) else { panic!("not settled") };
        assert_eq!(seen, Seen::default());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            look(&bytes);
            refusal(&bytes);
        }

        #[test]
        fn changed_queries_do_no_harm(
            labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..64), 0..6),
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
        ) {
            let labels: Vec<&[u8]> = labels.iter().map(Vec::as_slice).collect();
            let mut query = encode(0x0100, &labels, 1, 1);
            let length: usize = labels.iter().map(|label| label.len() + 1).sum();
            prop_assert_eq!(look(&query).is_some(), length < 255);
            *at.get_mut(&mut query) = value;
            if let Some(seen) = look(&query) {
                prop_assert!(seen.host.unwrap().is_ascii());
                prop_assert!(refusal(&query).unwrap().len() <= query.len());
            }
        }
    }
}

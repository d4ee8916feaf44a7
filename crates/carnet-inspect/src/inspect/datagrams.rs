//! The datagrams of a flow: each of them can ask for something else.

use super::quic::{self, Connection, Hello};
use super::{Protocol, Seen, dns};
use std::collections::VecDeque;

/// How many ClientHellos of QUIC may be incomplete at once in a flow.
const HELLOS: usize = 2;
/// How many QUIC connections of a flow are remembered whose ClientHello was seen.
const REMEMBERED: usize = 4;

/// Looks at the datagrams that a client sends in a flow.
///
/// A flow is a socket and a destination. Over one flow a client can ask DNS many questions, and
/// have many connections of QUIC: it is not enough to look at the first datagram.
#[derive(Debug, Default)]
pub struct Datagrams {
    incomplete: Vec<Hello>,
    complete: VecDeque<Connection>,
    /// QUIC was seen: what is not recognised is taken for packets of it, which are not readable.
    is_quic: bool,
}

/// What a datagram is for who has to judge it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The client asks for this.
    Asks(Seen),
    /// A piece of a QUIC client's first message, of which more is to come. The server can do
    /// nothing either before it has all.
    Begins,
    /// It belongs to what was told before.
    Continues,
    /// A piece of a QUIC client's first message, while others are incomplete already.
    TooMany,
}

impl Datagrams {
    /// Nothing was seen of a flow.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next datagram.
    pub fn feed(&mut self, datagram: &[u8]) -> Told {
        // The two do not look alike: the versions of QUIC are no numbers of questions.
        if let Some(connection) = Connection::of(datagram) {
            let told = self.initial(connection, datagram);
            self.is_quic = true;
            return told;
        }
        if let Some(seen) = dns::look(datagram) {
            return Told::Asks(seen);
        }
        if self.is_quic {
            return Told::Continues;
        }
        self.is_quic = quic::recognise(datagram);
        Told::Asks(if self.is_quic { Seen::of(Protocol::Quic) } else { Seen::default() })
    }

    /// A datagram with an Initial packet of this connection.
    fn initial(&mut self, connection: Connection, datagram: &[u8]) -> Told {
        if self.complete.contains(&connection) {
            return Told::Continues;
        }
        let known = self.incomplete.iter().position(|hello| hello.connection == connection);
        let index = match known {
            Some(index) => {
                self.incomplete[index].feed(datagram);
                index
            }
            None => {
                let hello = Hello::new(connection);
                // What the client did not protect begins nothing: a server cannot read it either.
                // Such are its later Initial packets, which name the id that the server chose.
                let Some(hello) = hello.and_then(|mut hello| hello.feed(datagram).then_some(hello))
                else {
                    return if self.is_quic {
                        Told::Continues
                    } else {
                        Told::Asks(Seen::of(Protocol::Quic))
                    };
                };
                if self.incomplete.len() == HELLOS && hello.seen().is_none() {
                    return Told::TooMany;
                }
                self.incomplete.push(hello);
                self.incomplete.len() - 1
            }
        };
        let Some(seen) = self.incomplete[index].seen() else { return Told::Begins };
        let hello = self.incomplete.swap_remove(index);
        if self.complete.len() == REMEMBERED {
            self.complete.pop_front();
        }
        self.complete.push_back(hello.connection);
        Told::Asks(seen)
    }
}

/// What tells a client that what it asks for in this datagram is refused, so that it need not wait
/// until its patience ends: DNS's answer REFUSED, QUIC's CONNECTION_REFUSED. None where there is
/// nothing of the kind. It is never longer than the datagram.
pub fn refusal(datagram: &[u8]) -> Option<Vec<u8>> {
    let answer = quic::refusal(datagram).or_else(|| dns::refusal(datagram))?;
    (answer.len() <= datagram.len()).then_some(answer)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::dns::tests::encode;
    use super::super::quic::tests::{crypto, initial, message};
    use super::*;
    use proptest::prelude::*;

    /// A DNS question for the address of `name`.
    pub(crate) fn query(name: &str) -> Vec<u8> {
        let labels = name.split('.').filter(|label| !label.is_empty());
        let labels: Vec<&[u8]> = labels.map(str::as_bytes).collect();
        encode(0x0100, &labels, 1, 1)
    }

    /// The same in a stream.
    pub(crate) fn query_in_stream(name: &str) -> Vec<u8> {
        let query = query(name);
        [&(query.len() as u16).to_be_bytes()[..], &query].concat()
    }

    /// A QUIC client's ClientHello for `host` in two datagrams.
    pub(crate) fn hello_in_two(id: &[u8], host: &str) -> [Vec<u8>; 2] {
        let message = message(host);
        let half = message.len() / 2;
        [
            initial(id, 0, &[crypto(&message, 0, half)]),
            initial(id, 1, &[crypto(&message, half, message.len())]),
        ]
    }

    fn host(told: &Told) -> &str {
        let Told::Asks(seen) = told else { panic!("{told:?}") };
        seen.host.as_deref().unwrap_or("no host")
    }

    #[test]
    fn every_question_is_told() {
        let mut datagrams = Datagrams::new();
        for name in ["a.test", "b.test", "a.test"] {
            assert_eq!(host(&datagrams.feed(&query(name))), name);
            assert_eq!(datagrams.feed(b"something"), Told::Asks(Seen::default()));
        }
        assert_eq!(datagrams.feed(b""), Told::Asks(Seen::default()));
    }

    #[test]
    fn every_connection_is_told_when_its_hello_is_complete() {
        let mut datagrams = Datagrams::new();
        let [a, b] = [hello_in_two(b"11111111", "a.test"), hello_in_two(b"22222222", "b.test")];
        assert_eq!(datagrams.feed(&a[0]), Told::Begins);
        assert_eq!(datagrams.feed(b"\x40 its next packets"), Told::Continues);
        assert_eq!(datagrams.feed(&b[1]), Told::Begins);
        assert_eq!(host(&datagrams.feed(&a[1])), "a.test");
        assert_eq!(host(&datagrams.feed(&b[0])), "b.test");
        // Sent again.
        for datagram in a.iter().chain(&b) {
            assert_eq!(datagrams.feed(datagram), Told::Continues);
        }
        // With an id of the server, for which these keys do not hold.
        let mut later = a[0].clone();
        later[6] ^= 1;
        assert_eq!(datagrams.feed(&later), Told::Continues);
        assert_eq!(host(&Datagrams::new().feed(&later)), "no host");
    }

    #[test]
    fn hellos_that_are_not_completed_are_bounded() {
        let mut datagrams = Datagrams::new();
        let begun: Vec<_> = (0..9).map(|id| hello_in_two(&[id; 8], "a.test")).collect();
        for (index, [first, _]) in begun.iter().enumerate() {
            let expected = if index < HELLOS { Told::Begins } else { Told::TooMany };
            assert_eq!(datagrams.feed(first), expected);
        }
        // One that comes at once needs no room.
        let message = message("b.test");
        let whole = initial(b"whole one", 0, &[crypto(&message, 0, message.len())]);
        assert_eq!(host(&datagrams.feed(&whole)), "b.test");
        for [first, second] in &begun {
            datagrams.feed(first);
            assert_eq!(host(&datagrams.feed(second)), "a.test");
        }
        assert_eq!((datagrams.incomplete.len(), datagrams.complete.len()), (0, REMEMBERED));
    }

    #[test]
    fn refusals_are_for_those_who_asked() {
        assert!(refusal(&query("a.test")).is_some());
        assert!(refusal(&initial(b"12345678", 0, &[])).is_some());
        assert_eq!(refusal(b"something else"), None);
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_do_no_harm(
            flow in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..20),
        ) {
            let mut datagrams = Datagrams::new();
            for datagram in &flow {
                datagrams.feed(datagram);
                if let Some(answer) = refusal(datagram) {
                    prop_assert!(answer.len() <= datagram.len());
                }
            }
        }
    }
}

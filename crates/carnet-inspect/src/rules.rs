//! Rules: which flows are allowed and which are refused. The first rule that matches decides.
//!
//! A rule that asks for the host or the protocol can only be judged when the client has spoken.
//! [`Rules::decide`] tells whether the decision has to wait for that, so that the bytes of a flow
//! that no such rule concerns are not held back. In a flow of datagrams, each that asks for
//! something is judged.

use crate::inspect::{Protocol, Seen};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;

/// What is done with a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It is relayed to its destination.
    #[default]
    Allow,
    /// It is ended.
    Refuse,
}

/// What carries a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A stream.
    #[default]
    Tcp,
    /// Datagrams; also UDP-Lite.
    Udp,
}

/// An ordered list of rules, and what to do when none matches.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The rules, first to last.
    pub rules: Vec<Rule>,
    /// For flows that no rule matches.
    pub default: Action,
    /// Whether refused HTTP requests are answered with a response 403, and not with a reset only.
    pub http_response: bool,
}

/// One rule. It matches if each kind of condition that it has is met by one of its values.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// How the log calls the rule.
    pub name: String,
    /// What is done with flows that match.
    pub action: Action,
    /// The host that the client asks for; of DNS, the name in a question.
    pub hosts: Vec<Glob>,
    /// The protocol that the client speaks.
    pub protocols: Vec<Protocol>,
    /// What carries the flow.
    pub transports: Vec<Transport>,
    /// The address of the original destination.
    pub destinations: Vec<IpNet>,
    /// The port of the original destination.
    pub ports: Vec<PortRange>,
    /// The path of the original application's executable.
    pub executables: Vec<Glob>,
}

/// What is known of a flow before its client has spoken.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// What carries it.
    pub transport: Transport,
    /// The original destination.
    pub destination: SocketAddr,
    /// The original application's executable, if it is known.
    pub executable: Option<&'a Path>,
}

/// What [`Rules::decide`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It depends on what the client says.
    Open,
    /// This is the verdict.
    Settled(Verdict),
}

/// What is done with a flow, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What is done.
    pub action: Action,
    /// The name of the rule that says so; none for the default.
    pub rule: Option<String>,
}

impl Rules {
    /// Decides on a flow. `seen` is none while the client's first bytes are not known; with them,
    /// the decision is always settled.
    pub fn decide(&self, facts: Facts<'_>, seen: Option<&Seen>) -> Decision {
        for rule in &self.rules {
            if !rule.concerns(facts) {
                continue;
            }
            match seen {
                None if rule.asks_client() => return Decision::Open,
                Some(seen) if !rule.meets(seen) => {}
                _ => return settled(rule.action, Some(rule.name.clone())),
            }
        }
        settled(self.default, None)
    }
}

fn settled(action: Action, rule: Option<String>) -> Decision {
    Decision::Settled(Verdict { action, rule })
}

impl Rule {
    /// Whether the conditions are met that do not depend on what the client says.
    fn concerns(&self, facts: Facts<'_>) -> bool {
        let address = facts.destination.ip().to_canonical();
        let port = facts.destination.port();
        any(&self.transports, |&transport| transport == facts.transport)
            && any(&self.destinations, |prefix| prefix.contains(&address))
            && any(&self.ports, |range| range.0.contains(&port))
            && any(&self.executables, |glob| {
                facts.executable.is_some_and(|path| glob.matches(&path.to_string_lossy()))
            })
    }

    /// Whether there are conditions on what the client says.
    fn asks_client(&self) -> bool {
        !self.hosts.is_empty() || !self.protocols.is_empty()
    }

    /// Whether the conditions on what the client says are met.
    fn meets(&self, seen: &Seen) -> bool {
        any(&self.protocols, |&protocol| protocol == seen.protocol)
            && any(&self.hosts, |glob| seen.host.as_ref().is_some_and(|host| glob.matches(host)))
    }
}

/// Whether a condition with these values is met; without values it always is.
fn any<T>(values: &[T], meets: impl FnMut(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(meets)
}

/// A pattern for a whole text: `*` stands for any characters (also dots and slashes, also none),
/// `?` for one character, everything else for itself in either case.
///
/// `*.example.com` matches every host below `example.com`, but not that name itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Glob(String);

impl Glob {
    /// Whether the whole of `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        let same = |a: char, b: char| a == '?' || a.eq_ignore_ascii_case(&b);
        let (mut pattern, mut rest) = (self.0.chars(), text.chars());
        // Where to go on if what follows the last star does not match: it takes one more then.
        let mut retry = None;
        loop {
            let there = rest.clone();
            match (pattern.next(), rest.next()) {
                (Some('*'), _) => {
                    retry = Some((pattern.clone(), there.clone()));
                    rest = there;
                }
                (Some(p), Some(t)) if same(p, t) => {}
                (None, None) => return true,
                _ => {
                    let Some((after_star, from)) = &mut retry else { return false };
                    if from.next().is_none() {
                        return false;
                    }
                    (pattern, rest) = (after_star.clone(), from.clone());
                }
            }
        }
    }
}

impl TryFrom<String> for Glob {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, InvalidValue> {
        if text.is_empty() {
            return Err(InvalidValue("an empty pattern matches nothing".into()));
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(InvalidValue(format!("the pattern {text:?} has white space in it")));
        }
        Ok(Self(text.strip_suffix('.').unwrap_or(&text).to_owned()))
    }
}

/// Reads a prefix, `192.0.2.0/24`, or an address, which is a prefix of full length.
///
/// # Errors
/// When the text is neither, or has bits set behind the prefix: that is usually a slip.
pub fn prefix(text: &str) -> Result<IpNet, InvalidValue> {
    let prefix = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    match prefix {
        Ok(prefix) if prefix.trunc() == prefix => Ok(prefix),
        Ok(prefix) => Err(InvalidValue(format!(
            "the address {text} has bits set behind its prefix; did you mean {}?",
            prefix.trunc()
        ))),
        Err(_) => Err(InvalidValue(format!(
            "{text:?} is not an address prefix such as 192.0.2.0/24 or 2001:db8::/32"
        ))),
    }
}

/// A range of ports, both ends included: `443` or `8000-8999`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Self(first..=last)),
            _ => Err(InvalidValue(format!(
                "{text:?} is not a port (443) or a range of ports (8000-8999)"
            ))),
        }
    }
}

/// A value in a rule that cannot be understood; the text says which and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidValue(pub String);

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allowed",
            Self::Refuse => "refused",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn glob(text: &str) -> Glob {
        Glob::try_from(text.to_owned()).unwrap()
    }

    fn facts(destination: &str) -> Facts<'_> {
        Facts {
            transport: Transport::Tcp,
            destination: destination.parse().unwrap(),
            executable: Some(Path::new("/usr/bin/curl")),
        }
    }

    fn rule(name: &str, action: Action) -> Rule {
        Rule { name: name.into(), action, ..Rule::default() }
    }

    fn seen(host: &str) -> Seen {
        Seen { protocol: Protocol::Tls, host: Some(host.into()), ..Seen::default() }
    }

    fn verdict(action: Action, rule: Option<&str>) -> Decision {
        settled(action, rule.map(str::to_owned))
    }

    #[test]
    fn globs_match_whole_texts() {
        for (pattern, text, expected) in [
            ("*.example.com", "www.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", "www.example.com.evil.test", false),
            ("Example.COM.", "example.com", true),
            ("example.com", "example.community", false),
            ("*", "", true),
            ("*", "anything", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("**a", "ba", true),
            ("h?st", "host", true),
            ("h?st", "hst", false),
            ("/usr/*/curl", "/usr/local/bin/curl", true),
            ("ü*", "übung", true),
        ] {
            assert_eq!(glob(pattern).matches(text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rules = Rules {
            rules: vec![
                Rule { ports: vec![PortRange(1..=99)], ..rule("low", Action::Refuse) },
                Rule {
                    destinations: vec![prefix("192.0.2.0/24").unwrap()],
                    executables: vec![glob("/usr/bin/wget"), glob("/usr/bin/c*")],
                    ..rule("curl", Action::Allow)
                },
                Rule {
                    destinations: vec![prefix("192.0.0.0/16").unwrap()],
                    ..rule("net", Action::Refuse)
                },
            ],
            ..Rules::default()
        };
        let decide = |to| rules.decide(facts(to), None);
        assert_eq!(decide("192.0.2.1:80"), verdict(Action::Refuse, Some("low")));
        assert_eq!(decide("192.0.2.1:100"), verdict(Action::Allow, Some("curl")));
        assert_eq!(decide("[::ffff:192.0.2.1]:100"), verdict(Action::Allow, Some("curl")));
        assert_eq!(decide("192.0.3.1:100"), verdict(Action::Refuse, Some("net")));
        assert_eq!(decide("[2001:db8::1]:100"), verdict(Action::Allow, None));
        let unknown = Facts { executable: None, ..facts("192.0.2.1:100") };
        assert_eq!(rules.decide(unknown, None), verdict(Action::Refuse, Some("net")));
    }

    #[test]
    fn the_decision_waits_only_for_rules_that_concern_the_flow() {
        let rules = Rules {
            rules: vec![
                Rule { ports: vec![PortRange(25..=25)], ..rule("mail", Action::Allow) },
                Rule {
                    ports: vec![PortRange(443..=443)],
                    hosts: vec![glob("*.bad.test")],
                    ..rule("bad", Action::Refuse)
                },
                Rule {
                    ports: vec![PortRange(443..=443)],
                    protocols: vec![Protocol::Unknown],
                    ..rule("dumb", Action::Refuse)
                },
            ],
            ..Rules::default()
        };
        assert_eq!(rules.decide(facts("192.0.2.1:25"), None), verdict(Action::Allow, Some("mail")));
        assert_eq!(rules.decide(facts("192.0.2.1:80"), None), verdict(Action::Allow, None));
        let tls = facts("192.0.2.1:443");
        assert_eq!(rules.decide(tls, None), Decision::Open);
        let decide = |seen: &Seen| rules.decide(tls, Some(seen));
        assert_eq!(decide(&seen("x.bad.test")), verdict(Action::Refuse, Some("bad")));
        assert_eq!(decide(&seen("good.test")), verdict(Action::Allow, None));
        assert_eq!(decide(&Seen::default()), verdict(Action::Refuse, Some("dumb")));
    }

    #[test]
    fn quic_and_the_rest_of_udp_can_be_refused_apart() {
        let protocols = |protocols: &[Protocol], name| Rule {
            protocols: protocols.to_vec(),
            transports: vec![Transport::Udp],
            ..rule(name, Action::Refuse)
        };
        let rules = Rules {
            rules: vec![
                protocols(&[Protocol::Quic], "quic"),
                protocols(&[Protocol::Unknown], "other"),
            ],
            ..Rules::default()
        };
        let tcp = facts("192.0.2.1:443");
        assert_eq!(rules.decide(tcp, None), verdict(Action::Allow, None));
        let udp = Facts { transport: Transport::Udp, ..tcp };
        assert_eq!(rules.decide(udp, None), Decision::Open);
        for (protocol, expected) in [
            (Protocol::Quic, verdict(Action::Refuse, Some("quic"))),
            (Protocol::Unknown, verdict(Action::Refuse, Some("other"))),
            (Protocol::Dns, verdict(Action::Allow, None)),
        ] {
            let seen = Seen { protocol, host: Some("a.test".into()), ..Seen::default() };
            assert_eq!(rules.decide(udp, Some(&seen)), expected, "{protocol:?}");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused_in_words() {
        assert!(Glob::try_from(String::new()).is_err());
        assert!(Glob::try_from("a b".to_owned()).is_err());
        assert!(prefix("192.0.2.1/24").unwrap_err().0.contains("did you mean 192.0.2.0/24?"));
        assert!(prefix("example.com").is_err());
        assert_eq!(prefix("::1").unwrap().prefix_len(), 128);
        for text in ["", "http", "70000", "9-1", "1-2-3"] {
            assert!(text.parse::<PortRange>().is_err(), "{text:?}");
        }
        assert_eq!("8000 - 8999".parse::<PortRange>().unwrap().0, 8000..=8999);
    }

    /// The same by recursion, as one would define it.
    fn naive(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.split_first(), text.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), None) => naive(rest, text),
            (Some((b'*', rest)), Some((_, after))) => naive(rest, text) || naive(pattern, after),
            (Some((&p, rest)), Some((&t, after))) if p == b'?' || p == t => naive(rest, after),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn globs_agree_with_their_definition(pattern in "[ab*?]{1,8}", text in "[ab]{0,10}") {
            let expected = naive(pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(glob(&pattern).matches(&text), expected);
        }
    }
}

//! The rules file: TOML that becomes [`Rules`].
//!
//! ```toml
//! default = "allow"           # for flows that no rule matches; "allow" if left out
//! http-response = true        # answer refused HTTP requests with 403; false if left out
//!
//! [[rule]]                    # the first rule that matches decides
//! name = "no trackers"        # for the log; "rule 1" if left out
//! action = "refuse"           # or "allow"
//! host = ["*.tracker.example", "tracker.example"]
//!
//! [[rule]]                    # every condition must be met, by one of its values
//! action = "refuse"
//! destination = "192.0.2.0/24"
//! port = [25, "8000-8999"]
//! executable = "/usr/bin/*"
//! transport = "tcp"           # or "udp"
//! protocol = "unknown"        # "http", "tls", "dns", "quic" or "unknown"
//!
//! [[rule]]                    # clients of HTTP/3 fall back to TCP
//! name = "no QUIC"
//! action = "refuse"
//! protocol = "quic"
//! ```

use crate::inspect::Protocol;
use crate::rules::{Action, Glob, PortRange, Rule, Rules, Transport, prefix};
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, Error as _, IntoDeserializer, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Why a rules file was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read. After privileges were dropped, the new user needs the right to.
    #[error("reading the rules file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML, or has something in it that is not a rule. The message names the line.
    #[error("in the rules file {}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
}

/// Reads a rules file.
///
/// # Errors
/// When it cannot be read or understood; nothing is guessed or left out.
pub fn load(path: &Path) -> Result<Rules, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.into(), source })?;
    parse(&text)
        .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
}

/// Reads the text of a rules file.
///
/// # Errors
/// When it cannot be understood; the message names the line.
pub fn parse(text: &str) -> Result<Rules, toml::de::Error> {
    let file: RulesFile = toml::from_str(text)?;
    let rules = file.rule.into_iter().enumerate().map(|(index, rule)| Rule {
        name: rule.name.unwrap_or_else(|| format!("rule {}", index + 1)),
        action: rule.action,
        hosts: rule.host.0,
        protocols: rule.protocol.0,
        transports: rule.transport.0,
        destinations: rule.destination.0.into_iter().map(|prefix| prefix.0).collect(),
        ports: rule.port.0,
        executables: rule.executable.0,
    });
    Ok(Rules { rules: rules.collect(), default: file.default, http_response: file.http_response })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RulesFile {
    #[serde(default)]
    default: Action,
    #[serde(default)]
    http_response: bool,
    #[serde(default)]
    rule: Vec<RuleEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    name: Option<String>,
    action: Action,
    #[serde(default)]
    host: OneOrMany<Glob>,
    #[serde(default)]
    protocol: OneOrMany<Protocol>,
    #[serde(default)]
    transport: OneOrMany<Transport>,
    #[serde(default)]
    destination: OneOrMany<Prefix>,
    #[serde(default)]
    port: OneOrMany<PortRange>,
    #[serde(default)]
    executable: OneOrMany<Glob>,
}

/// A value, or a list of at least one. Not an untagged enum, whose errors would not say what is
/// wrong with the value.
struct OneOrMany<T>(Vec<T>);

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Values<T> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value or a list of values")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<T>, E> {
                Ok(vec![T::deserialize(text.into_deserializer())?])
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Vec<T>, E> {
                Ok(vec![T::deserialize(number.into_deserializer())?])
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<T>, A::Error> {
                let values = Vec::deserialize(SeqAccessDeserializer::new(list))?;
                if values.is_empty() {
                    return Err(A::Error::custom(
                        "an empty list would match everything; leave the condition out instead",
                    ));
                }
                Ok(values)
            }
        }

        deserializer.deserialize_any(Values(PhantomData)).map(Self)
    }
}

struct Prefix(IpNet);

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        prefix(&text).map(Self).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Port;

        impl Visitor<'_> for Port {
            type Value = PortRange;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port (443) or a range of ports (\"8000-8999\")")
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<PortRange, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<PortRange, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_file_is_read() {
        let documentation = include_str!("config.rs");
        let example: String = documentation
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .skip_while(|line| !line.contains("```toml"))
            .skip(1)
            .take_while(|line| !line.contains("```"))
            .map(|line| format!("{line}\n"))
            .collect();
        let rules = parse(&example).unwrap();
        assert_eq!((rules.default, rules.http_response), (Action::Allow, true));
        let [trackers, second, no_quic] = rules.rules.as_slice() else {
            panic!("{:?}", rules.rules)
        };
        assert_eq!((trackers.name.as_str(), trackers.action), ("no trackers", Action::Refuse));
        assert_eq!(trackers.hosts.len(), 2);
        assert_eq!(second.name, "rule 2");
        assert_eq!(second.ports, [PortRange(25..=25), PortRange(8000..=8999)]);
        assert_eq!(second.protocols, [Protocol::Unknown]);
        assert_eq!(second.transports, [Transport::Tcp]);
        assert_eq!(
            (no_quic.name.as_str(), &no_quic.protocols[..]),
            ("no QUIC", &[Protocol::Quic][..])
        );
        assert_eq!(second.destinations, [prefix("192.0.2.0/24").unwrap()]);
        assert_eq!(second.executables.len(), 1);
    }

    #[test]
    fn an_empty_file_allows_everything() {
        let rules = parse("").unwrap();
        assert!(rules.rules.is_empty());
        assert_eq!((rules.default, rules.http_response), (Action::Allow, false));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (value, reason) in [
            ("hots = \"a\"", "unknown field `hots`"),
            ("host = \"\"", "an empty pattern"),
            ("host = []", "an empty list would match everything"),
            ("host = 1", "expected a string"),
            ("port = \"70000\"", "not a port (443)"),
            ("port = -1", "not a port (443)"),
            ("port = [25, \"9-1\"]", "\"9-1\" is not a port"),
            ("destination = \"192.0.2.1/24\"", "did you mean 192.0.2.0/24?"),
            ("protocol = \"ftp\"", "unknown variant `ftp`"),
            ("transport = \"sctp\"", "unknown variant `sctp`"),
            ("executable = true", "a value or a list of values"),
            ("action = \"drop\"", "duplicate key"),
        ] {
            let text = format!("[[rule]]\naction = \"allow\"\n{value}\n");
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(reason), "{value}: {message}");
            assert!(message.contains("line 3"), "{value}: {message}");
        }
        assert!(parse("[[rule]]\n").unwrap_err().to_string().contains("missing field `action`"));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let message = load(Path::new("/nonexistent/rules.toml")).unwrap_err().to_string();
        assert!(message.contains("/nonexistent/rules.toml"), "{message}");
    }
}

//! The administrator's objects: providers, sublayers, services and filters, in WFP's words.
//!
//! A [`Policy`] is the document that an administrator edits and that the kernel keeps, as JSON,
//! beside the tables that [`compile`](crate::compile) makes of it. All changes go through its
//! methods, which keep it whole: every reference leads somewhere, nothing that is referenced is
//! removed (contract C50), and no number is ever given twice. A redirect handle that were given
//! again would make an old record say "already visited" of a new service (contract C3, C10).

mod condition;
mod replace;

use alloc::{
    borrow::ToOwned,
    collections::BTreeSet,
    string::{String, ToString as _},
    vec::Vec,
};
use core::{fmt, num::NonZeroU16, str::FromStr};

use serde::{Deserialize, Serialize};

pub(crate) use self::condition::largest_value;
pub use self::condition::{
    CgroupCondition, ConditionError, Conditions, ExecutableCondition, NetnsCondition, PortRange,
    Prefix, Protocol, UserRange,
};
pub use self::replace::Identities;
use crate::{abi::MAX_CONTEXT, table::MAX_SERVICES};

/// Version of the document's format that this crate reads and writes.
pub const FORMAT: u32 = 1;

/// Longest name of an object, in characters.
pub const MAX_NAME: usize = 64;

/// Everything that the administrator has said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    format: u32,
    next_id: u64,
    providers: Vec<Provider>,
    sublayers: Vec<Sublayer>,
    services: Vec<Service>,
    filters: Vec<Filter>,
}

/// Who brings sublayers and services: a vendor, or a team.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Provider {
    /// Id, unique among all objects and never reused.
    pub id: u64,
    /// Name, unique among the providers.
    pub name: String,
    /// What people should know of it; may be empty.
    pub description: String,
}

/// A group of filters that decide together. Sublayers are consulted from the heaviest to the
/// lightest, those of equal weight from the oldest to the newest (contract C44).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Sublayer {
    /// Id, unique among all objects and never reused.
    pub id: u64,
    /// Name, unique among the sublayers.
    pub name: String,
    /// Name of its provider.
    pub provider: String,
    /// Weight: heavier sublayers come first.
    pub weight: u16,
}

/// A redirect service. Its identity is its cgroup; its redirect handle is "self" in every test of
/// the redirect state (contract C3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Service {
    /// Id, unique among all objects and never reused.
    pub id: u64,
    /// Redirect handle, from the same numbers as the ids.
    pub handle: u64,
    /// Name, unique among the services.
    pub name: String,
    /// Name of its provider.
    pub provider: String,
    /// The cgroup in which its processes run.
    pub cgroup: CgroupRef,
    /// What happens to its connections while it has no live listener.
    pub on_failure: FailurePolicy,
    /// Whose results it accepts without looking itself.
    pub trust: Trust,
    /// Whether its program knows nothing of redirect records: its connections without a record are
    /// given that of the flow that they may belong to (adoption). A service that co-operates stays
    /// under the hop guard instead (contract C11). Documents of before do not have it.
    #[serde(default)]
    pub unmodified: bool,
    /// The port at which its program takes flows, if it does not register its listeners itself: its
    /// sockets are registered when they are bound to this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen_port: Option<NonZeroU16>,
    /// Whether its program asks `getsockname()` for the destination, as proxies do behind
    /// netfilter's `TPROXY`: then that is what it is told of the connections that it accepts.
    #[serde(default)]
    pub tproxy: bool,
    /// Whether it may take over flows of other hosts, and so say which services they have passed
    /// ([`portable`](crate::portable)).
    #[serde(default)]
    pub gateway: bool,
}

/// A service that is to be added: [`Service`] without its numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewService {
    /// Name, unique among the services.
    pub name: String,
    /// Name of its provider.
    pub provider: String,
    /// The cgroup in which its processes run.
    pub cgroup: CgroupRef,
    /// What happens to its connections while it has no live listener.
    pub on_failure: FailurePolicy,
    /// Whose results it accepts without looking itself.
    pub trust: Trust,
    /// Whether its program knows nothing of redirect records, see [`Service::unmodified`].
    pub unmodified: bool,
    /// The port at which its program takes flows, see [`Service::listen_port`].
    pub listen_port: Option<NonZeroU16>,
    /// Whether its program asks `getsockname()` for the destination, see [`Service::tproxy`].
    pub tproxy: bool,
    /// Whether it may take over flows of other hosts, see [`Service::gateway`].
    pub gateway: bool,
}

impl NewService {
    /// A service that co-operates, trusts nobody, and whose connections are refused while it has no
    /// live listener.
    pub fn new(name: impl Into<String>, provider: impl Into<String>, cgroup: CgroupRef) -> Self {
        Self {
            name: name.into(),
            provider: provider.into(),
            cgroup,
            on_failure: FailurePolicy::default(),
            trust: Trust::default(),
            unmodified: false,
            listen_port: None,
            tproxy: false,
            gateway: false,
        }
    }
}

/// A cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupRef {
    /// Path below the root of the cgroup-v2 hierarchy, for people.
    pub path: String,
    /// Id: the inode number of its directory.
    pub id: u64,
}

/// What happens to a connection whose service has no live listener. It is asked for one only where
/// the connection would be sent to it: a connection that is refused anyway stays so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailurePolicy {
    /// It is refused.
    #[default]
    Block,
    /// The service is passed over, as if its filter did not match.
    Skip,
}

impl fmt::Display for FailurePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Block => "block",
            Self::Skip => "skip",
        })
    }
}

/// Whose results a service accepts: a flow that only trusted services have redirected is not
/// redirected to it (contract C7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// Nobody's.
    #[default]
    None,
    /// Everybody's.
    All,
    /// Those of the services of these names.
    Services(Vec<String>),
}

/// A rule: what happens to the connections that match its conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Filter {
    /// Id, unique among all objects and never reused.
    pub id: u64,
    /// Name, unique among the filters that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Name of its sublayer.
    pub sublayer: String,
    /// Weight within its sublayer.
    pub weight: Weight,
    /// Which connections it matches.
    pub conditions: Conditions,
    /// What happens to them.
    pub action: FilterAction,
}

/// A filter that is to be added: [`Filter`] without its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFilter {
    /// Name, unique among the filters that have one.
    pub name: Option<String>,
    /// Name of its sublayer.
    pub sublayer: String,
    /// Weight within its sublayer.
    pub weight: Weight,
    /// Which connections it matches.
    pub conditions: Conditions,
    /// What happens to them.
    pub action: FilterAction,
}

impl Filter {
    /// The weight by which the filter is ordered: heavier ones first, those of equal weight from
    /// the oldest to the newest.
    pub fn effective_weight(&self) -> u64 {
        match self.weight {
            Weight::Auto => self.conditions.automatic_weight(),
            Weight::Exact(weight) => weight,
        }
    }
}

/// The weight of a filter within its sublayer (contract C49). It reads and prints as `auto` or a
/// number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// By its conditions, see [`Conditions::automatic_weight`]: below 2^60.
    #[default]
    Auto,
    /// This weight.
    Exact(u64),
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Exact(weight) => weight.fmt(f),
        }
    }
}

impl FromStr for Weight {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => {
                let number = text.parse();
                number.map(Self::Exact).map_err(|_| PolicyError::BadWeight { text: text.into() })
            }
        }
    }
}

/// What a filter does with a connection. "Hard" decisions cannot be overridden by lighter
/// sublayers (contract C45).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum FilterAction {
    /// Let it pass.
    Permit {
        /// Only a veto of a lighter sublayer can still refuse it.
        hard: bool,
    },
    /// Refuse it.
    Block {
        /// No lighter sublayer can let it pass.
        hard: bool,
        /// Refuse it even if a heavier sublayer has permitted it for good (contract C47). A veto
        /// is always hard.
        veto: bool,
    },
    /// Send it to a service, where the redirect state allows. Counts as a soft permit.
    Redirect {
        /// Name of the service.
        service: String,
        /// What the service gets to read with the connection (contract S51).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        context: Option<Context>,
    },
}

impl FilterAction {
    /// A permit as filters give it unless told otherwise: soft (contract C46).
    pub const PERMIT: Self = Self::Permit { hard: false };
    /// A block as filters give it unless told otherwise: hard, without veto (contract C46).
    pub const BLOCK: Self = Self::Block { hard: true, veto: false };
}

/// A redirect context: 1 to [`MAX_CONTEXT`] bytes that mean something to the service only.
///
/// In the document it is `{"text": "…"}` if it is UTF-8, else `{"hex": "…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ContextInDocument", into = "ContextInDocument")]
pub struct Context(Vec<u8>);

impl Context {
    /// A context of these bytes.
    ///
    /// # Errors
    /// [`PolicyError::BadContext`] if there are none or too many.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, PolicyError> {
        let bytes = bytes.into();
        if bytes.is_empty() || bytes.len() > MAX_CONTEXT {
            return Err(PolicyError::BadContext { length: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// A context of the bytes that `text` writes in hexadecimal, two digits each.
    ///
    /// # Errors
    /// [`PolicyError::BadHex`] if it is no such text, [`PolicyError::BadContext`] as for
    /// [`Context::new`].
    pub fn from_hex(text: &str) -> Result<Self, PolicyError> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pairs = text.as_bytes().chunks(2).map(|pair| match *pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        });
        let bytes: Option<Vec<u8>> = pairs.collect();
        Self::new(bytes.ok_or_else(|| PolicyError::BadHex { text: text.to_owned() })?)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Context {
    /// Text if it is UTF-8 without control characters, else `0x` and hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match core::str::from_utf8(&self.0) {
            Ok(text) if !text.contains(char::is_control) => f.pad(text),
            _ => f.pad(&alloc::format!("0x{}", hex(&self.0))),
        }
    }
}

/// How a [`Context`] stands in the document.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ContextInDocument {
    Text(String),
    Hex(String),
}

impl From<Context> for ContextInDocument {
    fn from(context: Context) -> Self {
        String::from_utf8(context.0).map_or_else(|e| Self::Hex(hex(e.as_bytes())), Self::Text)
    }
}

impl TryFrom<ContextInDocument> for Context {
    type Error = PolicyError;

    fn try_from(context: ContextInDocument) -> Result<Self, Self::Error> {
        match context {
            ContextInDocument::Text(text) => Self::new(text),
            ContextInDocument::Hex(text) => Self::from_hex(&text),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| alloc::format!("{byte:02x}")).collect()
}

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Provider`].
    Provider,
    /// [`Sublayer`].
    Sublayer,
    /// [`Service`].
    Service,
    /// [`Filter`].
    Filter,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Provider => "provider",
            Self::Sublayer => "sublayer",
            Self::Service => "service",
            Self::Filter => "filter",
        })
    }
}

/// Why a policy cannot be changed in this way. Nothing is changed when one is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A name that objects cannot have.
    #[error(
        "{name:?} cannot be a name: use up to {} of the characters A-Z a-z 0-9 . _ - and begin \
         with a letter, a digit or _; digits alone would read as an id",
        MAX_NAME
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// Another object of that kind has the name.
    #[error("there is already a {kind} named {name:?}: choose another name, or remove it first")]
    NameTaken {
        /// The kind.
        kind: Kind,
        /// The name.
        name: String,
    },
    /// No object of that kind has the name or id.
    #[error(
        "there is no {kind} {key:?}: add it first, or look for the right name among the {kind}s"
    )]
    NotFound {
        /// The kind.
        kind: Kind,
        /// The name or id.
        key: String,
    },
    /// The object is referenced (contract C50).
    #[error("{kind} {name:?} is used by {user_kind} {user}: remove or change that first")]
    InUse {
        /// The object's kind.
        kind: Kind,
        /// The object's name.
        name: String,
        /// Kind of an object that refers to it.
        user_kind: Kind,
        /// Name, or for want of one the id, of that object.
        user: String,
    },
    /// A service is said to trust itself.
    #[error("service {name:?} cannot trust itself: it never sees a flow twice anyway")]
    TrustsItself {
        /// The service's name.
        name: String,
    },
    /// There are as many services as there can be.
    #[error("there are already {} services, the most there can be: remove one first", MAX_SERVICES)]
    TooManyServices,
    /// A service's cgroup has the id 0.
    #[error("cgroup {path:?} has the id 0, which no cgroup has: look the id up again")]
    NoCgroup {
        /// The cgroup's path.
        path: String,
    },
    /// A cgroup is given to a second service.
    #[error("cgroup {path:?} is already that of service {service:?}: a service needs its own")]
    CgroupTaken {
        /// The cgroup's path.
        path: String,
        /// The service that has it.
        service: String,
    },
    /// A redirect context of no or of too many bytes.
    #[error(
        "a redirect context of {length} bytes cannot be: it has 1 to {} bytes, or is left out",
        MAX_CONTEXT
    )]
    BadContext {
        /// Its length in bytes.
        length: usize,
    },
    /// Not bytes in hexadecimal.
    #[error("{text:?} is not hexadecimal: write two digits 0-9 a-f for each byte")]
    BadHex {
        /// The text.
        text: String,
    },
    /// Not a weight.
    #[error("{text:?} is not a weight: write auto, or a number from 0 to {}", u64::MAX)]
    BadWeight {
        /// The text.
        text: String,
    },
    /// A condition is unusable.
    #[error(transparent)]
    Condition(#[from] ConditionError),
    /// 2^64 objects have been made.
    #[error("all ids have been given: start a new policy")]
    IdsExhausted,
}

/// Why bytes are not a policy document.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// Not a document at all, or one with missing, unknown or unusable parts.
    #[error("the policy document cannot be read: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// Written by a version of Carnet with another format.
    #[error(
        "the policy document has format {found}, and this version of Carnet reads format {}: use \
         the version that wrote it",
        FORMAT
    )]
    UnknownFormat {
        /// The document's format.
        found: u32,
    },
    /// An id or handle that is 0, not below the next one, or given twice.
    #[error("the policy document is damaged: the number {number} is out of order or given twice")]
    BadNumber {
        /// The number.
        number: u64,
    },
    /// Readable, but not whole.
    #[error("the policy document is damaged: {0}")]
    Broken(#[from] PolicyError),
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            format: FORMAT,
            next_id: 1,
            providers: Vec::new(),
            sublayers: Vec::new(),
            services: Vec::new(),
            filters: Vec::new(),
        }
    }
}

impl Policy {
    /// An empty policy.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`DocumentError`], if this is not a whole document in the known [`FORMAT`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        // Before all else, since everything else may look different in another format.
        let Head { format: found } = serde_json::from_slice(bytes)?;
        if found != FORMAT {
            return Err(DocumentError::UnknownFormat { found });
        }
        let policy: Self = serde_json::from_slice(bytes)?;
        policy.check()?;
        Ok(policy)
    }

    /// Writes the document.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Cannot fail: the document has no maps with keys other than strings, and writing to
        // memory does not fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The providers, oldest first.
    pub fn providers(&self) -> &[Provider] {
        &self.providers
    }

    /// The sublayers, oldest first.
    pub fn sublayers(&self) -> &[Sublayer] {
        &self.sublayers
    }

    /// The services, oldest first: the order of their slots.
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// The filters, oldest first.
    pub fn filters(&self) -> &[Filter] {
        &self.filters
    }

    /// The sublayers in the order in which they are consulted.
    pub fn sublayers_in_order(&self) -> Vec<&Sublayer> {
        let mut order: Vec<_> = self.sublayers.iter().collect();
        order.sort_by_key(|sublayer| (core::cmp::Reverse(sublayer.weight), sublayer.id));
        order
    }

    /// The provider with this name or id.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn provider(&self, key: &str) -> Result<&Provider, PolicyError> {
        find(&self.providers, key).map(|at| &self.providers[at])
    }

    /// The sublayer with this name or id.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn sublayer(&self, key: &str) -> Result<&Sublayer, PolicyError> {
        find(&self.sublayers, key).map(|at| &self.sublayers[at])
    }

    /// The service with this name or id.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn service(&self, key: &str) -> Result<&Service, PolicyError> {
        find(&self.services, key).map(|at| &self.services[at])
    }

    /// The service with this redirect handle.
    pub fn service_by_handle(&self, handle: u64) -> Option<&Service> {
        self.services.iter().find(|service| service.handle == handle)
    }

    /// The filter with this name or id.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn filter(&self, key: &str) -> Result<&Filter, PolicyError> {
        find(&self.filters, key).map(|at| &self.filters[at])
    }

    /// The filter with this id.
    pub fn filter_by_id(&self, id: u64) -> Option<&Filter> {
        // Filters are added at the end with growing ids.
        let at = self.filters.binary_search_by_key(&id, |filter| filter.id).ok()?;
        self.filters.get(at)
    }

    /// Adds a provider.
    ///
    /// # Errors
    /// [`PolicyError::BadName`], [`PolicyError::NameTaken`], [`PolicyError::IdsExhausted`].
    pub fn add_provider(
        &mut self,
        name: &str,
        description: &str,
    ) -> Result<&Provider, PolicyError> {
        check_new_name(&self.providers, name)?;
        let [id] = self.take_ids()?;
        let description = description.to_owned();
        Ok(append(&mut self.providers, Provider { id, name: name.to_owned(), description }))
    }

    /// Adds a sublayer of `provider` (name or id).
    ///
    /// # Errors
    /// As for [`Policy::add_provider`], and [`PolicyError::NotFound`] for the provider.
    pub fn add_sublayer(
        &mut self,
        name: &str,
        provider: &str,
        weight: u16,
    ) -> Result<&Sublayer, PolicyError> {
        check_new_name(&self.sublayers, name)?;
        let provider = self.provider(provider)?.name.clone();
        let [id] = self.take_ids()?;
        Ok(append(&mut self.sublayers, Sublayer { id, name: name.to_owned(), provider, weight }))
    }

    /// Adds a service and gives it a redirect handle.
    ///
    /// # Errors
    /// As for [`Policy::add_provider`]; [`PolicyError::NotFound`] for the provider or a trusted
    /// service; [`PolicyError::TrustsItself`]; [`PolicyError::TooManyServices`];
    /// [`PolicyError::NoCgroup`]; [`PolicyError::CgroupTaken`].
    pub fn add_service(&mut self, new: NewService) -> Result<&Service, PolicyError> {
        check_new_name(&self.services, &new.name)?;
        if self.services.len() >= MAX_SERVICES as usize {
            return Err(PolicyError::TooManyServices);
        }
        let provider = self.provider(&new.provider)?.name.clone();
        check_cgroup(&self.services, &new.cgroup)?;
        let trust = self.resolve_trust(&new.name, new.trust)?;
        let [id, handle] = self.take_ids()?;
        let NewService {
            name, cgroup, on_failure, unmodified, listen_port, tproxy, gateway, ..
        } = new;
        let service = Service {
            id,
            handle,
            name,
            provider,
            cgroup,
            on_failure,
            trust,
            unmodified,
            listen_port,
            tproxy,
            gateway,
        };
        Ok(append(&mut self.services, service))
    }

    /// Changes whom a service (name or id) trusts.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`] for the service or a trusted one, [`PolicyError::TrustsItself`].
    pub fn set_trust(&mut self, service: &str, trust: Trust) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        self.services[at].trust = self.resolve_trust(&self.services[at].name, trust)?;
        Ok(&self.services[at])
    }

    /// Changes what happens while a service (name or id) has no live listener.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn set_on_failure(
        &mut self,
        service: &str,
        on_failure: FailurePolicy,
    ) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        self.services[at].on_failure = on_failure;
        Ok(&self.services[at])
    }

    /// Changes whether the program of a service (name or id) knows nothing of redirect records.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn set_unmodified(
        &mut self,
        service: &str,
        unmodified: bool,
    ) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        self.services[at].unmodified = unmodified;
        Ok(&self.services[at])
    }

    /// Changes at which port the program of a service (name or id) takes flows.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn set_listen_port(
        &mut self,
        service: &str,
        port: Option<NonZeroU16>,
    ) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        self.services[at].listen_port = port;
        Ok(&self.services[at])
    }

    /// Changes whether the program of a service (name or id) asks `getsockname()` for the
    /// destination.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn set_tproxy(&mut self, service: &str, tproxy: bool) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        self.services[at].tproxy = tproxy;
        Ok(&self.services[at])
    }

    /// Changes whether a service (name or id) may take over flows of other hosts.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn set_gateway(&mut self, service: &str, gateway: bool) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        self.services[at].gateway = gateway;
        Ok(&self.services[at])
    }

    /// Changes the cgroup in which a service (name or id) runs, for one that was made anew.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`], [`PolicyError::NoCgroup`], [`PolicyError::CgroupTaken`].
    pub fn set_cgroup(
        &mut self,
        service: &str,
        cgroup: CgroupRef,
    ) -> Result<&Service, PolicyError> {
        let at = find(&self.services, service)?;
        let (before, rest) = self.services.split_at(at);
        check_cgroup(before.iter().chain(&rest[1..]), &cgroup)?;
        self.services[at].cgroup = cgroup;
        Ok(&self.services[at])
    }

    /// Adds a filter.
    ///
    /// # Errors
    /// As for [`Policy::add_provider`]; [`PolicyError::NotFound`] for the sublayer or the service;
    /// [`PolicyError::Condition`].
    pub fn add_filter(&mut self, new: NewFilter) -> Result<&Filter, PolicyError> {
        let NewFilter { name, sublayer, weight, conditions, mut action } = new;
        if let Some(name) = &name {
            check_new_name(&self.filters, name)?;
        }
        conditions.check()?;
        let sublayer = self.sublayer(&sublayer)?.name.clone();
        if let FilterAction::Redirect { service, .. } = &mut action {
            *service = self.service(service)?.name.clone();
        }
        let [id] = self.take_ids()?;
        let filter = Filter { id, name, sublayer, weight, conditions, action };
        Ok(append(&mut self.filters, filter))
    }

    /// Removes a provider (name or id) that nothing refers to.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`], [`PolicyError::InUse`].
    pub fn remove_provider(&mut self, key: &str) -> Result<Provider, PolicyError> {
        let at = find(&self.providers, key)?;
        let name = &self.providers[at].name;
        refuse_if_used(Kind::Provider, name, &self.sublayers, |s| s.provider == *name)?;
        refuse_if_used(Kind::Provider, name, &self.services, |s| s.provider == *name)?;
        Ok(self.providers.remove(at))
    }

    /// Removes a sublayer (name or id) that nothing refers to.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`], [`PolicyError::InUse`].
    pub fn remove_sublayer(&mut self, key: &str) -> Result<Sublayer, PolicyError> {
        let at = find(&self.sublayers, key)?;
        let name = &self.sublayers[at].name;
        refuse_if_used(Kind::Sublayer, name, &self.filters, |f| f.sublayer == *name)?;
        Ok(self.sublayers.remove(at))
    }

    /// Removes a service (name or id) that nothing refers to. Its handle is never given again.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`], [`PolicyError::InUse`].
    pub fn remove_service(&mut self, key: &str) -> Result<Service, PolicyError> {
        let at = find(&self.services, key)?;
        let name = &self.services[at].name;
        let redirects = |filter: &Filter| match &filter.action {
            FilterAction::Redirect { service, .. } => service == name,
            FilterAction::Permit { .. } | FilterAction::Block { .. } => false,
        };
        refuse_if_used(Kind::Service, name, &self.filters, redirects)?;
        let trusts = |other: &Service| match &other.trust {
            Trust::Services(names) => names.contains(name),
            Trust::None | Trust::All => false,
        };
        refuse_if_used(Kind::Service, name, &self.services, trusts)?;
        Ok(self.services.remove(at))
    }

    /// Removes a filter (name or id).
    ///
    /// # Errors
    /// [`PolicyError::NotFound`].
    pub fn remove_filter(&mut self, key: &str) -> Result<Filter, PolicyError> {
        let at = find(&self.filters, key)?;
        Ok(self.filters.remove(at))
    }

    /// The next `N` numbers of the one counter that ids and handles come from.
    fn take_ids<const N: usize>(&mut self) -> Result<[u64; N], PolicyError> {
        let first = self.next_id;
        self.next_id = first.checked_add(N as u64).ok_or(PolicyError::IdsExhausted)?;
        Ok(core::array::from_fn(|n| first + n as u64))
    }

    /// Puts names for what may be ids, and checks that they lead somewhere.
    fn resolve_trust(&self, truster: &str, trust: Trust) -> Result<Trust, PolicyError> {
        let Trust::Services(keys) = trust else {
            return Ok(trust);
        };
        let mut names = BTreeSet::new();
        for key in keys {
            if key == truster {
                return Err(PolicyError::TrustsItself { name: key });
            }
            let name = &self.service(&key)?.name;
            if name == truster {
                return Err(PolicyError::TrustsItself { name: name.clone() });
            }
            names.insert(name.clone());
        }
        Ok(Trust::Services(names.into_iter().collect()))
    }

    /// Checks a document that was read: what the methods above ensure of one that was built.
    fn check(&self) -> Result<(), DocumentError> {
        let mut numbers = BTreeSet::new();
        let ids = self.providers.iter().map(|o| o.id).chain(self.sublayers.iter().map(|o| o.id));
        let ids = ids.chain(self.services.iter().flat_map(|o| [o.id, o.handle]));
        for number in ids.chain(self.filters.iter().map(|o| o.id)) {
            if number == 0 || number >= self.next_id || !numbers.insert(number) {
                return Err(DocumentError::BadNumber { number });
            }
        }
        if let Some(pair) = self.filters.windows(2).find(|pair| pair[0].id >= pair[1].id) {
            return Err(DocumentError::BadNumber { number: pair[1].id });
        }
        check_names(&self.providers)?;
        check_names(&self.sublayers)?;
        check_names(&self.services)?;
        check_names(&self.filters)?;
        if self.services.len() > MAX_SERVICES as usize {
            return Err(PolicyError::TooManyServices.into());
        }
        for sublayer in &self.sublayers {
            check_reference(&self.providers, &sublayer.provider)?;
        }
        for (at, service) in self.services.iter().enumerate() {
            check_reference(&self.providers, &service.provider)?;
            check_cgroup(&self.services[..at], &service.cgroup)?;
            if let Trust::Services(names) = &service.trust {
                names.iter().try_for_each(|name| check_reference(&self.services, name))?;
                if names.contains(&service.name) {
                    return Err(PolicyError::TrustsItself { name: service.name.clone() }.into());
                }
            }
        }
        for filter in &self.filters {
            check_reference(&self.sublayers, &filter.sublayer)?;
            if let FilterAction::Redirect { service, .. } = &filter.action {
                check_reference(&self.services, service)?;
            }
            filter.conditions.check().map_err(PolicyError::from)?;
        }
        Ok(())
    }
}

/// What the four kinds of object have in common.
trait Object {
    const KIND: Kind;
    fn id(&self) -> u64;
    fn name(&self) -> Option<&str>;
}

macro_rules! objects {
    ($($kind:ident => $name:expr),*) => {$(
        impl Object for $kind {
            const KIND: Kind = Kind::$kind;

            fn id(&self) -> u64 {
                self.id
            }

            fn name(&self) -> Option<&str> {
                let name: fn(&Self) -> Option<&str> = $name;
                name(self)
            }
        }
    )*};
}

objects! {
    Provider => |provider| Some(&provider.name),
    Sublayer => |sublayer| Some(&sublayer.name),
    Service => |service| Some(&service.name),
    Filter => |filter| filter.name.as_deref()
}

/// The index of the object with this name or id.
fn find<T: Object>(objects: &[T], key: &str) -> Result<usize, PolicyError> {
    // Names are never digits alone.
    let found = match key.parse::<u64>() {
        Ok(id) => objects.iter().position(|object| object.id() == id),
        Err(_) => objects.iter().position(|object| object.name() == Some(key)),
    };
    found.ok_or_else(|| PolicyError::NotFound { kind: T::KIND, key: key.to_owned() })
}

fn append<T>(objects: &mut Vec<T>, object: T) -> &T {
    let at = objects.len();
    objects.push(object);
    &objects[at]
}

fn check_new_name<T: Object>(objects: &[T], name: &str) -> Result<(), PolicyError> {
    check_name(name)?;
    if objects.iter().any(|object| object.name() == Some(name)) {
        return Err(PolicyError::NameTaken { kind: T::KIND, name: name.to_owned() });
    }
    Ok(())
}

fn check_names<T: Object>(objects: &[T]) -> Result<(), PolicyError> {
    let mut names = BTreeSet::new();
    for name in objects.iter().filter_map(Object::name) {
        check_name(name)?;
        if !names.insert(name) {
            return Err(PolicyError::NameTaken { kind: T::KIND, name: name.to_owned() });
        }
    }
    Ok(())
}

/// Checks that there is an object with exactly this name.
fn check_reference<T: Object>(objects: &[T], name: &str) -> Result<(), PolicyError> {
    if objects.iter().any(|object| object.name() == Some(name)) {
        return Ok(());
    }
    Err(PolicyError::NotFound { kind: T::KIND, key: name.to_owned() })
}

fn check_name(name: &str) -> Result<(), PolicyError> {
    let starts = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let follows = |byte: &u8| starts(byte) || matches!(byte, b'.' | b'-');
    let bytes = name.as_bytes();
    let good = bytes.len() <= MAX_NAME
        && bytes.first().is_some_and(starts)
        && bytes.iter().all(follows)
        && !bytes.iter().all(u8::is_ascii_digit);
    if good { Ok(()) } else { Err(PolicyError::BadName { name: name.to_owned() }) }
}

fn check_cgroup<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    cgroup: &CgroupRef,
) -> Result<(), PolicyError> {
    if cgroup.id == 0 {
        return Err(PolicyError::NoCgroup { path: cgroup.path.clone() });
    }
    match services.into_iter().find(|service| service.cgroup.id == cgroup.id) {
        Some(service) => Err(PolicyError::CgroupTaken {
            path: cgroup.path.clone(),
            service: service.name.clone(),
        }),
        None => Ok(()),
    }
}

fn refuse_if_used<U: Object>(
    kind: Kind,
    name: &str,
    users: &[U],
    uses: impl Fn(&U) -> bool,
) -> Result<(), PolicyError> {
    let Some(user) = users.iter().find(|user| uses(user)) else {
        return Ok(());
    };
    Err(PolicyError::InUse {
        kind,
        name: name.to_owned(),
        user_kind: U::KIND,
        user: user.name().map_or_else(|| user.id().to_string(), ToOwned::to_owned),
    })
}

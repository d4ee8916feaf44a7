//! What the demonstration shows: the facts, for JSON and for the page for people.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::client::Refusal;

/// JSON of `demo`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Version of Carnet.
    pub(super) version: &'static str,
    /// Release of the kernel.
    pub(super) kernel: String,
    /// Addresses of the network namespace where the application and the services run.
    pub(super) client: [IpAddr; 2],
    /// Addresses of the network namespace where the destination is.
    pub(super) destination: [IpAddr; 2],
    /// Name of the host that the destination's servers are.
    pub(super) host: &'static str,
    /// The services, in the operator's order.
    pub(super) services: Vec<Service>,
    /// What was shown, part by part.
    pub(super) parts: Vec<Part>,
    /// What of the demonstration could not be removed.
    pub(super) left_behind: Vec<String>,
    /// Whether everything came as it should, and nothing is left behind.
    pub(super) passed: bool,
}

/// Names of a vendor's objects.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Vendor {
    /// Its provider.
    pub(super) provider: &'static str,
    /// What the provider is called among people.
    pub(super) title: &'static str,
    /// Its sublayer.
    pub(super) sublayer: &'static str,
    /// The sublayer's weight.
    pub(super) weight: u16,
    /// Its service.
    pub(super) service: &'static str,
    /// The filter that redirects to the service.
    pub(super) filter: &'static str,
}

/// A service as it was started first.
#[derive(Debug, Serialize)]
pub(super) struct Service {
    #[serde(flatten)]
    pub(super) vendor: Vendor,
    /// Its process.
    pub(super) pid: u32,
    /// Where it listens.
    pub(super) listeners: Vec<SocketAddr>,
}

/// A part: flows under the same circumstances.
#[derive(Debug, Serialize)]
pub(super) struct Part {
    /// What it shows.
    pub(super) title: &'static str,
    /// The flows, in the order in which they were made.
    pub(super) flows: Vec<Flow>,
}

/// A connection of the application, and what became of it.
#[derive(Debug, Serialize)]
pub(super) struct Flow {
    /// What is special about it.
    pub(super) title: &'static str,
    /// What the application asked for.
    pub(super) url: String,
    /// Where it connected to.
    pub(super) address: SocketAddr,
    /// The application.
    pub(super) application: Application,
    /// What happened, in order.
    pub(super) steps: Vec<Step>,
    /// What the application got.
    pub(super) outcome: Outcome,
    /// What getpeername() told the application.
    pub(super) peer: Option<SocketAddr>,
    /// How many connections reached the destination.
    pub(super) reached: usize,
    /// What is claimed of the flow, and whether it is so.
    pub(super) checks: Vec<Check>,
}

/// The application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Application {
    /// Its process id.
    pub(super) pid: u32,
    /// Its command name.
    pub(super) command: String,
    /// Its executable.
    pub(super) executable: PathBuf,
}

/// One thing that happened.
#[derive(Debug, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub(super) enum Step {
    /// Somebody connected to the flow's destination: as the engine reported it.
    Connect(Connect),
    /// A service looked at the flow: as the service logged it, in the place where it got the flow.
    Inspect(Inspected),
}

/// A connect, and what the engine did with it.
#[derive(Debug, Serialize)]
pub(super) struct Connect {
    /// Who connected: the application's command name, or a service's name.
    pub(super) process: String,
    /// Its process id.
    pub(super) pid: u32,
    /// What became of it.
    #[serde(flatten)]
    pub(super) verdict: Verdict,
    /// Whether it carried the flow's redirect record.
    pub(super) record: Carried,
    /// The flow, as the engine counts them; none for a connect that was refused at once.
    pub(super) flow: Option<u64>,
    /// Redirected legs so far.
    pub(super) legs: u32,
    /// The services that were passed over because they were not there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) skipped: Vec<String>,
}

/// Whether a connect carried a redirect record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Carried {
    /// The application's own: there is none yet.
    None,
    /// A service's, with the record.
    Set,
    /// A service's, that forgot the record.
    Forgotten,
}

/// What became of a connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub(super) enum Verdict {
    /// It was sent to a service.
    Redirected {
        /// The service.
        service: String,
        /// The filter that said so.
        filter: String,
    },
    /// It went on to the destination.
    Onward,
    /// It was refused.
    Refused(Why),
}

/// Why a connect was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub(super) enum Why {
    /// The service that was to have it is not there.
    ServiceUnavailable {
        /// The service.
        service: String,
    },
    /// The guard ended a loop.
    Loop {
        /// The service that forgot the record.
        service: String,
    },
    /// A filter said so.
    Filter,
}

/// A line of a service's log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Inspected {
    /// The service.
    pub(super) service: String,
    /// The flow.
    pub(super) flow: Option<u64>,
    /// The place of the service in the flow's way, from 1.
    pub(super) hops: Option<u32>,
    /// The application's process id.
    pub(super) pid: Option<u32>,
    /// The application's command name.
    pub(super) command: Option<String>,
    /// The application's executable.
    pub(super) executable: Option<PathBuf>,
    /// Where the application wanted to go.
    pub(super) destination: Option<SocketAddr>,
    /// The protocol.
    pub(super) protocol: String,
    /// The host that was asked for.
    pub(super) host: Option<String>,
    /// The application protocols that were offered over TLS.
    pub(super) alpn: Vec<String>,
    /// The request line of HTTP.
    pub(super) request: Option<String>,
    /// Bytes relayed to the destination.
    pub(super) bytes_up: u64,
    /// Bytes relayed to the application.
    pub(super) bytes_down: u64,
    /// Why it ended, if not because both sides were done.
    pub(super) ended: Option<String>,
}

/// What the application got.
#[derive(Debug, Serialize)]
#[serde(tag = "got", rename_all = "snake_case")]
pub(super) enum Outcome {
    /// A response.
    Response {
        /// Its status.
        status: u16,
        /// Length of its body, in bytes.
        bytes: usize,
        /// Whether it is the same, to the byte, as without Carnet.
        identical: bool,
    },
    /// An error.
    Error(Refusal),
}

/// A claim, and whether it holds.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    /// The claim.
    pub(super) claim: String,
    /// Whether it holds.
    pub(super) holds: bool,
}

impl Report {
    /// The claims that do not hold, each with what it is about.
    pub(super) fn failed(&self) -> impl Iterator<Item = String> {
        let flows = self.parts.iter().flat_map(|part| &part.flows);
        let claims = flows.flat_map(|flow| {
            let failed = flow.checks.iter().filter(|check| !check.holds);
            failed.map(move |check| format!("{}: not so: {}", flow.title, check.claim))
        });
        claims.chain(self.left_behind.iter().map(|name| format!("left behind: {name}")))
    }
}

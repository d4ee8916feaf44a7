//! The demonstration's application: makes one request over HTTP or TLS and says what it saw.
//!
//! It is a process of its own (`carnet demo --client PLAN`) since a cgroup holds whole processes.
//! It knows nothing of Carnet: plain sockets, a usual HTTP library, a usual TLS library.

use std::{
    error::Error, ffi::CString, io, net::SocketAddr, str::FromStr, sync::Arc, time::Duration,
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    runtime::Builder,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring::default_provider,
        pki_types::{CertificateDer, ServerName},
    },
};

use super::destination::ALPN;
use crate::{failure::Failure, session::Session};

/// The application's command name.
pub(super) const NAME: &str = "demo-client";
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the application is to do; JSON on its command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Where to connect to. An IPv4-mapped IPv6 address is reached over an IPv6 socket.
    pub(super) address: SocketAddr,
    /// Name of the host that is asked for.
    pub(super) host: String,
    /// The only certificate that is trusted, in DER; with it the request goes over TLS.
    pub(super) authority: Option<Vec<u8>>,
}

impl FromStr for Plan {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

/// What the application saw; JSON on its standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seen {
    /// What getpeername() said once it was connected.
    pub(super) peer: Option<SocketAddr>,
    /// What came of the request.
    pub(super) result: Result<Answer, Refusal>,
}

/// A response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    /// Its status.
    pub(super) status: u16,
    /// Its header fields, in order.
    pub(super) headers: Vec<(String, String)>,
    /// Its body.
    pub(super) body: String,
}

/// Why there is no response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refusal {
    /// Which call failed.
    pub(super) at: Stage,
    /// The errno value, if the system refused.
    pub(super) errno: Option<i32>,
    /// What the library or the system said.
    pub(super) message: String,
}

/// The parts of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Stage {
    /// connect().
    Connect,
    /// The TLS handshake.
    Tls,
    /// The HTTP request and its response.
    Http,
}

/// Is the application.
pub(super) fn run(plan: &Plan, session: &mut Session<'_>) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::because("starting the application", &error);
    let name = CString::new(NAME).map_err(|error| failed(error.into()))?;
    rustix::thread::set_name(&name).map_err(|errno| failed(errno.into()))?;
    let seen = carry_out(plan).map_err(failed)?;
    Ok(session.console.json_line(&seen)?)
}

/// Makes the request from the calling thread's network namespace.
///
/// # Errors
/// Where not even a socket can be waited for.
pub(super) fn carry_out(plan: &Plan) -> io::Result<Seen> {
    let mut peer = None;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let request = request(plan, &mut peer);
        timeout(PATIENCE, request).await.unwrap_or_else(|_| {
            let message = format!("no response in {} s", PATIENCE.as_secs());
            Err(Refusal { at: Stage::Http, errno: None, message })
        })
    });
    Ok(Seen { peer, result })
}

async fn request(plan: &Plan, peer: &mut Option<SocketAddr>) -> Result<Answer, Refusal> {
    let connected = TcpStream::connect(plan.address).await;
    let stream = connected.map_err(|error| refusal(Stage::Connect, &error))?;
    // It has no peer any more if it has been reset already; the request says so.
    *peer = stream.peer_addr().ok();
    match &plan.authority {
        None => get(plan, stream).await,
        Some(authority) => {
            let failed = |error: &(dyn Error + 'static)| refusal(Stage::Tls, error);
            let config = trusting(authority).map_err(|error| failed(&error))?;
            let name = ServerName::try_from(plan.host.clone()).map_err(|error| failed(&error))?;
            let connector = TlsConnector::from(Arc::new(config));
            let stream = connector.connect(name, stream).await.map_err(|error| failed(&error))?;
            get(plan, stream).await
        }
    }
}

/// TLS as an application uses it, except that it trusts one authority only.
fn trusting(authority: &[u8]) -> Result<ClientConfig, tokio_rustls::rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(authority.to_vec()))?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

async fn get(
    plan: &Plan,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<Answer, Refusal> {
    let failed = |error: &(dyn Error + 'static)| refusal(Stage::Http, error);
    let request = Request::get("/")
        .header(header::HOST, &plan.host)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| failed(&error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    // What goes wrong with the connection, the request or its response fails with.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
    let status = response.status().as_u16();
    let headers = response
        .headers()
        .iter()
        .map(|(name, value)| {
            (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        })
        .collect();
    let body = response.into_body().collect().await.map_err(|error| failed(&error))?;
    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    Ok(Answer { status, headers, body })
}

/// A refusal of the error that is behind `error`, if one of the system's is.
fn refusal(at: Stage, error: &(dyn Error + 'static)) -> Refusal {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let system = error.downcast_ref::<io::Error>();
        if let Some(error) = system
            && let Some(errno) = error.raw_os_error()
        {
            return Refusal { at, errno: Some(errno), message: without_number(error) };
        }
        // An I/O error passes over what it wraps when asked for its source.
        cause = match system.and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    Refusal { at, errno: None, message: error.to_string() }
}

/// What the system says of an error, without the number that Rust adds.
fn without_number(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_error_is_found_behind_others() {
        let inner = io::Error::from_raw_os_error(111);
        let found = refusal(Stage::Connect, &io::Error::other(inner));
        let message = "Connection refused".to_owned();
        assert_eq!(found, Refusal { at: Stage::Connect, errno: Some(111), message });
        let found = refusal(Stage::Tls, &io::Error::other("bad certificate"));
        assert_eq!((found.errno, found.message.as_str()), (None, "bad certificate"));
    }

    #[test]
    fn a_plan_survives_the_command_line() {
        let plan = Plan {
            address: "[::ffff:192.0.2.2]:443".parse().unwrap(),
            host: "shop.example".into(),
            authority: Some(vec![0x30, 0x82]),
        };
        let text = serde_json::to_string(&plan).unwrap();
        let again: Plan = text.parse().unwrap();
        assert_eq!(again.address, plan.address);
        assert_eq!(again.authority, plan.authority);
    }
}

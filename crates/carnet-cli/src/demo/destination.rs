//! The demonstration's destination: an HTTP server and a TLS server with a certificate of an
//! authority that exists in memory only.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use carnet_testbed::{NetworkNamespace, Topology};
use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    runtime::Builder,
    sync::oneshot,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring::default_provider,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use crate::failure::Failure;

/// Name of the host that both servers are.
pub(super) const HOST: &str = "shop.example";
/// Port of the HTTP server.
pub(super) const HTTP: u16 = 80;
/// Port of the TLS server.
pub(super) const HTTPS: u16 = 443;
/// The application protocol over TLS.
pub(super) const ALPN: &[u8] = b"http/1.1";

/// How many lines a response has.
const LINES: u32 = 1000;

/// Both servers, on both addresses of the destination; they end when this is dropped.
pub(super) struct Destination {
    /// Certificate of the authority that vouches for the TLS server, in DER.
    pub(super) authority: Vec<u8>,
    accepted: Arc<AtomicUsize>,
    /// Dropping the sender is the request to stop.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Destination {
    /// Starts both servers in a network namespace that has the destination's addresses.
    pub(super) fn start_in(namespace: &NetworkNamespace) -> Result<Self, Failure> {
        let (authority, tls) = identity()
            .map_err(|error| Failure::because("making the TLS server's identity", &*error))?;
        let failed = |error| Failure::because("starting the destination's servers", &error);
        let listeners = namespace.run(listen)?.map_err(failed)?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let accepted = Arc::new(AtomicUsize::new(0));
        let (stop, stopped) = oneshot::channel();
        {
            let _entered = runtime.enter();
            for listener in listeners {
                let over_tls = listener.local_addr().map_err(failed)?.port() == HTTPS;
                let listener = TcpListener::from_std(listener).map_err(failed)?;
                let tls = over_tls.then(|| tls.clone());
                runtime.spawn(accept(listener, tls, Arc::clone(&accepted)));
            }
        }
        let thread = thread::Builder::new()
            .name("destination".into())
            // The sender never sends: its end is the request to stop. With the runtime go all
            // listeners and connections.
            .spawn(move || drop(runtime.block_on(stopped)))
            .map_err(failed)?;
        Ok(Self { authority, accepted, stop: Some(stop), thread: Some(thread) })
    }

    /// How many connections have come so far.
    pub(super) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed.
            let _ = thread.join();
        }
    }
}

fn listen() -> io::Result<Vec<StdListener>> {
    let mut listeners = Vec::new();
    for port in [HTTP, HTTPS] {
        let addresses: [SocketAddr; 2] =
            [(Topology::DESTINATION_V4, port).into(), (Topology::DESTINATION_V6, port).into()];
        for address in addresses {
            let listener = StdListener::bind(address)?;
            listener.set_nonblocking(true)?;
            listeners.push(listener);
        }
    }
    Ok(listeners)
}

/// An authority's certificate in DER, and a TLS server with a certificate that it has signed.
fn identity() -> Result<(Vec<u8>, TlsAcceptor), Box<dyn std::error::Error>> {
    // A device whose clock has never been set gets along, too.
    let long_ago = date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = long_ago;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name.push(DnType::CommonName, "The demonstration's own authority");
    let key = KeyPair::generate()?;
    let authority = params.self_signed(&key)?.der().to_vec();
    let issuer = Issuer::new(params, key);

    let mut params = CertificateParams::new([HOST.to_owned()])?;
    params.not_before = long_ago;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?.der().clone();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok((authority, Arc::new(config).into()))
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, accepted: Arc<AtomicUsize>) {
    loop {
        // What accept() can report is about one connection that is gone already.
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        accepted.fetch_add(1, Ordering::SeqCst);
        let tls = tls.clone();
        tokio::spawn(async move {
            match tls {
                None => serve(stream).await,
                Some(tls) => {
                    // A client that breaks off has its own say in the demonstration.
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(stream).await;
                    }
                }
            }
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
    let connection = http1::Builder::new()
        // Responses are compared, so they say nothing of when and through whom they came.
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service_fn(respond));
    // See `accept`.
    let _ = connection.await;
}

async fn respond(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let (host, path) = (host.unwrap_or("nobody"), request.uri().path());
    let body: String = (1..=LINES).map(|line| format!("{line}: {path} of {host}\n")).collect();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    let text = header::HeaderValue::from_static("text/plain");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::client::{Plan, Stage, carry_out};

    #[test]
    fn both_servers_answer_an_application_that_trusts_the_authority() {
        carnet_testbed::require_root().unwrap();
        let topology = Topology::client_and_destination().unwrap();
        let destination = Destination::start_in(&topology.destination).unwrap();
        let request = |address: SocketAddr, authority: Option<&[u8]>| {
            let authority = authority.map(<[u8]>::to_vec);
            let plan = Plan { address, host: HOST.into(), authority };
            topology.client.run(|| carry_out(&plan)).unwrap().unwrap()
        };
        let plain = request((Topology::DESTINATION_V4, HTTP).into(), None);
        let answer = plain.result.unwrap();
        assert_eq!(answer.status, 200);
        assert_eq!(answer.body.lines().count(), LINES as usize);
        assert!(answer.body.ends_with("1000: / of shop.example\n"), "{}", answer.body);
        for ip in [Topology::DESTINATION_V4.to_ipv6_mapped(), Topology::DESTINATION_V6] {
            let over_tls = request((ip, HTTPS).into(), Some(&destination.authority));
            assert_eq!(over_tls.peer, Some((ip, HTTPS).into()));
            assert_eq!(over_tls.result.unwrap(), answer);
        }
        assert_eq!(destination.accepted(), 3);

        let (stranger, _) = identity().unwrap();
        let distrusting = request((Topology::DESTINATION_V4, HTTPS).into(), Some(&stranger));
        assert_eq!(distrusting.result.unwrap_err().at, Stage::Tls);
    }
}

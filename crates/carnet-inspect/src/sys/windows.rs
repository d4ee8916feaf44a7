//! Windows: a callout driver of the filtering platform redirects, the console tells what to do.

use crate::chain::Chain;
use crate::origin::{App, CarnetSource, FlowSource, Origin};
use crate::relay::{Fault, Leg};
use crate::say;
use crate::service::DatagramLimits;
use anyhow::Result;
use carnet::{Error, PortableRecord};
use socket2::Socket;
use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpStream;
use tokio::signal::windows::{CtrlBreak, CtrlC, CtrlClose, CtrlShutdown};
use tokio::signal::windows::{ctrl_break, ctrl_c, ctrl_close, ctrl_shutdown};

/// The options that only Windows has: there are none.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {}

impl Options {
    /// Says what a callout driver has to know of this process. Nothing is to be registered: the
    /// driver names the service, not the service itself (contract C15).
    pub(crate) fn begin(
        &self,
        _listeners: &[TcpListener],
        _datagrams: &[UdpSocket],
    ) -> Result<Option<File>> {
        let id = std::process::id();
        say(format_args!("a callout driver has to redirect connections to this process, {id}"));
        say(format_args!("UDP is not served on Windows: have no UDP flows redirected here"));
        Ok(None)
    }

    /// There are no UDP flows: Windows hands their records over with each datagram (contract U1),
    /// which this program does not read.
    pub(crate) fn datagrams(&self) -> Option<DatagramLimits> {
        None
    }

    /// Flows stay on their host: this system gives no records out for others.
    pub(crate) fn chain(&self, _sends_proxy: bool) -> Result<Chain> {
        Ok(Chain::default())
    }

    /// Who tells where connections come from and go to.
    pub(crate) fn source(&self, _chain: &Chain) -> Arc<dyn FlowSource> {
        Arc::new(CalloutSource::default())
    }
}

/// Connections that a callout driver redirected.
#[derive(Debug, Default)]
struct CalloutSource {
    /// Whether it has been said that there is no such driver.
    said: AtomicBool,
}

impl FlowSource for CalloutSource {
    fn origin(&self, accepted: &TcpStream) -> Result<Origin, Error> {
        // A driver can hold an answer back, and this thread with it, until the time limit.
        let origin = tokio::task::block_in_place(|| CarnetSource::default().origin(accepted));
        if let Err(error @ (Error::NotRedirected { .. } | Error::Unsupported { .. })) = &origin
            && !self.said.swap(true, Ordering::Relaxed)
        {
            say(format_args!(
                "a connection came that no callout driver redirected, and was closed ({error}); \
                 others are closed without this message"
            ));
        }
        origin
    }
}

/// Ctrl-C, Ctrl-Break, the end of the console and that of the system.
pub(crate) struct Signals {
    ctrl_c: CtrlC,
    ctrl_break: CtrlBreak,
    close: CtrlClose,
    shutdown: CtrlShutdown,
}

impl Signals {
    /// Installs the handlers. From then on none of these ends the process.
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self {
            ctrl_c: ctrl_c()?,
            ctrl_break: ctrl_break()?,
            close: ctrl_close()?,
            shutdown: ctrl_shutdown()?,
        })
    }

    /// Calls `end` whenever it is told to, for ever. Nothing tells it to read its rules again.
    pub(crate) async fn obey(mut self, end: impl Fn(), _read_rules: impl Fn()) {
        loop {
            tokio::select! {
                _ = self.ctrl_c.recv() => end(),
                _ = self.ctrl_break.recv() => end(),
                _ = self.close.recv() => end(),
                _ = self.shutdown.recv() => end(),
            }
        }
    }
}

/// No such record comes here.
pub(crate) fn app_of(_record: &PortableRecord) -> Option<App> {
    None
}

/// There are no datagrams.
pub(crate) fn enlarge_receive_buffer(_socket: &Socket, _bytes: usize) {}

/// It needs no option here. That of the usual name would let other processes take the address over.
pub(crate) fn reuse_address(_socket: &Socket) -> io::Result<()> {
    Ok(())
}

/// Nothing of the kind: copying goes on.
pub(crate) async fn carry(_leg: &Leg<'_>) -> Result<bool, Fault> {
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_direct_connection_is_not_taken_for_a_redirected_one() {
        let source = Options {}.source(&Chain::default());
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let origin = source.origin(&accepted);
            assert!(
                matches!(origin, Err(Error::NotRedirected { .. } | Error::Unsupported { .. })),
                "{origin:?}"
            );
        }
    }
}

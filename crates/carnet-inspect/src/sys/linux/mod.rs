//! Linux: Carnet's engine or a NAT redirects, signals tell what to do, splice(2) relays.

mod conntrack;
mod privileges;
mod splice;

pub use self::conntrack::ConntrackSource;
pub use self::privileges::{Identity, PrivilegeError};
pub(crate) use self::splice::carry;

use crate::chain::Chain;
use crate::chain::gate::Gate;
use crate::chain::keyring::Keyring;
use crate::origin::{App, CarnetSource, FlowSource};
use crate::proxy_protocol::HeaderSource;
use crate::rules::prefix;
use crate::say;
use crate::service::DatagramLimits;
use anyhow::{Context as _, Result, bail};
use carnet::PortableRecord;
use ipnet::IpNet;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{self, SignalKind, signal};

/// The options that only Linux has.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Take no UDP flows; without this, they come to the same addresses and ports as connections
    #[arg(long)]
    pub no_udp: bool,

    /// End a UDP flow after this long without a datagram
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub udp_idle: Duration,

    /// Serve at most this many UDP flows at once; one more, and those idle for longest give way
    #[arg(long, value_name = "NUMBER", default_value = "8192")]
    pub max_udp_flows: NonZeroU32,

    /// Become this user when the listeners are registered
    #[arg(long, value_name = "NAME|UID[:GID]")]
    pub user: Option<Identity>,

    /// Where to learn the original destination of a connection
    #[arg(long, value_enum, value_name = "SOURCE", default_value_t = Source::Carnet)]
    pub original_destination: Source,

    /// With --original-destination proxy: believe connections from these addresses (repeatable)
    ///
    /// Whoever may connect from there has this program connect to any destination.
    #[arg(long, value_name = "PREFIX", value_parser = prefix, default_values = ["127.0.0.0/8", "::1"])]
    pub proxy_from: Vec<IpNet>,

    /// Carry on chains between hosts: the keys under which hosts seal the records of flows for each other
    ///
    /// With --send-proxy records go out to a gateway on another host. With --original-destination proxy
    /// this is such a gateway (carnet service add --gateway): a connection goes on here past the services
    /// that it has had there, and one without a good record is refused. The file has a key a line, 32 random
    /// bytes in hexadecimal, and is for its owner alone: the first one seals, all of them open. SIGHUP reads
    /// it again.
    #[arg(long, value_name = "FILE")]
    pub chain_key: Option<PathBuf>,

    /// With --original-destination proxy and --chain-key: a connection without a record is a new flow
    #[arg(long, requires = "chain_key")]
    pub chain_optional: bool,

    /// Do not register the listeners and UDP sockets: somebody else does, for example `carnet service register`
    #[arg(long)]
    pub no_register: bool,

    /// Misbehave on purpose: do not set the redirect record, to show what the hop guard does
    #[arg(long, hide_short_help = true, conflicts_with = "original_destination")]
    pub forget_records: bool,

    /// When ready, write a line "ready ADDRESS..." to this descriptor (a pipe or a file)
    ///
    /// The same line goes to the standard error in any case.
    #[arg(long, value_name = "NUMBER")]
    pub ready_fd: Option<u32>,
}

/// Who tells the original destination of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// Carnet's engine, with redirect records and original applications.
    #[default]
    Carnet,
    /// The connection tracker of a NAT (`nft … redirect to`): plain SO_ORIGINAL_DST, no records,
    /// no UDP.
    Conntrack,
    /// The PROXY protocol (version 2), which another proxy sends: no records unless there is a
    /// --chain-key, no UDP, and the listeners are not registered.
    Proxy,
}

impl Options {
    /// Registers the sockets, opens what is told when the service is ready, and drops privileges:
    /// in this order, and before there are any other threads.
    pub(crate) fn begin(
        &self,
        listeners: &[TcpListener],
        datagrams: &[UdpSocket],
    ) -> Result<Option<File>> {
        raise_descriptor_limit();
        if self.original_destination == Source::Carnet && !self.no_register {
            for listener in listeners {
                let address = listener.local_addr()?;
                carnet::register_listener(listener)
                    .with_context(|| format!("listener {address}"))?;
            }
            for socket in datagrams {
                let address = socket.local_addr()?;
                carnet::register_listener(socket).with_context(|| {
                    format!("UDP socket {address} (with --no-udp, UDP flows are left alone)")
                })?;
            }
        }
        let ready = self.ready_fd.map(open_descriptor).transpose()?;
        if let Some(identity) = &self.user {
            identity.assume()?;
        }
        Ok(ready)
    }

    /// What is said of flows that go on at another host. Reads the keys, and asks whether this process
    /// may take such flows over, if it is to.
    pub(crate) fn chain(&self, sends_proxy: bool) -> Result<Chain> {
        let takes = self.original_destination == Source::Proxy;
        if self.chain_optional && !takes {
            bail!("--chain-optional says what comes with --original-destination proxy");
        }
        let Some(path) = &self.chain_key else {
            return Ok(Chain::default());
        };
        match (takes, sends_proxy) {
            (true, true) => bail!(
                "--chain-key takes records with --original-destination proxy, or gives them out \
                 with --send-proxy, not both: the services of this host come between"
            ),
            (false, false) => bail!(
                "--chain-key is for --send-proxy, or for --original-destination proxy: nothing else \
                 goes to another host or comes from one"
            ),
            (false, true) if self.original_destination != Source::Carnet => {
                bail!("--chain-key needs records: leave --original-destination away")
            }
            _ => {}
        }
        let keys = Arc::new(Keyring::open(path)?);
        if !takes {
            return Ok(Chain { keys: Some(keys), gate: None });
        }
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        carnet::may_import_redirect_records(&socket)
            .context("--original-destination proxy with --chain-key")?;
        let gate = Arc::new(Gate::new(Arc::clone(&keys), self.chain_optional));
        Ok(Chain { keys: Some(keys), gate: Some(gate) })
    }

    /// The limits of UDP flows. A NAT tells nothing of them: then there are none.
    pub(crate) fn datagrams(&self) -> Option<DatagramLimits> {
        let wanted = !self.no_udp && self.original_destination == Source::Carnet;
        wanted.then_some(DatagramLimits { flows: self.max_udp_flows, idle: self.udp_idle })
    }

    /// Who tells where flows come from and go to.
    pub(crate) fn source(&self, chain: &Chain) -> Arc<dyn FlowSource> {
        match self.original_destination {
            Source::Carnet => Arc::new(CarnetSource { forget_records: self.forget_records }),
            Source::Conntrack => Arc::new(ConntrackSource),
            Source::Proxy => {
                let (from, gate) = (self.proxy_from.clone(), chain.gate.clone());
                Arc::new(HeaderSource { from, gate })
            }
        }
    }
}

/// Opens what a descriptor of this process refers to, once more.
fn open_descriptor(number: u32) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .open(format!("/proc/self/fd/{number}"))
        .with_context(|| format!("--ready-fd {number}: not the descriptor of a pipe or a file"))
}

/// Allows as many descriptors as the process may have: two sockets and two pipes for each
/// connection are more than the usual limit.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        say(format_args!("the limit of open files could not be raised"));
    }
}

/// SIGTERM, SIGINT and SIGHUP.
pub(crate) struct Signals {
    terminate: unix::Signal,
    interrupt: unix::Signal,
    hangup: unix::Signal,
}

impl Signals {
    /// Installs the handlers. From then on no signal is lost, and none ends the process.
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Calls `end` and `read_rules` as it is told, for ever.
    pub(crate) async fn obey(mut self, end: impl Fn(), read_rules: impl Fn()) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => end(),
                _ = self.interrupt.recv() => end(),
                _ = self.hangup.recv() => read_rules(),
            }
        }
    }
}

/// The application that a record of another host names. All of it is what that host says.
pub(crate) fn app_of(record: &PortableRecord) -> Option<App> {
    Some(record.original_app().into())
}

/// More than the system allows by default is allowed to root alone; less does no harm.
pub(crate) fn enlarge_receive_buffer(socket: &Socket, bytes: usize) {
    if set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        let _ = socket.set_recv_buffer_size(bytes);
    }
}

/// Connections of a listener that has ended may linger at its address.
pub(crate) fn reuse_address(socket: &Socket) -> io::Result<()> {
    socket.set_reuse_address(true)
}

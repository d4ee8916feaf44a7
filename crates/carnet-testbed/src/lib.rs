//! Fixtures for Carnet's tests, benches and demo: what they need of a machine, made for them alone
//! and gone afterwards.
//!
//! - [`NetworkNamespace`], [`connect_veth`] and [`Topology`]: networks of one's own.
//! - [`Cgroup`]: a cgroup of one's own, with whatever runs in it.
//! - [`BpfDirectory`]: a bpffs of one's own for pins.
//! - [`EchoServer`], [`NamedServer`], [`exchange`]: peers that prove who they are and check every
//!   byte; [`PeerClient`] and [`PeerServer`] run the same as child processes, because a cgroup
//!   holds whole processes. [`DatagramServer`], [`datagrams`] and [`DatagramClients`]: the same over
//!   UDP, many clients in one process.
//! - [`Process`]: a child process that does not outlive its owner.
//!
//! Everything cleans up when dropped, as well as it can: a failure to clean up is reported on
//! standard error, never by a panic. No fixture touches the host's network, the root cgroup's
//! processes or an existing bpffs. All of it needs root: call [`require_root`] first, so that a
//! test without root fails in words instead of passing silently.
//!
//! ```no_run
//! use carnet_testbed::{Cgroup, EchoServer, PeerClient, Topology, require_root};
//!
//! # fn main() -> Result<(), carnet_testbed::Error> {
//! require_root()?;
//! let topology = Topology::client_and_destination()?;
//! let cgroup = Cgroup::create("example")?;
//! let address = (Topology::DESTINATION_V4, 0).into();
//! let server = EchoServer::start_in(&topology.destination, [address])?;
//! let reports = PeerClient::new(server.address())
//!     .bytes(1 << 20)
//!     .in_namespace(&topology.client)
//!     .in_cgroup(&cgroup)
//!     .run()?;
//! assert!(reports.iter().all(|report| report.ok));
//! # Ok(())
//! # }
//! ```

mod bpf_directory;
mod cgroup;
mod datagram_server;
pub mod datagrams;
mod error;
pub mod exchange;
pub mod interrupt;
mod mounts;
mod namespace;
mod peer;
mod privilege;
mod process;
mod server;
mod sys;
mod topology;
mod unique;

pub use bpf_directory::BpfDirectory;
pub use cgroup::Cgroup;
pub use datagram_server::{DatagramServer, ReceivedDatagram, answer_of, widen};
pub use error::Error;
pub use namespace::{NetworkNamespace, connect_veth};
pub use peer::{
    ClientPlan, ConnectionReport, DatagramClients, PeerClient, PeerServer, RunningClient, Stage,
    peer_command,
};
pub use privilege::{require_root, run_as};
pub use process::Process;
pub use server::{AcceptedConnection, ConnectionState, EchoServer, NamedServer, name_at};
pub use topology::Topology;

//! Administers Carnet's kernel engine: load, pin, transact policy, list flows, read events.
//!
//! There is no daemon: all state is in the kernel, pinned in a bpffs under one directory per
//! instance ([`Location`]). Every operation locks it, does its work and is done; whatever dies,
//! redirection goes on, and nothing is ever half configured.
//!
//! ```no_run
//! use carnet_engine::{Engine, Error, Location, UpOptions};
//!
//! # fn main() -> Result<(), Error> {
//! let location = Location::new(None, "default")?;
//! let mut engine = Engine::up(&location, &UpOptions::new("/sys/fs/cgroup/app.slice"))?;
//! engine.transact(|policy| {
//!     // policy.add_service(…), policy.add_filter(…)
//!     # let _ = policy;
//!     Ok::<_, Error>(())
//! })?;
//! engine.down()
//! # }
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `location` | where an instance lives, and the locks on it |
//! | `engine` | up, open, upgrade, down |
//! | `transaction` | changing the policy, all of it or not at all |
//! | `tables` | the maps: layouts, sizes, contents |
//! | `keys` | the keys of the records' MACs, and their rotation |
//! | `links` | which program is attached to which cgroup |
//! | `object` | the kernel engine as it was built, and how it is loaded |
//! | `kernel` | where things lie in the running kernel's structures |
//! | `flows`, `events`, `listeners`, `status` | what is going on |
//! | `account` | what became of all redirects |
//! | `existing` | ending connections that a new filter refuses |
//! | `members`, `sockets` | whose flows pass the hooks: cgroups, processes, sockets |
//! | `files`, `namespace`, [`cgroup`] | names of the kernel for what people name |
//! | `netlink` | routes, and numbers of network namespaces |
//! | [`doctor`] | whether Carnet can work here |
//! | `clock` | the clock that the kernel engine uses |
//! | `sys` | system calls for which there is no safe library |

mod account;
mod btf;
pub mod cgroup;
mod clock;
pub mod doctor;
mod engine;
mod error;
mod events;
mod existing;
mod files;
mod flows;
#[cfg(fuzzing)]
pub mod fuzzing;
mod kernel;
mod keys;
mod links;
mod listeners;
mod location;
mod members;
mod mounts;
mod namespace;
mod netlink;
mod object;
mod sockets;
mod status;
mod sys;
mod tables;
mod transaction;

pub use account::{Account, RefusedAccount, TcpAccount, UdpAccount};
pub use engine::{Engine, UpOptions, UpgradeReport};
pub use error::Error;
pub use events::EventReader;
pub use existing::Ended;
pub use flows::{Flow, FlowApp, FlowHop, LegKind};
pub use keys::KeyStatus;
pub use listeners::{Listener, Reach, ServiceSockets};
pub use location::Location;
pub use object::BuildId;
pub use status::{LinkStatus, MapStatus, ProgramStatus, Status, TableStatus};

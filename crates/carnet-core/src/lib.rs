//! Carnet's rules, each of them once.
//!
//! This crate decides; everything else translates. The kernel's hooks run [`classify()`] over BPF
//! maps, `carnet explain` and the tests run the same function over the host's tables
//! (`compile::CompiledPolicy`), so a rule cannot mean two things.
//!
//! | module | what it holds |
//! |---|---|
//! | [`abi`] | the control interface: socket-option level, names, layouts, errno table |
//! | [`access`] | who may do what through it |
//! | [`adoption`] | the records of services that know nothing of records |
//! | [`address`] | endpoints and 128-bit field values |
//! | [`record`] | the redirect record: layout, MAC, verification |
//! | [`portable`] | the record in the form in which it goes to other hosts |
//! | [`key`] | the keys of the MACs: which of them count, and when |
//! | [`chain`] | the four redirect states, trust, the hop guard |
//! | [`table`] | the compiled policy: rows, and the trait over the tables that hold them |
//! | [`arbitration`] | how permits, blocks and redirects of several sublayers combine |
//! | [`classify`](mod@classify) | the decision function |
//! | [`flow`] | what the kernel keeps for a redirected connection |
//! | [`place`] | where it keeps what it finds by the cookies of sockets |
//! | [`guard`] | which flows services hold, for the hop guard |
//! | [`socket`] | which sockets the hooks see |
//! | [`outcome`] | whether what was decided about a connect still holds at its SYN |
//! | [`event`] | what the kernel tells of decisions |
//! | `object` (feature `host`) | the administrator's objects |
//! | `compile` (feature `host`) | objects to tables |
//! | `explain` (feature `host`) | the legs that a flow would make, and why |
//! | `existing` (feature `host`) | which connections that are there a new block ends |
//! | `transaction` (feature `host`) | the steps by which a policy comes into force |
//!
//! The crate is `no_std`, has no I/O, no clock and no unsafe code; it is compiled unchanged for the
//! host and for BPF.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(feature = "host", test))]
extern crate alloc;
#[cfg(test)]
extern crate std;

// The record and the tables are read by user mode as the kernel wrote them.
#[cfg(target_endian = "big")]
compile_error!("Carnet's layouts are little-endian; a big-endian host is not supported yet");

pub mod abi;
pub mod access;
pub mod address;
pub mod adoption;
pub mod arbitration;
pub mod chain;
pub mod classify;
#[cfg(feature = "host")]
pub mod compile;
pub mod event;
#[cfg(feature = "host")]
pub mod existing;
#[cfg(feature = "host")]
pub mod explain;
pub mod flow;
pub mod guard;
pub mod key;
#[cfg(feature = "host")]
pub mod object;
pub mod outcome;
pub mod place;
pub mod portable;
pub mod record;
pub mod siphash;
pub mod socket;
pub mod table;
#[cfg(feature = "host")]
pub mod transaction;

pub use classify::{Decision, classify};

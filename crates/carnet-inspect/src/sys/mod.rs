//! The operating systems. Each module provides, with the same names and meanings:
//!
//! - `Options`: the options of the command line that only this system has, with `begin`, what is
//!   to be done once the sockets are there and while the process is still who started it, `chain`, what
//!   is said of flows that go on at another host, `source`, who tells where flows come from and go
//!   to, and `datagrams`, the limits of UDP flows, if there are to be any;
//! - `app_of`: the application that a record of another host names;
//! - `Signals`: how the service is told to end or, where there is such a signal, to read its rules
//!   again;
//! - `enlarge_receive_buffer`: room for datagrams that wait to be received, as far as there may be;
//! - `reuse_address`: lets a listener have the address of one that has just ended, and nobody else;
//! - `carry`: relays the rest of a stream without copying, where the system can do that.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub use linux::*;

#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub use windows::*;

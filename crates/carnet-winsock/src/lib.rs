//! Windows Sockets' calling contract for redirect services, on Carnet's engine: a C library.
//!
//! A redirect service that was written for Windows compiles with the headers of `include/` and
//! behaves the same: the three control codes of redirect services with every error for its reason,
//! overlapped operation with events, completion routines and the result call, cancellation. What
//! there is, how to build and link it, each decision where the contract leaves one, and every
//! difference from Windows: `docs/winsock.md`.
//!
//! Services in Rust use the crate `carnet` instead.
//!
//! | module | job |
//! |---|---|
//! | [`ffi`] | the exported functions |
//! | `ioctl` | `WSAIoctl` and `WSPIoctl`: the order of checks, now or later |
//! | `control` | carrying out a control code |
//! | `contract` | numbers and tables |
//! | `operation`, `executor`, `poller` | pending operations, and the thread that carries them out |
//! | `completion` | their core: exactly once, in the right order; explored by loom |
//! | `wait`, `events`, `thread` | waits, events, the queue of completion routines of a thread |
//! | `sockets`, `process` | what Windows keeps of a socket; what there is once in a process |
//! | `flows` | the UDP flows of a socket: which datagram begins one, with which record |
//! | `memory` | the caller's memory, in which any address may be bad |
//! | `message`, `options`, `bsd` | the other functions |
#![cfg(target_os = "linux")]

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("carnet-winsock is for 64-bit little-endian systems");

mod bsd;
mod completion;
mod contract;
mod control;
mod events;
mod executor;
pub mod ffi;
mod flows;
mod hooks;
mod ioctl;
mod memory;
#[cfg(not(fuzzing))]
mod message;
#[cfg(fuzzing)]
pub mod message;
mod operation;
mod options;
mod poller;
mod process;
mod sockets;
mod sync;
mod sys;
#[cfg(all(test, not(loom)))]
mod tests;
mod thread;
mod wait;

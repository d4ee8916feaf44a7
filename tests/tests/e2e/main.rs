//! Carnet on the real kernel, from the application's connect() to the destination.
//!
//! One module a story. Each test has namespaces, cgroups and an engine of its own (see
//! `carnet_tests::Lab`), so they run side by side; all need root.

mod accounts;
mod adoption;
mod chains;
mod changes;
mod control;
mod datagram_programs;
mod datagrams;
mod failures;
mod families;
mod filters;
mod hosts;
mod instances;
mod keys;
mod listeners;
mod loops;
mod namespaces;
mod programs;
mod proxy_protocol;
mod unmodified;

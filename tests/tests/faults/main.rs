//! Faults: what happens to flows, policies and pins when something dies, fails or is missing.
//! `cargo xtask faults` prints the table; `docs/faults.md` says what is guaranteed.
//!
//! Each test is a fault, or a family of them, and prints a row of the table.

mod command;
mod environment;
mod protocol;
mod reboot;
mod row;
mod stage;
mod upgrade;

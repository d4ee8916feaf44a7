//! The engine on the real kernel: every test has its own cgroup, bpffs and network namespace.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that fails panics")]

mod instance;
mod traffic;
mod world;

//! The rules of the core, seen from outside: objects, compiler, decision and explanation together.

#![expect(clippy::unwrap_used, reason = "a test that cannot set up its case has failed")]

mod chain;
mod explain;
mod objects;
mod portable;
mod reference;
mod support;
mod tree;

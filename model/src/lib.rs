//! A model of Carnet's protocol, explored exhaustively with a model checker.
//!
//! The rules are not in here: the model calls carnet-core's functions, those that the kernel's hooks
//! call. What is in here is everything around them that can happen in any order: applications that
//! connect, services that co-operate, forget, lie, die and start again, an administrator who changes the
//! policy, an upgrade. `docs/proof.md` says what is modelled and what is left out, and why.
//!
//! | module | what it holds |
//! |---|---|
//! | [`scene`] | policies that follow each other, and what the administrator means by them |
//! | [`protocol`] | the protocol, a hook at a time, and its properties |
//! | [`banks`] | a transaction and the hooks that run meanwhile, a step at a time |
//! | [`configurations`] | what is explored |
//! | [`explore`] | how it is explored, and what comes of it |

pub mod banks;
pub mod configurations;
pub mod explore;
pub mod protocol;
pub mod scene;

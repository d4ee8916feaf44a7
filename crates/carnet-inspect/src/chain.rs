//! Chains that go on at another host: the record of a flow in a TLV of the PROXY header, sealed under a key
//! that both hosts have.
//!
//! | module | what it holds |
//! |---|---|
//! | [`keys`] | the keys, as a file names them |
//! | [`keyring`] | those in force, which change with the file |
//! | [`tlv`] | the TLV: its layout, sealing and opening; no I/O and no clock |
//! | [`gate`] | what is taken of what comes: fresh, once, and for this host |

pub mod gate;
pub mod keyring;
pub mod keys;
pub mod tlv;

#[cfg(test)]
pub(crate) mod testing;

use gate::Gate;
use keyring::Keyring;
use std::sync::Arc;

/// What the command line says of chains; nothing, for a service whose flows stay on their host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chain {
    /// For the flows that are handed on, or come: under what their records are sealed.
    pub(crate) keys: Option<Arc<Keyring>>,
    /// For the flows that come: what lets them in.
    pub(crate) gate: Option<Arc<Gate>>,
}

//! Flows that go on at another host.

use crate::{AsSocket, Error, Operation, sys};
use carnet_core::portable;
use std::fmt;

/// The record of a flow in the form in which it goes to another host
/// ([`carnet_core::portable`]): what that host has to know of who began the flow and which services have
/// had it.
///
/// It is not authenticated. Whoever carries it has to seal it, and whoever takes it to check that, as
/// `carnet inspect` does by a TLV of the PROXY protocol: it decides which services the flow passes by.
#[derive(Clone, PartialEq, Eq)]
pub struct PortableRecord(Box<portable::PortableRecord>);

impl PortableRecord {
    /// Its bytes, at most [`carnet_core::record::MAX_RECORD`] of them, the same on every host.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The flow's number on the host that it comes from.
    pub fn flow(&self) -> u64 {
        self.0.flow()
    }

    /// How often the flow was redirected so far, on all hosts.
    pub fn legs(&self) -> u32 {
        self.0.legs()
    }

    /// Where the application wanted to go.
    #[cfg(target_os = "linux")]
    pub fn original_destination(&self) -> crate::OriginalDestination {
        crate::OriginalDestination(sys::socket_address(self.0.destination()))
    }

    /// The application with which the flow began. All of it is what the other host says, and the numbers
    /// mean something there alone.
    #[cfg(target_os = "linux")]
    pub fn original_app(&self) -> crate::OriginalApp {
        sys::application(*self.0.app())
    }
}

/// For records that came from another host.
impl TryFrom<&[u8]> for PortableRecord {
    type Error = Error;

    /// # Errors
    /// [`Error::InvalidRecord`] if these bytes are none.
    fn try_from(bytes: &[u8]) -> Result<Self, Error> {
        let record = portable::PortableRecord::read(bytes);
        record.map(|record| Self(Box::new(record))).ok_or(Error::InvalidRecord)
    }
}

impl fmt::Debug for PortableRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PortableRecord(flow {}, {} bytes)", self.flow(), self.as_bytes().len())
    }
}

/// The record of an accepted, redirected TCP connection, for another host.
///
/// # Errors
/// Those of [`query_redirect_records`](crate::query_redirect_records); [`Error::AccessDenied`] for a
/// process of another service than the one to which the connection was delivered. [`Error::Unsupported`]
/// for UDP, and on Windows.
pub fn export_redirect_records(accepted: &impl AsSocket) -> Result<PortableRecord, Error> {
    let bytes = sys::export_redirect_records(accepted)?;
    let (operation, length) = (Operation::ExportRedirectRecords, bytes.len());
    PortableRecord::try_from(&bytes[..]).map_err(|_| Error::InvalidAnswer { operation, length })
}

/// Sets, on a new TCP socket before it is connected, a record of this host that is made of another host's:
/// the flow goes on here as one of this host, with a number of its own, past the services that had it there,
/// and past the calling process's own service.
///
/// # Errors
/// [`Error::NotAGateway`] for a process that may not; [`Error::Endless`] for a flow that comes by too often;
/// [`Error::InvalidRecord`], [`Error::AlreadyConnected`], [`Error::NoEngine`], [`Error::WrongSocket`].
/// [`Error::Unsupported`] for UDP, and on Windows.
pub fn import_redirect_records(
    socket: &impl AsSocket,
    record: &PortableRecord,
) -> Result<(), Error> {
    sys::import_redirect_records(socket, record.as_bytes())
}

/// Asks whether the calling process may take over flows of other hosts with such a socket, a new TCP one.
///
/// # Errors
/// [`Error::NotAGateway`] if not; [`Error::NoEngine`], [`Error::WrongSocket`]; [`Error::Unsupported`] on
/// Windows.
pub fn may_import_redirect_records(socket: &impl AsSocket) -> Result<(), Error> {
    sys::import_redirect_records(socket, &[])
}

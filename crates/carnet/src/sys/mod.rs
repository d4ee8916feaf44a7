//! The operating systems. Each module provides, with the same names and meanings:
//!
//! - `AsSocket`: the trait of std by which a socket of any library is borrowed;
//! - `query_redirect_records`, `query_redirect_context`: the opaque bytes;
//!   [`NotRedirected`](crate::Error::NotRedirected) also when there merely is no context;
//! - `set_redirect_records`: the opaque bytes as they were queried;
//! - `export_redirect_records`, `import_redirect_records`: a portable record;
//! - `original_destination`, `original_app`, `flow`, `register_listener`.
//!
//! All unsafe code of the crate is below this module.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub use linux::AsSocket;
#[cfg(all(target_os = "linux", fuzzing))]
pub use linux::fuzzing;
#[cfg(target_os = "linux")]
pub(crate) use linux::*;

#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub use windows::AsSocket;
#[cfg(windows)]
pub(crate) use windows::*;

#[cfg(not(any(target_os = "linux", windows)))]
compile_error!("carnet knows connect redirection on Linux and on Windows only");

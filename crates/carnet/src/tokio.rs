//! Connecting onwards with tokio's sockets (feature `tokio`).
//!
//! The functions of the crate's root take tokio's sockets as they are; only connecting differs.

use crate::{AsSocket, Error, Onwards, Operation, query_redirect_records};
use ::tokio::net::{TcpSocket, TcpStream};
use std::io;
use std::net::{SocketAddr, TcpStream as StdStream};

/// Connects to the original destination of an accepted connection, with its redirect record.
///
/// # Errors
/// Those of [`connect_onwards`](crate::connect_onwards).
///
/// # Panics
/// As every connect of tokio's: outside of a runtime with I/O enabled.
pub async fn connect_onwards(accepted: &impl AsSocket) -> Result<TcpStream, Error> {
    connect(&Onwards::of(accepted)?).await
}

/// As [`connect_onwards`], to another destination than the original one.
///
/// # Errors
/// Those of [`connect_onwards`](crate::connect_onwards).
///
/// # Panics
/// As [`connect_onwards`].
pub async fn connect_onwards_to(
    accepted: &impl AsSocket,
    destination: SocketAddr,
) -> Result<TcpStream, Error> {
    connect(&Onwards::new(query_redirect_records(accepted)?, destination)).await
}

/// Makes a connection that was prepared: [`Onwards::connect`] without blocking.
///
/// # Errors
/// Those of [`Onwards::connect`].
///
/// # Panics
/// As [`connect_onwards`]; with a time limit also where the runtime has no timers.
pub async fn connect(onwards: &Onwards) -> Result<TcpStream, Error> {
    let socket = onwards.socket()?;
    socket
        .set_nonblocking(true)
        .map_err(|source| Error::Os { operation: Operation::PrepareSocket, source })?;
    let destination = onwards.destination();
    let connecting = TcpSocket::from_std_stream(StdStream::from(socket)).connect(destination);
    let connected = match onwards.limit() {
        Some(limit) => ::tokio::time::timeout(limit, connecting)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        None => connecting.await,
    };
    connected.map_err(|source| Error::from_connect(destination, source))
}

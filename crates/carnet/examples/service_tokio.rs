//! The redirect service of `service.rs` on tokio: a task for each connection instead of threads. It
//! serves on Windows, too.
//!
//! On Linux, run it with `carnet service run NAME -- target/debug/examples/service_tokio`.

use std::error::Error;
use std::io;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let v4 = listen("127.0.0.1:0").await?;
    let v6 = listen("[::1]:0").await?;
    loop {
        let (accepted, _) = tokio::select! {
            accepted = v4.accept() => accepted?,
            accepted = v6.accept() => accepted?,
        };
        tokio::spawn(async move {
            if let Err(error) = serve(accepted).await {
                eprintln!("connection ended: {error}");
            }
        });
    }
}

/// A listener that redirected connections come to.
async fn listen(address: &str) -> Result<TcpListener, Box<dyn Error>> {
    let listener = TcpListener::bind(address).await?;
    match carnet::register_listener(&listener) {
        // On Windows it is the callout driver that names the listener.
        Err(carnet::Error::Unsupported { .. }) => {}
        registered => registered?,
    }
    eprintln!("listening on {}", listener.local_addr()?);
    Ok(listener)
}

/// Serves one connection from its beginning to its end.
async fn serve(mut accepted: TcpStream) -> io::Result<()> {
    let mut onwards = carnet::tokio::connect_onwards(&accepted).await.map_err(io::Error::other)?;
    copy_bidirectional(&mut accepted, &mut onwards).await?;
    Ok(())
}

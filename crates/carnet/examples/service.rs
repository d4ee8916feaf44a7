//! A complete redirect service: every redirected connection is passed on, with its record.
//!
//! Run it with `carnet service run NAME -- target/debug/examples/service`.

use std::error::Error;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

fn main() -> Result<(), Box<dyn Error>> {
    let mut listeners = Vec::new();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address)?;
        carnet::register_listener(&listener)?;
        eprintln!("listening on {}", listener.local_addr()?);
        listeners.push(listener);
    }
    thread::scope(|threads| {
        for listener in &listeners {
            threads.spawn(move || {
                for accepted in listener.incoming() {
                    thread::spawn(move || {
                        if let Err(error) = accepted.map_err(Into::into).and_then(serve) {
                            eprintln!("connection ended: {error}");
                        }
                    });
                }
            });
        }
    });
    Ok(())
}

/// Serves one connection from its beginning to its end.
fn serve(accepted: TcpStream) -> Result<(), Box<dyn Error>> {
    let destination = carnet::original_destination(&accepted)?;
    let app = carnet::original_app(&accepted)?;
    eprintln!("{} (pid {}) to {destination}", app.command.display(), app.pid);

    let onwards = carnet::connect_onwards(&accepted)?;
    thread::scope(|threads| {
        let request = threads.spawn(|| relay(&accepted, &onwards));
        relay(&onwards, &accepted)?;
        request.join().unwrap_or_else(|_| Err(io::Error::other("the relay panicked")))
    })?;
    Ok(())
}

/// Copies one direction and passes its end on; an error ends both directions.
fn relay(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let copied = io::copy(&mut from, &mut to);
    to.shutdown(if copied.is_ok() { Shutdown::Write } else { Shutdown::Both })?;
    copied.map(drop)
}

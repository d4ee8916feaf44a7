//! The `carnet` command; all of it is in the library.

use std::{env, io, process::ExitCode};

use carnet_cli::{Console, run};

fn main() -> ExitCode {
    // What the engine has to say beside its results: that it mounted a bpffs, what it could not
    // tidy up.
    tracing_subscriber::fmt().with_writer(io::stderr).without_time().with_target(false).init();
    run(env::args_os(), &mut Console::standard()).into()
}

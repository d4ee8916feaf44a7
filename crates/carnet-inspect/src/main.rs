//! The program `carnet-inspect`.

use carnet_inspect::cli::Arguments;
use clap::Parser;
use std::process::ExitCode;

/// Carnet's reference redirect service: inspects redirected connections and relays them onwards
///
/// On Linux, start it in the cgroup of a service: carnet service run NAME -- carnet-inspect
#[derive(Parser)]
#[command(version)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    match carnet_inspect::run(Command::parse().arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("carnet-inspect: {error:#}");
            ExitCode::FAILURE
        }
    }
}

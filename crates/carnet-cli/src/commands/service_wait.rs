//! `carnet service wait`: until a service can take flows.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{DONE, service::live_listeners};
use crate::{failure::Failure, moment, session::Session};

/// How often it is looked whether the service listens: nothing tells.
const INTERVAL: Duration = Duration::from_millis(20);

/// Wait until a service listens
///
/// That is, until there is a service of that name, and it has a registered socket on which flows can be
/// sent to it.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The service's name or id
    #[arg(value_name = "NAME|ID")]
    service: String,

    /// How long to wait, for example 10s; a number alone is seconds
    #[arg(long, value_name = "TIME", value_parser = moment::duration, default_value = "30s")]
    timeout: Duration,
}

/// JSON: none. It prints nothing.
pub(super) fn run(arguments: &Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let engine = session.engine()?;
    let deadline = Instant::now() + arguments.timeout;
    loop {
        let policy = engine.policy()?;
        // `service run` may be about to add it.
        let service = Session::known(&policy, policy.service(&arguments.service));
        if let Ok(service) = &service
            && live_listeners(&engine.listeners()?, service).next().is_some()
        {
            return Ok(DONE);
        }
        if Instant::now() >= deadline {
            let service = service?;
            let name = &service.name;
            let failure = Failure::new(format_args!("service {name} listens nowhere"));
            return Err(failure.with_hint(match service.listen_port {
                Some(port) => format!(
                    "its program has not bound a socket to port {port}: see its log, and whether it \
                     runs in the cgroup {}",
                    service.cgroup.path
                ),
                None => format!(
                    "a program that does not register its listeners has them registered with \
                     carnet service register {name}, or as they are made, with --listen-port"
                ),
            }));
        }
        thread::sleep(INTERVAL);
    }
}

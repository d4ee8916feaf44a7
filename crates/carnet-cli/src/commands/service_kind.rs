//! What `service add` and `service run` say of the program of a service.

use std::num::NonZeroU16;

use carnet_core::object::{NewService, Policy, PolicyError};

/// What the program of a service does not do itself, or does beyond the others. A program that co-operates
/// needs none of it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Kind {
    /// Its program knows nothing of redirect records: a transparent proxy as it is. Its connections are
    /// given the records of the flows that they may belong to
    #[arg(long)]
    unmodified: bool,

    /// The port at which its program takes flows, if it does not register its listeners: whatever socket
    /// it binds to this port, now or when it starts anew, is registered
    #[arg(long, value_name = "PORT")]
    listen_port: Option<NonZeroU16>,

    /// Its program asks getsockname() for the destination, as behind netfilter's TPROXY
    #[arg(long)]
    tproxy: bool,

    /// It may take over flows of other hosts, and so decides which services they pass by: for `carnet
    /// inspect --original-destination proxy --chain-key`
    #[arg(long)]
    gateway: bool,
}

impl Kind {
    /// The same of a service that is to be added.
    pub(super) fn of(self, new: NewService) -> NewService {
        let Self { unmodified, listen_port, tproxy, gateway } = self;
        NewService { unmodified, listen_port, tproxy, gateway, ..new }
    }

    /// Says it of a service that there is; what is not said stays.
    pub(super) fn apply(self, policy: &mut Policy, service: &str) -> Result<(), PolicyError> {
        if self.unmodified {
            policy.set_unmodified(service, true)?;
        }
        if self.listen_port.is_some() {
            policy.set_listen_port(service, self.listen_port)?;
        }
        if self.tproxy {
            policy.set_tproxy(service, true)?;
        }
        if self.gateway {
            policy.set_gateway(service, true)?;
        }
        Ok(())
    }
}

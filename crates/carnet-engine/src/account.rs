//! Whether all redirects are accounted for: what became of each, and what is still under way.

use carnet_core::{
    event::Counter,
    flow::{LEG_REDIRECTED, LEG_STARTING, LegState, WAY_NONE},
};

use crate::{
    Engine, Error,
    flows::{live_legs, read_legs},
    object,
    tables::Tables,
};

/// What became of the redirects since the instance was brought up.
///
/// The counters and what is under way are read one after the other: while connections come and go
/// the differences may be a few either way. When nothing is under way they are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Account {
    /// Of TCP.
    pub tcp: TcpAccount,
    /// Of UDP.
    pub udp: UdpAccount,
    /// Of connects and UDP flows that were refused, whatever their protocol.
    pub refused: RefusedAccount,
}

/// Redirected TCP connections: each is in exactly one of the other fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpAccount {
    /// All of them.
    pub redirected: u64,
    /// Established at their service, with their record.
    pub delivered: u64,
    /// Established there, or about to be, but without their record, for want of memory or room.
    pub handover_failed: u64,
    /// Ended before their SYN was sent.
    pub unsent: u64,
    /// Ended after that, before they were established at their service.
    pub unanswered: u64,
    /// Under way: decided, but their SYN has not been sent.
    pub starting: u64,
    /// Under way: their SYN has been sent.
    pub connecting: u64,
}

impl TcpAccount {
    /// How many redirects are not accounted for; negative: how many too many are.
    #[must_use]
    pub fn difference(&self) -> i64 {
        let ended = self.delivered + self.handover_failed + self.unsent + self.unanswered;
        let all = ended + self.starting + self.connecting;
        self.redirected.wrapping_sub(all).cast_signed()
    }
}

/// Redirected UDP flows: each is in exactly one of the other fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UdpAccount {
    /// All of them.
    pub redirected: u64,
    /// Those that have ended.
    pub ended: u64,
    /// Those that live.
    pub live: u64,
}

impl UdpAccount {
    /// How many flows are not accounted for; negative: how many too many are.
    #[must_use]
    pub fn difference(&self) -> i64 {
        self.redirected.wrapping_sub(self.ended + self.live).cast_signed()
    }
}

/// Connects and UDP flows that were refused: each is in exactly one of the other fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedAccount {
    /// All of them.
    pub refused: u64,
    /// By a filter.
    pub by_filter: u64,
    /// For want of a live listener of a service that may not be passed over.
    pub service_unavailable: u64,
    /// By the hop guard.
    pub loops_ended: u64,
    /// For want of memory.
    pub out_of_memory: u64,
    /// Another UDP socket is connected from the same address to the same service.
    pub address_in_use: u64,
    /// Their socket is bound to a device, by a process that may not undo that.
    pub bound_to_device: u64,
}

impl RefusedAccount {
    /// How many refusals are not accounted for; negative: how many too many are.
    #[must_use]
    pub fn difference(&self) -> i64 {
        let known = self.by_filter
            + self.service_unavailable
            + self.loops_ended
            + self.out_of_memory
            + self.address_in_use
            + self.bound_to_device;
        self.refused.wrapping_sub(known).cast_signed()
    }
}

impl Engine {
    /// What became of the redirects since the instance was brought up. All that is alive is looked
    /// at, which takes a moment where there are very many flows.
    ///
    /// # Errors
    /// [`Error::NotUp`], [`Error::UnknownLayout`]; [`Error::Map`] and [`Error::Io`] if the kernel
    /// does not answer.
    pub fn account(&self) -> Result<Account, Error> {
        self.reading(|tables| self.account_of(tables))
    }

    pub(crate) fn account_of(&self, tables: &Tables) -> Result<Account, Error> {
        let legs = read_legs(&self.program_path(object::FLOWS), tables)?;
        let starting = LEG_REDIRECTED | LEG_STARTING;
        let starting = legs.iter().filter(|leg| leg.kind == starting).count() as u64;
        let datagrams = |leg: &&LegState| {
            leg.kind == LEG_REDIRECTED && leg.protocol != libc::IPPROTO_TCP.cast_unsigned()
        };
        let live = live_legs(&legs).filter(datagrams).count() + tables.datagram_legs()?.len();
        // One whose connection is established on this side is in one of the maps.
        let unanswered = |leg: &&LegState| {
            leg.kind == LEG_REDIRECTED
                && leg.way == WAY_NONE
                && leg.protocol == libc::IPPROTO_TCP.cast_unsigned()
        };
        let connecting = legs.iter().filter(unanswered).count()
            + tables.entries("WAITING")?
            + tables.entries("HANDOVER")?;
        let counters = tables.counters()?;
        let count = |wanted| {
            counters.iter().find(|(counter, _)| *counter == wanted).map_or(0, |(_, value)| *value)
        };
        let udp_redirected = count(Counter::DatagramFlows);
        Ok(Account {
            tcp: TcpAccount {
                redirected: count(Counter::Redirected).saturating_sub(udp_redirected),
                delivered: count(Counter::Delivered),
                handover_failed: count(Counter::HandoverFailed),
                unsent: count(Counter::Unsent),
                unanswered: count(Counter::Unanswered),
                starting,
                connecting: connecting as u64,
            },
            udp: UdpAccount {
                redirected: udp_redirected,
                ended: count(Counter::DatagramFlowsEnded),
                live: live as u64,
            },
            refused: RefusedAccount {
                refused: count(Counter::Blocked),
                by_filter: count(Counter::BlockedByFilter),
                service_unavailable: count(Counter::ServiceUnavailable),
                loops_ended: count(Counter::Loops),
                out_of_memory: count(Counter::OutOfMemory),
                address_in_use: count(Counter::AddressInUse),
                bound_to_device: count(Counter::BoundToDevice),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_is_in_one_place_only() {
        let tcp = TcpAccount {
            redirected: 21,
            delivered: 1,
            handover_failed: 2,
            unsent: 3,
            unanswered: 4,
            starting: 5,
            connecting: 6,
        };
        assert_eq!(tcp.difference(), 0);
        assert_eq!(TcpAccount { delivered: 0, ..tcp }.difference(), 1);
        assert_eq!(TcpAccount { delivered: 3, ..tcp }.difference(), -2);
        assert_eq!(UdpAccount { redirected: 3, ended: 1, live: 1 }.difference(), 1);
        let refused = RefusedAccount { refused: 5, by_filter: 4, ..RefusedAccount::default() };
        assert_eq!(refused.difference(), 1);
    }
}

//! The four redirect states, trust, and the hop guard (contract C5..C11).
//!
//! A record is an ordered list of redirect handles. The rule of contract C10 makes every handle
//! occur in it at most once, so a flow makes at most as many redirected legs as there are
//! handles: that is why flows end. [`hop_limit`] is the second net, for services that forget to
//! set the record.

use crate::{
    record::{MAX_HOPS, Record},
    table::{MAX_SERVICES, NO_SLOT, ServiceRow, Step, Tables},
};

/// Where a flow stands with respect to one redirect handle ("self").
///
/// The names and numbers are those of WFP's `FWPS_CONNECTION_REDIRECT_STATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RedirectState {
    /// No service has seen the flow: may redirect (contract C5).
    NotRedirected = 0,
    /// This service redirected it last, so this is its own outbound leg: must not redirect (C6).
    RedirectedBySelf = 1,
    /// Others redirected it, this service never: may redirect unless it trusts them (C7).
    RedirectedByOther = 2,
    /// This service redirected it, and then another did: must not redirect (C8).
    PreviouslyRedirectedBySelf = 3,
}

/// What the decision needs to know of a record: which services of the policy are in it.
///
/// A service is known by its slot in the policy's service table; of services that the policy no
/// longer has it only matters that there are any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Chain {
    /// Bit `n` set: the service in slot `n` is in the record, for certain.
    pub visited: u32,
    /// Bit `n` set: the service in slot `n` is in the record as a guess only.
    pub guessed: u32,
    /// Slot of the newest hop's service, [`NO_SLOT`] if the policy does not have it.
    pub last: u32,
    /// Number of hops.
    pub hops: u32,
    /// Number of hops whose service the policy does not have: it was removed, or is another host's.
    pub strangers: u32,
    /// Redirected legs so far, forgotten ones included; never less than `hops`.
    pub legs: u32,
}

impl Chain {
    /// A flow that nobody has redirected, after `legs` legs whose record was forgotten.
    #[inline(always)]
    pub const fn empty(legs: u32) -> Self {
        Self { visited: 0, guessed: 0, last: NO_SLOT, hops: 0, strangers: 0, legs }
    }

    /// Reads the chain of a verified record.
    #[inline(always)]
    pub fn of_record<T: Tables>(tables: &T, record: &Record) -> Self {
        let mut reading = Reading { tables, record, chain: Self::empty(record.legs) };
        reading.chain.hops = record.hop_count;
        T::repeat(MAX_HOPS as u32, &mut reading);
        reading.chain
    }

    /// The state with respect to the service in `slot` (contract C10).
    #[inline(always)]
    pub const fn state(&self, slot: u32) -> RedirectState {
        if self.hops == 0 {
            RedirectState::NotRedirected
        } else if self.visited & bit(slot) == 0 {
            RedirectState::RedirectedByOther
        } else if self.last == slot {
            RedirectState::RedirectedBySelf
        } else {
            RedirectState::PreviouslyRedirectedBySelf
        }
    }

    /// Whether `service`, in `slot`, may redirect the flow (contract C5..C9).
    ///
    /// A service stands aside for others' results only where it trusts every one of them: one
    /// that it does not trust may have changed what a trusted one had passed.
    ///
    /// One that is in the record as a guess may if it co-operates: what it connects carries its own
    /// record, so it does not meet the flow a third time. With an unmodified one nothing is certain but
    /// that it meets a flow once: it may not.
    #[inline(always)]
    pub const fn may_redirect(&self, slot: u32, service: &ServiceRow) -> bool {
        match self.state(slot) {
            RedirectState::NotRedirected => true,
            RedirectState::RedirectedByOther => {
                let may_have_had_it = self.guessed & bit(slot) != 0;
                if may_have_had_it && service.unmodified != 0 {
                    false
                } else {
                    !self.trusted_by(slot, service)
                }
            }
            RedirectState::RedirectedBySelf | RedirectState::PreviouslyRedirectedBySelf => false,
        }
    }

    #[inline(always)]
    const fn trusted_by(&self, slot: u32, service: &ServiceRow) -> bool {
        let others = ((self.visited | self.guessed) & !bit(slot)) as u64;
        service.trusts_all != 0 || (self.strangers == 0 && others & !service.trusts == 0)
    }
}

/// Most redirected legs that a flow may make that can have had `services` services: those of the policy,
/// and the strangers in its record.
///
/// A flow whose services all set the record makes at most one leg each, so more legs than services
/// mean that somebody forgot it. The margin is for what a forgotten record does not tell: services that were
/// removed while the flow was under way, or are another host's.
#[inline(always)]
pub const fn hop_limit(services: u32) -> u32 {
    const MARGIN: u32 = 8;
    if services > MAX_HOPS as u32 - MARGIN { MAX_HOPS as u32 } else { services + MARGIN }
}

/// The bit of a slot in a set of services; 0 for [`NO_SLOT`].
#[inline(always)]
pub const fn slot_bit(slot: u32) -> u64 {
    if slot < 64 { 1 << (slot & 63) } else { 0 }
}

/// The bit of a slot in the sets of a chain, for which the stack of the hooks has no more room.
#[inline(always)]
const fn bit(slot: u32) -> u32 {
    const _: () = assert!(MAX_SERVICES <= u32::BITS);
    slot_bit(slot) as u32
}

struct Reading<'a, T> {
    tables: &'a T,
    record: &'a Record,
    chain: Chain,
}

impl<T: Tables> Step for Reading<'_, T> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(hop) = self.record.hop(index) else {
            return false;
        };
        let slot = T::forget(self.tables.slot_of(hop.handle));
        self.chain.last = slot;
        if self.record.is_guessed(index) {
            self.chain.guessed |= bit(slot);
        } else {
            self.chain.visited |= bit(slot);
        }
        let strange = if slot == NO_SLOT { 1 } else { 0 };
        self.chain.strangers = T::forget(self.chain.strangers.wrapping_add(strange));
        true
    }
}

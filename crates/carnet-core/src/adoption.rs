//! Adoption: the connections of services whose programs know nothing of records (contract C11).
//!
//! An unmodified proxy accepts a flow and connects onwards, but sets no record. What it connects is given
//! the record of the flow that it may belong to. The engine knows which flows the service holds, and for
//! which destinations:
//!
//! - Its flows for the same destination all have had the same services: the connection is given their
//!   chain, for certain.
//! - They have not: the services that all of them have had are certain, the others are *guessed*
//!   ([`Record::guessed`]).
//! - It holds no flow for the destination: an upstream proxy, a resolver, an update server. That is a flow
//!   of the service's own, for which every service that any of its flows has had is guessed.
//!
//! In each case the service itself is certain, so it never meets what it connects. A guess never keeps a
//! flow from a service of which the record would be certain, one that co-operates: rather twice than
//! never, and after that it is certain. An unmodified service that is guessed is passed over: nothing else
//! ends the loop of two of them ([`Chain::may_redirect`](crate::chain::Chain::may_redirect)).
//!
//! # What is counted
//!
//! For each destination, and once more for all together, [`HeldFlows`] has the number of flows, and by
//! redirect handle the number of those that have certainly, or possibly, had that service. A service is
//! certain if as many flows have had it as there are. The numbers are changed from many processors
//! without a lock. Their order errs to one side: a flow is there before its hops are, and goes after
//! them, so a service may pass for guessed that is certain, never the other way round.

use core::marker::PhantomData;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    address::Endpoint,
    chain::slot_bit,
    flow::LegState,
    record::{Hop, MAX_HOPS, RECORD_ADOPTED, RECORD_IDENTITY_GUESSED, Record},
    table::{MAX_SERVICES, NO_SLOT, Repeat, Step, Tables},
};

/// Set in [`HeldFlows::live`] when the last flow has gone and the entry is being removed.
const GONE: u64 = 1 << 63;
/// In [`HeldHop::flows`]: one flow that has certainly had the service.
const CERTAIN: u64 = 1 << 32 | 1;
/// The same of one that has possibly had it.
const POSSIBLE: u64 = 1 << 32;

/// Numbers that others may change at the same time.
pub trait Atomic {
    /// Adds `change`, wrapping; gives what was there before.
    fn add(number: &mut u64, change: u64) -> u64;
    /// Puts `new` in the place of `old`, if that is there; gives what was there before.
    fn replace(number: &mut u64, old: u64, new: u64) -> u64;
}

/// How many of the held flows have had a service.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HeldHop {
    /// The service's redirect handle; 0: the place is free.
    pub handle: u64,
    /// Lower half: the flows that have certainly had it. Upper half: all that may have had it.
    pub flows: u64,
}

/// The flows that an unmodified service holds, for one destination or altogether.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HeldFlows {
    /// How many there are.
    pub live: u64,
    /// Ticket of the flow about which the service asked last, or that it was given last: its record is
    /// the likeliest. 0 for none.
    pub ticket: u64,
    /// Most legs among the flows that have been there since there was none.
    pub legs: u64,
    /// By service, in no order.
    pub hops: [HeldHop; MAX_HOPS],
}

impl HeldFlows {
    /// Adds a flow, before its hops are counted ([`Self::count`]). `false`: the entry is being removed, the
    /// flow belongs in a new one.
    #[inline(always)]
    pub fn enter<A: Atomic>(&mut self, record: &Record, ticket: u64) -> bool {
        let before = A::add(&mut self.live, 1);
        if before >= GONE {
            return false;
        }
        // A lost update of these two is a guess that is a little worse.
        let legs = record.legs as u64;
        if before == 0 || self.legs < legs {
            self.legs = legs;
        }
        self.ticket = ticket;
        true
    }

    /// Counts the hops of a flow that has entered, or with `leaves` of one that is about to leave.
    #[inline(always)]
    pub fn count<A: Atomic + Repeat>(&mut self, record: &Record, leaves: bool) {
        A::repeat(
            MAX_HOPS as u32,
            &mut Count::<A> { held: self, record, leaves, atomic: PhantomData },
        );
    }

    /// Takes a flow away, after its hops. `true`: it was the last one, and the entry is to be removed.
    #[inline(always)]
    pub fn leave<A: Atomic>(&mut self) -> bool {
        A::add(&mut self.live, 1_u64.wrapping_neg()) == 1
            && A::replace(&mut self.live, 0, GONE) == 0
    }

    /// Whether there are any.
    #[inline(always)]
    pub const fn is_live(&self) -> bool {
        self.live != 0 && self.live < GONE
    }

    /// Which of the policy's services they have had.
    #[inline(always)]
    fn had<T: Tables>(&self, tables: &T) -> Had {
        let mut looking = Looking { tables, held: self, had: Had { certain: 0, possible: 0 } };
        T::repeat(MAX_HOPS as u32, &mut looking);
        looking.had
    }
}

/// What is known of the flows to which a connection without a record may belong.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// The flows that its service holds for its destination.
    pub for_destination: Option<&'a HeldFlows>,
    /// All flows that its service holds.
    pub all: Option<&'a HeldFlows>,
    /// Whether the record is that of one of the flows for the destination, the likeliest
    /// ([`LegState::is_candidate`]); else it has no hops and describes the service's process.
    pub known: bool,
}

impl LegState {
    /// Whether the leg, which was delivered, is one to whose flow a connection may belong that the service
    /// with the redirect handle `own` makes to `destination`. `is_there`: the delivered connection is not
    /// over.
    #[inline(always)]
    pub fn is_candidate(&self, is_there: bool, own: u64, destination: &Endpoint) -> bool {
        is_there && self.handle == own && self.requested.is_same(destination)
    }
}

/// Makes `record` that of a connection that the service with the redirect handle `own` makes without one.
///
/// Gives `false` if there is no room for all hops.
#[inline(always)]
pub fn adopt<T: Tables>(
    tables: &T,
    candidates: Candidates<'_>,
    own: u64,
    record: &mut Record,
) -> bool {
    let mut had = Had { certain: 0, possible: 0 };
    let mut is_certain = true;
    if let Some(held) = candidates.for_destination
        && held.is_live()
    {
        had = held.had(tables);
        is_certain = candidates.known && held.live == 1;
        let legs = held.legs as u32;
        if record.legs < legs {
            record.legs = legs;
        }
    } else if let Some(held) = candidates.all
        && held.is_live()
    {
        // Whether it belongs to one of them at all nobody knows. Their legs do not count: two services
        // that each make connections of their own through the other would count them up for ever.
        let Had { certain, possible } = held.had(tables);
        had = Had { certain: 0, possible: certain | possible };
        is_certain = false;
    }
    // What was guessed of it before stays a guess.
    record.flags |= RECORD_ADOPTED;
    if !is_certain {
        record.flags |= RECORD_IDENTITY_GUESSED;
    }
    fill_in(tables, had, own, record, is_certain)
}

/// Marks the hops of the record that are guessed, adds what it lacks, and puts the service's own last.
///
/// What is marked already stays so. A service that co-operates may be there twice, as a guess and then for
/// certain: were both certain, its flow would count for two.
#[inline(always)]
fn fill_in<T: Tables>(tables: &T, had: Had, own: u64, record: &mut Record, exact: bool) -> bool {
    let filter = record.take_last(own);
    let mut filling = Filling { tables, had, own, record, named: 0, exact, complete: true };
    T::repeat(MAX_HOPS as u32, &mut Marking(&mut filling));
    T::repeat(MAX_SERVICES, &mut filling);
    let complete = filling.complete;
    // As if it had made them: it is the flow's next leg that counts on from here.
    let pushed = record.push(Hop { handle: own, filter });
    if record.legs < record.hop_count {
        record.legs = record.hop_count;
    }
    complete && pushed
}

/// Sets of slots: the services that flows have had.
#[derive(Clone, Copy)]
struct Had {
    certain: u64,
    possible: u64,
}

struct Count<'a, A> {
    held: &'a mut HeldFlows,
    record: &'a Record,
    leaves: bool,
    atomic: PhantomData<A>,
}

impl<A: Atomic> Step for Count<'_, A> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(hop) = self.record.hop(index) else {
            return false;
        };
        let one = if self.record.is_guessed(index) { POSSIBLE } else { CERTAIN };
        let change = if self.leaves { one.wrapping_neg() } else { one };
        let first = hop.handle as usize;
        for further in 0..MAX_HOPS {
            let place = &mut self.held.hops[first.wrapping_add(further) % MAX_HOPS];
            let owner = A::replace(&mut place.handle, 0, hop.handle);
            if owner == 0 || owner == hop.handle {
                A::add(&mut place.flows, change);
                break;
            }
        }
        true
    }
}

struct Looking<'a, T> {
    tables: &'a T,
    held: &'a HeldFlows,
    had: Had,
}

impl<T: Tables> Step for Looking<'_, T> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(hop) = self.held.hops.get(index as usize) else {
            return false;
        };
        let flows = hop.flows;
        if flows == 0 {
            return true;
        }
        let bit = slot_bit(T::forget(self.tables.slot_of(hop.handle)));
        if flows & u64::from(u32::MAX) >= self.held.live {
            self.had.certain |= bit;
        } else {
            self.had.possible |= bit;
        }
        true
    }
}

/// The way through the policy's services: adds those that the record lacks.
struct Filling<'a, T> {
    tables: &'a T,
    had: Had,
    own: u64,
    record: &'a mut Record,
    /// The services that the record has.
    named: u64,
    /// Whether the record is known to be the flow's.
    exact: bool,
    complete: bool,
}

impl<T: Tables> Step for Filling<'_, T> {
    #[inline(always)]
    fn step(&mut self, slot: u32) -> bool {
        let bit = slot_bit(slot);
        if (self.had.certain | self.had.possible) & !self.named & bit == 0 {
            return true;
        }
        let Some(service) = self.tables.service(slot) else {
            return false;
        };
        if service.handle == self.own {
            return true;
        }
        let index = self.record.hop_count;
        if !self.record.push(Hop { handle: service.handle, filter: 0 }) {
            self.complete = false;
            return false;
        }
        if self.had.certain & bit == 0 {
            self.record.guess(index);
        }
        true
    }
}

/// The way through the record's hops: marks those that are guessed.
struct Marking<'a, 'b, T>(&'a mut Filling<'b, T>);

impl<T: Tables> Step for Marking<'_, '_, T> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let filling = &mut *self.0;
        let Some(hop) = filling.record.hop(index) else {
            return false;
        };
        let slot = T::forget(filling.tables.slot_of(hop.handle));
        let bit = slot_bit(slot);
        filling.named |= bit;
        // Of a service that the policy no longer has nothing was counted.
        let certain = if slot == NO_SLOT { filling.exact } else { filling.had.certain & bit != 0 };
        if !certain {
            filling.record.guess(index);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, vec::Vec};

    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::{
        compile::{CompiledPolicy, compile},
        object::{CgroupRef, NewService, Policy},
        record::RECORD_HOPS_GUESSED,
    };

    /// A policy of services without filters, and their handles.
    fn services(count: usize) -> (CompiledPolicy, Vec<u64>) {
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        for number in 0..count as u64 {
            let cgroup = CgroupRef { path: std::format!("/{number}"), id: number + 1 };
            policy.add_service(NewService::new(std::format!("s{number}"), "p", cgroup)).unwrap();
        }
        let handles = policy.services().iter().map(|service| service.handle).collect();
        (compile(&policy, 1).unwrap(), handles)
    }

    /// A record with these hops, of which some are guessed.
    fn record(hops: &[(u64, bool)]) -> Record {
        let mut record = Record::new_zeroed();
        for (index, (handle, guessed)) in (0..).zip(hops) {
            assert!(record.push(Hop { handle: *handle, filter: 9 }));
            if *guessed {
                record.guess(index);
            }
        }
        record.legs = hops.len() as u32;
        record
    }

    fn hops(record: &Record) -> Vec<(u64, bool)> {
        let hop = |index| record.hop(index).map(|hop| (hop.handle, record.is_guessed(index)));
        (0..record.hop_count).filter_map(hop).collect()
    }

    fn hold(held: &mut HeldFlows, record: &Record) {
        assert!(held.enter::<CompiledPolicy>(record, 1));
        held.count::<CompiledPolicy>(record, false);
    }

    fn let_go(held: &mut HeldFlows, record: &Record) -> bool {
        held.count::<CompiledPolicy>(record, true);
        held.leave::<CompiledPolicy>()
    }

    /// A connection to where these flows go, the record of one of which is known.
    fn beside(held: &HeldFlows) -> Candidates<'_> {
        Candidates { for_destination: Some(held), all: Some(held), known: true }
    }

    #[test]
    fn a_connection_beside_the_only_flow_is_that_flow_s() {
        let (policy, handles) = services(3);
        let [a, b, own] = handles[..] else { unreachable!() };
        let mut held = HeldFlows::default();
        let flow = record(&[(a, false), (b, true), (own, false)]);
        hold(&mut held, &flow);
        let mut adopted = flow;
        assert!(adopt(&policy, beside(&held), own, &mut adopted));
        assert_eq!(hops(&adopted), hops(&flow), "as certain as it was");
        assert_eq!(adopted.flags, RECORD_ADOPTED | RECORD_HOPS_GUESSED);
        assert_eq!((adopted.legs, adopted.hops[2].filter), (3, 9));
    }

    #[test]
    fn a_connection_elsewhere_is_the_service_s_own() {
        let (policy, handles) = services(3);
        let [a, _, own] = handles[..] else { unreachable!() };
        let elsewhere = |all| Candidates { for_destination: None, all, known: false };
        let mut alone = record(&[]);
        assert!(adopt(&policy, elsewhere(None), own, &mut alone));
        assert_eq!((hops(&alone), alone.flags), (std::vec![(own, false)], RECORD_ADOPTED));

        let mut held = HeldFlows::default();
        hold(&mut held, &record(&[(a, false), (own, false)]));
        let mut guessed = record(&[]);
        assert!(adopt(&policy, elsewhere(Some(&held)), own, &mut guessed));
        assert_eq!(hops(&guessed), [(a, true), (own, false)]);
        assert_eq!((guessed.flags & RECORD_IDENTITY_GUESSED, guessed.legs), (2, 2));
    }

    #[test]
    fn a_service_that_got_a_flow_after_a_guess_counts_once() {
        let (policy, handles) = services(3);
        let [a, b, own] = handles[..] else { unreachable!() };
        let twice = record(&[(a, true), (b, false), (a, false), (own, false)]);
        let mut held = HeldFlows::default();
        hold(&mut held, &twice);
        let mut adopted = twice;
        assert!(adopt(&policy, beside(&held), own, &mut adopted));
        assert_eq!(hops(&adopted), hops(&twice));

        // Another flow has not had it.
        hold(&mut held, &record(&[(b, false), (own, false)]));
        let mut adopted = twice;
        assert!(adopt(&policy, beside(&held), own, &mut adopted));
        assert_eq!(hops(&adopted), [(a, true), (b, false), (a, true), (own, false)]);
    }

    #[test]
    fn an_entry_that_is_being_removed_takes_no_flow() {
        let flow = record(&[(7, false)]);
        let mut held = HeldFlows::default();
        hold(&mut held, &flow);
        assert!(held.is_live());
        assert!(let_go(&mut held, &flow), "the last one");
        assert!(!held.is_live());
        assert!(!held.enter::<CompiledPolicy>(&flow, 1));
        assert!(!held.is_live());
    }

    /// Which of the services in a row of flags a flow has had, and which of these are guessed.
    fn flow() -> impl Strategy<Value = Vec<(u8, bool)>> {
        let had = prop::collection::btree_map(0..5_u8, any::<bool>(), 0..5);
        had.prop_map(|had| had.into_iter().collect())
    }

    proptest! {
        /// The counts say what a list of the flows says, in whatever order they come and go.
        #[test]
        fn what_is_counted_is_what_there_is(
            flows in prop::collection::vec(flow(), 1..8),
            gone in any::<u8>(),
            likeliest in any::<prop::sample::Index>(),
        ) {
            let (policy, handles) = services(6);
            let own = handles[5];
            let of = |flow: &[(u8, bool)]| {
                let had = flow.iter().map(|(service, guess)| (handles[usize::from(*service)], *guess));
                record(&had.chain([(own, false)]).collect::<Vec<_>>())
            };
            let mut held = HeldFlows::default();
            for flow in &flows {
                hold(&mut held, &of(flow));
            }
            let is_gone = |index: &usize| *index != 0 && gone >> (index % 8) & 1 != 0;
            let (leave, stay): (Vec<_>, Vec<_>) = (0..flows.len()).partition(is_gone);
            for index in leave {
                prop_assert!(!let_go(&mut held, &of(&flows[index])));
            }
            let likeliest = of(&flows[stay[likeliest.index(stay.len())]]);
            let mut adopted = likeliest;
            prop_assert!(adopt(&policy, beside(&held), own, &mut adopted));

            // The naive way.
            let mut expected = BTreeMap::from([(own, false)]);
            for service in 0..5_u8 {
                let seen = |index: &usize| flows[*index].iter().find(|(had, _)| *had == service);
                let had: Vec<_> = stay.iter().map(seen).collect();
                if had.iter().any(Option::is_some) {
                    let certain = had.iter().all(|had| matches!(had, Some((_, false))));
                    expected.insert(handles[usize::from(service)], !certain);
                }
            }
            let found = hops(&adopted);
            prop_assert_eq!(found.iter().copied().collect::<BTreeMap<_, _>>(), expected);
            prop_assert_eq!(found.len() as u32, adopted.hop_count);
            prop_assert_eq!(found.last(), Some(&(own, false)));
            let guesses = stay.len() > 1;
            prop_assert_eq!(adopted.flags & RECORD_IDENTITY_GUESSED != 0, guesses);
            prop_assert!(adopted.legs >= likeliest.legs && adopted.legs >= adopted.hop_count);
        }

        #[test]
        fn nothing_is_left_when_all_have_gone(flows in prop::collection::vec(flow(), 1..8)) {
            let records: Vec<_> = flows.iter().map(|flow| {
                record(&flow.iter().map(|(s, guess)| (u64::from(*s) + 40, *guess)).collect::<Vec<_>>())
            }).collect();
            let mut held = HeldFlows::default();
            records.iter().for_each(|record| hold(&mut held, record));
            let last = records.iter().rev().map(|record| let_go(&mut held, record)).last();
            prop_assert_eq!(last, Some(true));
            prop_assert!(held.hops.iter().all(|hop| hop.flows == 0));
        }
    }
}

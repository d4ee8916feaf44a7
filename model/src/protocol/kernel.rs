//! What the hooks do, over carnet-core: the model's counterpart of carnet-bpf.
//!
//! Nothing is decided here. Records are real ones, with their MACs.

use std::{cell::Cell, rc::Rc};

use carnet_core::{
    Decision,
    access::Caller,
    chain::Chain,
    classify::{Listeners, Unobserved, classify, destination_concerns_somebody},
    flow::HeldKey,
    guard::{self, GuardEntry},
    key::{DEFAULT_OVERLAP_NS, KeyRow},
    record::{Hop, LIFETIME_NS, MAGIC, Record, VERSION, mac_of},
    siphash::Key,
};
use zerocopy::FromZeros as _;

use super::state::{Carried, State};
use crate::scene::{Generation, HANDLES, Scene, connection};

/// What the guard may remember of a service that holds nothing for a destination: anything.
const STALE: u32 = 99;

/// A connect as the hook sees it.
pub(super) struct Connect<'a> {
    pub(super) scene: &'a Scene,
    pub(super) state: &'a State,
    /// The record that is set on the socket.
    pub(super) record: Option<&'a Carried>,
    pub(super) destination: usize,
    /// The handle of the service in whose cgroup the caller is.
    pub(super) caller: Option<usize>,
}

impl Connect<'_> {
    pub(super) fn generation(&self) -> &Generation {
        &self.scene.generations[usize::from(self.state.generation)]
    }

    /// What the record says, in terms of the policy in force.
    pub(super) fn chain(&self) -> Chain {
        let record = self.record.map(|carried| carried.write(self.scene));
        let compiled = &self.generation().compiled;
        record.map_or(Chain::empty(0), |record| Chain::of_record(compiled, &record))
    }

    /// The connect hook, up to the decision.
    pub(super) fn decide(&self) -> Decision {
        let to = connection(self.destination);
        let compiled = &self.generation().compiled;
        if !destination_concerns_somebody(compiled, &to) {
            return Decision::PASS;
        }
        classify(compiled, &to, &self.chain(), &mut Maps(self), &mut Unobserved)
    }
}

/// The maps of listeners and of the guard.
struct Maps<'a>(&'a Connect<'a>);

impl Listeners for Maps<'_> {
    fn is_live(&mut self, handle: u64) -> bool {
        let known = self.0.scene.handles.iter().position(|given| *given == handle);
        known.is_some_and(|handle| self.0.state.listener_of(handle).is_some())
    }

    fn forgotten_legs(&mut self) -> u32 {
        let Connect { state, destination, caller, .. } = *self.0;
        let entry = caller.and_then(|caller| {
            let live = state.live(caller, destination).into();
            let legs = state.guard[caller][destination].into();
            GuardEntry { live, flow: 0, legs, zero: 0 }.forgotten_legs()
        });
        entry.unwrap_or(0)
    }
}

/// What the guard remembers when a service gets a leg; `live` is how many it held before.
pub(super) fn guard_begins(remembered: u8, live: u8, legs: u8) -> u8 {
    // Of no flows there may be an old entry, or none, which core's own tests have.
    let legs_before = if live == 0 { STALE } else { remembered.into() };
    let entry = GuardEntry { live: live.into(), flow: 0, legs: legs_before, zero: 0 };
    let mut memory = Remembered(Rc::new(Cell::new(Some(entry))));
    guard::begins(&mut memory, &HeldKey::of_all(1), 0, legs.into());
    memory.0.get().map_or(0, |entry| entry.legs as u8)
}

/// What the guard remembers of a service and a destination.
#[derive(Clone)]
struct Remembered(Rc<Cell<Option<GuardEntry>>>);

impl Remembered {
    fn change(&self, change: impl FnOnce(&mut GuardEntry)) {
        let mut entry = self.0.get().unwrap_or_default();
        change(&mut entry);
        self.0.set(Some(entry));
    }
}

impl guard::Memory for Remembered {
    type Entry = Self;

    fn find(&mut self, _key: &HeldKey) -> Option<Self> {
        self.0.get().map(|_| self.clone())
    }

    fn insert_new(&mut self, _key: &HeldKey, entry: &GuardEntry) -> bool {
        let is_new = self.0.get().is_none();
        if is_new {
            self.0.set(Some(*entry));
        }
        is_new
    }
}

impl guard::Shared for Remembered {
    fn add(&mut self, change: i64) -> i64 {
        let before = self.0.get().unwrap_or_default().live;
        self.change(|entry| entry.live += change);
        before
    }

    fn legs(&self) -> u32 {
        self.0.get().unwrap_or_default().legs
    }

    fn set_legs(&mut self, legs: u32) {
        self.change(|entry| entry.legs = legs);
    }

    fn set_flow(&mut self, flow: u64) {
        self.change(|entry| entry.flow = flow);
    }
}

/// The epoch of the instance.
pub(super) const EPOCH: u64 = 42;
/// A key that is not the instance's.
pub(super) const NO_KEY: u8 = u8::MAX;

/// The key with this number.
pub(super) fn key(number: u8) -> Key {
    [7, number.into()]
}

/// The boot-time clock in an hour: what was issued in an earlier one has expired.
fn clock(hour: u8) -> u64 {
    (u64::from(hour) + 1) * (LIFETIME_NS + 1)
}

/// The option by which a service sets a record: whether the kernel takes it.
pub(super) fn takes(state: &State, record: &Record, service: Option<u64>) -> bool {
    let caller = Caller { service: service.unwrap_or(0), privileged: false };
    let overlap_ns = if state.rotations == 0 { 0 } else { DEFAULT_OVERLAP_NS };
    let generation = u64::from(state.rotations) + 1;
    let row = KeyRow { generation, since_ns: clock(state.rotated), overlap_ns };
    let current = u32::from(state.key & 1);
    let mac = |place: u32| {
        let number = if place == current { state.key } else { state.key.wrapping_sub(1) };
        mac_of(record, &key(number))
    };
    let verified = row.verify(current, record, record.length.into(), EPOCH, clock(state.hour), mac);
    let newest = record.hop(record.hop_count.wrapping_sub(1)).map_or(0, |hop| hop.handle);
    caller.may_act() && verified.is_ok() && caller.may_set(newest)
}

/// The option by which a service asks for the record of a connection that it holds.
pub(super) fn query(state: &State, carried: &Carried, scene: &Scene) -> (Carried, Record) {
    let mut record = carried.write(scene);
    record.renew(clock(state.hour));
    record.mac = mac_of(&record, &key(state.key));
    let renewed = record.issued_ns == clock(state.hour);
    let hour = if renewed { state.hour } else { carried.hour };
    (Carried { hour, key: state.key, rotation: state.rotations, ..*carried }, record)
}

impl Carried {
    /// The record, as the kernel gives it to the service.
    pub(super) fn write(&self, scene: &Scene) -> Record {
        let mut record = self.write_without_mac(scene);
        record.mac = mac_of(&record, &key(self.key));
        record
    }

    pub(super) fn write_without_mac(&self, scene: &Scene) -> Record {
        let mut record = Record::new_zeroed();
        record.magic = MAGIC;
        record.version = VERSION;
        record.epoch = EPOCH;
        record.issued_ns = clock(self.hour);
        for (index, hop) in (0..).zip(self.hops()) {
            record.push(Hop { handle: scene.handles[hop], filter: 1 });
            if self.guessed & 1 << index != 0 {
                record.guess(index);
            }
        }
        record.legs = self.legs.into();
        record
    }

    /// The record with one hop more, as the connect hook appends it; `legs` as the decision has them.
    /// `None` if there is no room.
    pub(super) fn with_hop(&self, handle: usize, legs: u32) -> Option<Self> {
        let mut longer = *self;
        let length = usize::from(self.length);
        if length == HANDLES {
            return None;
        }
        longer.hops[length] = handle as u8;
        longer.length += 1;
        longer.legs = legs as u8 + 1;
        Some(longer)
    }
}

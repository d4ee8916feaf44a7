//! What the model remembers: the kernel's maps and sockets, and what really happened.

use std::hash::{Hash, Hasher};

use crate::scene::{DESTINATIONS, HANDLES, PROCESSES};

/// Number of concurrent flows that there is room for.
pub const FLOWS: usize = 3;

/// A record, as far as it differs between flows. Handles are known by their place in the scene.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Carried {
    /// The hops, oldest first.
    pub hops: [u8; HANDLES],
    /// Number of hops.
    pub length: u8,
    /// What it says of the number of legs.
    pub legs: u8,
    /// Set of the places in it of hops that are guessed.
    pub guessed: u8,
    /// In which hour it was issued.
    pub hour: u8,
    /// The number of the key under which it was issued.
    pub key: u8,
    /// How often the administrator had rotated the key by then.
    pub rotation: u8,
}

/// Where a flow is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// It has not begun.
    #[default]
    Waiting,
    /// This process holds it.
    Held(u8),
    /// It has reached its destination, after so many services.
    Arrived(u8),
    /// It was refused.
    Refused(Refusal),
    /// A process that held it has died.
    Broken,
}

/// Why a flow was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// A filter blocks it.
    Filter,
    /// A service has no live listener, and its failure policy is `block`.
    Unavailable,
    /// The hop guard.
    Loop,
    /// The kernel took no record from the service, which gave up.
    Record,
}

/// A flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// Where it goes.
    pub destination: u8,
    /// Where it is.
    pub place: Place,
    /// The record of the leg that was delivered last.
    pub record: Carried,
    /// The record that its service has set on the socket with which it is to go on.
    pub set: Option<Carried>,
    /// What really happened: for which service the last leg was, by its handle; of a flow that is held.
    pub delivered: u8,
    /// What really happened: the handles of the services that held it.
    pub seen: u8,
    /// What really happened: how many legs it has made; since the last lie, if there were any.
    pub legs: u8,
    /// What really happened: some service went on without the record.
    pub forgot: bool,
    /// What really happened: some service went on with another record, or to another destination.
    pub lied: bool,
    /// What really happened: what an unmodified service connected for it adopted a record that is not
    /// exactly its own.
    pub doubted: bool,
    /// The records of the legs of this flow that unmodified services hold, by handle, and where those
    /// go.
    pub kept: [Option<(Carried, u8)>; HANDLES],
    /// The connections of this flow that services hold, by handle and destination. Counted only where
    /// services may forget the record.
    pub held: [[u8; DESTINATIONS]; HANDLES],
}

/// All there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Which scene is played.
    pub scene: u16,
    /// Which of its policies is in force.
    pub generation: u8,
    /// How many steps of a transaction have been taken that is under way.
    pub step: u8,
    /// By process: 0 if it is dead, else the handle (plus 1) under which it registered its listener.
    pub listens: [u8; PROCESSES],
    /// The guard's memory: legs by handle and destination.
    pub guard: [[u8; DESTINATIONS]; HANDLES],
    /// The flows.
    pub flows: [Flow; FLOWS],
    /// Which hour it is.
    pub hour: u8,
    /// The number of the current key. The one before is at the other place.
    pub key: u8,
    /// How often the administrator has rotated the key.
    pub rotations: u8,
    /// In which hour that was last.
    pub rotated: u8,
    /// Whether the programs have been replaced.
    pub upgraded: bool,
    /// How many lies were told.
    pub lies: u8,
    /// Set of the faults that have been seen.
    pub faults: u16,
}

impl Hash for State {
    /// Flows are told apart by what they are, not by their number: states that differ in the order of
    /// the flows alone have the same futures, so that one of them is explored for all.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut flows = self.flows;
        flows.sort_unstable();
        flows.hash(hasher);
        (self.scene, self.generation, self.step, self.listens, self.guard).hash(hasher);
        (self.hour, self.key, self.rotations, self.rotated).hash(hasher);
        (self.upgraded, self.lies, self.faults).hash(hasher);
    }
}

impl Carried {
    /// The hops in use.
    pub fn hops(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        self.hops.iter().take(self.length.into()).map(|hop| usize::from(*hop))
    }

    /// Set of the handles in it.
    pub fn handles(&self) -> u8 {
        self.hops().fold(0, |set, hop| set | 1 << hop)
    }

    /// Set of the handles in it that are certain.
    pub fn certain(&self) -> u8 {
        let hops = (0..).zip(self.hops()).filter(|(place, _)| self.guessed & 1 << place == 0);
        hops.fold(0, |set, (_, hop)| set | 1 << hop)
    }

    /// The record as it was when it was delivered to the service `handle`, if it was.
    pub fn when_delivered_to(&self, handle: usize) -> Option<Self> {
        let at = self.hops().position(|hop| hop == handle)? as u8;
        let mut earlier = *self;
        earlier.length = at + 1;
        earlier.hops[usize::from(at) + 1..].fill(0);
        earlier.guessed &= (1 << earlier.length) - 1;
        // Every later hop was a leg.
        earlier.legs = self.legs - (self.length - earlier.length);
        Some(earlier)
    }
}

impl Flow {
    /// Whether nothing more can happen to it.
    pub fn has_ended(&self) -> bool {
        !matches!(self.place, Place::Waiting | Place::Held(_))
    }

    /// Ends it. What it was no longer matters.
    pub fn end(&mut self, place: Place) {
        *self = Self { destination: self.destination, place, ..Self::default() };
    }
}

impl State {
    /// The process with the live listener of a service, if it has one.
    pub fn listener_of(&self, handle: usize) -> Option<usize> {
        self.listens.iter().position(|listens| usize::from(*listens) == handle + 1)
    }

    /// Flows for a destination that the service holds.
    pub fn live(&self, handle: usize, destination: usize) -> u8 {
        self.flows.iter().map(|flow| flow.held[handle][destination]).sum()
    }

    /// Notes a fault.
    pub fn note(&mut self, fault: super::Fault, happened: bool) {
        self.faults |= u16::from(happened) << fault as u16;
    }
}

//! The decision: compiled policy + connection + record -> what to do.
//!
//! The kernel's connect hooks, `carnet explain` and the tests call [`classify`]. It walks the tree
//! to a leaf, checks the leaf's candidates in the order of arbitration and combines what they say.

use crate::{
    address::{Endpoint, Wide},
    arbitration::{Verdict, action_of},
    chain::{Chain, hop_limit, slot_bit},
    table::{
        Action, ConditionRow, EMPTY_LEAF, FAILURE_SKIP, FilterRow, LEAF, LeafRow, MAX_CANDIDATES,
        MAX_CONDITIONS, MAX_DEPTH, MAX_SERVICES, NO_SLOT, Step, Tables,
    },
};

/// A connection that is to be classified: the values of its fields.
pub trait Connection {
    /// The value of `field` (a [`Field`](crate::table::Field) as number); `argument` is the level
    /// for the cgroup field. An unknown field is [`Wide::MIN`].
    fn value(&self, field: u32, argument: u32) -> Wide;

    /// Whether a service can stand for the destination: [`is_redirectable`].
    fn is_redirectable(&self) -> bool;
}

/// Whether a service can stand for `destination` towards a socket of the IP protocol `protocol`: not
/// for the many that a datagram to a group is for.
#[inline(always)]
pub const fn is_redirectable(protocol: u32, destination: &Endpoint) -> bool {
    const TCP: u32 = 6;
    protocol == TCP || !destination.is_group()
}

/// Who knows whether services can take a connection now.
pub trait Listeners {
    /// Whether the service with this redirect handle has a live registered listener that this
    /// connection can be sent to.
    fn is_live(&mut self, handle: u64) -> bool;

    /// Redirected legs so far of a connection without a record, as far as they can be known
    /// otherwise: where its process belongs to a service that holds flows for the same
    /// destination, the most legs that one of those has made, else 0. Asked only for a connection
    /// that is about to be redirected, so that all others do not pay for it.
    fn forgotten_legs(&mut self) -> u32 {
        0
    }
}

/// Is told how the classifier reached its decision. The kernel's tells nobody and costs nothing.
pub trait Observer {
    /// The classifier begins, or begins anew because a service turned out to be dead: what was
    /// told before does not count.
    fn begin(&mut self) {}

    /// The filter matched, and this came of it.
    fn matched(&mut self, filter: &FilterRow, outcome: Outcome);
}

/// What came of a filter that matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It decided for its sublayer: the answer is now this.
    Decided(Verdict),
    /// It redirects the connection.
    Redirects,
    /// A heavier filter of its sublayer has already decided.
    Shadowed,
    /// It would redirect, but a heavier sublayer's hard decision forbids it (contract C26).
    Overruled,
    /// It would redirect, but another service gets the connection first: it permits this leg, and
    /// its service meets the flow on the next one (contract C20).
    LaterLeg,
    /// It would redirect, but its service has already had the flow (contract C6, C8).
    AlreadyVisited,
    /// It would redirect, but its service trusts those that had the flow (contract C7).
    Trusts,
    /// It would redirect, but the datagram is for a group, for which no service can stand.
    Group,
    /// Its service has no live listener and is passed over (failure policy `skip`).
    Skipped,
    /// Its service has no live listener and the connection is refused (failure policy `block`).
    ServiceUnavailable,
}

/// Why the decision is what it is. The numbers are part of the layout of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Reason {
    /// No filter decided.
    NoFilter = 0,
    /// A filter decided.
    Filter = 1,
    /// The service that a filter redirects to has no live listener, and its policy is `block`.
    ServiceUnavailable = 2,
    /// The flow has made more legs than there can be services: one of them forgot the record.
    Loop = 3,
}

/// What to do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Decision {
    /// The combined answer of the sublayers.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// Slot of the service to redirect to; [`NO_SLOT`] if the connection is not redirected.
    pub slot: u32,
    /// Redirected legs that the flow had made before this one; 0 if it is not redirected.
    pub legs: u32,
    /// That service's redirect handle. With [`Reason::ServiceUnavailable`] the missing one's, with
    /// [`Reason::Loop`] that of the service that would have had the connection once more.
    pub handle: u64,
    /// The filter that redirects; if none does, the one that brought the verdict, 0 if none did.
    pub filter: u64,
    /// Set of the slots that were passed over because they had no live listener.
    pub skipped: u64,
}

impl Reason {
    /// The reason with this number; one that the layout does not know is a filter's.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::NoFilter,
            2 => Self::ServiceUnavailable,
            3 => Self::Loop,
            _ => Self::Filter,
        }
    }
}

impl Decision {
    /// Passing, because nothing says otherwise.
    pub const PASS: Self = Self {
        verdict: Verdict::None,
        reason: Reason::NoFilter,
        slot: NO_SLOT,
        legs: 0,
        handle: 0,
        filter: 0,
        skipped: 0,
    };

    /// Whether the connection is to be sent to a service.
    #[inline(always)]
    pub const fn redirects(&self) -> bool {
        self.slot != NO_SLOT
    }

    /// Whether the connection is to be refused.
    #[inline(always)]
    pub const fn blocks(&self) -> bool {
        self.verdict.blocks()
    }
}

/// Decides what happens to `connection`, whose record reads `chain`.
#[inline(always)]
pub fn classify<T, C, L, O>(
    tables: &T,
    connection: &C,
    chain: &Chain,
    listeners: &mut L,
    observer: &mut O,
) -> Decision
where
    T: Tables,
    C: Connection,
    L: Listeners,
    O: Observer,
{
    let services = tables.header().map_or(0, |header| header.services);
    let mut pending = HostPending {
        tables,
        leaf: leaf_of(tables, connection),
        connection,
        chain,
        listeners,
        observer,
        decision: Decision::PASS,
    };
    settle(chain.hops != 0, chain.legs, services.wrapping_add(chain.strangers), &mut pending);
    pending.decision
}

/// A connection whose decision is being worked out, as [`settle`] needs it.
pub trait Pending: Listeners {
    /// Makes the decision ([`decide`]), if just the services in `dead` have no live listener.
    fn decide(&mut self, dead: u64);
    /// The decision that was made last.
    fn decision(&mut self) -> &mut Decision;
}

/// The outer half of [`classify`]: asks whether the service that a decision names is live, and if
/// it is not, has the inner half decide again without it. It ends, since every turn finds one
/// service more dead.
///
/// `recorded` is whether there is a record, `legs` the legs that it counts, `services` the number of
/// services in the policy, and of strangers in the record. The kernel calls the halves apart, so that the
/// verifier can look at each on its own.
#[inline(always)]
pub fn settle<P: Pending>(recorded: bool, legs: u32, services: u32, pending: &mut P) {
    let mut dead = 0;
    pending.decide(dead);
    for _ in 0..MAX_SERVICES {
        let decision = pending.decision();
        let (handle, slot) = (decision.handle, decision.slot);
        if slot == NO_SLOT || pending.is_live(handle) {
            break;
        }
        dead |= slot_bit(slot);
        pending.decide(dead);
    }
    if pending.decision().redirects() {
        let forgotten = if recorded { 0 } else { pending.forgotten_legs() };
        let legs = if forgotten > legs { forgotten } else { legs };
        let decision = pending.decision();
        decision.legs = legs;
        if legs >= hop_limit(services) {
            decision.verdict = Verdict::HardBlock;
            decision.reason = Reason::Loop;
            decision.slot = NO_SLOT;
        }
    }
}

/// [`Pending`] over references, as [`classify`] is given them.
struct HostPending<'a, T, C, L, O> {
    tables: &'a T,
    leaf: LeafRow,
    connection: &'a C,
    chain: &'a Chain,
    listeners: &'a mut L,
    observer: &'a mut O,
    decision: Decision,
}

impl<T, C, L: Listeners, O> Listeners for HostPending<'_, T, C, L, O> {
    fn is_live(&mut self, handle: u64) -> bool {
        self.listeners.is_live(handle)
    }

    fn forgotten_legs(&mut self) -> u32 {
        self.listeners.forgotten_legs()
    }
}

impl<T, C, L, O> Pending for HostPending<'_, T, C, L, O>
where
    T: Tables,
    C: Connection,
    L: Listeners,
    O: Observer,
{
    fn decide(&mut self, dead: u64) {
        self.observer.begin();
        self.decision =
            decide(self.tables, &self.leaf, self.connection, self.chain, dead, self.observer);
    }

    fn decision(&mut self) -> &mut Decision {
        &mut self.decision
    }
}

/// Whether any filter may match, as far as the destination tells: whether the connection passes the
/// policy's outer gate. Most do not. Asks for fields of the destination only.
#[inline(always)]
pub fn destination_concerns_somebody<T: Tables, C: Connection>(tables: &T, connection: &C) -> bool {
    tables.header().is_some_and(|header| passes(&header.outer_gate, connection))
}

/// Whether any filter may match, as far as the policy's inner gate tells.
#[inline(always)]
pub fn concerns_somebody<T: Tables, C: Connection>(tables: &T, connection: &C) -> bool {
    tables.header().is_some_and(|header| passes(&header.inner_gate, connection))
}

#[inline(always)]
fn passes<C: Connection>(gate: &ConditionRow, connection: &C) -> bool {
    connection.value(gate.field, gate.argument).within(gate.first, gate.last)
}

/// Where the connection's place in the tree is: the run of its candidates, empty if no filter can
/// match.
#[inline(always)]
pub fn leaf_of<T: Tables, C: Connection>(tables: &T, connection: &C) -> LeafRow {
    const NONE: LeafRow = LeafRow { first: 0, count: 0 };
    let Some(header) = tables.header() else {
        return NONE;
    };
    if !destination_concerns_somebody(tables, connection) || !concerns_somebody(tables, connection)
    {
        return NONE;
    }
    let mut at = header.root;
    // A loop of its own, not `Repeat`: it is short, and every connect walks it.
    for _ in 0..MAX_DEPTH {
        if at & LEAF != 0 {
            break;
        }
        let Some(node) = tables.node(at) else {
            return NONE;
        };
        let value = connection.value(node.field, node.argument);
        at = if value.below(node.split) { node.left } else { node.right };
    }
    // The way ends in a leaf with every table that the compiler made.
    if at & LEAF == 0 || at == EMPTY_LEAF {
        return NONE;
    }
    tables.leaf(at & !LEAF).copied().unwrap_or(NONE)
}

/// The inner half of [`classify`]: the decision by the candidates in `leaf`, if just the services in
/// `dead`, a set of slots, have no live listener.
#[inline(always)]
pub fn decide<T, C, O>(
    tables: &T,
    leaf: &LeafRow,
    connection: &C,
    chain: &Chain,
    dead: u64,
    observer: &mut O,
) -> Decision
where
    T: Tables,
    C: Connection,
    O: Observer,
{
    if leaf.count == 0 {
        return Decision::PASS;
    }
    let mut scan = Scan {
        tables,
        connection,
        chain,
        observer,
        dead,
        first: leaf.first,
        decided_sublayer: T::forget(u32::MAX),
        redirecting: 0,
        verdict: T::forget(Verdict::None as u32),
        reason: T::forget(Reason::NoFilter as u32),
        slot: T::forget(NO_SLOT),
        handle: 0,
        filter: u64::from(T::forget(0)),
        skipped: 0,
    };
    T::repeat(if leaf.count < MAX_CANDIDATES { leaf.count } else { MAX_CANDIDATES }, &mut scan);
    let mut decision = Decision {
        verdict: Verdict::from_number(scan.verdict),
        reason: Reason::from_number(scan.reason),
        slot: scan.slot,
        legs: 0,
        handle: scan.handle,
        filter: scan.filter,
        skipped: scan.skipped,
    };
    if decision.redirects() {
        if decision.blocks() {
            decision.slot = NO_SLOT;
            decision.handle = 0;
        } else {
            decision.filter = scan.redirecting;
        }
    }
    decision
}

/// The way through a leaf's candidates.
struct Scan<'a, T, C, O> {
    tables: &'a T,
    connection: &'a C,
    chain: &'a Chain,
    observer: &'a mut O,
    dead: u64,
    first: u32,
    decided_sublayer: u32,
    /// The filter whose service gets the connection. Kept apart from the decision's filter, which
    /// lighter sublayers change.
    redirecting: u64,
    // The decision so far, its enums as numbers: see `Repeat::forget`.
    verdict: u32,
    reason: u32,
    slot: u32,
    handle: u64,
    filter: u64,
    skipped: u64,
}

impl<T, C, O> Step for Scan<'_, T, C, O>
where
    T: Tables,
    C: Connection,
    O: Observer,
{
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(candidate) = self.tables.candidate(self.first.wrapping_add(index)) else {
            return false;
        };
        let Some(filter) = self.tables.filter(*candidate) else {
            return false;
        };
        let mut matching = Matching {
            tables: self.tables,
            connection: self.connection,
            first: filter.first_condition,
            count: filter.condition_count,
            matches: true,
        };
        if filter.condition_count != 0 {
            T::repeat(MAX_CONDITIONS, &mut matching);
        }
        if matching.matches {
            let outcome = self.take(filter);
            self.observer.matched(filter, outcome);
        }
        true
    }
}

impl<T: Tables, C: Connection, O> Scan<'_, T, C, O> {
    /// Lets a filter that matches have its say.
    #[inline(always)]
    fn take(&mut self, filter: &FilterRow) -> Outcome {
        if filter.sublayer == self.decided_sublayer {
            return Outcome::Shadowed;
        }
        let action = action_of(filter);
        if matches!(action, Action::Redirect) {
            return self.redirect(filter);
        }
        let verdict = Verdict::from_number(self.verdict).after(action, filter.flags);
        self.decide(filter, verdict, Reason::Filter);
        Outcome::Decided(verdict)
    }

    #[inline(always)]
    fn redirect(&mut self, filter: &FilterRow) -> Outcome {
        if !Verdict::from_number(self.verdict).allows_redirect() {
            return Outcome::Overruled;
        }
        if !self.connection.is_redirectable() {
            return Outcome::Group;
        }
        let Some(service) = self.tables.service(filter.slot) else {
            return Outcome::AlreadyVisited;
        };
        if !self.chain.may_redirect(filter.slot, service) {
            let visited = self.chain.visited | self.chain.guessed;
            let is_visited = u64::from(visited) & slot_bit(filter.slot) != 0;
            return if is_visited { Outcome::AlreadyVisited } else { Outcome::Trusts };
        }
        let permitted = Verdict::from_number(self.verdict).after(Action::Redirect, 0);
        if self.slot != NO_SLOT {
            self.decide(filter, permitted, Reason::Filter);
            return Outcome::LaterLeg;
        }
        if self.dead & slot_bit(filter.slot) == 0 {
            self.slot = filter.slot;
            self.handle = service.handle;
            self.redirecting = filter.id;
            self.decide(filter, permitted, Reason::Filter);
            return Outcome::Redirects;
        }
        if service.failure == FAILURE_SKIP {
            self.skipped |= slot_bit(filter.slot);
            return Outcome::Skipped;
        }
        self.handle = service.handle;
        self.decide(filter, Verdict::HardBlock, Reason::ServiceUnavailable);
        Outcome::ServiceUnavailable
    }

    /// Ends the filter's sublayer with `verdict`.
    #[inline(always)]
    fn decide(&mut self, filter: &FilterRow, verdict: Verdict, reason: Reason) {
        self.decided_sublayer = filter.sublayer;
        if verdict as u32 != self.verdict || self.filter == 0 {
            self.filter = filter.id;
            self.reason = T::forget(reason as u32);
        }
        self.verdict = T::forget(verdict as u32);
    }
}

/// The check of one filter's conditions.
struct Matching<'a, T, C> {
    tables: &'a T,
    connection: &'a C,
    first: u32,
    count: u32,
    matches: bool,
}

impl<T: Tables, C: Connection> Step for Matching<'_, T, C> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        if index >= self.count {
            return false;
        }
        let Some(condition) = self.tables.condition(self.first.wrapping_add(index)) else {
            self.matches = false;
            return false;
        };
        let value = self.connection.value(condition.field, condition.argument);
        self.matches = value.within(condition.first, condition.last);
        self.matches
    }
}

/// An observer that is not interested.
#[derive(Clone, Copy, Debug)]
pub struct Unobserved;

impl Observer for Unobserved {
    #[inline(always)]
    fn matched(&mut self, _filter: &FilterRow, _outcome: Outcome) {}
}

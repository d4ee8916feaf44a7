//! Objects to tables: the policy as the kernel reads it.
//!
//! [`compile()`] sorts the filters into the order of arbitration, expands each into rows with one
//! range per field, and cuts the space of connections into the tree that
//! [`table`](crate::table) describes. The rows and their order are the policy's meaning; the tree
//! is only a fast way to them.
//!
//! # How the tree is cut
//!
//! The compiler begins with one leaf that holds all rows and keeps replacing a leaf by a node and
//! two leaves. For each field it looks at the quartiles of the bounds of the leaf's rows, and takes
//! the field and value for which the sum of the squared sizes of the two halves is smallest: that
//! is what a lookup costs on average. Rows that reach over the cut go into both halves. Leaves that
//! have more than [`SMALL_LEAF`] rows to tell apart come first, and among them the cut that repeats
//! the fewest rows for what it gains. It ends when no leaf can be cut or one of the limits
//! [`max_nodes`], [`max_candidates`] and [`MAX_DEPTH`] is reached, so that both time
//! (about `n log n`) and space (linear) are bounded whatever the policy.

use alloc::{
    collections::{BTreeMap, BinaryHeap},
    string::String,
    vec::Vec,
};
use core::{cmp::Reverse, num::NonZeroU16, ops::Range};

use crate::{
    address::Wide,
    adoption::Atomic,
    object::{FailurePolicy, Filter, FilterAction, Policy, Service, Trust, largest_value},
    portable::identity,
    table::{
        Action, ConditionRow, EMPTY_LEAF, FAILURE_BLOCK, FAILURE_SKIP, FILTER_HARD, FILTER_VETO,
        Field, FilterRow, HeaderRow, LEAF, LeafRow, MAX_CANDIDATES, MAX_DEPTH, NO_SLOT, NodeRow,
        Repeat, ServiceRow, Step, Tables,
    },
};

/// Most rows that one filter may become.
pub const MAX_ROWS_PER_FILTER: usize = 1024;

/// A leaf with no more rows than this to tell apart is cut further only while there is room.
pub const SMALL_LEAF: usize = 8;

/// Most nodes of a tree over `rows` filter rows. It has at most one leaf more.
pub const fn max_nodes(rows: usize) -> usize {
    rows + 256
}

/// Most entries of the candidate list for `rows` filter rows.
pub const fn max_candidates(rows: usize) -> usize {
    let linear = 8 * rows + 4096;
    if linear < MAX_CANDIDATES as usize { linear } else { MAX_CANDIDATES as usize }
}

/// Why a policy cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The values of a filter's fields have too many combinations.
    #[error(
        "filter {filter} becomes {rows} rows, and {} are possible: name fewer values, or ranges \
         instead of single values, or make several filters of it",
        MAX_ROWS_PER_FILTER
    )]
    TooManyRowsInFilter {
        /// The filter's id.
        filter: u64,
        /// The number of combinations; `usize::MAX` if it is even larger.
        rows: usize,
    },
    /// The policy is too large.
    #[error(
        "the policy becomes {rows} rows, and {} are possible: remove filters, or name fewer values \
         in them",
        MAX_CANDIDATES
    )]
    TooManyRows {
        /// The number of rows.
        rows: usize,
    },
    /// Two services are the same to other hosts.
    #[error(
        "services {one:?} and {other:?} have the same identity, by which other hosts know a service: \
         give one of them another name"
    )]
    SameIdentity {
        /// The name of one.
        one: String,
        /// The name of the other.
        other: String,
    },
    /// A filter names a sublayer or service that the policy does not have.
    #[error("filter {filter} refers to {name:?}, which the policy does not have")]
    DanglingReference {
        /// The filter's id.
        filter: u64,
        /// The name that leads nowhere.
        name: String,
    },
}

/// A compiled policy: the tables of one bank.
///
/// It is also the host's implementation of [`Tables`], over which `carnet explain` and the tests
/// decide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompiledPolicy {
    header: HeaderRow,
    nodes: Vec<NodeRow>,
    leaves: Vec<LeafRow>,
    candidates: Vec<u32>,
    filters: Vec<FilterRow>,
    conditions: Vec<ConditionRow>,
    services: Vec<ServiceRow>,
    contexts: BTreeMap<u64, Vec<u8>>,
}

/// Compiles `policy` as transaction number `generation`.
///
/// # Errors
/// [`CompileError`], if the policy has more rows than the tables hold, or two services that other hosts
/// cannot tell apart.
pub fn compile(policy: &Policy, generation: u64) -> Result<CompiledPolicy, CompileError> {
    let mut compiled = CompiledPolicy { services: service_rows(policy), ..Default::default() };
    check_identities(policy.services(), &compiled.services)?;
    compiled.add_filters(policy)?;
    compiled.header = HeaderRow {
        outer_gate: gate(&compiled, Field::is_of_destination),
        inner_gate: gate(&compiled, |_| true),
        generation,
        root: EMPTY_LEAF,
        fields: compiled.conditions.iter().fold(0, |fields, c| fields | 1 << c.field),
        services: compiled.services.len() as u32,
        document_length: 0,
        unmodified: compiled.services.iter().any(|service| service.unmodified != 0).into(),
        zero: 0,
    };
    Cutter::new(&mut compiled).cut();
    Ok(compiled)
}

/// A gate: of the `eligible` fields the one whose range around all rows leaves out the largest part of its
/// values. Where several leave out as much it is the first, which is cheap to find out.
fn gate(compiled: &CompiledPolicy, eligible: impl Fn(Field) -> bool) -> ConditionRow {
    // Nothing passes; what a policy without filters has.
    let shut = ConditionRow { first: Wide::from(1), last: Wide::MIN, ..Default::default() };
    let Some(row) = compiled.filters.first() else {
        return shut;
    };
    let conditions = |row: &FilterRow| {
        let first = row.first_condition as usize;
        &compiled.conditions[first..first + row.condition_count as usize]
    };
    let open = ConditionRow { last: Wide::MAX, ..Default::default() };
    // A field that some row does not test leaves nothing out, so those of one row are enough.
    let starts = conditions(row).iter().filter(|c| eligible(Field::ALL[c.field as usize]));
    let hulls = starts.filter_map(|start| {
        let mut hull = *start;
        for row in &compiled.filters {
            let same = |c: &&ConditionRow| (c.field, c.argument) == (hull.field, hull.argument);
            let range = conditions(row).iter().find(same)?;
            hull.first = hull.first.min(range.first);
            hull.last = hull.last.max(range.last);
        }
        Some(hull)
    });
    let part_let_through = |hull: &ConditionRow| {
        let all = largest_value(Field::ALL[hull.field as usize]);
        let passing = u128::from(hull.last) - u128::from(hull.first);
        // In 65536ths: the fields' sizes differ by many orders of magnitude.
        (passing / (all / 65536 + 1), hull.field)
    };
    hulls.min_by_key(part_let_through).unwrap_or(open)
}

impl CompiledPolicy {
    /// The head. Its document length is 0: whoever writes the document fills it in.
    pub fn header(&self) -> &HeaderRow {
        &self.header
    }

    /// The nodes of the tree; none if the root is a leaf.
    pub fn nodes(&self) -> &[NodeRow] {
        &self.nodes
    }

    /// The leaves of the tree, but for the empty one, which needs no row.
    pub fn leaves(&self) -> &[LeafRow] {
        &self.leaves
    }

    /// The candidate list: indices of filter rows.
    pub fn candidates(&self) -> &[u32] {
        &self.candidates
    }

    /// The filter rows, in the order of arbitration.
    pub fn filters(&self) -> &[FilterRow] {
        &self.filters
    }

    /// The conditions of the filter rows.
    pub fn conditions(&self) -> &[ConditionRow] {
        &self.conditions
    }

    /// The services: those of the policy, in its order.
    pub fn services(&self) -> &[ServiceRow] {
        &self.services
    }

    /// The redirect contexts: id of the filter, and the bytes. Filters without one are left out.
    pub fn contexts(&self) -> impl ExactSizeIterator<Item = (u64, &[u8])> {
        self.contexts.iter().map(|(filter, bytes)| (*filter, bytes.as_slice()))
    }

    /// The redirect context of the filter with this id.
    pub fn context(&self, filter: u64) -> Option<&[u8]> {
        self.contexts.get(&filter).map(Vec::as_slice)
    }

    fn add_filters(&mut self, policy: &Policy) -> Result<(), CompileError> {
        let ranks: BTreeMap<&str, u32> =
            policy.sublayers_in_order().iter().map(|s| s.name.as_str()).zip(0..).collect();
        let slots: BTreeMap<&str, u32> =
            policy.services().iter().map(|s| s.name.as_str()).zip(0..).collect();
        let look_up = |table: &BTreeMap<&str, u32>, filter: &Filter, name: &str| {
            let dangling =
                || CompileError::DanglingReference { filter: filter.id, name: name.into() };
            table.get(name).copied().ok_or_else(dangling)
        };

        let mut order = Vec::with_capacity(policy.filters().len());
        for filter in policy.filters() {
            let rank = look_up(&ranks, filter, &filter.sublayer)?;
            order.push((rank, Reverse(filter.effective_weight()), filter.id, filter));
        }
        order.sort_unstable_by_key(|(rank, weight, id, _)| (*rank, *weight, *id));

        for (sublayer, _, id, filter) in order {
            let mut row = FilterRow { id, sublayer, slot: NO_SLOT, ..Default::default() };
            let flag = |set: bool, flag: u32| if set { flag } else { 0 };
            match &filter.action {
                FilterAction::Permit { hard } => {
                    row.action = Action::Permit as u32;
                    row.flags = flag(*hard, FILTER_HARD);
                }
                FilterAction::Block { hard, veto } => {
                    row.action = Action::Block as u32;
                    row.flags = flag(*hard, FILTER_HARD) | flag(*veto, FILTER_VETO);
                }
                FilterAction::Redirect { service, context } => {
                    row.action = Action::Redirect as u32;
                    row.slot = look_up(&slots, filter, service)?;
                    if let Some(context) = context {
                        self.contexts.insert(id, context.as_bytes().to_vec());
                    }
                }
            }
            self.add_rows(row, filter)?;
        }
        Ok(())
    }

    /// Adds a row for each combination of the values of the filter's fields.
    fn add_rows(&mut self, row: FilterRow, filter: &Filter) -> Result<(), CompileError> {
        let fields = Field::ALL.map(|field| (field, filter.conditions.ranges(field)));
        let mut tested: Vec<_> =
            fields.into_iter().filter(|(_, ranges)| !ranges.is_empty()).collect();
        let rows = tested.iter().try_fold(1_usize, |n, (_, r)| n.checked_mul(r.len()));
        let rows = rows.unwrap_or(usize::MAX);
        if rows > MAX_ROWS_PER_FILTER {
            return Err(CompileError::TooManyRowsInFilter { filter: filter.id, rows });
        }
        if self.filters.len() + rows > MAX_CANDIDATES as usize {
            return Err(CompileError::TooManyRows { rows: self.filters.len() + rows });
        }
        // Checked last, since nearly every connection has the protocol that filters name.
        tested.sort_by_key(|(field, _)| *field == Field::Protocol);
        for combination in 0..rows {
            let mut rest = combination;
            let first_condition = self.conditions.len() as u32;
            for (field, ranges) in &tested {
                let range = ranges[rest % ranges.len()];
                rest /= ranges.len();
                self.conditions.push(ConditionRow {
                    field: *field as u32,
                    argument: range.argument,
                    first: Wide::from(range.first),
                    last: Wide::from(range.last),
                });
            }
            let condition_count = tested.len() as u32;
            self.filters.push(FilterRow { first_condition, condition_count, ..row });
        }
        Ok(())
    }
}

fn service_rows(policy: &Policy) -> Vec<ServiceRow> {
    let services = policy.services();
    let row = |service: &Service| {
        let trusts = |name: &String| services.iter().position(|other| other.name == *name);
        let (trusts, trusts_all) = match &service.trust {
            Trust::None => (0, 0),
            Trust::All => (0, 1),
            Trust::Services(names) => {
                (names.iter().filter_map(trusts).fold(0, |set, slot| set | 1_u64 << slot), 0)
            }
        };
        let failure = match service.on_failure {
            FailurePolicy::Block => FAILURE_BLOCK,
            FailurePolicy::Skip => FAILURE_SKIP,
        };
        ServiceRow {
            handle: service.handle,
            trusts,
            trusts_all,
            failure,
            unmodified: service.unmodified.into(),
            listen_port: service.listen_port.map_or(0, NonZeroU16::get),
            tproxy: service.tproxy.into(),
            identity: identity(&service.provider, &service.name),
            gateway: service.gateway.into(),
            zero: 0,
        }
    };
    services.iter().map(row).collect()
}

/// Refuses services that other hosts cannot tell apart; `rows` are those of `services`.
fn check_identities(services: &[Service], rows: &[ServiceRow]) -> Result<(), CompileError> {
    let mut known = BTreeMap::new();
    for (service, row) in services.iter().zip(rows) {
        if let Some(one) = known.insert(row.identity, &service.name) {
            let (one, other) = (one.clone(), service.name.clone());
            return Err(CompileError::SameIdentity { one, other });
        }
    }
    Ok(())
}

impl Repeat for CompiledPolicy {
    fn repeat<S: Step>(count: u32, step: &mut S) {
        for index in 0..count {
            if !step.step(index) {
                return;
            }
        }
    }
}

/// On the host one thread counts.
impl Atomic for CompiledPolicy {
    fn add(number: &mut u64, change: u64) -> u64 {
        let before = *number;
        *number = before.wrapping_add(change);
        before
    }

    fn replace(number: &mut u64, old: u64, new: u64) -> u64 {
        let before = *number;
        if before == old {
            *number = new;
        }
        before
    }
}

impl Tables for CompiledPolicy {
    fn header(&self) -> Option<&HeaderRow> {
        Some(&self.header)
    }

    fn node(&self, index: u32) -> Option<&NodeRow> {
        self.nodes.get(index as usize)
    }

    fn leaf(&self, index: u32) -> Option<&LeafRow> {
        self.leaves.get(index as usize)
    }

    fn candidate(&self, index: u32) -> Option<&u32> {
        self.candidates.get(index as usize)
    }

    fn filter(&self, index: u32) -> Option<&FilterRow> {
        self.filters.get(index as usize)
    }

    fn condition(&self, index: u32) -> Option<&ConditionRow> {
        self.conditions.get(index as usize)
    }

    fn service(&self, slot: u32) -> Option<&ServiceRow> {
        self.services.get(slot as usize)
    }

    fn slot_of(&self, handle: u64) -> u32 {
        let slot = self.services.iter().position(|service| service.handle == handle);
        slot.map_or(NO_SLOT, |slot| slot as u32)
    }

    fn handle_of(&self, identity: u64) -> u64 {
        let service = self.services.iter().find(|service| service.identity == identity);
        service.map_or(0, |service| service.handle)
    }
}

/// Builds the tree of a policy whose rows are there.
struct Cutter<'a> {
    compiled: &'a mut CompiledPolicy,
    /// The axes of the space: the fields that are tested, with their arguments.
    axes: Vec<Axis>,
    /// The conditions of the rows, by axis.
    sides: Vec<Side>,
    /// For each row, where its sides are.
    boxes: Vec<Range<u32>>,
    /// For each node, where it hangs.
    places: Vec<Place>,
    /// The leaves that can be cut, the most urgent on top.
    open: BinaryHeap<Reverse<OpenLeaf>>,
    /// Leaves by their candidates: equal ones are stored once.
    closed: BTreeMap<Vec<u32>, u32>,
    /// Candidates of all leaves, open and closed.
    candidates: usize,
    /// Scratch of [`Cutter::best_cut`]: per axis, the sides that do not reach over all the part.
    spans: Vec<Vec<(u128, u128)>>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Axis {
    field: Field,
    argument: u32,
}

/// One row's range on one axis.
#[derive(Clone, Copy)]
struct Side {
    axis: usize,
    first: u128,
    last: u128,
}

/// Where a part of the space hangs in the tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// The node above; `None` for the root.
    parent: Option<u32>,
    /// Whether it is that node's right child.
    right: bool,
    /// Number of nodes above.
    depth: u32,
}

/// A way to cut a part of the space in two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cut {
    /// What a lookup costs afterwards: the sum of the squared numbers of rows.
    cost: u64,
    axis: usize,
    split: u128,
    /// Rows that will be in both halves.
    repeated: usize,
    /// Rows fewer in the two halves together than if both held all.
    gained: usize,
}

/// A leaf that can be cut. They are ordered by urgency.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct OpenLeaf {
    small: bool,
    /// Rows repeated for each row gained, in 256ths.
    price: u64,
    place: Place,
    cut: Cut,
    rows: Vec<u32>,
}

impl<'a> Cutter<'a> {
    fn new(compiled: &'a mut CompiledPolicy) -> Self {
        let axis_of = |c: &ConditionRow| {
            let field = Field::ALL[c.field as usize];
            Axis { field, argument: c.argument }
        };
        let mut axes: Vec<Axis> = compiled.conditions.iter().map(axis_of).collect();
        axes.sort_unstable();
        axes.dedup();
        let side = |c: &ConditionRow| {
            let axis = axes.partition_point(|axis| *axis < axis_of(c));
            Side { axis, first: c.first.into(), last: c.last.into() }
        };
        let sides = compiled.conditions.iter().map(side).collect();
        let boxes = compiled.filters.iter();
        let boxes = boxes.map(|f| f.first_condition..f.first_condition + f.condition_count);
        Self {
            sides,
            boxes: boxes.collect(),
            places: Vec::new(),
            open: BinaryHeap::new(),
            closed: BTreeMap::new(),
            candidates: compiled.filters.len(),
            spans: axes.iter().map(|_| Vec::new()).collect(),
            axes,
            compiled,
        }
    }

    fn cut(mut self) {
        let rows = self.boxes.len();
        let root = Place { parent: None, right: false, depth: 0 };
        self.put(root, (0..rows as u32).collect());
        while let Some(Reverse(leaf)) = self.open.pop() {
            let fits = self.compiled.nodes.len() < max_nodes(rows)
                && self.candidates + leaf.cut.repeated <= max_candidates(rows);
            if fits {
                self.split(leaf);
            } else {
                self.close(leaf.place, leaf.rows);
            }
        }
        // Counted as the leaves were met; a leaf that several nodes share is there once.
        let mut lists: Vec<_> = self.closed.into_iter().collect();
        lists.sort_unstable_by_key(|(_, leaf)| *leaf);
        for (rows, _) in lists {
            let first = self.compiled.candidates.len() as u32;
            self.compiled.leaves.push(LeafRow { first, count: rows.len() as u32 });
            self.compiled.candidates.extend(rows);
        }
    }

    /// Puts a new leaf in its place, and notes how it can be cut.
    fn put(&mut self, place: Place, rows: Vec<u32>) {
        let cut = if place.depth < MAX_DEPTH { self.best_cut(place, &rows) } else { None };
        match cut {
            Some((cut, small)) => {
                let price = cut.repeated as u64 * 256 / cut.gained as u64;
                self.open.push(Reverse(OpenLeaf { small, price, place, cut, rows }));
            }
            None => self.close(place, rows),
        }
    }

    /// Replaces a leaf by a node with two leaves.
    fn split(&mut self, leaf: OpenLeaf) {
        let OpenLeaf { place, cut, rows, .. } = leaf;
        let node = self.compiled.nodes.len() as u32;
        let Axis { field, argument } = self.axes[cut.axis];
        self.compiled.nodes.push(NodeRow {
            field: field as u32,
            argument,
            split: cut.split.into(),
            left: LEAF,
            right: LEAF,
        });
        self.places.push(place);
        self.hang(place, node);
        self.candidates += cut.repeated;
        let reaches = |row: &&u32, test: &dyn Fn(&Side) -> bool| {
            self.sides_of(**row).iter().all(|side| side.axis != cut.axis || test(side))
        };
        let left = rows.iter().filter(|row| reaches(row, &|side| side.first < cut.split));
        let left = left.copied().collect();
        let right = rows.iter().filter(|row| reaches(row, &|side| side.last >= cut.split));
        let right = right.copied().collect();
        let below = Place { parent: Some(node), right: false, depth: place.depth + 1 };
        self.put(below, left);
        self.put(Place { right: true, ..below }, right);
    }

    /// Makes a leaf final.
    fn close(&mut self, place: Place, rows: Vec<u32>) {
        if rows.is_empty() {
            self.hang(place, EMPTY_LEAF);
            return;
        }
        let next = self.closed.len() as u32;
        let leaf = *self.closed.entry(rows).or_insert(next);
        self.hang(place, leaf | LEAF);
    }

    fn hang(&mut self, place: Place, child: u32) {
        match place.parent {
            None => self.compiled.header.root = child,
            Some(node) => {
                let node = &mut self.compiled.nodes[node as usize];
                *(if place.right { &mut node.right } else { &mut node.left }) = child;
            }
        }
    }

    fn sides_of(&self, row: u32) -> &[Side] {
        let Range { start, end } = self.boxes[row as usize];
        &self.sides[start as usize..end as usize]
    }

    /// The part of the space that hangs at `place`: its extent on each axis.
    fn part(&self, mut place: Place) -> Vec<(u128, u128)> {
        let whole = |axis: &Axis| (0, largest_value(axis.field));
        let mut part: Vec<_> = self.axes.iter().map(whole).collect();
        while let Some(parent) = place.parent {
            let node = &self.compiled.nodes[parent as usize];
            let field = Field::ALL[node.field as usize];
            let axis = Axis { field, argument: node.argument };
            let (first, last) = &mut part[self.axes.partition_point(|other| *other < axis)];
            let split = u128::from(node.split);
            if place.right {
                *first = split.max(*first);
            } else {
                *last = (split - 1).min(*last);
            }
            place = self.places[parent as usize];
        }
        part
    }

    /// The best way to cut the part at `place`, if there is one, and whether it has few rows to
    /// tell apart.
    fn best_cut(&mut self, place: Place, rows: &[u32]) -> Option<(Cut, bool)> {
        let part = self.part(place);
        let mut spans = core::mem::take(&mut self.spans);
        spans.iter_mut().for_each(Vec::clear);
        let mut distinct = 0;
        for row in rows {
            let mut cuttable = false;
            for side in self.sides_of(*row) {
                let (first, last) = part[side.axis];
                if side.first > first || side.last < last {
                    spans[side.axis].push((side.first, side.last));
                    cuttable = true;
                }
            }
            distinct += usize::from(cuttable);
        }
        let cuts = spans.iter().zip(&part).enumerate().flat_map(|(axis, (spans, part))| {
            let everywhere = rows.len() - spans.len();
            quartiles(spans, *part).map(move |split| {
                let below = everywhere + spans.iter().filter(|(first, _)| *first < split).count();
                let above = everywhere + spans.iter().filter(|(_, last)| *last >= split).count();
                Cut {
                    cost: (below as u64).pow(2) + (above as u64).pow(2),
                    axis,
                    split,
                    repeated: below + above - rows.len(),
                    gained: 2 * rows.len() - below - above,
                }
            })
        });
        let best = cuts.min();
        self.spans = spans;
        best.map(|cut| (cut, distinct <= SMALL_LEAF))
    }
}

/// Up to three values at which `spans` can be cut within `part`: the quartiles of their bounds.
/// Each leaves out at least one span on one side.
fn quartiles(
    spans: &[(u128, u128)],
    (start, end): (u128, u128),
) -> impl Iterator<Item = u128> + use<> {
    /// Enough to come close to the quartiles.
    const SAMPLE: usize = 512;
    let sampled = spans.iter().step_by(spans.len() / SAMPLE + 1);
    let mut bounds: Vec<u128> = sampled
        .flat_map(|&(first, last)| {
            [(first > start).then_some(first), (last < end).then(|| last + 1)]
        })
        .flatten()
        .collect();
    bounds.sort_unstable();
    let mut picked: Vec<u128> = match bounds.len() {
        0 => Vec::new(),
        n => [n / 4, n / 2, 3 * n / 4].iter().map(|at| bounds[*at]).collect(),
    };
    picked.dedup();
    picked.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{CgroupRef, NewService};

    /// No two names are known that have the same identity: the rows say so here.
    #[test]
    fn services_that_other_hosts_cannot_tell_apart_are_refused() {
        let mut policy = Policy::new();
        policy.add_provider("p", "").unwrap();
        for (name, id) in [("one", 1), ("two", 2)] {
            let cgroup = CgroupRef { path: name.into(), id };
            policy.add_service(NewService::new(name, "p", cgroup)).unwrap();
        }
        let mut rows = service_rows(&policy);
        assert_eq!(check_identities(policy.services(), &rows), Ok(()));
        rows[1].identity = rows[0].identity;
        let error = check_identities(policy.services(), &rows).unwrap_err();
        assert!(alloc::format!("{error}").contains("\"one\" and \"two\""), "{error}");
    }
}

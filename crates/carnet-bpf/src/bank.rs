//! Core's tables over the maps, and core's loop over `bpf_loop`.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::generated::bpf_loop;
use carnet_core::table::{
    ConditionRow, FilterRow, HeaderRow, LeafRow, NO_SLOT, NodeRow, Repeat, ServiceRow, Step, Tables,
};

use crate::maps::{
    ACTIVE, CANDIDATES, CONDITIONS, FILTERS, HEADERS, IDENTITIES, IdentityKey, LEAVES, NODES,
    SERVICES, SLOTS, SlotKey,
};

/// One bank of the policy's tables.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Bank {
    bank: u32,
    zero: u32,
}

impl Bank {
    /// The bank that is in force. Read it once per decision: a decision sees one policy.
    #[inline(always)]
    pub(crate) fn in_force() -> Self {
        let bank = ACTIVE.get(0).map_or(0, |bank| (*bank & 1) as u32);
        Self { bank, zero: 0 }
    }

    #[inline(always)]
    fn row(&self, index: u32) -> u32 {
        index.wrapping_mul(2) | (self.bank & 1)
    }
}

impl Tables for Bank {
    #[inline(always)]
    fn header(&self) -> Option<&HeaderRow> {
        HEADERS.get(self.bank & 1)
    }

    #[inline(always)]
    fn node(&self, index: u32) -> Option<&NodeRow> {
        NODES.get(self.row(index))
    }

    #[inline(always)]
    fn leaf(&self, index: u32) -> Option<&LeafRow> {
        LEAVES.get(self.row(index))
    }

    #[inline(always)]
    fn candidate(&self, index: u32) -> Option<&u32> {
        CANDIDATES.get(self.row(index))
    }

    #[inline(always)]
    fn filter(&self, index: u32) -> Option<&FilterRow> {
        FILTERS.get(self.row(index))
    }

    #[inline(always)]
    fn condition(&self, index: u32) -> Option<&ConditionRow> {
        CONDITIONS.get(self.row(index))
    }

    #[inline(always)]
    fn service(&self, slot: u32) -> Option<&ServiceRow> {
        SERVICES.get(self.row(slot))
    }

    #[inline(always)]
    fn slot_of(&self, handle: u64) -> u32 {
        let key = SlotKey { handle, bank: u64::from(self.bank & 1) };
        // SAFETY: entries of a bank in force are not changed or removed while it is in force; the
        // value is copied out at once.
        unsafe { SLOTS.get(&key) }.map_or(NO_SLOT, |slot| *slot)
    }

    #[inline(always)]
    fn handle_of(&self, identity: u64) -> u64 {
        let key = IdentityKey { identity, bank: u64::from(self.bank & 1) };
        // SAFETY: as in `slot_of`.
        unsafe { IDENTITIES.get(&key) }.map_or(0, |handle| *handle)
    }
}

impl Repeat for Bank {
    #[inline(always)]
    fn repeat<S: Step>(count: u32, step: &mut S) {
        repeat(count, step);
    }

    #[inline(always)]
    fn forget(value: u32) -> u32 {
        // SAFETY: the number is never written; volatile, so that LLVM does not know that.
        value ^ unsafe { ptr::read_volatile(ZERO.0.get()) }
    }
}

/// A number in a writable section, of which the verifier therefore knows nothing. It stays 0.
#[unsafe(no_mangle)]
static ZERO: Zero = Zero(core::cell::UnsafeCell::new(0));

#[repr(transparent)]
struct Zero(core::cell::UnsafeCell<u32>);

// SAFETY: nobody writes it.
unsafe impl Sync for Zero {}

/// Core's loop, as `bpf_loop` (since Linux 5.17): the verifier reads the body once, where it would
/// follow every turn of a written-out loop and give up on long ones.
#[inline(always)]
pub(crate) fn repeat<S: Step>(count: u32, step: &mut S) {
    let body: extern "C" fn(u32, *mut c_void) -> i64 = body::<S>;
    // SAFETY: `body` is called only during this call, with the pointer that is given here, which
    // is to an `S` that nobody else touches meanwhile.
    unsafe { bpf_loop(count, body as *mut c_void, ptr::from_mut(step).cast(), 0) };
}

extern "C" fn body<S: Step>(index: u32, step: *mut c_void) -> i64 {
    // SAFETY: see `repeat`.
    let step = unsafe { &mut *step.cast::<S>() };
    if step.step(index) { 0 } else { 1 }
}

//! Accesses that have to be one certain instruction: fields of the hooks' contexts, atomic addition.
//!
//! The verifier accepts accesses to a context only as `ctx + constant`. LLVM likes to compute the
//! address first, or to merge two neighbouring stores, which is refused ("dereference of modified
//! ctx ptr", "invalid bpf_context access"). Inline assembly leaves it no choice.

/// Reads a 32-bit field at a byte offset of a context.
macro_rules! load32 {
    ($ctx:expr, $offset:literal) => {{
        let value: u64;
        // SAFETY: reads a field of the context that the kernel gave to this program; the
        // verifier checks offset and size.
        unsafe {
            core::arch::asm!(
                concat!("{value} = *(u32 *)({ctx} + ", $offset, ")"),
                value = out(reg) value,
                ctx = in(reg) $ctx,
                options(readonly, nostack, preserves_flags),
            );
        }
        value as u32
    }};
}

/// Reads a 64-bit field, a pointer among them, at a byte offset of a context.
macro_rules! load64 {
    ($ctx:expr, $offset:literal) => {{
        let value: u64;
        // SAFETY: as for `load32`.
        unsafe {
            core::arch::asm!(
                concat!("{value} = *(u64 *)({ctx} + ", $offset, ")"),
                value = out(reg) value,
                ctx = in(reg) $ctx,
                options(readonly, nostack, preserves_flags),
            );
        }
        value
    }};
}

/// Writes a 32-bit field at a byte offset of a context.
macro_rules! store32 {
    ($ctx:expr, $offset:literal, $value:expr) => {{
        let value = u64::from($value);
        // SAFETY: writes a field of the context that the kernel gave to this program; the
        // verifier checks offset and size.
        unsafe {
            core::arch::asm!(
                concat!("*(u32 *)({ctx} + ", $offset, ") = {value}"),
                value = in(reg) value,
                ctx = in(reg) $ctx,
                options(nostack, preserves_flags),
            );
        }
    }};
}

/// Adds to a 64-bit number in a map, atomically; gives what it was before. Rust offers no atomic
/// addition for BPF.
///
/// # Safety
/// `number` points to a number in a map value that lives until the program ends.
#[inline(always)]
pub(crate) unsafe fn fetch_add(number: *mut i64, change: i64) -> i64 {
    let mut value = change;
    // SAFETY: by the caller.
    unsafe {
        core::arch::asm!(
            "{value} = atomic_fetch_add((u64 *)({number} + 0), {value})",
            value = inout(reg) value,
            number = in(reg) number,
            options(nostack, preserves_flags),
        );
    }
    value
}

/// Puts another number in place of `number`, atomically; gives what was there.
///
/// # Safety
/// `number` points to a number in a map value that lives until the program ends.
#[inline(always)]
pub(crate) unsafe fn exchange(number: *mut u32, other: u32) -> u32 {
    let mut value = other;
    // SAFETY: by the caller.
    unsafe {
        core::arch::asm!(
            "{value} = xchg32_32({number} + 0, {value})",
            value = inout(wreg) value,
            number = in(reg) number,
            options(nostack, preserves_flags),
        );
    }
    value
}

/// Puts `new` in the place of `old`, atomically, if that is there; gives what was there.
///
/// # Safety
/// `number` points to a number in a map value that lives until the program ends.
#[inline(always)]
pub(crate) unsafe fn compare_exchange(number: *mut u64, old: u64, new: u64) -> u64 {
    let mut value = old;
    // SAFETY: by the caller.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({number} + 0, r0, {new})",
            inout("r0") value,
            number = in(reg) number,
            new = in(reg) new,
            options(nostack, preserves_flags),
        );
    }
    value
}

/// Hides from LLVM what it knows about a number, so that the comparison that follows is made with
/// the register that is used afterwards: the verifier does not carry bounds from one register to
/// another that was computed beside it; before Linux 6.2 not even from the lower half of a register
/// to the whole, hence 64 bits.
#[inline(always)]
pub(crate) fn opaque(value: u32) -> u64 {
    let mut value = u64::from(value);
    // SAFETY: copies a register to itself. (No instruction at all would give two source lines for
    // one address, which the kernel refuses.)
    unsafe {
        core::arch::asm!(
            "{value} = {value}",
            value = inout(reg) value,
            options(nomem, nostack, preserves_flags),
        );
    }
    value
}

pub(crate) use {load32, load64, store32};

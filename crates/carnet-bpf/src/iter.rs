//! Iterators (since Linux 5.8; over socket storage since 5.9): what the command reads from the
//! kernel on request.
//!
//! `carnet_flows` gives the [`LegState`] of every socket that has one, over all network namespaces.
//! `carnet_files` gives descriptor number and [`FileId`] of the open files of the task that the
//! reader named: the engine opens an executable and learns the identity that the connect hooks will
//! see, which `stat(2)` does not show on every file system.

use core::ffi::c_void;

use aya_ebpf::{bindings::seq_file, helpers::generated::bpf_seq_write};
use carnet_core::{flow::LegState, record::FileId};

use crate::{
    ctx::{load32, load64},
    process::{field, file_id, offset},
    socket::{ESTABLISHED, is_datagram},
};

/// Begin of `struct bpf_iter_meta`: the sequence file to write to.
#[inline(always)]
fn sequence_file(ctx: *mut c_void) -> *mut seq_file {
    let meta = load64!(ctx, 0);
    load64!(meta, 0) as *mut seq_file
}

/// Context: meta, map, socket, value.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn carnet_flows(ctx: *mut c_void) -> i32 {
    let (socket, value) = (load64!(ctx, 16) as *const c_void, load64!(ctx, 24) as *const LegState);
    if socket.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: the value is a `LegState`, as the map that is iterated over holds.
    let protocol = unsafe { (*value).protocol };
    // UDP is disconnected without any hook.
    if is_datagram(protocol) && u32::from(field::<u8>(socket, offset!(sock_state))) != ESTABLISHED {
        return 0;
    }
    // SAFETY: likewise.
    unsafe { bpf_seq_write(sequence_file(ctx), value.cast(), size_of::<LegState>() as u32) };
    0
}

/// What `carnet_files` writes for each open file.
#[repr(C)]
struct OpenFile {
    descriptor: u64,
    file: FileId,
}

/// Context: meta, task, descriptor, file.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn carnet_files(ctx: *mut c_void) -> i32 {
    let file = load64!(ctx, 24) as *const c_void;
    if !file.is_null() {
        let entry = OpenFile { descriptor: load32!(ctx, 16).into(), file: file_id(file) };
        // SAFETY: writes a whole structure from this program's stack.
        unsafe {
            bpf_seq_write(
                sequence_file(ctx),
                (&raw const entry).cast(),
                size_of::<OpenFile>() as u32,
            );
        }
    }
    0
}

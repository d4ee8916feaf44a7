//! System calls for which there is no safe library: those of bpf(2) that aya does not offer,
//! socket options of any number, and entering a cgroup between fork and exec.
#![expect(unsafe_code, reason = "bpf(2), pre_exec and socket options of any number")]

use std::{
    ffi::{CString, c_int, c_long},
    io,
    mem::size_of,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, process::CommandExt as _},
    },
    path::Path,
    process::Command,
};

use aya::maps::{MapData, MapError};
use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_map_type};
use rustix::thread::{
    CapabilitySet, capabilities, remove_capability_from_bounding_set, set_capabilities,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A value that maps hold: plain bytes without padding. It makes core's layouts acceptable to aya.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Wire<T>(pub(crate) T);

// SAFETY: `Pod` asks for a type of which every bit pattern is a value (`FromBytes`) and which has
// neither padding (`IntoBytes`) nor interior mutability (`Immutable`); `Wire` adds nothing to it.
unsafe impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> aya::Pod for Wire<T> {}

/// Calls bpf(2). The kernel takes a structure that is shorter than its own as filled up with zero.
///
/// # Safety
/// What the addresses in `attributes` point to must be valid for what the command does with it.
unsafe fn bpf<T: FromBytes + IntoBytes>(
    command: bpf_cmd,
    attributes: &mut T,
) -> io::Result<c_long> {
    // SAFETY: the kernel reads and writes at most `size_of::<T>()` bytes of `attributes`, of which
    // any are valid. For what the addresses in it point to, the caller answers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as c_int,
            attributes.as_mut_bytes().as_mut_ptr(),
            size_of::<T>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Calls a command of bpf(2) that gives a new descriptor.
///
/// # Safety
/// As for [`bpf`], and it must be such a command.
unsafe fn bpf_fd<T: FromBytes + IntoBytes>(
    command: bpf_cmd,
    attributes: &mut T,
) -> io::Result<OwnedFd> {
    // SAFETY: the caller answers for the addresses.
    let fd = unsafe { bpf(command, attributes) }?;
    let fd = c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the command gave a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// The address of a buffer, as bpf(2) takes it.
fn address<T: ?Sized>(value: *const T) -> u64 {
    value.cast::<()>().expose_provenance() as u64
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens a pinned object.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Pin { path: address(path.as_ptr()), fd: 0, flags: 0 };
    // SAFETY: the path outlives the call, which only reads it.
    unsafe { bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attributes) }
}

/// Pins an object.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Pin { path: address(path.as_ptr()), fd: number(object), flags: 0 };
    // SAFETY: the path outlives the call, which only reads it.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attributes) }.map(drop)
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    iterator: u64,
    iterator_length: u32,
    zero: u32,
}

/// Attaches a program to a cgroup. Links let several programs be attached beside each other.
pub(crate) fn link_to_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attributes = LinkCreate {
        program: number(program),
        target: number(cgroup),
        attach_type: attach_type as u32,
        flags: 0,
        iterator: 0,
        iterator_length: 0,
        zero: 0,
    };
    // SAFETY: the command is given no address.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attributes) }
}

/// What an iterator goes over: `union bpf_iter_link_info`.
#[derive(FromBytes, Immutable, IntoBytes)]
#[repr(C)]
pub(crate) struct IteratorTarget([u32; 4]);

impl IteratorTarget {
    /// The values of a map.
    pub(crate) fn map(map: BorrowedFd<'_>) -> Self {
        Self([number(map), 0, 0, 0])
    }

    /// What the calling thread has (since Linux 6.1).
    pub(crate) fn own_thread() -> Self {
        Self([rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(), 0, 0, 0])
    }
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct IteratorCreate {
    link: u32,
    flags: u32,
}

/// Starts an iterator. What its program writes is read from the file.
pub(crate) fn iterate(program: BorrowedFd<'_>, target: &IteratorTarget) -> io::Result<OwnedFd> {
    let mut attributes = LinkCreate {
        program: number(program),
        target: 0,
        attach_type: bpf_attach_type::BPF_TRACE_ITER as u32,
        flags: 0,
        iterator: address(&raw const *target),
        iterator_length: size_of::<IteratorTarget>() as u32,
        zero: 0,
    };
    // SAFETY: the target outlives the call, which only reads it.
    let link = unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attributes) }?;
    let mut attributes = IteratorCreate { link: link.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: the command is given no address.
    unsafe { bpf_fd(bpf_cmd::BPF_ITER_CREATE, &mut attributes) }
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts another program in the place of a link's, atomically.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes =
        LinkUpdate { link: number(link), program: number(program), flags: 0, old_program: 0 };
    // SAFETY: the command is given no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct LinkDetach {
    link: u32,
}

/// Detaches a link at once; removing its pin would do so at some later time.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the command is given no address.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut LinkDetach { link: number(link) }) }.map(drop)
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct InfoByFd {
    fd: u32,
    length: u32,
    info: u64,
}

/// What the kernel says of a cgroup link: the begin of `struct bpf_link_info`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes)]
#[repr(C)]
pub(crate) struct CgroupLinkInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    zero: u32,
    /// 0 once the cgroup is gone.
    pub(crate) cgroup: u64,
    pub(crate) attach_type: u32,
    zero2: u32,
}

/// Asks for what the kernel knows of a link to a cgroup.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    let mut info = CgroupLinkInfo::default();
    let mut attributes = InfoByFd {
        fd: number(link),
        length: size_of::<CgroupLinkInfo>() as u32,
        info: address(&raw mut info),
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

/// What the kernel says of a program: the begin of `struct bpf_prog_info`.
#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
pub(crate) struct ProgramInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) tag: [u8; 8],
    sizes: [u32; 2],
    instructions: [u64; 2],
    pub(crate) load_time: u64,
    created_by: u32,
    maps: u32,
    map_ids: u64,
    pub(crate) name: [u8; 16],
    device: u32,
    flags: u32,
    device_namespace: [u64; 2],
    symbols: [u32; 2],
    symbol_addresses: [u64; 2],
    types: u32,
    type_record: u32,
    functions: u64,
    function_count: u32,
    line_count: u32,
    lines: [u64; 2],
    jited_line_count: u32,
    line_record: u32,
    jited_line_record: u32,
    tag_count: u32,
    tags: u64,
    /// Nanoseconds that it ran, if the kernel counts them.
    pub(crate) run_time_ns: u64,
    /// Times that it ran, if the kernel counts them.
    pub(crate) run_count: u64,
    recursion_misses: u64,
    /// Instructions that the verifier looked at.
    pub(crate) verified_instructions: u32,
    attach_object: u32,
    attach_type: u32,
    zero: u32,
}

/// Asks for what the kernel knows of a program.
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    let mut info: ProgramInfo = zerocopy::FromZeros::new_zeroed();
    let mut attributes = InfoByFd {
        fd: number(program),
        length: size_of::<ProgramInfo>() as u32,
        info: address(&raw mut info),
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which outlives the call; all
    // addresses in it are zero, so that it writes nowhere else.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct ProgramById {
    id: u32,
    next: u32,
    flags: u32,
}

/// Opens the program with this id (needs `CAP_SYS_ADMIN`).
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: the command is given no address.
    unsafe { bpf_fd(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut ProgramById { id, next: 0, flags: 0 }) }
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct ProgramQuery {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    zero: u32,
}

/// `BPF_F_QUERY_EFFECTIVE`: those of the cgroups above as well.
const QUERY_EFFECTIVE: u32 = 1;
/// Most programs that one cgroup's hook can run, those of 64 levels included.
const MAX_EFFECTIVE: usize = 1024;

/// The ids of the programs that run at a hook for the sockets of a cgroup, in the order in which they do;
/// those that are attached to the cgroups above included.
pub(crate) fn effective_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<Vec<u32>> {
    query_programs(cgroup, attach_type, QUERY_EFFECTIVE)
}

/// The ids of the programs that are attached to a cgroup itself.
pub(crate) fn attached_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<Vec<u32>> {
    query_programs(cgroup, attach_type, 0)
}

fn query_programs(
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
    query_flags: u32,
) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; MAX_EFFECTIVE];
    let mut attributes = ProgramQuery {
        target: number(cgroup),
        attach_type: attach_type as u32,
        query_flags,
        attach_flags: 0,
        ids: address(ids.as_mut_ptr()),
        count: MAX_EFFECTIVE as u32,
        zero: 0,
    };
    // SAFETY: the kernel writes at most `count` ids to `ids`, which outlives the call.
    unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attributes) }?;
    ids.truncate(attributes.count as usize);
    Ok(ids)
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct MapElement {
    map: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Waits until no BPF program that ran when the wait began still runs.
///
/// There is no call for that as such. But whenever an element of a map of maps is updated, the
/// kernel waits for an RCU grace period before it returns (`maybe_wait_bpf_programs`), so that the
/// caller may rely on the old inner map being out of use; programs run in RCU read-side sections.
/// The map of maps here serves nothing else.
#[derive(Debug)]
pub(crate) struct GracePeriod {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl GracePeriod {
    /// Makes the maps, so that nothing but the wait is left to do later.
    pub(crate) fn prepare() -> io::Result<Self> {
        let array = |kind: bpf_map_type, inner: u32| {
            let mut attributes = MapCreate {
                kind: kind as u32,
                key_size: 4,
                value_size: 4,
                max_entries: 1,
                flags: 0,
                inner,
            };
            // SAFETY: the command is given no address.
            unsafe { bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attributes) }
        };
        let inner = array(bpf_map_type::BPF_MAP_TYPE_ARRAY, 0)?;
        let template = inner.as_raw_fd().cast_unsigned();
        let outer = array(bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, template)?;
        Ok(Self { outer, inner })
    }

    /// Waits.
    pub(crate) fn wait(&self) -> io::Result<()> {
        let key = 0_u32;
        let value = self.inner.as_raw_fd().cast_unsigned();
        let mut attributes = MapElement {
            map: self.outer.as_raw_fd().cast_unsigned(),
            zero: 0,
            key: address(&raw const key),
            value: address(&raw const value),
            flags: 0,
        };
        // SAFETY: the kernel reads four bytes at each address; both outlive the call.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }
}

#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct MapBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Writes many elements of an array map with one call: `rows[n]` to element `keys[n]`.
pub(crate) fn write_elements<T: IntoBytes + Immutable>(
    map: &MapData,
    keys: &[u32],
    rows: &[T],
) -> Result<(), MapError> {
    if keys.is_empty() {
        return Ok(());
    }
    let info = map.info()?;
    if info.key_size() as usize != size_of::<u32>() {
        let (size, expected) = (size_of::<u32>(), info.key_size() as usize);
        return Err(MapError::InvalidKeySize { size, expected });
    }
    if info.value_size() as usize != size_of::<T>() {
        let (size, expected) = (size_of::<T>(), info.value_size() as usize);
        return Err(MapError::InvalidValueSize { size, expected });
    }
    let count = keys.len().min(rows.len());
    let mut attributes = MapBatch {
        in_batch: 0,
        out_batch: 0,
        keys: address(keys.as_ptr()),
        values: address(rows.as_ptr()),
        count: u32::try_from(count).map_err(|error| MapError::IoError(io::Error::other(error)))?,
        map: number(map.fd().as_fd()),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `count` keys and `count` values, all of which outlive the call.
    unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attributes) }?;
    Ok(())
}

/// Counts the entries of a hash map. Those that come and go meanwhile may be counted or not.
pub(crate) fn count_entries(map: &MapData) -> Result<usize, MapError> {
    let info = map.info()?;
    let mut key = vec![0_u8; info.key_size() as usize];
    let mut next = key.clone();
    let mut attributes = MapElement {
        map: number(map.fd().as_fd()),
        zero: 0,
        key: 0,
        // The command takes it for the address of the next key.
        value: address(next.as_mut_ptr()),
        flags: 0,
    };
    // A map that changes can lead round in circles.
    for count in 0..=info.max_entries() as usize {
        // SAFETY: the kernel reads a key at the one address, unless that is null, and writes one to the
        // other; both buffers have its size and outlive the call.
        match unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attributes) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(count),
            Err(error) => return Err(error.into()),
        }
        std::mem::swap(&mut key, &mut next);
        attributes.key = address(key.as_ptr());
        attributes.value = address(next.as_mut_ptr());
    }
    Ok(info.max_entries() as usize)
}

/// `setsockopt(2)`.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: c_int,
    option: c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while it is borrowed; `value` is valid for reads of `length`
    // bytes.
    let status = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), length)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of a socket's network namespace: `SO_NETNS_COOKIE` (since Linux 5.14).
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed; the kernel writes at most `length` bytes
    // to `cookie`.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if status == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Makes the process of `command` move itself into a cgroup before it runs the program.
/// `processes` is the cgroup's `cgroup.procs`, open for writing.
pub(crate) fn enter_before_exec(command: &mut Command, processes: OwnedFd) {
    let enter = move || {
        // 0 stands for the process that writes.
        rustix::io::write(&processes, b"0").map(drop).map_err(io::Error::from)
    };
    // SAFETY: between fork and exec only what is async-signal-safe may be done: this is a write(2)
    // to a descriptor that was opened before, without allocation or locks.
    unsafe { command.pre_exec(enter) };
}

/// Makes the process of `command` give up a capability for good before it runs the program: exec
/// gives none that the bounding set has not, and the inheritable ones lie apart.
pub(crate) fn drop_capability_before_exec(command: &mut Command, capability: CapabilitySet) {
    let drop_it = move || {
        let mut sets = capabilities(None)?;
        sets.inheritable.remove(capability);
        set_capabilities(None, sets)?;
        remove_capability_from_bounding_set(capability).map_err(io::Error::from)
    };
    // SAFETY: as above: three system calls on the process's own capabilities, without allocation or
    // locks.
    unsafe { command.pre_exec(drop_it) };
}

/// Attaching without a link, for tests.
#[cfg(test)]
pub(crate) mod exclusive {
    use super::*;

    #[derive(FromBytes, IntoBytes)]
    #[repr(C)]
    struct ProgramAttach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }

    /// Attaches a program so that no other can be, as programs of before links may.
    pub(crate) fn attach(
        program: BorrowedFd<'_>,
        cgroup: BorrowedFd<'_>,
        attach_type: bpf_attach_type,
    ) -> io::Result<()> {
        let mut attributes = ProgramAttach {
            target: number(cgroup),
            program: number(program),
            attach_type: attach_type as u32,
            flags: 0,
        };
        // SAFETY: the command is given no address.
        unsafe { bpf(bpf_cmd::BPF_PROG_ATTACH, &mut attributes) }.map(drop)
    }
}

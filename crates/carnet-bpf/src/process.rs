//! Who calls: the identity of the process in whose context a hook runs.
//!
//! The kernel's structures are read at offsets that the loader takes from the running kernel's own type
//! information, because Rust has no relocations for that. From the calling task on the verifier knows their
//! types, and a field is read by one instruction; what is reached by arithmetic takes the call of
//! `bpf_probe_read_kernel`.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_comm,
        bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_get_current_uid_gid,
        bpf_map_update_elem, bpf_probe_read_kernel,
    },
};
use carnet_core::{
    access::Caller,
    flow::LegState,
    record::{AppIdentity, FileId, MAX_PATH},
    table::{MAX_CGROUP_LEVEL, Repeat as _, Step, Tables as _},
};

use crate::{
    bank::{Bank, repeat},
    ctx::{fetch_add, opaque},
    maps::{BLANK_LEG, KnownPath, NO_SERVICE, PATHS, PathKey, SVC_CGROUPS},
};

/// Byte offsets of the fields that are read, in the kernel's structures.
#[repr(C)]
pub(crate) struct Offsets {
    task_flags: u32,
    task_group_leader: u32,
    task_start_boottime: u32,
    task_mm: u32,
    task_cred: u32,
    mm_exe_file: u32,
    file_path_mnt: u32,
    file_path_dentry: u32,
    file_inode: u32,
    inode_number: u32,
    inode_superblock: u32,
    superblock_device: u32,
    dentry_parent: u32,
    dentry_name: u32,
    dentry_name_length: u32,
    mount_vfsmount: u32,
    mount_parent: u32,
    mount_mountpoint: u32,
    vfsmount_root: u32,
    cred_effective: u32,
    cred_user_namespace: u32,
    user_namespace_level: u32,
    pub(crate) sock_flags: u32,
    pub(crate) sock_storage: u32,
    pub(crate) sock_local_v4: u32,
    pub(crate) sock_local_v6: u32,
    pub(crate) sock_state: u32,
    pub(crate) sock_port: u32,
    pub(crate) sock_cookie: u32,
    pub(crate) sock_owner: u32,
    pub(crate) sockopt_socket: u32,
    pub(crate) tcp_sockops: u32,
    task_command: u32,
    cred_user: u32,
    cred_group: u32,
    pub(crate) socket_file: u32,
    pub(crate) tcp_fastopen: u32,
    pub(crate) tcp_bytes_received: u32,
    pub(crate) tcp_bytes_sent: u32,
    pub(crate) tcp_bytes_sent_again: u32,
    pub(crate) tcp_sent: u32,
    pub(crate) tcp_written: u32,
}

/// The same, as the loader fills it in: the fields of [`Offsets`] in their order. The verifier
/// knows them as constants.
#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Offsets = Offsets {
    task_flags: 1,
    task_group_leader: 2,
    task_start_boottime: 3,
    task_mm: 4,
    task_cred: 5,
    mm_exe_file: 6,
    file_path_mnt: 7,
    file_path_dentry: 8,
    file_inode: 9,
    inode_number: 10,
    inode_superblock: 11,
    superblock_device: 12,
    dentry_parent: 13,
    dentry_name: 14,
    dentry_name_length: 15,
    mount_vfsmount: 16,
    mount_parent: 17,
    mount_mountpoint: 18,
    vfsmount_root: 19,
    cred_effective: 20,
    cred_user_namespace: 21,
    user_namespace_level: 22,
    sock_flags: 23,
    sock_storage: 24,
    sock_local_v4: 25,
    sock_local_v6: 26,
    sock_state: 27,
    sock_port: 28,
    sock_cookie: 29,
    sock_owner: 30,
    sockopt_socket: 31,
    tcp_sockops: 32,
    task_command: 33,
    cred_user: 34,
    cred_group: 35,
    socket_file: 36,
    tcp_fastopen: 37,
    tcp_bytes_received: 38,
    tcp_bytes_sent: 39,
    tcp_bytes_sent_again: 40,
    tcp_sent: 41,
    tcp_written: 42,
};

/// One of [`OFFSETS`].
macro_rules! offset {
    ($field:ident) => {
        // SAFETY: reads a number of a static. Volatile, because the loader changes it.
        unsafe { core::ptr::read_volatile(&raw const $crate::process::OFFSETS.$field) }
    };
}
pub(crate) use offset;

/// `PF_KTHREAD`: the task is a thread of the kernel's own.
const KERNEL_THREAD: u32 = 0x0020_0000;
/// `CAP_NET_ADMIN`.
const CAP_NET_ADMIN: u64 = 1 << 12;
/// Deepest path, mounts included, that is followed.
const MAX_COMPONENTS: u32 = 64;

/// Reads a `T` at `address + offset`; zero where the kernel cannot read there.
#[inline(always)]
pub(crate) fn read<T: Default>(address: u64, offset: u32) -> T {
    let mut value = T::default();
    let source = address.wrapping_add(offset.into()) as *const c_void;
    // SAFETY: `value` is `size_of::<T>()` bytes of this program's stack; the helper copes with
    // any source address, and `T` is an integer.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, source) };
    value
}

/// Reads a `T` at an offset of a kernel structure whose type the verifier knows: one instruction,
/// which reads zero where there is nothing.
#[inline(always)]
pub(crate) fn field<T>(structure: *const c_void, offset: u32) -> T {
    // SAFETY: the verifier accepts only pointers of whose type it is sure, and only offsets at
    // which that type has a field of this size.
    unsafe { structure.byte_add(offset as usize).cast::<T>().read_volatile() }
}

/// The structure to which a field of another one points; null where either is not there.
#[inline(always)]
pub(crate) fn follow(structure: *const c_void, offset: u32) -> *const c_void {
    if structure.is_null() { ptr::null() } else { field(structure, offset) }
}

/// The calling task.
#[derive(Clone, Copy)]
pub(crate) struct Process {
    task: *const c_void,
}

impl Process {
    /// The task in whose context the hook runs.
    #[inline(always)]
    pub(crate) fn current() -> Self {
        // SAFETY: the helper has no preconditions.
        Self { task: unsafe { bpf_get_current_task_btf() }.cast_const().cast() }
    }

    /// Whether the task is the kernel's own (NFS, SMB, Ceph, …), which is never redirected: the
    /// kernel would take the rewritten address for its own.
    #[inline(always)]
    pub(crate) fn is_kernel_thread(self) -> bool {
        field::<u32>(self.task, offset!(task_flags)) & KERNEL_THREAD != 0
    }

    /// Whether the task has `CAP_NET_ADMIN` in the initial user namespace.
    #[inline(always)]
    pub(crate) fn is_privileged(self) -> bool {
        let cred = follow(self.task, offset!(task_cred));
        let namespace = follow(cred, offset!(cred_user_namespace));
        !namespace.is_null()
            && field::<u32>(namespace, offset!(user_namespace_level)) == 0
            && field::<u64>(cred, offset!(cred_effective)) & CAP_NET_ADMIN != 0
    }

    /// The executable that the task runs.
    #[inline(always)]
    pub(crate) fn executable(self) -> FileId {
        file_id(self.executable_file())
    }

    #[inline(always)]
    fn executable_file(self) -> *const c_void {
        follow(follow(self.task, offset!(task_mm)), offset!(mm_exe_file))
    }

    /// Fills in the identity of the process, but for its network namespace. `app` is all zero;
    /// `scratch` too, and is left with garbage.
    #[inline(always)]
    fn identify(self, app: &mut AppIdentity, scratch: &mut [u8; MAX_PATH], now_ns: u64) {
        app.pid = pid();
        // One instruction each, where the helpers take as long as all else here.
        let cred = follow(self.task, offset!(task_cred));
        if !cred.is_null() {
            app.uid = field(cred, offset!(cred_user));
            app.gid = field(cred, offset!(cred_group));
        }
        // SAFETY: the helper has no preconditions.
        app.cgroup = unsafe { bpf_get_current_cgroup_id() };
        let file = self.executable_file();
        app.executable = file_id(file);
        if !file.is_null() {
            fill_in_path(file, app, scratch, now_ns);
        }
        let leader = follow(self.task, offset!(task_group_leader));
        if !leader.is_null() {
            app.started_ns = field(leader, offset!(task_start_boottime));
        }
        let name = offset!(task_command);
        let words: [u64; 2] = [field(self.task, name), field(self.task, name.wrapping_add(8))];
        // SAFETY: the two words are the 16 bytes of a name.
        app.command = unsafe { core::mem::transmute::<[u64; 2], [u8; 16]>(words) };
    }
}

/// The calling process, as the rules of the control interface see it.
#[inline(always)]
pub(crate) fn caller() -> Caller {
    Caller { service: carnet_service(), privileged: Process::current().is_privileged() }
}

/// Fills in the identity of the calling process in the record of a leg that has just begun. A global function, see
/// `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_identify(leg: *mut LegState) -> i32 {
    // SAFETY: the verifier makes callers pass a whole value, or null.
    let Some(leg) = (unsafe { leg.as_mut() }) else {
        return 0;
    };
    leg.record.app.netns = leg.netns;
    Process::current().identify(&mut leg.record.app, &mut leg.context, leg.began_ns);
    0
}

/// Process id (thread group id) of the caller, in the initial pid namespace.
#[inline(always)]
pub(crate) fn pid() -> u32 {
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32
}

/// User id of the caller, in the initial user namespace.
#[inline(always)]
pub(crate) fn uid() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_uid_gid() as u32 }
}

/// Command name of the caller, zero-padded.
#[inline(always)]
pub(crate) fn command(name: &mut [u8; 16]) {
    // SAFETY: the helper writes 16 bytes.
    unsafe { bpf_get_current_comm(name.as_mut_ptr().cast(), 16) };
}

/// Id of the caller's ancestor cgroup at `level`, 0 if its cgroup is not that deep.
#[inline(always)]
pub(crate) fn ancestor_cgroup(level: u32) -> u64 {
    // SAFETY: the helper copes with any level.
    unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
}

/// Redirect handle of the service to which the caller belongs: the one that owns the nearest of its
/// cgroups. 0 if there is none. A global function, see `decide`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn carnet_service() -> u64 {
    // Nearly all services run in the cgroup that they own.
    // SAFETY: the helper has no preconditions.
    let own = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the value is copied out at once.
    if let Some(handle) = unsafe { SVC_CGROUPS.get(&own) } {
        return *handle;
    }
    // The rest would be looked for at each level, as many as there are: most callers are no service's. What a policy
    // adds is there before it is in force.
    let generation = Bank::in_force().header().map_or(0, |header| header.generation);
    // SAFETY: the value is copied out at once.
    if unsafe { NO_SERVICE.get(&own) } == Some(&generation) {
        return 0;
    }
    let mut search = ServiceSearch { handle: 0 };
    repeat(MAX_CGROUP_LEVEL + 1, &mut search);
    if search.handle == 0 {
        // Without room it is looked for again.
        let _no_room = NO_SERVICE.insert(&own, &generation, BPF_ANY.into());
    }
    search.handle
}

struct ServiceSearch {
    handle: u64,
}

impl Step for ServiceSearch {
    #[inline(always)]
    fn step(&mut self, level: u32) -> bool {
        let cgroup = ancestor_cgroup(level);
        if cgroup == 0 {
            return false;
        }
        // SAFETY: the value is copied out at once.
        if let Some(handle) = unsafe { SVC_CGROUPS.get(&cgroup) } {
            self.handle = *handle;
        }
        true
    }
}

/// The identity of a `struct file`; all zero without one.
#[inline(always)]
pub(crate) fn file_id(file: *const c_void) -> FileId {
    let inode = follow(file, offset!(file_inode));
    let superblock = follow(inode, offset!(inode_superblock));
    if superblock.is_null() {
        return FileId { device: 0, inode: 0 };
    }
    FileId {
        device: u64::from(field::<u32>(superblock, offset!(superblock_device))),
        inode: field(inode, offset!(inode_number)),
    }
}

/// How long a path counts as known, in nanoseconds: executables are renamed while they run, so it is read
/// anew every second.
const PATH_KNOWN_NS: u64 = 1_000_000_000;

/// Fills in the path of a `struct file`, which is the executable of `app`.
#[inline(always)]
fn fill_in_path(
    file: *const c_void,
    app: &mut AppIdentity,
    scratch: &mut [u8; MAX_PATH],
    now_ns: u64,
) {
    let key = PathKey {
        mount: field(file, offset!(file_path_mnt)),
        dentry: field(file, offset!(file_path_dentry)),
    };
    if copy_known_path(&key, app, now_ns) {
        return;
    }
    let length = path(&key, scratch);
    app.path_length = length;
    let start = (MAX_PATH as u32).wrapping_sub(length);
    // The mask changes nothing, it tells the verifier a bound.
    copy_path(app, scratch.as_ptr().wrapping_add(start as usize), (opaque(length) & 0x1ff) as u32);
    remember_path(&key, app, now_ns);
}

/// The same if the path is known. If not, it is left all zero.
#[inline(always)]
fn copy_known_path(key: &PathKey, app: &mut AppIdentity, now_ns: u64) -> bool {
    let Some(known) = known_path(key) else {
        return false;
    };
    let read_ns = known.read_ns;
    if known.file != app.executable || now_ns.wrapping_sub(read_ns) >= PATH_KNOWN_NS {
        return false;
    }
    app.path_length = known.length as u32;
    copy_path(app, known.path.as_ptr(), MAX_PATH as u32);
    // The place of an entry that has just been replaced may have got another path meanwhile, and has another time then.
    // SAFETY: the entry stays allocated until the program ends. Volatile, since it may change.
    if unsafe { core::ptr::read_volatile(&raw const known.read_ns) } == read_ns {
        return true;
    }
    if let Some(blank) = BLANK_LEG.get(0) {
        copy_path(app, blank.as_ptr(), MAX_PATH as u32);
    }
    false
}

#[inline(always)]
fn known_path(key: &PathKey) -> Option<&'static KnownPath> {
    // SAFETY: the entry stays allocated until the program ends; that it may be replaced meanwhile the
    // caller bears in mind.
    unsafe { PATHS.get(key) }
}

/// Copies `length` bytes, at most `MAX_PATH`, into the path of `app`.
#[inline(always)]
fn copy_path(app: &mut AppIdentity, source: *const u8, length: u32) {
    // SAFETY: the bytes lie in a map value, of which the verifier makes sure.
    unsafe { bpf_probe_read_kernel(app.path.as_mut_ptr().cast(), length, source.cast()) };
}

/// Remembers the path that has been read for `app`. It is filled in where it is: before Linux 6.3 nothing
/// is copied into a map from an argument of a global function.
#[inline(always)]
fn remember_path(key: &PathKey, app: &AppIdentity, now_ns: u64) {
    let Some(blank) = BLANK_LEG.get(0) else {
        return;
    };
    // SAFETY: key and value are whole and at least of the map's sizes; the value lies in another map, from
    // which the kernel copies it.
    let failed = unsafe {
        bpf_map_update_elem(
            (&raw const PATHS).cast_mut().cast(),
            core::ptr::from_ref(key).cast(),
            blank.as_ptr().cast(),
            BPF_ANY.into(),
        )
    };
    if failed != 0 {
        return;
    }
    let Some(known) = PATHS.get_ptr_mut(key) else {
        return;
    };
    // SAFETY: the entry stays allocated until the program ends, and nobody uses it before it has a time.
    // That comes last, and in order, as an atomic addition; if two processors come to add theirs, it lies
    // in the future, and the path counts as old.
    unsafe {
        (*known).file = app.executable;
        (*known).length = app.path_length.into();
        bpf_probe_read_kernel(
            (&raw mut (*known).path).cast(),
            MAX_PATH as u32,
            app.path.as_ptr().cast(),
        );
        fetch_add((&raw mut (*known).read_ns).cast(), now_ns as i64);
    }
}

/// Writes the path of a file, as its mount namespace shows it, to the end of `buffer`. Gives its length; 0
/// where it is longer than the buffer or deeper than [`MAX_COMPONENTS`].
#[inline(always)]
fn path(file: &PathKey, buffer: &mut [u8; MAX_PATH]) -> u32 {
    let mut climb = Climb {
        dentry: file.dentry,
        mount: file.mount.wrapping_sub(offset!(mount_vfsmount).into()),
        start: Bank::forget(MAX_PATH as u32),
        complete: false,
        buffer,
    };
    repeat(MAX_COMPONENTS, &mut climb);
    if climb.complete && climb.start < MAX_PATH as u32 {
        (MAX_PATH as u32).wrapping_sub(climb.start)
    } else {
        0
    }
}

/// The way from a file up to the root, one directory or mount a step.
struct Climb<'a> {
    dentry: u64,
    mount: u64,
    start: u32,
    complete: bool,
    buffer: &'a mut [u8; MAX_PATH],
}

impl Step for Climb<'_> {
    #[inline(always)]
    fn step(&mut self, _index: u32) -> bool {
        let root: u64 = read(self.mount, offset!(mount_vfsmount) + offset!(vfsmount_root));
        let parent: u64 = read(self.dentry, offset!(dentry_parent));
        if self.dentry == root || self.dentry == parent {
            let upper: u64 = read(self.mount, offset!(mount_parent));
            if upper == self.mount || upper == 0 {
                self.complete = true;
                return false;
            }
            self.dentry = read(self.mount, offset!(mount_mountpoint));
            self.mount = upper;
            return true;
        }
        let length: u32 = read(self.dentry, offset!(dentry_name_length));
        // The name and a slash before it have to fit.
        if length == 0 || length >= MAX_PATH as u32 || length + 1 > self.start {
            return false;
        }
        let name: u64 = read(self.dentry, offset!(dentry_name));
        // The masks change nothing, they tell the verifier what was just checked.
        let length = (opaque(length) & 0xff) as u32;
        let at = (opaque(self.start - length) & 0xff) as u32;
        // SAFETY: `at + length` is at most `start`, which is at most the buffer's length. The
        // verifier knows only that both are below 256 and that the map value in which the buffer
        // lies goes on for more than 512 bytes behind its start.
        unsafe {
            bpf_probe_read_kernel(
                self.buffer.as_mut_ptr().wrapping_add(at as usize).cast(),
                length,
                name as *const c_void,
            );
            *self.buffer.as_mut_ptr().wrapping_add((at.wrapping_sub(1) & 0xff) as usize) = b'/';
        }
        self.start = at.wrapping_sub(1) & 0xff;
        self.dentry = parent;
        true
    }
}

//! Arbitrary values in every argument of both entry points, and of the two functions for messages,
//! from several threads: no crash, only errors that the contract knows, and nothing is left behind.
//!
//! The sequence is the same in every run. `CARNET_FUZZ_ROUNDS` makes it longer (100,000 calls for
//! each of 4 threads without it).
#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "the functions under test are C's")]

use carnet_winsock::ffi::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::AsRawFd;
use std::ptr::{null_mut, with_exposed_provenance_mut as address};
use std::sync::atomic::{AtomicU64, Ordering};

const THREADS: u64 = 4;
const ROUNDS: u64 = 100_000;
/// The largest page that a kernel has; a multiple of every other.
const PAGE: usize = 64 * 1024;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        ((self.next() >> 32) as usize) % limit
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// Two pages that may be written, one that may be read, nothing, and one that may not be touched.
struct Arena(usize);

impl Arena {
    fn new() -> Self {
        // SAFETY: a new mapping; its parts are set before anything refers to them. It stays for the
        // life of the process, since operations may write to it until they are complete.
        let start = unsafe {
            let writable = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(null_mut(), 5 * PAGE, writable, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(start.add(2 * PAGE), PAGE, libc::PROT_READ), 0);
            assert_eq!(libc::munmap(start.add(3 * PAGE), PAGE), 0);
            assert_eq!(libc::mprotect(start.add(4 * PAGE), PAGE, libc::PROT_NONE), 0);
            start
        };
        Self(start.expose_provenance())
    }

    /// Any address that is either in here or where no memory is.
    fn pointer<T>(&self, random: &mut Random) -> *mut T {
        const KERNEL: usize = 0xffff_8000_0000_0000;
        let near = random.below(64);
        address(match random.below(12) {
            0 => 0,
            1 => near,
            2 => KERNEL | random.below(1 << 30),
            3 => usize::MAX - near,
            // About the borders between pages.
            4..6 => self.0 + random.of(&[2, 3, 4]) * PAGE - near,
            6 => self.0 + random.of(&[2, 3, 4]) * PAGE + near,
            _ => self.0 + random.below(2 * PAGE),
        })
    }

    fn length(&self, random: &mut Random) -> u32 {
        match random.below(6) {
            0 => 0,
            1 => random.below(64) as u32,
            2 => random.next() as u32,
            3 => u32::MAX - random.below(64) as u32,
            _ => random.below(2 * PAGE) as u32,
        }
    }
}

fn code(random: &mut Random) -> u32 {
    const KNOWN: [u32; 9] = [
        0x9800_00DC,
        0x9800_00DD,
        0x9800_00DE,
        0x2800_0004,
        0x8004_667E,
        0x4004_667F,
        0x9800_0004,
        0xC800_0006,
        0x5800_00CD,
    ];
    match random.below(8) {
        0 => random.next() as u32,
        // One bit of a known one.
        1 => random.of(&KNOWN) ^ 1 << random.below(32),
        _ => random.of(&KNOWN),
    }
}

static CALLS: AtomicU64 = AtomicU64::new(0);

/// Counts the call.
///
/// # Safety
/// Asks for nothing; its type is the interface's.
unsafe extern "C" fn note(_error: u32, _bytes: u32, _overlapped: *mut c_void, flags: u32) {
    assert_eq!(flags, 0);
    CALLS.fetch_add(1, Ordering::Relaxed);
}

/// What a call may say; anything else would be an invention.
const ERRORS: [i32; 12] =
    [0, 122, 997, 10014, 10022, 10035, 10036, 10038, 10045, 10050, 10055, 10057];

fn sockets() -> Vec<usize> {
    let kinds = [
        (libc::AF_INET, libc::SOCK_STREAM),
        (libc::AF_INET6, libc::SOCK_STREAM),
        (libc::AF_INET, libc::SOCK_DGRAM),
        (libc::AF_UNIX, libc::SOCK_STREAM),
    ];
    let mut sockets = Vec::new();
    for flags in [0, 1, 1] {
        for (family, kind) in kinds {
            let socket = WSASocketW(family, kind, 0, null_mut(), 0, flags);
            assert_ne!(socket, usize::MAX);
            sockets.push(socket);
        }
    }
    sockets
}

/// What a call for messages may say besides.
const OF_MESSAGES: [i32; 7] = [10013, 10040, 10047, 10049, 10051, 10058, 10065];

/// The fields of a `WSAMSG`, and the buffers that it names. These are at addresses of their own:
/// what they point at is arbitrary, but always of the arena.
#[repr(C)]
struct Message {
    name: *mut c_void,
    name_length: u32,
    buffers: *mut Buffer,
    count: u32,
    control: Buffer,
    flags: u32,
    parts: [Buffer; 3],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Buffer {
    length: u32,
    address: *mut c_void,
}

/// Sockets for messages, none of which ever waits, with or without the overlapped attribute:
/// datagrams to itself, and a stream. From their address nothing leaves the loopback device.
fn message_sockets() -> Vec<usize> {
    // SAFETY: zero is a valid value of every field.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    let kinds = [
        (libc::SOCK_DGRAM, 1),
        (libc::SOCK_DGRAM, 1),
        (libc::SOCK_DGRAM, 0),
        (libc::SOCK_STREAM, 1),
    ];
    let new = |(kind, flags): (i32, u32)| {
        let socket = WSASocketW(libc::AF_INET, kind, 0, null_mut(), 0, flags);
        assert_ne!(socket, usize::MAX);
        let (mut name, mut length, mut on) = (address, 16, 1);
        let place = (&raw mut name).cast();
        // SAFETY: all are valid for the calls.
        unsafe {
            assert_eq!(carnet_winsock_bind(socket, place, length), 0);
            assert_eq!(ioctlsocket(socket, 0x8004_667E, &raw mut on), 0);
            if kind == libc::SOCK_DGRAM {
                assert_eq!(carnet_winsock_getsockname(socket, place, &raw mut length), 0);
                assert_eq!(carnet_winsock_connect(socket, place, length), 0);
            }
        }
        socket
    };
    kinds.into_iter().map(new).collect()
}

/// `WSARecvMsg` or `WSASendMsg`.
fn message(
    random: &mut Random,
    arena: &Arena,
    messages: &Arena,
    socket: usize,
    overlapped: *mut c_void,
    routine: LPWSAOVERLAPPED_COMPLETION_ROUTINE,
) -> i32 {
    // Nothing there, or nothing in it.
    let read_only = arena.0 + 2 * PAGE;
    let bad = |random: &mut Random| {
        let near = random.below(64);
        let bad = [0, near, usize::MAX - near, read_only + near, read_only + PAGE - near];
        random.of(&bad)
    };
    let slot = messages.0 + random.below(PAGE / size_of::<Message>()) * size_of::<Message>();
    let good: *mut Message = address(slot);
    let buffer = |random: &mut Random| Buffer {
        length: arena.length(random),
        address: arena.pointer(random),
    };
    let parts = [buffer(random), buffer(random), buffer(random)];
    let control = match random.below(2) {
        0 => Buffer { length: 0, address: null_mut() },
        _ => buffer(random),
    };
    // SAFETY: the place of a message, to which an operation that pends may write too, by the kernel.
    unsafe {
        good.write_volatile(Message {
            name: if random.below(2) == 0 { null_mut() } else { arena.pointer(random) },
            name_length: if random.below(2) == 0 { 16 } else { arena.length(random) },
            buffers: match random.below(8) {
                0 => address(bad(random)),
                _ => &raw mut (*good).parts as *mut Buffer,
            },
            count: random.below(4) as u32,
            control,
            flags: match random.below(4) {
                0 => random.next() as u32,
                1 => random.of(&[libc::MSG_PEEK, libc::MSG_ERRQUEUE, libc::MSG_DONTWAIT]) as u32,
                _ => 0,
            },
            parts,
        });
    }
    let place = if random.below(8) == 0 { address(bad(random)) } else { good.cast::<c_void>() };
    let count = match random.below(2) {
        0 => null_mut(),
        _ => arena.pointer::<u32>(random),
    };
    // SAFETY: all memory that the addresses can name is of the arena, or a message.
    let status = unsafe {
        if random.below(3) != 0 {
            WSARecvMsg(socket, place, count, overlapped, routine)
        } else {
            let flags = random.of(&[0, 0, 0, libc::MSG_OOB, libc::MSG_DONTROUTE]) as u32;
            WSASendMsg(socket, place, flags, count, overlapped, routine)
        }
    };
    if status == 0 { 0 } else { WSAGetLastError() }
}

fn fuzz(seed: u64, rounds: u64) -> BTreeMap<i32, u64> {
    let mut random = Random(seed);
    let arena = Arena::new();
    let messages = Arena::new();
    let sockets = sockets();
    let message_sockets = message_sockets();
    let file = std::fs::File::open("/dev/null").expect("/dev/null");
    let handles = [file.as_raw_fd() as usize, usize::MAX, 1 << 40, i32::MAX as usize, 1_000_000];
    let mut thread = [0_usize; 2];
    // SAFETY: a place for the name; the error is not needed.
    assert_eq!(unsafe { WPUOpenCurrentThread(thread.as_mut_ptr().cast(), null_mut()) }, 0);
    let event = WSACreateEvent();
    let mut errors = BTreeMap::new();
    for _ in 0..rounds {
        let socket = if random.below(16) == 0 { random.of(&handles) } else { random.of(&sockets) };
        let code = code(&mut random);
        let input = (arena.pointer::<c_void>(&mut random), arena.length(&mut random));
        let output = (arena.pointer::<c_void>(&mut random), arena.length(&mut random));
        let returned = arena.pointer::<u32>(&mut random);
        let overlapped = match random.below(3) {
            0 => null_mut(),
            _ => arena.pointer::<c_void>(&mut random),
        };
        let routine: LPWSAOVERLAPPED_COMPLETION_ROUTINE = match random.below(3) {
            0 => Some(note),
            _ => None,
        };
        let of_messages = random.below(3) == 0;
        let socket = match random.below(8) {
            1.. if of_messages => random.of(&message_sockets),
            _ => socket,
        };
        let error =
            if of_messages && (message_sockets.contains(&socket) || handles.contains(&socket)) {
                message(&mut random, &arena, &messages, socket, overlapped, routine)
            } else if random.below(2) == 0 {
                // SAFETY: all memory that the addresses can name is of the arena.
                unsafe {
                    WSAIoctl(
                        socket, code, input.0, input.1, output.0, output.1, returned, overlapped,
                        routine,
                    );
                }
                WSAGetLastError()
            } else {
                let id = match random.below(3) {
                    0 => thread.as_mut_ptr().cast(),
                    _ => arena.pointer::<c_void>(&mut random),
                };
                // The error may go anywhere too; then it cannot be looked at.
                let mut error = 0;
                let place = match random.below(4) {
                    0 => arena.pointer::<i32>(&mut random),
                    _ => &raw mut error,
                };
                // SAFETY: all memory that the addresses can name is of the arena, or the error here.
                unsafe {
                    WSPIoctl(
                        socket, code, input.0, input.1, output.0, output.1, returned, overlapped,
                        routine, id, place,
                    );
                }
                error
            };
        let known = ERRORS.contains(&error) || of_messages && OF_MESSAGES.contains(&error);
        assert!(known, "error {error}, code {code:#x} or a message: {of_messages}");
        *errors.entry(error).or_default() += 1;
        match random.below(64) {
            0 => {
                SleepEx(0, 1);
            }
            1 => {
                CancelIo(address(socket));
            }
            2 => {
                CancelIoEx(address(socket), arena.pointer(&mut random));
            }
            3 => {
                let (bytes, flags) = (arena.pointer(&mut random), arena.pointer(&mut random));
                let overlapped = arena.pointer(&mut random);
                // SAFETY: all memory that the addresses can name is of the arena.
                unsafe { WSAGetOverlappedResult(socket, overlapped, bytes, 0, flags) };
            }
            4 => {
                // So that some operations have an event: handles in the arena are of this one.
                let place: *mut *mut c_void = address(arena.0 + random.below(PAGE / 8) * 8);
                // SAFETY: a word of the arena's first page.
                unsafe { place.write_volatile(event) };
            }
            _ => {}
        }
    }
    for socket in sockets.into_iter().chain(message_sockets) {
        assert_eq!(closesocket(socket), 0);
    }
    SleepEx(0, 1);
    // SAFETY: the name is of this thread; the error is not needed.
    assert_eq!(unsafe { WPUCloseThread(thread.as_mut_ptr().cast(), null_mut()) }, 0);
    assert_eq!(WSACloseEvent(event), 1);
    errors
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc is mounted").count()
}

#[test]
fn arbitrary_arguments() {
    let rounds = std::env::var("CARNET_FUZZ_ROUNDS")
        .map_or(ROUNDS, |rounds| rounds.parse().expect("CARNET_FUZZ_ROUNDS is a number"));
    let before = descriptors();
    let mut data = [0_u64; 51];
    // SAFETY: the size of a WSADATA.
    assert_eq!(unsafe { WSAStartup(0x0202, data.as_mut_ptr().cast()) }, 0);
    let mut errors = BTreeMap::<i32, u64>::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (1..=THREADS).map(|seed| scope.spawn(move || fuzz(seed, rounds))).collect();
        for thread in threads {
            for (error, count) in thread.join().expect("no assertion fails") {
                *errors.entry(error).or_default() += count;
            }
        }
    });
    assert_eq!(WSACleanup(), 0);
    println!("{errors:?}, {} routines", CALLS.load(Ordering::Relaxed));
    assert_eq!(errors.values().sum::<u64>(), THREADS * rounds);
    for error in [0, 997, 10014, 10022, 10035, 10038, 10040, 10045, 10050] {
        assert!(errors.contains_key(&error), "{error} never came: the values are too narrow");
    }
    assert!(CALLS.load(Ordering::Relaxed) > 0);
    assert_eq!(descriptors(), before, "a descriptor is left");
}

//! A process that hammers at the control interface, and what has to hold for every call:
//!
//! - it comes back, with success or with an errno that `docs/abi.md` names for it (or that the system
//!   call has for bad descriptors and pointers);
//! - success is 0, and a length that was given back is no longer than there was room;
//! - nothing of the caller's memory changes but the bytes that were written by that length.

use std::{
    env,
    io::Read as _,
    net::SocketAddr,
    os::fd::AsRawFd as _,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use carnet_core::abi;
use socket2::Socket;

use crate::{
    memory::{self, Arena, CANARY, Place, SIZE},
    sockets::{KINDS, open},
    tally::Tally,
    twins::{self, Twins},
};

pub(crate) const SEED: &str = "CARNET_CONTROL_FUZZ_SEED";
pub(crate) const SECONDS: &str = "CARNET_CONTROL_FUZZ_SECONDS";
pub(crate) const DESTINATIONS: &str = "CARNET_CONTROL_FUZZ_DESTINATIONS";
/// What a worker says when it has made what is to be made outside.
pub(crate) const READY: &str = "ready to be moved";

const THREADS: u64 = 4;
/// Sockets that the threads share, and close on each other.
const POOL: usize = 64;
/// Pairs of each kind of socket whose options of other levels are compared, for each second.
const PAIRS: u64 = 1;

/// What `docs/abi.md` says that getting can end with, and what the system call itself has: bad
/// descriptor, no socket, bad pointer.
const OF_GET: [i32; 11] = [
    libc::ENOPROTOOPT,
    libc::EOPNOTSUPP,
    libc::EINVAL,
    libc::ENOTCONN,
    libc::ENODATA,
    libc::ERANGE,
    libc::EACCES,
    libc::ENOMEM,
    libc::EBADF,
    libc::ENOTSOCK,
    libc::EFAULT,
];
/// The same of setting.
const OF_SET: [i32; 10] = [
    libc::ENOPROTOOPT,
    libc::EOPNOTSUPP,
    libc::EINVAL,
    libc::EACCES,
    libc::ELOOP,
    libc::ENOSPC,
    libc::ENOMEM,
    libc::EBADF,
    libc::ENOTSOCK,
    libc::EFAULT,
];
/// What `docs/winsock.md` says that a control code can end with.
const OF_IOCTL: [i32; 11] = [
    0,
    122,
    10013,
    10014,
    10022,
    10038,
    10045,
    10050,
    10055,
    10057,
    // FWP_E_NOT_FOUND: there is no record or no context.
    0x8032_0008_u32.cast_signed(),
];
/// The control codes for records and context.
const CODES: [u32; 4] = [0x9800_00DC, 0x9800_00DD, 0x9800_00DE, 0x9800_00DF];

type Pool = [Mutex<Option<(usize, Socket)>>; POOL];

fn number(name: &str) -> u64 {
    env::var(name).ok().and_then(|text| text.parse().ok()).expect("a number")
}

pub(crate) fn work() {
    let (seed, seconds) = (number(SEED), number(SECONDS));
    let destinations = env::var(DESTINATIONS).expect("destinations");
    let destinations: Vec<SocketAddr> =
        destinations.split(' ').map(|text| text.parse().expect("an address")).collect();
    let spare = twins::outside((PAIRS * seconds).min(60) as usize);
    println!("\n{READY}");
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).expect("a pipe that is closed");

    memory::start_library();
    let pool: Pool = std::array::from_fn(|_| Mutex::default());
    let over = AtomicBool::new(false);
    let mut tally = Tally::default();
    thread::scope(|scope| {
        let hammers: Vec<_> = (0..THREADS)
            .map(|number| {
                let seed = seed.wrapping_add(number << 32);
                let (pool, destinations, over) = (&pool, &destinations, &over);
                scope.spawn(move || Hammer::new(seed, pool, destinations, over).strike())
            })
            .collect();
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut twins = Twins::new(spare);
        // Also when a pair differs: then nobody is to go on.
        let all_stop = AtEnd(&over);
        while Instant::now() < end && twins.compare(&mut random, &mut tally) {}
        thread::sleep(end.saturating_duration_since(Instant::now()));
        drop(all_stop);
        for hammer in hammers {
            tally.add(hammer.join().expect("a thread that found nothing"));
        }
    });
    println!("\n{}", tally.to_line());
}

/// Has the threads stop when it goes.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Hammer<'a> {
    random: fastrand::Rng,
    arena: Arena,
    pool: &'a Pool,
    destinations: &'a [SocketAddr],
    over: &'a AtomicBool,
    tally: Tally,
    /// The last record that the kernel gave.
    record: Vec<u8>,
}

impl<'a> Hammer<'a> {
    fn new(
        seed: u64,
        pool: &'a Pool,
        destinations: &'a [SocketAddr],
        over: &'a AtomicBool,
    ) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            arena: Arena::new(),
            pool,
            destinations,
            over,
            tally: Tally::default(),
            record: vec![0; 424],
        }
    }

    fn strike(mut self) -> Tally {
        while !self.over.load(Ordering::Relaxed) {
            match self.random.u8(..16) {
                0..=1 => self.change_a_socket(),
                2..=8 => self.get(),
                9..=13 => self.set(),
                _ => self.ioctl(),
            }
        }
        self.tally
    }

    fn slot(&mut self) -> MutexGuard<'a, Option<(usize, Socket)>> {
        let slot = &self.pool[self.random.usize(..POOL)];
        slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of some socket, which another thread may close at any moment, and its kind.
    fn socket(&mut self) -> (i32, &'static str) {
        if self.random.u8(..64) == 0 {
            return (self.random.i32(-1..2000), "any number");
        }
        match &*self.slot() {
            Some((kind, socket)) => (socket.as_raw_fd(), KINDS[*kind].0),
            None => (-1, "none"),
        }
    }

    /// Opens a socket in the place of another, or has one do something.
    fn change_a_socket(&mut self) {
        let to = *self.random.choice(self.destinations).expect("a destination");
        let what = self.random.u8(..10);
        let mut slot = self.slot();
        let accepted = match &*slot {
            None => {
                let kind = self.random.usize(..KINDS.len());
                *slot = open(kind).map(|socket| (kind, socket));
                return;
            }
            Some((kind, socket)) => {
                // Whatever is impossible for this socket fails.
                let any = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
                let any: SocketAddr = any.parse().expect("an address");
                match what {
                    0 => {
                        let listens = socket.bind(&any.into()).and_then(|()| socket.listen(64));
                        drop(listens.map(|()| carnet::register_listener(socket)));
                    }
                    1 => drop(socket.bind(&any.into())),
                    2 | 3 => drop(socket.connect(&to.into())),
                    4 => drop(socket.send_to(b"word", &to.into())),
                    5 => drop(rustix::net::connect_unspec(socket)),
                    6 => drop(carnet::register_listener(socket)),
                    7 => drop(socket.shutdown(std::net::Shutdown::Both)),
                    _ => {}
                }
                let accepted = socket.accept().ok().map(|(accepted, _)| accepted);
                // Nothing here may wait, or the others would wait for the slot.
                let accepted = accepted.filter(|accepted| accepted.set_nonblocking(true).is_ok());
                accepted.map(|accepted| (*kind, accepted))
            }
        };
        match accepted {
            // What comes stays, for the questions, in the place of the listener or elsewhere.
            Some(accepted) if what < 8 => {
                drop(slot);
                *self.slot() = Some(accepted);
            }
            Some(_) | None if what >= 8 => *slot = None,
            _ => {}
        }
    }

    fn place(&mut self, length: usize) -> Place {
        match self.random.u8(..24) {
            0 => Place::Null,
            1 => Place::Kernel,
            2 => Place::Nowhere,
            // Reaches into the page that may not be touched.
            3 => Place::BeforeEnd((length / 2).min(SIZE)),
            _ => Place::BeforeEnd(length.min(SIZE)),
        }
    }

    fn length(&mut self) -> i32 {
        match self.random.u8(..16) {
            0 => self.random.i32(..),
            1 => -1,
            2 => 0,
            3 => self.random.i32(4090..4100),
            4 => self.random.i32(0..64),
            5 => *self.random.choice(&[4, 8, 16, 24, 28, 40, 328]).expect("one"),
            _ => self.random.i32(0..SIZE as i32),
        }
    }

    fn name(&mut self) -> i32 {
        if self.random.u8(..16) == 0 { self.random.i32(..) } else { self.random.i32(218..234) }
    }

    fn get(&mut self) {
        let (socket, kind) = self.socket();
        let own = self.random.u8(..8) != 0;
        let (level, name) = if own {
            (abi::LEVEL, self.name())
        } else {
            (*self.random.choice(&[abi::SOL_IP, abi::SOL_IPV6]).expect("one"), abi::SO_ORIGINAL_DST)
        };
        let length = self.length();
        let value = self.place(length.max(0) as usize);
        let given = (self.random.u8(..32) != 0).then_some(length);
        self.arena.bytes().fill(CANARY);
        let (result, written) = self.arena.get(socket, level, name, value, given);
        let say = format!("get {level:#x} {name} of {kind}: {value:?}, {length}: {result:?}");
        let touched = self.arena.bytes().iter().any(|byte| *byte != CANARY);
        match result {
            Ok(result) => {
                assert_eq!(result, 0, "a positive result: {say}");
                if own {
                    assert!((0..=length).contains(&written), "{say}: {written}");
                    if (name == abi::QUERY_REDIRECT_RECORDS || name == abi::EXPORT_RECORD)
                        && let Place::BeforeEnd(from) = value
                        && from <= SIZE
                    {
                        let bytes = &self.arena.bytes()[SIZE - from..];
                        self.record = bytes[..(written as usize).min(from)].to_vec();
                    }
                }
                if let Place::BeforeEnd(from) = value
                    && (written as usize) < from
                {
                    let rest = &self.arena.bytes()[SIZE - from + written.max(0) as usize..];
                    assert!(rest.iter().all(|byte| *byte == CANARY), "beyond {written}: {say}");
                }
            }
            // Where a copy fails half-way, some of it may be there.
            Err(libc::EFAULT) => {}
            Err(errno) if own => {
                assert!(OF_GET.contains(&errno), "an errno of nobody's: {say}");
                assert!(!touched, "it failed and wrote: {say}");
            }
            Err(_) => assert!(!touched, "it failed and wrote: {say}"),
        }
        let call = if own { "get" } else { "original dst" };
        self.tally.count(call, kind, result.err().unwrap_or(0));
    }

    fn set(&mut self) {
        let (socket, kind) = self.socket();
        let name = self.name();
        let mut length = self.length() as u32;
        let random = &mut self.random;
        let bytes = self.arena.bytes();
        bytes.fill(CANARY);
        if random.bool() {
            // A record that the kernel gave, whole or nearly.
            let mut record = self.record.clone();
            for _ in 0..random.u8(..3) {
                let at = random.usize(..record.len().max(1));
                if let Some(byte) = record.get_mut(at) {
                    *byte ^= 1 << random.u8(..8);
                }
            }
            length = record.len() as u32;
            bytes[SIZE - record.len()..].copy_from_slice(&record);
        } else if random.bool() {
            random.fill(&mut bytes[SIZE - 1024..]);
        }
        let before = bytes.to_vec();
        let value = self.place(length as usize);
        let result = self.arena.set(socket, abi::LEVEL, name, value, length);
        let say = format!("set {name} of {kind}: {value:?}, {length}: {result:?}");
        match result {
            Ok(result) => {
                assert_eq!(result, 0, "a positive result: {say}");
                let known = [abi::SET_REDIRECT_RECORDS, abi::REGISTER_LISTENER, abi::IMPORT_RECORD];
                assert!(known.contains(&name), "{say}");
            }
            Err(errno) => assert!(OF_SET.contains(&errno), "an errno of nobody's: {say}"),
        }
        assert!(self.arena.bytes() == before, "it wrote: {say}");
        self.tally.count("set", kind, result.err().unwrap_or(0));
    }

    fn ioctl(&mut self) {
        let (socket, kind) = self.socket();
        if socket < 0 {
            return;
        }
        let code = *self.random.choice(&CODES).expect("one");
        let lengths = [self.length() as u32, self.length() as u32];
        let [input, output] = lengths.map(|length| (self.place(length as usize), length));
        self.arena.bytes().fill(CANARY);
        let error = self.arena.ioctl(socket, code, input, output);
        let say = format!("WSAIoctl {code:#x} of {kind}: {input:?}, {output:?}: {error}");
        assert!(OF_IOCTL.contains(&error), "an error of nobody's: {say}");
        if error != 0 && error != 10014 {
            let untouched = self.arena.bytes().iter().all(|byte| *byte == CANARY);
            assert!(untouched, "it failed and wrote: {say}");
        }
        self.tally.count("WSAIoctl", kind, error);
    }
}

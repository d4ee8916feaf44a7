//! Options of other levels behave on a socket in a service's cgroup as on one without Carnet: each
//! socket has a twin that was made outside, and both get the same calls.

use carnet_core::abi;
use socket2::Socket;
use std::os::fd::AsRawFd as _;

use crate::{
    memory::{Arena, CANARY, Place, SIZE},
    sockets::{KINDS, open},
    tally::Tally,
};

/// Calls after which a pair is replaced: options may have made a socket deaf by then.
const LIFE: u32 = 400;
const LENGTHS: [usize; 11] = [0, 1, 4, 8, 12, 16, 64, 255, 4095, 4096, 4097];

/// Sockets that were made outside of every scope.
pub(crate) fn outside(count: usize) -> Vec<(usize, Socket)> {
    let kinds = (0..KINDS.len()).cycle().take(count * KINDS.len());
    kinds.filter_map(|kind| Some((kind, open(kind)?))).collect()
}

/// Pairs of sockets that have had the same calls.
pub(crate) struct Twins {
    spare: Vec<(usize, Socket)>,
    arenas: [Arena; 2],
}

impl Twins {
    pub(crate) fn new(spare: Vec<(usize, Socket)>) -> Self {
        Self { spare, arenas: [Arena::new(), Arena::new()] }
    }

    /// Gives the next pair its calls. `false` when there are no more.
    pub(crate) fn compare(&mut self, random: &mut fastrand::Rng, tally: &mut Tally) -> bool {
        let Some((kind, twin)) = self.spare.pop() else { return false };
        let Some(socket) = open(kind) else { return true };
        let mut said = Vec::new();
        for _ in 0..LIFE {
            let (level, name) = option(random);
            if is_told_apart(level, name) {
                continue;
            }
            let length = *random.choice(&LENGTHS).expect("one");
            let set = random.bool();
            let seed = random.u64(..);
            let results = [&twin, &socket].map(|socket| socket.as_raw_fd());
            let results: Vec<_> = results
                .into_iter()
                .zip(&mut self.arenas)
                .map(|(socket, arena)| one(arena, socket, level, name, set, length, seed))
                .collect();
            let call = if set { "set" } else { "get" };
            said.push(format!("{call} {level} {name} length {length}: {:?}", results[0].0));
            assert_eq!(
                results[0], results[1],
                "{} {}; outside first, in here second; before: {said:#?}",
                KINDS[kind].0, call
            );
            tally.count(if set { "other, set" } else { "other, get" }, KINDS[kind].0, results[0].0);
        }
        true
    }
}

/// One call; gives 0 or the errno, the length as it is then, and all that the buffer has then.
fn one(
    arena: &mut Arena,
    socket: i32,
    level: i32,
    name: i32,
    set: bool,
    length: usize,
    seed: u64,
) -> (i32, i32, Vec<u8>) {
    let bytes = arena.bytes();
    bytes.fill(CANARY);
    let value = &mut bytes[SIZE - length..];
    if set {
        // Small numbers, since those mean something.
        let mut random = fastrand::Rng::with_seed(seed);
        value.fill(0);
        if let Some(first) = value.first_mut() {
            *first = random.u8(..4);
        }
        if random.bool() {
            random.fill(value);
        }
    }
    let place = Place::BeforeEnd(length);
    let (result, written) = if set {
        (arena.set(socket, level, name, place, length as u32), 0)
    } else {
        arena.get(socket, level, name, place, Some(length as i32))
    };
    (result.err().unwrap_or(0), written, arena.bytes().to_vec())
}

fn option(random: &mut fastrand::Rng) -> (i32, i32) {
    const LEVELS: [i32; 12] = [
        libc::SOL_SOCKET,
        libc::SOL_IP,
        libc::SOL_TCP,
        libc::SOL_UDP,
        libc::SOL_IPV6,
        libc::SOL_RAW,
        libc::SOL_NETLINK,
        libc::SOL_PACKET,
        284, // SOL_MPTCP
        136, // SOL_UDPLITE
        abi::LEVEL + 1,
        abi::LEVEL - 1,
    ];
    let level =
        if random.u8(..16) == 0 { random.i32(..) } else { *random.choice(&LEVELS).expect("one") };
    let name = match random.u8(..8) {
        0 => random.i32(..),
        1 => random.i32(215..235),
        _ => random.i32(0..90),
    };
    (level, name)
}

/// Options that tell two sockets apart anywhere: what they show is the socket's own, or one socket at
/// a time has it.
fn is_told_apart(level: i32, name: i32) -> bool {
    match level {
        abi::LEVEL => true,
        // Cookie, processor, NAPI id, peers, memory in use, filters by pointer, devices by name.
        libc::SOL_SOCKET => {
            matches!(name, 25 | 26 | 27 | 49 | 50 | 51 | 52 | 55 | 56 | 57 | 59 | 77)
        }
        // Multicast routing and firewall tables are the namespace's.
        libc::SOL_IP | libc::SOL_IPV6 => matches!(name, 22 | 32 | 64..=99 | 200..),
        // State of the connection with its clock, repair, keys of the namespace.
        libc::SOL_TCP => matches!(name, 11 | 19..=22 | 24 | 26 | 29 | 33 | 38 | 39..=42),
        // Statistics, rings, fanout groups.
        libc::SOL_PACKET => matches!(name, 5 | 6 | 13 | 18),
        libc::SOL_NETLINK => name == 3 || name == 4,
        284 => true,
        _ => false,
    }
}

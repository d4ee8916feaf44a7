//! BPF programs that are none of Carnet's, at the hooks of a cgroup: what a firewall, a load balancer or
//! another redirector has there.

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
};

use carnet_testbed::Cgroup;

use crate::{Must as _, sys};

/// A hook at which connections and datagrams begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `cgroup/connect4`.
    Connect4,
    /// `cgroup/connect6`.
    Connect6,
    /// `cgroup/sendmsg4`.
    Sendmsg4,
    /// `cgroup/sendmsg6`.
    Sendmsg6,
}

impl Hook {
    /// Its number in `enum bpf_attach_type`.
    const fn attach_type(self) -> u32 {
        match self {
            Self::Connect4 => 10,
            Self::Connect6 => 11,
            Self::Sendmsg4 => 14,
            Self::Sendmsg6 => 15,
        }
    }

    const fn is_ipv4(self) -> bool {
        matches!(self, Self::Connect4 | Self::Sendmsg4)
    }
}

/// What a program does to a connect or a datagram. Nothing, by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deed {
    /// Only to those that have this destination when it runs; else to all.
    pub only: Option<SocketAddr>,
    /// Sends them here.
    pub rewrite: Option<SocketAddr>,
    /// Clears what programs before it have refused.
    pub clear: bool,
    /// Refuses them.
    pub refuse: bool,
}

/// A program that is attached to a cgroup, by a link; it ends when this is dropped.
#[derive(Debug)]
pub struct Foreign {
    _link: OwnedFd,
}

impl Foreign {
    /// Attaches one that runs after all that are attached to the cgroup already.
    #[track_caller]
    pub fn attach(hook: Hook, cgroup: &Cgroup, deed: Deed) -> Self {
        Self::link(hook, cgroup, deed, 0).must("attach a program")
    }

    /// Attaches one that runs before all that are attached to the cgroup already.
    ///
    /// # Errors
    /// `EINVAL` from kernels that know no such order, Linux 6.12 among them.
    pub fn attach_first(hook: Hook, cgroup: &Cgroup, deed: Deed) -> io::Result<Self> {
        const BEFORE: u32 = 1 << 3;
        Self::link(hook, cgroup, deed, BEFORE)
    }

    fn link(hook: Hook, cgroup: &Cgroup, deed: Deed, flags: u32) -> io::Result<Self> {
        /// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
        const SOCK_ADDR: u32 = 18;
        let instructions = assemble(hook, deed);
        let program = sys::load_program(SOCK_ADDR, hook.attach_type(), &instructions, "foreign")?;
        let directory = File::open(cgroup.path())?;
        let link =
            sys::link_program(program.as_fd(), directory.as_fd(), hook.attach_type(), flags)?;
        Ok(Self { _link: link })
    }

    /// Attaches one that binds each new socket to the device of this number, under this name: as
    /// mitmproxy's local capture does to those of the programs that it captures.
    #[track_caller]
    pub fn attach_to_new_sockets(cgroup: &Cgroup, device: u32, name: &str) -> Self {
        /// `BPF_PROG_TYPE_CGROUP_SOCK`, `BPF_CGROUP_INET_SOCK_CREATE`.
        const SOCK: u32 = 9;
        const CREATE: u32 = 2;
        /// The offset in `struct bpf_sock`.
        const DEVICE: i16 = 0;
        let bind = [
            move_number(R2, device.cast_signed()),
            // *(u32 *)(r1 + DEVICE) = r2
            instruction(0x63, R1, R2, DEVICE, 0),
            move_number(R0, 1),
            EXIT,
        ];
        let program = sys::load_program(SOCK, CREATE, &bind, name).must("load a program");
        let directory = File::open(cgroup.path()).must("open the cgroup");
        let link = sys::link_program(program.as_fd(), directory.as_fd(), CREATE, 0);
        Self { _link: link.must("attach a program") }
    }

    /// Attaches one that sets the `sockops` flags of every TCP socket anew at each of its calls, to none.
    #[track_caller]
    pub fn attach_to_flags(cgroup: &Cgroup) -> Self {
        /// `BPF_PROG_TYPE_SOCK_OPS`, `BPF_CGROUP_SOCK_OPS`.
        const SOCK_OPS: u32 = 13;
        const ATTACH: u32 = 3;
        const SET_FLAGS: i32 = 59;
        let reset = [move_number(R2, 0), call(SET_FLAGS), move_number(R0, 1), EXIT];
        let program = sys::load_program(SOCK_OPS, ATTACH, &reset, "foreign");
        let directory = File::open(cgroup.path()).must("open the cgroup");
        let program = program.must("load a program");
        let link = sys::link_program(program.as_fd(), directory.as_fd(), ATTACH, 0);
        Self { _link: link.must("attach a program") }
    }

    /// Attaches one that looks at every packet that the cgroup's sockets send or receive, and lets it
    /// pass, under this name: as systemd's `IPAddressAllow=` does.
    #[track_caller]
    pub fn attach_to_packets(cgroup: &Cgroup, name: &str) -> [Self; 2] {
        /// `BPF_PROG_TYPE_CGROUP_SKB`.
        const SKB: u32 = 8;
        let pass = [move_number(R0, 1), EXIT];
        let directory = File::open(cgroup.path()).must("open the cgroup");
        // `BPF_CGROUP_INET_INGRESS`, `BPF_CGROUP_INET_EGRESS`.
        [0, 1].map(|attach_type| {
            let program = sys::load_program(SKB, attach_type, &pass, name).must("load a program");
            let link = sys::link_program(program.as_fd(), directory.as_fd(), attach_type, 0);
            Self { _link: link.must("attach a program") }
        })
    }
}

/// Registers, as `struct bpf_insn` numbers them.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R6: u8 = 6;

/// Offsets in `struct bpf_sock_addr`.
const IPV4: i16 = 4;
const IPV6: i16 = 8;
const PORT: i16 = 24;

const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);

/// One `struct bpf_insn`.
const fn instruction(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    code as u64
        | (to as u64) << 8
        | (from as u64) << 12
        | (offset as u16 as u64) << 16
        | (number as u32 as u64) << 32
}

const fn move_number(to: u8, number: i32) -> u64 {
    instruction(0xb4, to, 0, 0, number)
}

const fn call(helper: i32) -> u64 {
    instruction(0x85, 0, 0, 0, helper)
}

/// The words of the context that make up an address and a port, with their offsets.
fn words(hook: Hook, address: SocketAddr) -> Vec<(i16, u32)> {
    let mut words: Vec<(i16, u32)> = match address.ip() {
        IpAddr::V4(ip) if hook.is_ipv4() => vec![(IPV4, u32::from_ne_bytes(ip.octets()))],
        ip => {
            let octets = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let word = |bytes: &[u8]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            octets
                .chunks_exact(4)
                .zip(0..)
                .map(|(bytes, at)| (IPV6 + 4 * at, word(bytes)))
                .collect()
        }
    };
    words.push((PORT, address.port().to_be().into()));
    words
}

/// The program that does the deed.
fn assemble(hook: Hook, deed: Deed) -> Vec<u64> {
    const SET_RETVAL: i32 = 187;
    let mut done = Vec::new();
    for (offset, word) in deed.rewrite.iter().flat_map(|to| words(hook, *to)) {
        done.push(move_number(R1, word.cast_signed()));
        // *(u32 *)(r6 + offset) = r1
        done.push(instruction(0x63, R6, R1, offset, 0));
    }
    if deed.clear {
        done.extend([move_number(R1, 0), call(SET_RETVAL)]);
    }
    done.extend([move_number(R0, i32::from(!deed.refuse)), EXIT]);

    // r6 = r1, the context.
    let mut program = vec![instruction(0xbf, R6, R1, 0, 0)];
    let conditions: Vec<_> = deed.only.iter().flat_map(|only| words(hook, *only)).collect();
    for (index, (offset, word)) in conditions.iter().enumerate() {
        let rest = 3 * (conditions.len() - index - 1) + done.len();
        // r1 = *(u32 *)(r6 + offset); r2 = word; if (u32) r1 != (u32) r2, go to the end.
        program.push(instruction(0x61, R1, R6, *offset, 0));
        program.push(move_number(R2, word.cast_signed()));
        program.push(instruction(0x5e, R1, R2, rest as i16, 0));
    }
    program.extend(done);
    if !conditions.is_empty() {
        program.extend([move_number(R0, 1), EXIT]);
    }
    program
}

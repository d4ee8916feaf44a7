//! Carnet's kernel engine: the hooks, one file each. A hook translates between the kernel and
//! `carnet-core`; it decides nothing itself.
//!
//! | file | hook | job |
//! |---|---|---|
//! | [`connect`] | `cgroup/connect4`, `cgroup/connect6` | redirect, pass or refuse a connection |
//! | [`datagram`] | `cgroup/sendmsg4`, `cgroup/sendmsg6` | the same for UDP without a connection |
//! | [`recvmsg`] | `cgroup/recvmsg4`, `cgroup/recvmsg6` | answers come from whom the application asked |
//! | [`release`] | `cgroup/sock_release` | the end of UDP flows and of accepted sockets |
//! | [`sockops`] | `sockops` | carry a leg from the connecting to the accepted socket; its end |
//! | [`getsockopt`] | `cgroup/getsockopt` | the control interface, questions; `SO_ORIGINAL_DST` |
//! | [`setsockopt`] | `cgroup/setsockopt` | the control interface: set a record, register |
//! | [`bind`] | `cgroup/post_bind4`, `6` | register the listeners of programs that do not |
//! | [`getsockname`] | `cgroup/getsockname4`, `6` | proxies made for `TPROXY` find the destination |
//! | [`getpeername`] | `cgroup/getpeername4`, `6` | the application sees whom it asked for |
//! | [`sock_create`] | `cgroup/sock_create` | cookies for services' sockets; refuse sockets whose flows no hook sees |
//! | [`iter`] | `iter/bpf_sk_storage_map`, `iter/task_file` | list live flows; identify a file |
//!
//! Beside them: [`maps`] (all state), [`place`] (core's places in it), [`connecting`] and [`accepted`] (the legs of
//! sockets), [`handover`] (from the one to the other), [`carry_on`] (and on to the service's next one), [`bank`] (core's tables over the maps),
//! [`decide`] (core's decision over them), [`attempt`] (what is done then), [`enforce`] (that it holds), [`end`] and [`idle`] (the
//! end of legs), [`client`] (whose UDP flow an address stands for), [`source`] (from where UDP may
//! send), [`portable`] (records of other hosts), [`listener`] (a service's live listener), [`registration`] (how it becomes one), [`mac`], [`socket`] (state of
//! sockets), [`process`] (who calls), [`report`] (events and counters), [`ctx`] (fields of the
//! hooks' contexts).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod accepted;
mod adopt;
mod attempt;
mod bank;
mod bind;
mod carry_on;
mod client;
mod connect;
mod connecting;
mod ctx;
mod datagram;
mod decide;
mod end;
mod enforce;
mod getpeername;
mod getsockname;
mod getsockopt;
mod handover;
mod held;
mod idle;
mod iter;
mod listener;
mod mac;
mod maps;
mod place;
mod portable;
mod process;
mod recvmsg;
mod registration;
mod release;
mod report;
mod setsockopt;
mod sock_addr;
mod sock_create;
mod socket;
mod sockops;
mod source;

/// The helpers that read task structures are reserved to GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: the verifier refuses a program in which a panic could be reached.
    loop {}
}

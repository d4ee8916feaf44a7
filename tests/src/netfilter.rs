//! Rules of nftables in a lab's network namespaces.

use std::process::Command;

use carnet_testbed::NetworkNamespace;
use socket2::{Domain, Protocol, Socket, Type};

use crate::Must as _;

/// Whether the kernel has netfilter: emulated ones run without modules.
#[track_caller]
pub fn is_there() -> bool {
    const NETFILTER: i32 = 12;
    let (netlink, protocol) = (Domain::from(libc::AF_NETLINK), Protocol::from(NETFILTER));
    match Socket::new(netlink, Type::RAW, Some(protocol)) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => false,
        socket => socket.map(drop).map(|()| true).must("open a netlink socket"),
    }
}

/// Has `nft` change the rules of a namespace. They go with it.
#[track_caller]
pub fn change(namespace: &NetworkNamespace, commands: &str) {
    let mut nft = Command::new("nft");
    namespace.enter_command(nft.arg(commands)).must("enter the namespace");
    assert!(nft.status().must("run nft").success(), "nft refuses {commands:?}");
}

/// Adds a rule on what comes in to a namespace, as the only one of the table `ip other`.
#[track_caller]
pub fn on_input(namespace: &NetworkNamespace, rule: &str) {
    let chain = "add table ip other; add chain ip other in { type filter hook input priority 0; }";
    change(namespace, &format!("{chain}; add rule ip other in {rule}"));
}

/// Removes what [`on_input`] has added.
#[track_caller]
pub fn remove(namespace: &NetworkNamespace) {
    change(namespace, "delete table ip other");
}

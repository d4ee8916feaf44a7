//! The services' registered listeners, and registering those of unmodified programs.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use carnet_core::{
    abi::{self, LISTENER_SLOTS},
    address::Endpoint,
    flow::{ListenerEntry, ListenerKey},
    object::Protocol,
    socket::SocketKind,
};
use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{Domain, Protocol as SocketProtocol, SockRef, Type};

use crate::{
    Engine, Error, members,
    namespace::NetworkNamespace,
    netlink::{self, Route},
    sys,
    tables::Tables,
};

/// A registered listener.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listener {
    /// The service's redirect handle.
    pub handle: u64,
    /// Cookie of the network namespace whose flows it gets.
    pub netns: u64,
    /// Cookie of the network namespace in which it listens: the same one, unless the administrator
    /// has said that flows reach it in another ([`Engine::register_reach`]).
    pub home: u64,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The address that it is bound to; may be unspecified. Of one in another network namespace the
    /// address at which it is reached.
    pub local: SocketAddr,
    /// Connections that did not find it since one last did. Not 0: it has probably been closed, and
    /// the kernel will give its place to the next one that registers.
    pub missed: u64,
}

/// Which sockets of a service's processes are to be registered: listening TCP sockets, and UDP sockets
/// that are bound and not connected. Of a service with a port of its own
/// ([`Service::listen_port`](carnet_core::object::Service::listen_port)) those at this port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSockets {
    /// Only those of this process and of the processes that descend from it, such as its workers; else
    /// of all that run in the service's cgroup.
    pub process: Option<u32>,
    /// Of the TCP sockets only those that are bound to these addresses, whatever the service's port is:
    /// a program may listen for other things as well. If there is no address, all.
    pub tcp: Vec<SocketAddr>,
    /// The same of the UDP sockets: a program may have others, which are no listeners.
    pub udp: Vec<SocketAddr>,
    /// Only those in the network namespace with this cookie.
    pub netns: Option<u64>,
}

impl ServiceSockets {
    /// Whether these sockets of a service with this port include one.
    fn include(&self, port: Option<NonZeroU16>, socket: &Found) -> bool {
        let named = if socket.protocol == Protocol::TCP { &self.tcp } else { &self.udp };
        let at_port = port.is_none_or(|port| port.get() == socket.local.port());
        self.netns.is_none_or(|netns| netns == socket.netns)
            && if named.is_empty() { at_port } else { named.contains(&socket.local) }
    }

    /// The first that is named and not among these.
    fn missing(&self, found: &[Found]) -> Option<(Protocol, SocketAddr)> {
        let named = |protocol, addresses: &[SocketAddr]| {
            let is = |address: &SocketAddr| {
                found.iter().any(|s| (s.protocol, s.local) == (protocol, *address))
            };
            addresses.iter().find(|address| !is(address)).map(|address| (protocol, *address))
        };
        named(Protocol::TCP, &self.tcp).or_else(|| named(Protocol::UDP, &self.udp))
    }
}

/// That flows of one network namespace reach a service's listener in another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach<'a> {
    /// Path of the flows' network namespace, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub flows: &'a Path,
    /// Path of the listener's.
    pub home: &'a Path,
    /// Where they reach it: an address of the listener's network namespace, such as that of its end
    /// of a veth pair.
    pub address: SocketAddr,
}

impl Engine {
    /// The registered listeners. One that was closed stays in this list until its place is needed;
    /// no connection is sent to it.
    ///
    /// # Errors
    /// [`Error::NotUp`], [`Error::UnknownLayout`], [`Error::Map`].
    pub fn listeners(&self) -> Result<Vec<Listener>, Error> {
        let entries = self.reading(Tables::listeners)?;
        let mut listeners: Vec<_> =
            entries.iter().map(|(key, entry)| Listener::new(key, entry)).collect();
        listeners.sort_by_key(|l| (l.handle, l.netns, l.protocol, l.local));
        Ok(listeners)
    }

    /// Registers the sockets on which a running process listens, or one that descends from it, for the
    /// service of this name, as the process itself would do with `carnet::register_listener`; gives
    /// where they are. None if there is no such one. [`ServiceSockets`] says which they are.
    ///
    /// # Errors
    /// As for [`Engine::register_sockets_of`].
    pub fn register_listener_of(&self, service: &str, pid: u32) -> Result<Vec<SocketAddr>, Error> {
        let sockets = ServiceSockets { process: Some(pid), ..ServiceSockets::default() };
        let registered = self.register_sockets_of(service, &sockets)?;
        Ok(registered.into_iter().map(|listener| listener.local).collect())
    }

    /// Registers sockets of a service's running processes for it, each in the network namespace in
    /// which it is; gives them. None if there are no such sockets.
    ///
    /// # Errors
    /// [`Error::NoService`]; [`Error::NoSocket`] if one that was named is not there, in which case
    /// none is registered; [`Error::Register`] if the kernel engine does not take one of them, for
    /// example since the process was not started in the service's cgroup; [`Error::Io`] if a process
    /// cannot be examined (needs `CAP_SYS_PTRACE` for those of other users); [`Error::CgroupGone`].
    pub fn register_sockets_of(
        &self,
        name: &str,
        sockets: &ServiceSockets,
    ) -> Result<Vec<Listener>, Error> {
        let policy = self.policy()?;
        let service = policy.service(name);
        let service = service.map_err(|_| Error::NoService { name: name.to_owned() })?;
        let mut wanted = Vec::new();
        for pid in members::processes_of(service, sockets.process)? {
            let found = match sockets_of(pid) {
                // Another one than the one that was named may have ended meanwhile.
                Err(_) if sockets.process != Some(pid) && !process_is(pid) => continue,
                found => found?,
            };
            wanted.extend(found.into_iter().filter(|s| sockets.include(service.listen_port, s)));
        }
        if let Some((protocol, address)) = sockets.missing(&wanted) {
            let limited = sockets.netns.is_some();
            let service = service.name.clone();
            return Err(Error::NoSocket { service, protocol, address, limited });
        }
        let handle = service.handle;
        let mut registered = Vec::new();
        for Found { pid, socket, protocol, local, netns } in wanted {
            let value = handle.to_ne_bytes();
            sys::set_option(socket.as_fd(), abi::LEVEL, abi::REGISTER_LISTENER, &value)
                .map_err(|source| Error::Register { pid, listener: local.to_string(), source })?;
            let listener = Listener { handle, netns, home: netns, protocol, local, missed: 0 };
            // Descriptors of one socket count once.
            if !registered.contains(&listener) {
                registered.push(listener);
            }
        }
        Ok(registered)
    }

    /// Notes that flows of a network namespace reach the listener of the service of this name in
    /// another one. The listener has to be registered there. TCP only: the addresses from which a
    /// service gets the datagrams of UDP flows mean nothing beyond their network namespace.
    ///
    /// It holds for whatever socket of the service listens there, also when the service starts anew,
    /// until it is taken back ([`Engine::unregister_reach`]) or the service is removed.
    ///
    /// # Errors
    /// [`Error::NoService`]; [`Error::NotReachable`]; [`Error::NoListener`];
    /// [`Error::NoListenerSlot`]; [`Error::Io`] if a network namespace cannot be entered (needs
    /// `CAP_SYS_ADMIN`); [`Error::NotUp`], [`Error::UnknownLayout`], [`Error::Map`].
    pub fn register_reach(&self, service: &str, reach: &Reach<'_>) -> Result<Listener, Error> {
        let (flows, home) =
            (NetworkNamespace::open(reach.flows)?, NetworkNamespace::open(reach.home)?);
        let address = SocketAddr::new(reach.address.ip().to_canonical(), reach.address.port());
        reach.check(address, &flows, &home)?;
        let number = flows.run("ask for the number of a network namespace in", || {
            netlink::number_of(home.descriptor())
        })?;

        let _lock = self.lock_to_change()?;
        self.instance()?;
        let handle = self.handle_in_force(service)?;
        let entries = self.tables().listeners()?;
        if !entries.iter().any(|(key, entry)| takes(key, entry, handle, home.cookie, address)) {
            return Err(Error::NoListener {
                service: service.to_owned(),
                address,
                home: reach.home.display().to_string(),
            });
        }
        let local = Endpoint::from(address);
        let entry = ListenerEntry { local, missed: 0, home: home.cookie, home_id: number, zero: 0 };
        for slot in slots(&entries, handle, flows.cookie, &entry) {
            let key = ListenerKey {
                handle,
                netns: flows.cookie,
                family: local.family,
                protocol: Protocol::TCP.0.into(),
                slot: slot.number,
            };
            if self.tables().add_listener(key, entry, slot.taken)?.is_some() {
                return Ok(Listener::new(&key, &entry));
            }
        }
        Err(Error::NoListenerSlot { service: service.to_owned() })
    }

    /// Takes back what was noted with [`Engine::register_reach`] of a service and an address: for the
    /// flows of the network namespace with this cookie, or of all. Gives what was taken back.
    /// Connections that are open go on.
    ///
    /// # Errors
    /// [`Error::NoService`]; [`Error::NotUp`], [`Error::UnknownLayout`], [`Error::Map`].
    pub fn unregister_reach(
        &self,
        service: &str,
        flows: Option<u64>,
        address: SocketAddr,
    ) -> Result<Vec<Listener>, Error> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let _lock = self.lock_to_change()?;
        self.instance()?;
        let handle = self.handle_in_force(service)?;
        let entries = self.tables().listeners()?;
        let unwanted = entries.iter().filter(|(key, entry)| {
            key.handle == handle
                && entry.home != key.netns
                && flows.is_none_or(|cookie| cookie == key.netns)
                && SocketAddr::from(entry.local) == address
        });
        let keys: Vec<_> = unwanted.clone().map(|(key, _)| *key).collect();
        self.tables().remove_listeners(&keys)?;
        Ok(unwanted.map(|(key, entry)| Listener::new(key, entry)).collect())
    }

    /// The handle of the service of this name. The caller holds the instance's lock.
    fn handle_in_force(&self, service: &str) -> Result<u64, Error> {
        let policy = self.tables().in_force()?.policy;
        let found = policy.service(service);
        Ok(found.map_err(|_| Error::NoService { name: service.to_owned() })?.handle)
    }
}

impl Listener {
    fn new(key: &ListenerKey, entry: &ListenerEntry) -> Self {
        Self {
            handle: key.handle,
            netns: key.netns,
            home: entry.home,
            protocol: Protocol(key.protocol as u8),
            local: entry.local.into(),
            missed: entry.missed,
        }
    }
}

impl Reach<'_> {
    /// Refuses an address by which nobody gets from one of the two network namespaces to the other.
    fn check(
        &self,
        address: SocketAddr,
        flows: &NetworkNamespace,
        home: &NetworkNamespace,
    ) -> Result<(), Error> {
        let refuse = |why: String| {
            let flows = self.flows.display().to_string();
            Err(Error::NotReachable { flows, address, why })
        };
        if flows.cookie == home.cookie {
            let why = "the listener would be in the same network namespace, where it is found \
                       without this: let the service register it";
            return refuse(why.into());
        }
        let ip = address.ip();
        let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local {
            let why = "name one address that the two network namespaces share a way to, such as that \
                       of the far end of a veth pair; no loopback, wildcard, multicast or link-local \
                       one";
            return refuse(why.into());
        }
        if address.port() == 0 {
            return refuse("name the port on which the service listens".into());
        }
        let far = home.run("ask for the routes of", || netlink::route_to(ip))?;
        if far != Route::Local {
            return refuse(format!("{ip} is no address of {}", self.home.display()));
        }
        match flows.run("ask for the routes of", || netlink::route_to(ip))? {
            Route::Away => Ok(()),
            Route::Local => {
                refuse(format!("{ip} is an address of {} itself", self.flows.display()))
            }
            Route::None => refuse(format!("{} has no route to {ip}", self.flows.display())),
        }
    }
}

/// Whether an entry is that of a listener of the service in the network namespace `home` that takes
/// connections to `address`.
fn takes(
    key: &ListenerKey,
    entry: &ListenerEntry,
    handle: u64,
    home: u64,
    address: SocketAddr,
) -> bool {
    let local = SocketAddr::from(entry.local);
    // A wildcard IPv6 listener takes IPv4 connections unless told otherwise; the kernel looks.
    let everywhere = local.ip().is_unspecified() && (local.is_ipv6() || address.is_ipv4());
    key.handle == handle
        && (key.netns, entry.home) == (home, home)
        && key.protocol == u16::from(Protocol::TCP.0)
        && entry.missed == 0
        && local.port() == address.port()
        && (everywhere || local.ip().to_canonical() == address.ip())
}

/// A place for a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    number: u32,
    /// Whether somebody has it, who may be replaced.
    taken: bool,
}

/// The slots that an entry may get for the flows of `netns`: the one that it has, else those that are
/// free, and then those of local listeners that are gone.
fn slots(
    entries: &[(ListenerKey, ListenerEntry)],
    handle: u64,
    netns: u64,
    new: &ListenerEntry,
) -> Vec<Slot> {
    let there = |number: u32| {
        entries.iter().find_map(|(key, entry)| {
            let same = (key.handle, key.netns, key.family, key.slot)
                == (handle, netns, new.local.family, number)
                && key.protocol == u16::from(Protocol::TCP.0);
            same.then_some(entry)
        })
    };
    let numbers = || 0..LISTENER_SLOTS;
    let own = |entry: &ListenerEntry| entry.local == new.local && entry.home != netns;
    if let Some(number) = numbers().find(|number| there(*number).is_some_and(own)) {
        return vec![Slot { number, taken: true }];
    }
    let gone = |entry: &ListenerEntry| entry.missed != 0 && entry.home == netns;
    let free = numbers().filter(|number| there(*number).is_none());
    let free = free.map(|number| Slot { number, taken: false });
    let gone = numbers().filter(|number| there(*number).is_some_and(gone));
    free.chain(gone.map(|number| Slot { number, taken: true })).collect()
}

/// A socket of a process that can be registered.
#[derive(Debug)]
struct Found {
    pid: u32,
    socket: OwnedFd,
    protocol: Protocol,
    local: SocketAddr,
    /// Cookie of its network namespace.
    netns: u64,
}

/// Whether there is such a process.
fn process_is(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Copies of a process's descriptors of sockets that can be registered.
fn sockets_of(pid: u32) -> Result<Vec<Found>, Error> {
    let failed = |operation| Error::io::<io::Error>(operation, format!("process {pid}"));
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or_else(|| failed("open")(io::ErrorKind::NotFound.into()))?;
    let process =
        pidfd_open(number, PidfdFlags::empty()).map_err(|errno| failed("open")(errno.into()))?;
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed("list the files of"))?;
    let mut sockets = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("list the files of"))?;
        // It may have been closed meanwhile.
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        let Some(descriptor) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if !is_socket {
            continue;
        }
        let descriptor: ForeignRawFd = descriptor;
        let socket = match pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty()) {
            Err(rustix::io::Errno::BADF) => continue,
            socket => socket.map_err(|errno| failed("get a socket of")(errno.into()))?,
        };
        if let Some((protocol, local)) = takes_flows_at(&socket) {
            let netns = sys::netns_cookie(socket.as_fd())
                .map_err(failed("ask for the network namespace of a socket of"))?;
            sockets.push(Found { pid, socket, protocol, local, netns });
        }
    }
    Ok(sockets)
}

/// Where a socket gets flows: if it is a listening TCP socket, or a UDP socket that is bound and not
/// connected.
fn takes_flows_at(socket: &OwnedFd) -> Option<(Protocol, SocketAddr)> {
    let view = SockRef::from(socket);
    if !matches!(view.domain(), Ok(Domain::IPV4 | Domain::IPV6)) {
        return None;
    }
    let local = view.local_addr().ok()?.as_socket()?;
    let (protocol, ready) = match view.protocol().ok()?? {
        SocketProtocol::TCP | SocketProtocol::MPTCP => {
            let stream = matches!(view.r#type(), Ok(Type::STREAM));
            (Protocol::TCP, stream && view.is_listener().unwrap_or(false))
        }
        SocketProtocol::UDP => (Protocol::UDP, local.port() != 0 && view.peer_addr().is_err()),
        _ => return None,
    };
    ready.then_some((protocol, local))
}

/// What a process's socket was made as; `None` if it is gone.
pub(crate) fn socket_kind(pid: u32, descriptor: i32) -> Option<SocketKind> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let socket = pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty()).ok()?;
    let view = SockRef::from(&socket);
    let number = |number: i32| u16::try_from(number).ok();
    Some(SocketKind {
        family: number(view.domain().ok()?.into())?,
        kind: number(view.r#type().ok()?.into())?,
        protocol: number(view.protocol().ok()?.map_or(0, i32::from))?,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn sockets_that_get_flows_are_told_from_others() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let client = TcpStream::connect(local).unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let bound = datagrams.local_addr().unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(bound).unwrap();
        assert_eq!(takes_flows_at(&client.into()), None);
        assert_eq!(takes_flows_at(&connected.into()), None);
        let own = sockets_of(std::process::id()).unwrap();
        let netns = Engine::own_netns().unwrap();
        for expected in [(Protocol::TCP, local), (Protocol::UDP, bound)] {
            assert!(own.iter().any(|s| (s.protocol, s.local) == expected && s.netns == netns));
        }
        assert_eq!(takes_flows_at(&listener.into()), Some((Protocol::TCP, local)));
        assert_eq!(takes_flows_at(&datagrams.into()), Some((Protocol::UDP, bound)));
        let unbound = socket2::Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        assert_eq!(takes_flows_at(&unbound.into()), None);
    }

    fn entry(local: &str, home: u64, missed: u64) -> ListenerEntry {
        let local = Endpoint::from(local.parse::<SocketAddr>().unwrap());
        ListenerEntry { local, missed, home, home_id: -1, zero: 0 }
    }

    fn at(slot: u32, entry: ListenerEntry) -> (ListenerKey, ListenerEntry) {
        let family = entry.local.family;
        (ListenerKey { handle: 7, netns: 1, family, protocol: 6, slot }, entry)
    }

    #[test]
    fn a_listener_elsewhere_takes_no_other_ones_place() {
        let new = entry("192.0.2.1:80", 2, 0);
        let elsewhere = at(0, entry("192.0.2.1:81", 2, 5));
        let gone = at(1, entry("127.0.0.1:80", 1, 5));
        let live = at(2, entry("127.0.0.1:81", 1, 0));
        let found = slots(&[elsewhere, gone, live], 7, 1, &new);
        let numbers: Vec<_> = found.iter().map(|slot| (slot.number, slot.taken)).collect();
        let free = (3..LISTENER_SLOTS).map(|number| (number, false));
        assert_eq!(numbers, free.chain([(1, true)]).collect::<Vec<_>>());
        // Unless it is there already.
        let found = slots(&[elsewhere, gone, at(4, new)], 7, 1, &new);
        assert_eq!(found, [Slot { number: 4, taken: true }]);
    }

    #[test]
    fn what_takes_connections_to_an_address() {
        let is_taken = |local: &str, address: &str| {
            let (key, entry) = at(0, entry(local, 1, 0));
            takes(&key, &entry, 7, 1, address.parse().unwrap())
        };
        for local in ["192.0.2.1:80", "0.0.0.0:80", "[::]:80", "[::ffff:192.0.2.1]:80"] {
            assert!(is_taken(local, "192.0.2.1:80"), "{local}");
        }
        for local in ["192.0.2.2:80", "192.0.2.1:81", "127.0.0.1:80", "[::1]:80"] {
            assert!(!is_taken(local, "192.0.2.1:80"), "{local}");
        }
        assert!(is_taken("[::]:80", "[2001:db8::1]:80"));
        assert!(!is_taken("0.0.0.0:80", "[2001:db8::1]:80"));
        let (key, closed) = at(0, entry("192.0.2.1:80", 1, 1));
        assert!(!takes(&key, &closed, 7, 1, "192.0.2.1:80".parse().unwrap()));
    }
}

//! The services' registered listeners, and registering those of unmodified programs.

use std::{
    fs, io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
};

use carnet_core::{abi, socket::SocketKind};
use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{Domain, Protocol, SockRef, Type};

use crate::{Engine, Error, sys, tables::Tables};

/// A registered listener.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listener {
    /// The service's redirect handle.
    pub handle: u64,
    /// Cookie of the network namespace that it listens in.
    pub netns: u64,
    /// The address that it is bound to; may be unspecified.
    pub local: SocketAddr,
    /// Connections that did not find it since one last did. Not 0: it has probably been closed, and
    /// the kernel will give its place to the next one that registers.
    pub missed: u64,
}

impl Engine {
    /// The registered listeners. One that was closed stays in this list until its place is needed;
    /// no connection is sent to it.
    ///
    /// # Errors
    /// [`Error::NotUp`], [`Error::UnknownLayout`], [`Error::Map`].
    pub fn listeners(&self) -> Result<Vec<Listener>, Error> {
        let entries = self.reading(Tables::listeners)?;
        let mut listeners: Vec<_> = entries
            .into_iter()
            .map(|(key, entry)| Listener {
                handle: key.handle,
                netns: key.netns,
                local: entry.local.into(),
                missed: entry.missed,
            })
            .collect();
        listeners.sort_by_key(|listener| (listener.handle, listener.netns, listener.local));
        Ok(listeners)
    }

    /// Registers the sockets on which a running process listens, for the service of this name, as
    /// the process itself would do with `carnet::register_listener`; gives where they are: listening
    /// TCP sockets, and UDP sockets that are bound and not connected. None if there is no such one.
    ///
    /// # Errors
    /// [`Error::NoService`]; [`Error::Register`] if the kernel engine does not take one of them, for
    /// example since the process was not started in the service's cgroup; [`Error::Io`] if the
    /// process cannot be examined (needs `CAP_SYS_PTRACE` for those of other users).
    pub fn register_listener_of(&self, service: &str, pid: u32) -> Result<Vec<SocketAddr>, Error> {
        let policy = self.policy()?;
        let handle = policy
            .service(service)
            .map_err(|_| Error::NoService { name: service.to_owned() })?
            .handle;
        let mut registered = Vec::new();
        for (socket, local) in listening_sockets(pid)? {
            let value = handle.to_ne_bytes();
            sys::set_option(socket.as_fd(), abi::LEVEL, abi::REGISTER_LISTENER, &value)
                .map_err(|source| Error::Register { pid, listener: local.to_string(), source })?;
            // Descriptors of one socket count once.
            if !registered.contains(&local) {
                registered.push(local);
            }
        }
        Ok(registered)
    }
}

/// Copies of a process's descriptors of sockets on which it listens.
fn listening_sockets(pid: u32) -> Result<Vec<(OwnedFd, SocketAddr)>, Error> {
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
        if let Some(local) = listening_at(&socket) {
            sockets.push((socket, local));
        }
    }
    Ok(sockets)
}

/// Where a socket listens, if it is a listening TCP socket, or a UDP socket that is bound and hears
/// everybody.
fn listening_at(socket: &OwnedFd) -> Option<SocketAddr> {
    let view = SockRef::from(socket);
    if !matches!(view.domain(), Ok(Domain::IPV4 | Domain::IPV6)) {
        return None;
    }
    let listens = match view.protocol().ok()?? {
        Protocol::TCP | Protocol::MPTCP => {
            matches!(view.r#type(), Ok(Type::STREAM)) && view.is_listener().unwrap_or(false)
        }
        Protocol::UDP => view.peer_addr().is_err(),
        _ => false,
    };
    let local = view.local_addr().ok()?.as_socket()?;
    (listens && local.port() != 0).then_some(local)
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
    fn listening_sockets_are_told_from_others() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let client = TcpStream::connect(local).unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let heard = datagrams.local_addr().unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(heard).unwrap();
        assert_eq!(listening_at(&client.into()), None);
        assert_eq!(listening_at(&connected.into()), None);
        let own = listening_sockets(std::process::id()).unwrap();
        for place in [local, heard] {
            assert!(own.iter().any(|(_, found)| *found == place));
        }
        assert_eq!(listening_at(&listener.into()), Some(local));
        assert_eq!(listening_at(&datagrams.into()), Some(heard));
        let unbound = socket2::Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        assert_eq!(listening_at(&OwnedFd::from(unbound)), None);
    }
}

//! What people name by a path, and the kernel engine by a number: cgroups and network namespaces.

use std::{fs::File, io, os::fd::AsFd as _, path::Path, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};

use crate::{Engine, Error, cgroup::Place, sys};

impl Engine {
    /// The id of the cgroup with this directory, and its depth below the hierarchy's root, which
    /// is level 0.
    ///
    /// # Errors
    /// [`Error::NoCgroup2`]; [`Error::NotACgroup`]; [`Error::Io`] if there is no such directory;
    /// [`Error::CgroupNamespace`] if the root is not in sight, and the level therefore unknown.
    pub fn resolve_cgroup(path: &Path) -> Result<(u64, u32), Error> {
        let place = Place::at(path)?;
        Ok((place.id, place.level()?))
    }

    /// The cookie of the network namespace at this path, such as `/run/netns/NAME` or
    /// `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// [`Error::Io`] if there is none, or if it cannot be entered (needs `CAP_SYS_ADMIN`).
    pub fn resolve_netns(path: &Path) -> Result<u64, Error> {
        let failed = |operation| Error::io::<io::Error>(operation, path.display());
        let namespace = File::open(path).map_err(failed("open"))?;
        let ask = || sys::netns_cookie(Socket::new(Domain::UNIX, Type::DGRAM, None)?.as_fd());
        inside(&namespace, ask).map_err(failed("ask for the cookie of"))
    }
}

/// Does something in a network namespace: in a thread of its own, so that nobody else finds itself
/// there.
pub(crate) fn inside<T: Send>(
    namespace: &File,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let working = scope.spawn(|| {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network)?;
            work()
        });
        let panicked = |_| Err(io::Error::other("the thread that asks panicked"));
        working.join().unwrap_or_else(panicked)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_namespace_has_its_sockets_cookie() {
        let cookie = Engine::resolve_netns(Path::new("/proc/self/ns/net")).unwrap();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(cookie, sys::netns_cookie(socket.as_fd()).unwrap());
        assert!(matches!(Engine::resolve_netns(Path::new("/dev/null")), Err(Error::Io { .. })));
    }
}

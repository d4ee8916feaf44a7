//! What people name by a path, and the kernel engine by a number: cgroups and network namespaces.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
    thread,
};

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
        Ok(NetworkNamespace::open(path)?.cookie)
    }

    /// The cookie of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if the kernel does not say (before Linux 5.14).
    pub fn own_netns() -> Result<u64, Error> {
        own_cookie().map_err(Error::io("ask for the cookie of", "the own network namespace"))
    }
}

/// A network namespace that is held open.
#[derive(Debug)]
pub(crate) struct NetworkNamespace {
    file: File,
    name: String,
    /// Its cookie.
    pub(crate) cookie: u64,
}

impl NetworkNamespace {
    /// The one at this path. Fails as [`Engine::resolve_netns`].
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(Error::io("open", &name))?;
        let cookie =
            inside(&file, own_cookie).map_err(Error::io("ask for the cookie of", &name))?;
        Ok(Self { file, name, cookie })
    }

    /// Does something within it. `operation` completes the sentence "cannot … NAMESPACE".
    pub(crate) fn run<T: Send>(
        &self,
        operation: &'static str,
        job: impl FnOnce() -> io::Result<T> + Send,
    ) -> Result<T, Error> {
        inside(&self.file, job).map_err(Error::io(operation, &self.name))
    }

    /// A descriptor of it.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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

fn own_cookie() -> io::Result<u64> {
    sys::netns_cookie(Socket::new(Domain::UNIX, Type::DGRAM, None)?.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_namespace_has_its_sockets_cookie() {
        let cookie = Engine::resolve_netns(Path::new("/proc/self/ns/net")).unwrap();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(cookie, sys::netns_cookie(socket.as_fd()).unwrap());
        assert_eq!(cookie, Engine::own_netns().unwrap());
        assert!(matches!(Engine::resolve_netns(Path::new("/dev/null")), Err(Error::Io { .. })));
    }
}

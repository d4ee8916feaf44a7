//! The sockets of a network namespace as the kernel lists them, with the cgroup of each, and their
//! end: netlink's `sock_diag`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout};

/// `NETLINK_SOCK_DIAG`.
const SOCK_DIAG: i32 = 4;
/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY` (since Linux 4.5).
const DESTROY: u16 = 21;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
const ACKNOWLEDGE: u16 = 4;
/// `NLM_F_DUMP`.
const DUMP: u16 = 0x300;
/// `INET_DIAG_CGROUP_ID` (since Linux 5.9).
const CGROUP_ID: u16 = 21;
/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// What netlink's parts are aligned to.
const ALIGNMENT: usize = 4;

/// `TCP_ESTABLISHED`: also a connected UDP socket.
pub(crate) const ESTABLISHED: u8 = 1;
/// `TCP_SYN_RECV`.
pub(crate) const SYN_RECEIVED: u8 = 3;
/// `TCP_TIME_WAIT`.
pub(crate) const TIME_WAIT: u8 = 6;
/// `TCP_CLOSE`: also a UDP socket that is not connected.
pub(crate) const CLOSE: u8 = 7;
/// `TCP_LISTEN`.
pub(crate) const LISTEN: u8 = 10;
/// `TCP_NEW_SYN_RECV`.
pub(crate) const NEW_SYN_RECEIVED: u8 = 12;

/// The protocols of which sockets are listed: TCP (with the subflows of Multipath TCP), UDP and
/// UDP-Lite.
pub(crate) const PROTOCOLS: [u8; 3] = [6, 17, 136];

/// `struct nlmsghdr`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct inet_diag_sockid`. Addresses and ports are in network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Id {
    local_port: [u8; 2],
    peer_port: [u8; 2],
    local: [u8; 16],
    peer: [u8; 16],
    device: u32,
    cookie: [u32; 2],
}

/// `struct inet_diag_req_v2`.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Request {
    family: u8,
    protocol: u8,
    extensions: u8,
    zero: u8,
    states: u32,
    id: Id,
}

/// `struct inet_diag_msg`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Answer {
    family: u8,
    state: u8,
    timer: u8,
    retransmissions: u8,
    id: Id,
    expires: u32,
    receive_queue: u32,
    send_queue: u32,
    user: u32,
    inode: u32,
}

/// An internet socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    family: u8,
    id: Id,
    /// IP protocol number.
    pub(crate) protocol: u8,
    /// Its state, as TCP numbers them.
    pub(crate) state: u8,
    /// Its owner.
    pub(crate) user: u32,
    /// Number of its inode; 0 for one that no process holds.
    pub(crate) inode: u64,
    /// The cgroup in which it was made.
    pub(crate) cgroup: u64,
}

impl Listed {
    /// Its own address.
    pub(crate) fn local(&self) -> SocketAddr {
        self.address(self.id.local, self.id.local_port)
    }

    /// The other end's address; unspecified for one that has none.
    pub(crate) fn peer(&self) -> SocketAddr {
        self.address(self.id.peer, self.id.peer_port)
    }

    /// Its cookie.
    pub(crate) fn cookie(&self) -> u64 {
        let [low, high] = self.id.cookie;
        u64::from(high) << 32 | u64::from(low)
    }

    fn address(&self, octets: [u8; 16], port: [u8; 2]) -> SocketAddr {
        let ip = if i32::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = octets;
            IpAddr::from(Ipv4Addr::new(a, b, c, d))
        } else {
            Ipv6Addr::from(octets).into()
        };
        SocketAddr::new(ip, u16::from_be_bytes(port))
    }
}

/// A netlink socket, for the network namespace in which it was made.
#[derive(Debug)]
pub(crate) struct Diagnosis(Socket);

impl AsFd for Diagnosis {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Diagnosis {
    /// Opens one in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = Domain::from(libc::AF_NETLINK);
        let socket = Socket::new(netlink, Type::RAW, Some(Protocol::from(SOCK_DIAG)))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// The sockets of a protocol, over IPv4 and IPv6.
    ///
    /// Those that are neither bound nor connected are not among them: the kernel has no list of
    /// these.
    pub(crate) fn list(&self, protocol: u8) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut id = Id::new_zeroed();
            id.cookie = [u32::MAX; 2];
            let family = family as u8;
            self.ask(
                BY_FAMILY,
                DUMP,
                Request { family, protocol, extensions: 0, zero: 0, states: u32::MAX, id },
            )?;
            self.answers(|body| listed.extend(read(body, protocol)))?;
        }
        Ok(listed)
    }

    /// Ends a socket that was listed: whoever holds it finds it broken (`ECONNABORTED`). `false` if
    /// it has gone by itself.
    ///
    /// # Errors
    /// `EOPNOTSUPP` from a kernel without `CONFIG_INET_DIAG_DESTROY`.
    pub(crate) fn destroy(&self, socket: &Listed) -> io::Result<bool> {
        self.ask(
            DESTROY,
            ACKNOWLEDGE,
            Request {
                family: socket.family,
                protocol: socket.protocol,
                extensions: 0,
                zero: 0,
                states: u32::MAX,
                id: socket.id,
            },
        )?;
        match self.answers(|_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether this kernel can end sockets: asks for the end of one that there cannot be.
    ///
    /// # Errors
    /// `ENOENT` from a kernel that does not even list them.
    pub(crate) fn can_destroy(&self) -> io::Result<bool> {
        for protocol in PROTOCOLS {
            self.list(protocol)?;
        }
        let mut id = Id::new_zeroed();
        id.cookie = [1, u32::MAX];
        let [family, protocol] = [libc::AF_INET as u8, PROTOCOLS[0]];
        let nobody = Listed { family, id, protocol, state: 0, user: 0, inode: 0, cgroup: 0 };
        match self.destroy(&nobody) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn ask(&self, kind: u16, flags: u16, request: Request) -> io::Result<()> {
        let length = (size_of::<Header>() + size_of::<Request>()) as u32;
        let header = Header { length, kind, flags: REQUEST | flags, sequence: 1, port: 0 };
        let message = [header.as_bytes(), request.as_bytes()].concat();
        // A netlink socket that is not connected sends to the kernel.
        self.0.send(&message).map(drop)
    }

    /// Reads answers up to the last, which says that it is, or an error, or that all went well.
    fn answers(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let length = io::Read::read(&mut &self.0, &mut buffer)?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, body, next)) = message(rest) {
                match kind {
                    // Both begin with an errno, negative, or 0.
                    DONE | ERROR => {
                        let errno = i32::read_from_prefix(body).map_or(0, |(errno, _)| errno);
                        return match errno {
                            0 => Ok(()),
                            errno => Err(io::Error::from_raw_os_error(-errno)),
                        };
                    }
                    BY_FAMILY => each(body),
                    _ => {}
                }
                rest = next;
            }
        }
    }
}

/// The kind and the body of the first message, and what follows it; `None` at the end.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (header, _) = Header::read_from_prefix(bytes).ok()?;
    let length = header.length as usize;
    let body = bytes.get(size_of::<Header>()..length)?;
    let next = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    Some((header.kind, body, next))
}

/// The socket that a message tells of.
fn read(body: &[u8], protocol: u8) -> Option<Listed> {
    let (answer, mut rest) = Answer::read_from_prefix(body).ok()?;
    let mut cgroup = 0;
    // `struct nlattr`: a length, itself included, and a kind.
    while let Ok(([length, kind], _)) = <[u16; 2]>::read_from_prefix(rest) {
        let Some(value) = rest.get(size_of::<[u16; 2]>()..length.into()) else { break };
        if kind == CGROUP_ID {
            cgroup = u64::read_from_prefix(value).map_or(0, |(id, _)| id);
        }
        rest = rest.get(usize::from(length).next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    }
    let Answer { family, state, id, user, inode, .. } = answer;
    Some(Listed { family, id, protocol, state, user, inode: inode.into(), cgroup })
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    /// How many sockets the messages tell of.
    pub(crate) fn count(bytes: &[u8]) -> usize {
        let mut rest = bytes;
        let mut sockets = 0;
        while let Some((_, body, next)) = super::message(rest) {
            sockets += usize::from(super::read(body, 6).is_some());
            assert!(next.len() < rest.len(), "it does not come to an end");
            rest = next;
        }
        sockets
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::fs::MetadataExt as _,
    };

    use carnet_testbed::{NetworkNamespace, require_root};

    use super::*;

    fn inode(socket: &impl std::os::fd::AsRawFd) -> u64 {
        fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap().ino()
    }

    #[test]
    fn sockets_are_listed_and_ended() {
        require_root().unwrap();
        let namespace = NetworkNamespace::create("carnet-engine-sockets").unwrap();
        let (diagnosis, listener, udp) = namespace
            .run(|| {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let udp = UdpSocket::bind("[::1]:0").unwrap();
                udp.connect("[::1]:9").unwrap();
                (Diagnosis::open().unwrap(), listener, udp)
            })
            .unwrap();
        let to = listener.local_addr().unwrap();
        let client = namespace.run(|| TcpStream::connect(to).unwrap()).unwrap();
        let own = fs::metadata(carnet_own_cgroup()).unwrap().ino();

        let tcp = diagnosis.list(6).unwrap();
        assert_eq!(tcp.len(), 3, "{tcp:#?}");
        let find = |list: &[Listed], inode| list.iter().find(|s| s.inode == inode).cloned();
        let found = find(&tcp, inode(&client)).unwrap();
        assert_eq!((found.state, found.protocol, found.user), (ESTABLISHED, 6, 0));
        assert_eq!((found.local(), found.peer()), (client.local_addr().unwrap(), to));
        assert_eq!(found.cgroup, own);
        let listening = find(&tcp, inode(&listener)).unwrap();
        assert_eq!((listening.state, listening.local()), (LISTEN, to));

        let datagrams = diagnosis.list(17).unwrap();
        let [connected] = &datagrams[..] else { panic!("{datagrams:#?}") };
        assert_eq!((connected.state, connected.inode), (ESTABLISHED, inode(&udp)));
        assert_eq!(connected.peer(), "[::1]:9".parse().unwrap());
        assert!(diagnosis.list(136).unwrap().is_empty());

        assert!(diagnosis.can_destroy().unwrap(), "this kernel's configuration allows it");
        for (socket, error) in [(&found, client.take_error()), (connected, udp.take_error())] {
            assert!(error.unwrap().is_none());
            assert!(diagnosis.destroy(socket).unwrap());
        }
        let aborted = Some(libc::ECONNABORTED);
        assert_eq!(client.take_error().unwrap().unwrap().raw_os_error(), aborted);
        assert_eq!(udp.take_error().unwrap().unwrap().raw_os_error(), aborted);
        assert!(!diagnosis.destroy(&found).unwrap(), "it is gone");
    }

    /// The directory of this process's cgroup.
    fn carnet_own_cgroup() -> std::path::PathBuf {
        let table = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = table.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
        crate::cgroup::mount_point().unwrap().join(path)
    }

    #[test]
    fn what_the_kernel_might_say_is_read_within_bounds() {
        assert_eq!(message(&[]), None);
        assert_eq!(message(&[0; 15]), None);
        // A length that is shorter than a header, and one that is longer than all there is.
        assert_eq!(message(&[0; 64]), None);
        let long = Header { length: 65, kind: 1, flags: 0, sequence: 0, port: 0 };
        assert_eq!(message(&[long.as_bytes(), &[0; 48]].concat()), None);
        let exact = Header { length: 17, kind: 7, flags: 0, sequence: 0, port: 0 };
        let bytes = [exact.as_bytes(), &[5, 0, 0, 0, 9]].concat();
        assert_eq!(message(&bytes), Some((7, &[5][..], &[9][..])));

        assert_eq!(read(&[0; 71], 6), None);
        let mut body = vec![0; 72];
        assert_eq!(read(&body, 6).unwrap().cgroup, 0);
        // An attribute without an end, then the one that is asked for.
        body.extend([3, 0, 21, 0]);
        assert_eq!(read(&body, 6).unwrap().cgroup, 0);
        body.truncate(72);
        body.extend([12, 0, 21, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read(&body, 6).unwrap().cgroup, 7);
    }
}

//! A process that makes socket calls one by one, as a test tells it to.
//!
//! What a socket may do depends on the cgroup, the network namespace and the user of the process
//! that makes it, and a cgroup holds whole processes. So the process is another one (`test-puppet`),
//! and the test pulls the strings: an [`Order`] a line, an answer a line, over a socket pair.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    net::SocketAddr,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use carnet_testbed::{Cgroup, NetworkNamespace, run_as};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix,
    },
    process::{
        Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, kill_process, waitid,
    },
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{Must as _, orders, program, sys};

/// The longest that a puppet's call may block.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// The longest that a test waits for an answer: longer, so that the puppet says what failed.
const ANSWER_LIMIT: Duration = Duration::from_secs(90);

/// A call that a puppet is to make. Sockets are numbered by the test.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// `socket(2)`, as the number `socket`.
    Open {
        /// The socket's number from now on.
        socket: u32,
        /// Its family.
        family: Family,
        /// Its type and protocol.
        kind: Kind,
        /// Made by an io_uring (`IORING_OP_SOCKET`) instead.
        ring: Option<Ring>,
    },
    /// `accept(2)` on a listener, as the number `socket`.
    Accept {
        /// The listener.
        listener: u32,
        /// The accepted socket's number from now on.
        socket: u32,
    },
    /// A call on a socket.
    On {
        /// The socket.
        socket: u32,
        /// The call.
        call: Call,
    },
    /// Become an ordinary user without capabilities.
    BecomeUser(u32),
    /// Become root, with all capabilities, of a new user namespace.
    BecomeNamespaceRoot,
    /// Another order, carried out by a thread that is not the process's first.
    InThread(Box<Self>),
    /// Have sockets that are passed to this path put in a mailbox.
    Mailbox(PathBuf),
    /// Pass a socket to a mailbox, with `SCM_RIGHTS`.
    Pass {
        /// The socket.
        socket: u32,
        /// The mailbox.
        to: PathBuf,
    },
    /// Take a socket out of the own mailbox, as the number `socket`.
    Take {
        /// The socket's number from now on.
        socket: u32,
    },
    /// `pidfd_getfd(2)`: take a socket of another process, as the number `socket`.
    Steal {
        /// The process.
        process: u32,
        /// Its descriptor of the socket.
        descriptor: i32,
        /// The socket's number from now on.
        socket: u32,
    },
    /// Open an object of the kernel's BPF, as far as the kernel allows.
    OpenBpf(BpfObject),
    /// List a directory.
    List(PathBuf),
    /// Make a directory.
    MakeDirectory(PathBuf),
    /// Write to a file that is there.
    Write(PathBuf, String),
}

/// How an object of the kernel's BPF is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BpfObject {
    /// By its pin.
    Pin(PathBuf),
    /// A map, by its number.
    Map(u32),
    /// A program, by its number.
    Program(u32),
    /// A link, by its number.
    Link(u32),
}

/// A call on one socket.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    /// `bind(2)`; of a stream socket with `SO_REUSEADDR`.
    Bind(SocketAddr),
    /// `SO_REUSEPORT`.
    SharePort,
    /// `IPV6_V6ONLY`.
    OnlyV6(bool),
    /// `SO_BINDTODEVICE`.
    BindDevice(String),
    /// `listen(2)`.
    Listen,
    /// `connect(2)`.
    Connect(SocketAddr),
    /// `connect(2)` to `AF_UNSPEC`.
    Disconnect,
    /// `connect(2)` without blocking, and waiting until it has succeeded or failed.
    ConnectNonblocking(SocketAddr),
    /// `sendto(2)` with `MSG_FASTOPEN`.
    FastOpen(SocketAddr, Vec<u8>),
    /// `IORING_OP_CONNECT`.
    RingConnect(SocketAddr, Ring),
    /// `IORING_OP_SENDMSG` to an address.
    RingSend(SocketAddr, Vec<u8>, Ring),
    /// `getpeername(2)`.
    Peer,
    /// `getsockname(2)`.
    Local,
    /// `getsockopt(2)`: level, option, length of the buffer.
    Get(i32, i32, usize),
    /// `setsockopt(2)`: level, option, value.
    Set(i32, i32, Vec<u8>),
    /// Send all of this.
    Send(Vec<u8>),
    /// Receive this many bytes, or fewer if the stream ends before.
    Receive(usize),
    /// `sendmmsg(2)`: all of these to an address, with one call.
    SendMany(SocketAddr, Vec<Vec<u8>>),
    /// End the sending half.
    EndSending,
    /// `sendto(2)`: one datagram.
    SendTo(SocketAddr, Vec<u8>),
    /// Receive one datagram, of this many bytes at most.
    ReceiveDatagram(Receiving, usize),
    /// Give up receiving after so many milliseconds.
    ReceiveLimit(u64),
    /// The number of its descriptor.
    Descriptor,
    /// `close(2)`.
    Close,
}

/// The family of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`.
    V6,
    /// `AF_UNIX`.
    Unix,
    /// Another one, by Linux's number.
    Other(i32),
}

/// The type and protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A TCP socket; for `AF_UNIX` a stream.
    Tcp,
    /// A Multipath TCP socket.
    Multipath,
    /// A UDP socket; for `AF_UNIX` datagrams.
    Udp,
    /// A UDP-Lite socket.
    UdpLite,
    /// Another one: type and protocol by Linux's numbers.
    Other(i32, i32),
}

/// How an io_uring is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ring {
    /// Submitted by the process, carried out at once where that is possible.
    Plain,
    /// Left to a worker of the kernel (`IOSQE_ASYNC`).
    Async,
    /// Submitted by a thread of the kernel (`IORING_SETUP_SQPOLL`).
    Polled,
}

/// The system call that receives a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Receiving {
    /// `recvfrom(2)`.
    From,
    /// `recvfrom(2)` with `MSG_PEEK`.
    Peek,
    /// `recvmsg(2)`.
    Message,
    /// `read(2)`, which does not tell the source.
    Read,
}

/// What a call gave.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing but success.
    Done,
    /// An address.
    Address(SocketAddr),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A datagram, and its source where the call tells it.
    Datagram(Vec<u8>, Option<SocketAddr>),
    /// A descriptor.
    Descriptor(i32),
    /// An errno.
    Failed(i32),
}

/// An errno that a puppet's call failed with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {})", self.0, io::Error::from_raw_os_error(self.0))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Errno {}

/// What a puppet's call gives.
pub type Result<T> = std::result::Result<T, Errno>;

/// A puppet; killed when dropped. All methods panic when the process itself fails; a failing call
/// is the [`Errno`] in the result.
#[derive(Debug)]
pub struct Puppet {
    child: Child,
    strings: Mutex<Strings>,
}

#[derive(Debug)]
struct Strings {
    stream: BufReader<UnixStream>,
    sockets: u32,
}

impl Puppet {
    /// Starts one in a cgroup and a network namespace, as root or as another user.
    #[track_caller]
    pub fn start(namespace: &NetworkNamespace, cgroup: &Cgroup, user: Option<u32>) -> Self {
        Self::start_by(Command::new(program("test-puppet")), namespace, cgroup, user)
    }

    /// Starts one by a command that runs `test-puppet`, on its own standard input, in the end.
    #[track_caller]
    pub fn start_by(
        mut command: Command,
        namespace: &NetworkNamespace,
        cgroup: &Cgroup,
        user: Option<u32>,
    ) -> Self {
        let (ours, theirs) = UnixStream::pair().must("make a socket pair");
        ours.set_read_timeout(Some(ANSWER_LIMIT)).must("limit the wait for answers");
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        cgroup.enter_command(&mut command).must("enter the cgroup");
        namespace.enter_command(&mut command).must("enter the namespace");
        if let Some(user) = user {
            run_as(&mut command, user, user);
        }
        let child = command.spawn().must("start a puppet");
        let strings = Mutex::new(Strings { stream: BufReader::new(ours), sockets: 0 });
        Self { child, strings }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it, as a crash would end it, and waits until all its sockets are closed.
    #[track_caller]
    pub fn kill(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::KILL).must("kill a puppet");
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(pid), ended).must("wait for a puppet's end");
    }

    /// Has it become an ordinary user, without capabilities, for good.
    #[track_caller]
    pub fn become_user(&self, uid: u32) {
        self.order(&Order::BecomeUser(uid)).must("change the user");
    }

    /// Has it become root of a user namespace of its own. It was started as an ordinary user.
    #[track_caller]
    pub fn become_namespace_root(&self) {
        self.order(&Order::BecomeNamespaceRoot).must("make a user namespace");
    }

    /// Has it open a socket.
    ///
    /// # Errors
    /// The call's errno.
    #[track_caller]
    pub fn open(&self, family: Family, kind: Kind) -> Result<Hand<'_>> {
        let socket = self.number();
        self.order(&Order::Open { socket, family, kind, ring: None })?;
        Ok(Hand { puppet: self, socket })
    }

    /// Has it open a socket by an io_uring.
    ///
    /// # Errors
    /// The call's errno.
    #[track_caller]
    pub fn ring_open(&self, family: Family, kind: Kind, ring: Ring) -> Result<Hand<'_>> {
        let socket = self.number();
        self.order(&Order::Open { socket, family, kind, ring: Some(ring) })?;
        Ok(Hand { puppet: self, socket })
    }

    /// Has a thread that is not its first open a TCP socket and connect it.
    ///
    /// # Errors
    /// The errno of the connect.
    #[track_caller]
    pub fn connect_in_thread(&self, to: SocketAddr) -> Result<Hand<'_>> {
        let socket = self.number();
        let in_thread = |order| self.order(&Order::InThread(Box::new(order))).map(drop);
        let (family, kind) = (Family::of(to), Kind::Tcp);
        in_thread(Order::Open { socket, family, kind, ring: None }).must("open a TCP socket");
        let hand = Hand { puppet: self, socket };
        in_thread(Order::On { socket, call: Call::Connect(to) }).map(|()| hand)
    }

    /// Has it pass a socket to another puppet, which has a mailbox at `path` from then on.
    #[track_caller]
    pub fn pass<'a>(&self, hand: &Hand<'_>, other: &'a Self, path: &Path) -> Hand<'a> {
        other.order(&Order::Mailbox(path.to_owned())).must("make a mailbox");
        let pass = Order::Pass { socket: hand.socket, to: path.to_owned() };
        self.order(&pass).must("pass a socket");
        let socket = other.number();
        other.order(&Order::Take { socket }).must("take a socket");
        Hand { puppet: other, socket }
    }

    /// Has it take another puppet's socket with `pidfd_getfd(2)`.
    ///
    /// # Errors
    /// The call's errno.
    #[track_caller]
    pub fn steal(&self, hand: &Hand<'_>) -> Result<Hand<'_>> {
        let descriptor = match hand.call(Call::Descriptor).must("ask for a descriptor") {
            Answer::Descriptor(descriptor) => descriptor,
            other => panic!("{other:?} is no descriptor"),
        };
        let socket = self.number();
        self.order(&Order::Steal { process: hand.puppet.id(), descriptor, socket })?;
        Ok(Hand { puppet: self, socket })
    }

    /// Has it open an object of the kernel's BPF.
    ///
    /// # Errors
    /// The call's errno, as of the next three.
    #[track_caller]
    pub fn open_bpf(&self, object: BpfObject) -> Result<()> {
        self.order(&Order::OpenBpf(object)).map(drop)
    }

    /// Has it list a directory.
    #[track_caller]
    pub fn list(&self, directory: &Path) -> Result<()> {
        self.order(&Order::List(directory.to_owned())).map(drop)
    }

    /// Has it make a directory.
    #[track_caller]
    pub fn make_directory(&self, path: &Path) -> Result<()> {
        self.order(&Order::MakeDirectory(path.to_owned())).map(drop)
    }

    /// Has it enter a cgroup: all of it.
    #[track_caller]
    pub fn enter(&self, cgroup: &Path) -> Result<()> {
        self.order(&Order::Write(cgroup.join("cgroup.procs"), "0".into())).map(drop)
    }

    /// Has it open a TCP socket of the family of an address.
    #[track_caller]
    pub fn tcp(&self, like: SocketAddr) -> Hand<'_> {
        self.open(Family::of(like), Kind::Tcp).must("open a TCP socket")
    }

    /// Has it connect a new TCP socket.
    ///
    /// # Errors
    /// The call's errno.
    #[track_caller]
    pub fn connect(&self, to: SocketAddr) -> Result<Hand<'_>> {
        let socket = self.tcp(to);
        socket.connect(to)?;
        Ok(socket)
    }

    /// Has it open a UDP socket of the family of an address.
    #[track_caller]
    pub fn udp(&self, like: SocketAddr) -> Hand<'_> {
        self.open(Family::of(like), Kind::Udp).must("open a UDP socket")
    }

    /// Has it listen on an address.
    #[track_caller]
    pub fn listen(&self, on: SocketAddr) -> Hand<'_> {
        let socket = self.tcp(on);
        socket.bind(on).must("bind");
        socket.listen().must("listen");
        socket
    }

    /// Has it listen on an address, and register the listener.
    #[track_caller]
    pub fn serve(&self, on: SocketAddr) -> Hand<'_> {
        let listener = self.listen(on);
        listener.register(&[]).must("register the listener");
        listener
    }

    #[track_caller]
    fn number(&self) -> u32 {
        let mut strings = self.strings.lock().unwrap_or_else(PoisonError::into_inner);
        strings.sockets += 1;
        strings.sockets
    }

    #[track_caller]
    fn order(&self, order: &Order) -> Result<Answer> {
        let mut strings = self.strings.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = serde_json::to_string(order).must("write an order");
        line.push('\n');
        strings.stream.get_mut().write_all(line.as_bytes()).must("give an order");
        line.clear();
        strings.stream.read_line(&mut line).must("wait for an answer");
        match serde_json::from_str(&line).must("read an answer") {
            Answer::Failed(errno) => Err(Errno(errno)),
            answer => Ok(answer),
        }
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A socket of a puppet; closed when dropped.
#[derive(Debug)]
pub struct Hand<'a> {
    puppet: &'a Puppet,
    socket: u32,
}

impl Hand<'_> {
    #[track_caller]
    fn call(&self, call: Call) -> Result<Answer> {
        self.puppet.order(&Order::On { socket: self.socket, call })
    }

    #[track_caller]
    fn done(&self, call: Call) -> Result<()> {
        self.call(call).map(drop)
    }

    #[track_caller]
    fn address(&self, call: Call) -> Result<SocketAddr> {
        match self.call(call)? {
            Answer::Address(address) => Ok(address),
            other => panic!("{other:?} is no address"),
        }
    }

    #[track_caller]
    fn bytes(&self, call: Call) -> Result<Vec<u8>> {
        match self.call(call)? {
            Answer::Bytes(bytes) => Ok(bytes),
            other => panic!("{other:?} are no bytes"),
        }
    }

    /// Binds it; a stream socket with `SO_REUSEADDR`.
    ///
    /// # Errors
    /// The call's errno, as of all methods here.
    #[track_caller]
    pub fn bind(&self, address: SocketAddr) -> Result<()> {
        self.done(Call::Bind(address))
    }

    /// Lets other sockets of the user listen on the same port.
    #[track_caller]
    pub fn share_port(&self) -> Result<()> {
        self.done(Call::SharePort)
    }

    /// Restricts it to IPv6, or not.
    #[track_caller]
    pub fn only_v6(&self, only: bool) -> Result<()> {
        self.done(Call::OnlyV6(only))
    }

    /// Binds it to a device.
    #[track_caller]
    pub fn bind_device(&self, device: &str) -> Result<()> {
        self.done(Call::BindDevice(device.into()))
    }

    /// Listens.
    #[track_caller]
    pub fn listen(&self) -> Result<()> {
        self.done(Call::Listen)
    }

    /// Registers it as its service's listener; `value` is the option's.
    #[track_caller]
    pub fn register(&self, value: &[u8]) -> Result<()> {
        self.set(carnet_core::abi::LEVEL, carnet_core::abi::REGISTER_LISTENER, value)
    }

    /// Accepts a connection.
    #[track_caller]
    pub fn accept(&self) -> Result<Self> {
        let socket = self.puppet.number();
        self.puppet.order(&Order::Accept { listener: self.socket, socket })?;
        Ok(Self { puppet: self.puppet, socket })
    }

    /// Connects it.
    #[track_caller]
    pub fn connect(&self, to: SocketAddr) -> Result<()> {
        self.done(Call::Connect(to))
    }

    /// Connects it without blocking, and waits for the outcome.
    #[track_caller]
    pub fn connect_nonblocking(&self, to: SocketAddr) -> Result<()> {
        self.done(Call::ConnectNonblocking(to))
    }

    /// Connects it with data in the first packet, where the kernel sees fit.
    #[track_caller]
    pub fn fast_open(&self, to: SocketAddr, data: &[u8]) -> Result<()> {
        self.done(Call::FastOpen(to, data.into()))
    }

    /// Connects it by an io_uring.
    #[track_caller]
    pub fn ring_connect(&self, to: SocketAddr, ring: Ring) -> Result<()> {
        self.done(Call::RingConnect(to, ring))
    }

    /// Sends a datagram to an address, by an io_uring.
    #[track_caller]
    pub fn ring_send(&self, to: SocketAddr, bytes: &[u8], ring: Ring) -> Result<()> {
        self.done(Call::RingSend(to, bytes.into(), ring))
    }

    /// Sends datagrams to an address with one call.
    #[track_caller]
    pub fn send_many(&self, to: SocketAddr, datagrams: &[&[u8]]) -> Result<()> {
        let datagrams = datagrams.iter().map(|bytes| bytes.to_vec()).collect();
        self.done(Call::SendMany(to, datagrams))
    }

    /// Dissolves its connection, so that it can be connected anew.
    #[track_caller]
    pub fn disconnect(&self) -> Result<()> {
        self.done(Call::Disconnect)
    }

    /// Whom it is connected to, as it is told.
    #[track_caller]
    pub fn peer(&self) -> Result<SocketAddr> {
        self.address(Call::Peer)
    }

    /// Its own address.
    #[track_caller]
    pub fn local(&self) -> Result<SocketAddr> {
        self.address(Call::Local)
    }

    /// `getsockopt(2)` with a buffer of `length` bytes.
    #[track_caller]
    pub fn get(&self, level: i32, option: i32, length: usize) -> Result<Vec<u8>> {
        self.bytes(Call::Get(level, option, length))
    }

    /// `setsockopt(2)`.
    #[track_caller]
    pub fn set(&self, level: i32, option: i32, value: &[u8]) -> Result<()> {
        self.done(Call::Set(level, option, value.into()))
    }

    /// An option of the control interface, with a buffer that holds any answer.
    #[track_caller]
    pub fn query(&self, option: i32) -> Result<Vec<u8>> {
        self.get(carnet_core::abi::LEVEL, option, 2048)
    }

    /// Sets a redirect record.
    #[track_caller]
    pub fn set_record(&self, record: &[u8]) -> Result<()> {
        self.set(carnet_core::abi::LEVEL, carnet_core::abi::SET_REDIRECT_RECORDS, record)
    }

    /// Sends bytes.
    #[track_caller]
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        self.done(Call::Send(bytes.into()))
    }

    /// Receives bytes: fewer than `length` if the stream ends before.
    #[track_caller]
    pub fn receive(&self, length: usize) -> Result<Vec<u8>> {
        self.bytes(Call::Receive(length))
    }

    /// Sends one datagram.
    #[track_caller]
    pub fn send_to(&self, to: SocketAddr, bytes: &[u8]) -> Result<()> {
        self.done(Call::SendTo(to, bytes.into()))
    }

    /// Receives one datagram by `recvfrom(2)`, with its source.
    #[track_caller]
    pub fn receive_from(&self) -> Result<(Vec<u8>, SocketAddr)> {
        let (bytes, source) = self.receive_by(Receiving::From)?;
        Ok((bytes, source.expect("a source")))
    }

    /// Receives one datagram, with its source where the call tells it.
    #[track_caller]
    pub fn receive_by(&self, how: Receiving) -> Result<(Vec<u8>, Option<SocketAddr>)> {
        match self.call(Call::ReceiveDatagram(how, 65_535))? {
            Answer::Datagram(bytes, source) => Ok((bytes, source)),
            other => panic!("{other:?} is no datagram"),
        }
    }

    /// Bounds every further wait for data, which otherwise is long: then it fails with `EAGAIN`.
    #[track_caller]
    pub fn receive_within(&self, limit: Duration) -> Result<()> {
        self.done(Call::ReceiveLimit(limit.as_millis() as u64))
    }

    /// Ends the sending half.
    #[track_caller]
    pub fn end_sending(&self) -> Result<()> {
        self.done(Call::EndSending)
    }
}

impl Drop for Hand<'_> {
    fn drop(&mut self) {
        // Not through `call`, which panics: a panic on the way out of a failing test would hide
        // why it failed.
        let mut strings = self.puppet.strings.lock().unwrap_or_else(PoisonError::into_inner);
        let order = Order::On { socket: self.socket, call: Call::Close };
        if let Ok(mut line) = serde_json::to_string(&order) {
            line.push('\n');
            let sent = strings.stream.get_mut().write_all(line.as_bytes());
            let _ = sent.and_then(|()| strings.stream.read_line(&mut line));
        }
    }
}

impl Family {
    /// The family of an address.
    pub fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// The puppet's side: carries out orders from standard input until it ends.
///
/// # Errors
/// What keeps it from reading an order or from answering.
pub fn obey() -> io::Result<()> {
    let mut desk = Desk::default();
    orders::obey(|order| {
        carry_out(order, &mut desk)
            .unwrap_or_else(|error| Answer::Failed(error.raw_os_error().unwrap_or(libc::EPROTO)))
    })
}

/// What a puppet has at hand.
#[derive(Default)]
struct Desk {
    sockets: BTreeMap<u32, Socket>,
    mailbox: Option<UnixDatagram>,
}

fn carry_out(order: Order, desk: &mut Desk) -> io::Result<Answer> {
    let unknown = || io::Error::from_raw_os_error(libc::EBADF);
    let Desk { sockets, mailbox } = desk;
    match order {
        Order::InThread(order) => {
            let done = thread::scope(|scope| scope.spawn(|| carry_out(*order, desk)).join());
            return done.unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::EPROTO)));
        }
        Order::Mailbox(path) => {
            let bound = UnixDatagram::bind(path)?;
            bound.set_read_timeout(Some(CALL_LIMIT))?;
            *mailbox = Some(bound);
        }
        Order::Pass { socket, to } => pass(sockets.get(&socket).ok_or_else(unknown)?, &to)?,
        Order::Take { socket } => {
            sockets.insert(socket, take(mailbox.as_ref().ok_or_else(unknown)?)?.into());
        }
        Order::Steal { process, descriptor, socket } => {
            sockets.insert(socket, steal(process, descriptor)?.into());
        }
        Order::OpenBpf(object) => drop(sys::open_bpf(&object)?),
        Order::List(directory) => drop(fs::read_dir(directory)?),
        Order::MakeDirectory(path) => fs::create_dir(path)?,
        Order::Write(path, text) => {
            fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())?;
        }
        Order::Open { socket, family, kind, ring } => {
            let domain = match family {
                Family::V4 => Domain::IPV4,
                Family::V6 => Domain::IPV6,
                Family::Unix => Domain::UNIX,
                Family::Other(number) => Domain::from(number),
            };
            let (kind, protocol) = match kind {
                Kind::Tcp => (Type::STREAM, None),
                Kind::Multipath => (Type::STREAM, Some(Protocol::MPTCP)),
                Kind::Udp => (Type::DGRAM, None),
                Kind::UdpLite => (Type::DGRAM, Some(Protocol::from(libc::IPPROTO_UDPLITE))),
                Kind::Other(kind, protocol) => (Type::from(kind), Some(Protocol::from(protocol))),
            };
            let new = match ring {
                None => Socket::new(domain, kind, protocol)?,
                Some(ring) => sys::ring_socket(domain, kind, protocol, ring, CALL_LIMIT)?,
            };
            limit(&new)?;
            sockets.insert(socket, new);
        }
        Order::Accept { listener, socket } => {
            let (accepted, _) = sockets.get(&listener).ok_or_else(unknown)?.accept()?;
            limit(&accepted)?;
            sockets.insert(socket, accepted);
        }
        Order::On { socket, call: Call::Close } => {
            sockets.remove(&socket).ok_or_else(unknown)?;
        }
        Order::On { socket, call } => {
            return call_on(sockets.get(&socket).ok_or_else(unknown)?, call);
        }
        Order::BecomeNamespaceRoot => {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            sys::enter_new_user_namespace()?;
            // Without a mapping it would be nobody, though with capabilities.
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
            fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
        }
        Order::BecomeUser(user) => {
            let (uid, gid) =
                (rustix::process::Uid::from_raw(user), rustix::process::Gid::from_raw(user));
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        }
    }
    Ok(Answer::Done)
}

/// Passes a socket to a mailbox.
fn pass(socket: &Socket, to: &Path) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let sockets = [socket.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&sockets));
    let to = SocketAddrUnix::new(to)?;
    let sender = UnixDatagram::unbound()?;
    let content = [IoSlice::new(b"s")];
    rustix::net::sendmsg_addr(&sender, &to, &content, &mut control, SendFlags::empty())?;
    Ok(())
}

/// Takes a socket out of a mailbox.
fn take(mailbox: &UnixDatagram) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut content = [0];
    let mut content = [IoSliceMut::new(&mut content)];
    rustix::net::recvmsg(mailbox, &mut content, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
}

/// Takes a descriptor of another process.
fn steal(process: u32, descriptor: i32) -> io::Result<OwnedFd> {
    let process = i32::try_from(process).ok().and_then(Pid::from_raw);
    let process = process.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    let pidfd = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
    Ok(rustix::process::pidfd_getfd(pidfd, descriptor, PidfdGetfdFlags::empty())?)
}

/// Bounds every blocking call.
fn limit(socket: &Socket) -> io::Result<()> {
    socket.set_read_timeout(Some(CALL_LIMIT))?;
    socket.set_write_timeout(Some(CALL_LIMIT))
}

fn call_on(mut socket: &Socket, call: Call) -> io::Result<Answer> {
    let no_address = || io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
    match call {
        Call::Bind(address) => {
            // Two UDP sockets may then be given the same port of the system's choice.
            if socket.r#type()? == Type::STREAM {
                socket.set_reuse_address(true)?;
            }
            socket.bind(&address.into())?;
        }
        Call::SharePort => socket.set_reuse_port(true)?,
        Call::OnlyV6(only) => socket.set_only_v6(only)?,
        Call::BindDevice(device) => socket.bind_device(Some(device.as_bytes()))?,
        Call::Listen => socket.listen(1024)?,
        Call::Connect(address) => socket.connect(&address.into())?,
        Call::Disconnect => rustix::net::connect_unspec(socket)?,
        Call::ConnectNonblocking(address) => {
            socket.set_nonblocking(true)?;
            let result = connect_nonblocking(socket, address);
            socket.set_nonblocking(false)?;
            result?;
        }
        Call::FastOpen(address, data) => {
            let sent = socket.send_to_with_flags(&data, &address.into(), libc::MSG_FASTOPEN)?;
            if sent != data.len() {
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
        }
        Call::RingConnect(address, ring) => {
            sys::ring_connect(socket, &address.into(), ring, CALL_LIMIT)?;
        }
        Call::RingSend(address, data, ring) => {
            sys::ring_send(socket, &address.into(), &data, ring, CALL_LIMIT)?;
        }
        Call::SendMany(address, datagrams) => {
            sys::send_many(socket, &address.into(), &datagrams)?;
        }
        Call::Peer => {
            let address = socket.peer_addr()?.as_socket().ok_or_else(no_address)?;
            return Ok(Answer::Address(address));
        }
        Call::Local => {
            let address = socket.local_addr()?.as_socket().ok_or_else(no_address)?;
            return Ok(Answer::Address(address));
        }
        Call::Get(level, option, length) => {
            return sys::get_option(socket, level, option, length).map(Answer::Bytes);
        }
        Call::Set(level, option, value) => sys::set_option(socket, level, option, &value)?,
        Call::Send(bytes) => socket.write_all(&bytes)?,
        Call::Receive(length) => {
            let mut bytes = Vec::new();
            socket.take(length as u64).read_to_end(&mut bytes)?;
            return Ok(Answer::Bytes(bytes));
        }
        Call::EndSending => socket.shutdown(std::net::Shutdown::Write)?,
        Call::SendTo(address, bytes) => drop(socket.send_to(&bytes, &address.into())?),
        Call::ReceiveDatagram(how, length) => return receive_datagram(socket, how, length),
        Call::ReceiveLimit(millis) => {
            socket.set_read_timeout(Some(Duration::from_millis(millis.max(1))))?;
        }
        Call::Descriptor => return Ok(Answer::Descriptor(socket.as_raw_fd())),
        Call::Close => {}
    }
    Ok(Answer::Done)
}

fn receive_datagram(socket: &Socket, how: Receiving, length: usize) -> io::Result<Answer> {
    let mut bytes = vec![0; length];
    let (length, source) = match how {
        Receiving::From | Receiving::Peek => {
            let flags = if how == Receiving::Peek { RecvFlags::PEEK } else { RecvFlags::empty() };
            let (length, _, source) = rustix::net::recvfrom(socket, &mut bytes[..], flags)?;
            (length, source)
        }
        Receiving::Message => {
            let parts = &mut [IoSliceMut::new(&mut bytes)];
            let mut control = RecvAncillaryBuffer::default();
            let received = rustix::net::recvmsg(socket, parts, &mut control, RecvFlags::empty())?;
            (received.bytes, received.address)
        }
        Receiving::Read => (rustix::io::read(socket, &mut bytes)?, None),
    };
    bytes.truncate(length);
    Ok(Answer::Datagram(bytes, source.and_then(|source| source.try_into().ok())))
}

fn connect_nonblocking(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        // Loopback may answer at once.
        result => return result,
    }
    let limit = Timespec::try_from(CALL_LIMIT).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    if rustix::event::poll(&mut polled, Some(&limit))? == 0 {
        return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
    }
    SockRef::from(socket).take_error()?.map_or(Ok(()), Err)
}

//! A process that opens many flows at an order, and accepts those that come to it.
//!
//! A [`Puppet`](crate::puppet::Puppet) makes one call at a time, which is what a test of one story
//! wants. The differential test makes a hundred thousand: here an [`Order`] is a list of them.
//!
//! A caller in a service's cgroup is also that service: it listens, registers its sockets, and tells
//! what has come, asking the kernel about each flow through the library `carnet`.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use carnet::DatagramFlow;
use carnet_core::abi;
use carnet_testbed::{Cgroup, NetworkNamespace};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{Must as _, orders, sys};

/// The longest that a caller waits for flows that are said to come to it.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(10);
/// The longest that a test waits for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a caller is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Be a service that has these sockets, and no others, registered.
    Listen(Vec<Door>),
    /// Remember these records, behind those that it has.
    Records(Vec<Vec<u8>>),
    /// Open flows, one after another, and keep them.
    Open(Vec<Call>),
    /// Tell of flows that have come, of which there are to be so many.
    Arrivals(usize),
    /// Close all flows, its own and those that came.
    Close,
}

/// A socket of a service: protocol (6 is TCP, 17 UDP), and whether it is of IPv6. It is on loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// IP protocol number.
    pub protocol: u8,
    /// `AF_INET6` instead of `AF_INET`.
    pub ipv6: bool,
}

/// A flow to open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// A number of the test's choice, which is sent with a datagram.
    pub number: u32,
    /// IP protocol number: 6, or 17.
    pub protocol: u8,
    /// Where to. An IPv4-mapped address is reached through an IPv6 socket.
    pub to: SocketAddr,
    /// UDP: with `sendto(2)` instead of `connect(2)`.
    pub unconnected: bool,
    /// The real user id of the thread that calls.
    pub user: u32,
    /// Set this record before, by its place among those remembered.
    pub record: Option<usize>,
}

/// What came of a [`Call`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The call failed with this errno.
    Refused(i32),
    /// The record could not be set: the errno.
    NoRecord(i32),
    /// The call went out.
    Out {
        /// The socket's own address.
        local: SocketAddr,
        /// What `getpeername(2)` says, where the socket is connected by now.
        peer: Option<SocketAddr>,
    },
}

/// A flow that has come to a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// IP protocol number.
    pub protocol: u8,
    /// Where it came from.
    pub from: SocketAddr,
    /// UDP: the number that the datagram brought.
    pub number: Option<u32>,
    /// The service's redirect handle, as the kernel says.
    pub handle: u64,
    /// The filter that redirected it here.
    pub filter: u64,
    /// Services in its record.
    pub hops: u32,
    /// Legs so far.
    pub legs: u32,
    /// Where it wanted to go.
    pub destination: SocketAddr,
    /// Its context; empty for none.
    pub context: Vec<u8>,
    /// Its record.
    pub record: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done,
    Opened(Vec<Outcome>),
    Arrived(Vec<Arrival>),
    Failed(String),
}

/// A caller; killed when dropped. All methods panic when the process itself fails.
#[derive(Debug)]
pub struct Caller {
    child: Child,
    stream: BufReader<UnixStream>,
}

impl Caller {
    /// Starts one, by a command that runs `test-caller`, in a cgroup and a network namespace, as root.
    #[track_caller]
    pub fn start(mut command: Command, namespace: &NetworkNamespace, cgroup: &Cgroup) -> Self {
        let (ours, theirs) = UnixStream::pair().must("make a socket pair");
        ours.set_read_timeout(Some(ANSWER_LIMIT)).must("limit the wait for answers");
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        cgroup.enter_command(&mut command).must("enter the cgroup");
        namespace.enter_command(&mut command).must("enter the namespace");
        let child = command.spawn().must("start a caller");
        Self { child, stream: BufReader::new(ours) }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Gives it an order; [`opened`](Self::opened), [`arrived`](Self::arrived) or
    /// [`done`](Self::done) waits for the answer, so that several callers can be at work.
    #[track_caller]
    pub fn order(&mut self, order: &Order) {
        let mut line = serde_json::to_string(order).must("write an order");
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).must("give an order");
    }

    #[track_caller]
    fn answer(&mut self) -> Answer {
        let mut line = String::new();
        self.stream.read_line(&mut line).must("read an answer");
        serde_json::from_str(&line).must("understand an answer")
    }

    /// What came of the calls of [`Order::Open`].
    #[track_caller]
    pub fn opened(&mut self) -> Vec<Outcome> {
        match self.answer() {
            Answer::Opened(outcomes) => outcomes,
            other => panic!("no outcomes: {other:?}"),
        }
    }

    /// What has come, after [`Order::Arrivals`].
    #[track_caller]
    pub fn arrived(&mut self) -> Vec<Arrival> {
        match self.answer() {
            Answer::Arrived(arrivals) => arrivals,
            other => panic!("no arrivals: {other:?}"),
        }
    }

    /// Waits until any other order has been carried out.
    #[track_caller]
    pub fn done(&mut self) {
        match self.answer() {
            Answer::Done => {}
            other => panic!("not done: {other:?}"),
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _collected = self.child.wait();
    }
}

/// The caller's side: carries out orders from standard input until it ends.
///
/// # Errors
/// What keeps it from reading an order or from answering.
pub fn obey() -> io::Result<()> {
    let mut desk = Desk::default();
    orders::obey(|order| {
        desk.carry_out(order).unwrap_or_else(|error| Answer::Failed(error.to_string()))
    })
}

#[derive(Default)]
struct Desk {
    user: u32,
    records: Vec<Vec<u8>>,
    doors: Vec<(Door, Socket)>,
    /// Everything that keeps a flow going.
    flows: Vec<Socket>,
}

impl Desk {
    fn carry_out(&mut self, order: Order) -> io::Result<Answer> {
        match order {
            Order::Listen(doors) => self.listen(&doors)?,
            Order::Records(records) => self.records.extend(records),
            Order::Open(calls) => {
                let outcomes: io::Result<_> = calls.iter().map(|call| self.open(call)).collect();
                self.become_user(0)?;
                return outcomes.map(Answer::Opened);
            }
            Order::Arrivals(expected) => return self.arrivals(expected).map(Answer::Arrived),
            Order::Close => self.flows.clear(),
        }
        Ok(Answer::Done)
    }

    fn listen(&mut self, wanted: &[Door]) -> io::Result<()> {
        self.doors.retain(|(door, _)| wanted.contains(door));
        for door in wanted {
            if self.doors.iter().all(|(open, _)| open != door) {
                self.doors.push((*door, open_door(*door)?));
            }
        }
        Ok(())
    }

    /// Changes the real user id, by which the kernel knows the caller, of this thread; the effective
    /// one stays root's, so that it can be changed again.
    fn become_user(&mut self, user: u32) -> io::Result<()> {
        if self.user != user {
            let (uid, root) = (rustix::process::Uid::from_raw(user), rustix::process::Uid::ROOT);
            rustix::thread::set_thread_res_uid(uid, root, root)?;
            self.user = user;
        }
        Ok(())
    }

    fn open(&mut self, call: &Call) -> io::Result<Outcome> {
        self.become_user(call.user)?;
        let kind = if call.protocol == TCP { Type::STREAM } else { Type::DGRAM };
        let socket = Socket::new(Domain::for_address(call.to), kind.nonblocking(), None)?;
        if call.protocol == TCP {
            // No state of a closed connection is to take a port.
            socket.set_linger(Some(Duration::ZERO))?;
        } else {
            socket.set_broadcast(true)?;
        }
        if let Some(place) = call.record {
            let record = self.records.get(place).ok_or(io::ErrorKind::NotFound)?;
            if let Err(error) =
                sys::set_option(&socket, abi::LEVEL, abi::SET_REDIRECT_RECORDS, record)
            {
                return Ok(Outcome::NoRecord(errno(&error)));
            }
        }
        let outcome = self.call(&socket, call)?;
        self.flows.push(socket);
        Ok(outcome)
    }

    fn call(&self, socket: &Socket, call: &Call) -> io::Result<Outcome> {
        let to = SockAddr::from(call.to);
        let content = call.number.to_le_bytes();
        let result = if call.unconnected {
            socket.send_to(&content, &to).map(drop)
        } else {
            match socket.connect(&to) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
                Ok(()) if call.protocol != TCP => socket.send(&content).map(drop),
                result => result,
            }
        };
        if let Err(error) = result {
            return Ok(Outcome::Refused(errno(&error)));
        }
        let no_address = || io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
        let local = socket.local_addr()?.as_socket().ok_or_else(no_address)?;
        let peer = if call.unconnected { None } else { socket.peer_addr().ok() };
        Ok(Outcome::Out { local, peer: peer.and_then(|peer| peer.as_socket()) })
    }

    /// Waits until `expected` flows have come, and takes what there is.
    fn arrivals(&mut self, expected: usize) -> io::Result<Vec<Arrival>> {
        let deadline = Instant::now() + ARRIVAL_LIMIT;
        let mut arrivals = Vec::new();
        loop {
            for (door, socket) in &self.doors {
                while let Some(arrival) = take(*door, socket, &mut self.flows)? {
                    arrivals.push(arrival);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if arrivals.len() >= expected || left.is_zero() {
                return Ok(arrivals);
            }
            let mut polled: Vec<_> =
                self.doors.iter().map(|(_, s)| PollFd::new(s, PollFlags::IN)).collect();
            let limit = Timespec::try_from(left).map_err(io::Error::other)?;
            poll(&mut polled, Some(&limit))?;
        }
    }
}

const TCP: u8 = 6;

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EPROTO)
}

/// Opens and registers a service's socket.
fn open_door(door: Door) -> io::Result<Socket> {
    let kind = if door.protocol == TCP { Type::STREAM } else { Type::DGRAM };
    let address: SocketAddr =
        if door.ipv6 { (Ipv6Addr::LOCALHOST, 0).into() } else { (Ipv4Addr::LOCALHOST, 0).into() };
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), None)?;
    socket.bind(&address.into())?;
    if door.protocol == TCP {
        socket.listen(1024)?;
    } else {
        carnet_testbed::widen(&socket).map_err(io::Error::other)?;
    }
    carnet::register_listener(&socket).map_err(io::Error::other)?;
    Ok(socket)
}

/// Takes the next flow that has come to a socket, if there is one, and asks about it.
fn take(door: Door, socket: &Socket, flows: &mut Vec<Socket>) -> io::Result<Option<Arrival>> {
    let no_address = || io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
    if door.protocol == TCP {
        let (accepted, from) = match socket.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        accepted.set_linger(Some(Duration::ZERO))?;
        let from = from.as_socket().ok_or_else(no_address)?;
        let arrival = ask(&accepted, door, from, None)?;
        flows.push(accepted);
        return Ok(Some(arrival));
    }
    let mut content = [0; 4];
    let (_, _, from) =
        match rustix::net::recvfrom(socket, &mut content[..], rustix::net::RecvFlags::empty()) {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
    let from = from.and_then(|from| SocketAddr::try_from(from).ok()).ok_or_else(no_address)?;
    let flow = DatagramFlow::of(from).map_err(io::Error::other)?;
    ask(&flow, door, from, Some(u32::from_le_bytes(content))).map(Some)
}

fn ask(
    socket: &impl carnet::AsSocket,
    door: Door,
    from: SocketAddr,
    number: Option<u32>,
) -> io::Result<Arrival> {
    let flow = carnet::flow(socket).map_err(io::Error::other)?;
    let context = carnet::query_redirect_context(socket).map_err(io::Error::other)?;
    let record = carnet::query_redirect_records(socket).map_err(io::Error::other)?;
    Ok(Arrival {
        protocol: door.protocol,
        from,
        number,
        handle: flow.handle,
        filter: flow.filter,
        hops: flow.hops,
        legs: flow.legs,
        destination: carnet::original_destination(socket).map_err(io::Error::other)?.0,
        context: context.map_or_else(Vec::new, |context| context.as_bytes().to_vec()),
        record: record.as_bytes().to_vec(),
    })
}

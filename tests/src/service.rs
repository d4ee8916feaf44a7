//! The redirect service of the tests: its reports, and the process as a test sees it.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use carnet::OriginalDestination;
use carnet_core::{
    abi,
    flow::is_source_token,
    record::{MAX_RECORD, Record},
};
use carnet_testbed::{Cgroup, NetworkNamespace, Process, widen};
use rustix::{event::epoll, process::Signal};
use serde::{Deserialize, Serialize};
use zerocopy::FromBytes as _;

use crate::{Must as _, PATIENCE, program, sys};

/// How long a relayed connection may be idle before it is given up.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// One line of a service's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Line {
    /// It listens and has registered its listeners.
    Ready(Vec<SocketAddr>),
    /// It has accepted a redirected connection, or got the first datagram of a redirected flow, and
    /// tried to connect onwards.
    Flow(Box<Report>),
    /// It has refused a connection, or dropped a datagram, that was not redirected.
    Direct(SocketAddr),
    /// Something did not work.
    Problem(String),
}

/// What a service knows of a connection that it accepted, or of a flow of datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its protocol: 6 is TCP, 17 UDP.
    pub protocol: u8,
    /// The flow.
    pub flow: u64,
    /// The service's redirect handle.
    pub handle: u64,
    /// The filter that redirected the connection here.
    pub filter: u64,
    /// Services in the record, this one included.
    pub hops: u32,
    /// Legs so far, this one included.
    pub legs: u32,
    /// The original destination.
    pub original: SocketAddr,
    /// The same from `SO_ORIGINAL_DST` with a `sockaddr_in`; an errno.
    pub so_original: Result<SocketAddr, i32>,
    /// The same from `IP6T_SO_ORIGINAL_DST` with a `sockaddr_in6`; an errno.
    pub so_original_v6: Result<SocketAddr, i32>,
    /// The original application's process id.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its cgroup.
    pub cgroup: u64,
    /// Its network namespace.
    pub netns: u64,
    /// Its executable.
    pub executable: Option<PathBuf>,
    /// Its command name.
    pub command: String,
    /// The redirect context.
    pub context: Option<Vec<u8>>,
    /// The redirect record.
    pub record: Vec<u8>,
    /// Who connected here.
    pub peer: SocketAddr,
    /// Where it was accepted.
    pub local: SocketAddr,
    /// What became of the connection onwards: its local address, or an errno.
    pub onward: Result<SocketAddr, i32>,
}

impl Report {
    /// The record, read as the kernel does.
    #[track_caller]
    pub fn parsed(&self) -> Record {
        read_record(&self.record)
    }
}

/// A record that was cut after its last hop.
#[track_caller]
pub fn read_record(bytes: &[u8]) -> Record {
    let mut whole = vec![0; MAX_RECORD];
    whole[..bytes.len()].copy_from_slice(bytes);
    Record::read_from_bytes(&whole).expect("a buffer of the size of a record")
}

/// How a service is to behave.
#[derive(Clone, Debug, clap::Args)]
pub struct Behaviour {
    /// Address and port to listen on (port 0 for any); may be repeated.
    #[arg(long)]
    pub listen: Vec<SocketAddr>,
    /// Address and port to get datagrams on (port 0 for any); may be repeated.
    #[arg(long)]
    pub datagrams: Vec<SocketAddr>,
    /// Connect onwards without setting the record.
    #[arg(long)]
    pub forget_records: bool,
    /// Become this user before registering.
    #[arg(long)]
    pub user: Option<u32>,
    /// Do not register the listeners.
    #[arg(long)]
    pub no_register: bool,
}

impl Default for Behaviour {
    /// As it should be: listens on IPv4 and IPv6 loopback, at any port, for TCP alone.
    fn default() -> Self {
        let listen = loopback();
        Self { listen, datagrams: vec![], forget_records: false, user: None, no_register: false }
    }
}

impl Behaviour {
    /// As it should be, for UDP as well.
    pub fn with_datagrams() -> Self {
        Self { datagrams: loopback(), ..Self::default() }
    }

    /// As it should be, at these addresses, for TCP and UDP.
    pub fn at(addresses: &[IpAddr]) -> Self {
        let listen: Vec<_> = addresses.iter().map(|&ip| SocketAddr::new(ip, 0)).collect();
        Self { datagrams: listen.clone(), listen, ..Self::default() }
    }
}

/// Any port of IPv4 and IPv6 loopback.
fn loopback() -> Vec<SocketAddr> {
    vec![(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()]
}

/// A service process at work; killed when dropped.
#[derive(Debug)]
pub struct Running {
    process: Process,
    addresses: Vec<SocketAddr>,
}

impl Running {
    /// Starts the service in a cgroup and a network namespace. It listens on return, and has
    /// registered its listeners unless told not to.
    #[track_caller]
    pub fn start(namespace: &NetworkNamespace, cgroup: &Cgroup, behaviour: &Behaviour) -> Self {
        let mut command = Command::new(program("test-service"));
        for address in &behaviour.listen {
            command.args(["--listen", &address.to_string()]);
        }
        for address in &behaviour.datagrams {
            command.args(["--datagrams", &address.to_string()]);
        }
        if behaviour.forget_records {
            command.arg("--forget-records");
        }
        if let Some(user) = behaviour.user {
            command.args(["--user", &user.to_string()]);
        }
        if behaviour.no_register {
            command.arg("--no-register");
        }
        cgroup.enter_command(&mut command).must("enter the service's cgroup");
        namespace.enter_command(&mut command).must("enter the namespace");
        let process = Process::spawn(&mut command).must("start a service");
        let line = process
            .wait_for_line("a first line", PATIENCE, |_| true)
            .must("wait for the service to be ready");
        match read_line(&line) {
            Line::Ready(addresses) => Self { process, addresses },
            other => panic!("the service is not ready: {other:?}"),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Where it listens: for TCP, then for UDP.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The reports so far, of `count` connections at least.
    #[track_caller]
    pub fn reports(&self, count: usize) -> Vec<Report> {
        let mut seen = 0;
        let is_last = |line: &str| {
            seen += usize::from(matches!(read_line(line), Line::Flow(_)));
            seen >= count
        };
        if count > 0 {
            let what = format!("{count} reports");
            self.process.wait_for_line(&what, PATIENCE, is_last).must("wait for reports");
        }
        reports_in(&self.process.lines())
    }

    /// Kills it and waits until it is gone.
    #[track_caller]
    pub fn kill(mut self) {
        self.process.signal(Signal::KILL).must("kill the service");
        self.process.wait(PATIENCE).must("wait for the service's end");
    }

    /// Ends it in order, and gives the reports of all connections that it ever had.
    #[track_caller]
    pub fn finish(self) -> Vec<Report> {
        reports_in(&self.end())
    }

    /// The same, and beside them whatever else it said: that is not a fault here.
    #[track_caller]
    pub fn finish_with_faults(self) -> (Vec<Report>, Vec<Line>) {
        let (mut reports, mut others) = (Vec::new(), Vec::new());
        for line in self.end() {
            match read_line(&line) {
                Line::Flow(report) => reports.push(*report),
                Line::Ready(_) => {}
                other => others.push(other),
            }
        }
        (reports, others)
    }

    #[track_caller]
    fn end(mut self) -> Vec<String> {
        self.process.close_input();
        let status = self.process.wait(PATIENCE).must("wait for the service's end");
        assert!(status.success(), "the service ended with {status}");
        self.process.lines()
    }
}

#[track_caller]
fn read_line(line: &str) -> Line {
    serde_json::from_str(line).must("read a line of a service")
}

#[track_caller]
fn reports_in(lines: &[String]) -> Vec<Report> {
    let report = |line: &String| match read_line(line) {
        Line::Flow(report) => Some(*report),
        Line::Problem(problem) => panic!("a service has a problem: {problem}"),
        Line::Ready(_) | Line::Direct(_) => None,
    };
    lines.iter().filter_map(report).collect()
}

/// The service's side: serves until standard input ends.
///
/// # Errors
/// What keeps it from listening, registering or being ready.
pub fn serve(behaviour: &Behaviour) -> Result<(), Box<dyn std::error::Error>> {
    let bind = |address: &SocketAddr| TcpListener::bind(address);
    let listeners = behaviour.listen.iter().map(bind).collect::<io::Result<Vec<_>>>()?;
    let datagrams =
        behaviour.datagrams.iter().map(UdpSocket::bind).collect::<io::Result<Vec<_>>>()?;
    carnet_testbed::datagrams::raise_file_limit()?;
    datagrams.iter().try_for_each(widen)?;
    if let Some(user) = behaviour.user {
        let (uid, gid) =
            (rustix::process::Uid::from_raw(user), rustix::process::Gid::from_raw(user));
        // The process has one thread yet.
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    if !behaviour.no_register {
        listeners.iter().try_for_each(carnet::register_listener)?;
        datagrams.iter().try_for_each(carnet::register_listener)?;
    }
    let tcp = listeners.iter().map(TcpListener::local_addr);
    let udp = datagrams.iter().map(UdpSocket::local_addr);
    let addresses = tcp.chain(udp).collect::<io::Result<_>>()?;
    if !datagrams.is_empty() {
        let relay = Relay::new(datagrams, behaviour.forget_records)?;
        thread::spawn(move || {
            if let Err(error) = relay.run() {
                print(&Line::Problem(format!("datagrams: {error}")));
            }
        });
    }
    for listener in listeners {
        let forget = behaviour.forget_records;
        thread::spawn(move || {
            for accepted in listener.incoming() {
                match accepted {
                    Ok(accepted) => drop(thread::spawn(move || handle(&accepted, forget))),
                    Err(error) => print(&Line::Problem(format!("accept: {error}"))),
                }
            }
        });
    }
    print(&Line::Ready(addresses));
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    Ok(())
}

fn print(line: &Line) {
    // The test that reads is gone if this fails; so will be this process.
    if let Ok(text) = serde_json::to_string(line) {
        let _ = writeln!(io::stdout(), "{text}");
    }
}

fn handle(accepted: &TcpStream, forget: bool) {
    let ends = (accepted.peer_addr(), accepted.local_addr());
    match examine(accepted, libc::IPPROTO_TCP as u8, ends) {
        Ok(mut report) => {
            let onward = connect(accepted, &report, forget);
            report.onward = match &onward {
                Ok(onward) => onward.local_addr().map_err(errno_of),
                Err(errno) => Err(*errno),
            };
            print(&Line::Flow(Box::new(report)));
            if let Ok(onward) = onward {
                relay(accepted, &onward);
            }
        }
        Err(carnet::Error::NotRedirected { .. }) => {
            if let Ok(peer) = accepted.peer_addr() {
                print(&Line::Direct(peer));
            }
        }
        Err(error) => print(&Line::Problem(error.to_string())),
    }
}

fn errno_of(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EPROTO)
}

/// All that can be asked about a connection or a flow of datagrams; and its ends, which are known.
fn examine<S: AsFd>(
    accepted: &S,
    protocol: u8,
    (peer, local): (io::Result<SocketAddr>, io::Result<SocketAddr>),
) -> Result<Report, carnet::Error> {
    let address = |result: io::Result<SocketAddr>| {
        result.unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
    };
    let record = carnet::query_redirect_records(accepted)?;
    let context = carnet::query_redirect_context(accepted)?;
    let OriginalDestination(original) = carnet::original_destination(accepted)?;
    let app = carnet::original_app(accepted)?;
    let flow = carnet::flow(accepted)?;
    Ok(Report {
        protocol,
        flow: flow.id,
        handle: flow.handle,
        filter: flow.filter,
        hops: flow.hops,
        legs: flow.legs,
        original,
        so_original: socket_address(accepted, abi::SOL_IP, 16),
        so_original_v6: socket_address(accepted, abi::SOL_IPV6, 28),
        pid: app.pid,
        uid: app.uid,
        gid: app.gid,
        cgroup: app.cgroup,
        netns: app.network_namespace,
        executable: app.executable,
        command: app.command.to_string_lossy().into_owned(),
        context: context.map(|context| context.as_bytes().to_vec()),
        record: record.as_bytes().to_vec(),
        peer: address(peer),
        local: address(local),
        onward: Err(0),
    })
}

/// `SO_ORIGINAL_DST` at a level, with a buffer of the size of its `struct sockaddr`.
fn socket_address(accepted: impl AsFd, level: i32, size: usize) -> Result<SocketAddr, i32> {
    let bytes = sys::get_option(accepted, level, abi::SO_ORIGINAL_DST, size).map_err(errno_of)?;
    read_socket_address(&bytes).ok_or(libc::EPROTO)
}

/// A `struct sockaddr_in` or `struct sockaddr_in6`, of exactly its size.
pub fn read_socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match bytes.len() {
        16 if family == libc::AF_INET => {
            let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some((octets, port).into())
        }
        28 if family == libc::AF_INET6 => {
            let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            Some((octets, port).into())
        }
        _ => None,
    }
}

/// Connects onwards; gives an errno if that fails.
fn connect(accepted: &TcpStream, report: &Report, forget: bool) -> Result<TcpStream, i32> {
    if forget {
        let destination = report.original;
        let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
        return TcpStream::connect(destination).map_err(errno_of);
    }
    carnet::connect_onwards(accepted).map_err(errno_of_onward)
}

/// The same for a flow of datagrams.
fn connect_datagram(
    flow: &carnet::DatagramFlow,
    report: &Report,
    forget: bool,
) -> Result<UdpSocket, i32> {
    if forget {
        let destination = report.original;
        let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
        let any: IpAddr = match destination {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).map_err(errno_of)?;
        return socket.connect(destination).map(|()| socket).map_err(errno_of);
    }
    carnet::connect_onwards_datagram(flow).map_err(errno_of_onward)
}

fn errno_of_onward(error: carnet::Error) -> i32 {
    match error {
        carnet::Error::Loop { .. } => libc::ELOOP,
        carnet::Error::Blocked { .. } => libc::EPERM,
        carnet::Error::Connect { source, .. } => errno_of(source),
        carnet::Error::InvalidRecord => libc::EINVAL,
        other => {
            print(&Line::Problem(other.to_string()));
            libc::EPROTO
        }
    }
}

/// Relays both ways until both sides have ended, or one breaks off.
fn relay(accepted: &TcpStream, onward: &TcpStream) {
    for stream in [accepted, onward] {
        let limited = stream.set_read_timeout(Some(IDLE_LIMIT));
        if limited.and_then(|()| stream.set_write_timeout(Some(IDLE_LIMIT))).is_err() {
            return;
        }
    }
    thread::scope(|scope| {
        scope.spawn(|| copy(accepted, onward));
        copy(onward, accepted);
    });
}

/// Relays one way, ends that way in order, or breaks both off.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    let relayed = loop {
        match from.read(&mut buffer) {
            Ok(0) => break to.shutdown(Shutdown::Write),
            Ok(length) => {
                if let Err(error) = to.write_all(&buffer[..length]) {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    if relayed.is_err() {
        // Either may be broken already.
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

/// Relays datagrams, of all flows on one thread: a session per source, as UDP proxies have it.
struct Relay {
    forget: bool,
    poll: OwnedFd,
    listeners: Vec<UdpSocket>,
    sessions: Vec<Session>,
    /// The session of each source that has sent to a listener.
    by_source: HashMap<(usize, SocketAddr), usize>,
}

/// One flow of datagrams.
struct Session {
    listener: usize,
    source: SocketAddr,
    /// The flow's number.
    flow: u64,
    /// The way onwards, if there is one.
    onward: Option<UdpSocket>,
}

impl Relay {
    fn new(listeners: Vec<UdpSocket>, forget: bool) -> io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let relay =
            Self { forget, poll, listeners, sessions: Vec::new(), by_source: HashMap::new() };
        for (number, listener) in relay.listeners.iter().enumerate() {
            relay.watch(listener, number)?;
        }
        Ok(relay)
    }

    /// Listeners have the first numbers, sessions those after.
    fn watch(&self, socket: &UdpSocket, number: usize) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let data = epoll::EventData::new_u64(number as u64);
        Ok(epoll::add(&self.poll, socket, data, epoll::EventFlags::IN)?)
    }

    /// Serves for ever.
    fn run(mut self) -> io::Result<()> {
        let mut events = [MaybeUninit::uninit(); 256];
        let mut buffer = vec![0; 65_535];
        loop {
            let ready = match epoll::wait(&self.poll, &mut events, None) {
                Ok((ready, _)) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in ready {
                let number = event.data.u64() as usize;
                match number.checked_sub(self.listeners.len()) {
                    None => self.hear_clients(number, &mut buffer)?,
                    Some(session) => self.hear_server(session, &mut buffer),
                }
            }
        }
    }

    fn hear_clients(&mut self, listener: usize, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            let (length, source) = match self.listeners[listener].recv_from(buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // An earlier answer found nobody.
                Err(_) => continue,
            };
            let known = self.by_source.get(&(listener, source)).copied();
            let session = match known.filter(|session| self.is_current(*session)) {
                Some(session) => session,
                None => match self.begin(listener, source)? {
                    Some(session) => session,
                    None => continue,
                },
            };
            if let Some(onward) = &self.sessions[session].onward {
                // A server that is not there is told by ICMP, like a datagram that is lost.
                let _ = onward.send(&buffer[..length]);
            }
        }
    }

    /// Whether the session's source still stands for the flow that it stood for. A source token does
    /// as long as the flow lives. A client's own address is that of its socket, which may be connected
    /// elsewhere: nothing but asking again tells.
    fn is_current(&self, session: usize) -> bool {
        let Session { source, flow, .. } = &self.sessions[session];
        if is_source_token(&(*source).into()) {
            return true;
        }
        let now = carnet::DatagramFlow::of(*source).and_then(|asked| carnet::flow(&asked));
        now.is_ok_and(|now| now.id == *flow)
    }

    /// A source that has not been heard before, or stands for another flow now: `None` if it is
    /// nobody's flow.
    fn begin(&mut self, listener: usize, source: SocketAddr) -> io::Result<Option<usize>> {
        let ends = (Ok(source), self.listeners[listener].local_addr());
        let examined = carnet::DatagramFlow::of(source)
            .and_then(|flow| Ok((examine(&flow, libc::IPPROTO_UDP as u8, ends)?, flow)));
        let (mut report, flow) = match examined {
            Ok(examined) => examined,
            Err(carnet::Error::NotRedirected { .. }) => {
                print(&Line::Direct(source));
                return Ok(None);
            }
            Err(error) => {
                print(&Line::Problem(error.to_string()));
                return Ok(None);
            }
        };
        let onward = connect_datagram(&flow, &report, self.forget);
        report.onward = match &onward {
            Ok(onward) => onward.local_addr().map_err(errno_of),
            Err(errno) => Err(*errno),
        };
        let flow = report.flow;
        print(&Line::Flow(Box::new(report)));
        let number = self.sessions.len();
        let onward = onward.ok();
        if let Some(onward) = &onward {
            widen(onward).map_err(io::Error::other)?;
            self.watch(onward, self.listeners.len() + number)?;
        }
        self.sessions.push(Session { listener, source, flow, onward });
        self.by_source.insert((listener, source), number);
        Ok(Some(number))
    }

    fn hear_server(&self, session: usize, buffer: &mut [u8]) {
        let Session { listener, source, onward: Some(onward), .. } = &self.sessions[session] else {
            return;
        };
        loop {
            match onward.recv(buffer) {
                Ok(length) => {
                    if let Err(error) = self.listeners[*listener].send_to(&buffer[..length], source)
                    {
                        print(&Line::Problem(format!("answer to {source}: {error}")));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {}
            }
        }
    }
}

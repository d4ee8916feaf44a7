//! Many UDP clients in one process, each of which knows every answer that it is to get: whose it
//! is, where it comes from and which server gave it.
//!
//! A datagram carries its client's number, its destination's and its own. The [`DatagramServer`]
//! says in its answer which address was reached. So an answer that comes twice, to another client,
//! from another address or from another server is told from a good one.
//!
//! [`DatagramServer`]: crate::DatagramServer

use std::{
    collections::{HashSet, VecDeque},
    io::{self, Read as _},
    mem::MaybeUninit,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use serde::{Deserialize, Serialize};

use crate::{Error, datagram_server::answer_of};

/// How many faults are told in words.
const TOLD: usize = 10;

/// What the clients do.
#[derive(Clone, Debug)]
pub struct DatagramPlan {
    /// The servers.
    pub to: Vec<SocketAddr>,
    /// How many clients: each has one socket, with which it talks to all servers, or, connected,
    /// one per server.
    pub clients: u32,
    /// How many datagrams each client sends to each server.
    pub rounds: u32,
    /// How many may be unanswered at a time, over all clients.
    pub window: usize,
    /// Whether the sockets are connected.
    pub connected: bool,
    /// How long an answer may take.
    pub timeout: Duration,
}

/// What became of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Of these, answered as they should be.
    pub answered: u64,
    /// Answers to nothing that is unanswered: duplicates, or never asked for.
    pub uncalled: u64,
    /// Answers that came to another client than the one that asked.
    pub crossed: u64,
    /// Answers whose source is not the server that was asked.
    pub misattributed: u64,
    /// Answers that another server gave than the one that was asked.
    pub misrouted: u64,
    /// The first faults, in words.
    pub faults: Vec<String>,
}

impl DatagramReport {
    /// Whether everything was answered, once, by whom and to whom it should be.
    #[must_use]
    pub fn is_perfect(&self) -> bool {
        self.faults.is_empty()
            && self.answered == self.sent
            && [self.uncalled, self.crossed, self.misattributed, self.misrouted] == [0; 4]
    }

    fn fault(&mut self, told: String) {
        if self.faults.len() < TOLD {
            self.faults.push(told);
        }
    }
}

/// A question: client, server, number.
type Question = (u32, u32, u32);

/// Twelve bytes that say which question it is.
fn payload_of((client, server, number): Question) -> [u8; 12] {
    let mut bytes = [0; 12];
    for (part, value) in bytes.chunks_mut(4).zip([client, server, number]) {
        part.copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

fn question_in(payload: &[u8]) -> Option<Question> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(payload.get(at..at + 4)?.try_into().ok()?))
    };
    Some((word(0)?, word(4)?, word(8)?))
}

/// Lets the process have as many open files as it may.
///
/// # Errors
/// [`Error::Io`].
pub fn raise_file_limit() -> Result<(), Error> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .map_err(|errno| Error::io("raise", "the limit of open files")(errno.into()))
}

impl DatagramPlan {
    /// Carries the plan out in the calling thread's network namespace. It ends early when answers
    /// do not come.
    ///
    /// # Errors
    /// [`Error::Io`] when a socket cannot be made or sent from. What is wrong with answers is in
    /// the report.
    pub fn run(&self) -> Result<DatagramReport, Error> {
        raise_file_limit()?;
        let failed = |operation| Error::io(operation, "the clients' sockets");
        let clients = Clients::open(self).map_err(failed("open"))?;
        let mut report = DatagramReport::default();
        let mut open = HashSet::new();
        let mut due: VecDeque<Question> = (0..self.rounds)
            .flat_map(|number| {
                let servers = 0..self.to.len() as u32;
                let of_server =
                    move |server| (0..self.clients).map(move |client| (client, server, number));
                servers.flat_map(of_server)
            })
            .collect();
        let mut deadline = Instant::now() + self.timeout;
        while !(due.is_empty() && open.is_empty()) {
            while open.len() < self.window
                && let Some(question) = due.pop_front()
            {
                clients.ask(question).map_err(failed("send from"))?;
                report.sent += 1;
                open.insert(question);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let some: Vec<_> = open.iter().take(3).collect();
                let many = open.len();
                report.fault(format!(
                    "no answer for {:?} while {many} questions were open, as {some:?}",
                    self.timeout
                ));
                return Ok(report);
            }
            if clients.hear(left, &mut open, &mut report).map_err(failed("receive from"))? {
                deadline = Instant::now() + self.timeout;
            }
        }
        // What is there beyond the last answer is one too many.
        clients.hear(Duration::ZERO, &mut open, &mut report).map_err(failed("receive from"))?;
        Ok(report)
    }
}

/// The clients' sockets.
struct Clients<'a> {
    plan: &'a DatagramPlan,
    sockets: Vec<UdpSocket>,
    /// Of unconnected clients, each has one socket a family: IPv4, IPv6.
    per_client: usize,
    poll: rustix::fd::OwnedFd,
}

impl<'a> Clients<'a> {
    fn open(plan: &'a DatagramPlan) -> io::Result<Self> {
        let per_client = if plan.connected { plan.to.len() } else { 2 };
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut sockets = Vec::new();
        for number in 0..plan.clients as usize * per_client {
            let of_client = number % per_client;
            let v4 = if plan.connected { plan.to[of_client].is_ipv4() } else { of_client == 0 };
            let any: SocketAddr = if v4 {
                (Ipv4Addr::UNSPECIFIED, 0).into()
            } else {
                (Ipv6Addr::UNSPECIFIED, 0).into()
            };
            let socket = UdpSocket::bind(any)?;
            if plan.connected {
                socket.connect(plan.to[of_client])?;
            }
            socket.set_nonblocking(true)?;
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&poll, &socket, data, epoll::EventFlags::IN)?;
            sockets.push(socket);
        }
        Ok(Self { plan, sockets, per_client, poll })
    }

    fn ask(&self, question: Question) -> io::Result<()> {
        let (client, server, _) = question;
        let (client, server) = (client as usize, server as usize);
        let to = self.plan.to[server];
        let payload = payload_of(question);
        let first = client * self.per_client;
        if self.plan.connected {
            self.sockets[first + server].send(&payload)?;
        } else {
            self.sockets[first + usize::from(to.is_ipv6())].send_to(&payload, to)?;
        }
        Ok(())
    }

    /// Takes the answers that are there, or waits for the first; says whether there was any.
    fn hear(
        &self,
        longest: Duration,
        open: &mut HashSet<Question>,
        report: &mut DatagramReport,
    ) -> io::Result<bool> {
        let mut events = [MaybeUninit::uninit(); 256];
        let longest = Timespec::try_from(longest).map_err(io::Error::other)?;
        let (ready, _) = match epoll::wait(&self.poll, &mut events, Some(&longest)) {
            Err(rustix::io::Errno::INTR) => return Ok(false),
            result => result?,
        };
        let any = !ready.is_empty();
        let mut buffer = [0; 2048];
        for event in ready {
            let number = event.data.u64() as usize;
            loop {
                match self.sockets[number].recv_from(&mut buffer) {
                    Ok((length, source)) => {
                        let client = (number / self.per_client) as u32;
                        self.check(client, source, &buffer[..length], open, report);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        report.fault(format!("client {}: {error}", number / self.per_client));
                        break;
                    }
                }
            }
        }
        Ok(any)
    }

    fn check(
        &self,
        client: u32,
        source: SocketAddr,
        answer: &[u8],
        open: &mut HashSet<Question>,
        report: &mut DatagramReport,
    ) {
        let question = question_in(answer);
        let Some(question) = question.filter(|question| open.remove(question)) else {
            report.uncalled += 1;
            report.fault(format!("client {client} got an uncalled answer to {question:?}"));
            return;
        };
        let (asker, server, _) = question;
        let to = self.plan.to[server as usize];
        let expected = answer_of(to, &payload_of(question));
        if asker != client {
            report.crossed += 1;
            report.fault(format!("client {client} got the answer to {question:?}"));
        } else if source != to {
            report.misattributed += 1;
            report.fault(format!("the answer to {question:?} comes from {source}, not {to}"));
        } else if answer != expected {
            report.misrouted += 1;
            let said = String::from_utf8_lossy(answer.get(12..).unwrap_or_default());
            report.fault(format!("{question:?} to {to}{said}"));
        } else {
            report.answered += 1;
        }
    }
}

/// The datagrams that the kernel has dropped in the calling thread's network namespace because a
/// socket's receive buffer was full, over IPv4 and IPv6.
///
/// # Errors
/// [`Error::Io`] if the counters cannot be read.
pub fn dropped_for_want_of_room() -> Result<u64, Error> {
    let read = |path: &'static str| {
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|mut file| file.read_to_string(&mut text))
            .map_err(Error::io("read", path))?;
        Ok(text)
    };
    let v4 = read("/proc/thread-self/net/snmp")?;
    let mut lines = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let v4 = names.split(' ').zip(values.split(' '));
    let v6 = read("/proc/thread-self/net/snmp6")?;
    let v6 = v6.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let counted = v4
        .filter(|(name, _)| *name == "RcvbufErrors")
        .chain(v6.filter(|(name, _)| *name == "Udp6RcvbufErrors"))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok());
    Ok(counted.sum())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::DatagramServer;

    fn plan(to: Vec<SocketAddr>) -> DatagramPlan {
        DatagramPlan {
            to,
            clients: 3,
            rounds: 5,
            window: 4,
            connected: false,
            timeout: Duration::from_secs(30),
        }
    }

    fn local() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    #[test]
    fn honest_servers_are_perfect() {
        let server =
            DatagramServer::start([local(), (Ipv6Addr::LOCALHOST, 0).into(), local()]).unwrap();
        for connected in [false, true] {
            let plan = DatagramPlan { connected, ..plan(server.addresses().to_vec()) };
            let report = plan.run().unwrap();
            assert!(report.is_perfect(), "{report:#?}");
            assert_eq!(report.sent, 45);
        }
        assert_eq!(server.datagrams().len(), 90);
    }

    /// What clients make of a server that answers as `answer` does.
    fn with(answer: impl Fn(&UdpSocket, SocketAddr, &[u8]) + Sync) -> DatagramReport {
        let server = UdpSocket::bind(local()).unwrap();
        let to = server.local_addr().unwrap();
        thread::scope(|scope| {
            let serving = scope.spawn(|| {
                let mut buffer = [0; 64];
                loop {
                    let (length, peer) = server.recv_from(&mut buffer).unwrap();
                    match &buffer[..length] {
                        b"end" => return,
                        payload => answer(&server, peer, payload),
                    }
                }
            });
            let plan = DatagramPlan {
                clients: 2,
                rounds: 1,
                window: 1,
                timeout: Duration::from_millis(200),
                ..plan(vec![to])
            };
            let report = plan.run().unwrap();
            UdpSocket::bind(local()).unwrap().send_to(b"end", to).unwrap();
            serving.join().unwrap();
            report
        })
    }

    #[test]
    fn a_lost_answer_is_found() {
        let report = with(|_, _, _| {});
        assert!(!report.is_perfect());
        assert!(report.faults[0].starts_with("no answer for 200ms"), "{report:#?}");
    }

    #[test]
    fn an_answer_that_comes_twice_is_found() {
        let report = with(|server, peer, payload| {
            let answer = answer_of(server.local_addr().unwrap(), payload);
            server.send_to(&answer, peer).unwrap();
            server.send_to(&answer, peer).unwrap();
        });
        assert!(report.uncalled > 0, "{report:#?}");
    }

    #[test]
    fn a_wrong_source_and_a_wrong_server_are_found() {
        let other = UdpSocket::bind(local()).unwrap();
        let report = with(|server, peer, payload| {
            other.send_to(&answer_of(server.local_addr().unwrap(), payload), peer).unwrap();
        });
        assert_eq!(report.misattributed, 2, "{report:#?}");
        let report = with(|server, peer, payload| {
            server.send_to(&answer_of(other.local_addr().unwrap(), payload), peer).unwrap();
        });
        assert_eq!(report.misrouted, 2, "{report:#?}");
    }

    #[test]
    fn dropped_datagrams_can_be_counted() {
        dropped_for_want_of_room().unwrap();
    }
}

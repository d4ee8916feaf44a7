//! Rules of netfilter on what local sockets send: nftables, iptables, and the queues by which firewalls
//! ask a process of theirs.
//!
//! They come after the hooks, and to them each leg is a connection of its own.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Finding, State, command_of};
use crate::{
    members::Members,
    namespace::inside,
    netlink::{ATTRIBUTE, HEADER, attribute},
};

/// `NETLINK_NETFILTER`.
const NETFILTER: i32 = 12;
/// `NFT_MSG_GETCHAIN` of `NFNL_SUBSYS_NFTABLES`.
const GET_CHAINS: u16 = 10 << 8 | 4;
/// `NFT_MSG_NEWCHAIN` of the same.
const CHAIN: u16 = 10 << 8 | 3;
/// `NFTA_CHAIN_TABLE`.
const TABLE: u16 = 1;
/// `NFTA_CHAIN_NAME`.
const NAME: u16 = 3;
/// `NFTA_CHAIN_HOOK`, with `NFTA_HOOK_HOOKNUM` in it.
const HOOK: u16 = 4;
const HOOK_NUMBER: u16 = 1;
/// `NFTA_CHAIN_TYPE`.
const TYPE: u16 = 7;
/// `NF_INET_LOCAL_OUT`: what local sockets send.
const OUTPUT: u32 = 3;
/// `NLA_F_NESTED`, in an attribute's type.
const NESTED: u16 = 1 << 15;

/// What is found in one network namespace.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rules {
    chains: Vec<Chain>,
    /// Tables of iptables.
    tables: Vec<String>,
    /// Numbers of queues, and the processes that read them.
    queues: Vec<(u32, u32)>,
}

/// A chain of nftables that sees what local sockets send.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chain {
    family: &'static str,
    table: String,
    name: String,
    kind: String,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, table, name, kind } = self;
        write!(f, "chain {name} of table {family} {table} ({kind})")
    }
}

/// The rules in the own network namespace, and in those of the processes of a cgroup.
pub(super) fn examine(members: Option<&Members>) -> Vec<Finding> {
    let pids = members.into_iter().flat_map(|members| &members.processes);
    let processes = pids.map(|member| member.pid.to_string());
    let mut seen = Vec::new();
    let mut findings = Vec::new();
    for process in ["self".to_owned()].into_iter().chain(processes) {
        // It may have ended.
        let Ok(namespace) = File::open(format!("/proc/{process}/ns/net")) else { continue };
        let Ok(metadata) = namespace.metadata() else { continue };
        let identity = (metadata.dev(), metadata.ino());
        if seen.contains(&identity) {
            continue;
        }
        seen.push(identity);
        let place = match process.parse() {
            Ok(pid) => format!(", in the network namespace of {}", command_of(pid)),
            Err(_) => String::new(),
        };
        match Rules::of(&process, &namespace) {
            // Of another namespace only what there is.
            Ok(rules) if !place.is_empty() && rules == Rules::default() => {}
            Ok(rules) => findings.extend(rules.findings(&place)),
            Err(error) => findings.push(Finding::new(
                State::Warning,
                "packet filters",
                format!("not known{place}: {error}"),
                "run this as root",
            )),
        }
    }
    findings
}

impl Rules {
    fn of(process: &str, namespace: &File) -> io::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{process}/net/{name}"));
        let tables = ["ip_tables_names", "ip6_tables_names"].map(|name| {
            let family = name.split('_').next().unwrap_or_default();
            let tables = read(name).unwrap_or_default();
            tables.lines().map(|table| format!("{family} {table}")).collect::<Vec<_>>()
        });
        Ok(Self {
            chains: inside(namespace, chains)?,
            tables: tables.concat(),
            queues: queues_in(&read("netfilter/nfnetlink_queue").unwrap_or_default()),
        })
    }

    fn findings(&self, place: &str) -> Vec<Finding> {
        const FILTERS: &str = "packet filters";
        let chains = self.chains.iter().map(Chain::to_string);
        let tables = self.tables.iter().map(|table| format!("table {table} of iptables"));
        let found: Vec<_> = chains.chain(tables).collect();
        let mut findings = Vec::new();
        if found.is_empty() {
            findings.push(Finding::ok(FILTERS, format!("none on what is sent{place}")));
        } else {
            let rewrites = |chain: &Chain| chain.kind != "filter";
            let state = match self.chains.iter().any(rewrites) || !self.tables.is_empty() {
                true => State::Warning,
                false => State::Ok,
            };
            findings.push(Finding::new(
                state,
                FILTERS,
                format!("{}{place}", found.join(", ")),
                "they come after Carnet, and to them each leg is a connection of its own: a redirected \
                 one goes to its service on loopback, which they have to let pass; only the last one, \
                 of the last service, has the true destination, so a rule that redirects by it gets \
                 flows after Carnet's services",
            ));
        }
        for (queue, process) in &self.queues {
            let is_process = Path::new(&format!("/proc/{process}")).exists();
            let who = if is_process { command_of(*process) } else { "an unknown process".into() };
            findings.push(Finding::new(
                State::Warning,
                "packet queue",
                format!("{queue} is read by {who}{place}"),
                "an application firewall, perhaps. It is asked after Carnet: about the application's \
                 connections as ones to a service on loopback, and about the services' own with the \
                 true destinations, so allow both there",
            ));
        }
        findings
    }
}

/// The queues in `/proc/net/netfilter/nfnetlink_queue`, with who reads them: by custom, the number of a
/// netlink socket is its process's.
fn queues_in(table: &str) -> Vec<(u32, u32)> {
    let queue = |line: &str| {
        let mut fields = line.split_whitespace().map(str::parse::<u32>);
        Some((fields.next()?.ok()?, fields.next()?.ok()?))
    };
    table.lines().filter_map(queue).collect()
}

/// The chains of nftables on what local sockets of the calling thread's network namespace send; none
/// where the kernel has no nftables.
fn chains() -> io::Result<Vec<Chain>> {
    const PATIENCE: Duration = Duration::from_secs(5);
    const FLAGS: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let protocol = Some(Protocol::from(NETFILTER));
    let socket = match Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, protocol) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        socket => socket?,
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    // The header, and `struct nfgenmsg`: of all families.
    let mut question = [0_u8; HEADER + 4];
    question[0] = question.len() as u8;
    question[4..6].copy_from_slice(&GET_CHAINS.to_ne_bytes());
    question[6..8].copy_from_slice(&FLAGS.to_ne_bytes());
    socket.send(&question)?;
    let mut buffer = vec![0; 65_536];
    let mut chains = Vec::new();
    loop {
        let received = (&socket).read(&mut buffer)?;
        match read_answer(buffer.get(..received).unwrap_or_default(), &mut chains) {
            Some(0) => return Ok(chains),
            // No table has ever been made, and the module is not loaded.
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT) => return Ok(Vec::new()),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            None => {}
        }
    }
}

/// Takes the chains out of what the kernel sent; gives 0 at the end, or the errno with which it refused.
fn read_answer(mut bytes: &[u8], chains: &mut Vec<Chain>) -> Option<i32> {
    loop {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let (length, kind) = (word(0)? as usize, word(4)? as u16);
        let body = bytes.get(HEADER..length)?;
        if i32::from(kind) == libc::NLMSG_DONE {
            return Some(0);
        }
        if i32::from(kind) == libc::NLMSG_ERROR {
            return Some(word(HEADER)?.cast_signed().wrapping_neg());
        }
        if kind == CHAIN {
            chains.extend(read_chain(body));
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// A chain, if it is one on what local sockets send.
fn read_chain(body: &[u8]) -> Option<Chain> {
    let family = match i32::from(*body.first()?) {
        // `NFPROTO_INET`.
        1 => "inet",
        libc::AF_INET => "ip",
        libc::AF_INET6 => "ip6",
        _ => return None,
    };
    // After `struct nfgenmsg`.
    let attributes = body.get(ATTRIBUTE..)?;
    let text = |wanted| {
        let value = attribute(attributes, wanted)?;
        let value = value.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(value).into_owned())
    };
    let hook = attribute(attributes, HOOK).or_else(|| attribute(attributes, HOOK | NESTED))?;
    let number = attribute(hook, HOOK_NUMBER)?;
    if u32::from_be_bytes(number.try_into().ok()?) != OUTPUT {
        return None;
    }
    Some(Chain { family, table: text(TABLE)?, name: text(NAME)?, kind: text(TYPE)? })
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    /// How many chains there are in what the kernel has sent.
    pub(crate) fn count(received: &[u8]) -> usize {
        let mut chains = Vec::new();
        let _any = super::read_answer(received, &mut chains);
        chains.len()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::{AsFd as _, AsRawFd as _},
        process::Command,
    };

    use carnet_testbed::{NetworkNamespace, require_root};
    use rustix::net::netlink::SocketAddrNetlink;

    use super::*;

    #[test]
    fn chains_on_what_is_sent_are_found() {
        require_root().unwrap();
        let namespace = NetworkNamespace::create("netfilter").unwrap();
        let found = || namespace.run(|| chains().unwrap()).unwrap();
        assert_eq!(found(), []);
        let mut nft = Command::new("nft");
        nft.arg(
            "add table inet guard; add chain inet guard sent { type filter hook output priority 0; }; \
             add chain inet guard got { type filter hook input priority 0; }; add chain inet guard \
             plain; add table ip gate; add chain ip gate away { type nat hook output priority 0; }",
        );
        namespace.enter_command(&mut nft).unwrap();
        assert!(nft.status().unwrap().success());
        let mut chains: Vec<_> = found().iter().map(Chain::to_string).collect();
        chains.sort_unstable();
        assert_eq!(
            chains,
            ["chain away of table ip gate (nat)", "chain sent of table inet guard (filter)"]
        );
    }

    #[test]
    fn only_what_rewrites_is_a_warning() {
        let chain = |kind: &str| Chain {
            family: "ip",
            table: "t".into(),
            name: "c".into(),
            kind: kind.into(),
        };
        let state = |rules: &Rules| rules.findings("")[0].state;
        assert_eq!(state(&Rules::default()), State::Ok);
        let of = |kind| Rules { chains: vec![chain(kind)], ..Rules::default() };
        assert_eq!(state(&of("filter")), State::Ok);
        assert_eq!(state(&of("nat")), State::Warning);
        let legacy = Rules { tables: vec!["ip nat".into()], ..Rules::default() };
        assert_eq!(state(&legacy), State::Warning);
    }

    /// Reads a queue, as an application firewall does, as long as it lives.
    fn reader_of_queue(number: u16) -> Socket {
        /// `NFQNL_MSG_CONFIG` of `NFNL_SUBSYS_QUEUE`, with the command `NFQNL_CFG_CMD_BIND`.
        const CONFIGURE: u16 = 3 << 8 | 2;
        const FLAGS: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let protocol = Some(Protocol::from(NETFILTER));
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, protocol).unwrap();
        let question = [
            &28_u32.to_ne_bytes()[..],
            &CONFIGURE.to_ne_bytes(),
            &FLAGS.to_ne_bytes(),
            &[0; 8],
            // `struct nfgenmsg`, with the queue; `NFQA_CFG_CMD`: bind.
            &[0, 0],
            &number.to_be_bytes(),
            &8_u16.to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &[1, 0, 0, 2],
        ];
        socket.send(&question.concat()).unwrap();
        let mut answer = [0; 64];
        let received = (&socket).read(&mut answer).unwrap();
        assert_eq!(read_answer(&answer[..received], &mut Vec::new()), Some(0), "acknowledged");
        socket
    }

    #[test]
    fn who_reads_a_queue_is_found() {
        require_root().unwrap();
        let namespace = NetworkNamespace::create("queue").unwrap();
        let file = File::open(format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd())).unwrap();
        let found = |process: &str| Rules::of(process, &file).unwrap().queues;
        namespace
            .run(|| {
                assert_eq!(found("thread-self"), []);
                let reader = reader_of_queue(7);
                // The process's, as a rule. But a child that another test starts has this process's earlier
                // socket for a moment too, which had that number.
                let address = rustix::net::getsockname(&reader).unwrap();
                let number = SocketAddrNetlink::try_from(address).unwrap().pid();
                assert_eq!(found("thread-self"), [(7, number)]);
            })
            .unwrap();
    }

    #[test]
    fn queues_are_read_with_their_processes() {
        let table = "    0   4242     0 2 65531     0     0        1  1\n    7     12 0 0\nx\n";
        assert_eq!(queues_in(table), [(0, 4242), (7, 12)]);
        let rules = Rules { queues: queues_in(table), ..Rules::default() };
        assert_eq!(rules.findings("").len(), 3);
        assert_eq!(rules.findings("")[1].name, "packet queue");
        // A second socket of a process, or a thread's, has a number at random.
        let rules = Rules { queues: vec![(7, 3_012_062_550)], ..Rules::default() };
        assert_eq!(rules.findings("")[1].detail, "7 is read by an unknown process");
    }

    #[test]
    fn answers_are_read_with_care() {
        for bytes in [&[][..], &[1; 3], &[0; 16], &[255; 40]] {
            let mut chains = Vec::new();
            assert_eq!(read_answer(bytes, &mut chains), None, "{bytes:?}");
            assert_eq!(chains, []);
        }
    }
}

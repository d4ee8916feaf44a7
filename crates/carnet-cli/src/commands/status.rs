//! `carnet status`: what an instance is and does, read back from the kernel.

use std::{fmt, path::PathBuf};

use carnet_engine as engine;
use serde::Serialize;

use super::DONE;
use crate::{
    console::{GOOD, HEADING, WARNING, plain, styled},
    failure::Failure,
    session::Session,
    table::Table,
};

/// Show the state of an engine instance
///
/// All of it is read back from the kernel: what is attached, how full the tables are, what has been
/// counted. How long programs run is shown if the kernel counts it: sysctl
/// kernel.bpf_stats_enabled=1.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

/// JSON of `status`.
#[derive(Serialize)]
struct Status {
    /// The instance's name.
    instance: String,
    /// Where its pins are.
    directory: PathBuf,
    /// The cgroup whose connections are redirected.
    cgroup: Cgroup,
    /// The instance's epoch, in hexadecimal: records of another one are refused.
    epoch: String,
    /// The key under which records are issued.
    key: Key,
    /// Whether sockets are refused there whose flows would pass unseen.
    refuse_unseen: bool,
    /// Number of the last change of the policy; 0 if there was none.
    generation: u64,
    /// Number of flows that have begun.
    flows_begun: u64,
    /// Layout of the tables.
    layout: u32,
    /// The build of the programs that run.
    build: String,
    /// Whether it is the build of this version of the command.
    up_to_date: bool,
    /// The programs.
    programs: Vec<Program>,
    /// What is attached, and to which cgroup.
    links: Vec<Link>,
    /// The counters.
    counters: Vec<Count>,
    /// What became of the redirects.
    account: Account,
    /// How full the policy's tables are.
    tables: Vec<Use>,
    /// How full the maps are that grow and shrink with what goes on.
    maps: Vec<MapUse>,
}

#[derive(Serialize)]
struct Key {
    /// Its number, from 1.
    generation: u64,
    /// For how many seconds it has issued records.
    age_seconds: u64,
    /// For how many seconds the key before is still accepted; 0 if it is not.
    previous_accepted_seconds: u64,
}

#[derive(Serialize)]
struct Cgroup {
    /// Its directory.
    path: PathBuf,
    /// Its id.
    id: u64,
    /// Whether it is still there.
    alive: bool,
}

#[derive(Serialize)]
struct Program {
    /// Its name.
    name: String,
    /// The kernel's number for it.
    id: u32,
    /// The kernel's digest of its instructions, in hexadecimal.
    tag: String,
    /// Instructions that the verifier looked at.
    verified_instructions: u32,
    /// Times that it ran, if the kernel counts.
    run_count: u64,
    /// Nanoseconds that it ran in all, if the kernel counts.
    run_time_ns: u128,
}

#[derive(Serialize)]
struct Link {
    /// The kernel's number for it.
    id: u32,
    /// The hook.
    hook: String,
    /// The program's number.
    program: u32,
    /// Id of the cgroup.
    cgroup: u64,
    /// The service whose cgroup it is; null for that whose connections are redirected.
    service: Option<String>,
    /// Whether it is attached; if not, the cgroup is gone.
    alive: bool,
}

#[derive(Serialize)]
struct Count {
    name: &'static str,
    value: u64,
}

/// What became of the redirects; `docs/counters.md` has the equations.
#[derive(Serialize)]
struct Account {
    tcp: Tcp,
    udp: Udp,
    refused: Refused,
}

/// Redirected TCP connections.
#[derive(Serialize)]
struct Tcp {
    redirected: u64,
    delivered: u64,
    handover_failed: u64,
    unsent: u64,
    unanswered: u64,
    starting: u64,
    connecting: u64,
    /// What the others do not add up to: 0 when nothing is under way.
    difference: i64,
}

/// Redirected UDP flows.
#[derive(Serialize)]
struct Udp {
    redirected: u64,
    ended: u64,
    live: u64,
    difference: i64,
}

/// Refused connects and UDP flows.
#[derive(Serialize)]
struct Refused {
    refused: u64,
    by_filter: u64,
    service_unavailable: u64,
    loops_ended: u64,
    out_of_memory: u64,
    address_in_use: u64,
    bound_to_device: u64,
    difference: i64,
}

#[derive(Serialize)]
struct MapUse {
    /// The map's name.
    name: &'static str,
    #[serde(flatten)]
    of: Use,
    /// Whether the oldest give way where there is no room.
    oldest_give_way: bool,
    /// Its kernel memory, as the kernel tells it.
    bytes: u64,
}

#[derive(Serialize)]
struct Use {
    /// What the table holds.
    what: &'static str,
    /// How many there are.
    used: usize,
    /// How many there can be.
    capacity: usize,
}

pub(super) fn run(_arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let status = Status::from(session.engine()?.status()?);
    if session.global.json {
        session.console.json(&status)?;
    } else {
        session.console.line(&status)?;
    }
    Ok(DONE)
}

impl From<engine::Status> for Status {
    fn from(status: engine::Status) -> Self {
        let program = |program: engine::ProgramStatus| Program {
            name: program.name,
            id: program.id,
            tag: program.tag.iter().map(|byte| format!("{byte:02x}")).collect(),
            verified_instructions: program.verified_instructions,
            run_count: program.run_count,
            run_time_ns: program.run_time.as_nanos(),
        };
        let link = |link: engine::LinkStatus| Link {
            id: link.id,
            hook: link.hook,
            program: link.program_id,
            cgroup: link.cgroup,
            service: link.service,
            alive: link.alive,
        };
        let counters = status.counters.into_iter();
        Self {
            instance: status.instance,
            directory: status.directory,
            cgroup: Cgroup { path: status.scope, id: status.scope_id, alive: status.scope_alive },
            key: Key {
                generation: status.key.generation,
                age_seconds: status.key.age.as_secs(),
                // A rest of a second is not nothing.
                previous_accepted_seconds: status
                    .key
                    .predecessor
                    .map_or(0, |left| left.as_secs() + u64::from(left.subsec_nanos() > 0)),
            },
            epoch: format!("{:016x}", status.epoch),
            refuse_unseen: status.refuse_unseen,
            generation: status.generation,
            flows_begun: status.flows_begun,
            layout: status.layout,
            build: status.build.to_string(),
            up_to_date: status.build == status.own_build,
            programs: status.programs.into_iter().map(program).collect(),
            links: status.links.into_iter().map(link).collect(),
            counters: counters
                .map(|(counter, value)| Count { name: counter_name(counter), value })
                .collect(),
            tables: status
                .tables
                .into_iter()
                .map(|table| Use { what: table.what, used: table.used, capacity: table.capacity })
                .collect(),
            account: Account::from(status.account),
            maps: status
                .maps
                .into_iter()
                .map(|map| MapUse {
                    name: map.name,
                    of: Use { what: map.what, used: map.used, capacity: map.capacity },
                    oldest_give_way: map.oldest_give_way,
                    bytes: map.bytes,
                })
                .collect(),
        }
    }
}

impl From<engine::Account> for Account {
    fn from(account: engine::Account) -> Self {
        let engine::Account { tcp, udp, refused, .. } = account;
        Self {
            tcp: Tcp {
                redirected: tcp.redirected,
                delivered: tcp.delivered,
                handover_failed: tcp.handover_failed,
                unsent: tcp.unsent,
                unanswered: tcp.unanswered,
                starting: tcp.starting,
                connecting: tcp.connecting,
                difference: tcp.difference(),
            },
            udp: Udp {
                redirected: udp.redirected,
                ended: udp.ended,
                live: udp.live,
                difference: udp.difference(),
            },
            refused: Refused {
                refused: refused.refused,
                by_filter: refused.by_filter,
                service_unavailable: refused.service_unavailable,
                loops_ended: refused.loops_ended,
                out_of_memory: refused.out_of_memory,
                address_in_use: refused.address_in_use,
                bound_to_device: refused.bound_to_device,
                difference: refused.difference(),
            },
        }
    }
}

impl fmt::Display for Account {
    /// A line for each protocol, of sums that add up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tcp, udp, refused } = self;
        write!(
            f,
            "TCP      {} redirected = {} delivered + {} handover failed + {} unsent + {} unanswered \
             + {} under way",
            tcp.redirected,
            tcp.delivered,
            tcp.handover_failed,
            tcp.unsent,
            tcp.unanswered,
            tcp.starting + tcp.connecting,
        )?;
        let udp = (udp.redirected, udp.ended, udp.live);
        write!(f, "\nUDP      {} redirected = {} ended + {} live", udp.0, udp.1, udp.2)?;
        write!(
            f,
            "\nrefused  {} = {} by a filter + {} without service + {} loops + {} without memory\n\
             \u{20}        + {} addresses in use + {} bound to a device",
            refused.refused,
            refused.by_filter,
            refused.service_unavailable,
            refused.loops_ended,
            refused.out_of_memory,
            refused.address_in_use,
            refused.bound_to_device,
        )
    }
}

/// The name under which a counter is shown.
fn counter_name(counter: carnet_core::event::Counter) -> &'static str {
    let named = carnet_core::event::Counter::ALL.iter().find(|(known, _)| *known == counter);
    named.map_or("unknown", |(_, name)| name)
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cgroup { path, alive, .. } = &self.cgroup;
        let state = if *alive {
            styled(GOOD, "up")
        } else {
            styled(WARNING, "up, but its cgroup is gone: take it down")
        };
        let build = if self.up_to_date {
            "this version's"
        } else {
            "another version's: carnet upgrade brings this one's in"
        };
        writeln!(f, "instance     {}, {state}", self.instance)?;
        writeln!(f, "cgroup       {}", plain(path.display()))?;
        writeln!(f, "pins         {}", plain(self.directory.display()))?;
        writeln!(f, "build        {:.12}, {build}", self.build)?;
        let unseen = if self.refuse_unseen { "refused" } else { "not refused" };
        writeln!(f, "unseen       sockets that connect past the hooks are {unseen}")?;
        writeln!(f, "policy       changed {} times", self.generation)?;
        let Key { generation, age_seconds, previous_accepted_seconds } = &self.key;
        let previous = match previous_accepted_seconds {
            0 => String::new(),
            left => format!("; the one before is accepted for {left} s more"),
        };
        writeln!(f, "key          number {generation}, for {age_seconds} s{previous}")?;
        writeln!(f, "flows begun  {}", self.flows_begun)?;

        let attached = self.links.iter().filter(|link| link.alive);
        let gone = self.links.len() - attached.clone().count();
        let mut table = Table::new(["PROGRAM", "ID", "ATTACHED", "RUNS", "NS EACH"]);
        for program in &self.programs {
            let Program { name, id, run_count, run_time_ns, .. } = program;
            let links = attached.clone().filter(|link| link.program == *id).count();
            let each = run_time_ns.checked_div(u128::from(*run_count));
            table.row([
                name.clone(),
                id.to_string(),
                if links == 0 { String::new() } else { links.to_string() },
                if *run_count == 0 { String::new() } else { run_count.to_string() },
                each.map(|each| each.to_string()).unwrap_or_default(),
            ]);
        }
        writeln!(f, "\n{table}")?;
        if gone > 0 {
            let what = format!("{gone} more were attached to cgroups that are gone");
            writeln!(f, "{}", styled(WARNING, what))?;
        }

        let mut table = Table::new(["TABLE", "USED", "ROOM FOR"]);
        for Use { what, used, capacity } in &self.tables {
            table.row([(*what).into(), used.to_string(), capacity.to_string()]);
        }
        for MapUse { of: Use { what, used, capacity }, .. } in &self.maps {
            table.row([(*what).into(), used.to_string(), capacity.to_string()]);
        }
        writeln!(f, "\n{table}\n")?;
        writeln!(f, "{}\n{}\n", styled(HEADING, "ACCOUNT"), self.account)?;

        write!(f, "{}", styled(HEADING, "COUNTED"))?;
        let mut counted = self.counters.iter().filter(|count| count.value > 0).peekable();
        if counted.peek().is_none() {
            write!(f, "\nnothing yet")?;
        }
        counted.try_for_each(|Count { name, value }| write!(f, "\n{name:22} {value}"))
    }
}

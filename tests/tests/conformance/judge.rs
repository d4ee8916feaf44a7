//! Puts together what was seen of each flow, and says what is not as it should be.

use std::{collections::HashMap, fmt, net::SocketAddr};

use carnet_core::event::{Counter, Event, EventKind};
use carnet_tests::{Report, puppet::Errno};

use crate::{
    cells::{Cell, Destination, Place, Protocol, Will},
    run::{Evidence, Sight, expected_answer},
};

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// The flow began, and came to the service, at its address.
    Redirected,
    /// The service got the filter's context.
    Context,
    /// It got a record that names it alone.
    Records,
    /// It learned where the flow was going.
    OriginalDestination,
    /// It learned whose the flow is.
    Application,
    /// getpeername() gives what the application asked for.
    PeerName,
    /// The answer comes from there.
    ReplySource,
    /// With the record, the service reached the destination; or, where nobody is, tried to.
    Arrival,
    /// What the policy blocks is refused, and arrives nowhere.
    Authorisation,
}

/// What became of a cell.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// What is wrong, of the checks of each will of the policy.
    pub(crate) faults: Vec<(Will, Check, String)>,
    /// How many flows were looked at.
    pub(crate) flows: usize,
}

impl Outcome {
    pub(crate) fn is_well(&self) -> bool {
        self.faults.is_empty()
    }

    /// Whether all is well of what one will of the policy brings.
    pub(crate) fn is_well_of(&self, will: Will) -> bool {
        self.faults.iter().all(|(of, _, _)| *of != will)
    }
}

/// Judges all cells.
pub(crate) fn judge(cells: &[Cell], evidence: &Evidence) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = cells.iter().map(|_| Outcome::default()).collect();
    let mut court = Court::new(evidence);
    for sight in &evidence.sights {
        let outcome = &mut outcomes[sight.cell];
        outcome.flows += 1;
        for (check, fault) in court.look_at(&cells[sight.cell], sight) {
            outcome.faults.push((sight.will, check, format!("to {}: {fault}", sight.to)));
        }
    }
    for (cell, outcome) in cells.iter().zip(&mut outcomes) {
        if cell.impossible().is_none() && outcome.flows == 0 {
            let fault = "it was not carried out".to_owned();
            outcome.faults.push((Will::Redirect, Check::Redirected, fault));
        }
    }
    // What belongs to no cell is told with the first one.
    for fault in court.leftovers() {
        outcomes[0].faults.push((Will::Redirect, Check::Redirected, fault));
    }
    outcomes
}

/// A flow as services know it: protocol, process, its port, where it was going.
type Key = (u8, u32, u16, SocketAddr);

/// The evidence, in a form to look things up.
struct Court<'a> {
    evidence: &'a Evidence,
    /// Reports that no flow has claimed yet.
    reports: HashMap<Key, Vec<(Place, &'a Report)>>,
    onward: HashMap<u64, &'a Event>,
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl<'a> Court<'a> {
    fn new(evidence: &'a Evidence) -> Self {
        let mut reports: HashMap<Key, Vec<_>> = HashMap::new();
        for (place, _, of_service, _) in &evidence.services {
            for report in of_service {
                let key =
                    (report.protocol, report.pid, report.peer.port(), canonical(report.original));
                reports.entry(key).or_default().push((*place, report));
            }
        }
        let is_onward = |event: &&Event| event.kind == EventKind::Onward as u32;
        let onward = evidence.events.iter().filter(is_onward).map(|event| (event.flow, event));
        Self { evidence, reports, onward: onward.collect() }
    }

    fn look_at(&mut self, cell: &Cell, sight: &Sight) -> Vec<(Check, String)> {
        match sight.will {
            Will::Redirect => self.redirected(cell, sight),
            Will::BlockAsked => self.blocked_as_asked(cell, sight),
            Will::BlockOnward => self.blocked_onward(cell, sight),
        }
    }

    /// The report about this flow.
    fn claim(&mut self, cell: &Cell, sight: &Sight) -> Result<(Place, &'a Report), String> {
        if let Err(errno) = sight.begun {
            return Err(format!("the client failed: {errno}"));
        }
        let local = sight.local.map_err(|errno| format!("getsockname() failed: {errno}"))?;
        let key = (cell.protocol.number(), sight.pid, local.port(), canonical(sight.to));
        let found = self.reports.get_mut(&key).filter(|reports| !reports.is_empty());
        found.map(|reports| reports.remove(0)).ok_or_else(|| "no service saw it".to_owned())
    }

    fn redirected(&mut self, cell: &Cell, sight: &Sight) -> Vec<(Check, String)> {
        let mut faults = Faults::default();
        let (place, report) = match self.claim(cell, sight) {
            Ok(claimed) => claimed,
            Err(fault) => return vec![(Check::Redirected, fault)],
        };
        faults.equal(Check::Redirected, "the service", place, cell.place);
        let at = report.local.ip().to_canonical();
        if !place.addresses().contains(&at) {
            faults.add(Check::Redirected, format!("the service was reached at {at}"));
        }
        let context = report.context.as_deref().map(String::from_utf8_lossy);
        let given = cell.place.context();
        faults.equal(Check::Context, "it", context, Some(String::from_utf8_lossy(&given)));
        self.record(cell, report, &mut faults);
        faults.equal(Check::OriginalDestination, "it", report.original, sight.to);
        let owner = (report.pid, report.uid);
        faults.equal(Check::Application, "pid and uid", owner, (sight.pid, cell.user.id()));
        let peer = match cell.protocol {
            Protocol::Tcp | Protocol::ConnectedUdp => Ok(sight.to),
            Protocol::Udp => Err(Errno(libc::ENOTCONN)),
        };
        faults.equal(Check::PeerName, "it", sight.peer, peer);
        match &sight.answer {
            Some(Ok((_, Some(source)))) => {
                faults.equal(Check::ReplySource, "it", *source, sight.to);
            }
            Some(Ok((_, None))) | None => {}
            Some(Err(errno)) if cell.protocol != Protocol::Tcp => {
                faults.add(Check::ReplySource, format!("no answer: {errno}"));
            }
            Some(Err(_)) => {}
        }
        self.arrival(cell, sight, report, &mut faults);
        faults.0
    }

    fn record(&self, cell: &Cell, report: &Report, faults: &mut Faults) {
        let mut services = self.evidence.services.iter();
        let handle =
            services.find(|(place, ..)| *place == cell.place).map(|(_, handle, ..)| *handle);
        let record = report.parsed();
        let named: Vec<u64> =
            record.hops.iter().take(record.hop_count as usize).map(|hop| hop.handle).collect();
        faults.equal(Check::Records, "the record's services", named, Vec::from_iter(handle));
        faults.equal(Check::Records, "the record's flow", record.flow, report.flow);
        faults.equal(Check::Records, "the service's handle", Some(report.handle), handle);
    }

    fn arrival(&self, cell: &Cell, sight: &Sight, report: &Report, faults: &mut Faults) {
        let destination = canonical(sight.to);
        if cell.destination == Destination::Nobody {
            let refused = Err(libc::ENETUNREACH);
            faults.equal(Check::Arrival, "the way onwards", report.onward, refused);
            match self.onward.get(&report.flow) {
                None => faults.add(Check::Arrival, "the engine saw no leg onwards".into()),
                Some(event) => {
                    let requested = canonical(event.requested.into());
                    faults.equal(Check::Arrival, "the leg onwards", requested, destination);
                }
            }
            return;
        }
        let onward = match report.onward {
            Ok(onward) => canonical(onward),
            Err(errno) => {
                faults.add(Check::Arrival, format!("the way onwards failed: {}", Errno(errno)));
                return;
            }
        };
        let arrived = match cell.protocol {
            Protocol::Tcp => self
                .evidence
                .connections
                .iter()
                .filter(|one| (canonical(one.peer), canonical(one.local)) == (onward, destination))
                .count(),
            _ => self
                .evidence
                .datagrams
                .iter()
                .filter(|one| (canonical(one.peer), canonical(one.local)) == (onward, destination))
                .filter(|one| one.payload == sight.marker)
                .count(),
        };
        faults.equal(Check::Arrival, "times that it arrived", arrived, 1);
        let expected = expected_answer(cell.protocol, sight.to, &sight.marker);
        match &sight.answer {
            Some(Ok((bytes, _))) => {
                let text = String::from_utf8_lossy;
                faults.equal(Check::Arrival, "the answer", text(bytes), text(&expected));
            }
            Some(Err(errno)) => faults.add(Check::Arrival, format!("no answer: {errno}")),
            None => faults.add(Check::Arrival, "no answer was waited for".into()),
        }
    }

    fn blocked_as_asked(&self, cell: &Cell, sight: &Sight) -> Vec<(Check, String)> {
        let mut faults = Faults::default();
        let call = if cell.protocol == Protocol::Udp { "sendto()" } else { "connect()" };
        faults.equal(Check::Authorisation, call, sight.begun, Err(Errno(libc::EPERM)));
        self.nothing_arrived(cell, sight, &mut faults);
        faults.0
    }

    fn blocked_onward(&mut self, cell: &Cell, sight: &Sight) -> Vec<(Check, String)> {
        let mut faults = Faults::default();
        match self.claim(cell, sight) {
            Ok((place, report)) => {
                faults.equal(Check::Authorisation, "the service", place, cell.place);
                let refused = Err(libc::EPERM);
                faults.equal(Check::Authorisation, "the way onwards", report.onward, refused);
            }
            Err(fault) => faults.add(Check::Authorisation, fault),
        }
        self.nothing_arrived(cell, sight, &mut faults);
        faults.0
    }

    /// Nobody has the port of a blocked flow for anything else.
    fn nothing_arrived(&self, cell: &Cell, sight: &Sight, faults: &mut Faults) {
        let Evidence { connections, datagrams, .. } = self.evidence;
        let to = canonical(sight.to);
        let arrived = match cell.protocol {
            Protocol::Tcp => connections.iter().any(|one| canonical(one.local) == to),
            _ => datagrams.iter().any(|one| one.payload == sight.marker),
        };
        if arrived {
            faults.add(Check::Authorisation, format!("something arrived at {to}"));
        }
    }

    /// What no cell explains.
    fn leftovers(&self) -> Vec<String> {
        let unclaimed = self.reports.values().flatten().map(|(place, report)| {
            format!("beyond all cells, the service on {place} saw {report:?}")
        });
        let said = self.evidence.services.iter().flat_map(|(place, _, _, lines)| {
            lines.iter().map(move |line| format!("the service on {place} said {line:?}"))
        });
        let loops = self.evidence.counters.iter().filter(|(counter, value)| {
            let never = [
                Counter::Loops,
                Counter::Forgotten,
                Counter::OutOfMemory,
                Counter::HandoverFailed,
                Counter::EventsLost,
            ];
            never.contains(counter) && *value > 0
        });
        let counted =
            loops.map(|(counter, value)| format!("the engine counted {counter:?} {value}"));
        unclaimed.chain(said).chain(counted).collect()
    }
}

/// What is wrong with a flow.
#[derive(Default)]
struct Faults(Vec<(Check, String)>);

impl Faults {
    fn add(&mut self, check: Check, fault: String) {
        self.0.push((check, fault));
    }

    /// Two things that have to be the same.
    fn equal<T: PartialEq + fmt::Debug>(&mut self, check: Check, what: &str, found: T, due: T) {
        if found != due {
            self.add(check, format!("{what} is {found:?} instead of {due:?}"));
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Redirected => "redirected",
            Self::Context => "context",
            Self::Records => "records",
            Self::OriginalDestination => "original destination",
            Self::Application => "original application",
            Self::PeerName => "getpeername",
            Self::ReplySource => "reply source",
            Self::Arrival => "arrival",
            Self::Authorisation => "authorisation",
        })
    }
}

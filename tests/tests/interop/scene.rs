//! A chain of services over a lab, and the check that each flow passed each of them once.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use carnet_core::{
    event::Counter,
    object::{Conditions, PortRange},
};
use carnet_testbed::{NetworkNamespace, Topology};
use carnet_tests::{
    Lab, Plan, Running,
    web::{self, Fetched, WebServer, path_of},
};

use crate::{
    far_side::FarSide,
    product::{AtWork, Logged, Onwards, Product},
};

/// How long a program may take to write its log.
const LOG_PATIENCE: Duration = Duration::from_secs(30);
/// The first one's port.
const FIRST_PORT: u16 = 15_001;

/// Who is in a chain.
#[derive(Clone, Copy)]
pub(crate) enum Member {
    Product(&'static Product),
    /// The tests' own service, which co-operates.
    Honest,
}

impl Member {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Product(product) => product.name,
            Self::Honest => "co-operating",
        }
    }

    /// Where the flows go that it passes on.
    fn onwards(self) -> Onwards {
        match self {
            Self::Product(product) => product.onwards,
            Self::Honest => Onwards::ToDestination,
        }
    }

    /// The proxy through which it passes them on.
    fn upstream(self) -> Option<SocketAddr> {
        match self.onwards() {
            Onwards::Through(upstream) => Some(upstream),
            Onwards::ToDestination | Onwards::Shared => None,
        }
    }

    /// What it needs on the other side of the cable.
    fn far_side(self) -> Option<fn(&NetworkNamespace) -> FarSide> {
        match self {
            Self::Product(product) => product.far_side,
            Self::Honest => None,
        }
    }
}

/// One at work.
enum Program {
    Product(AtWork),
    Honest(Running),
}

impl Program {
    /// What it has logged so far.
    #[track_caller]
    fn logged(&self) -> Vec<Logged> {
        match self {
            Self::Product(program) => program.logged(),
            Self::Honest(program) => {
                let reports = program.reports(0).into_iter();
                reports.map(|report| Logged { to: report.original, path: None }).collect()
            }
        }
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let Self::Product(program) = self else { return String::new() };
        let log = program.log();
        format!("its log ends with {:#?}", &log[log.len().saturating_sub(5)..])
    }
}

/// A service of a chain.
pub(crate) struct Link {
    pub(crate) name: String,
    member: Member,
    program: Option<Program>,
    /// How many flows it has logged that have been looked at.
    looked_at: usize,
}

impl Link {
    /// What it has logged that has not been looked at. Of one that was killed nothing.
    #[track_caller]
    pub(crate) fn logged(&mut self) -> Vec<Logged> {
        let logged = self.program.as_ref().map_or_else(Vec::new, Program::logged);
        let new = logged[self.looked_at.min(logged.len())..].to_vec();
        self.looked_at = logged.len();
        new
    }
}

/// A chain of services between the lab's clients and a web server.
pub(crate) struct Scene {
    // In the order in which they are to go.
    pub(crate) links: Vec<Link>,
    /// What one of them needs there.
    far_side: Option<FarSide>,
    pub(crate) server: WebServer,
    pub(crate) lab: Lab,
}

impl Scene {
    /// Starts these services, the first one first, with failure policy and all.
    #[track_caller]
    pub(crate) fn new(members: &[Member]) -> Self {
        Self::with(members, &Plan::default())
    }

    /// The same, with more of the plan.
    #[track_caller]
    pub(crate) fn with(members: &[Member], plan: &Plan) -> Self {
        let lab = Lab::new();
        let destination = &lab.network().topology.destination;
        let addresses = [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()];
        let server = WebServer::start(destination, &addresses);
        let far_side = members.iter().find_map(|member| member.far_side());
        let far_side = far_side.map(|start| start(destination));
        let mut scene = Self { links: Vec::new(), far_side, server, lab };
        for (place, member) in members.iter().enumerate() {
            let name = format!("{}-{}", member.name(), place + 1);
            let weight = 100 - place as u16;
            let plan = Self::plan(members, place, Plan { weight, ..plan.clone() });
            scene.lab.service_with(&name, plan);
            scene.links.push(Link { name, member: *member, program: None, looked_at: 0 });
            scene.start(place);
        }
        scene
    }

    /// What the service at a place gets: what goes to the web server, and to the upstream of a service
    /// before it, or of its own.
    fn plan(members: &[Member], place: usize, plan: Plan) -> Plan {
        let upstreams = members[..=place].iter().filter_map(|member| member.upstream());
        let ports = upstreams.map(|upstream| upstream.port()).chain([web::PORT]);
        let ports = ports.map(|port| PortRange::new(port, port).expect("a range")).collect();
        let plan = Plan { conditions: Conditions { ports, ..Conditions::default() }, ..plan };
        match members[place] {
            Member::Product(product) if product.unmodified => Plan {
                unmodified: true,
                listen_port: port_of(place).try_into().ok(),
                tproxy: product.tproxy,
                ..plan
            },
            _ => plan,
        }
    }

    /// Starts a service of the chain, or starts it anew.
    #[track_caller]
    pub(crate) fn start(&mut self, place: usize) {
        let Link { name, member, .. } = &self.links[place];
        let program = match member {
            Member::Product(product) => {
                let far_side = self.far_side.as_ref();
                let far_side = far_side.map_or("", |far_side| &far_side.configuration);
                Program::Product(AtWork::start(&self.lab, name, product, port_of(place), far_side))
            }
            Member::Honest => Program::Honest(self.lab.start(name)),
        };
        self.links[place].program = Some(program);
        self.links[place].looked_at = 0;
    }

    /// Kills one.
    #[track_caller]
    pub(crate) fn kill(&mut self, place: usize) {
        match self.links[place].program.take() {
            Some(Program::Product(program)) => program.kill(),
            Some(Program::Honest(program)) => program.kill(),
            None => {}
        }
    }

    /// The processes of the services.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let programs = self.links.iter().filter_map(|link| link.program.as_ref());
        programs
            .map(|program| match program {
                Program::Product(program) => program.id(),
                Program::Honest(program) => program.id(),
            })
            .collect()
    }

    /// Leaves out of account what is in the logs by now, once all flows are over.
    #[track_caller]
    pub(crate) fn skip_logs(&mut self) {
        self.lab.settle();
        for link in &mut self.links {
            // They may still be written.
            let mut before = usize::MAX;
            while let Some(program) = &link.program
                && program.logged().len() != before
            {
                before = program.logged().len();
                thread::sleep(Duration::from_millis(500));
            }
            link.looked_at = link.program.as_ref().map_or(0, |program| program.logged().len());
        }
    }

    /// Carries out flows, all of which have to arrive, and checks that each passed each service of the
    /// chain that is at work once, as its own log says.
    #[track_caller]
    pub(crate) fn fetch(&mut self, plan: &web::Plan) -> Result<(), String> {
        self.server.forget();
        let fetched = web::fetch(&self.lab, plan);
        self.check(plan, &fetched)
    }

    /// Checks what became of flows that were to arrive.
    #[track_caller]
    pub(crate) fn check(&mut self, plan: &web::Plan, fetched: &[Fetched]) -> Result<(), String> {
        let failed: Vec<_> = fetched.iter().filter(|flow| flow.failure.is_some()).collect();
        if let Some(first) = failed.first() {
            return Err(format!("{} of {} flows failed: {first:?}", failed.len(), plan.count));
        }
        self.lab.settle_but_for(&[]);
        let due: BTreeMap<String, usize> =
            (plan.first..plan.first + plan.count).map(|flow| (path_of(flow), 1)).collect();
        let arrived = tally(self.server.requests().into_iter().map(|request| request.path));
        compare("the web server", &arrived, &due)?;
        let mut to: Vec<SocketAddr> = plan.to.iter().map(canonical).collect();
        for link in &mut self.links {
            let Some(program) = &link.program else { continue };
            let looked_at = link.looked_at;
            let logged = || program.logged().split_off(looked_at);
            // Nothing announces that a log is written.
            let deadline = Instant::now() + LOG_PATIENCE;
            let mut seen = logged();
            while seen.len() < plan.count as usize && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
                seen = logged();
            }
            if seen.len() < plan.count as usize {
                let (name, count) = (&link.name, seen.len());
                return Err(format!("{name} has logged {count} flows; {}", program.last_words()));
            }
            let logged = seen;
            link.looked_at += logged.len();
            let paths: Vec<_> = logged.iter().filter_map(|one| one.path.clone()).collect();
            if !paths.is_empty() {
                compare(&link.name, &tally(paths.into_iter()), &due)?;
            }
            let found = tally(logged.iter().map(|one| canonical(&one.to).to_string()));
            let turns = (0..plan.count as usize).map(|flow| to[flow % to.len()].to_string());
            compare(&link.name, &found, &tally(turns))?;
            match link.member.onwards() {
                Onwards::ToDestination => {}
                Onwards::Through(upstream) => to = vec![upstream],
                Onwards::Shared => break,
            }
        }
        let never = [Counter::Loops, Counter::OutOfMemory, Counter::HandoverFailed];
        for counter in never {
            let count = self.lab.counter(counter);
            if count > 0 {
                return Err(format!("the engine counted {counter:?} {count}"));
            }
        }
        Ok(())
    }
}

/// The port of a product at this place of a chain.
pub(crate) fn port_of(place: usize) -> u16 {
    FIRST_PORT + place as u16
}

fn canonical(address: &SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn tally(words: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    words.for_each(|word| *tally.entry(word).or_default() += 1);
    tally
}

/// What somebody saw, and what was due.
fn compare(
    who: &str,
    seen: &BTreeMap<String, usize>,
    due: &BTreeMap<String, usize>,
) -> Result<(), String> {
    let times = |of: &BTreeMap<String, usize>, what: &String| of.get(what).copied().unwrap_or(0);
    let differs = seen.keys().chain(due.keys()).find(|what| times(seen, what) != times(due, what));
    match differs {
        None => Ok(()),
        Some(what) => Err(format!(
            "{who} saw {what} {} times instead of {}",
            times(seen, what),
            times(due, what)
        )),
    }
}

//! `carnet demo`: what Carnet does, shown on real connections, with nothing installed and nothing
//! left behind.
//!
//! | module | what it holds |
//! |---|---|
//! | [`privilege`] | becoming root, where the kernel wants it |
//! | [`interruption`] | Ctrl-C: cleaning up all the same |
//! | [`stage`] | networks, cgroup, BPF file system, engine, services; all of it goes in the end |
//! | [`destination`] | the HTTP and the TLS server |
//! | [`client`] | the application, a process of its own |
//! | [`story`] | what became of a flow, and whether it is what is claimed |
//! | [`report`], [`page`] | the facts, as JSON and for people |
//!
//! It claims nothing that it has not checked: where a claim does not hold, it says which and fails.

mod client;
mod destination;
mod interruption;
mod page;
mod privilege;
mod report;
mod stage;
mod story;

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use carnet_core::object::FailurePolicy;
use carnet_testbed::Topology;

use self::{
    client::{Answer, Plan},
    destination::{HOST, HTTP, HTTPS},
    interruption::Interruption,
    page::Page,
    report::{Flow, Part, Report, Service},
    stage::{Stage, VENDORS},
    story::{Course, Evidence},
};
use crate::{failure::Failure, session::Session};

const ALPHA: &str = VENDORS[0].service;
const BETA: &str = VENDORS[1].service;
/// How a flow goes when nothing is wrong.
const BOTH: Course = Course::Through { services: &[ALPHA, BETA], skipped: &[] };

/// Show on this machine what Carnet does, and leave nothing behind
///
/// Makes a cgroup and network namespaces of its own, in them a web server, an application and two
/// inspection services of two vendors; makes real connections; and shows which way each of them
/// took: with both services, with one of them dead, and without redirect records. Everything that
/// is shown is checked; the exit status is 0 only if all of it came as it should.
///
/// The instance and the BPF file system are the demonstration's own, too, whatever is running here.
/// Where it needs root and is not, it starts itself again with sudo.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Be the demonstration's application
    #[arg(long, hide = true, value_name = "PLAN")]
    client: Option<Plan>,
}

/// JSON: [`Report`].
pub(crate) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    if let Some(plan) = &arguments.client {
        client::run(plan, session)?;
        return Ok(0);
    }
    privilege::obtain(session)?;
    let interruption = Interruption::await_signals()?;
    let report = perform(&interruption);
    if let Some(signal) = interruption.signal() {
        session.console.note("interrupted; everything that was made is removed")?;
        return Ok(u8::try_from(128 + signal).unwrap_or(u8::MAX));
    }
    let report = report?;
    if session.global.json {
        session.console.json(&report)?;
    } else {
        session.console.line(Page { report: &report, next: &next()? })?;
    }
    if report.passed {
        return Ok(0);
    }
    Err(Failure::new("the demonstration did not come as it should")
        .with_hint("carnet doctor says what this machine lacks"))
}

/// The whole demonstration, from the stage's making to its removal.
fn perform(interruption: &Interruption) -> Result<Report, Failure> {
    let mut performance = Performance::begin(interruption)?;
    let parts = vec![
        performance.every_service_once()?,
        performance.a_service_dies()?,
        performance.without_records()?,
    ];
    let services = performance.introduced;
    let left_behind = performance.stage.clear()?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        client: [Topology::CLIENT_V4.into(), Topology::CLIENT_V6.into()],
        destination: [Topology::DESTINATION_V4.into(), Topology::DESTINATION_V6.into()],
        host: HOST,
        services,
        parts,
        left_behind,
        passed: false,
    };
    let passed = report.failed().next().is_none();
    report.passed = passed;
    Ok(report)
}

/// The requests that are made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    HttpOverV4,
    HttpOverV6,
    TlsOverMapped,
}

impl Request {
    const ALL: [Self; 3] = [Self::HttpOverV4, Self::HttpOverV6, Self::TlsOverMapped];

    fn title(self) -> &'static str {
        match self {
            Self::HttpOverV4 => "HTTP over IPv4",
            Self::HttpOverV6 => "HTTP over IPv6",
            Self::TlsOverMapped => "TLS over IPv4 on an IPv6 socket",
        }
    }

    fn plan(self, authority: &[u8]) -> Plan {
        let address: SocketAddr = match self {
            Self::HttpOverV4 => (Topology::DESTINATION_V4, HTTP).into(),
            Self::HttpOverV6 => (Topology::DESTINATION_V6, HTTP).into(),
            Self::TlsOverMapped => (Topology::DESTINATION_V4.to_ipv6_mapped(), HTTPS).into(),
        };
        let authority = (self == Self::TlsOverMapped).then(|| authority.to_owned());
        Plan { address, host: HOST.into(), authority }
    }
}

/// The stage, and what has happened on it.
struct Performance<'a> {
    interruption: &'a Interruption,
    stage: Stage,
    executable: PathBuf,
    /// The responses without Carnet, in the order of [`Request::ALL`].
    direct: Vec<Answer>,
    /// The services as they were started first.
    introduced: Vec<Service>,
    /// The services that run, with their process ids.
    running: Vec<(&'static str, u32)>,
}

impl<'a> Performance<'a> {
    /// Sets the stage up, makes the requests without Carnet, and brings everything up.
    fn begin(interruption: &'a Interruption) -> Result<Self, Failure> {
        let mut stage = Stage::set_up(interruption)?;
        let mut direct = Vec::new();
        for request in Request::ALL {
            interruption.check()?;
            let plan = request.plan(&stage.destination.authority);
            let answer = stage.request(&plan)?.seen.result.map_err(|refusal| {
                Failure::new(format_args!(
                    "{} to {}: even without Carnet there is no response: {}",
                    request.title(),
                    plan.address,
                    refusal.message
                ))
            })?;
            direct.push(answer);
        }
        stage.bring_up()?;
        let executable = executable()?;
        let mut performance =
            Self { interruption, stage, executable, direct, introduced: vec![], running: vec![] };
        for vendor in VENDORS {
            let pid = performance.start(vendor.service, false)?;
            let listeners = performance.stage.listeners(vendor.service);
            performance.introduced.push(Service { vendor, pid, listeners });
        }
        Ok(performance)
    }

    fn every_service_once(&mut self) -> Result<Part, Failure> {
        let mut flows = Vec::new();
        for request in Request::ALL {
            flows.push(self.make(request, request.title(), BOTH)?);
        }
        let title = "Each service sees each connection once, in the operator's order";
        Ok(Part { title, flows })
    }

    fn a_service_dies(&mut self) -> Result<Part, Failure> {
        self.stage.set_on_failure(ALPHA, FailurePolicy::Skip)?;
        self.kill(ALPHA)?;
        let skips = Course::Through { services: &[BETA], skipped: &[ALPHA] };
        let mut flows = vec![self.make(Request::HttpOverV4, "Policy \"skip\"", skips)?];
        self.stage.set_on_failure(ALPHA, FailurePolicy::Block)?;
        let blocks = Course::Unavailable(ALPHA);
        flows.push(self.make(Request::HttpOverV4, "Policy \"block\"", blocks)?);
        Ok(Part { title: "alpha is killed: its failure policy decides, in the kernel", flows })
    }

    fn without_records(&mut self) -> Result<Part, Failure> {
        self.start(ALPHA, true)?;
        let round = Course::Loop(ALPHA);
        let mut flows = vec![self.make(Request::HttpOverV4, "alpha forgets the record", round)?];
        self.kill(ALPHA)?;
        self.start(ALPHA, false)?;
        flows.push(self.make(Request::HttpOverV4, "alpha sets it again", BOTH)?);
        Ok(Part { title: "Why there are redirect records: a service that forgets them", flows })
    }

    /// Makes a request and finds out what became of it.
    fn make(
        &mut self,
        request: Request,
        title: &'static str,
        course: Course,
    ) -> Result<Flow, Failure> {
        self.interruption.check()?;
        let policy = self.stage.policy()?;
        let plan = request.plan(&self.stage.destination.authority);
        let before = self.stage.destination.accepted();
        let application = self.stage.request(&plan)?;
        let events = self.stage.events()?;
        let inspected = self.stage.inspected(&story::deliveries(&events, &policy))?;
        let evidence = Evidence {
            title,
            plan: &plan,
            application,
            executable: &self.executable,
            events,
            inspected,
            reached: self.stage.destination.accepted() - before,
            policy: &policy,
            services: &self.running,
            direct: &self.direct[request as usize],
        };
        Ok(evidence.flow(course))
    }

    fn start(&mut self, service: &'static str, forgetful: bool) -> Result<u32, Failure> {
        self.interruption.check()?;
        let pid = self.stage.start(service, forgetful)?;
        self.running.push((service, pid));
        Ok(pid)
    }

    fn kill(&mut self, service: &str) -> Result<(), Failure> {
        let pid = self.stage.kill(service)?;
        self.running.retain(|(_, running)| *running != pid);
        Ok(())
    }
}

/// This program, which is the application and the services, too.
fn executable() -> Result<PathBuf, Failure> {
    env::current_exe().map_err(|error| Failure::because("finding this program's file", &error))
}

/// What to try next: on the real network, with a program that is on most machines.
fn next() -> Result<String, Failure> {
    let executable = executable()?;
    let here = env::current_dir().ok();
    let short = here.as_deref().and_then(|here| executable.strip_prefix(here).ok());
    let program = short.unwrap_or(&executable);
    Ok(format!("{}{} run -- curl https://example.com", sudo(), shown(program)))
}

/// Names the program without its directory where the shell finds it.
fn shown(program: &Path) -> String {
    let directories = env::var_os("PATH").unwrap_or_default();
    let in_path = program
        .parent()
        .is_some_and(|parent| env::split_paths(&directories).any(|directory| directory == parent));
    match program.file_name() {
        Some(name) if in_path => name.to_string_lossy().into_owned(),
        _ => program.display().to_string(),
    }
}

/// Whoever came here through sudo goes on with it.
fn sudo() -> &'static str {
    if env::var_os("SUDO_UID").is_some() { "sudo " } else { "" }
}

/// The testbed's errors name what was attempted.
impl From<carnet_testbed::Error> for Failure {
    fn from(error: carnet_testbed::Error) -> Self {
        Self::because("setting the demonstration up", &error)
    }
}

//! What the demonstration runs on, made for it alone: networks, a cgroup, a BPF file system, an
//! engine, a destination and two services. All of it goes when [`Stage`] does.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use carnet_core::{
    event::{Event, EventKind},
    object::{
        Conditions, FailurePolicy, FilterAction, NewFilter, NewService, Policy, PortRange,
        Protocol, Weight,
    },
};
use carnet_engine::{Engine, EventReader, Location, UpOptions};
use carnet_testbed::{BpfDirectory, Cgroup, Process, Topology};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    process::Signal,
};

use super::{
    client::{Plan, Seen},
    destination::{self, Destination},
    executable,
    interruption::Interruption,
    report::{Inspected, Vendor},
};
use crate::{failure::Failure, lookup};

/// Begins the names of everything that the demonstration makes.
const PREFIX: &str = "carnet-demo";
/// The engine's instance.
const INSTANCE: &str = "demo";
/// How long a service may take to start, to end, or to write its log.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of what a service says on its standard error is looked at, in bytes.
const LONGEST_COMPLAINT: usize = 16 * 1024;
/// Whom the services become: `nobody` everywhere, and no matter if nobody is called so.
const UNPRIVILEGED: &str = "65534:65534";

/// The vendors, each with its provider, sublayer, service and filter, in the operator's order.
pub(super) const VENDORS: [Vendor; 2] = [
    Vendor {
        provider: "alpha-security",
        title: "Alpha Security",
        sublayer: "alpha-sublayer",
        weight: 200,
        service: "alpha",
        filter: "alpha-web",
    },
    Vendor {
        provider: "beta-filters",
        title: "Beta Filters",
        sublayer: "beta-sublayer",
        weight: 100,
        service: "beta",
        filter: "beta-web",
    },
];

/// The stage. Its fields are dropped in this order: processes before what they stand on.
pub(super) struct Stage {
    services: Vec<Service>,
    events: Option<EventReader>,
    engine: Option<Engine>,
    pub(super) destination: Destination,
    application: Cgroup,
    scope: Cgroup,
    pins: BpfDirectory,
    topology: Topology,
    executable: PathBuf,
}

/// A vendor's service: the place where it runs, and its process if it runs.
struct Service {
    vendor: &'static Vendor,
    cgroup: Cgroup,
    running: Option<Running>,
}

/// A process of `carnet inspect`.
struct Running {
    process: Process,
    /// What it says on its standard error.
    complaints: File,
    /// How many lines of its log have been looked at.
    read: usize,
}

/// An application that has done its work.
pub(super) struct Finished {
    /// Its process id.
    pub(super) pid: u32,
    /// What it saw.
    pub(super) seen: Seen,
}

impl Stage {
    /// Makes everything but the engine: nothing is redirected yet.
    pub(super) fn set_up(interruption: &Interruption) -> Result<Self, Failure> {
        let executable = executable()?;
        let topology = Topology::client_and_destination()?;
        interruption.check()?;
        let scope = Cgroup::create(PREFIX)?;
        interruption.kills(&scope);
        let application = scope.child("application")?;
        let services = VENDORS
            .iter()
            .map(|vendor| {
                Ok(Service { vendor, cgroup: scope.child(vendor.service)?, running: None })
            })
            .collect::<Result<_, Failure>>()?;
        let pins = BpfDirectory::create(PREFIX)?;
        let destination = Destination::start_in(&topology.destination)?;
        Ok(Self {
            services,
            events: None,
            engine: None,
            destination,
            application,
            scope,
            pins,
            topology,
            executable,
        })
    }

    /// Brings the engine up, with both vendors' objects: as `carnet up`, `carnet provider add`, …
    pub(super) fn bring_up(&mut self) -> Result<(), Failure> {
        let location = Location::new(Some(self.pins.path().to_owned()), INSTANCE)?;
        let options = UpOptions::new(self.scope.path());
        let mut engine = Engine::up(&location, &options)?;
        let mut cgroups = Vec::new();
        for service in &self.services {
            cgroups.push(lookup::Cgroup::find(service.cgroup.path())?.reference());
        }
        engine.transact(|policy| {
            for (vendor, cgroup) in VENDORS.iter().zip(cgroups) {
                policy.add_provider(vendor.provider, vendor.title)?;
                policy.add_sublayer(vendor.sublayer, vendor.provider, vendor.weight)?;
                policy.add_service(NewService::new(vendor.service, vendor.provider, cgroup))?;
                policy.add_filter(NewFilter {
                    name: Some(vendor.filter.into()),
                    sublayer: vendor.sublayer.into(),
                    weight: Weight::Auto,
                    conditions: web(),
                    action: FilterAction::Redirect {
                        service: vendor.service.into(),
                        context: None,
                    },
                })?;
            }
            Ok::<_, Failure>(())
        })?;
        self.events = Some(engine.events()?);
        self.engine = Some(engine);
        Ok(())
    }

    /// Starts a vendor's service and waits until it is ready; returns its process id. `forgetful`
    /// makes it connect onwards without the redirect record.
    pub(super) fn start(&mut self, name: &str, forgetful: bool) -> Result<u32, Failure> {
        let executable = self.executable.clone();
        let namespace = &self.topology.client;
        let service = find(&mut self.services, name)?;
        let failed = |error| Failure::because(format_args!("starting service {name}"), &error);
        let complaints =
            memfd_create(name, MemfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let standard_error = complaints.try_clone().map_err(failed)?;
        let mut command = Command::new(executable);
        // The log and the word that it is ready come on one stream.
        command
            .args(["inspect", "--log", "json", "--ready-fd", "1", "--workers", "1"])
            .args(["--name", name, "--user", UNPRIVILEGED, "--drain-timeout", "1s"])
            .stderr(Stdio::from(standard_error));
        if forgetful {
            command.arg("--forget-records");
        }
        namespace.enter_command(&mut command)?;
        service.cgroup.enter_command(&mut command)?;
        let process = Process::spawn(&mut command)?;
        let running = Running { process, complaints: complaints.into(), read: 0 };
        let what = format!("service {name} to be ready");
        let ready =
            running.process.wait_for_line(&what, PATIENCE, |line| line.starts_with("ready"));
        if let Err(error) = ready {
            let said = running.complained();
            return Err(Failure::because(format_args!("starting service {name} ({said})"), &error));
        }
        let pid = running.process.id();
        service.running = Some(running);
        Ok(pid)
    }

    /// Kills a service's process, by its id, and returns the id.
    pub(super) fn kill(&mut self, name: &str) -> Result<u32, Failure> {
        let running = find(&mut self.services, name)?.running.take();
        let mut running =
            running.ok_or_else(|| Failure::new(format_args!("service {name} does not run")))?;
        running.process.signal(Signal::KILL)?;
        running.process.wait(PATIENCE)?;
        Ok(running.process.id())
    }

    /// Changes what happens to a service's connections while it is not there.
    pub(super) fn set_on_failure(
        &mut self,
        name: &str,
        on_failure: FailurePolicy,
    ) -> Result<(), Failure> {
        self.engine()?.transact(|policy| {
            policy.set_on_failure(name, on_failure)?;
            Ok(())
        })
    }

    /// The policy, as the kernel has it.
    pub(super) fn policy(&mut self) -> Result<Policy, Failure> {
        Ok(self.engine()?.policy()?)
    }

    /// Runs the application, in its cgroup and namespace, to its end.
    pub(super) fn request(&self, plan: &Plan) -> Result<Finished, Failure> {
        let plan = serde_json::to_string(plan)
            .map_err(|error| Failure::because("telling the application what to do", &error))?;
        let mut command = Command::new(&self.executable);
        command.args(["demo", "--client", &plan]);
        self.topology.client.enter_command(&mut command)?;
        self.application.enter_command(&mut command)?;
        let mut process = Process::spawn(&mut command)?;
        let status = process.wait(2 * PATIENCE)?;
        let seen = process.lines().first().and_then(|line| serde_json::from_str(line).ok());
        match seen {
            Some(seen) if status.success() => Ok(Finished { pid: process.id(), seen }),
            _ => Err(Failure::new(format_args!("the application failed ({status})"))),
        }
    }

    /// What the engine has reported of connections since it was last asked. By the time an
    /// application has ended, all that concerns its flow is there.
    pub(super) fn events(&mut self) -> Result<Vec<Event>, Failure> {
        let reader = self.events.as_mut().ok_or_else(not_up)?;
        let mut events = Vec::new();
        while let Some(event) = reader.next_timeout(Duration::ZERO)? {
            let decides = [
                EventKind::Redirected,
                EventKind::Onward,
                EventKind::Blocked,
                EventKind::RecordForgotten,
                EventKind::RecordRefused,
            ];
            if EventKind::from_number(event.kind).is_some_and(|kind| decides.contains(&kind)) {
                events.push(event);
            }
        }
        Ok(events)
    }

    /// What each running service has logged since it was last asked. Waits until there is a line
    /// for every flow in `flows`: a service writes it when the flow has ended.
    pub(super) fn inspected(&mut self, flows: &[(String, u64)]) -> Result<Vec<Inspected>, Failure> {
        let mut inspected = Vec::new();
        for service in &mut self.services {
            let Some(running) = &mut service.running else {
                continue;
            };
            let name = service.vendor.service;
            let mine: Vec<u64> =
                flows.iter().filter(|(of, _)| of == name).map(|(_, flow)| *flow).collect();
            inspected.extend(running.logged(name, &mine)?);
        }
        Ok(inspected)
    }

    /// Where a service listens.
    pub(super) fn listeners(&self, name: &str) -> Vec<SocketAddr> {
        let running = self.services.iter().find(|s| s.vendor.service == name);
        let lines = running.and_then(|s| s.running.as_ref()).map(|r| r.process.lines());
        let ready = lines.unwrap_or_default().into_iter().find(|line| line.starts_with("ready"));
        let words = ready.unwrap_or_default();
        words.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect()
    }

    /// Takes everything away and says what is left.
    pub(super) fn clear(mut self) -> Result<Vec<String>, Failure> {
        let directories = [self.scope.path().to_owned(), self.pins.path().to_owned()];
        let pids: Vec<u32> = self
            .services
            .iter()
            .filter_map(|service| service.running.as_ref().map(|r| r.process.id()))
            .collect();
        self.services.clear();
        self.events = None;
        if let Some(engine) = self.engine.take() {
            engine.down()?;
        }
        drop(self);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut left: Vec<String> = directories
            .iter()
            .filter(|path| path.exists() || is_mounted(&mounts, path))
            .map(|path| path.display().to_string())
            .collect();
        // A process that was collected has no entry; its number is not given anew that soon.
        left.extend(
            pids.iter()
                .filter(|pid| Path::new(&format!("/proc/{pid}")).exists())
                .map(|pid| format!("process {pid}")),
        );
        Ok(left)
    }

    fn engine(&mut self) -> Result<&mut Engine, Failure> {
        self.engine.as_mut().ok_or_else(not_up)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.services.clear();
        self.events = None;
        // Only where the demonstration ended early; what fails here goes with the pins.
        if let Some(engine) = self.engine.take()
            && let Err(error) = engine.down()
        {
            eprintln!("carnet: taking the demonstration's engine down: {error}");
        }
    }
}

impl Running {
    /// The log's lines that have not been looked at, once there is one for each of `flows`.
    fn logged(&mut self, name: &str, flows: &[u64]) -> Result<Vec<Inspected>, Failure> {
        for flow in flows {
            let what = format!("the line of flow {flow} in the log of service {name}");
            self.process
                .wait_for_line(&what, PATIENCE, |line| {
                    parse(line).is_some_and(|entry| entry.flow == Some(*flow))
                })
                .map_err(|error| {
                    Failure::because(format_args!("service {name} ({})", self.complained()), &error)
                })?;
        }
        let lines = self.process.lines();
        let fresh = lines.get(self.read..).unwrap_or_default();
        let inspected = fresh.iter().filter_map(|line| parse(line)).collect();
        self.read = lines.len();
        Ok(inspected)
    }

    /// The last thing that it said on its standard error.
    fn complained(&self) -> String {
        let mut bytes = vec![0; LONGEST_COMPLAINT];
        // Not read(): the position is the writing process's, too.
        let length = self.complaints.read_at(&mut bytes, 0).unwrap_or_default();
        let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
        text.lines().last().unwrap_or("it said nothing").to_owned()
    }
}

/// Connections to the ports of the web.
fn web() -> Conditions {
    let port = |port| PortRange::new(port, port);
    Conditions {
        protocols: vec![Protocol::TCP],
        ports: [destination::HTTP, destination::HTTPS].into_iter().filter_map(port).collect(),
        ..Conditions::default()
    }
}

fn find<'a>(services: &'a mut [Service], name: &str) -> Result<&'a mut Service, Failure> {
    let found = services.iter_mut().find(|service| service.vendor.service == name);
    found.ok_or_else(|| Failure::new(format_args!("there is no service {name}")))
}

fn parse(line: &str) -> Option<Inspected> {
    serde_json::from_str(line).ok()
}

fn is_mounted(mounts: &str, path: &Path) -> bool {
    let path = path.display().to_string();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(&path))
}

fn not_up() -> Failure {
    Failure::new("the engine is not up")
}

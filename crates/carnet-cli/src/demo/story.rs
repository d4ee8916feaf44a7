//! What became of one flow: puts together what the engine reported, what the services logged, what
//! the application saw and what the destination got, and checks what is claimed of it.

use std::{net::SocketAddr, path::Path};

use carnet_core::{
    abi::errno,
    chain::hop_limit,
    classify::Reason,
    event::{Event, EventKind},
    object::Policy,
};

use super::{
    client::{Answer, NAME as APPLICATION, Plan, Stage as At},
    report::{Application, Carried, Check, Connect, Flow, Inspected, Outcome, Step, Verdict, Why},
    stage::Finished,
};

/// How a flow should go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Course {
    /// Through these services, each once and in this order, to the destination; past those
    /// `skipped`.
    Through {
        /// The services that get it.
        services: &'static [&'static str],
        /// The services that are not there.
        skipped: &'static [&'static str],
    },
    /// Nowhere: this service should have it and is not there.
    Unavailable(&'static str),
    /// Round and round through this service, that forgets the record, until the guard ends it.
    Loop(&'static str),
}

/// What is known of a flow.
pub(super) struct Evidence<'a> {
    pub(super) title: &'static str,
    pub(super) plan: &'a Plan,
    pub(super) application: Finished,
    /// The application's executable.
    pub(super) executable: &'a Path,
    pub(super) events: Vec<Event>,
    pub(super) inspected: Vec<Inspected>,
    /// Connections that the destination got.
    pub(super) reached: usize,
    pub(super) policy: &'a Policy,
    /// The services that run, with their process ids.
    pub(super) services: &'a [(&'static str, u32)],
    /// The response without Carnet.
    pub(super) direct: &'a Answer,
}

impl Evidence<'_> {
    /// The story, with the claims of the course that it should have taken.
    pub(super) fn flow(self, course: Course) -> Flow {
        let mut connects = self.connects();
        let checks = match course {
            Course::Through { services, skipped } => self.through(&connects, services, skipped),
            Course::Unavailable(service) => self.unavailable(&connects, service),
            Course::Loop(service) => self.looped(&connects, service),
        };
        let mut steps = Vec::new();
        let mut inspected = self.inspected;
        for connect in connects.drain(..) {
            let to = match &connect.verdict {
                Verdict::Redirected { service, .. } => Some((service.clone(), connect.flow)),
                Verdict::Onward | Verdict::Refused(_) => None,
            };
            steps.push(Step::Connect(connect));
            let here = |line: &Inspected| {
                to.as_ref()
                    .is_some_and(|(service, flow)| line.service == *service && line.flow == *flow)
            };
            steps.extend(inspected.extract_if(.., |line| here(line)).map(Step::Inspect));
        }
        // Whatever else a service has logged is shown, too.
        steps.extend(inspected.into_iter().map(Step::Inspect));
        let seen = self.application.seen;
        Flow {
            title: self.title,
            url: url(self.plan),
            address: self.plan.address,
            application: Application {
                pid: self.application.pid,
                command: APPLICATION.into(),
                executable: self.executable.to_owned(),
            },
            steps,
            outcome: match seen.result {
                Ok(answer) => Outcome::Response {
                    status: answer.status,
                    bytes: answer.body.len(),
                    identical: answer == *self.direct,
                },
                Err(refusal) => Outcome::Error(refusal),
            },
            peer: seen.peer,
            reached: self.reached,
            checks,
        }
    }

    /// The engine's events as connects.
    fn connects(&self) -> Vec<Connect> {
        let mut connects = Vec::new();
        let mut forgot: Option<u64> = None;
        for event in &self.events {
            let verdict = match EventKind::from_number(event.kind) {
                Some(EventKind::RecordForgotten) => {
                    forgot = Some(event.handle);
                    continue;
                }
                Some(EventKind::Redirected) => Verdict::Redirected {
                    service: self.service(event.handle),
                    filter: self.filter(event.filter),
                },
                Some(EventKind::Onward) => Verdict::Onward,
                Some(EventKind::Blocked) => Verdict::Refused(self.why(event, forgot)),
                _ => continue,
            };
            let forgotten = forgot.take().is_some();
            connects.push(Connect {
                process: self.process(event.pid),
                pid: event.pid,
                verdict,
                record: if forgotten {
                    Carried::Forgotten
                } else if event.pid == self.application.pid {
                    Carried::None
                } else {
                    Carried::Set
                },
                flow: (event.flow != 0).then_some(event.flow),
                legs: event.legs,
                skipped: self.skipped(event.skipped),
            });
        }
        connects
    }

    fn why(&self, event: &Event, forgot: Option<u64>) -> Why {
        match Reason::from_number(event.reason) {
            Reason::ServiceUnavailable => {
                Why::ServiceUnavailable { service: self.service(event.handle) }
            }
            Reason::Loop => Why::Loop { service: self.service(forgot.unwrap_or(event.handle)) },
            Reason::NoFilter | Reason::Filter => Why::Filter,
        }
    }

    fn process(&self, pid: u32) -> String {
        let service = self.services.iter().find(|(_, of)| *of == pid);
        match service {
            Some((name, _)) => (*name).into(),
            None if pid == self.application.pid => APPLICATION.into(),
            None => format!("process {pid}"),
        }
    }

    fn service(&self, handle: u64) -> String {
        let service = self.policy.service_by_handle(handle);
        service.map_or_else(|| format!("service {handle}"), |service| service.name.clone())
    }

    fn filter(&self, id: u64) -> String {
        let name = self.policy.filter_by_id(id).and_then(|filter| filter.name.clone());
        name.unwrap_or_else(|| format!("filter {id}"))
    }

    /// Names of the services in a set of slots, which are numbered as the services are.
    fn skipped(&self, slots: u64) -> Vec<String> {
        let services = self.policy.services().iter().enumerate();
        services
            .filter(|(slot, _)| slots.checked_shr(*slot as u32).is_some_and(|set| set & 1 != 0))
            .map(|(_, service)| service.name.clone())
            .collect()
    }

    /// The claims of a flow that passes through services to the destination.
    fn through(&self, connects: &[Connect], services: &[&str], skipped: &[&str]) -> Vec<Check> {
        let mut checks = vec![check(
            format!("the connection goes through {}, in this order", services.join(", ")),
            self.goes_through(connects, services, skipped),
        )];
        for (service, place) in services.iter().zip(1..) {
            checks.push(check(
                format!(
                    "{service} saw it exactly once, with the application's process and executable"
                ),
                self.saw_once(service, place),
            ));
        }
        checks.extend([
            check("no other service saw it", self.inspected.len() == services.len()),
            check("the destination got exactly one connection", self.reached == 1),
            check(
                "the response is the same, to the byte, as without Carnet",
                self.application.seen.result.as_ref() == Ok(self.direct),
            ),
            check(
                "getpeername() tells the application the destination that it asked for",
                self.application.seen.peer == Some(self.plan.address),
            ),
        ]);
        checks
    }

    fn goes_through(&self, connects: &[Connect], services: &[&str], skipped: &[&str]) -> bool {
        let processes = [APPLICATION].into_iter().chain(services.iter().copied());
        let targets = services.iter().copied().map(Some).chain([None]);
        let flow = connects.first().and_then(|connect| connect.flow);
        connects.len() == services.len() + 1
            && flow.is_some()
            && connects.iter().zip(processes.zip(targets)).all(|(connect, (process, target))| {
                let sent_to = match &connect.verdict {
                    Verdict::Redirected { service, .. } => Some(Some(service.as_str())),
                    Verdict::Onward => Some(None),
                    Verdict::Refused(_) => None,
                };
                connect.process == process
                    && connect.flow == flow
                    && sent_to == Some(target)
                    && connect.record != Carried::Forgotten
            })
            && connects.first().is_some_and(|connect| connect.skipped == skipped)
    }

    fn saw_once(&self, service: &str, place: u32) -> bool {
        let mut lines = self.inspected.iter().filter(|line| line.service == service);
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return false;
        };
        let protocol = if self.plan.authority.is_some() { "tls" } else { "http" };
        line.hops == Some(place)
            && line.pid == Some(self.application.pid)
            && line.command.as_deref() == Some(APPLICATION)
            && line.executable.as_deref() == Some(self.executable)
            && line.destination.map(canonical) == Some(canonical(self.plan.address))
            && line.protocol == protocol
            && line.host.as_deref() == Some(&self.plan.host)
            && line.bytes_down > 0
    }

    /// The claims of a flow whose service is not there.
    fn unavailable(&self, connects: &[Connect], service: &str) -> Vec<Check> {
        let refused = Verdict::Refused(Why::ServiceUnavailable { service: service.into() });
        vec![
            check(
                format!("the connection is refused at once, because {service} is not there"),
                matches!(connects, [only]
                    if only.verdict == refused && only.process == APPLICATION),
            ),
            check(
                "the application's connect() fails with ECONNREFUSED",
                matches!(&self.application.seen.result, Err(refusal)
                    if refusal.at == At::Connect && refusal.errno == Some(errno::ECONNREFUSED)),
            ),
            check("no service saw it", self.inspected.is_empty()),
            check("the destination got no connection", self.reached == 0),
        ]
    }

    /// The claims of a flow that goes round through a service that forgets the record.
    fn looped(&self, connects: &[Connect], forgetful: &str) -> Vec<Check> {
        let most = hop_limit(self.policy.services().len() as u32) as usize;
        let ended = Verdict::Refused(Why::Loop { service: forgetful.into() });
        let (last, legs) = match connects {
            [legs @ .., last] => (Some(last), legs),
            [] => (None, connects),
        };
        let again = |connect: &Connect| match &connect.verdict {
            Verdict::Redirected { service, .. } => service == forgetful,
            Verdict::Onward | Verdict::Refused(_) => false,
        };
        let forgot = |connect: &Connect| {
            connect.record == Carried::Forgotten && connect.process == forgetful
        };
        vec![
            check(
                format!("without the record, {forgetful} gets its own connections again and again"),
                legs.len() > 1 && legs.iter().all(again) && legs.iter().skip(1).all(forgot),
            ),
            check(
                format!("the guard ends it within {most} legs, and names {forgetful}"),
                legs.len() <= most
                    && last.is_some_and(|last| last.verdict == ended && forgot(last)),
            ),
            check("the application gets an error", self.application.seen.result.is_err()),
            check(
                "no other service saw it",
                self.inspected.iter().all(|line| line.service == forgetful),
            ),
            check("the destination got no connection", self.reached == 0),
        ]
    }
}

/// The services that got the flows of these events, each with the flow.
pub(super) fn deliveries(events: &[Event], policy: &Policy) -> Vec<(String, u64)> {
    let redirected =
        events.iter().filter(|e| EventKind::from_number(e.kind) == Some(EventKind::Redirected));
    redirected
        .filter_map(|event| {
            let service = policy.service_by_handle(event.handle)?;
            Some((service.name.clone(), event.flow))
        })
        .collect()
}

fn check(claim: impl Into<String>, holds: bool) -> Check {
    Check { claim: claim.into(), holds }
}

fn url(plan: &Plan) -> String {
    let scheme = if plan.authority.is_some() { "https" } else { "http" };
    format!("{scheme}://{}/", plan.host)
}

/// The address, an IPv4-mapped one as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use carnet_core::{
        address::Endpoint,
        object::{
            CgroupRef, Conditions, FailurePolicy, FilterAction, NewFilter, NewService, Weight,
        },
    };

    use super::*;
    use crate::demo::client::{Refusal, Seen};

    const APP: u32 = 100;
    const SERVICES: [(&str, u32); 2] = [("alpha", 101), ("beta", 102)];
    const BOTH: Course = Course::Through { services: &["alpha", "beta"], skipped: &[] };

    fn policy() -> Policy {
        let mut policy = Policy::new();
        policy.add_provider("vendor", "").unwrap();
        policy.add_sublayer("sublayer", "vendor", 1).unwrap();
        for (id, (name, _)) in SERVICES.iter().enumerate() {
            let cgroup = CgroupRef { path: format!("/{name}"), id: id as u64 + 1 };
            let new = NewService::new(*name, "vendor", cgroup);
            policy.add_service(NewService { on_failure: FailurePolicy::Skip, ..new }).unwrap();
            policy
                .add_filter(NewFilter {
                    name: Some((*name).into()),
                    sublayer: "sublayer".into(),
                    weight: Weight::Auto,
                    conditions: Conditions::default(),
                    action: FilterAction::Redirect { service: (*name).into(), context: None },
                })
                .unwrap();
        }
        policy
    }

    fn event(policy: &Policy, kind: EventKind, pid: u32, service: &str) -> Event {
        Event {
            kind: kind as u32,
            reason: Reason::Filter as u32,
            flow: 7,
            handle: policy.service(service).map_or(0, |service| service.handle),
            pid,
            requested: Endpoint::v4(u32::from_ne_bytes([192, 0, 2, 2]), 80),
            ..Event::default()
        }
    }

    fn logged(service: &str, place: u32) -> Inspected {
        Inspected {
            service: service.into(),
            flow: Some(7),
            hops: Some(place),
            pid: Some(APP),
            command: Some(APPLICATION.into()),
            executable: Some("/carnet".into()),
            destination: "192.0.2.2:80".parse().ok(),
            protocol: "http".into(),
            host: Some("shop.example".into()),
            alpn: vec![],
            request: Some("GET / HTTP/1.1".into()),
            bytes_up: 1,
            bytes_down: 2,
            ended: None,
        }
    }

    fn answer() -> Answer {
        Answer { status: 200, headers: vec![], body: "hello".into() }
    }

    /// The claims that do not hold of what really happened and what should have.
    fn broken(
        course: Course,
        events: impl Fn(&Policy) -> Vec<Event>,
        inspected: Vec<Inspected>,
        result: Result<Answer, Refusal>,
        reached: usize,
    ) -> Vec<String> {
        let policy = policy();
        let address = "192.0.2.2:80".parse().unwrap();
        let plan = Plan { address, host: "shop.example".into(), authority: None };
        let evidence = Evidence {
            title: "a flow",
            plan: &plan,
            application: Finished { pid: APP, seen: Seen { peer: Some(address), result } },
            executable: Path::new("/carnet"),
            events: events(&policy),
            inspected,
            reached,
            policy: &policy,
            services: &SERVICES,
            direct: &answer(),
        };
        let checks = evidence.flow(course).checks;
        checks.into_iter().filter(|check| !check.holds).map(|check| check.claim).collect()
    }

    fn through_both(policy: &Policy) -> Vec<Event> {
        vec![
            event(policy, EventKind::Redirected, APP, "alpha"),
            event(policy, EventKind::Redirected, 101, "beta"),
            event(policy, EventKind::Onward, 102, ""),
        ]
    }

    #[test]
    fn a_flow_through_both_services_is_believed() {
        let lines = vec![logged("alpha", 1), logged("beta", 2)];
        assert_eq!(broken(BOTH, through_both, lines, Ok(answer()), 1), [""; 0]);
    }

    #[test]
    fn what_is_not_as_claimed_is_found() {
        let lines = || vec![logged("alpha", 1), logged("beta", 2)];
        let twice = vec![logged("alpha", 1), logged("alpha", 1), logged("beta", 2)];
        assert_eq!(broken(BOTH, through_both, twice, Ok(answer()), 1).len(), 2);
        let other = Answer { body: "hullo".into(), ..answer() };
        let found = broken(BOTH, through_both, lines(), Ok(other), 1);
        assert_eq!(found, ["the response is the same, to the byte, as without Carnet"]);
        let found = broken(BOTH, through_both, lines(), Ok(answer()), 2);
        assert_eq!(found, ["the destination got exactly one connection"]);
        let stranger = Inspected { pid: Some(APP + 50), ..logged("beta", 2) };
        let found = broken(BOTH, through_both, vec![logged("alpha", 1), stranger], Ok(answer()), 1);
        assert!(found.len() == 1 && found[0].starts_with("beta saw it exactly once"), "{found:?}");
        let swapped = |policy: &Policy| {
            let mut events = through_both(policy);
            events.swap(0, 1);
            events
        };
        let found = broken(BOTH, swapped, lines(), Ok(answer()), 1);
        assert_eq!(found, ["the connection goes through alpha, beta, in this order"]);
    }

    #[test]
    fn a_loop_has_to_be_ended_and_blamed_on_the_forgetful() {
        let error = || Err(Refusal { at: At::Http, errno: Some(104), message: "reset".into() });
        let round = |ended: bool| {
            move |policy: &Policy| {
                let mut events = vec![event(policy, EventKind::Redirected, APP, "alpha")];
                for _ in 0..4 {
                    events.push(event(policy, EventKind::RecordForgotten, 101, "alpha"));
                    events.push(event(policy, EventKind::Redirected, 101, "alpha"));
                }
                if ended {
                    events.push(event(policy, EventKind::RecordForgotten, 101, "alpha"));
                    let refused = event(policy, EventKind::Blocked, 101, "alpha");
                    events.push(Event { reason: Reason::Loop as u32, ..refused });
                }
                events
            }
        };
        let course = Course::Loop("alpha");
        assert_eq!(broken(course, round(true), vec![logged("alpha", 1)], error(), 0), [""; 0]);
        assert_eq!(broken(course, round(false), vec![], error(), 0).len(), 1);
        let found = broken(course, round(true), vec![logged("beta", 1)], Ok(answer()), 1);
        assert_eq!(found.len(), 3, "{found:?}");
    }

    #[test]
    fn a_refusal_has_to_come_from_the_engine() {
        let refused = |errno| Err(Refusal { at: At::Connect, errno, message: String::new() });
        let blocked = |policy: &Policy| {
            let event = event(policy, EventKind::Blocked, APP, "alpha");
            vec![Event { reason: Reason::ServiceUnavailable as u32, ..event }]
        };
        let course = Course::Unavailable("alpha");
        assert_eq!(broken(course, blocked, vec![], refused(Some(111)), 0), [""; 0]);
        assert_eq!(broken(course, blocked, vec![], refused(Some(113)), 0).len(), 1);
        assert_eq!(broken(course, |_| vec![], vec![], refused(Some(111)), 0).len(), 1);
    }
}

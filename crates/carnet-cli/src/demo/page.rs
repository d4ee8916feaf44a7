//! The report as a page for people, at most [`WIDTH`] columns wide.

use std::{fmt, net::IpAddr};

use anstyle::Style;

use super::{
    client::Stage,
    report::{
        Carried, Connect, Flow, Inspected, Outcome, Part, Report, Service, Step, Verdict, Why,
    },
};
use crate::console::{BAD, FAINT, GOOD, HEADING, WARNING, plain, styled};

/// Columns of the narrowest terminal that is cared for.
const WIDTH: usize = 80;
/// Column at which it stands what became of a connect.
const MIDDLE: usize = 50;
/// How many connects of one flow are shown at its begin and at its end; what lies between is
/// counted.
const SHOWN: usize = 2;

/// The page.
pub(super) struct Page<'a> {
    pub(super) report: &'a Report,
    /// The command to try next.
    pub(super) next: &'a str,
}

impl fmt::Display for Page<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.report;
        writeln!(
            f,
            "Carnet {} on Linux {}\nThe stage, made for this demonstration and gone afterwards:\n",
            report.version, report.kernel
        )?;
        let place = |name: &str, [v4, v6]: [IpAddr; 2]| {
            format!("  {name:<12} {:<27}", format!("{v4}, {v6}"))
        };
        writeln!(f, "{}an application, and two services:", place("client", report.client))?;
        for service in &report.services {
            writeln!(f, "{}", introduced(service))?;
        }
        writeln!(f, "{}an HTTP and a TLS server", place("destination", report.destination))?;
        writeln!(
            f,
            "\nEach vendor has a filter that takes the connections to ports 80 and 443.\n\
             The operator has said who comes first: the heavier sublayer. Each connection\n\
             brings its service a redirect record; the service sets it on the socket with\n\
             which it connects onwards, and so the kernel knows who has seen the flow."
        )?;
        for (part, number) in report.parts.iter().zip(1..) {
            write_part(f, part, number)?;
        }
        writeln!(f)?;
        if report.passed {
            writeln!(
                f,
                "{} All of this was checked as it happened, and nothing is left behind.",
                styled(GOOD, "ok")
            )?;
        } else {
            for failed in report.failed() {
                writeln!(f, "{} {}", styled(BAD, "failed"), plain(failed))?;
            }
        }
        write!(f, "{} {}", styled(HEADING, "Try next:"), plain(self.next))
    }
}

fn introduced(service: &Service) -> String {
    let Service { vendor, pid, .. } = service;
    format!(
        "    {:<10} of {}, in a sublayer of weight {} (pid {pid})",
        vendor.service, vendor.title, vendor.weight
    )
}

fn write_part(f: &mut fmt::Formatter<'_>, part: &Part, number: usize) -> fmt::Result {
    writeln!(f, "\n{}", styled(HEADING, format_args!("{number}. {}", part.title)))?;
    for flow in &part.flows {
        writeln!(f)?;
        writeln!(f, "{}: {} at {}", flow.title, plain(&flow.url), flow.address)?;
        write_steps(f, flow)?;
        write_outcome(f, flow)?;
    }
    Ok(())
}

fn write_steps(f: &mut fmt::Formatter<'_>, flow: &Flow) -> fmt::Result {
    let connects = flow.steps.iter().filter(|step| matches!(step, Step::Connect(_))).count();
    let hidden = connects.saturating_sub(2 * SHOWN);
    let mut number = 0;
    for step in &flow.steps {
        match step {
            Step::Connect(connect) => {
                number += 1;
                if hidden == 0 || number <= SHOWN || number > connects - SHOWN {
                    writeln!(f, "{}", connected(connect, flow))?;
                } else if number == SHOWN + 1 {
                    writeln!(
                        f,
                        "  {}",
                        styled(FAINT, format_args!("... {hidden} more like this"))
                    )?;
                }
            }
            // In a loop it is of no interest what the service saw each time.
            Step::Inspect(_) if hidden != 0 => {}
            Step::Inspect(line) => writeln!(f, "{}", inspected(line))?,
        }
    }
    Ok(())
}

/// A connect, and where it went.
fn connected(connect: &Connect, flow: &Flow) -> String {
    let process = plain(&connect.process);
    let what = match connect.record {
        Carried::None => format!("{process} (pid {}) connects", connect.pid),
        Carried::Set => format!("{process} connects onwards with the record"),
        Carried::Forgotten => format!("{process} connects onwards without the record"),
    };
    let (style, mut target) = match &connect.verdict {
        Verdict::Redirected { service, .. } if *service == connect.process => {
            (WARNING, format!("{} again", plain(service)))
        }
        Verdict::Redirected { service, .. } => (GOOD, plain(service)),
        Verdict::Onward => (GOOD, flow.address.to_string()),
        Verdict::Refused(Why::ServiceUnavailable { service }) => {
            (BAD, format!("refused: no {}", plain(service)))
        }
        Verdict::Refused(Why::Loop { .. }) => (BAD, "refused: a loop (ELOOP)".into()),
        Verdict::Refused(Why::Filter) => (BAD, "refused by a filter".into()),
    };
    // A service that is not there is skipped on every leg; the first time is enough.
    if connect.record == Carried::None && !connect.skipped.is_empty() {
        target = format!("{target}, skipping {}", plain(connect.skipped.join(", ")));
    }
    let width = MIDDLE - 2;
    format!("  {what:<width$}-> {}", styled(style, target))
}

/// What a service saw.
fn inspected(line: &Inspected) -> String {
    let host = line.host.as_deref().unwrap_or("a host without a name");
    let saw = match (line.protocol.as_str(), &line.request) {
        ("http", Some(request)) => {
            format!("{} for {host}", request.rsplit_once(' ').map_or("HTTP", |(line, _)| line))
        }
        ("tls", _) => format!("TLS for {host} [{}]", line.alpn.join(" ")),
        _ => "nothing that it knows".into(),
    };
    let from = match (&line.command, line.pid) {
        (Some(command), Some(pid)) => format!("from {command} (pid {pid})"),
        _ => "from somebody".into(),
    };
    let text = format!("{} saw {saw}, {from}", line.service);
    format!("    {}", styled(FAINT, shortened(&plain(text), WIDTH - 4)))
}

fn write_outcome(f: &mut fmt::Formatter<'_>, flow: &Flow) -> fmt::Result {
    let good = flow.checks.iter().all(|check| check.holds);
    let (style, word): (Style, _) = if good { (GOOD, "ok") } else { (BAD, "failed") };
    let text = match &flow.outcome {
        Outcome::Response { status, bytes, identical } => {
            let same = if *identical { "as without Carnet" } else { "but not the same" };
            let peer = flow.peer.map_or_else(|| "nothing".into(), |peer| peer.to_string());
            format!("{status}, {bytes} bytes, {same}; getpeername: {peer}")
        }
        Outcome::Error(refusal) => {
            let nowhere = match flow.reached {
                0 => format!("{} got nothing", flow.address),
                number => format!("{} got {number} connections", flow.address),
            };
            match ended_loop(flow) {
                Some((legs, service)) => {
                    format!("the guard ended it after {legs} legs and named {service}; {nowhere}")
                }
                None => format!("{}: {}; {nowhere}", call(refusal.at), refusal.message),
            }
        }
    };
    writeln!(f, "  {} {}", styled(style, word), shortened(&plain(text), WIDTH - 3 - word.len()))
}

/// How many legs a loop made, and who forgot the record, if the guard ended one.
fn ended_loop(flow: &Flow) -> Option<(u32, String)> {
    flow.steps.iter().find_map(|step| match step {
        Step::Connect(Connect {
            verdict: Verdict::Refused(Why::Loop { service }), legs, ..
        }) => Some((*legs, plain(service))),
        _ => None,
    })
}

fn call(stage: Stage) -> &'static str {
    match stage {
        Stage::Connect => "connect()",
        Stage::Tls => "the TLS handshake",
        Stage::Http => "the request",
    }
}

/// The text in at most `longest` characters.
fn shortened(text: &str, longest: usize) -> String {
    if text.chars().count() <= longest {
        return text.to_owned();
    }
    let kept: String = text.chars().take(longest.saturating_sub(3)).collect();
    kept + "..."
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{
        client::Refusal,
        report::{Application, Check, Connect},
        stage::VENDORS,
    };

    /// As long as such things get.
    const PID: u32 = 4_194_303;

    fn connect(process: &str, record: Carried, verdict: Verdict) -> Connect {
        let (process, skipped) = (process.into(), vec![]);
        Connect { process, pid: PID, verdict, record, flow: Some(7), legs: 10, skipped }
    }

    fn to(service: &str) -> Verdict {
        Verdict::Redirected { service: service.into(), filter: "a-filter".into() }
    }

    fn line(service: &str, protocol: &str, request: Option<&str>) -> Inspected {
        Inspected {
            service: service.into(),
            flow: Some(7),
            hops: Some(1),
            pid: Some(PID),
            command: Some("demo-client".into()),
            executable: Some("/a/path".into()),
            destination: "192.0.2.2:80".parse().ok(),
            protocol: protocol.into(),
            host: Some("shop.example".into()),
            alpn: vec!["http/1.1".into()],
            request: request.map(str::to_owned),
            bytes_up: 1,
            bytes_down: 2,
            ended: None,
        }
    }

    fn flow(steps: Vec<Step>, outcome: Outcome) -> Flow {
        Flow {
            title: "TLS over IPv4 on an IPv6 socket",
            url: "https://shop.example/".into(),
            address: "[::ffff:192.0.2.2]:443".parse().unwrap(),
            application: Application {
                pid: PID,
                command: "demo-client".into(),
                executable: "/a/path".into(),
            },
            steps,
            outcome,
            peer: "[::ffff:192.0.2.2]:443".parse().ok(),
            reached: 0,
            checks: vec![Check { claim: "all is well".into(), holds: true }],
        }
    }

    fn report(flows: Vec<Flow>) -> Report {
        Report {
            version: "0.1.0",
            kernel: "6.18.5-100.fc43.x86_64".into(),
            client: ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            destination: ["192.0.2.2".parse().unwrap(), "2001:db8::2".parse().unwrap()],
            host: "shop.example",
            services: VENDORS.map(|vendor| Service { vendor, pid: PID, listeners: vec![] }).into(),
            parts: vec![Part { title: "What there is to see", flows }],
            left_behind: vec![],
            passed: true,
        }
    }

    /// The page without colours; every line fits.
    fn page(report: &Report) -> String {
        let text = Page { report, next: "sudo carnet run -- curl https://example.com" }.to_string();
        let text = anstream::adapter::strip_str(&text).to_string();
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
            assert_eq!(line, line.trim_end());
        }
        text
    }

    #[test]
    fn a_flow_is_told_in_the_order_in_which_it_happened() {
        let mut first = connect("demo-client", Carried::None, to("alpha"));
        first.skipped = vec!["gamma".into()];
        let mut last = connect("beta", Carried::Set, Verdict::Onward);
        last.skipped = vec!["gamma".into()];
        let steps = vec![
            Step::Connect(first),
            Step::Inspect(line("alpha", "http", Some("GET / HTTP/1.1"))),
            Step::Connect(connect("alpha", Carried::Set, to("beta"))),
            Step::Inspect(line("beta", "tls", None)),
            Step::Connect(last),
        ];
        let outcome = Outcome::Response { status: 200, bytes: 22_893, identical: true };
        let text = page(&report(vec![flow(steps, outcome)]));
        let told = "\
TLS over IPv4 on an IPv6 socket: https://shop.example/ at [::ffff:192.0.2.2]:443
  demo-client (pid 4194303) connects              -> alpha, skipping gamma
    alpha saw GET / for shop.example, from demo-client (pid 4194303)
  alpha connects onwards with the record          -> beta
    beta saw TLS for shop.example [http/1.1], from demo-client (pid 4194303)
  beta connects onwards with the record           -> [::ffff:192.0.2.2]:443
  ok 200, 22893 bytes, as without Carnet; getpeername: [::ffff:192.0.2.2]:443
";
        assert!(text.contains(told), "{text}");
        assert!(text.contains("ok All of this was checked"), "{text}");
    }

    #[test]
    fn a_loop_is_told_briefly() {
        let round = || {
            [
                Step::Connect(connect("alpha", Carried::Forgotten, to("alpha"))),
                Step::Inspect(line("alpha", "http", None)),
            ]
        };
        let mut steps: Vec<_> = (0..9).flat_map(|_| round()).collect();
        let why = Why::Loop { service: "alpha".into() };
        let ended = connect("alpha", Carried::Forgotten, Verdict::Refused(why));
        steps.push(Step::Connect(ended));
        let message = "Connection reset by peer".into();
        let refusal = Refusal { at: Stage::Http, errno: Some(104), message };
        let mut flow = flow(steps, Outcome::Error(refusal));
        flow.address = "192.0.2.2:80".parse().unwrap();
        let text = page(&report(vec![flow]));
        let told = "\
  alpha connects onwards without the record       -> alpha again
  ... 6 more like this
  alpha connects onwards without the record       -> alpha again
  alpha connects onwards without the record       -> refused: a loop (ELOOP)
  ok the guard ended it after 10 legs and named alpha; 192.0.2.2:80 got nothing
";
        assert!(text.contains(told), "{text}");
        assert!(!text.contains("saw"), "{text}");
    }

    #[test]
    fn a_claim_that_does_not_hold_is_told() {
        let outcome = Outcome::Response { status: 200, bytes: 1, identical: false };
        let mut flow = flow(vec![], outcome);
        flow.checks[0].holds = false;
        let mut report = report(vec![flow]);
        report.passed = false;
        report.left_behind = vec!["/sys/fs/cgroup/carnet-demo".into()];
        let text = page_of_any_width(&report);
        assert!(text.contains("failed 200, 1 bytes, but not the same"), "{text}");
        assert!(text.contains("failed TLS over IPv4 on an IPv6 socket: not so: all is well"));
        assert!(text.contains("failed left behind: /sys/fs/cgroup/carnet-demo"), "{text}");
    }

    fn page_of_any_width(report: &Report) -> String {
        let text = Page { report, next: "" }.to_string();
        anstream::adapter::strip_str(&text).to_string()
    }
}

//! The log: one line for each flow, at its end.
//!
//! Lines are made where the flow ends and written by a thread of their own, so that a slow
//! terminal or disk never holds a connection up. The thread writes what has gathered at once, and
//! lets more gather for a moment: being woken for every line would cost flows more than the lines
//! do. At most `QUEUE` lines wait for it, and then flows wait with ending, not with relaying.

use crate::inspect::{Protocol, Seen};
use crate::rules::{Action, Transport};
use serde::Serialize;
use std::fmt::{self, Write as _};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// How many lines may wait to be written.
const QUEUE: usize = 4096;
/// How long lines gather before they are written, after others were.
const GATHERING: Duration = Duration::from_millis(5);
/// Longest text from outside in a line for people, in characters. JSON has all of it.
const LONGEST: usize = 160;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Human,
    /// For programs: a JSON object on each line.
    Json,
}

/// What is logged of a flow. Serialised as it is, it is the JSON form; what is not known is null.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// When the flow ended, RFC 3339, UTC.
    pub time: String,
    /// The service's name.
    pub service: String,
    /// The flow's number.
    pub flow: Option<u64>,
    /// The place of this service in the flow's way, from 1.
    pub hops: Option<u32>,
    /// The original application's process id.
    pub pid: Option<u32>,
    /// The original application's user id.
    pub uid: Option<u32>,
    /// The original application's executable.
    pub executable: Option<PathBuf>,
    /// The original application's command name.
    pub command: Option<String>,
    /// What carries the flow.
    pub transport: Transport,
    /// The other end of the accepted connection; of UDP, the address that stands for the flow.
    pub client: SocketAddr,
    /// The original destination.
    pub destination: Option<SocketAddr>,
    /// The protocol that was seen.
    pub protocol: Protocol,
    /// The host that was asked for: the server name of TLS and QUIC, HTTP's Host or request target,
    /// the name in a DNS question. If a flow of UDP asked for several, the first one, or the first
    /// one that was refused; so are `alpn` and `question`.
    pub host: Option<String>,
    /// The application protocols that a client of TLS or QUIC offered.
    pub alpn: Vec<String>,
    /// The HTTP request line.
    pub request: Option<String>,
    /// The DNS question.
    pub question: Option<String>,
    /// What was done.
    pub verdict: Action,
    /// The rule that said so; null for the default, and where no rule was asked.
    pub rule: Option<String>,
    /// Bytes relayed to the destination.
    pub bytes_up: u64,
    /// Bytes relayed to the client.
    pub bytes_down: u64,
    /// How long the flow was here, in seconds.
    pub seconds: f64,
    /// The datagrams of a flow of UDP.
    pub datagrams: Option<Datagrams>,
    /// Why it ended, if not because both sides were done, or idle in UDP; also the first thing that
    /// went wrong with a flow of UDP.
    pub ended: Option<String>,
}

/// How many datagrams a flow had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Datagrams {
    /// Relayed to the destination.
    pub up: u64,
    /// Relayed to the client.
    pub down: u64,
    /// Of the client, and refused.
    pub refused: u64,
    /// Neither relayed nor refused: there was no room for them, or no way.
    pub lost: u64,
}

impl Entry {
    /// The entry of a flow about which nothing is known yet.
    pub fn new(service: &str, client: SocketAddr) -> Self {
        Self {
            time: String::new(),
            service: service.to_owned(),
            flow: None,
            hops: None,
            pid: None,
            uid: None,
            executable: None,
            command: None,
            transport: Transport::Tcp,
            client,
            destination: None,
            protocol: Protocol::Unknown,
            host: None,
            alpn: Vec::new(),
            request: None,
            question: None,
            verdict: Action::Allow,
            rule: None,
            bytes_up: 0,
            bytes_down: 0,
            seconds: 0.0,
            datagrams: None,
            ended: None,
        }
    }

    /// Takes over what was seen of the client.
    pub fn tell(&mut self, seen: Seen) {
        (self.protocol, self.host) = (seen.protocol, seen.host);
        (self.alpn, self.request) = (seen.alpn, seen.request);
        self.question = seen.question;
    }

    /// Sets the time of the flow's end to now, and its duration.
    pub fn close(&mut self, lasted: Duration) {
        self.time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        self.seconds = lasted.as_micros() as f64 / 1e6;
    }

    /// The line, with its end.
    fn line(&self, format: Format) -> String {
        match format {
            Format::Human => format!("{self}\n"),
            Format::Json => {
                // Paths that are not UTF-8 are the only thing that JSON cannot hold.
                let text = serde_json::to_string(self).or_else(|_| {
                    let lossy = |path: &PathBuf| path.to_string_lossy().into_owned().into();
                    let executable = self.executable.as_ref().map(lossy);
                    serde_json::to_string(&Self { executable, ..self.clone() })
                });
                text.unwrap_or_default() + "\n"
            }
        }
    }
}

/// The line for people.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.time, Plain(&self.service))?;
        if let (Some(flow), Some(hops)) = (self.flow, self.hops) {
            write!(f, " flow {flow} hop {hops}")?;
        }
        f.write_str(": ")?;
        match (&self.executable, &self.command) {
            (Some(path), _) => write!(f, "{}", Plain(&path.to_string_lossy()))?,
            (None, Some(command)) => write!(f, "{}", Plain(command))?,
            (None, None) => write!(f, "{}", self.client)?,
        }
        if let (Some(pid), Some(uid)) = (self.pid, self.uid) {
            write!(f, " (pid {pid}, uid {uid})")?;
        }
        if let Some(destination) = self.destination {
            let udp = if self.transport == Transport::Udp { "udp " } else { "" };
            write!(f, " -> {udp}{destination}")?;
        }
        match (self.protocol, self.request.as_ref().or(self.question.as_ref()), &self.host) {
            (Protocol::Http, Some(request), host) => {
                write!(f, ", http {}", Plain(request))?;
                if let Some(host) = host {
                    write!(f, " at {}", Plain(host))?;
                }
            }
            (Protocol::Dns, Some(question), _) => write!(f, ", dns {}", Plain(question))?,
            (Protocol::Tls, _, Some(host)) => write!(f, ", tls {}", Plain(host))?,
            (Protocol::Tls, _, None) => f.write_str(", tls without a name")?,
            (Protocol::Quic, _, Some(host)) => write!(f, ", quic {}", Plain(host))?,
            (Protocol::Quic, _, None) => f.write_str(", quic without a name")?,
            _ => f.write_str(", protocol unknown")?,
        }
        if !self.alpn.is_empty() {
            write!(f, " [{}]", Plain(&self.alpn.join(" ")))?;
        }
        write!(f, ", {}", self.verdict)?;
        if let Some(rule) = &self.rule {
            write!(f, " by \"{}\"", Plain(rule))?;
        }
        let (up, down) = (Bytes(self.bytes_up), Bytes(self.bytes_down));
        match self.datagrams {
            None => write!(f, ", {up} up, {down} down")?,
            Some(Datagrams { up: 1, down: to_client, .. }) => {
                write!(f, ", {up} in 1 datagram up, {down} in {to_client} down")?;
            }
            Some(Datagrams { up: to_server, down: to_client, .. }) => {
                write!(f, ", {up} in {to_server} datagrams up, {down} in {to_client} down")?;
            }
        }
        for (count, what) in
            self.datagrams.iter().flat_map(|n| [(n.refused, "refused"), (n.lost, "lost")])
        {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        write!(f, ", {:.3} s", self.seconds)?;
        if let Some(reason) = &self.ended {
            write!(f, "; {}", Plain(reason))?;
        }
        Ok(())
    }
}

/// Text from outside, as one line that cannot forge another or command a terminal.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (count, c) in self.0.chars().enumerate() {
            if count == LONGEST {
                return f.write_str("...");
            }
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

/// A number of bytes for people, in decimal units.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut unit = "B";
        for larger in ["kB", "MB", "GB", "TB"] {
            if value < 999.95 {
                break;
            }
            (value, unit) = (value / 1000.0, larger);
        }
        if unit == "B" { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {unit}") }
    }
}

/// Where flows log. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    format: Format,
    lines: mpsc::Sender<String>,
}

impl Log {
    /// A log that is written to `target`, and the thread that writes it.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub fn start(
        format: Format,
        target: impl Write + Send + 'static,
    ) -> io::Result<(Self, Writer)> {
        let (lines, waiting) = mpsc::channel(QUEUE);
        let thread = thread::Builder::new()
            .name("log".into())
            .spawn(move || write_lines(waiting, BufWriter::new(target)))?;
        Ok((Self { format, lines }, Writer(thread)))
    }

    /// Adds a line.
    pub async fn add(&self, entry: &Entry) {
        // It only fails when the writer is gone, which it is not before this log is.
        let _ = self.lines.send(entry.line(self.format)).await;
    }
}

/// The thread that writes a [`Log`].
#[derive(Debug)]
pub struct Writer(JoinHandle<()>);

impl Writer {
    /// Waits until every line is written; every clone of the log must be gone, or it waits for
    /// that.
    pub fn finish(self) {
        // A panic of the thread has already been printed.
        let _ = self.0.join();
    }
}

fn write_lines(mut waiting: mpsc::Receiver<String>, mut target: impl Write) {
    let mut healthy = true;
    while let Some(first) = waiting.blocking_recv() {
        let mut written = target.write_all(first.as_bytes());
        while let (Ok(()), Ok(line)) = (&written, waiting.try_recv()) {
            written = target.write_all(line.as_bytes());
        }
        match written.and_then(|()| target.flush()) {
            Ok(()) => healthy = true,
            // Said once, not for every line of a full disk.
            Err(error) if healthy => {
                crate::say(format_args!("lines of the log are lost: {error}"));
                healthy = false;
            }
            Err(_) => {}
        }
        thread::sleep(GATHERING);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            time: "2026-01-02T03:04:05.678Z".into(),
            flow: Some(17),
            hops: Some(1),
            pid: Some(4242),
            uid: Some(1000),
            executable: Some("/usr/bin/curl".into()),
            command: Some("curl".into()),
            destination: Some("192.0.2.7:443".parse().unwrap()),
            protocol: Protocol::Tls,
            host: Some("example.org".into()),
            alpn: vec!["h2".into(), "http/1.1".into()],
            bytes_up: 517,
            bytes_down: 4_210,
            seconds: 0.132,
            ..Entry::new("inspect-a", "127.0.0.1:5000".parse().unwrap())
        }
    }

    #[test]
    fn lines_for_people() {
        assert_eq!(
            entry().to_string(),
            "2026-01-02T03:04:05.678Z inspect-a flow 17 hop 1: /usr/bin/curl (pid 4242, uid 1000) \
             -> 192.0.2.7:443, tls example.org [h2 http/1.1], allowed, 517 B up, 4.2 kB down, \
             0.132 s"
        );
        let refused = Entry {
            executable: None,
            protocol: Protocol::Http,
            request: Some("GET / HTTP/1.1".into()),
            alpn: vec![],
            verdict: Action::Refuse,
            rule: Some("no trackers".into()),
            bytes_up: 0,
            bytes_down: 999_960,
            ended: Some("answered 403".into()),
            ..entry()
        };
        assert_eq!(
            refused.to_string(),
            "2026-01-02T03:04:05.678Z inspect-a flow 17 hop 1: curl (pid 4242, uid 1000) -> \
             192.0.2.7:443, http GET / HTTP/1.1 at example.org, refused by \"no trackers\", 0 B up, \
             1.0 MB down, 0.132 s; answered 403"
        );
        let bare = Entry::new("a", "127.0.0.1:5000".parse().unwrap()).to_string();
        assert_eq!(
            bare,
            " a: 127.0.0.1:5000, protocol unknown, allowed, 0 B up, 0 B down, 0.000 s"
        );
    }

    #[test]
    fn lines_about_datagrams() {
        let dns = Entry {
            transport: Transport::Udp,
            destination: Some("192.0.2.53:53".parse().unwrap()),
            protocol: Protocol::Dns,
            question: Some("example.org A".into()),
            alpn: vec![],
            datagrams: Some(Datagrams { up: 1, down: 1, ..Datagrams::default() }),
            bytes_up: 29,
            bytes_down: 45,
            ..entry()
        };
        assert_eq!(
            dns.to_string(),
            "2026-01-02T03:04:05.678Z inspect-a flow 17 hop 1: /usr/bin/curl (pid 4242, uid 1000) \
             -> udp 192.0.2.53:53, dns example.org A, allowed, 29 B in 1 datagram up, 45 B in 1 \
             down, 0.132 s"
        );
        let quic = Entry {
            protocol: Protocol::Quic,
            verdict: Action::Refuse,
            rule: Some("no QUIC".into()),
            datagrams: Some(Datagrams { refused: 3, lost: 2, ..Datagrams::default() }),
            bytes_up: 0,
            bytes_down: 0,
            ..dns
        };
        assert!(
            quic.to_string().ends_with(
                ", quic example.org, refused by \"no QUIC\", 0 B in 0 datagrams up, 0 B in 0 down, \
                 3 refused, 2 lost, 0.132 s"
            ),
            "{quic}"
        );
        let value: serde_json::Value = serde_json::from_str(&quic.line(Format::Json)).unwrap();
        assert_eq!(
            (&value["transport"], &value["datagrams"]["refused"]),
            (&"udp".into(), &3.into())
        );
    }

    #[test]
    fn text_from_outside_cannot_forge_a_line() {
        let nasty = Entry { command: Some("a\nb\u{1b}[2J".into()), executable: None, ..entry() };
        let line = nasty.line(Format::Human);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.contains("a\\nb\\u{1b}[2J"), "{line}");
        let long = Entry { host: Some("h".repeat(10_000)), ..entry() };
        assert!(long.to_string().len() < 500);
    }

    #[test]
    fn json_lines_have_every_field() {
        let line = entry().line(Format::Json);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["flow"], 17);
        assert_eq!(value["destination"], "192.0.2.7:443");
        assert_eq!(value["protocol"], "tls");
        assert_eq!(value["verdict"], "allow");
        assert_eq!(value["alpn"][1], "http/1.1");
        assert_eq!(value["rule"], serde_json::Value::Null);
        assert_eq!(value.as_object().unwrap().len(), 23);

        let line = Entry { executable: Some(odd_path()), ..entry() }.line(Format::Json);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["executable"], "/bin/\u{fffd}");
    }

    /// A path that is not Unicode.
    #[cfg(unix)]
    fn odd_path() -> PathBuf {
        let path: std::ffi::OsString =
            std::os::unix::ffi::OsStringExt::from_vec(b"/bin/\xff".into());
        path.into()
    }

    /// A path that is not Unicode.
    #[cfg(windows)]
    fn odd_path() -> PathBuf {
        let wide: Vec<u16> = "/bin/".encode_utf16().chain([0xd800]).collect();
        let path: std::ffi::OsString = std::os::windows::ffi::OsStringExt::from_wide(&wide);
        path.into()
    }

    #[tokio::test]
    async fn every_line_is_written_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (log, thread) = Log::start(Format::Json, writer).unwrap();
        let count = 3 * QUEUE as u64;
        let reading = thread::spawn(move || io::read_to_string(&mut reader).unwrap());
        for flow in 0..count {
            log.add(&Entry { flow: Some(flow), ..entry() }).await;
        }
        drop(log);
        thread.finish();
        let text = reading.join().unwrap();
        let flows: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["flow"].as_u64())
            .map(Option::unwrap)
            .collect();
        assert_eq!(flows, (0..count).collect::<Vec<_>>());
    }
}

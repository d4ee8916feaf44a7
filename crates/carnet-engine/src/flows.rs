//! The flows that are alive: what hangs on the sockets of the connecting side.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::File,
    io::Read as _,
    net::SocketAddr,
    os::{fd::AsFd as _, unix::ffi::OsStringExt as _},
    path::PathBuf,
    time::Duration,
};

use carnet_core::{
    flow::{LEG_ADOPTED, LEG_ONWARD, LEG_REDIRECTED, LegState},
    object::Protocol,
    record::{AppIdentity, FileId, Hop, RECORD_IDENTITY_GUESSED, RECORD_IMPORTED},
};
use zerocopy::FromBytes as _;

use crate::{
    Engine, Error, object, sys,
    tables::{Tables, service_names},
};

/// Where a connection of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LegKind {
    /// To a service.
    Redirected,
    /// To its destination, with a record.
    Onward,
}

/// One leg of a flow: a live connection that was redirected to a service, or that a service made
/// onwards. A flow that passes two services has three.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flow {
    /// The flow's number: the same on every leg.
    pub flow: u64,
    /// Where the leg goes.
    pub kind: LegKind,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination that the connect asked for, which the connecting side sees as its peer.
    pub requested: SocketAddr,
    /// Where the connection really goes: the service's listener, or the destination.
    pub target: SocketAddr,
    /// The destination that the application wanted at the flow's begin.
    pub destination: SocketAddr,
    /// Redirect handle of the service that the leg goes to; 0 for an onward leg.
    pub handle: u64,
    /// That service's name; `None` for an onward leg, and if the service was removed.
    pub service: Option<String>,
    /// The filter that redirected the leg; 0 for an onward leg.
    pub filter: u64,
    /// Cookie of the connecting socket.
    pub cookie: u64,
    /// Cookie of its network namespace.
    pub netns: u64,
    /// The process that connected, in the initial pid namespace.
    pub pid: u32,
    /// When the leg began, on the boot-time clock.
    pub began: Duration,
    /// Redirected legs of the flow so far, this one included.
    pub legs: u32,
    /// The services that the flow has been redirected to, oldest first.
    pub hops: Vec<FlowHop>,
    /// The application with which the flow began.
    pub app: FlowApp,
    /// Whether no service set the record: what an unmodified service connected adopted it.
    pub adopted: bool,
    /// Whether `flow` and `app` are those of one of several flows to which the leg may belong, or of the
    /// service that connected.
    pub identity_guessed: bool,
    /// Whether the flow began on another host: `app` and some of `hops` are what that one says.
    pub imported: bool,
    /// The redirect context that the service gets to read; empty if there is none.
    pub context: Vec<u8>,
}

/// A redirect of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowHop {
    /// The service's redirect handle; 0 if it is another host's.
    pub handle: u64,
    /// The service's name; `None` if it was removed, or is another host's.
    pub service: Option<String>,
    /// The filter that redirected; 0 where that is not known, or was on another host.
    pub filter: u64,
    /// Of another host's service what it is on every host ([`identity`]); 0 where that is not known.
    ///
    /// [`identity`]: carnet_core::portable::identity
    pub identity: u64,
    /// Whether it is a guess that the flow was redirected there.
    pub guessed: bool,
}

/// The application with which a flow began.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowApp {
    /// Its process, in the initial pid namespace.
    pub pid: u32,
    /// Its user, in the initial user namespace.
    pub uid: u32,
    /// Its group, in the initial user namespace.
    pub gid: u32,
    /// The id of its cgroup.
    pub cgroup: u64,
    /// Cookie of its socket's network namespace.
    pub netns: u64,
    /// Its executable, as the kernel identifies it.
    pub executable: FileId,
    /// The path of that, as the process's own mount namespace shows it; `None` where it could not
    /// be read.
    pub path: Option<PathBuf>,
    /// Its command name.
    pub command: OsString,
    /// When it started, on the boot-time clock.
    pub started: Duration,
}

impl Engine {
    /// The flows that are alive, in all network namespaces, oldest leg first. Of UDP sockets that are
    /// not connected, those are listed that go to services.
    ///
    /// # Errors
    /// [`Error::NotUp`], [`Error::UnknownLayout`]; [`Error::Io`] if the kernel does not list them.
    pub fn flows(&self) -> Result<Vec<Flow>, Error> {
        let (legs, policy) = self.reading(|tables| {
            let legs = read_legs(&self.program_path(object::FLOWS), tables)?;
            let mut legs: Vec<_> = live_legs(&legs).copied().collect();
            legs.extend(tables.datagram_legs()?.into_iter().map(|held| held.leg));
            Ok((legs, tables.in_force()?.policy))
        })?;
        let names = service_names(&policy);
        let name = |handle| names.get(&handle).cloned();
        let mut flows: Vec<_> = legs.iter().map(|leg| Flow::new(leg, name)).collect();
        flows.sort_by_key(|flow| (flow.began, flow.cookie));
        Ok(flows)
    }
}

/// The legs that hang on the connecting sockets, be they alive or not.
pub(crate) fn read_legs(
    program: &std::path::Path,
    tables: &Tables,
) -> Result<Vec<LegState>, Error> {
    let failed = || Error::io("list", "the flows");
    let program =
        sys::open_pin(program).map_err(Error::io("open the program", program.display()))?;
    let legs = tables.open("LEGS")?;
    let target = sys::IteratorTarget::map(legs.fd().as_fd());
    let mut file = File::from(sys::iterate(program.as_fd(), &target).map_err(failed())?);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed())?;
    // A Multipath TCP connection has its leg twice: on itself and on its first subflow. A map may
    // give one twice when others go meanwhile.
    let mut seen = BTreeSet::new();
    let legs = legs_in(&bytes).chain(tables.connecting_legs()?);
    Ok(legs.filter(|leg| seen.insert((leg.cookie, leg.netns))).collect())
}

/// The legs in what the iterator has written.
pub(crate) fn legs_in(bytes: &[u8]) -> impl Iterator<Item = LegState> {
    let legs = bytes.chunks_exact(size_of::<LegState>());
    legs.filter_map(|bytes| LegState::read_from_bytes(bytes).ok())
}

/// Of these legs those of connections: others have none, or not yet.
pub(crate) fn live_legs(legs: &[LegState]) -> impl Iterator<Item = &LegState> {
    legs.iter().filter(|leg| matches!(leg.kind, LEG_REDIRECTED | LEG_ONWARD))
}

impl Flow {
    pub(crate) fn new(leg: &LegState, name: impl Fn(u64) -> Option<String>) -> Self {
        let redirected = leg.kind == LEG_REDIRECTED;
        let record = &leg.record;
        let hops = (0..).zip(record.hops.iter().take(record.hop_count as usize));
        let hop = |(index, &Hop { handle, filter }): (u32, &Hop)| FlowHop {
            handle,
            service: name(handle),
            filter: if handle == 0 { 0 } else { filter },
            identity: if handle == 0 { filter } else { 0 },
            guessed: record.is_guessed(index),
        };
        let context = leg.context.get(..leg.context_length as usize).unwrap_or(&leg.context);
        Self {
            flow: record.flow,
            kind: if redirected { LegKind::Redirected } else { LegKind::Onward },
            protocol: Protocol(leg.protocol as u8),
            requested: leg.requested.into(),
            target: leg.target.into(),
            destination: record.destination.into(),
            handle: leg.handle,
            service: name(leg.handle),
            filter: leg.filter,
            cookie: leg.cookie,
            netns: leg.netns,
            pid: leg.pid,
            began: Duration::from_nanos(leg.began_ns),
            legs: record.legs,
            hops: hops.map(hop).collect(),
            app: FlowApp::new(&record.app),
            adopted: leg.flags & LEG_ADOPTED != 0,
            identity_guessed: record.flags & RECORD_IDENTITY_GUESSED != 0,
            imported: record.flags & RECORD_IMPORTED != 0,
            context: context.to_vec(),
        }
    }
}

impl FlowApp {
    fn new(app: &AppIdentity) -> Self {
        let path = app.path.get(..app.path_length as usize).unwrap_or(&app.path);
        let command = app.command.split(|byte| *byte == 0).next().unwrap_or_default();
        Self {
            pid: app.pid,
            uid: app.uid,
            gid: app.gid,
            cgroup: app.cgroup,
            netns: app.netns,
            executable: app.executable,
            path: (!path.is_empty()).then(|| OsString::from_vec(path.to_vec()).into()),
            command: OsString::from_vec(command.to_vec()),
            started: Duration::from_nanos(app.started_ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use carnet_core::address::Endpoint;
    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn a_leg_is_shown_with_names_and_without_padding() {
        let mut leg = LegState::new_zeroed();
        leg.kind = LEG_REDIRECTED;
        leg.handle = 5;
        leg.protocol = 17;
        leg.requested = Endpoint::from("192.0.2.1:80".parse::<SocketAddr>().unwrap());
        leg.target = Endpoint::from("[::1]:15001".parse::<SocketAddr>().unwrap());
        leg.context_length = 2;
        leg.context[..3].copy_from_slice(b"hix");
        assert!(leg.record.push(Hop { handle: 4, filter: 9 }));
        assert!(leg.record.push(Hop { handle: 5, filter: 8 }));
        leg.record.guess(0);
        leg.flags |= LEG_ADOPTED;
        leg.record.app.path[..9].copy_from_slice(b"/bin/true");
        leg.record.app.path_length = 9;
        leg.record.app.command[..4].copy_from_slice(b"true");
        let name = |handle| (handle == 5).then(|| "scan".to_owned());
        let flow = Flow::new(&leg, name);
        assert_eq!((flow.kind, flow.protocol), (LegKind::Redirected, Protocol::UDP));
        assert_eq!(flow.requested, "192.0.2.1:80".parse().unwrap());
        assert_eq!(flow.target, "[::1]:15001".parse().unwrap());
        assert_eq!(flow.service.as_deref(), Some("scan"));
        assert_eq!(flow.context, b"hi");
        let hop = |hop: &FlowHop| (hop.handle, hop.service.clone(), hop.guessed);
        let hops: Vec<_> = flow.hops.iter().map(hop).collect();
        assert_eq!(hops, [(4, None, true), (5, Some("scan".to_owned()), false)]);
        assert!(flow.adopted && !flow.identity_guessed && !flow.imported);
        assert_eq!(flow.app.path.as_deref(), Some(std::path::Path::new("/bin/true")));
        assert_eq!(flow.app.command, "true");

        leg.kind = LEG_ONWARD;
        leg.handle = 0;
        leg.record.hops[0] = Hop { handle: 0, filter: 77 };
        leg.record.flags |= RECORD_IMPORTED;
        leg.record.app.path_length = 0;
        let onward = Flow::new(&leg, name);
        assert_eq!((onward.kind, onward.service), (LegKind::Onward, None));
        assert_eq!(onward.app.path, None);
        let hop = &onward.hops[0];
        assert_eq!((hop.handle, hop.filter, hop.identity, onward.imported), (0, 0, 77, true));
    }
}

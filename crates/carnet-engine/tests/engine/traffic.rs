//! Flows, events, listeners: what the engine shows of real connections.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use carnet_core::event::{Counter, Event, EventKind};
use carnet_engine::{Engine, Error, EventReader, LegKind};
use carnet_testbed::{NetworkNamespace, PeerClient, PeerServer};
use rustix::process::{Pid, Signal, kill_process};

use crate::world::{Failure, World, fill, reference, service};

/// Longest wait for something that is about to happen.
const SOON: Duration = Duration::from_secs(30);

fn wait_for(events: &mut EventReader, kind: EventKind) -> Event {
    loop {
        let event = events.next_timeout(SOON).unwrap().expect("an event");
        if event.kind == kind as u32 {
            return event;
        }
    }
}

fn count(engine: &Engine, which: Counter) -> u64 {
    let counters = engine.counters().unwrap();
    counters.iter().find(|(counter, _)| *counter == which).map(|(_, value)| *value).unwrap()
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

#[test]
fn a_redirected_connection_is_shown_as_the_kernel_recorded_it() {
    let world = World::new("carnet-engine-traffic");
    let namespace = NetworkNamespace::create("traffic").unwrap();
    let for_service = world.scope.child("scan").unwrap();
    let for_client = world.scope.child("client").unwrap();
    let mut engine = world.up();
    fill(&mut engine, &for_service);

    let any = "127.0.0.1:0".parse().unwrap();
    let server = PeerServer::start(Some(&namespace), Some(&for_service), [any]).unwrap();
    let mut events = engine.events().unwrap();
    assert!(matches!(engine.events(), Err(Error::EventsTaken { .. })));
    assert_eq!(engine.register_listener_of("scan", server.id()).unwrap(), [server.address()]);
    let handle = engine.policy().unwrap().services()[0].handle;
    let registered = wait_for(&mut events, EventKind::ListenerRegistered);
    assert_eq!(registered.handle, handle);
    let listeners = engine.listeners().unwrap();
    let [listener] = listeners.as_slice() else { panic!("{listeners:?}") };
    assert_eq!((listener.handle, listener.local), (handle, server.address()));
    assert_eq!(listener.netns, namespace.cookie().unwrap());

    // A service that is stopped does not answer: the connection stays.
    signal(server.id(), Signal::STOP);
    let asked: SocketAddr = "192.0.2.1:80".parse().unwrap();
    let client = PeerClient::new(asked)
        .in_namespace(&namespace)
        .in_cgroup(&for_client)
        .timeout(SOON)
        .start()
        .unwrap();
    let redirected = wait_for(&mut events, EventKind::Redirected);
    assert_eq!((redirected.pid, redirected.handle), (client.id(), handle));
    let flows = engine.flows().unwrap();
    let [flow] = flows.as_slice() else { panic!("{flows:?}") };
    assert_eq!((flow.kind, flow.flow), (LegKind::Redirected, redirected.flow));
    assert_eq!((flow.requested, flow.destination), (asked, asked));
    assert_eq!(flow.target, server.address());
    assert_eq!(flow.service.as_deref(), Some("scan"));
    assert_eq!(flow.context, b"hello");
    assert_eq!(flow.hops.iter().map(|hop| hop.handle).collect::<Vec<_>>(), [handle]);
    assert_eq!((flow.pid, flow.app.pid, flow.legs), (client.id(), client.id(), 1));
    assert_eq!(flow.app.cgroup, for_client.id());

    // What the connect hook saw of the process is what is found by its path.
    let link = PathBuf::from(format!("/proc/{}/exe", client.id()));
    let executable = fs::read_link(&link).unwrap();
    assert_eq!(flow.app.executable, engine.resolve_executable(&executable).unwrap());
    assert_eq!(flow.app.executable, engine.resolve_executable(&link).unwrap());
    assert_eq!(flow.app.path.as_ref(), Some(&executable));
    let netns = PathBuf::from(format!("/proc/{}/ns/net", client.id()));
    assert_eq!(flow.netns, Engine::resolve_netns(&netns).unwrap());
    assert_eq!(flow.app.netns, flow.netns);

    signal(server.id(), Signal::CONT);
    let reports = client.finish(SOON).unwrap();
    assert!(reports.iter().all(|report| report.ok && report.peer == Some(asked)), "{reports:?}");
    let closed = wait_for(&mut events, EventKind::Closed);
    assert_eq!(closed.flow, redirected.flow);
    assert_eq!(count(&engine, Counter::Redirected), 1);
    assert_eq!(count(&engine, Counter::Delivered), 1);

    // A reader that comes later does not see what was before.
    drop(events);
    assert_eq!(engine.events().unwrap().next_timeout(Duration::ZERO).unwrap(), None);
    // A service that goes takes its listeners along.
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        let filter = policy.filters()[0].id.to_string();
        policy.remove_filter(&filter)?;
        policy.remove_service("scan")?;
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(engine.listeners().unwrap(), []);
    engine.down().unwrap();
}

#[test]
fn only_sockets_of_the_services_cgroup_can_be_registered() {
    let world = World::new("carnet-engine-register");
    let for_service = world.scope.child("scan").unwrap();
    let elsewhere = world.scope.child("elsewhere").unwrap();
    let mut engine = world.up();
    fill(&mut engine, &for_service);
    let namespace = NetworkNamespace::create("register").unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let server = PeerServer::start(Some(&namespace), Some(&elsewhere), [any]).unwrap();
    let refused = engine.register_listener_of("scan", server.id()).unwrap_err();
    assert!(matches!(refused, Error::Register { .. }), "{refused}");
    assert!(refused.to_string().contains("carnet service run"), "{refused}");
    let unknown = engine.register_listener_of("nobody", server.id()).unwrap_err();
    assert!(matches!(unknown, Error::NoService { .. }));
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        let moved = reference(&elsewhere);
        Ok(policy.add_service(service("second", moved)).map(drop)?)
    });
    outcome.unwrap();
    let listens = engine.register_listener_of("second", server.id()).unwrap();
    assert_eq!(listens, [server.address()]);
    engine.down().unwrap();
}

#[test]
fn what_is_no_executable_is_refused() {
    let world = World::new("carnet-engine-files");
    let engine = world.up();
    let own = std::env::current_exe().unwrap();
    let same = engine.resolve_executable("/proc/self/exe".as_ref()).unwrap();
    assert_eq!(engine.resolve_executable(&own).unwrap(), same);
    let refused = |path: &str| engine.resolve_executable(path.as_ref()).unwrap_err();
    assert!(matches!(refused("/"), Error::NotExecutable { .. }));
    assert!(matches!(refused("/dev/null"), Error::NotExecutable { .. }));
    assert!(matches!(refused("/no/such/file"), Error::Io { .. }));
    engine.down().unwrap();
}

//! What a filter can ask about a connection, and what it can do with it.

use std::{net::SocketAddr, path::Path};

use carnet_core::{
    event::{Counter, EventKind},
    object::{
        CgroupCondition, Conditions, ExecutableCondition, FilterAction, NetnsCondition, NewFilter,
        Prefix, Protocol, Weight,
    },
};
use carnet_engine::Engine;
use carnet_testbed::{EchoServer, NetworkNamespace, PeerClient, Topology, peer_command};
use carnet_tests::{
    Anything, Lab, Must as _, PATIENCE, Plan, Running,
    puppet::{Errno, Family, Kind, Puppet},
    service::Behaviour,
};

/// A lab with one service, whose filter has these conditions.
fn scene(conditions: impl FnOnce(&Lab) -> Conditions) -> (Lab, Running) {
    let lab = Lab::new();
    let conditions = conditions(&lab);
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.start("alpha");
    (lab, service)
}

/// Whether a connection of this client is redirected.
#[track_caller]
fn is_redirected(lab: &Lab, client: &PeerClient<'_>) -> bool {
    let before = lab.counter(Counter::Redirected);
    let reports = client.run().must("run a client");
    assert!(reports[0].ok, "{reports:#?}");
    match lab.counter(Counter::Redirected) - before {
        0 => false,
        1 => true,
        more => panic!("{more} redirects of one connection"),
    }
}

#[test]
fn by_port() {
    let (lab, _service) =
        scene(|lab| Conditions { ports: vec![lab.v4().port().into()], ..Conditions::default() });
    let other = lab.network().another_echo();
    assert!(is_redirected(&lab, &lab.client(lab.v4())));
    assert!(!is_redirected(&lab, &lab.client(other.address())));
}

#[test]
fn by_destination() {
    let prefix = |text: &str| text.parse::<Prefix>().expect("a prefix");
    let (lab, _service) = scene(|_| Conditions {
        destinations: vec![
            prefix("192.0.2.0/31"),
            prefix("192.0.2.128/25"),
            prefix("2001:db8::/64"),
        ],
        ..Conditions::default()
    });
    // 192.0.2.2 is in neither of the IPv4 prefixes.
    assert!(!is_redirected(&lab, &lab.client(lab.v4())));
    assert!(is_redirected(&lab, &lab.client(lab.v6())));
    let address = SocketAddr::new("192.0.2.129".parse().expect("an address"), 0);
    lab.network().topology.destination.add_address("192.0.2.129/32", Topology::LINK).must("add");
    let server = EchoServer::start_in(&lab.network().topology.destination, [address]).must("start");
    assert!(is_redirected(&lab, &lab.client(server.address())));
    // The mapped form is the same destination.
    let mapped = lab.client(server.address()).family(carnet_testbed::exchange::Family::Mapped);
    assert!(is_redirected(&lab, &mapped));
}

#[test]
fn by_user() {
    let (lab, _service) = scene(|_| Conditions {
        users: vec!["1000-1999".parse().expect("users")],
        ..Conditions::default()
    });
    for (uid, expected) in [(0, false), (999, false), (1000, true), (1999, true), (2000, false)] {
        let client = lab.client(lab.v4()).as_user(uid, uid);
        assert_eq!(is_redirected(&lab, &client), expected, "uid {uid}");
    }
}

#[test]
fn by_cgroup() {
    let (lab, _service) = scene(|lab| {
        let (id, level) = Engine::resolve_cgroup(lab.apps().path()).must("resolve a cgroup");
        assert_eq!(id, lab.apps().id());
        let path = lab.apps().path().display().to_string();
        Conditions { cgroups: vec![CgroupCondition { path, id, level }], ..Conditions::default() }
    });
    let inner = lab.apps().child("inner").must("make a cgroup");
    let sibling = lab.scope().child("sibling").must("make a cgroup");
    assert!(is_redirected(&lab, &lab.client(lab.v4())));
    assert!(is_redirected(&lab, &lab.client(lab.v4()).in_cgroup(&inner)));
    assert!(!is_redirected(&lab, &lab.client(lab.v4()).in_cgroup(&sibling)));
}

/// An executable, as the engine resolves it.
fn executable(lab: &Lab, path: &Path) -> Vec<ExecutableCondition> {
    let file = lab.engine().resolve_executable(path).must("resolve an executable");
    vec![ExecutableCondition { path: path.display().to_string(), file }]
}

#[test]
fn by_executable() {
    let command = peer_command().must("find the client's program");
    let (lab, service) = scene(|lab| Conditions {
        executables: executable(lab, Path::new(command.get_program())),
        ..Conditions::default()
    });
    assert!(is_redirected(&lab, &lab.client(lab.v4())));
    // The same by any other name, but not another program.
    let puppet = lab.puppet();
    let connection = puppet.connect(lab.v4()).must("connect");
    connection.send(b"x").must("send");
    assert_eq!(connection.receive(1), Ok(b"x".to_vec()));
    assert_eq!(service.finish().len(), 1);
}

#[test]
fn by_the_executable_with_which_the_flow_began() {
    let command = peer_command().must("find the client's program");
    let lab = Lab::new();
    let originals = executable(&lab, Path::new(command.get_program()));
    // Both services are asked about connections of each other's program.
    for (name, weight) in [("alpha", 2), ("bravo", 1)] {
        let conditions =
            Conditions { original_executables: originals.clone(), ..Conditions::default() };
        lab.service_with(name, Plan { weight, conditions, ..Plan::default() });
    }
    let services = ["alpha", "bravo"].map(|name| lab.start(name));
    lab.exchange(lab.v4());
    let puppet = lab.puppet();
    let connection = puppet.connect(lab.v4()).must("connect");
    connection.send(b"x").must("send");
    assert_eq!(connection.receive(1), Ok(b"x".to_vec()));
    drop(connection);
    lab.settle();
    let handles = ["alpha", "bravo"].map(|name| lab.handle_of(name));
    let chain: Vec<_> = handles.into_iter().zip(services.map(Running::finish)).collect();
    carnet_tests::handed_on(&chain, 1);
}

#[test]
fn by_network_namespace() {
    let (lab, service) = scene(|lab| {
        let cookie = lab.network().topology.client.cookie().must("ask for the cookie");
        let network_namespaces = vec![NetnsCondition { name: "client".into(), cookie }];
        Conditions { network_namespaces, ..Conditions::default() }
    });
    assert!(is_redirected(&lab, &lab.client(lab.v4())));
    let elsewhere = NetworkNamespace::create("elsewhere").must("make a namespace");
    let server = EchoServer::start_in(&elsewhere, [(std::net::Ipv4Addr::LOCALHOST, 0).into()])
        .must("start a server");
    let client = PeerClient::new(server.address()).in_namespace(&elsewhere).in_cgroup(lab.apps());
    assert!(!is_redirected(&lab, &client));
    assert_eq!(service.finish().len(), 1);
}

/// Adds a sublayer with one filter.
fn add(lab: &Lab, name: &str, weight: u16, conditions: Conditions, action: FilterAction) {
    lab.change(|policy| {
        policy.add_provider(name, "")?;
        policy.add_sublayer(name, name, weight)?;
        policy.add_filter(NewFilter {
            name: Some(name.into()),
            sublayer: name.into(),
            weight: Weight::Auto,
            conditions,
            action,
        })?;
        Ok::<_, Anything>(())
    });
}

#[test]
fn a_block_refuses_in_every_place() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let to_v6 = Conditions {
        destinations: vec!["2001:db8::/32".parse().expect("a prefix")],
        ..Conditions::default()
    };
    // Lighter than the services: a redirect is a soft permit.
    add(&lab, "light", 1, to_v6.clone(), FilterAction::BLOCK);
    assert_eq!(lab.refused(lab.v6()), "EPERM");
    let event = trace.first(EventKind::Blocked);
    let filter = lab.policy().filter("light").must("find the filter").id;
    assert_eq!(event.filter, filter, "{event:#?}");
    lab.exchange(lab.v4());
    lab.change(|policy| Ok(policy.remove_filter("light").map(drop)?));
    lab.exchange(lab.v6());
    add(&lab, "heavy", 5000, to_v6, FilterAction::BLOCK);
    assert_eq!(lab.refused(lab.v6()), "EPERM");
    lab.settle();
    for service in services {
        assert_eq!(service.finish().len(), 2);
    }
    assert_eq!(lab.counter(Counter::Blocked), 2);
}

#[test]
fn a_hard_permit_keeps_the_services_away_and_a_veto_beats_it() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha"]);
    add(&lab, "bypass", 5000, Conditions::default(), FilterAction::Permit { hard: true });
    assert!(!is_redirected(&lab, &lab.client(lab.v4())));
    // A block that is not a veto cannot override it.
    add(&lab, "block", 4000, Conditions::default(), FilterAction::BLOCK);
    assert!(!is_redirected(&lab, &lab.client(lab.v4())));
    let veto = FilterAction::Block { hard: true, veto: true };
    add(&lab, "veto", 3000, Conditions::default(), veto);
    assert_eq!(lab.refused(lab.v4()), "EPERM");
    for service in services {
        assert!(service.finish().is_empty());
    }
}

#[test]
fn a_soft_permit_is_no_obstacle() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha"]);
    add(&lab, "permit", 5000, Conditions::default(), FilterAction::PERMIT);
    assert!(is_redirected(&lab, &lab.client(lab.v4())));
    lab.settle();
    assert_eq!(services.into_iter().map(|service| service.finish().len()).sum::<usize>(), 1);
}

#[test]
fn a_block_of_a_services_own_connection_reaches_its_client() {
    let lab = Lab::new();
    lab.service("alpha", 2);
    let service = lab.start("alpha");
    let cgroup = lab.cgroup_of("alpha");
    let (id, level) = Engine::resolve_cgroup(cgroup.path()).must("resolve a cgroup");
    let path = cgroup.path().display().to_string();
    let conditions =
        Conditions { cgroups: vec![CgroupCondition { path, id, level }], ..Conditions::default() };
    add(&lab, "no-onward", 1, conditions, FilterAction::BLOCK);
    let reports = lab.client(lab.v4()).timeout(PATIENCE).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    assert_eq!(service.reports(1)[0].onward, Err(libc::EPERM));
    lab.settle();
}

#[test]
fn a_filter_may_name_its_protocol() {
    let lab = Lab::new();
    let conditions = Conditions { protocols: vec![Protocol::TCP], ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let client: Puppet = lab.puppet();
    // The dead service refuses TCP; UDP does not even notice.
    assert_eq!(client.connect(lab.v4()).err(), Some(Errno(libc::ECONNREFUSED)));
    let udp = || client.open(Family::V4, Kind::Udp).must("open a UDP socket");
    let passes = udp();
    passes.connect(lab.v4()).must("connect a UDP socket");
    assert_eq!(passes.peer(), Ok(lab.v4()));
    // One that names none is for both.
    add(&lab, "any", 2, Conditions::default(), FilterAction::BLOCK);
    assert_eq!(udp().connect(lab.v4()), Err(Errno(libc::EPERM)));
}

/// The application's leg is authorised by what it asks for. Where the redirect sends it, to the
/// service's own address, filters do not see; those who go there of themselves they do.
#[test]
fn a_block_of_a_services_own_address_concerns_those_who_ask_for_it() {
    let lab = Lab::new();
    let ports = vec![lab.v4().port().into()];
    let conditions = Conditions { ports, ..Conditions::default() };
    lab.service_with("alpha", Plan { conditions, ..Plan::default() });
    let service = lab.start_with("alpha", &Behaviour::with_datagrams());
    let ports = service.addresses().iter().map(|place| place.port().into()).collect();
    lab.change(|policy| {
        policy.add_provider("warden", "")?;
        policy.add_sublayer("warden", "warden", 1000)?;
        policy.add_filter(NewFilter {
            name: None,
            sublayer: "warden".into(),
            weight: Weight::Auto,
            conditions: Conditions { ports, ..Conditions::default() },
            action: FilterAction::BLOCK,
        })?;
        Ok(())
    });
    lab.exchange(lab.v4());
    let client = lab.puppet();
    let datagrams = client.udp(lab.v4());
    datagrams.send_to(lab.v4(), b"redirected").must("send");
    let reports = service.reports(2);
    assert_eq!(reports.iter().map(|report| report.protocol).collect::<Vec<_>>(), [6, 17]);

    let [tcp, _, udp, _] = service.addresses() else { panic!("two listeners of each protocol") };
    let refused = Err(Errno(libc::EPERM));
    assert_eq!(client.connect(*tcp).map(drop), refused);
    assert_eq!(client.udp(*udp).connect(*udp), refused);
    assert_eq!(client.udp(*udp).send_to(*udp, b"direct"), refused);
}

//! Network namespaces: a service gets the flows of those in which it listens, and of those from which
//! the administrator has said it is reached.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    process::Command,
};

use carnet_core::{
    abi,
    classify::Reason,
    event::{Counter, Event, EventKind},
    object::{FailurePolicy, Protocol},
};
use carnet_engine::{Error, Listener, Reach, ServiceSockets};
use carnet_testbed::{
    ConnectionReport, NetworkNamespace, PeerClient, Process, Topology, connect_veth,
};
use carnet_tests::{
    Lab, Must as _, PATIENCE, Plan, Running, handed_on, program,
    puppet::{Errno, Family, Kind, Puppet},
    service::Behaviour,
    until,
};

const REFUSED: Errno = Errno(libc::ECONNREFUSED);

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Another network namespace, with a cable to an existing one, to which all its packets go.
struct Pod {
    namespace: NetworkNamespace,
    /// Its own addresses.
    own: [IpAddr; 2],
    /// The addresses of the cable's other end.
    far: [IpAddr; 2],
}

impl Pod {
    /// One that is cabled to the destination, in which it is number `n`.
    #[track_caller]
    fn at_destination(lab: &Lab, n: u8) -> Self {
        Self::cabled(&lab.network().topology.destination, n)
    }

    /// One that is cabled to the clients' network namespace, in which it is number `n`.
    #[track_caller]
    fn at_host(lab: &Lab, n: u8) -> Self {
        Self::cabled(&lab.network().topology.client, n)
    }

    #[track_caller]
    fn cabled(to: &NetworkNamespace, n: u8) -> Self {
        let link = format!("pod{n}");
        let namespace = NetworkNamespace::create(&link).must("make a network namespace");
        connect_veth(&namespace, "eth0", to, &link).must("lay a cable");
        let v4 = |last: u8| IpAddr::from([198, 51, 100, 4 * n + last]);
        let v6 = |last: u16| IpAddr::from([0x2001, 0xdb8, 1, u16::from(n), 0, 0, 0, last]);
        let (own, far) = ([v4(2), v6(2)], [v4(1), v6(1)]);
        for (side, link, addresses) in [(&namespace, "eth0", own), (to, &*link, far)] {
            for (address, prefix) in addresses.iter().zip([30, 64]) {
                side.add_address(&format!("{address}/{prefix}"), link).must("add an address");
            }
        }
        namespace.add_route("0.0.0.0/0", far[0]).must("add a route");
        namespace.add_route("::/0", far[1]).must("add a route");
        Self { namespace, own, far }
    }

    fn path(&self) -> PathBuf {
        path_of(&self.namespace)
    }

    fn cookie(&self) -> u64 {
        self.namespace.cookie().must("ask for the cookie")
    }

    /// Has a client among the lab's make one connection from here.
    #[track_caller]
    fn connect(&self, lab: &Lab, to: SocketAddr) -> ConnectionReport {
        let client = PeerClient::new(to)
            .in_namespace(&self.namespace)
            .in_cgroup(lab.apps())
            .timeout(PATIENCE);
        let mut reports = client.run().must("run a client");
        assert_eq!(reports.len(), 1, "{reports:#?}");
        reports.remove(0)
    }

    /// The same, and it arrives; the application does not see the redirect.
    #[track_caller]
    fn exchange(&self, lab: &Lab, to: SocketAddr) {
        let report = self.connect(lab, to);
        assert!(report.ok && report.peer == Some(to), "{report:#?}");
    }

    /// The same, and it must be refused for want of a listener.
    #[track_caller]
    fn refused(&self, lab: &Lab, to: SocketAddr) {
        let report = self.connect(lab, to);
        assert_eq!(report.errno.as_deref(), Some("ECONNREFUSED"), "{report:#?}");
    }

    #[track_caller]
    fn puppet(&self, lab: &Lab) -> Puppet {
        Puppet::start(&self.namespace, lab.apps(), None)
    }
}

fn path_of(namespace: &NetworkNamespace) -> PathBuf {
    format!("/proc/self/fd/{}", namespace.as_fd().as_raw_fd()).into()
}

/// The clients' network namespace, which is the host's in these tests.
fn host(lab: &Lab) -> PathBuf {
    path_of(&lab.network().topology.client)
}

/// A service on the host that listens where pods reach it, over IPv4 and IPv6.
#[track_caller]
fn on_host(lab: &Lab, name: &str, pod: &Pod, behaviour: Behaviour) -> Running {
    let listen = pod.far.iter().map(|far| SocketAddr::new(*far, 0)).collect();
    lab.start_with(name, &Behaviour { listen, ..behaviour })
}

/// Says that a pod reaches a service of the host at these addresses.
#[track_caller]
fn reach(lab: &Lab, service: &str, pod: &Pod, addresses: &[SocketAddr]) -> Vec<Listener> {
    let register = |address: &SocketAddr| {
        let reach = Reach { flows: &pod.path(), home: &host(lab), address: *address };
        lab.engine().register_reach(service, &reach).must("register a listener of the host")
    };
    addresses.iter().map(register).collect()
}

fn unavailable(events: &[Event]) -> Vec<Event> {
    let is_it = |event: &&Event| {
        event.kind == EventKind::Blocked as u32 && event.reason == Reason::ServiceUnavailable as u32
    };
    events.iter().filter(is_it).copied().collect()
}

#[test]
fn a_pod_has_a_service_of_its_own() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    lab.service("alpha", 1);
    let (with, without) = (Pod::at_destination(&lab, 1), Pod::at_destination(&lab, 2));
    let start =
        |pod: &Pod| Running::start(&pod.namespace, &lab.cgroup_of("alpha"), &Behaviour::default());
    let service = start(&with);
    for to in [lab.v4(), lab.v6()] {
        with.exchange(&lab, to);
        // The same service, the same policy: but it does not listen here.
        without.refused(&lab, to);
    }
    let refused = trace.until("two refusals", |events| unavailable(events).len() == 2);
    for event in unavailable(refused) {
        assert_eq!(event.handle, lab.handle_of("alpha"), "{event:#?}");
        assert_eq!(event.netns, without.cookie(), "{event:#?}");
    }
    let reports = service.reports(2);
    assert!(reports.iter().all(|report| report.netns == with.cookie()), "{reports:#?}");
    // The onward connections are made from the pod, too.
    let echo = lab.network().echo();
    let connections = echo.wait_for_finished(2, PATIENCE).must("see the connections");
    let peers: Vec<_> = connections.iter().map(|one| one.peer.ip().to_canonical()).collect();
    assert_eq!(peers, with.own);

    // Each namespace has its own listeners; those of one stand for no other.
    let second = start(&without);
    without.exchange(&lab, lab.v4());
    assert_eq!(second.reports(1)[0].netns, without.cookie());
    service.kill();
    with.refused(&lab, lab.v4());
    without.exchange(&lab, lab.v6());
    let listeners = lab.engine().listeners().must("list the listeners");
    let live = listeners.iter().filter(|listener| listener.missed == 0);
    assert!(live.clone().all(|one| (one.netns, one.home) == (without.cookie(), without.cookie())));
    assert_eq!(live.count(), 2, "{listeners:#?}");
}

#[test]
fn a_pod_without_a_listener_goes_on_without_the_service_if_that_may_be_skipped() {
    let lab = Lab::new();
    let mut trace = lab.trace();
    lab.service_with("alpha", Plan { on_failure: FailurePolicy::Skip, ..Plan::default() });
    let service = lab.start("alpha");
    let pod = Pod::at_destination(&lab, 1);
    pod.exchange(&lab, lab.v4());
    assert_eq!(lab.counter(Counter::Skipped), 1);
    lab.exchange(lab.v4());
    assert_eq!(service.reports(1).len(), 1);
    assert_eq!(lab.counter(Counter::Skipped), 1);
    let redirected = trace.first(EventKind::Redirected);
    let client = lab.network().topology.client.cookie().must("ask for the cookie");
    assert_eq!(redirected.netns, client);
}

#[test]
fn the_administrator_registers_what_a_process_has_in_one_network_namespace() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let pod = Pod::at_destination(&lab, 1);
    let unaware = Puppet::start(&pod.namespace, &lab.cgroup_of("alpha"), None);
    let listener = unaware.listen(address("127.0.0.1:0"));
    let tcp = listener.local().must("ask for the address");
    let udp = |on: &str| {
        let socket = unaware.open(Family::V4, Kind::Udp).must("open a UDP socket");
        socket.bind(address(on)).must("bind");
        socket
    };
    let (service, other) = (udp("127.0.0.1:0"), udp("0.0.0.0:0"));
    let wanted = service.local().must("ask for the address");

    let engine = lab.engine();
    let sockets = |netns| ServiceSockets {
        process: Some(unaware.id()),
        udp: vec![wanted],
        netns,
        ..ServiceSockets::default()
    };
    let elsewhere = engine.register_sockets_of("alpha", &sockets(Some(pod.cookie() + 1)));
    let refused = elsewhere.expect_err("a refusal");
    assert!(matches!(refused, Error::NoSocket { limited: true, .. }), "{refused}");
    assert_eq!(engine.listeners().must("list the listeners"), []);

    let registered = engine.register_sockets_of("alpha", &sockets(Some(pod.cookie())));
    let registered = registered.must("register the sockets of a process");
    let places: Vec<_> = registered.iter().map(|one| (one.protocol, one.local)).collect();
    assert_eq!(places, [(Protocol::TCP, tcp), (Protocol::UDP, wanted)]);
    assert!(registered.iter().all(|one| one.netns == pod.cookie()));
    assert_eq!(engine.listeners().must("list the listeners"), registered);
    drop(other);

    let client = pod.puppet(&lab);
    let _connection = client.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    assert!(accepted.query(abi::QUERY_REDIRECT_RECORDS).is_ok());
    let datagrams = client.open(Family::V4, Kind::Udp).must("open a UDP socket");
    datagrams.send_to(lab.v4(), b"datagram").must("send");
    let (datagram, from) = service.receive_from().must("receive");
    assert_eq!(datagram, b"datagram");
    service.send_to(from, b"answer").must("answer");
    assert_eq!(datagrams.receive_from(), Ok((b"answer".to_vec(), lab.v4())));
}

#[test]
fn the_hosts_service_serves_a_container() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_host(&lab, 1);
    let service = on_host(&lab, "alpha", &container, Behaviour::default());
    // That it listens on the host is not enough: nobody has said that it is reached from here.
    container.refused(&lab, lab.v4());
    let reached = reach(&lab, "alpha", &container, service.addresses());
    let homes: Vec<_> = reached.iter().map(|one| (one.netns, one.local)).collect();
    let expected: Vec<_> =
        service.addresses().iter().map(|own| (container.cookie(), *own)).collect();
    assert_eq!(homes, expected);
    // To say it again makes no difference.
    reach(&lab, "alpha", &container, service.addresses());
    assert_eq!(lab.engine().listeners().must("list the listeners").len(), 4);

    for to in [lab.v4(), lab.v6()] {
        container.exchange(&lab, to);
    }
    let SocketAddr::V4(v4) = lab.v4() else { panic!("an IPv4 address") };
    let mapped = SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port());
    let client = container.puppet(&lab);
    let connection = client.connect(mapped).must("connect");
    connection.send(b"mapped").must("send");
    assert_eq!(connection.receive(6), Ok(b"mapped".to_vec()));
    assert_eq!(connection.peer(), Ok(mapped));

    let reports = service.reports(3);
    for (report, to) in reports.iter().zip([lab.v4(), lab.v6(), mapped]) {
        assert_eq!(report.original, to, "{report:#?}");
        assert_eq!(report.netns, container.cookie(), "{report:#?}");
        assert_eq!(report.local, service.addresses()[usize::from(to == lab.v6())], "{report:#?}");
        assert!(container.own.contains(&report.peer.ip()), "{report:#?}");
    }
    // The service connects onwards from the host.
    let all = lab.network().echo().connections();
    let peers: Vec<_> = all.iter().map(|one| one.peer.ip().to_canonical()).collect();
    let (v4, v6) = (IpAddr::V4(Topology::CLIENT_V4), IpAddr::V6(Topology::CLIENT_V6));
    assert_eq!(peers, [v4, v6, v4]);
    let flows = lab.engine().flows().must("list the flows");
    let flow = flows.iter().find(|flow| flow.handle != 0).expect("the open connection");
    let target = SocketAddr::new(flow.target.ip().to_canonical(), flow.target.port());
    assert_eq!((flow.netns, target), (container.cookie(), service.addresses()[0]));

    // The container's own loopback is redirectable, but what is bound to it cannot leave.
    let resolver = client.connect(address("127.0.0.53:53")).must("connect");
    assert_eq!(resolver.peer(), Ok(address("127.0.0.53:53")));
    assert_eq!(service.reports(4)[3].original, address("127.0.0.53:53"));
    let bound = client.tcp(lab.v4());
    bound.bind(address("127.0.0.1:0")).must("bind");
    assert!(bound.connect(lab.v4()).is_err());
    drop((resolver, bound));

    // The host itself has a listener of the service, too, and no other namespace has.
    let elsewhere = Pod::at_host(&lab, 2);
    elsewhere.refused(&lab, lab.v4());
    drop(connection);
    lab.settle();
    assert_eq!(lab.counter(Counter::HandoverFailed), 0);
    assert_eq!(lab.counter(Counter::Delivered), 4);
}

#[test]
fn a_wildcard_listener_of_the_host_is_reached_at_the_address_that_was_named() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_host(&lab, 1);
    let behaviour = Behaviour { listen: vec![address("[::]:0")], ..Behaviour::default() };
    let service = lab.start_with("alpha", &behaviour);
    let port = service.addresses()[0].port();
    let places = container.far.map(|far| SocketAddr::new(far, port));
    reach(&lab, "alpha", &container, &places);
    container.exchange(&lab, lab.v4());
    container.exchange(&lab, lab.v6());
    let reports = service.reports(2);
    let locals: Vec<_> = reports.iter().map(|report| report.local.ip().to_canonical()).collect();
    assert_eq!(locals, container.far);
}

#[test]
fn a_container_follows_the_hosts_service_and_nobody_squats() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_host(&lab, 1);
    let service = on_host(&lab, "alpha", &container, Behaviour::default());
    let places = service.addresses().to_vec();
    reach(&lab, "alpha", &container, &places);
    container.exchange(&lab, lab.v4());
    service.kill();
    container.refused(&lab, lab.v4());
    {
        // Neither a stranger, nor the service as long as it does not register.
        let trap = lab.puppet();
        let _listener = trap.listen(places[0]);
        container.refused(&lab, lab.v4());
    }
    let again = lab.puppet_of("alpha");
    let listener = again.listen(places[0]);
    container.refused(&lab, lab.v4());
    listener.register(&[]).must("register");
    let client = container.puppet(&lab);
    let _connection = client.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    assert!(accepted.query(abi::QUERY_REDIRECT_RECORDS).is_ok());

    // Taken back for others, for this one.
    let engine = lab.engine();
    let take_back =
        |cookie| engine.unregister_reach("alpha", cookie, places[0]).must("take back").len();
    assert_eq!(take_back(Some(container.cookie() + 1)), 0);
    assert_eq!(take_back(None), 1);
    assert_eq!(take_back(None), 0);
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    // The service's own listener is still there.
    let neighbour = lab.puppet();
    let _connection = neighbour.connect(lab.v4()).must("connect");
    listener.accept().must("accept");
}

#[test]
fn the_services_of_host_and_container_see_a_flow_once_each() {
    let lab = Lab::new();
    let container = Pod::at_host(&lab, 1);
    lab.service("bravo", 1);
    lab.service("alpha", 2);
    let alpha = on_host(&lab, "alpha", &container, Behaviour::default());
    // The second one is met on the host, where the first one connects onwards.
    let bravo = lab.start("bravo");
    reach(&lab, "alpha", &container, alpha.addresses());
    for to in [lab.v4(), lab.v6(), lab.v4()] {
        container.exchange(&lab, to);
    }
    lab.settle();
    let chain = [("alpha", alpha), ("bravo", bravo)]
        .map(|(name, service)| (lab.handle_of(name), service.finish()));
    handed_on(&chain, 3);
}

#[test]
fn a_service_of_the_host_that_forgets_a_containers_record_is_found_and_stopped() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_host(&lab, 1);
    let forgetful = Behaviour { forget_records: true, ..Behaviour::default() };
    let alpha = on_host(&lab, "alpha", &container, forgetful);
    reach(&lab, "alpha", &container, alpha.addresses());
    let report = container.connect(&lab, lab.v4());
    assert!(!report.ok, "{report:#?}");
    lab.settle();
    assert_eq!(lab.counter(Counter::Loops), 1);
    assert!(lab.counter(Counter::Forgotten) > 0);
    assert!(lab.network().echo().connections().is_empty());
}

#[test]
fn udp_of_a_container_needs_a_listener_of_its_own() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_host(&lab, 1);
    let mut listen: Vec<_> = container.far.iter().map(|far| SocketAddr::new(*far, 0)).collect();
    listen.push(address("127.0.0.1:0"));
    let behaviour = Behaviour { listen, ..Behaviour::with_datagrams() };
    let service = lab.start_with("alpha", &behaviour);
    reach(&lab, "alpha", &container, &service.addresses()[..2]);
    container.exchange(&lab, lab.v4());
    let client = container.puppet(&lab);
    let socket = client.open(Family::V4, Kind::Udp).must("open a UDP socket");
    assert_eq!(socket.send_to(lab.v4(), b"lost"), Err(REFUSED));
    assert_eq!(socket.connect(lab.v4()), Err(REFUSED));
}

#[test]
fn addresses_by_which_nobody_gets_to_the_service_are_refused_in_words() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_host(&lab, 1);
    let service = on_host(&lab, "alpha", &container, Behaviour::default());
    let port = service.addresses()[0].port();
    let (flows, home) = (container.path(), host(&lab));
    let refused = |flows: &Path, home: &Path, address: SocketAddr| {
        let reach = Reach { flows, home, address };
        lab.engine().register_reach("alpha", &reach).expect_err("a refusal").to_string()
    };
    for (ip, words) in [
        ("127.0.0.1", "no loopback"),
        ("0.0.0.0", "no loopback"),
        ("[::1]", "no loopback"),
        ("[fe80::2]", "link-local"),
        ("224.0.0.1", "multicast"),
        ("192.0.2.2", "is no address of"),
        (&container.own[0].to_string(), "is no address of"),
    ] {
        let told = refused(&flows, &home, address(&format!("{ip}:{port}")));
        assert!(told.contains(words), "{ip}: {told}");
    }
    let there = service.addresses()[0];
    assert!(refused(&home, &home, there).contains("same network namespace"));
    assert!(refused(&flows, &home, SocketAddr::new(there.ip(), 0)).contains("name the port"));
    let alone = NetworkNamespace::create("alone").must("make a network namespace");
    assert!(refused(&path_of(&alone), &home, there).contains("no route"));
    let other = SocketAddr::new(there.ip(), port.wrapping_add(1).max(1));
    let told = refused(&flows, &home, other);
    assert!(told.contains("has registered no listening TCP socket"), "{told}");
    let twin = NetworkNamespace::create("twin").must("make a network namespace");
    twin.add_address(&format!("{}/32", there.ip()), "lo").must("add an address");
    assert!(refused(&path_of(&twin), &home, there).contains("itself"));
    let unknown = Reach { flows: &flows, home: &home, address: there };
    let unknown = lab.engine().register_reach("nobody", &unknown).expect_err("a refusal");
    assert!(matches!(unknown, Error::NoService { .. }), "{unknown}");
    assert!(lab.engine().listeners().must("list").iter().all(|one| one.netns == one.home));
}

#[test]
fn a_network_namespace_that_takes_the_place_of_another_is_not_that_one() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let container = Pod::at_destination(&lab, 1);
    let there = address("203.0.113.1:8443");
    // A home for the service at the far end of a cable of its own.
    let home = |n: u8| {
        let home = NetworkNamespace::create("home").must("make a network namespace");
        let link = format!("home{n}");
        connect_veth(&container.namespace, &link, &home, "eth0").must("lay a cable");
        home.add_address("203.0.113.1/24", "eth0").must("add an address");
        let own = format!("203.0.113.{}/24", n + 1);
        container.namespace.add_address(&own, &link).must("add an address");
        home
    };
    let register = |home: &NetworkNamespace| {
        let reach = Reach { flows: &container.path(), home: &path_of(home), address: there };
        lab.engine().register_reach("alpha", &reach).must("register");
    };
    let client = container.puppet(&lab);
    {
        let first = home(1);
        let service = Puppet::start(&first, &lab.cgroup_of("alpha"), None);
        let _listener = service.serve(there);
        register(&first);
        client.connect(lab.v4()).must("connect");
    }
    // The kernel takes its time to take a namespace away, and its cable would still have the route.
    let devices = || fs::read_to_string("/proc/thread-self/net/dev").must("list the links");
    let links = || container.namespace.run(devices).must("enter a network namespace");
    until("the first home's cable to go", links, |links| !links.contains("home1:"));
    // Another one at the same address, of the same service: nobody has said that it is reached, even
    // if the kernel has given it the number of the first one.
    let second = home(2);
    let service = Puppet::start(&second, &lab.cgroup_of("alpha"), None);
    let _listener = service.serve(there);
    assert_eq!(client.connect(lab.v4()).err(), Some(REFUSED));
    register(&second);
    client.connect(lab.v4()).must("connect");
}

/// Runs a script of `examples/namespaces`, which checks for itself that all goes as it says.
#[track_caller]
fn example(script: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("CARNET", program("carnet"));
    let mut process = Process::spawn(&mut command).must("start a shell");
    process.close_input();
    let status = process.wait(PATIENCE).must("wait for the script's end");
    assert!(status.success(), "{status}: {:#?}", process.lines());
}

#[test]
fn the_example_of_a_pod() {
    example(include_str!("../../../examples/namespaces/pod.sh"));
}

#[test]
fn the_example_of_a_container() {
    example(include_str!("../../../examples/namespaces/container.sh"));
}

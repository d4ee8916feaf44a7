//! The fixtures on the real kernel. Needs root.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail like the test itself")]

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use carnet_testbed::{
    BpfDirectory, Cgroup, ConnectionState, EchoServer, Error, NamedServer, NetworkNamespace,
    PeerClient, PeerServer, Process, Stage, Topology, connect_veth,
    exchange::{Family, checked_exchange},
    name_at, peer_command, require_root,
};

const PATIENCE: Duration = Duration::from_secs(20);

const CLIENT_V4: IpAddr = IpAddr::V4(Topology::CLIENT_V4);
const CLIENT_V6: IpAddr = IpAddr::V6(Topology::CLIENT_V6);

fn topology() -> Topology {
    require_root().unwrap();
    Topology::client_and_destination().unwrap()
}

/// An echo server on the destination's IPv4 and IPv6 addresses.
fn destination_server(topology: &Topology) -> EchoServer {
    let addresses = [(Topology::DESTINATION_V4, 0).into(), (Topology::DESTINATION_V6, 0).into()];
    EchoServer::start_in(&topology.destination, addresses).unwrap()
}

/// A program that runs until it is killed or its standard input ends.
fn idle_program() -> Command {
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped());
    command
}

/// The errno behind an error.
fn errno(error: &Error) -> Option<i32> {
    match error {
        Error::Io { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

#[test]
fn namespaces_talk_over_ipv4_and_ipv6() {
    let topology = topology();
    let server = destination_server(&topology);
    for (seed, address) in (0_u64..).zip(server.addresses()) {
        topology.client.run(|| checked_exchange(*address, 3_000_001, seed)).unwrap().unwrap();
    }
    let connections = server.wait_for_finished(2, PATIENCE).unwrap();
    let peers: Vec<_> = connections.iter().map(|one| one.peer.ip()).collect();
    assert_eq!(peers, [CLIENT_V4, CLIENT_V6]);
    for (connection, address) in connections.iter().zip(server.addresses()) {
        assert_eq!(connection.local, *address);
        assert_eq!(connection.received, 3_000_001);
        assert_eq!(connection.state, ConnectionState::Finished);
    }
}

#[test]
fn topologies_with_the_same_addresses_do_not_see_each_other() {
    let topologies = [topology(), topology()];
    let address = SocketAddr::from((Topology::DESTINATION_V6, 7));
    let servers: Vec<_> = ["first", "second"]
        .into_iter()
        .zip(&topologies)
        .map(|(name, topology)| {
            NamedServer::start_in(&topology.destination, name, [address]).unwrap()
        })
        .collect();
    for (server, topology) in servers.iter().zip(&topologies) {
        let name = topology.client.run(|| name_at(address)).unwrap().unwrap();
        assert_eq!(name, server.name());
        assert_eq!(server.connections().len(), 1);
    }
    assert_ne!(topologies[0].client.inode(), topologies[1].client.inode());
    assert_ne!(topologies[0].client.cookie().unwrap(), topologies[1].client.cookie().unwrap());
}

#[test]
fn a_namespace_has_loopback_and_nothing_of_the_host() {
    require_root().unwrap();
    let namespace = NetworkNamespace::create("lonely").unwrap();
    let inside = namespace.run(|| fs::metadata("/proc/thread-self/ns/net").unwrap().ino());
    assert_eq!(inside.unwrap(), namespace.inode());
    assert_ne!(fs::metadata("/proc/thread-self/ns/net").unwrap().ino(), namespace.inode());

    let addresses = ["127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap()];
    let server = NamedServer::start_in(&namespace, "inside", addresses).unwrap();
    for address in server.addresses() {
        assert_eq!(namespace.run(|| name_at(*address)).unwrap().unwrap(), "inside");
    }
    let links = namespace.run(|| fs::read_to_string("/proc/thread-self/net/dev")).unwrap().unwrap();
    assert_eq!(links.matches(':').count(), 1, "only lo: {links}");
}

#[test]
fn a_namespace_and_its_cables_vanish_with_it() {
    let Topology { client, destination } = topology();
    let has_link = || {
        let links = client.run(|| fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        links.unwrap().contains(Topology::LINK)
    };
    assert!(has_link());
    drop(destination);
    // The kernel takes a dead namespace apart in the background and tells nobody.
    let deadline = Instant::now() + PATIENCE;
    while has_link() {
        assert!(Instant::now() < deadline, "the namespace is still there");
        thread::yield_now();
    }
}

#[test]
fn routes_and_settings_make_a_router() {
    require_root().unwrap();
    let [client, router, destination] =
        ["client", "router", "destination"].map(|name| NetworkNamespace::create(name).unwrap());
    connect_veth(&client, "up", &router, "down").unwrap();
    connect_veth(&router, "up", &destination, "down").unwrap();
    for (namespace, address, link) in [
        (&client, "192.0.2.1/24", "up"),
        (&router, "192.0.2.254/24", "down"),
        (&router, "198.51.100.254/24", "up"),
        (&destination, "198.51.100.1/24", "down"),
        (&client, "2001:db8:1::1/64", "up"),
        (&router, "2001:db8:1::ff/64", "down"),
        (&router, "2001:db8:2::ff/64", "up"),
        (&destination, "2001:db8:2::1/64", "down"),
    ] {
        namespace.add_address(address, link).unwrap();
    }
    router.set_sysctl("ipv4/ip_forward", "1").unwrap();
    router.set_sysctl("ipv6/conf/all/forwarding", "1").unwrap();
    client.add_route("0.0.0.0/0", "192.0.2.254".parse().unwrap()).unwrap();
    client.add_route("::/0", "2001:db8:1::ff".parse().unwrap()).unwrap();
    destination.add_route("192.0.2.0/24", "198.51.100.254".parse().unwrap()).unwrap();
    destination.add_route("2001:db8:1::/64", "2001:db8:2::ff".parse().unwrap()).unwrap();

    let addresses = ["198.51.100.1:0", "[2001:db8:2::1]:0"].map(|text| text.parse().unwrap());
    let server = EchoServer::start_in(&destination, addresses).unwrap();
    for address in server.addresses() {
        client.run(|| checked_exchange(*address, 100_000, 1)).unwrap().unwrap();
    }
    let forwards = |namespace: &NetworkNamespace| {
        namespace.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_forward")).unwrap().unwrap()
    };
    assert_eq!([forwards(&router), forwards(&client)], ["1\n", "0\n"]);
}

#[test]
fn mistakes_with_a_namespace_are_named() {
    require_root().unwrap();
    let namespace = NetworkNamespace::create("strict").unwrap();
    let error = namespace.add_address("192.0.2.1/24", "nolink").unwrap_err();
    assert_eq!(errno(&error), Some(libc::ENODEV), "{error:?}");
    assert!(error.to_string().contains("nolink in namespace strict"), "{error}");
    let error = namespace.add_address("192.0.2.1", "lo").unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error:?}");
    let error = namespace.add_route("0.0.0.0/0", CLIENT_V6).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error:?}");
    let error = namespace.set_sysctl("../kernel/hostname", "x").unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error:?}");
}

#[test]
fn a_cgroup_holds_what_is_started_in_it_and_takes_it_along() {
    require_root().unwrap();
    let cgroup = Cgroup::create("carnet-testbed-holds").unwrap();
    let path = cgroup.path().to_owned();
    assert_eq!(cgroup.id(), fs::metadata(&path).unwrap().ino());
    let inner = cgroup.child("inner").unwrap();

    let mut spawned = cgroup.spawn(&mut idle_program()).unwrap();
    let mut moved = idle_program().spawn().unwrap();
    inner.add_process(moved.id()).unwrap();
    assert_eq!(cgroup.processes().unwrap(), [spawned.id()]);
    assert_eq!(inner.processes().unwrap(), [moved.id()]);
    let membership = fs::read_to_string(format!("/proc/{}/cgroup", moved.id())).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    let own = membership.lines().find(|line| line.starts_with("0::")).unwrap();
    assert!(own.ends_with(&format!("/{name}/inner")), "{own}");

    drop(cgroup);
    assert!(!path.exists());
    for child in [&mut spawned, &mut moved] {
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
    // Its directory is gone already, and that is fine.
    drop(inner);
}

#[test]
fn a_cgroup_dropped_children_first_is_gone_as_well() {
    require_root().unwrap();
    let cgroup = Cgroup::create("carnet-testbed-order").unwrap();
    let path = cgroup.path().to_owned();
    let inner = cgroup.child("inner").unwrap();
    assert_eq!(errno(&cgroup.child("inner").unwrap_err()), Some(libc::EEXIST));
    drop(inner);
    assert!(!path.join("inner").exists());
    assert!(path.exists());
    drop(cgroup);
    assert!(!path.exists());
}

#[test]
fn killing_a_cgroup_leaves_it_usable() {
    require_root().unwrap();
    let cgroup = Cgroup::create("carnet-testbed-kill").unwrap();
    for _ in 0..2 {
        let mut child = cgroup.spawn(&mut idle_program()).unwrap();
        cgroup.kill().unwrap();
        assert_eq!(cgroup.processes().unwrap(), [] as [u32; 0]);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}

#[test]
fn the_calling_process_is_never_moved() {
    require_root().unwrap();
    let cgroup = Cgroup::create("carnet-testbed-self").unwrap();
    for pid in [0, std::process::id()] {
        let error = cgroup.add_process(pid).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error:?}");
    }
    assert!(matches!(Cgroup::create("a/b"), Err(Error::Argument { .. })));
    assert!(matches!(cgroup.child(".."), Err(Error::Argument { .. })));
}

fn is_bpffs(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == path.to_str() && fields.next() == Some("bpf")
    })
}

#[test]
fn a_bpf_directory_is_private_visible_to_children_and_temporary() {
    require_root().unwrap();
    let directories = [(); 2].map(|()| BpfDirectory::create("carnet-testbed-bpffs").unwrap());
    let paths = directories.each_ref().map(|directory| directory.path().to_owned());
    assert_ne!(paths[0], paths[1]);
    assert!(paths.iter().all(|path| is_bpffs(path)));
    fs::create_dir_all(paths[0].join("carnet/instance")).unwrap();
    assert!(!paths[1].join("carnet").exists());
    let seen = Command::new("ls").arg(paths[0].join("carnet")).output().unwrap();
    assert_eq!(seen.stdout, b"instance\n");
    drop(directories);
    assert!(paths.iter().all(|path| !path.exists() && !is_bpffs(path)));
}

#[test]
fn a_client_process_exchanges_from_its_namespace_and_cgroup() {
    let topology = topology();
    let cgroup = Cgroup::create("carnet-testbed-client").unwrap();
    let server = destination_server(&topology);
    let [v4, v6] = [server.addresses()[0], server.addresses()[1]];
    let mapped = SocketAddr::from((Topology::DESTINATION_V4.to_ipv6_mapped(), v4.port()));
    let mapped_client = IpAddr::V6(Topology::CLIENT_V4.to_ipv6_mapped());
    for (to, family, peer, local) in [
        (v4, Family::V4, v4, CLIENT_V4),
        (v6, Family::V6, v6, CLIENT_V6),
        (v4, Family::Mapped, mapped, mapped_client),
    ] {
        let reports = PeerClient::new(to)
            .bytes(200_000)
            .count(5)
            .parallel(3)
            .family(family)
            .in_namespace(&topology.client)
            .in_cgroup(&cgroup)
            .run()
            .unwrap();
        assert_eq!(reports.len(), 5);
        for (number, report) in (0..).zip(&reports) {
            assert!(report.ok, "{report:?}");
            assert_eq!((report.number, report.bytes), (number, 200_000));
            assert_eq!((report.to, report.peer), (to, Some(peer)));
            assert_eq!(report.local.unwrap().ip(), local);
        }
    }
    let connections = server.wait_for_finished(15, PATIENCE).unwrap();
    assert!(connections.iter().all(|one| one.received == 200_000));
}

#[test]
fn multipath_clients_reach_multipath_servers() {
    let topology = topology();
    let addresses = [(Topology::DESTINATION_V4, 0).into()];
    let server =
        topology.destination.run(|| EchoServer::start_multipath(addresses)).unwrap().unwrap();
    let client = PeerClient::new(server.address()).mptcp().in_namespace(&topology.client);
    let reports = client.run().unwrap();
    assert!(reports[0].ok, "{reports:?}");
    // Multipath TCP falls back to TCP in silence: ask the kernel what it was.
    let counters = topology
        .destination
        .run(|| fs::read_to_string("/proc/thread-self/net/netstat"))
        .unwrap()
        .unwrap();
    let [names, values] = {
        let mut lines = counters.lines().filter(|line| line.starts_with("MPTcpExt:"));
        [(); 2].map(|()| lines.next().unwrap().split(' '))
    };
    let accepted = names.zip(values).find(|(name, _)| *name == "MPCapableACKRX").unwrap();
    assert_eq!(accepted.1, "1");
}

#[test]
fn a_client_binds_and_drops_its_privileges() {
    let topology = topology();
    let cgroup = Cgroup::create("carnet-testbed-user").unwrap();
    let server = destination_server(&topology);
    let client = PeerClient::new(server.address())
        .bind((Ipv4Addr::UNSPECIFIED, 4321).into())
        .in_namespace(&topology.client)
        .in_cgroup(&cgroup);
    assert!(client.run().unwrap()[0].ok);
    assert_eq!(server.connections()[0].peer, (Topology::CLIENT_V4, 4321).into());

    let mut idle = idle_program();
    topology.client.enter_command(&mut idle).unwrap();
    cgroup.enter_command(&mut idle).unwrap();
    carnet_testbed::run_as(&mut idle, 12_345, 54_321);
    let process = Process::spawn(&mut idle).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let field = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("Uid:"), "12345 12345 12345 12345");
    assert_eq!(field("Gid:"), "54321 54321 54321 54321");
    assert_eq!(field("Groups:"), "");
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(cgroup.processes().unwrap(), [process.id()]);
}

#[test]
fn a_failing_client_says_where_and_why() {
    let topology = topology();
    let vacant = {
        let server = destination_server(&topology);
        server.address()
    };
    let client = PeerClient::new(vacant).count(2).in_namespace(&topology.client);
    let reports = client.run().unwrap();
    assert_eq!(reports.len(), 2);
    for report in &reports {
        assert!(!report.ok);
        assert_eq!(report.stage, Some(Stage::Connect));
        assert_eq!(report.errno.as_deref(), Some("ECONNREFUSED"), "{report:?}");
    }
    assert_eq!(client.command().unwrap().output().unwrap().status.code(), Some(1));

    let unreachable = "203.0.113.1:7".parse().unwrap();
    let reports = PeerClient::new(unreachable).in_namespace(&topology.client).run().unwrap();
    assert_eq!(reports[0].errno.as_deref(), Some("ENETUNREACH"), "{reports:?}");

    // A server that greets instead of echoing.
    let impostor = NamedServer::start_in(
        &topology.destination,
        "impostor",
        [(Topology::DESTINATION_V4, 0).into()],
    )
    .unwrap();
    let reports = PeerClient::new(impostor.address()).in_namespace(&topology.client).run().unwrap();
    assert_eq!(reports[0].stage, Some(Stage::Check), "{reports:?}");
}

#[test]
fn a_server_process_says_its_ports_and_ends_with_its_input() {
    let topology = topology();
    let cgroup = Cgroup::create("carnet-testbed-server").unwrap();
    let addresses = [(Topology::DESTINATION_V4, 0).into(), (Topology::DESTINATION_V6, 0).into()];
    let server = PeerServer::start(Some(&topology.destination), Some(&cgroup), addresses).unwrap();
    assert_eq!(server.addresses().len(), 2);
    assert_eq!(cgroup.processes().unwrap(), [server.id()]);
    for address in server.addresses() {
        topology.client.run(|| checked_exchange(*address, 50_000, 1)).unwrap().unwrap();
    }
    drop(server);

    let mut command = peer_command().unwrap();
    command.args(["server", "--listen", "127.0.0.1:0"]);
    topology.destination.enter_command(&mut command).unwrap();
    let mut process = Process::spawn(&mut command).unwrap();
    process.wait_for_line("ready", PATIENCE, |line| line.starts_with("ready 127.0.0.1:")).unwrap();
    process.close_input();
    assert!(process.wait(PATIENCE).unwrap().success());

    let taken = NamedServer::start_in(
        &topology.destination,
        "taken",
        [(Topology::DESTINATION_V4, 7).into()],
    )
    .unwrap();
    let error =
        PeerServer::start(Some(&topology.destination), None, [taken.address()]).unwrap_err();
    assert!(matches!(error, Error::ProcessEnded { .. }), "{error:?}");
}

#[test]
fn the_helper_refuses_bad_arguments() {
    for arguments in [
        &["client"][..],
        &["client", "--to", "nowhere"],
        &["client", "--to", "127.0.0.1:1", "--parallel", "0"],
        &["client", "--to", "127.0.0.1:1", "--family", "v5"],
        &["server"],
        &["server", "--listen", "1.2.3.4"],
    ] {
        let output = peer_command().unwrap().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_broken_connection_is_seen_as_such() {
    let topology = topology();
    let server = destination_server(&topology);
    let stream = topology.client.run(|| TcpStream::connect(server.address())).unwrap().unwrap();
    let open = |connections: &[carnet_testbed::AcceptedConnection]| connections.len() == 1;
    let connections = server.wait_for("a connection", PATIENCE, open).unwrap();
    assert_eq!(connections[0].state, ConnectionState::Open);
    let error = server.wait_for_finished(1, Duration::from_millis(1)).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    // Closing with unread data in the queue, or with no lingering, is a reset.
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    let connections = server.wait_for_finished(1, PATIENCE).unwrap();
    assert_eq!(connections[0].state, ConnectionState::Failed(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn a_process_is_waited_for_signalled_and_killed() {
    let mut process = Process::spawn(&mut idle_program()).unwrap();
    let error = process.wait(Duration::from_millis(1)).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    process.terminate().unwrap();
    assert_eq!(process.wait(PATIENCE).unwrap().signal(), Some(15));

    let mut command = Command::new("sh");
    command.args(["-c", "echo one; echo two; read line; exit 3"]);
    let mut process = Process::spawn(&mut command).unwrap();
    process.wait_for_line("two", PATIENCE, |line| line == "two").unwrap();
    // Lines that came before are found as well.
    process.wait_for_line("one", PATIENCE, |line| line == "one").unwrap();
    process.close_input();
    let error = process.wait_for_line("three", PATIENCE, |line| line == "three").unwrap_err();
    assert!(matches!(error, Error::ProcessEnded { .. }), "{error:?}");
    assert_eq!(process.wait(PATIENCE).unwrap().code(), Some(3));
    assert_eq!(process.lines(), ["one", "two"]);
}

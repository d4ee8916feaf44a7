//! The ways to connect a TCP socket.

use std::net::{IpAddr, SocketAddr};

use carnet_core::{event::Counter, object::Conditions};
use carnet_testbed::Topology;
use carnet_tests::{
    Must as _,
    puppet::{Errno, Family, Kind, Ring},
};

use crate::{Scene, echoes};

/// `TCP_FASTOPEN_CONNECT` at `IPPROTO_TCP`.
const FAST_OPEN_CONNECT: (i32, i32) = (6, 30);

#[test]
fn a_plain_connect() {
    Scene::new().redirects(|client, to| client.connect(to).must("connect"));
}

#[test]
fn a_connect_that_does_not_block() {
    Scene::new().redirects(|client, to| {
        let socket = client.tcp(to);
        socket.connect_nonblocking(to).must("connect");
        socket
    });
}

#[test]
fn a_bound_socket() {
    Scene::new().redirects(|client, to| {
        let socket = client.tcp(to);
        let own: IpAddr = match (to.is_ipv4(), to.ip().to_canonical().is_ipv4()) {
            (true, _) => Topology::CLIENT_V4.into(),
            (false, true) => Topology::CLIENT_V4.to_ipv6_mapped().into(),
            (false, false) => Topology::CLIENT_V6.into(),
        };
        socket.bind((own, 0).into()).must("bind");
        socket.connect(to).must("connect");
        socket
    });
}

#[test]
fn a_socket_that_is_bound_to_a_device() {
    Scene::new().redirects(|client, to| {
        let socket = client.tcp(to);
        socket.bind_device(Topology::LINK).must("bind to a device");
        socket.connect(to).must("connect");
        socket
    });
}

#[test]
fn fast_open_by_sendto() {
    Scene::new().redirects(|client, to| {
        let socket = client.tcp(to);
        socket.fast_open(to, b"early").must("connect with data");
        assert_eq!(socket.receive(5), Ok(b"early".to_vec()));
        socket
    });
}

#[test]
fn fast_open_by_connect() {
    Scene::new().redirects(|client, to| {
        let socket = client.tcp(to);
        let (level, option) = FAST_OPEN_CONNECT;
        socket.set(level, option, &1_i32.to_ne_bytes()).must("ask for fast open");
        // Where there is a cookie, this only promises: the SYN goes with the first data.
        socket.connect(to).must("connect");
        socket.send(b"early").must("send");
        assert_eq!(socket.receive(5), Ok(b"early".to_vec()));
        socket
    });
}

/// Has the kernel ask for fast open's cookies, give them, and use them from the second time on.
#[test]
fn fast_open_with_a_cookie() {
    let mut scene = Scene::new();
    let namespace = &scene.lab.network().topology.client;
    namespace.set_sysctl("ipv4/tcp_fastopen", "0x403").must("have fast open on both sides");
    // A service whose listener knows of it.
    scene.service = scene.lab.start("alpha");
    for _ in 0..3 {
        scene.redirects(|client, to| {
            let socket = client.tcp(to);
            socket.fast_open(to, b"early").must("connect with data");
            assert_eq!(socket.receive(5), Ok(b"early".to_vec()));
            socket
        });
        scene.redirects(|client, to| {
            let socket = client.tcp(to);
            let (level, option) = FAST_OPEN_CONNECT;
            socket.set(level, option, &1_i32.to_ne_bytes()).must("ask for fast open");
            socket.connect(to).must("connect");
            socket
        });
    }
    let table = scene.lab.network().topology.client.run(|| {
        std::fs::read_to_string("/proc/thread-self/net/netstat").must("read the statistics")
    });
    let table = table.must("enter the namespace");
    let mut lines = table.lines().filter(|line| line.starts_with("TcpExt:"));
    let [names, values] = [lines.next(), lines.next()].map(|line| line.unwrap_or_default());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let passive = pairs.find(|(name, _)| *name == "TCPFastOpenPassive");
    assert!(passive.is_some_and(|(_, count)| count != "0"), "{names}\n{values}");
}

#[test]
fn multipath_tcp() {
    Scene::new().redirects(|client, to| {
        let socket = client.open(Family::of(to), Kind::Multipath).must("open");
        socket.connect(to).must("connect");
        socket
    });
}

#[test]
fn multipath_tcp_with_fast_open() {
    Scene::new().redirects(|client, to| {
        let socket = client.open(Family::of(to), Kind::Multipath).must("open");
        match socket.fast_open(to, b"early") {
            Ok(()) => assert_eq!(socket.receive(5), Ok(b"early".to_vec())),
            // Before Linux 6.2 there is no such thing.
            Err(Errno(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTCONN | libc::EPIPE)) => {
                socket.connect(to).must("connect");
            }
            Err(errno) => panic!("{errno}"),
        }
        socket
    });
}

#[track_caller]
fn by_ring(ring: Ring) {
    Scene::new().redirects(|client, to| {
        let socket = client.ring_open(Family::of(to), Kind::Tcp, ring).must("open");
        socket.ring_connect(to, ring).must("connect");
        socket
    });
}

#[test]
fn io_uring() {
    by_ring(Ring::Plain);
}

#[test]
fn io_uring_by_a_worker() {
    by_ring(Ring::Async);
}

#[test]
fn io_uring_by_a_polling_thread() {
    by_ring(Ring::Polled);
}

#[test]
fn a_socket_that_is_connected_again() {
    Scene::new().redirects(|client, to| {
        let socket = client.connect(to).must("connect");
        echoes(&socket);
        socket.disconnect().must("disconnect");
        socket.connect(to).must("connect again");
        socket
    });
}

#[test]
fn a_connect_after_one_that_failed() {
    // Nobody listens at port 1, and no filter sends it elsewhere.
    let ports = vec!["2-65535".parse().expect("ports")];
    let scene = Scene::with(Conditions { ports, ..Conditions::default() });
    for to in scene.destinations() {
        let socket = scene.client.tcp(to);
        let nobody = SocketAddr::new(to.ip(), 1);
        assert_eq!(socket.connect(nobody), Err(Errno(libc::ECONNREFUSED)));
        // The kernel may say of the first one once more that it failed.
        if socket.connect(to).is_err() {
            socket.connect(to).must("connect again");
        }
        scene.arrived(&socket, to);
    }
}

#[test]
fn a_thread_that_is_not_the_first() {
    Scene::new().redirects(|client, to| client.connect_in_thread(to).must("connect"));
}

#[test]
fn a_socket_that_was_made_before_the_engine_came_up() {
    let mut scene = Scene::new();
    let destinations = scene.destinations();
    let sockets = destinations.map(|to| scene.client.tcp(to));
    scene.lab.down();
    let made_without = destinations.map(|to| scene.client.tcp(to));
    scene.lab.up();
    scene.lab.service("alpha", 1);
    scene.service = scene.lab.start("alpha");
    for (socket, to) in sockets.iter().chain(&made_without).zip(destinations.iter().cycle()) {
        socket.connect(*to).must("connect");
        scene.arrived(socket, *to);
    }
}

/// `0.0.0.0` and `::` stand for this host, as a destination too.
#[test]
fn the_unspecified_address() {
    let scene = Scene::with(Conditions {
        destinations: ["127.0.0.1", "::1"].map(|ip| ip.parse().expect("an address")).into(),
        ..Conditions::default()
    });
    let resolver = scene.lab.puppet();
    for (on, to) in [("127.0.0.1", "0.0.0.0"), ("127.0.0.1", "::ffff:0.0.0.0"), ("::1", "::")] {
        let listener = resolver.listen(SocketAddr::new(on.parse().expect("an address"), 0));
        let port = listener.local().must("ask for the port").port();
        let to = SocketAddr::new(to.parse().expect("an address"), port);
        let connection = scene.client.connect(to).must("connect");
        let report = scene.report_of(connection.local().must("ask for the local address"));
        assert_eq!(report.original.port(), port, "{report:#?}");
    }
}

#[test]
fn a_socket_that_an_ordinary_user_has_bound_to_a_device() {
    let scene = Scene::new();
    scene.client.become_user(65534);
    for to in scene.destinations() {
        let socket = scene.client.tcp(to);
        socket.bind_device(Topology::LINK).must("bind to a device");
        assert_eq!(socket.connect(to), Err(Errno(libc::EHOSTUNREACH)), "{to}");
        let socket = scene.client.udp(to);
        socket.bind_device(Topology::LINK).must("bind to a device");
        assert_eq!(socket.connect(to), Err(Errno(libc::ECONNREFUSED)), "{to}: no UDP listener");
    }
    assert_eq!(scene.lab.counter(Counter::BoundToDevice), 3);
    assert!(scene.lab.network().echo().connections().is_empty());
}

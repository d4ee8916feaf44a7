//! The ways to send datagrams.

use std::net::SocketAddr;

use carnet_core::{
    abi,
    address::Endpoint,
    classify::Reason,
    event::EventKind,
    object::{Conditions, FailurePolicy, Protocol},
};
use carnet_testbed::{Cgroup, Topology};
use carnet_tests::{
    Lab, Must as _, Plan,
    contract::Scratch,
    puppet::{Errno, Family, Hand, Kind, Puppet, Ring},
};
use zerocopy::FromBytes as _;

/// A lab with one service, which gets all datagrams, and a client.
pub(crate) struct Scene {
    // In the order in which they are to go.
    pub(crate) client: Puppet,
    service: Puppet,
    pub(crate) lab: Lab,
}

/// Where the service gets datagrams.
pub(crate) struct Post<'a> {
    service: &'a Puppet,
    sockets: [Hand<'a>; 2],
}

impl Scene {
    #[track_caller]
    pub(crate) fn new() -> Self {
        Self::with(Conditions::default())
    }

    #[track_caller]
    pub(crate) fn with(conditions: Conditions) -> Self {
        let lab = Lab::new();
        lab.service_with("alpha", Plan { conditions, ..Plan::default() });
        let (client, service) = (lab.puppet(), lab.puppet_of("alpha"));
        Self { client, service, lab }
    }

    /// Registers the service's sockets.
    #[track_caller]
    pub(crate) fn post(&self) -> Post<'_> {
        let registered = |on: &str| {
            let on: SocketAddr = on.parse().expect("an address");
            let socket = self.service.open(Family::of(on), Kind::Udp).must("open");
            socket.bind(on).must("bind");
            socket.register(&[]).must("register");
            socket
        };
        let sockets = ["127.0.0.1:0", "[::1]:0"].map(registered);
        Post { service: &self.service, sockets }
    }

    /// A destination in every form. Nobody is there: the service answers in its place.
    pub(crate) fn destinations() -> [SocketAddr; 3] {
        let (v4, v6) = (Topology::DESTINATION_V4, Topology::DESTINATION_V6);
        [(v4, 53).into(), (v6, 53).into(), (v4.to_ipv6_mapped(), 53).into()]
    }

    /// Has `send` send the word `marco` to the destination in each of its forms, and checks that it
    /// has come to the service, and that the service's answer comes from the destination.
    #[track_caller]
    fn redirects<'a>(&'a self, send: impl Fn(&'a Puppet, SocketAddr) -> Hand<'a>) {
        let post = self.post();
        for to in Self::destinations() {
            let socket = send(&self.client, to);
            post.exchanges(&socket, to);
        }
    }
}

impl Post<'_> {
    /// Takes the datagram `marco` that came for this destination; gives the socket and the address
    /// with which it is answered.
    #[track_caller]
    fn takes(&self, to: SocketAddr) -> (&Hand<'_>, SocketAddr) {
        let socket = &self.sockets[usize::from(!to.ip().to_canonical().is_ipv4())];
        let (bytes, from) = socket.receive_from().must("receive");
        assert_eq!(bytes, b"marco", "from {from}");
        let question = self.service.open(Family::of(from), Kind::Udp).must("open");
        question.connect(from).must("ask about a flow");
        let original = question.query(abi::ORIGINAL_DESTINATION).must("ask for the destination");
        let original = Endpoint::read_from_bytes(&original).expect("an endpoint");
        assert_eq!(SocketAddr::from(original), to);
        (socket, from)
    }

    #[track_caller]
    pub(crate) fn exchanges(&self, client: &Hand<'_>, to: SocketAddr) {
        let (socket, from) = self.takes(to);
        socket.send_to(from, b"polo").must("answer");
        assert_eq!(client.receive_from(), Ok((b"polo".to_vec(), to)));
    }
}

/// A socket of the client for a destination.
#[track_caller]
pub(crate) fn open(client: &Puppet, to: SocketAddr) -> Hand<'_> {
    client.open(Family::of(to), Kind::Udp).must("open")
}

/// Another address of the destination's family.
fn elsewhere(to: SocketAddr) -> SocketAddr {
    SocketAddr::new(to.ip(), 123)
}

#[test]
fn sendto() {
    Scene::new().redirects(|client, to| {
        let socket = open(client, to);
        socket.send_to(to, b"marco").must("send");
        socket
    });
}

#[test]
fn a_connected_socket() {
    Scene::new().redirects(|client, to| {
        let socket = open(client, to);
        socket.connect(to).must("connect");
        socket.send(b"marco").must("send");
        socket
    });
}

#[test]
fn a_socket_that_is_connected_elsewhere() {
    // Of what it is connected to, nothing goes to the service.
    let conditions = Conditions { ports: vec![53.into()], ..Conditions::default() };
    let scene = Scene::with(conditions);
    let post = scene.post();
    for to in Scene::destinations() {
        let socket = open(&scene.client, to);
        socket.connect(elsewhere(to)).must("connect elsewhere");
        socket.send_to(to, b"marco").must("send");
        // An answer would not reach it: it takes datagrams from where it is connected alone.
        post.takes(to);
    }
}

#[test]
fn a_socket_that_is_connected_again() {
    Scene::new().redirects(|client, to| {
        let socket = open(client, to);
        socket.connect(elsewhere(to)).must("connect elsewhere");
        socket.disconnect().must("disconnect");
        socket.connect(to).must("connect");
        socket.send(b"marco").must("send");
        socket
    });
}

#[test]
fn sendmmsg() {
    let scene = Scene::new();
    let post = scene.post();
    for to in Scene::destinations() {
        let socket = open(&scene.client, to);
        socket.send_many(to, &[b"marco", b"marco", b"marco"]).must("send");
        let answers = [(); 3].map(|()| post.takes(to));
        let (service, from) = answers[0];
        assert!(answers.iter().all(|(_, other)| *other == from), "one flow");
        service.send_to(from, b"polo").must("answer");
        assert_eq!(socket.receive_from(), Ok((b"polo".to_vec(), to)));
    }
}

#[track_caller]
fn by_ring(ring: Ring) {
    let scene = Scene::new();
    scene.redirects(|client, to| {
        let socket = open(client, to);
        socket.ring_send(to, b"marco", ring).must("send");
        socket
    });
    scene.redirects(|client, to| {
        let socket = open(client, to);
        socket.ring_connect(to, ring).must("connect");
        socket.send(b"marco").must("send");
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
fn a_bound_socket() {
    Scene::new().redirects(|client, to| {
        let socket = open(client, to);
        let own: std::net::IpAddr = match (to.is_ipv4(), to.ip().to_canonical().is_ipv4()) {
            (true, _) => Topology::CLIENT_V4.into(),
            (false, true) => Topology::CLIENT_V4.to_ipv6_mapped().into(),
            (false, false) => Topology::CLIENT_V6.into(),
        };
        socket.bind((own, 0).into()).must("bind");
        socket.send_to(to, b"marco").must("send");
        socket
    });
}

#[test]
fn a_socket_that_an_ordinary_user_has_bound_to_a_device() {
    let scene = Scene::new();
    let _post = scene.post();
    scene.client.become_user(65534);
    for to in Scene::destinations() {
        let socket = scene.client.udp(to);
        socket.bind_device(Topology::LINK).must("bind to a device");
        assert_eq!(socket.send_to(to, b"marco"), Err(Errno(libc::EHOSTUNREACH)), "{to}");
        assert_eq!(socket.connect(to), Err(Errno(libc::EHOSTUNREACH)), "{to}");
    }
}

#[test]
fn a_socket_that_is_bound_to_a_device() {
    Scene::new().redirects(|client, to| {
        let socket = open(client, to);
        socket.bind_device(Topology::LINK).must("bind to a device");
        socket.connect(to).must("connect");
        socket.send(b"marco").must("send");
        socket
    });
}

#[test]
fn a_socket_that_is_passed_out_of_the_scope() {
    let scene = Scene::new();
    let (post, directory) = (scene.post(), Scratch::new());
    let outside = Cgroup::create("carnet-evasion-outside").must("make a cgroup");
    let other = Puppet::start(&scene.lab.network().topology.client, &outside, None);
    for (number, to) in (0..).zip(Scene::destinations()) {
        let socket = open(&scene.client, to);
        let mailbox = directory.path().join(format!("udp-{number}"));
        let passed = scene.client.pass(&socket, &other, &mailbox);
        passed.send_to(to, b"marco").must("send");
        post.exchanges(&passed, to);
    }
}

#[test]
fn a_socket_that_was_made_before_the_engine_came_up() {
    let scene = Scene::new();
    let sockets = Scene::destinations().map(|to| (open(&scene.client, to), to));
    scene.lab.down();
    let made_without = Scene::destinations().map(|to| (open(&scene.client, to), to));
    scene.lab.up();
    scene.lab.service("alpha", 1);
    let post = scene.post();
    for (socket, to) in sockets.into_iter().chain(made_without) {
        socket.send_to(to, b"marco").must("send");
        post.exchanges(&socket, to);
    }
}

/// `0.0.0.0` and `::` stand for this host, as a destination too.
#[test]
fn the_unspecified_address() {
    let scene = Scene::with(Conditions {
        destinations: ["127.0.0.1", "::1"].map(|ip| ip.parse().expect("an address")).into(),
        ..Conditions::default()
    });
    let post = scene.post();
    for (to, meant) in [
        ("0.0.0.0:53", "127.0.0.1:53"),
        ("[::]:53", "[::1]:53"),
        ("[::ffff:0.0.0.0]:53", "[::ffff:127.0.0.1]:53"),
    ] {
        let [to, meant]: [SocketAddr; 2] = [to, meant].map(|text| text.parse().expect("one"));
        let socket = open(&scene.client, to);
        socket.send_to(to, b"marco").must("send");
        post.exchanges(&socket, meant);
        let socket = open(&scene.client, to);
        socket.connect(to).must("connect");
        socket.send(b"marco").must("send");
        post.exchanges(&socket, meant);
    }
}

/// Services are not to be had for it: what filters redirect follows the failure policy. But only
/// sendto is seen, the kernel runs no hook for its connect.
#[test]
fn udp_lite() {
    let scene = Scene::new();
    let lab = &scene.lab;
    let _post = scene.post();
    let mut trace = lab.trace();
    let open = |to| scene.client.open(Family::of(to), Kind::UdpLite).must("open");
    for to in Scene::destinations() {
        assert_eq!(open(to).send_to(to, b"marco"), Err(Errno(libc::ECONNREFUSED)));
    }
    let event = trace.first(EventKind::Blocked);
    assert_eq!((event.reason, event.protocol), (Reason::ServiceUnavailable as u32, 136));
    lab.change(|policy| Ok(policy.set_on_failure("alpha", FailurePolicy::Skip).map(drop)?));
    let conditions = Conditions { protocols: vec![Protocol(136)], ..Conditions::default() };
    crate::block(lab, "lite", conditions);
    for to in Scene::destinations() {
        assert_eq!(open(to).send_to(to, b"marco"), Err(Errno(libc::EPERM)));
    }

    let outside = Cgroup::create("carnet-evasion-server").must("make a cgroup");
    let far = Puppet::start(&lab.network().topology.destination, &outside, None);
    for to in [Scene::destinations()[0], Scene::destinations()[1]] {
        let server = far.open(Family::of(to), Kind::UdpLite).must("open");
        server.bind(to).must("bind");
        let socket = open(to);
        socket.connect(to).must("connect");
        socket.send(b"marco").must("send");
        assert_eq!(server.receive_from().map(|(bytes, _)| bytes), Ok(b"marco".to_vec()));
    }
}

#[test]
fn a_network_namespace_without_a_listener() {
    let scene = Scene::new();
    let _post = scene.post();
    let mut command = std::process::Command::new("unshare");
    command.args(["--net", "--"]).arg(carnet_tests::program("test-puppet"));
    let lab = &scene.lab;
    let client = &lab.network().topology.client;
    let puppet = Puppet::start_by(command, client, lab.apps(), None);
    let refused = Err(Errno(libc::ECONNREFUSED));
    for to in Scene::destinations() {
        assert_eq!(open(&puppet, to).send_to(to, b"marco"), refused);
        assert_eq!(open(&puppet, to).connect(to), refused);
    }
}

#[test]
fn an_application_that_sends_to_a_source_token_or_to_the_service_itself() {
    let conditions = Conditions { ports: vec![53.into()], ..Conditions::default() };
    let scene = Scene::with(conditions);
    let post = scene.post();
    let [to, ..] = Scene::destinations();
    let socket = open(&scene.client, to);
    socket.send_to(to, b"marco").must("send");
    let (service, token) = post.takes(to);
    // Another application can send there, as to every socket of this host, but not in the
    // destination's name: it is no service.
    let intruder = open(&scene.client, to);
    intruder.send_to(token, b"false").must("send");
    let (bytes, from) = socket.receive_from().must("receive");
    assert_eq!(bytes, b"false");
    assert_eq!(from.port(), intruder.local().must("ask for the port").port());
    assert!(from.ip().is_loopback(), "{from}");
    service.send_to(token, b"polo").must("answer");
    assert_eq!(socket.receive_from(), Ok((b"polo".to_vec(), to)));
    // What it sends to the service itself is no flow: there is nothing to ask about it.
    intruder.send_to(service.local().must("ask"), b"direct").must("send");
    let (bytes, from) = service.receive_from().must("receive");
    assert_eq!(bytes, b"direct");
    let question = scene.service.open(Family::of(from), Kind::Udp).must("open");
    question.connect(from).must("connect");
    let answer = question.query(abi::ORIGINAL_DESTINATION).map_err(|errno| errno.0);
    assert!(matches!(answer, Err(libc::ENODATA | libc::ENOTCONN)), "{answer:?}");
}

/// IPv6 lets everybody send from any address to a socket of this host. What such a datagram seems to
/// begin is no flow of the other side's, which the application could go on with unseen.
#[test]
fn an_application_that_sends_to_itself_in_the_name_of_the_destination() {
    const IPV6_FREEBIND: i32 = 78;
    // A port that anybody may bind to.
    let to: SocketAddr = (Topology::DESTINATION_V6, 5353).into();
    let conditions = Conditions { ports: vec![to.port().into()], ..Conditions::default() };
    let scene = Scene::with(conditions);
    let post = scene.post();
    scene.client.become_user(65534);
    for connected in [false, true] {
        let socket = open(&scene.client, to);
        socket.bind((std::net::Ipv6Addr::UNSPECIFIED, 0).into()).must("bind");
        let port = socket.local().must("ask for the port").port();
        let own = (std::net::Ipv6Addr::LOCALHOST, port).into();
        let pretender = open(&scene.client, to);
        pretender.set(abi::SOL_IPV6, IPV6_FREEBIND, &1_i32.to_ne_bytes()).must("bind freely");
        pretender.bind(to).must("bind to the destination's address");
        if connected {
            pretender.connect(own).must("connect");
            pretender.send(b"hello").must("send");
        } else {
            pretender.send_to(own, b"hello").must("send");
        }
        assert_eq!(socket.receive_from(), Ok((b"hello".to_vec(), to)));
        socket.send_to(to, b"marco").must("send");
        post.exchanges(&socket, to);
    }
}

/// The source token of a flow is the name under which its service answers.
#[test]
fn an_application_that_sends_from_a_source_token() {
    let conditions = Conditions { ports: vec![53.into()], ..Conditions::default() };
    let scene = Scene::with(conditions);
    let post = scene.post();
    let [to, v6, _] = Scene::destinations();
    for (to, protocol, free_bind) in [(to, abi::SOL_IP, 15), (v6, abi::SOL_IPV6, 78)] {
        let socket = open(&scene.client, to);
        socket.send_to(to, b"marco").must("send");
        let (_, token) = post.takes(to);
        let intruder = open(&scene.client, to);
        intruder.set(protocol, free_bind, &1_i32.to_ne_bytes()).must("bind freely");
        intruder.bind(SocketAddr::new(token.ip(), 0)).must("bind to the token");
        let own = if to.is_ipv4() { "127.0.0.1:9" } else { "[::1]:9" };
        let mut client: SocketAddr = own.parse().expect("an address");
        client.set_port(socket.local().must("ask for the port").port());
        let refused = Err(Errno(libc::EADDRNOTAVAIL));
        assert_eq!(intruder.send_to(client, b"false"), refused);
        assert_eq!(intruder.connect(client), refused);
    }
}

//! Applications that meddle with Carnet itself.

use std::net::SocketAddr;

use carnet_core::{abi, object::Conditions};
use carnet_tests::{
    Must as _,
    puppet::{Errno, Hand, Kind, Puppet},
};

use crate::{Scene, echoes};

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Checks that the kernel itself answers a call, since no hook serves the socket's cgroup.
#[track_caller]
fn no_such_option<T: std::fmt::Debug>(result: Result<T, Errno>) {
    let errno = result.expect_err("an application is not served").0;
    assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");
}

/// Tries all that the control interface has on a socket that is not connected.
#[track_caller]
fn meddle(socket: &Hand<'_>, record: &[u8]) {
    for option in abi::QUERY_REDIRECT_RECORDS - 1..=abi::FLOW + 1 {
        no_such_option(socket.query(option));
        for value in [&[][..], &[0], &[0xff; 8], record] {
            no_such_option(socket.set(abi::LEVEL, option, value));
        }
    }
}

/// A record that the service was given, of a connection to this destination.
#[track_caller]
fn a_record<'a>(
    service: &'a Puppet,
    client: &'a Puppet,
    to: SocketAddr,
) -> (Vec<u8>, [Hand<'a>; 2]) {
    let listener = service.serve(address("127.0.0.1:0"));
    let connection = client.connect(to).must("connect");
    let accepted = listener.accept().must("accept");
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query the record");
    (record, [connection, accepted])
}

#[test]
fn an_application_that_sets_carnets_options() {
    let scene = Scene::new();
    scene.redirects(|client, to| {
        let socket = client.tcp(to);
        meddle(&socket, &[0x5a; 424]);
        socket.connect(to).must("connect");
        meddle(&socket, &[0x5a; 424]);
        socket
    });
    let datagrams = scene.client.open(carnet_tests::puppet::Family::V4, Kind::Udp).must("open");
    meddle(&datagrams, &[0x5a; 424]);
}

#[test]
fn an_application_that_has_got_hold_of_a_record() {
    let scene = Scene::new();
    let lab = &scene.lab;
    // Delivered to a service in front of the scene's.
    lab.service("thief", 999);
    let (service, client) = (lab.puppet_of("thief"), lab.puppet());
    let (record, _open) = a_record(&service, &client, lab.v4());
    lab.change(|policy| Ok(policy.remove_filter("thief").map(drop)?));
    scene.redirects(|client, to| {
        let socket = client.tcp(to);
        no_such_option(socket.set_record(&record));
        socket.connect(to).must("connect");
        socket
    });
    // Nor does it serve another service.
    let other = lab.puppet_of("alpha");
    let socket = other.tcp(lab.v4());
    assert_eq!(socket.set_record(&record), Err(Errno(libc::EACCES)));
}

#[test]
fn a_service_that_forges_a_record() {
    let scene = Scene::new();
    let lab = &scene.lab;
    lab.service("forger", 999);
    let (service, client) = (lab.puppet_of("forger"), lab.puppet());
    let (record, _open) = a_record(&service, &client, lab.v4());
    lab.change(|policy| Ok(policy.remove_filter("forger").map(drop)?));
    let socket = service.tcp(lab.v4());
    // Every byte counts.
    for at in (0..record.len()).step_by(7) {
        let mut forged = record.clone();
        forged[at] ^= 1;
        assert_eq!(socket.set_record(&forged), Err(Errno(libc::EINVAL)), "byte {at}");
    }
    for length in [0, 1, record.len() - 1] {
        assert_eq!(socket.set_record(&record[..length]), Err(Errno(libc::EINVAL)));
    }
    // Without a record it is an application like others.
    socket.connect(lab.v4()).must("connect");
    scene.arrived(&socket, lab.v4());
}

#[test]
fn an_application_that_connects_to_the_service_itself() {
    // The service's own port is not what the filter is for.
    let scene = Scene::with(Conditions { ports: vec![1.into()], ..Conditions::default() });
    let service = scene.lab.puppet_of("alpha");
    let listener = service.serve(address("127.0.0.1:0"));
    let direct = scene.client.connect(listener.local().must("ask for the port")).must("connect");
    let accepted = listener.accept().must("accept");
    for option in [
        abi::QUERY_REDIRECT_RECORDS,
        abi::QUERY_REDIRECT_CONTEXT,
        abi::REDIRECT_RECORDS_LENGTH,
        abi::ORIGINAL_DESTINATION,
        abi::ORIGINAL_APP,
        abi::FLOW,
    ] {
        assert_eq!(accepted.query(option), Err(Errno(libc::ENODATA)), "option {option}");
    }
    accepted.send(b"marco").must("send");
    assert_eq!(direct.receive(5), Ok(b"marco".to_vec()));
}

#[test]
fn an_application_that_connects_to_the_service_itself_where_all_is_redirected() {
    let scene = Scene::new();
    let port = scene.service.addresses()[0];
    let direct = scene.client.connect(port).must("connect");
    // The service gets it as a flow to itself, which ends where it began: it has no record then.
    assert_eq!(direct.peer(), Ok(port));
    let report = scene.report_of(direct.local().must("ask for the local address"));
    assert_eq!((report.original, report.hops), (port, 1));
    assert_eq!(direct.receive(1).unwrap_or_default(), b"");
    // And it serves others as before.
    scene.redirects(|client, to| {
        let connection = client.connect(to).must("connect");
        echoes(&connection);
        connection
    });
}

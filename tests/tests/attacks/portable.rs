//! Records for other hosts, at the control interface: who may make and take them, and of what.

use std::net::TcpStream;

use carnet_core::{
    abi,
    event::{Counter, EventKind},
    portable::{PORTABLE_VERSION, identity},
    record::{HEADER_LENGTH, MAX_RECORD, RecordError, VERSION},
};
use carnet_tests::{
    Must as _,
    contract::Scratch,
    hosts::{Hosts, export, import},
    puppet::{Family, Kind, Puppet},
};

use crate::{NOBODY, Service, accepts, fails, fresh, loopback};

/// The portable record of a flow that service "one" of the first host has had.
#[track_caller]
fn exported(hosts: &Hosts) -> Vec<u8> {
    let (puppet, client) = (hosts.here.puppet_of("one"), hosts.here.puppet());
    let delivery = Service::at_work(&puppet).deliver(&client, hosts.here.v4(), Kind::Tcp);
    export(&delivery.accepted).must("export the record")
}

#[test]
fn only_a_gateway_takes_flows_over() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let record = exported(&hosts);
    let mut trace = hosts.there.trace();
    let gateway = hosts.puppet_there("gateway");
    let service = hosts.puppet_there("two");
    // Also as root: in a service's cgroup that is the service.
    let socket = service.tcp(loopback());
    assert_eq!(import(&socket, &record), fails(libc::EACCES));
    assert_eq!(import(&socket, &[]), fails(libc::EACCES), "it asks whether it may");
    let event = trace.first(EventKind::RecordRefused);
    assert_eq!(event.reason, RecordError::NotDelivered as u32);
    assert_eq!((event.handle, event.pid), (hosts.there.handle_of("two"), service.id()));
    assert_eq!(hosts.there.counter(Counter::AccessDenied), 2);
    // Whose socket it is makes no difference: who calls counts.
    let directory = Scratch::new();
    let passed = gateway.pass(&gateway.tcp(loopback()), &service, &directory.path().join("s"));
    assert_eq!(import(&passed, &record), fails(libc::EACCES));
    // A gateway needs no privilege, and is one for as long as the policy says so.
    gateway.become_user(NOBODY);
    let socket = gateway.tcp(loopback());
    assert_eq!(import(&socket, &[]), Ok(()));
    assert_eq!(import(&socket, &record), Ok(()));
    hosts.there.change(|policy| Ok(policy.set_gateway("gateway", false).map(drop)?));
    assert_eq!(import(&gateway.tcp(loopback()), &record), fails(libc::EACCES));
    // An application meets no hook.
    let client = Puppet::start(hosts.second(), hosts.there.apps(), None);
    let answer = import(&client.tcp(loopback()), &record);
    assert!([fails(libc::ENOPROTOOPT), fails(libc::EOPNOTSUPP)].contains(&answer), "{answer:?}");
    assert_eq!(hosts.there.counter(Counter::RecordsImported), 1);
}

#[test]
fn only_the_service_that_has_the_flow_gives_its_record_out() {
    let hosts = Hosts::new(&["one", "two"], &[]);
    let services = ["one", "two"].map(|name| hosts.here.puppet_of(name));
    let client = hosts.here.puppet();
    let one = Service::at_work(&services[0]);
    let delivery = one.deliver(&client, hosts.here.v4(), Kind::Tcp);
    let directory = Scratch::new();
    let path = directory.path().join("s");
    let passed = services[0].pass(&delivery.accepted, &services[1], &path);
    assert_eq!(export(&passed), fails(libc::EACCES));
    assert_eq!(hosts.here.counter(Counter::AccessDenied), 1);
    assert!(export(&delivery.accepted).is_ok());
    // Of what is no flow's there is none.
    assert_eq!(export(&one.tcp), fails(libc::ENOTCONN));
    let listener = services[0].listen(loopback());
    let address = listener.local().must("ask");
    let direct = hosts.first().run(|| TcpStream::connect(address));
    let _direct = direct.must("enter the namespace").must("connect");
    assert_eq!(export(&listener.accept().must("accept")), fails(libc::ENODATA));
    let udp = one.deliver(&client, hosts.here.v4(), Kind::Udp);
    assert_eq!(export(&udp.accepted), fails(libc::EINVAL));
    // Too small a buffer gets nothing.
    let small = delivery.accepted.get(abi::LEVEL, abi::EXPORT_RECORD, HEADER_LENGTH);
    assert_eq!(small, fails(libc::ERANGE));
    assert_eq!(hosts.here.counter(Counter::RecordsExported), 1);
}

#[test]
fn what_is_no_portable_record_is_refused_and_leaves_nothing() {
    let hosts = Hosts::new(&["one"], &["one", "two"]);
    let record = exported(&hosts);
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = record.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let local = {
        let (puppet, client) = (hosts.here.puppet_of("one"), hosts.here.puppet());
        Service::at_work(&puppet).deliver(&client, hosts.here.v4(), Kind::Tcp).record
    };
    let mut bad = vec![
        local.clone(),
        with(0, b"CRNT"),
        with(4, &(PORTABLE_VERSION + 1).to_le_bytes()),
        with(4, &VERSION.to_le_bytes()),
        with(6, &[0xff, 0xff]),
        with(8, &[1]),
        with(16, &[1]),
        with(32, &[1]),
        with(40, &0_u32.to_le_bytes()),
        with(40, &2_u32.to_le_bytes()),
        with(40, &u32::MAX.to_le_bytes()),
        with(44, &0_u32.to_le_bytes()),
        with(44, &33_u32.to_le_bytes()),
        with(44, &u32::MAX.to_le_bytes()),
        // Of the destination: IPv4 that is none, no family, a number that is always zero.
        with(58, &[0, 0]),
        with(66, &[3, 0]),
        with(68, &[1]),
        // The length of the path, guesses of hops that there are not, flags that there are not.
        with(84, &257_u32.to_le_bytes()),
        with(84, &u32::MAX.to_le_bytes()),
        with(400, &[2]),
        with(404, &[16]),
        vec![0xff; MAX_RECORD],
        vec![0; MAX_RECORD],
        vec![0; MAX_RECORD + 1],
        vec![0xff; 5000],
    ];
    bad.extend((1..record.len()).map(|length| record[..length].to_vec()));
    bad.extend((1..MAX_RECORD - record.len()).map(|more| [&record[..], &vec![0; more]].concat()));
    let gateway = hosts.puppet_there("gateway");
    let [fresh, set] = [gateway.tcp(loopback()), gateway.tcp(loopback())];
    import(&set, &record).must("take the flow over");
    for bytes in &bad {
        assert_eq!(import(&fresh, bytes), fails(libc::EINVAL), "{bytes:02x?}");
        assert_eq!(import(&set, bytes), fails(libc::EINVAL), "{bytes:02x?}");
    }
    assert_eq!(hosts.there.counter(Counter::RecordsMalformed), 2 * bad.len() as u64);
    // Nor is a portable record one of this host.
    assert_eq!(fresh.set_record(&record), fails(libc::EINVAL));
    // What was there before is there still, and of the others nothing.
    let services = ["one", "two"].map(|name| hosts.puppet_there(name));
    let [one, two] = services.each_ref().map(|service| service.serve(loopback()));
    set.connect(hosts.here.v4()).must("connect");
    let taken = two.accept().must("accept").query(abi::QUERY_REDIRECT_RECORDS).must("query");
    assert_eq!(taken.len(), HEADER_LENGTH + 3 * 16);
    fresh.connect(hosts.here.v4()).must("connect");
    let new = one.accept().must("accept").query(abi::QUERY_REDIRECT_RECORDS).must("query");
    assert_eq!(new.len(), HEADER_LENGTH + 16);
}

#[test]
fn arbitrary_bytes_do_no_harm() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let record = exported(&hosts);
    let gateway = hosts.puppet_there("gateway");
    let mut random = fastrand::Rng::with_seed(20_261_126);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..3000 {
        let mut bytes = if round % 3 == 0 {
            let mut noise = vec![0; random.usize(1..MAX_RECORD + 100)];
            random.fill(&mut noise);
            noise
        } else {
            record.clone()
        };
        for _ in 0..random.usize(..4) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        match import(&gateway.tcp(loopback()), &bytes) {
            Ok(()) => taken += 1,
            answer if answer == fails(libc::EINVAL) || answer == fails(libc::ELOOP) => refused += 1,
            answer => panic!("{answer:?} to {bytes:02x?}"),
        }
    }
    // The application's names are for the other host to say.
    assert!(taken > 100 && refused > 1000, "{taken} {refused}");
    assert_eq!(hosts.there.counter(Counter::RecordsImported), taken);
}

#[test]
fn handles_of_this_host_are_nobodys_identities() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let record = exported(&hosts);
    let gateway = hosts.puppet_there("gateway");
    let two = hosts.puppet_there("two");
    let listener = two.serve(loopback());
    let handles = [hosts.there.handle_of("two"), 0, 1, u64::MAX];
    for handle in handles {
        let mut lie = record.clone();
        lie[HEADER_LENGTH..][..8].copy_from_slice(&handle.to_le_bytes());
        // Nor is what lies behind them of any account.
        lie[HEADER_LENGTH + 8..][..8].copy_from_slice(&hosts.there.handle_of("two").to_le_bytes());
        let socket = gateway.tcp(loopback());
        import(&socket, &lie).must("take the flow over");
        socket.connect(hosts.here.v4()).must("connect");
        // It is a stranger's, and two gets the flow.
        let accepted = listener.accept().must("accept");
        let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
        let hop = &record[HEADER_LENGTH..][..16];
        assert_eq!(hop, [&0_u64.to_le_bytes()[..], &handle.to_le_bytes()].concat());
    }
}

/// Which is why not every service is one.
#[test]
fn a_gateway_that_lies_decides_who_is_passed_by() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let mut lie = exported(&hosts);
    lie[HEADER_LENGTH..][..8].copy_from_slice(&identity("two", "two").to_le_bytes());
    let gateway = hosts.puppet_there("gateway");
    let two = hosts.puppet_there("two");
    let service = Service::at_work(&two);
    let mut trace = hosts.there.trace();
    let socket = gateway.tcp(loopback());
    import(&socket, &lie).must("take the flow over");
    socket.connect(hosts.here.v4()).must("connect");
    let event = trace.first(EventKind::Onward);
    assert_eq!((event.hops, event.pid), (2, gateway.id()), "it is told");
    // It gets at no record of another one's all the same.
    let client = Puppet::start(hosts.second(), hosts.there.apps(), None);
    let delivery = service.deliver(&client, hosts.here.v4(), Kind::Tcp);
    let theft = gateway.tcp(loopback());
    assert_eq!(theft.set_record(&delivery.record), fails(libc::EACCES));
    accepts(&two.tcp(loopback()), &delivery.record);
}

#[test]
fn sockets_that_carry_no_flow_of_another_host() {
    let hosts = Hosts::new(&["one"], &[]);
    let record = exported(&hosts);
    let gateway = hosts.puppet_there("gateway");
    assert_eq!(import(&fresh(&gateway, Kind::Udp), &record), fails(libc::EINVAL));
    let listening = gateway.listen(loopback());
    let connected = gateway.connect(listening.local().must("ask")).must("connect");
    for socket in [&listening, &connected, &listening.accept().must("accept")] {
        assert_eq!(import(socket, &record), fails(libc::EINVAL));
    }
    assert_eq!(hosts.there.counter(Counter::RecordsImported), 0);
    // Multipath TCP carries one as plain TCP does.
    hosts.there.service("two", 1);
    let two = hosts.puppet_there("two");
    let listener = two.serve(loopback());
    let multipath = gateway.open(Family::V4, Kind::Multipath).must("open a socket");
    import(&multipath, &record).must("take the flow over");
    multipath.connect(hosts.here.v4()).must("connect");
    let taken = listener.accept().must("accept").query(abi::QUERY_REDIRECT_RECORDS).must("query");
    assert_eq!(taken.len(), HEADER_LENGTH + 3 * 16);
}

#[test]
fn a_flow_without_end_is_refused() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let record = exported(&hosts);
    let gateway = hosts.puppet_there("gateway");
    for (legs, answer) in
        [(1, Ok(())), (10, Ok(())), (11, fails(libc::ELOOP)), (32, fails(libc::ELOOP))]
    {
        let mut long = record.clone();
        long[44..48].copy_from_slice(&u32::to_le_bytes(legs));
        assert_eq!(import(&gateway.tcp(loopback()), &long), answer, "{legs}");
    }
    assert_eq!(hosts.there.counter(Counter::RecordsEndless), 2);
}

//! Instances side by side, what lies outside of every scope, and what is left when one is down.

use std::{fs, sync::Arc};

use carnet_core::{abi, event::Counter};
use carnet_engine::{Engine, Error};
use carnet_testbed::Cgroup;
use carnet_tests::{
    Lab, Must as _, Network, PATIENCE,
    puppet::{Errno, Puppet},
};

#[test]
fn two_instances_side_by_side_do_not_know_each_other() {
    let network = Arc::new(Network::new());
    let labs = [Lab::beside(&network), Lab::beside(&network)];
    // The same names on purpose; one service here, two there.
    let services = [labs[0].start_chain(&["alpha"]), labs[1].start_chain(&["alpha", "bravo"])];
    for lab in &labs {
        let client = lab.client(network.v4()).count(6).parallel(3);
        let reports = client.run().must("run a client");
        assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
    }
    for lab in &labs {
        lab.settle();
    }
    for ((lab, services), expected) in labs.iter().zip(services).zip([1, 2]) {
        assert_eq!(services.len(), expected);
        let chain: Vec<_> = ["alpha", "bravo"]
            .iter()
            .zip(services)
            .map(|(name, service)| (lab.handle_of(name), service.finish()))
            .collect();
        carnet_tests::handed_on(&chain, 6);
        assert_eq!(lab.counter(Counter::Onward), 6);
    }
    let epochs = labs.each_ref().map(|lab| lab.engine().status().must("ask").epoch);
    assert_ne!(epochs[0], epochs[1]);
}

#[test]
fn a_process_outside_of_the_scope_is_not_touched() {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let outside = Cgroup::create("carnet-e2e-outside").must("make a cgroup");
    let client = Puppet::start(&lab.network().topology.client, &outside, None);
    for to in [lab.v4(), lab.v6()] {
        let connection = client.connect(to).must("connect");
        connection.send(b"free").must("send");
        assert_eq!(connection.receive(4), Ok(b"free".to_vec()));
        assert_eq!(connection.peer(), Ok(to));
    }
    assert_eq!(lab.counter(Counter::Passed), 0);
    assert_eq!(lab.counter(Counter::Blocked), 0);
    // Inside, the same is refused: the service is dead.
    assert_eq!(lab.refused(lab.v4()), "ECONNREFUSED");
}

#[test]
fn down_leaves_nothing() {
    let lab = Lab::new();
    let services = lab.start_chain(&["alpha", "bravo"]);
    let service_puppet = lab.puppet_of("alpha");
    let client = lab.puppet();
    let open = client.connect(lab.v4()).must("connect");
    open.send(b"open").must("send");
    assert_eq!(open.receive(4), Ok(b"open".to_vec()));

    lab.down();
    let left: Vec<_> = fs::read_dir(lab.pins().path())
        .must("list the bpffs")
        .map(|entry| entry.must("list the bpffs").file_name())
        .filter(|name| !name.as_encoded_bytes().contains(&b'.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(matches!(Engine::open(lab.location()), Err(Error::NotUp { .. })));

    // What is open goes on; what is new goes straight; no hook answers any more.
    open.send(b"still").must("send");
    assert_eq!(open.receive(5), Ok(b"still".to_vec()));
    let connections = lab.network().echo().connections().len();
    let direct = client.connect(lab.v4()).must("connect");
    direct.send(b"direct").must("send");
    assert_eq!(direct.receive(6), Ok(b"direct".to_vec()));
    let all = lab
        .network()
        .echo()
        .wait_for("a connection", PATIENCE, |all| all.len() > connections)
        .must("see the connection");
    assert_eq!(Ok(all[connections].peer), direct.local());
    let listener = service_puppet.listen("127.0.0.1:0".parse().expect("an address"));
    let errno = listener.register(&[]).expect_err("an errno").0;
    assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");
    drop(services);
}

#[test]
fn records_of_a_former_life_are_void() {
    let lab = Lab::new();
    lab.service("before", 1);
    let loopback = "127.0.0.1:0".parse().expect("an address");
    let record = {
        let (service, client) = (lab.puppet_of("before"), lab.puppet());
        let listener = service.serve(loopback);
        let _connection = client.connect(lab.v4()).must("connect");
        let accepted = listener.accept().must("accept");
        accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query the record")
    };
    lab.down();
    lab.up();
    assert!(lab.policy().services().is_empty());
    lab.service("after", 1);
    let service = lab.puppet_of("after");
    let onward = service.tcp(lab.v4());
    assert_eq!(onward.set_record(&record), Err(Errno(libc::EINVAL)));
    assert_eq!(lab.counter(Counter::RecordsForeign), 1);
    // Listeners of before are not registered any more either.
    assert_eq!(lab.refused(lab.v4()), "ECONNREFUSED");
}

//! Who may set a record: the process that calls counts, not the socket, its maker or its user.

use std::{env, path::PathBuf, process::Command};

use carnet_core::{abi, event::Counter};
use carnet_testbed::Cgroup;
use carnet_tests::{
    Must as _, program,
    puppet::{Kind, Puppet},
};

use crate::{NOBODY, PROTOCOLS, Service, accepts, fails, fresh, lab_of};

/// Where a puppet gets sockets that are passed to it, until the value goes.
struct Mailbox(PathBuf);

impl Mailbox {
    fn new(name: &str) -> Self {
        Self(env::temp_dir().join(format!("carnet-attacks-{}-{name}", std::process::id())))
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // It may not have been made.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_socket_of_the_service_in_the_hands_of_an_application() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let delivery = service.deliver(&client, lab.v4(), kind);
        let mailbox = Mailbox::new(&format!("application-{kind:?}"));
        let thief = lab.puppet();
        thief.become_user(NOBODY);
        let socket = service.fresh(kind);
        // The mailbox is the user's: root may send there.
        let passed = puppet.pass(&socket, &thief, &mailbox.0);
        assert_eq!(passed.set_record(&delivery.record), fails(libc::EACCES), "{kind:?}");
        assert_eq!(passed.set_record(&[]), fails(libc::EACCES), "{kind:?}");
        assert_eq!(lab.counter(Counter::AccessDenied), 2, "{kind:?}");
        accepts(&socket, &delivery.record);
    }
}

#[test]
fn a_socket_of_the_service_in_the_hands_of_another_service() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha", "bravo"]);
        let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
        let [alpha, bravo] = [&one, &two].map(Service::at_work);
        let first = alpha.deliver(&client, lab.v4(), kind);
        let mailbox = Mailbox::new(&format!("service-{kind:?}"));
        let passed = one.pass(&alpha.fresh(kind), &two, &mailbox.0);
        // Bravo is root, and the socket is alpha's: neither makes it alpha.
        assert_eq!(passed.set_record(&first.record), fails(libc::EACCES), "{kind:?}");
        let onward = alpha.fresh(kind);
        accepts(&onward, &first.record);
        let second = bravo.accept(onward, lab.v4(), kind);
        accepts(&passed, &second.record);
    }
}

#[test]
fn a_socket_that_was_taken_with_pidfd_getfd() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha", "bravo"]);
        let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
        let alpha = Service::at_work(&one);
        let delivery = alpha.deliver(&client, lab.v4(), kind);
        let socket = alpha.fresh(kind);
        let stolen = two.steal(&socket).must("take a socket as root");
        assert_eq!(stolen.set_record(&delivery.record), fails(libc::EACCES), "{kind:?}");
        // An ordinary user cannot even take it.
        let user = lab.puppet();
        user.become_user(NOBODY);
        assert_eq!(user.steal(&socket).map(drop), fails(libc::EPERM), "{kind:?}");
    }
}

#[test]
fn a_process_that_the_service_forked_in_a_cgroup_below_as_another_user() {
    let lab = lab_of(&["alpha"]);
    let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
    let service = Service::at_work(&puppet);
    let delivery = service.deliver(&client, lab.v4(), Kind::Tcp);
    // The shell forks: what it starts is in the cgroup by inheritance.
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("\"$0\"; :").arg(program("test-puppet"));
    let cgroup = lab.cgroup_of("alpha");
    let network = &lab.network().topology.client;
    let child = Puppet::start_by(shell, network, &cgroup, Some(NOBODY));
    let below = cgroup.child("below").must("make a cgroup");
    let nested = Puppet::start(network, &below, Some(NOBODY));
    for other in [&child, &nested] {
        for kind in PROTOCOLS {
            accepts(&fresh(other, kind), &delivery.record);
        }
    }
}

#[test]
fn a_process_that_was_moved_out_of_the_service() {
    let lab = lab_of(&["alpha", "bravo"]);
    let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
    let service = Service::at_work(&puppet);
    let delivery = service.deliver(&client, lab.v4(), Kind::Tcp);
    let deserter = lab.puppet_of("alpha");
    for kind in PROTOCOLS {
        lab.cgroup_of("alpha").add_process(deserter.id()).must("move a process");
        let socket = fresh(&deserter, kind);
        accepts(&socket, &delivery.record);
        // In another service's cgroup it is that one's, at once.
        lab.cgroup_of("bravo").add_process(deserter.id()).must("move a process");
        assert_eq!(socket.set_record(&delivery.record), fails(libc::EACCES), "{kind:?}");
    }
    // Outside of all of them it is nobody's, and has no privilege.
    lab.apps().add_process(deserter.id()).must("move a process");
    let socket = service.fresh(Kind::Tcp);
    let mailbox = Mailbox::new("moved");
    let passed = puppet.pass(&socket, &deserter, &mailbox.0);
    deserter.become_user(NOBODY);
    assert_eq!(passed.set_record(&delivery.record), fails(libc::EACCES));
}

#[test]
fn root_of_a_user_namespace() {
    let lab = lab_of(&["alpha"]);
    let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
    let service = Service::at_work(&puppet);
    let delivery = service.deliver(&client, lab.v4(), Kind::Tcp);
    // Root, with all capabilities, of a namespace of its own.
    let cgroup = lab.cgroup_of("alpha");
    let impostor = Puppet::start(&lab.network().topology.client, &cgroup, Some(NOBODY));
    impostor.become_namespace_root();
    for kind in PROTOCOLS {
        let socket = fresh(&impostor, kind);
        // In the service's cgroup, it is the service like others.
        accepts(&socket, &delivery.record);
        lab.apps().add_process(impostor.id()).must("move a process");
        assert_eq!(socket.set_record(&delivery.record), fails(libc::EACCES), "{kind:?}");
        cgroup.add_process(impostor.id()).must("move a process");
    }
    lab.apps().add_process(impostor.id()).must("move a process");
    let mailbox = Mailbox::new("namespace");
    let listener = puppet.listen(crate::loopback());
    let passed = puppet.pass(&listener, &impostor, &mailbox.0);
    let handle = lab.handle_of("alpha").to_ne_bytes();
    for value in [&[][..], &handle] {
        assert_eq!(passed.register(value), fails(libc::EACCES));
    }
}

#[test]
fn the_administrator_may_set_any_record_but_not_from_within_another_service() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha", "bravo"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let delivery = service.deliver(&client, lab.v4(), kind);
        let outside = Cgroup::create("carnet-attacks-outside").must("make a cgroup");
        let network = &lab.network().topology.client;
        let administrator = Puppet::start(network, &outside, None);
        let mailbox = Mailbox::new(&format!("administrator-{kind:?}"));
        let passed = puppet.pass(&service.fresh(kind), &administrator, &mailbox.0);
        accepts(&passed, &delivery.record);
        // A service that runs as root is a service.
        let other = lab.puppet_of("bravo");
        assert_eq!(fresh(&other, kind).set_record(&delivery.record), fails(libc::EACCES));
        // And without its privilege it is nobody.
        administrator.become_user(NOBODY);
        assert_eq!(passed.set_record(&delivery.record), fails(libc::EACCES), "{kind:?}");
    }
}

#[test]
fn whoever_holds_the_accepted_socket_may_ask() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let delivery = service.deliver(&client, lab.v4(), kind);
        let helper = lab.puppet();
        helper.become_user(NOBODY);
        let mailbox = Mailbox::new(&format!("helper-{kind:?}"));
        let passed = puppet.pass(&delivery.accepted, &helper, &mailbox.0);
        assert_eq!(passed.query(abi::QUERY_REDIRECT_RECORDS), Ok(delivery.record), "{kind:?}");
        for option in [abi::ORIGINAL_DESTINATION, abi::ORIGINAL_APP, abi::FLOW] {
            assert_eq!(passed.query(option), delivery.accepted.query(option), "{kind:?} {option}");
        }
        assert_eq!(passed.query(abi::QUERY_REDIRECT_CONTEXT), Ok(b"alpha".to_vec()), "{kind:?}");
        drop(delivery.client);
    }
}

#[test]
fn a_socket_with_a_record_keeps_it_whoever_connects() {
    let lab = lab_of(&["alpha"]);
    let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
    let service = Service::at_work(&puppet);
    let delivery = service.deliver(&client, lab.v4(), Kind::Tcp);
    let onward = service.fresh(Kind::Tcp);
    accepts(&onward, &delivery.record);
    let mailbox = Mailbox::new("keeps");
    let passed = puppet.pass(&onward, &client, &mailbox.0);
    passed.connect(lab.v4()).must("connect");
    passed.send(b"marco").must("send");
    assert_eq!(passed.receive(5), Ok(b"marco".to_vec()));
    assert_eq!(lab.counter(Counter::Onward), 1);
}

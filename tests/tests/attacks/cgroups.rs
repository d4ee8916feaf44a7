//! A user to whom a part of the redirected cgroup was delegated.

use std::os::unix::fs::chown;

use carnet_core::event::Counter;
use carnet_tests::{Must as _, puppet::Kind};

use crate::{NOBODY, Service, fails, lab_of};

#[test]
fn a_user_who_can_make_cgroups_in_the_scope_becomes_no_service() {
    let lab = lab_of(&["alpha"]);
    let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
    let service = Service::at_work(&puppet);
    // As systemd delegates: the directory, and what moves processes within it.
    let delegated = lab.apps();
    for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        chown(delegated.path().join(file), Some(NOBODY), Some(NOBODY)).must("delegate a cgroup");
    }
    client.become_user(NOBODY);
    let below = delegated.path().join("below");
    client.make_directory(&below).must("make a cgroup");
    client.enter(&below).must("enter the own cgroup");
    // From there its connections are redirected as before.
    let delivery = service.deliver(&client, lab.v4(), Kind::Tcp);
    assert_eq!(lab.counter(Counter::Redirected), 1);

    // Neither the service's cgroup, nor one below it, nor one outside of the scope is open to it.
    let services = lab.cgroup_of("alpha");
    assert_eq!(client.enter(services.path()), fails(libc::EACCES));
    assert_eq!(client.make_directory(&services.path().join("mine")), fails(libc::EACCES));
    assert_eq!(client.enter(lab.scope().path()), fails(libc::EACCES));
    let outside = lab.scope().path().parent().expect("a cgroup above");
    assert_eq!(client.enter(outside), fails(libc::EACCES));

    // A cgroup of the service's name is not the service.
    let lookalike = delegated.path().join("service-alpha");
    client.make_directory(&lookalike).must("make a cgroup");
    client.enter(&lookalike).must("enter the own cgroup");
    let errno = client.tcp(lab.v4()).set_record(&delivery.record).expect_err("an errno").0;
    assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");
    client.enter(delegated.path()).must("go back");
    drop(delivery);
    std::fs::remove_dir(lookalike).must("remove a cgroup");
    std::fs::remove_dir(below).must("remove a cgroup");
}

//! Genuine records, used again or elsewhere.

use std::sync::Arc;

use carnet_core::{
    event::{Counter, Event, EventKind},
    record::RecordError,
};
use carnet_tests::{
    Lab, Must as _, Network, Plan,
    puppet::{self, Errno, Kind, Puppet},
    service::read_record,
};

use crate::{PROTOCOLS, Service, accepts, fails, fresh, lab_of};

#[test]
fn its_service_may_set_a_record_again_and_elsewhere() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let service = Service::at_work(&puppet);
        let delivery = service.deliver(&client, lab.v4(), kind);
        let another = lab.network().another_echo();
        let other = another.addresses()[0];
        let record = delivery.record.clone();
        let flow = read_record(&record).flow;
        let mut trace = lab.trace();
        for to in [lab.v4(), lab.v4(), other] {
            let onward = service.fresh(kind);
            accepts(&onward, &record);
            onward.connect(to).must("connect onwards");
        }
        // Also when the connection that it came with is over: some services store and forward.
        drop(delivery);
        let late = service.fresh(kind);
        accepts(&late, &record);
        late.connect(lab.v4()).must("connect onwards");
        assert_eq!(lab.counter(Counter::Onward), 4, "{kind:?}");
        // Each of them is told, as one of the flow.
        let onward = EventKind::Onward as u32;
        let told = |all: &[Event]| {
            all.iter().filter(|event| event.kind == onward && event.flow == flow).count()
        };
        trace.until("four connections onwards", |all| told(all) == 4);
    }
}

#[test]
fn by_another_service() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha", "bravo"]);
        let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
        let [alpha, bravo] = [&one, &two].map(Service::at_work);
        let first = alpha.deliver(&client, lab.v4(), kind);
        assert_eq!(bravo.fresh(kind).set_record(&first.record), fails(libc::EACCES), "{kind:?}");
        // The flow goes on to bravo. What that gets is not for alpha any more, nor is it another flow.
        let onward = alpha.fresh(kind);
        accepts(&onward, &first.record);
        let second = bravo.accept(onward, lab.v4(), kind);
        assert_eq!(read_record(&second.record).flow, read_record(&first.record).flow);
        assert_eq!(alpha.fresh(kind).set_record(&second.record), fails(libc::EACCES), "{kind:?}");
        accepts(&bravo.fresh(kind), &second.record);
        assert_eq!(bravo.fresh(kind).set_record(&first.record), fails(libc::EACCES), "{kind:?}");
        assert_eq!(lab.counter(Counter::AccessDenied), 3, "{kind:?}");
    }
}

#[test]
fn theft_of_a_record_is_told() {
    let lab = lab_of(&["alpha", "bravo"]);
    let mut trace = lab.trace();
    let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
    let alpha = Service::at_work(&one);
    let delivery = alpha.deliver(&client, lab.v4(), Kind::Tcp);
    let socket = two.tcp(lab.v4());
    assert_eq!(socket.set_record(&delivery.record), fails(libc::EACCES));
    let event = trace.first(EventKind::RecordRefused);
    assert_eq!(event.reason, RecordError::NotDelivered as u32);
    assert_eq!((event.handle, event.pid), (lab.handle_of("bravo"), two.id()));
}

#[test]
fn by_a_service_that_was_removed_and_added_again() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
        let record = {
            let service = Service::at_work(&puppet);
            service.deliver(&client, lab.v4(), kind).record
        };
        let before = lab.handle_of("alpha");
        lab.change(|policy| {
            policy.remove_filter("alpha")?;
            policy.remove_service("alpha")?;
            policy.remove_sublayer("alpha")?;
            policy.remove_provider("alpha")?;
            Ok(())
        });
        // Nobody answers then, or it is nobody's record.
        let Errno(errno) = fresh_set(&puppet, kind, &record).expect_err("an errno");
        assert!([libc::ENOPROTOOPT, libc::EOPNOTSUPP].contains(&errno), "{errno}");
        // The same names, the same cgroup, the same process: another service.
        lab.service_with("alpha", Plan::default());
        assert!(lab.handle_of("alpha") > before);
        assert_eq!(fresh_set(&puppet, kind, &record), fails(libc::EACCES), "{kind:?}");
    }
}

/// Sets a record on a new socket.
fn fresh_set(puppet: &Puppet, kind: Kind, record: &[u8]) -> puppet::Result<()> {
    fresh(puppet, kind).set_record(record)
}

#[test]
fn in_another_instance() {
    for kind in PROTOCOLS {
        let network = Arc::new(Network::new());
        let labs = [Lab::beside(&network), Lab::beside(&network)];
        labs.iter().for_each(|lab| lab.service("alpha", 1));
        // Nothing but the instance differs.
        assert_eq!(labs[0].handle_of("alpha"), labs[1].handle_of("alpha"));
        let puppets = labs.each_ref().map(|lab| lab.puppet_of("alpha"));
        let clients = labs.each_ref().map(Lab::puppet);
        let services = puppets.each_ref().map(Service::at_work);
        let record = services[0].deliver(&clients[0], network.v4(), kind).record;
        assert_eq!(services[1].fresh(kind).set_record(&record), fails(libc::EINVAL), "{kind:?}");
        assert_eq!(labs[1].counter(Counter::RecordsForeign), 1, "{kind:?}");
        accepts(&services[0].fresh(kind), &record);
        // Nor does it help to say that it is of this one.
        let epoch = labs[1].engine().status().must("ask").epoch;
        let mut forged = record;
        forged[16..24].copy_from_slice(&epoch.to_le_bytes());
        assert_eq!(services[1].fresh(kind).set_record(&forged), fails(libc::EINVAL), "{kind:?}");
        assert_eq!(labs[1].counter(Counter::RecordsForged), 1, "{kind:?}");
    }
}

#[test]
fn from_before_the_instance_was_taken_down() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha"]);
        let record = {
            let (puppet, client) = (lab.puppet_of("alpha"), lab.puppet());
            Service::at_work(&puppet).deliver(&client, lab.v4(), kind).record
        };
        lab.down();
        lab.up();
        lab.service("alpha", 1);
        assert_eq!(lab.handle_of("alpha"), read_record(&record).hops[0].handle);
        let puppet = lab.puppet_of("alpha");
        assert_eq!(fresh_set(&puppet, kind, &record), fails(libc::EINVAL), "{kind:?}");
        assert_eq!(lab.counter(Counter::RecordsForeign), 1, "{kind:?}");
    }
}

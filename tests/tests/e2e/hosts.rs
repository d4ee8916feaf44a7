//! Chains that go on at another host: two engines, each with a scope of its own, in two network namespaces
//! that a cable joins. The first host is that of the clients, the second one that of the destination.

use std::{
    collections::BTreeSet,
    fs,
    mem::offset_of,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use carnet_core::{
    abi,
    chain::hop_limit,
    event::{Counter, EventKind},
    object::{NewService, Trust},
    portable::{PortableRecord, identity},
    record::{HEADER_LENGTH, Hop, RECORD_IMPORTED, Record, RecordError},
};
use carnet_testbed::Topology;
use carnet_tests::{
    Must as _, PATIENCE,
    hosts::{Hosts, export, import, write_keys},
    puppet::Errno,
    reference_of, rounds,
    service::read_record,
};

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

#[test]
fn a_chain_goes_on_at_another_host() {
    for v6 in [false, true] {
        let hosts = Hosts::new(&["one"], &["one", "two"]);
        let to = if v6 { hosts.here.v6() } else { hosts.here.v4() };
        let local: SocketAddr = if v6 { "[::1]:0" } else { "127.0.0.1:0" }.parse().must("parse");
        let (service, client) = (hosts.here.puppet_of("one"), hosts.here.puppet());
        let listener = service.serve(local);
        let _connection = client.connect(to).must("connect");
        let accepted = listener.accept().must("accept");
        let exported = export(&accepted).must("export");
        let record = PortableRecord::read(&exported).expect("a portable record");
        assert_eq!(record.identities().collect::<Vec<_>>(), [identity("one", "one")]);
        assert_eq!((record.app().pid, record.legs()), (client.id(), 1));

        let [one, two] = ["one", "two"].map(|name| hosts.start_there(name));
        let gateway = hosts.puppet_there("gateway");
        let mut trace = hosts.there.trace();
        let onward = gateway.tcp(to);
        import(&onward, &exported).must("take the flow over");
        onward.connect(to).must("connect onwards");
        onward.send(b"hello").must("send");
        assert_eq!(onward.receive(5), Ok(b"hello".to_vec()));

        // It passes who has had it on the first host.
        let reports = two.reports(1);
        let flows = hosts.there.engine().flows().must("list the flows");
        assert!(flows.iter().all(|flow| flow.imported), "{flows:#?}");
        let hops = ["one", "gateway", "two"].map(|name| hosts.there.handle_of(name));
        let parsed = reports[0].parsed();
        assert_eq!(parsed.hops[..3].iter().map(|hop| hop.handle).collect::<Vec<_>>(), hops);
        assert_eq!((parsed.hop_count, parsed.legs, parsed.flags), (3, 3, RECORD_IMPORTED));
        assert_eq!((reports[0].original, reports[0].pid), (to, client.id()));
        assert_eq!((reports[0].netns, reports[0].cgroup), (0, 0), "numbers of another kernel");
        let event = trace.first(EventKind::Redirected);
        assert_eq!((event.flow, event.flags), (parsed.flow, RECORD_IMPORTED));
        drop(onward);
        assert!(one.finish().is_empty());
        assert_eq!(two.finish().len(), 1);
        assert_eq!(hosts.here.counter(Counter::RecordsExported), 1);
        assert_eq!(hosts.there.counter(Counter::RecordsImported), 1);
    }
}

#[test]
fn a_service_that_a_host_does_not_have_is_a_stranger_there_and_is_known_again_later() {
    let hosts = Hosts::new(&["unknown", "one"], &["one", "two"]);
    hosts.there.change(|policy| {
        policy.set_trust("two", Trust::Services(vec!["one".into(), "gateway".into()]))?;
        Ok(())
    });
    let (to, client) = (hosts.here.v4(), hosts.here.puppet());
    let services = ["unknown", "one"].map(|name| hosts.here.puppet_of(name));
    let listeners = services.each_ref().map(|service| service.serve(loopback()));
    let _connection = client.connect(to).must("connect");
    let first = listeners[0].accept().must("accept");
    let onward = services[0].tcp(to);
    onward.set_record(&first.query(abi::QUERY_REDIRECT_RECORDS).must("query")).must("set");
    onward.connect(to).must("connect onwards");
    let exported = export(&listeners[1].accept().must("accept")).must("export");

    let two = hosts.start_there("two");
    let gateway = hosts.puppet_there("gateway");
    let taken = gateway.tcp(to);
    import(&taken, &exported).must("take the flow over");
    taken.connect(to).must("connect onwards");
    // Were it not for the stranger, it would trust all of them.
    let record = two.reports(1)[0].parsed();
    let [one, gate] = ["one", "gateway"].map(|name| hosts.there.handle_of(name));
    let unknown = identity("unknown", "unknown");
    let hops = record.hops[..3].iter().map(|hop| (hop.handle, hop.filter)).collect::<Vec<_>>();
    assert_eq!(hops, [(0, unknown), (one, 0), (gate, 0)]);
    let flows = hosts.there.engine().flows().must("list the flows");
    let hop = &flows[0].hops[0];
    assert_eq!((hop.handle, hop.identity, &hop.service), (0, unknown, &None));

    drop(taken);
    two.kill();

    // Back on the first host it is nobody's stranger.
    let two = hosts.puppet_there("two");
    let listener = two.serve(loopback());
    let taken = gateway.tcp(to);
    import(&taken, &exported).must("take the flow over");
    taken.connect(to).must("connect onwards");
    let back = export(&listener.accept().must("accept")).must("export");
    let gateway = hosts.here.puppet_of("gateway");
    let last = gateway.tcp(to);
    import(&last, &back).must("take the flow over");
    last.connect(to).must("connect onwards");
    let flows = hosts.here.engine().flows().must("list the flows");
    let flow = flows.iter().find(|flow| flow.imported).expect("the flow");
    let hops: Vec<_> = flow.hops.iter().map(|hop| (hop.handle, hop.identity)).collect();
    let [unknown, one, gate] =
        ["unknown", "one", "gateway"].map(|name| (hosts.here.handle_of(name), 0));
    // The gateway is the same one to both hosts.
    assert_eq!(hops, [unknown, one, gate, (0, identity("two", "two"))]);
}

/// Whom an identity means follows the policy, transaction by transaction.
#[test]
fn a_service_that_is_removed_is_a_stranger_and_known_by_its_new_handle_when_it_is_back() {
    let hosts = Hosts::new(&["one"], &["one", "two"]);
    let (to, client) = (hosts.here.v4(), hosts.here.puppet());
    let service = hosts.here.puppet_of("one");
    let listener = service.serve(loopback());
    let _connection = client.connect(to).must("connect");
    let exported = export(&listener.accept().must("accept")).must("export");
    let gateway = hosts.puppet_there("gateway");
    let two = hosts.puppet_there("two");
    let listener = two.serve(loopback());
    let first_hop = || {
        let taken = gateway.tcp(to);
        import(&taken, &exported).must("take the flow over");
        taken.connect(to).must("connect onwards");
        let accepted = listener.accept().must("accept");
        let record = read_record(&accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query"));
        (record.hops[0].handle, record.hops[0].filter)
    };
    let before = hosts.there.handle_of("one");
    assert_eq!(first_hop(), (before, 0));
    hosts.there.change(|policy| {
        policy.remove_filter("one")?;
        Ok(policy.remove_service("one").map(drop)?)
    });
    // What either bank has left would show.
    for _ in 0..3 {
        assert_eq!(first_hop(), (0, identity("one", "one")));
        hosts.there.change(|policy| Ok(policy.add_provider("another", "").map(drop)?));
        assert_eq!(first_hop(), (0, identity("one", "one")));
        hosts.there.change(|policy| Ok(policy.remove_provider("another").map(drop)?));
    }
    let cgroup = reference_of(&hosts.there.cgroup_of("one"));
    hosts.there.change(|policy| {
        let new = NewService::new("one", "one", cgroup);
        Ok(policy.add_service(new).map(drop)?)
    });
    let after = hosts.there.handle_of("one");
    assert!(after > before);
    assert_eq!(first_hop(), (after, 0));
}

/// What a host makes of a portable record that forgets who has had the flow.
fn forgetful(exported: &[u8]) -> Vec<u8> {
    let mut bytes = exported[..HEADER_LENGTH + size_of::<Hop>()].to_vec();
    let length = bytes.len() as u16;
    bytes[offset_of!(Record, length)..][..2].copy_from_slice(&length.to_le_bytes());
    bytes[offset_of!(Record, hop_count)..][..4].copy_from_slice(&1_u32.to_le_bytes());
    bytes[offset_of!(Record, hops)..][..8].copy_from_slice(&77_u64.to_le_bytes());
    bytes
}

#[test]
fn a_circle_of_hosts_that_forget_is_ended_by_the_guard() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let (to, client) = (hosts.here.v4(), hosts.here.puppet());
    let gateways = [hosts.here.puppet_of("gateway"), hosts.puppet_there("gateway")];
    let services = [hosts.here.puppet_of("one"), hosts.puppet_there("two")];
    let listeners = services.each_ref().map(|service| service.serve(loopback()));
    let mut trace = hosts.here.trace();
    let mut held = vec![client.connect(to).must("connect")];
    let mut legs = Vec::new();
    let errno = loop {
        let host = legs.len() % 2;
        let accepted = listeners[host].accept().must("accept");
        let exported = export(&accepted).must("export");
        legs.push(PortableRecord::read(&exported).expect("a portable record").legs());
        assert!(legs.len() < 20, "{legs:?}");
        let next = gateways[1 - host].tcp(to);
        if let Err(errno) = import(&next, &forgetful(&exported)) {
            break errno;
        }
        next.connect(to).must("connect onwards");
        held.extend([accepted, next]);
    };
    // A service and a gateway on each host, and the one that nobody knows.
    let limit = hop_limit(3);
    assert_eq!(errno, Errno(libc::ELOOP));
    assert_eq!(legs, (0..=limit / 2).map(|leg| 2 * leg + 1).collect::<Vec<_>>());
    assert_eq!(hosts.here.counter(Counter::RecordsEndless), 1);
    let event = trace.first(EventKind::RecordRefused);
    assert_eq!(event.reason, RecordError::Endless as u32);
}

/// Any port of the second host.
fn there(v6: bool) -> SocketAddr {
    if v6 { (Topology::DESTINATION_V6, 0).into() } else { (Topology::DESTINATION_V4, 0).into() }
}

#[test]
fn a_service_hands_flows_on_to_the_gateway_of_another_host() {
    let hosts = Hosts::new(&["one"], &["one", "two"]);
    let keys = hosts.keys(&[1]);
    let [one, two] = ["one", "two"].map(|name| hosts.start_there(name));
    let handles = ["one", "gateway", "two"].map(|name| hosts.there.handle_of(name));
    for (v6, to) in [(false, hosts.here.v4()), (true, hosts.here.v6())] {
        let gateway = hosts.gateway(there(v6), &keys, &[]);
        let front = hosts.front("one", gateway.address, &keys);
        hosts.here.exchange(to);
        let (lines, _) = front.end();
        assert_eq!(lines.len(), 1, "{lines:#?}");
        let client = &lines[0]["pid"];
        let (lines, said) = gateway.end();
        assert_eq!(lines.len(), 1, "{lines:#?}");
        assert_eq!(lines[0]["destination"], to.to_string());
        assert_eq!((&lines[0]["verdict"], &lines[0]["pid"]), (&"allow".into(), client));
        assert!(said.contains("records of chains: 1 taken\n"), "{said}");
        let reports = two.reports(1 + usize::from(v6));
        let report = reports.last().expect("a report");
        let record = report.parsed();
        assert_eq!(record.hops[..3].iter().map(|hop| hop.handle).collect::<Vec<_>>(), handles);
        assert_eq!((report.original, report.pid.into()), (to, client.clone()));
        assert_eq!((report.hops, report.legs, record.flags), (3, 3, RECORD_IMPORTED));
    }
    assert!(one.finish().is_empty(), "it has had them on the first host");
    assert_eq!(two.finish().len(), 2);
    assert_eq!(hosts.here.network().echo().connections().len(), 2);
    assert_eq!(hosts.there.counter(Counter::RecordsImported), 2);
}

/// Each host sends everything to the other one: the flow passes every service once, and arrives.
#[test]
fn hosts_that_send_everything_to_each_other_let_a_flow_arrive() {
    let hosts = Hosts::new(&["one"], &["back"]);
    let keys = hosts.keys(&[1]);
    let gateway = hosts.gateway(there(false), &keys, &[]);
    let front = hosts.front("one", gateway.address, &keys);
    let returning = hosts.returning_gateway(&keys);
    let back = hosts.returning_front("back", returning.address, &keys);
    hosts.here.exchange(hosts.here.v4());
    for service in [front, gateway, back, returning] {
        let (lines, said) = service.end();
        assert_eq!(lines.len(), 1, "{said} {lines:#?}");
        assert_eq!(lines[0]["verdict"], "allow", "{lines:#?}");
    }
    assert_eq!(hosts.here.network().echo().connections().len(), 1);
}

#[test]
fn many_flows_at_once_go_on_at_another_host() {
    let count = rounds(500);
    let hosts = Hosts::new(&["one"], &["one", "two"]);
    let keys = hosts.keys(&[1]);
    let [one, two] = ["one", "two"].map(|name| hosts.start_there(name));
    let gateway = hosts.gateway(there(false), &keys, &[]);
    let front = hosts.front("one", gateway.address, &keys);
    let client = hosts.here.client(hosts.here.v4()).count(count.into()).parallel(count as usize);
    let reports = client.run().must("run clients");
    assert!(reports.iter().all(|report| report.ok), "{reports:#?}");
    hosts.here.settle();
    hosts.there.settle_but_for(&[]);
    assert_eq!(front.end().0.len(), count as usize);
    let (_, said) = gateway.end();
    assert!(said.contains(&format!("records of chains: {count} taken\n")), "{said}");
    assert!(one.finish().is_empty());
    let reports = two.finish();
    let flows: BTreeSet<u64> = reports.iter().map(|report| report.flow).collect();
    assert_eq!((reports.len(), flows.len()), (count as usize, count as usize));
    assert!(reports.iter().all(|report| report.hops == 3 && report.legs == 3));
    assert_eq!(hosts.here.network().echo().connections().len(), count as usize);
}

/// A key is replaced without a flow that is refused.
#[test]
fn keys_overlap_while_they_are_replaced() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let _two = hosts.start_there("two");
    for (front, gateway) in [(&[1][..], &[1, 2][..]), (&[2, 1], &[1, 2]), (&[2], &[2, 1])] {
        let gateway = hosts.gateway(there(false), &hosts.keys(gateway), &[]);
        let front = hosts.front("one", gateway.address, &hosts.keys(front));
        hosts.here.exchange(hosts.here.v4());
        drop(front.end());
        let (lines, _) = gateway.end();
        assert_eq!(lines[0]["verdict"], "allow", "{lines:#?}");
    }
}

/// The same in programs that run, and may not open their files any more: they have become another user.
#[test]
fn keys_are_replaced_while_the_programs_run() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let _two = hosts.start_there("two");
    let [gateway_keys, front_keys] = [(); 2].map(|()| hosts.keys(&[1]));
    let gateway = hosts.gateway(there(false), &gateway_keys, &[]);
    let front = hosts.front("one", gateway.address, &front_keys);
    let is_done = AtomicBool::new(false);
    let count = thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let client = hosts.here.client(hosts.here.v4()).count(20).parallel(4);
            let mut reports = Vec::new();
            // The time is for when something fails meanwhile.
            let begun = Instant::now();
            while !is_done.load(Ordering::Acquire) && begun.elapsed() < PATIENCE {
                reports.extend(client.run().must("run the clients"));
            }
            reports
        });
        for (inspect, file, keys) in [
            (&gateway, &gateway_keys, &[1, 2][..]),
            (&front, &front_keys, &[2, 1]),
            (&front, &front_keys, &[2]),
            (&gateway, &gateway_keys, &[2]),
        ] {
            write_keys(file, keys);
            let said = inspect.reload_keys();
            assert!(said.contains(&format!("{} chain keys read from", keys.len())), "{said}");
            hosts.here.exchange(hosts.here.v4());
        }
        // What cannot be read changes nothing.
        fs::write(&gateway_keys, "no key").must("write");
        let said = gateway.reload_keys();
        assert!(said.contains("the old chain keys stay in force: line 1"), "{said}");
        let other = hosts.keys(&[3]);
        fs::rename(other, &front_keys).must("put another file in its place");
        let said = front.reload_keys();
        assert!(said.contains("in another file now"), "{said}");
        hosts.here.exchange(hosts.here.v4());
        is_done.store(true, Ordering::Release);
        let reports = clients.join().expect("the clients' thread");
        let failed: Vec<_> = reports.iter().filter(|report| !report.ok).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        reports.len() + 5
    });
    drop(front.end());
    let (lines, said) = gateway.end();
    assert_eq!(lines.len(), count);
    assert!(said.contains(&format!("records of chains: {count} taken\n")), "{said}");
}

#[test]
fn a_key_that_the_gateway_does_not_have_is_refused() {
    let hosts = Hosts::new(&["one"], &["two"]);
    let _two = hosts.start_there("two");
    let gateway = hosts.gateway(there(false), &hosts.keys(&[1, 2]), &[]);
    let front = hosts.front("one", gateway.address, &hosts.keys(&[3]));
    let reports = hosts.here.client(hosts.here.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    drop(front.end());
    let (lines, said) = gateway.end();
    assert_eq!(lines[0]["verdict"], "refuse", "{lines:#?}");
    assert!(said.contains("records of chains: 0 taken, 1 refused (unknown key)\n"), "{said}");
}

//! The administrator's objects: they stay whole, and their texts are read as they are written.

use std::{collections::BTreeSet, num::NonZeroU16};

use carnet_core::{
    abi::MAX_CONTEXT,
    compile::compile,
    object::{
        CgroupCondition, CgroupRef, ConditionError, Conditions, Context, DocumentError,
        ExecutableCondition, FailurePolicy, Filter, FilterAction, Identities, Kind, NetnsCondition,
        NewFilter, NewService, Policy, PolicyError, PortRange, Prefix, Protocol, Trust, UserRange,
        Weight,
    },
    record::FileId,
    table::{MAX_CGROUP_LEVEL, MAX_SERVICES, ServiceRow},
};
use proptest::prelude::*;

use crate::support::{conditions, new_filter, new_service, policies, policy, redirect};

#[test]
fn nothing_that_is_referenced_is_removed() {
    let mut policy = policy(&[("s", 0)], &["a", "b"]);
    policy.set_trust("b", Trust::Services(vec!["a".into()])).unwrap();
    let filter = new_filter("s", Conditions::default(), redirect("a"));
    let filter = NewFilter { name: Some("all".into()), ..filter };
    policy.add_filter(filter).unwrap();
    let in_use = |kind, name: &str, user_kind, user: &str| {
        let (name, user) = (name.into(), user.into());
        PolicyError::InUse { kind, name, user_kind, user }
    };

    let error = policy.remove_provider("p").unwrap_err();
    assert_eq!(error, in_use(Kind::Provider, "p", Kind::Sublayer, "s"));
    let error = policy.remove_sublayer("s").unwrap_err();
    assert_eq!(error, in_use(Kind::Sublayer, "s", Kind::Filter, "all"));
    let error = policy.remove_service("a").unwrap_err();
    assert_eq!(error, in_use(Kind::Service, "a", Kind::Filter, "all"));
    policy.remove_filter("all").unwrap();
    let error = policy.remove_service("a").unwrap_err();
    assert_eq!(error, in_use(Kind::Service, "a", Kind::Service, "b"));
    assert_eq!(
        error.to_string(),
        r#"service "a" is used by service b: remove or change that first"#
    );
    policy.remove_sublayer("s").unwrap();
    let error = policy.remove_provider("p").unwrap_err();
    assert_eq!(error, in_use(Kind::Provider, "p", Kind::Service, "a"));
    policy.remove_service("b").unwrap();
    policy.remove_service("a").unwrap();
    policy.remove_provider("p").unwrap();
    assert!(policy.providers().is_empty());
}

#[test]
fn objects_are_found_by_name_and_by_id() {
    let mut policy = policy(&[("s", 0)], &["a"]);
    let service = policy.service("a").unwrap().clone();
    assert_ne!(service.id, service.handle);
    assert_eq!(policy.service(&service.id.to_string()).unwrap(), &service);
    assert_eq!(policy.service_by_handle(service.handle), Some(&service));
    let provider = policy.provider("p").unwrap().id.to_string();
    let sublayer = policy.sublayer("s").unwrap().id.to_string();
    // References are names, however they were given.
    assert_eq!(policy.add_sublayer("t", &provider, 1).unwrap().provider, "p");
    let new = new_filter(&sublayer, Conditions::default(), redirect(&service.id.to_string()));
    let filter = policy.add_filter(new).unwrap().clone();
    assert_eq!((&filter.sublayer[..], &filter.action), ("s", &redirect("a")));
    assert_eq!(policy.filter_by_id(filter.id), Some(&filter));
    assert_eq!(policy.filter(&filter.id.to_string()), Ok(&filter));
    for key in ["b", "999", "", "99999999999999999999999"] {
        let error = policy.service(key).unwrap_err();
        assert_eq!(error, PolicyError::NotFound { kind: Kind::Service, key: key.into() });
    }
}

#[test]
fn bad_objects_are_refused_and_change_nothing() {
    let mut policy = policy(&[("s", 0)], &["a"]);
    let before = policy.clone();
    let taken = |kind, name: &str| PolicyError::NameTaken { kind, name: name.into() };
    let missing = |kind, key: &str| PolicyError::NotFound { kind, key: key.into() };

    let long = "x".repeat(65);
    for name in ["", " ", "a b", "ä", "a/b", ".hidden", "-x", "12", long.as_str()] {
        let error = policy.add_provider(name, "").unwrap_err();
        assert_eq!(error, PolicyError::BadName { name: name.into() });
    }
    assert_eq!(policy.add_provider("p", "").unwrap_err(), taken(Kind::Provider, "p"));
    assert_eq!(policy.add_sublayer("s", "p", 1).unwrap_err(), taken(Kind::Sublayer, "s"));
    assert_eq!(policy.add_sublayer("t", "q", 1).unwrap_err(), missing(Kind::Provider, "q"));

    let new = |name| new_service(name, FailurePolicy::Block);
    assert_eq!(policy.add_service(new("a")).unwrap_err(), taken(Kind::Service, "a"));
    let elsewhere = NewService { provider: "q".into(), ..new("b") };
    assert_eq!(policy.add_service(elsewhere).unwrap_err(), missing(Kind::Provider, "q"));
    let homeless = CgroupRef { path: "/x".into(), id: 0 };
    let error = policy.add_service(NewService { cgroup: homeless.clone(), ..new("b") });
    assert_eq!(error.unwrap_err(), PolicyError::NoCgroup { path: "/x".into() });
    assert_eq!(
        policy.set_cgroup("a", homeless).unwrap_err(),
        PolicyError::NoCgroup { path: "/x".into() }
    );
    let shared = NewService { cgroup: new("a").cgroup, ..new("b") };
    let error = policy.add_service(shared).unwrap_err();
    let path = "/services/a".into();
    assert_eq!(error, PolicyError::CgroupTaken { path, service: "a".into() });
    for key in ["b", "a"] {
        let trust = Trust::Services(vec![key.into()]);
        let expected = match key {
            "a" => PolicyError::TrustsItself { name: "a".into() },
            _ => missing(Kind::Service, "b"),
        };
        assert_eq!(policy.set_trust("a", trust).unwrap_err(), expected);
    }

    let filter = |sublayer, conditions| new_filter(sublayer, conditions, FilterAction::BLOCK);
    let error = policy.add_filter(filter("t", Conditions::default())).unwrap_err();
    assert_eq!(error, missing(Kind::Sublayer, "t"));
    let error = policy.add_filter(new_filter("s", Conditions::default(), redirect("b")));
    assert_eq!(error.unwrap_err(), missing(Kind::Service, "b"));
    let deep = CgroupCondition { path: "/…".into(), id: 1, level: MAX_CGROUP_LEVEL + 1 };
    let deep = Conditions { cgroups: vec![deep], ..Default::default() };
    let error = policy.add_filter(filter("s", deep)).unwrap_err();
    assert!(matches!(error, PolicyError::Condition(ConditionError::CgroupTooDeep { .. })));
    let nowhere = [
        Conditions {
            cgroups: vec![CgroupCondition { path: "/x".into(), id: 0, level: 1 }],
            ..Default::default()
        },
        Conditions {
            executables: vec![ExecutableCondition { path: "/x".into(), file: FileId::default() }],
            ..Default::default()
        },
        Conditions {
            network_namespaces: vec![NetnsCondition { name: "x".into(), cookie: 0 }],
            ..Default::default()
        },
    ];
    for conditions in nowhere {
        let error = policy.add_filter(filter("s", conditions)).unwrap_err();
        assert!(matches!(error, PolicyError::Condition(ConditionError::NoIdentity { .. })));
    }
    assert_eq!(policy, before);
}

#[test]
fn there_is_room_for_sixty_four_services() {
    let mut policy = policy(&[], &[]);
    for n in 0..MAX_SERVICES {
        policy.add_service(new_service(&format!("s{n}"), FailurePolicy::Skip)).unwrap();
    }
    let error = policy.add_service(new_service("more", FailurePolicy::Skip)).unwrap_err();
    assert_eq!(error, PolicyError::TooManyServices);
    policy.remove_service("s7").unwrap();
    policy.add_service(new_service("more", FailurePolicy::Skip)).unwrap();
}

#[test]
fn texts_are_read_and_printed_alike() {
    fn round_trip<T: std::str::FromStr<Err = E> + ToString, E: std::fmt::Debug>(
        texts: &[(&str, &str)],
    ) {
        for (given, printed) in texts {
            assert_eq!(given.parse::<T>().unwrap().to_string(), *printed, "{given:?}");
        }
    }
    round_trip::<Protocol, _>(&[("tcp", "tcp"), ("6", "tcp"), ("udp", "udp"), ("132", "132")]);
    round_trip::<PortRange, _>(&[("443", "443"), ("8000-8999", "8000-8999"), ("1-1", "1")]);
    round_trip::<UserRange, _>(&[("0", "0"), ("0-4294967295", "0-4294967295")]);
    round_trip::<Weight, _>(&[("auto", "auto"), ("18446744073709551615", "18446744073709551615")]);
    round_trip::<Prefix, _>(&[
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1/32", "192.0.2.1"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("2001:DB8::1/128", "2001:db8::1"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::fffe:0:0/95", "::fffe:0:0/95"),
    ]);

    for text in ["", "TCP", "256", "-1", "tcp "] {
        assert_eq!(text.parse::<Protocol>(), Err(ConditionError::Protocol(text.into())));
    }
    for text in ["", "65536", "9-1", "1-", "-1", "1-2-3", "http", "1 - 2"] {
        assert_eq!(text.parse::<PortRange>(), Err(ConditionError::Ports(text.into())));
    }
    for text in ["", "4294967296", "2-1", "root"] {
        assert_eq!(text.parse::<UserRange>(), Err(ConditionError::Users(text.into())));
    }
    for text in ["", "1.2.3", "1.2.3.4/33", "::/129", "1.2.3.4/", "/8", "fe80::1%lo", "1.2.3.4/-1"]
    {
        assert_eq!(text.parse::<Prefix>(), Err(ConditionError::Prefix(text.into())), "{text}");
    }
    for (text, meant) in [("192.0.2.1/24", "192.0.2.0/24"), ("2001:db8::1/32", "2001:db8::/32")] {
        let error = text.parse::<Prefix>().unwrap_err();
        let meant = meant.parse().unwrap();
        assert_eq!(error, ConditionError::HostBits { text: text.into(), meant });
    }
    for text in ["", "heavy", "-1", "18446744073709551616"] {
        assert_eq!(text.parse::<Weight>(), Err(PolicyError::BadWeight { text: text.into() }));
    }
    assert_eq!((PortRange::new(2, 1), UserRange::new(2, 1)), (None, None));
}

#[test]
fn contexts_are_bounded_bytes_in_text_or_hexadecimal() {
    assert_eq!(Context::from_hex("00fF").unwrap().as_bytes(), [0, 255]);
    assert_eq!(Context::new([0, 255]).unwrap().to_string(), "0x00ff");
    assert_eq!(Context::new("tenant 7").unwrap().to_string(), "tenant 7");
    for length in [0, MAX_CONTEXT + 1] {
        let error = Context::new(vec![0; length]).unwrap_err();
        assert_eq!(error, PolicyError::BadContext { length });
    }
    for text in ["0", "0g", "0x00", "ä", "+1"] {
        let error = Context::from_hex(text).unwrap_err();
        assert_eq!(error, PolicyError::BadHex { text: text.into() });
    }
    assert!(Context::new(vec![0; MAX_CONTEXT]).is_ok());
}

#[test]
fn the_document_is_the_one_that_is_promised() {
    let mut policy = policy(&[("s", 9)], &["a"]);
    let conditions = Conditions {
        protocols: vec![Protocol::TCP],
        destinations: vec!["192.0.2.0/24".parse().unwrap()],
        ports: vec!["8000-8999".parse().unwrap()],
        executables: vec![ExecutableCondition {
            path: "/bin/x".into(),
            file: FileId { device: 1, inode: 2 },
        }],
        ..Default::default()
    };
    let context = Some(Context::new([0, 255]).unwrap());
    let action = FilterAction::Redirect { service: "a".into(), context };
    policy.add_filter(new_filter("s", conditions, action)).unwrap();
    let document: serde_json::Value = serde_json::from_slice(&policy.to_bytes()).unwrap();
    let expected = serde_json::json!({
        "format": 1,
        "next_id": 6,
        "providers": [{"id": 1, "name": "p", "description": ""}],
        "sublayers": [{"id": 2, "name": "s", "provider": "p", "weight": 9}],
        "services": [{
            "id": 3, "handle": 4, "name": "a", "provider": "p",
            "cgroup": {"path": "/services/a", "id": 0x161},
            "on_failure": "block", "trust": "none", "unmodified": false, "tproxy": false,
            "gateway": false,
        }],
        "filters": [{
            "id": 5, "sublayer": "s", "weight": "auto",
            "conditions": {
                "protocols": ["tcp"],
                "destinations": ["192.0.2.0/24"],
                "ports": ["8000-8999"],
                "executables": [{"path": "/bin/x", "file": {"device": 1, "inode": 2}}],
            },
            "action": {"redirect": {"service": "a", "context": {"hex": "00ff"}}},
        }],
    });
    assert_eq!(document, expected);
}

#[test]
fn services_of_documents_of_before_co_operate() {
    let policy = read_changed(|document| {
        let service = document["services"][0].as_object_mut().unwrap();
        for key in ["unmodified", "tproxy", "gateway"] {
            assert_eq!(service.remove(key), Some(false.into()));
        }
    });
    let policy = policy.unwrap();
    let service = &policy.services()[0];
    assert_eq!((service.unmodified, service.listen_port, service.tproxy), (false, None, false));
    assert!(!service.gateway);
}

#[test]
fn what_a_service_s_program_does_not_do_itself_is_in_the_document_and_in_its_row() {
    const PLAIN: (u32, u16, u16, u32) = (0, 0, 0, 0);
    const PROXY: (u32, u16, u16, u32) = (1, 15001, 1, 1);
    let mut policy = policy(&[], &["a"]);
    let new = new_service("b", FailurePolicy::Block);
    let listen_port = NonZeroU16::new(PROXY.1);
    let proxy = NewService { unmodified: true, listen_port, tproxy: true, gateway: true, ..new };
    policy.add_service(proxy).unwrap();
    let rows = |policy: &Policy| -> Vec<_> {
        let compiled = compile(policy, 1).unwrap();
        let row = |row: &ServiceRow| (row.unmodified, row.listen_port, row.tproxy, row.gateway);
        compiled.services().iter().map(row).collect()
    };
    assert_eq!(rows(&policy), [PLAIN, PROXY]);
    for (name, is_proxy) in [("a", true), ("b", false)] {
        policy.set_unmodified(name, is_proxy).unwrap();
        policy.set_listen_port(name, listen_port.filter(|_| is_proxy)).unwrap();
        policy.set_tproxy(name, is_proxy).unwrap();
        policy.set_gateway(name, is_proxy).unwrap();
    }
    let mut read = Policy::from_bytes(&policy.to_bytes()).unwrap();
    assert_eq!(rows(&read), [PROXY, PLAIN]);
    // What replaces a policy says it of the services that stay and of those that are new.
    read.replace(&rich()).unwrap();
    assert_eq!(rows(&read), [PLAIN, PLAIN]);
    read.replace(&policy).unwrap();
    assert_eq!(rows(&read), [PROXY, PLAIN]);
    read.replace(&Policy::new()).unwrap();
    read.replace(&policy).unwrap();
    assert_eq!(rows(&read), [PROXY, PLAIN]);
}

/// A valid document, changed by `change`, and what reading it says.
fn read_changed(change: impl FnOnce(&mut serde_json::Value)) -> Result<Policy, DocumentError> {
    let mut policy = policy(&[("s", 0), ("t", 0)], &["a", "b"]);
    policy.set_trust("b", Trust::Services(vec!["a".into()])).unwrap();
    for _ in 0..2 {
        policy.add_filter(new_filter("s", Conditions::default(), redirect("a"))).unwrap();
    }
    let mut document = serde_json::to_value(&policy).unwrap();
    change(&mut document);
    Policy::from_bytes(document.to_string().as_bytes())
}

#[test]
fn damaged_documents_are_refused() {
    use serde_json::json;
    assert!(read_changed(|_| ()).is_ok());
    // Another format is named as such, whatever else it holds.
    let newer = Policy::from_bytes(br#"{"format": 2, "tables": []}"#).unwrap_err();
    assert!(matches!(newer, DocumentError::UnknownFormat { found: 2 }), "{newer}");
    assert!(newer.to_string().contains("use the version that wrote it"), "{newer}");
    for bytes in [&b""[..], b"{}", b"[]", b"{\"format\": 1}", b"\xff", b"{\"format\": 1}\0"] {
        let error = Policy::from_bytes(bytes).unwrap_err();
        assert!(matches!(error, DocumentError::Unreadable(_)), "{error}");
    }

    type Change = fn(&mut serde_json::Value);
    let unreadable: [Change; 8] = [
        |d| d["surprise"] = json!(1),
        |d| d["filters"][0]["surprise"] = json!(1),
        |d| d["filters"][0]["conditions"]["colours"] = json!(["red"]),
        |d| d["filters"][0]["conditions"]["ports"] = json!(["9-1"]),
        |d| d["filters"][0]["action"] = json!({"allow": {}}),
        |d| d["filters"][0]["action"]["redirect"]["context"] = json!({"text": ""}),
        |d| d["services"][0]["on_failure"] = json!("pray"),
        |d| d["services"][0]["listen_port"] = json!(0),
    ];
    for change in unreadable {
        let error = read_changed(change).unwrap_err();
        assert!(matches!(error, DocumentError::Unreadable(_)), "{error}");
    }
    let numbers: [Change; 6] = [
        |d| d["next_id"] = json!(3),
        |d| d["providers"][0]["id"] = json!(0),
        |d| d["services"][1]["handle"] = d["services"][0]["handle"].clone(),
        |d| d["services"][1]["handle"] = d["filters"][0]["id"].clone(),
        |d| d["sublayers"][0]["id"] = json!(u64::MAX),
        |d| d["filters"].as_array_mut().unwrap().reverse(),
    ];
    for change in numbers {
        let error = read_changed(change).unwrap_err();
        assert!(matches!(error, DocumentError::BadNumber { .. }), "{error}");
    }
    let broken: [Change; 10] = [
        |d| d["providers"] = json!([]),
        |d| d["sublayers"][1]["name"] = json!("s"),
        |d| d["services"][0]["name"] = json!("no name"),
        |d| d["services"][0]["name"] = json!("c"),
        |d| d["services"][1]["provider"] = json!("q"),
        |d| d["services"][1]["cgroup"]["id"] = d["services"][0]["cgroup"]["id"].clone(),
        |d| d["services"][1]["trust"] = json!({"services": ["b"]}),
        |d| d["filters"][0]["sublayer"] = json!("u"),
        // An id is not a reference, although the methods take one.
        |d| d["filters"][0]["sublayer"] = json!(d["sublayers"][0]["id"].to_string()),
        |d| d["filters"][0]["action"]["redirect"]["service"] = json!("c"),
    ];
    for (at, change) in broken.into_iter().enumerate() {
        let error = read_changed(change).unwrap_err();
        assert!(matches!(error, DocumentError::Broken(_)), "{at}: {error}");
    }
}

#[test]
fn more_specific_filters_weigh_more() {
    let weight = |ports: &[&str], destinations: &[&str], protocols: &[&str]| {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let conditions = Conditions {
            ports: parse(ports),
            destinations: destinations.iter().map(|text| text.parse().unwrap()).collect(),
            protocols: protocols.iter().map(|text| text.parse().unwrap()).collect(),
            ..Default::default()
        };
        conditions.automatic_weight()
    };
    let order = [
        weight(&[], &[], &[]),
        weight(&[], &["0.0.0.0/0"], &[]),
        weight(&["1024-65535"], &[], &[]),
        weight(&[], &["10.0.0.0/8"], &[]),
        weight(&[], &["10.0.0.0/16", "10.128.0.0/16"], &[]),
        weight(&[], &["10.1.0.0/16"], &[]),
        weight(&["80"], &[], &[]),
        weight(&["1024-65535"], &["10.1.0.0/16"], &[]),
        weight(&["80"], &["10.1.2.3"], &[]),
        weight(&["80"], &["10.1.2.3"], &["tcp"]),
    ];
    assert!(order.is_sorted(), "{order:?}");
    assert_eq!(order[0], 0);
    // All of the ports, or of the addresses, is no condition.
    assert_eq!(weight(&["0-65535"], &["0.0.0.0/0", "::/0"], &[]), 0);
}

/// What is done to a policy: numbers pick among what is there.
#[derive(Clone, Debug)]
enum Change {
    AddProvider,
    AddSublayer(usize),
    AddService(usize),
    AddFilter(usize, usize),
    RemoveProvider(usize),
    RemoveSublayer(usize),
    RemoveService(usize),
    RemoveFilter(usize),
    WriteAndRead,
}

fn changes() -> impl Strategy<Value = Change> {
    let pick = || 0..8_usize;
    prop_oneof![
        1 => Just(Change::AddProvider),
        1 => pick().prop_map(Change::AddSublayer),
        2 => pick().prop_map(Change::AddService),
        2 => (pick(), pick()).prop_map(|(sublayer, service)| Change::AddFilter(sublayer, service)),
        1 => pick().prop_map(Change::RemoveProvider),
        1 => pick().prop_map(Change::RemoveSublayer),
        2 => pick().prop_map(Change::RemoveService),
        3 => pick().prop_map(Change::RemoveFilter),
        1 => Just(Change::WriteAndRead),
    ]
}

proptest! {
    #[test]
    fn numbers_are_never_given_twice(
        changes in prop::collection::vec(changes(), 0..120),
    ) {
        let mut policy = Policy::new();
        let mut given = BTreeSet::new();
        for (n, change) in changes.into_iter().enumerate() {
            let name = format!("n{n}");
            let provider = |policy: &Policy, n: usize| {
                policy.providers().get(n).map_or("none".into(), |o| o.name.clone())
            };
            let sublayer = |policy: &Policy, n: usize| {
                policy.sublayers().get(n).map_or("none".into(), |o| o.name.clone())
            };
            let service = |policy: &Policy, n: usize| {
                policy.services().get(n).map_or("none".into(), |o| o.name.clone())
            };
            // Changes that are refused are part of the game.
            let numbers = match change {
                Change::AddProvider => policy.add_provider(&name, "").map(|o| vec![o.id]),
                Change::AddSublayer(n) => {
                    let provider = provider(&policy, n);
                    policy.add_sublayer(&name, &provider, 0).map(|o| vec![o.id])
                }
                Change::AddService(n) => {
                    let provider = provider(&policy, n);
                    let new = new_service(&name, FailurePolicy::Block);
                    policy.add_service(NewService { provider, ..new }).map(|o| vec![o.id, o.handle])
                }
                Change::AddFilter(n, m) => {
                    let action = redirect(&service(&policy, m));
                    let new = new_filter(&sublayer(&policy, n), Conditions::default(), action);
                    policy.add_filter(new).map(|o| vec![o.id])
                }
                Change::RemoveProvider(n) => {
                    policy.remove_provider(&provider(&policy, n)).map(|_| vec![])
                }
                Change::RemoveSublayer(n) => {
                    policy.remove_sublayer(&sublayer(&policy, n)).map(|_| vec![])
                }
                Change::RemoveService(n) => {
                    policy.remove_service(&service(&policy, n)).map(|_| vec![])
                }
                Change::RemoveFilter(n) => {
                    let filter = policy.filters().get(n).map_or(0, |o| o.id);
                    policy.remove_filter(&filter.to_string()).map(|_| vec![])
                }
                Change::WriteAndRead => {
                    policy = Policy::from_bytes(&policy.to_bytes()).unwrap();
                    Ok(vec![])
                }
            };
            for number in numbers.unwrap_or_default() {
                prop_assert!(number != 0 && given.insert(number), "{} was given twice", number);
            }
            // Whatever is done or refused, the document stays one that can be read.
            prop_assert_eq!(&Policy::from_bytes(&policy.to_bytes()).unwrap(), &policy);
        }
    }

    #[test]
    fn documents_round_trip(
        mut policy in policies(),
        context in prop::collection::vec(any::<u8>(), 1..256),
    ) {
        if let Some(service) = policy.services().first() {
            let context = Some(Context::new(context).unwrap());
            let action = FilterAction::Redirect { service: service.name.clone(), context };
            let named = new_filter("s0", Conditions::default(), action);
            policy.add_filter(NewFilter { name: Some("named".into()), ..named }).unwrap();
        }
        prop_assert_eq!(Policy::from_bytes(&policy.to_bytes()).unwrap(), policy);
    }

    #[test]
    fn arbitrary_bytes_are_no_document(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Policy::from_bytes(&bytes).is_err());
    }

    /// A filter that can match only what another matches is never the lighter of the two.
    #[test]
    fn automatic_weights_grow_with_what_a_filter_excludes(
        wide in conditions(),
        added in conditions(),
        dropped: u8,
    ) {
        fn narrow<T: Clone>(wide: &[T], added: Vec<T>, dropped: bool) -> Vec<T> {
            match wide {
                [] => added,
                [first, _, ..] if dropped => vec![first.clone()],
                _ => wide.to_vec(),
            }
        }
        let drops = |bit: u8| dropped & 1 << bit != 0;
        let narrow = Conditions {
            protocols: narrow(&wide.protocols, added.protocols, drops(0)),
            destinations: narrow(&wide.destinations, added.destinations, drops(1)),
            ports: narrow(&wide.ports, added.ports, drops(2)),
            users: narrow(&wide.users, added.users, drops(3)),
            cgroups: narrow(&wide.cgroups, added.cgroups, drops(4)),
            executables: narrow(&wide.executables, added.executables, drops(5)),
            original_executables: narrow(
                &wide.original_executables,
                added.original_executables,
                drops(6),
            ),
            network_namespaces: narrow(
                &wide.network_namespaces,
                added.network_namespaces,
                drops(7),
            ),
        };
        prop_assert!(narrow.automatic_weight() >= wide.automatic_weight());
        prop_assert!(narrow.automatic_weight() < 1 << 60);
    }
}

/// A policy of two services that trust each other and two filters of equal weight.
fn rich() -> Policy {
    let mut policy = policy(&[("s", 0), ("t", 0)], &["a", "b"]);
    policy.set_trust("a", Trust::Services(vec!["b".into()])).unwrap();
    policy.set_trust("b", Trust::Services(vec!["a".into()])).unwrap();
    for name in ["first", "second"] {
        let filter = new_filter("s", Conditions::default(), redirect("a"));
        policy.add_filter(NewFilter { name: Some(name.into()), ..filter }).unwrap();
    }
    policy
}

#[test]
fn a_policy_replaced_by_itself_stays_the_same() {
    let mut before = rich();
    let wanted = Policy::from_bytes(&before.to_bytes()).unwrap();
    before.replace(&wanted).unwrap();
    assert_eq!(before, wanted);
}

#[test]
fn an_empty_policy_becomes_what_another_says_with_numbers_of_its_own() {
    let mut fresh = Policy::new();
    fresh.add_provider("gone", "").unwrap();
    fresh.replace(&rich()).unwrap();
    assert!(fresh.provider("gone").is_err());
    let handle = |policy: &Policy, name| policy.service(name).unwrap().handle;
    assert!(handle(&fresh, "a") > handle(&rich(), "a"), "the number of what is gone is not given");
    assert_eq!(fresh.service("a").unwrap().trust, rich().service("a").unwrap().trust);
    let names: Vec<_> = fresh.filters().iter().map(|f| f.name.as_deref()).collect();
    assert_eq!(names, [Some("first"), Some("second")]);
    assert!(Policy::from_bytes(&fresh.to_bytes()).is_ok());
}

#[test]
fn what_stays_keeps_its_numbers_and_what_is_new_gets_others() {
    let mut policy = rich();
    let before = policy.clone();
    let mut wanted = rich();
    wanted.remove_filter("first").unwrap();
    wanted.set_on_failure("a", FailurePolicy::Skip).unwrap();
    wanted.add_filter(new_filter("t", Conditions::default(), FilterAction::BLOCK)).unwrap();
    policy.replace(&wanted).unwrap();
    for name in ["a", "b"] {
        assert_eq!(policy.service(name).unwrap().handle, before.service(name).unwrap().handle);
    }
    assert_eq!(policy.service("a").unwrap().on_failure, FailurePolicy::Skip);
    assert_eq!(policy.filter("second").unwrap().id, before.filter("second").unwrap().id);
    let largest = before.filters().last().unwrap().id;
    assert!(policy.filters().last().unwrap().id > largest);

    // A service of another provider is another one.
    let mut wanted = rich();
    wanted.add_provider("q", "").unwrap();
    let text = String::from_utf8(wanted.to_bytes()).unwrap();
    let text = text.replacen(r#""name":"a","provider":"p""#, r#""name":"a","provider":"q""#, 1);
    policy.replace(&Policy::from_bytes(text.as_bytes()).unwrap()).unwrap();
    assert!(policy.service("a").unwrap().handle > largest);
}

#[test]
fn filters_of_equal_weight_take_the_order_of_the_new_policy() {
    let mut policy = rich();
    let mut wanted = rich();
    let Filter { sublayer, weight, conditions, action, .. } =
        wanted.remove_filter("first").unwrap();
    let name = Some("first".into());
    wanted.add_filter(NewFilter { name, sublayer, weight, conditions, action }).unwrap();
    policy.replace(&wanted).unwrap();
    let names: Vec<_> = policy.filters().iter().map(|f| f.name.as_deref()).collect();
    assert_eq!(names, [Some("second"), Some("first")]);
    assert!(policy.filters()[0].id < policy.filters()[1].id);
}

/// Everything has the number 7, and what is named "gone" is gone.
struct Sevens;

impl Identities for Sevens {
    type Error = String;

    fn cgroup(&mut self, path: &str) -> Result<(u64, u32), String> {
        if path.contains("gone") { Err(path.into()) } else { Ok((7, 3)) }
    }

    fn executable(&mut self, _: &str) -> Result<FileId, String> {
        Ok(FileId { device: 7, inode: 7 })
    }

    fn network_namespace(&mut self, _: &str) -> Result<u64, String> {
        Ok(7)
    }
}

#[test]
fn a_document_is_identified_anew() {
    let mut wanted = policy(&[("s", 0)], &["a"]);
    let conditions = Conditions {
        cgroups: vec![CgroupCondition { path: "/x".into(), id: 1, level: 1 }],
        executables: vec![ExecutableCondition {
            path: "/bin/x".into(),
            file: FileId { device: 1, inode: 1 },
        }],
        network_namespaces: vec![NetnsCondition { name: "/run/netns/x".into(), cookie: 1 }],
        ..Conditions::default()
    };
    wanted.add_filter(new_filter("s", conditions, redirect("a"))).unwrap();
    wanted.identify(&mut Sevens).unwrap();
    assert_eq!(wanted.service("a").unwrap().cgroup.id, 7);
    let Conditions { cgroups, executables, network_namespaces, .. } =
        &wanted.filters()[0].conditions;
    assert_eq!((cgroups[0].id, cgroups[0].level), (7, 3));
    assert_eq!(executables[0].file.inode, 7);
    assert_eq!(network_namespaces[0].cookie, 7);

    // Two services whose paths lead to one cgroup.
    let mut two = policy(&[("s", 0)], &["a", "b"]);
    two.identify(&mut Sevens).unwrap();
    let mut before = Policy::new();
    let error = before.replace(&two).unwrap_err();
    assert!(matches!(error, PolicyError::CgroupTaken { .. }), "{error}");
    assert_eq!(before, Policy::new());
}

//! Explanations: the contract's walk-through, and cases that once went wrong.

use carnet_core::{
    arbitration::Verdict,
    chain::RedirectState::{
        NotRedirected, PreviouslyRedirectedBySelf, RedirectedByOther, RedirectedBySelf,
    },
    classify::{Outcome, Reason},
    compile::compile,
    explain::{HostConnection, Leg, Process, explain},
    object::{
        CgroupCondition, Conditions, Context, FailurePolicy, FilterAction, NewFilter, Policy,
        Trust, Weight,
    },
    record::FileId,
    table::Field,
};

use crate::support::{connection_to, new_filter, policy, redirect};

fn legs(policy: &Policy, dead: &[&str]) -> Vec<Leg> {
    let compiled = compile(policy, 1).unwrap();
    let live = |handle, _| !dead.contains(&policy.service_by_handle(handle).unwrap().name.as_str());
    let connection = connection_to("192.0.2.1:80");
    explain(policy, &compiled, &connection, &live, &|_, _| Process::default())
}

fn add(policy: &mut Policy, sublayer: &str, weight: u64, action: FilterAction) -> u64 {
    let filter = new_filter(sublayer, Conditions::default(), action);
    policy.add_filter(NewFilter { weight: Weight::Exact(weight), ..filter }).unwrap().id
}

/// The names of the services that a flow met.
fn met(policy: &Policy, legs: &[Leg]) -> Vec<String> {
    let handles = legs.iter().skip(1).map(|leg| leg.service.unwrap());
    handles.map(|handle| policy.service_by_handle(handle).unwrap().name.clone()).collect()
}

#[test]
fn the_walk_through_of_the_contract() {
    for weights in [[2, 1], [1, 2]] {
        let mut policy = policy(&[("of-a", weights[0]), ("of-b", weights[1])], &["a", "b"]);
        let a = add(&mut policy, "of-a", 0, redirect("a"));
        let b = add(&mut policy, "of-b", 0, redirect("b"));
        // From the heavier one's view; it is A in the contract's table.
        let (first, second) = if weights[0] > weights[1] { (a, b) } else { (b, a) };
        let heavy = usize::from(first == b);
        let legs = legs(&policy, &[]);
        let states: Vec<_> = legs
            .iter()
            .map(|leg| [leg.services[heavy].state, leg.services[1 - heavy].state])
            .collect();
        assert_eq!(
            states,
            [
                [NotRedirected, NotRedirected],
                [RedirectedBySelf, RedirectedByOther],
                [PreviouslyRedirectedBySelf, RedirectedBySelf],
            ]
        );
        let matched: Vec<Vec<_>> = legs
            .iter()
            .map(|leg| leg.matched.iter().map(|m| (m.filter, m.outcome)).collect())
            .collect();
        assert_eq!(
            matched,
            [
                [(first, Outcome::Redirects), (second, Outcome::LaterLeg)],
                [(first, Outcome::AlreadyVisited), (second, Outcome::Redirects)],
                [(first, Outcome::AlreadyVisited), (second, Outcome::AlreadyVisited)],
            ]
        );
        let decisions: Vec<_> = legs.iter().map(|leg| leg.decision.filter).collect();
        assert_eq!(decisions, [first, second, 0]);
    }
}

#[test]
fn a_dead_service_is_passed_over_or_refuses() {
    let mut policy = policy(&[("s", 0)], &["a", "b"]);
    let a = add(&mut policy, "s", 2, redirect("a"));
    add(&mut policy, "s", 1, redirect("b"));
    let refused = legs(&policy, &["a"]);
    let [leg] = &refused[..] else { panic!("{refused:?}") };
    assert_eq!((leg.decision.reason, leg.decision.filter), (Reason::ServiceUnavailable, a));
    assert_eq!(leg.decision.handle, policy.service("a").unwrap().handle);
    assert!(leg.decision.blocks() && !leg.services[0].live && leg.services[1].live);

    policy.set_on_failure("a", FailurePolicy::Skip).unwrap();
    let passed = legs(&policy, &["a"]);
    assert_eq!(met(&policy, &passed), ["b"]);
    assert_eq!(passed[0].matched[0].outcome, Outcome::Skipped);
    assert_eq!(passed[0].decision.skipped, 1);
    // Nothing changes while it is alive.
    assert_eq!(met(&policy, &legs(&policy, &[])), ["a", "b"]);
}

#[test]
fn a_service_that_trusts_stands_aside() {
    let mut policy = policy(&[("s", 0)], &["a", "b"]);
    add(&mut policy, "s", 2, redirect("a"));
    let b = add(&mut policy, "s", 1, redirect("b"));
    for trust in [Trust::All, Trust::Services(vec!["a".into()])] {
        policy.set_trust("b", trust).unwrap();
        let legs = legs(&policy, &[]);
        assert_eq!(met(&policy, &legs), ["a"]);
        let last = legs[1].matched.last().unwrap();
        assert_eq!((last.filter, last.outcome), (b, Outcome::Trusts));
    }
}

/// The filter of a redirect is what the record and the context are taken from.
#[test]
fn permits_around_a_redirect_do_not_take_its_place() {
    let sublayers = [("before", 3), ("middle", 2), ("after", 1)];
    for hard in [false, true] {
        let mut policy = policy(&sublayers, &["a"]);
        add(&mut policy, "before", 0, FilterAction::PERMIT);
        let context = Some(Context::new("for a").unwrap());
        let action = FilterAction::Redirect { service: "a".into(), context };
        let a = add(&mut policy, "middle", 0, action);
        add(&mut policy, "after", 0, FilterAction::Permit { hard });
        let compiled = compile(&policy, 1).unwrap();
        let legs = legs(&policy, &[]);
        assert_eq!(legs[0].decision.filter, a);
        assert_eq!(compiled.context(legs[0].decision.filter), Some(&b"for a"[..]));
        assert_eq!(compiled.contexts().len(), 1);
    }
}

/// Contract C20: who finds the connection redirected permits, whatever lighter filters say.
#[test]
fn a_redirect_that_waits_for_a_later_leg_permits_this_one() {
    let mut policy = policy(&[("of-a", 2), ("of-b", 1)], &["a", "b"]);
    let b = add(&mut policy, "of-b", 2, redirect("b"));
    let block = add(&mut policy, "of-b", 1, FilterAction::BLOCK);
    let without_a = legs(&policy, &[]);
    assert_eq!(met(&policy, &without_a), ["b"]);
    assert_eq!(without_a[1].decision.filter, block);
    add(&mut policy, "of-a", 0, redirect("a"));
    let with_a = legs(&policy, &[]);
    assert_eq!(met(&policy, &with_a), ["a", "b"]);
    let outcomes: Vec<_> = with_a[0].matched.iter().map(|m| (m.filter, m.outcome)).collect();
    assert_eq!(outcomes[1..], [(b, Outcome::LaterLeg), (block, Outcome::Shadowed)]);
}

#[test]
fn a_block_undoes_a_redirect_and_a_hard_permit_forbids_one() {
    let mut blocked = policy(&[("heavy", 2), ("light", 1)], &["a"]);
    add(&mut blocked, "heavy", 0, redirect("a"));
    let block = add(&mut blocked, "light", 0, FilterAction::BLOCK);
    let decision = legs(&blocked, &[])[0].decision;
    assert_eq!((decision.verdict, decision.filter), (Verdict::HardBlock, block));
    assert_eq!((decision.redirects(), decision.handle), (false, 0));

    let mut forbidden = policy(&[("heavy", 2), ("light", 1)], &["a"]);
    add(&mut forbidden, "heavy", 0, FilterAction::Permit { hard: true });
    add(&mut forbidden, "light", 0, redirect("a"));
    let legs = legs(&forbidden, &[]);
    assert_eq!((legs.len(), legs[0].matched[1].outcome), (1, Outcome::Overruled));
}

#[test]
fn later_legs_are_the_services_and_keep_the_original_executable() {
    let mut policy = policy(&[("s", 0)], &["a"]);
    let (app, proxy) = (FileId { device: 1, inode: 1 }, FileId { device: 1, inode: 2 });
    let at = |path: &str, id, level| CgroupCondition { path: path.into(), id, level };
    let cgroup = |cgroup| Conditions { cgroups: vec![cgroup], ..Default::default() };
    let users = Conditions { users: vec!["0-4294967294".parse().unwrap()], ..Default::default() };
    policy.add_filter(new_filter("s", cgroup(at("/apps", 7, 1)), redirect("a"))).unwrap();
    let own = cgroup(at("/services/a", 8, 2));
    let own = policy.add_filter(new_filter("s", own, FilterAction::PERMIT)).unwrap().id;
    policy.add_filter(new_filter("s", users, FilterAction::BLOCK)).unwrap();
    let compiled = compile(&policy, 1).unwrap();
    let application = HostConnection {
        process: Process {
            cgroups: Some(vec![1, 7, 9]),
            executable: Some(app),
            user: Some(u32::MAX),
            network_namespace: None,
        },
        ..connection_to("192.0.2.1:80")
    };
    let process = |_: &_, _| Process {
        cgroups: Some(vec![1, 6, 8]),
        executable: Some(proxy),
        ..Default::default()
    };
    let legs = explain(&policy, &compiled, &application, &|_, _| true, &process);
    assert_eq!(legs.len(), 2);
    assert_eq!((legs[0].service, legs[0].unknown.as_slice()), (None, &[][..]));
    assert_eq!(legs[1].service, Some(policy.service("a").unwrap().handle));
    assert_eq!(legs[1].connection.original_executable, Some(app));
    assert_eq!(legs[1].connection.process.executable, Some(proxy));
    assert_eq!(legs[1].decision.filter, own);
    // The block would match users; that of the service's process is not known.
    assert_eq!(legs[1].unknown, [Field::User]);
}

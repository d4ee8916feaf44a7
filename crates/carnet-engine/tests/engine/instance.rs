//! Instances: up, policy, upgrade, down, on the real kernel.

use std::fs;

use carnet_core::object::{FilterAction, Policy, PolicyError};
use carnet_engine::{BuildId, Engine, Error, Location, UpOptions, doctor};
use carnet_testbed::Cgroup;

use crate::world::{Failure, World, fill, filter, links, mode, redirect, reference, service};

/// Hooks of the scope.
const SCOPE_HOOKS: usize = 10;
/// What a service has besides.
const SERVICE_HOOKS: usize = 3;

#[test]
fn up_and_down_leave_nothing() {
    let world = World::new("carnet-engine-up");
    let location = world.location("one");
    assert!(matches!(Engine::open(&location), Err(Error::NotUp { .. })));
    let engine = world.up();
    assert_eq!(engine.scope(), world.scope.path());
    assert_eq!(mode(location.directory()), 0o700);
    assert_eq!(
        Location::list(Some(world.bpffs.path().into())).unwrap(),
        std::slice::from_ref(&location)
    );
    assert_eq!(links(&location).len(), SCOPE_HOOKS);
    assert_eq!(engine.policy().unwrap(), Policy::new());
    assert!(engine.counters().unwrap().iter().all(|(_, count)| *count == 0));
    let again = Engine::up(&location, &UpOptions::new(world.scope.path()));
    assert!(matches!(again, Err(Error::AlreadyUp { .. })));
    Engine::open(&location).unwrap().down().unwrap();
    assert_eq!(world.pins(), [] as [&str; 0]);
    assert!(matches!(engine.policy(), Err(Error::NotUp { .. })));
    assert!(matches!(engine.down(), Err(Error::NotUp { .. })));
    assert_eq!(world.pins(), [] as [&str; 0]);
}

#[test]
fn the_policy_reads_back_from_the_kernel() {
    let world = World::new("carnet-engine-policy");
    let own = world.scope.child("scan").unwrap();
    let mut engine = world.up();
    fill(&mut engine, &own);
    let seen = Engine::open(engine.location()).unwrap().policy().unwrap();
    assert_eq!(seen, engine.policy().unwrap());
    assert_eq!(seen.services()[0].name, "scan");
    assert_eq!(seen.filters()[0].action, redirect("scan", b"hello"));
    assert_eq!(links(engine.location()).len(), SCOPE_HOOKS + SERVICE_HOOKS);
    // Many transactions in a row use both banks in turn.
    for port in 1..20 {
        let added: Result<_, Failure> =
            engine.transact(|policy| Ok(policy.add_filter(filter(port, FilterAction::BLOCK))?.id));
        let compiled = engine.compiled().unwrap();
        assert_eq!(compiled.header().generation, u64::from(port) + 1);
        assert!(compiled.filters().iter().any(|row| Some(&row.id) == added.as_ref().ok()));
    }
    // A service that goes takes its hooks along.
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        let ids: Vec<_> = policy.filters().iter().map(|filter| filter.id.to_string()).collect();
        ids.iter().try_for_each(|id| policy.remove_filter(id).map(drop))?;
        policy.remove_service("scan")?;
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(links(engine.location()).len(), SCOPE_HOOKS);
    engine.down().unwrap();
}

#[test]
fn a_failed_transaction_changes_nothing() {
    let world = World::new("carnet-engine-fail");
    let own = world.scope.child("scan").unwrap();
    let options = UpOptions { max_filters: 2, ..UpOptions::new(world.scope.path()) };
    let mut engine = Engine::up(&world.location("one"), &options).unwrap();
    fill(&mut engine, &own);
    let policy = engine.policy().unwrap();
    let attached = links(engine.location());
    let unchanged = |engine: &Engine| {
        assert_eq!(engine.policy().unwrap(), policy);
        assert_eq!(engine.status().unwrap().generation, 1);
        assert_eq!(links(engine.location()), attached);
    };

    // The change itself fails, after it has begun.
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        policy.add_sublayer("half", "acme", 0)?;
        Ok(policy.add_provider("acme", "").map(drop)?)
    });
    assert!(matches!(outcome, Err(Failure::Policy(PolicyError::NameTaken { .. }))));
    unchanged(&engine);

    // There is no room, although the new service's cgroup is there.
    let other = world.scope.child("other").unwrap();
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        policy.add_service(service("other", reference(&other)))?;
        for port in 1..=2 {
            policy.add_filter(filter(port, redirect("other", b"more")))?;
        }
        Ok(())
    });
    let Err(Failure::Engine(error @ Error::TooLarge { needed: 3, capacity: 2, .. })) = outcome
    else {
        panic!("{outcome:?}");
    };
    assert!(error.to_string().contains("--max-filters"), "{error}");
    unchanged(&engine);

    // One new service's hooks are attached before the other one's cannot be.
    let gone = reference(&world.scope.child("gone").unwrap());
    let outcome: Result<(), Failure> = engine.transact(|policy| {
        policy.add_service(service("other", reference(&other)))?;
        Ok(policy.add_service(service("gone", gone)).map(drop)?)
    });
    assert!(matches!(outcome, Err(Failure::Engine(Error::CgroupGone { .. }))), "{outcome:?}");
    unchanged(&engine);

    // Nothing changes where nothing is changed.
    let outcome: Result<(), Failure> = engine.transact(|_| Ok(()));
    outcome.unwrap();
    unchanged(&engine);
    engine.down().unwrap();
}

#[test]
fn two_instances_live_side_by_side() {
    let world = World::new("carnet-engine-two");
    let own = world.scope.child("scan").unwrap();
    let mut one = world.up();
    let options = UpOptions::new(world.scope.path());
    let mut two = Engine::up(&world.location("two"), &options).unwrap();
    fill(&mut one, &own);
    assert_eq!(two.policy().unwrap(), Policy::new());
    fill(&mut two, &own);
    assert_ne!(one.status().unwrap().epoch, two.status().unwrap().epoch);
    let names: Vec<_> = Location::list(Some(world.bpffs.path().into())).unwrap();
    assert_eq!(names.iter().map(Location::instance).collect::<Vec<_>>(), ["one", "two"]);
    one.down().unwrap();
    assert_eq!(two.policy().unwrap().filters().len(), 1);
    assert!(two.status().unwrap().links.iter().all(|link| link.alive));
    two.down().unwrap();
    assert_eq!(world.pins(), [] as [&str; 0]);
}

#[test]
fn an_upgrade_replaces_the_programs_and_keeps_the_rest() {
    let world = World::new("carnet-engine-upgrade");
    let own = world.scope.child("scan").unwrap();
    let mut engine = world.up();
    fill(&mut engine, &own);
    let before = engine.status().unwrap();
    let policy = engine.policy().unwrap();
    let report = engine.upgrade().unwrap();
    assert_eq!((report.from, report.to), (BuildId::own(), BuildId::own()));
    assert_eq!((report.replaced, report.defunct), (SCOPE_HOOKS + SERVICE_HOOKS, 0));
    let after = engine.status().unwrap();
    assert_eq!(engine.policy().unwrap(), policy);
    assert_eq!((after.epoch, after.generation), (before.epoch, before.generation));
    let pinned: Vec<u32> = after.programs.iter().map(|program| program.id).collect();
    assert_eq!(pinned.len(), before.programs.len());
    assert!(before.programs.iter().all(|program| !pinned.contains(&program.id)));
    assert_eq!(before.links.len(), after.links.len());
    for (old, new) in before.links.iter().zip(&after.links) {
        assert_eq!((old.id, &old.hook, old.cgroup), (new.id, &new.hook, new.cgroup));
        assert!(new.alive && pinned.contains(&new.program_id));
    }
    fill_more(&mut engine);
    engine.down().unwrap();
    assert_eq!(world.pins(), [] as [&str; 0]);
}

fn fill_more(engine: &mut Engine) {
    let outcome: Result<_, Failure> =
        engine.transact(|policy| Ok(policy.add_filter(filter(81, FilterAction::BLOCK))?.id));
    outcome.unwrap();
}

#[test]
fn an_unknown_layout_can_only_be_taken_down() {
    let world = World::new("carnet-engine-layout");
    let location = world.location("one");
    world.up();
    fs::remove_file(location.directory().join("maps/INSTANCE")).unwrap();
    let mut engine = Engine::open(&location).unwrap();
    let unknown = |error: &Error| matches!(error, Error::UnknownLayout { .. });
    assert!(unknown(&engine.policy().unwrap_err()));
    assert!(unknown(&engine.status().unwrap_err()));
    assert!(unknown(&engine.upgrade().unwrap_err()));
    assert!(unknown(&engine.transact(|_| Ok::<_, Error>(())).unwrap_err()));
    engine.down().unwrap();
    assert_eq!(world.pins(), [] as [&str; 0]);
}

#[test]
fn the_hooks_follow_the_services_cgroups() {
    let world = World::new("carnet-engine-hooks");
    let outside = Cgroup::create("carnet-engine-outside").unwrap();
    let mut engine = world.up();
    fill(&mut engine, &outside);
    let of = |id: u64| format!("cgroup-{id}/");
    let count = |engine: &Engine, id| {
        links(engine.location()).iter().filter(|link| link.starts_with(&of(id))).count()
    };
    // Outside the scope, a service needs all hooks.
    assert_eq!(count(&engine, outside.id()), SCOPE_HOOKS + SERVICE_HOOKS);
    let inside = world.scope.child("scan").unwrap();
    let moved: Result<(), Failure> =
        engine.transact(|policy| Ok(policy.set_cgroup("scan", reference(&inside)).map(drop)?));
    moved.unwrap();
    assert_eq!((count(&engine, outside.id()), count(&engine, inside.id())), (0, SERVICE_HOOKS));

    // A cgroup that goes takes nothing along but its own links.
    let id = inside.id();
    drop(inside);
    let status = engine.status().unwrap();
    let dead: Vec<_> = status.links.iter().filter(|link| !link.alive).collect();
    assert!(dead.iter().all(|link| link.cgroup == id), "{dead:?}");
    assert_eq!(dead.len(), SERVICE_HOOKS);
    fill_more(&mut engine);
    let report = engine.upgrade().unwrap();
    assert_eq!(report.replaced + report.defunct, SCOPE_HOOKS + SERVICE_HOOKS);
    let around = world.scope.path().parent().unwrap();
    let root = carnet_engine::cgroup::mount_point().unwrap();
    if around != root {
        let (id, _) = Engine::resolve_cgroup(around).unwrap();
        let path = format!("/{}", around.strip_prefix(root).unwrap().display());
        let cgroup = carnet_core::object::CgroupRef { path, id };
        let refused: Result<(), Failure> =
            engine.transact(|policy| Ok(policy.set_cgroup("scan", cgroup).map(drop)?));
        assert!(matches!(refused, Err(Failure::Engine(Error::ServiceAroundScope { .. }))));
    }
    engine.down().unwrap();
}

#[test]
fn what_cannot_be_is_refused_in_words_and_leaves_nothing() {
    let world = World::new("carnet-engine-refused");
    let location = world.location("one");
    let refused = |options: &UpOptions| Engine::up(&location, options).unwrap_err();
    let not_a_cgroup = refused(&UpOptions::new("/tmp"));
    assert!(matches!(not_a_cgroup, Error::NotACgroup { .. }), "{not_a_cgroup}");
    let no_filters = UpOptions { max_filters: 0, ..UpOptions::new(world.scope.path()) };
    assert!(matches!(refused(&no_filters), Error::BadMaxFilters { given: 0, .. }));
    assert!(matches!(Location::new(Some("/tmp".into()), "one"), Err(Error::NotBpffs { .. })));
    for name in ["", "a/b", ".", "a.b", &"x".repeat(65)] {
        let outcome = Location::new(Some(world.bpffs.path().into()), name);
        assert!(matches!(outcome, Err(Error::BadInstance { .. })), "{name}");
    }
    assert_eq!(world.pins(), [] as [&str; 0]);
}

#[test]
fn the_doctor_finds_nothing_missing_here() {
    let world = World::new("carnet-engine-doctor");
    let _engine = world.up();
    let findings = doctor::examine(Some(world.scope.path()));
    let missing: Vec<_> =
        findings.iter().filter(|finding| finding.state == doctor::State::Missing).collect();
    assert_eq!(missing, [] as [&doctor::Finding; 0]);
    for name in [
        "programs on new sockets",
        "programs before Carnet's",
        "programs after Carnet's",
        "programs on packets",
    ] {
        let neighbours = findings.iter().find(|finding| finding.name == name).unwrap();
        assert!(!neighbours.detail.contains("carnet_"), "{}", neighbours.detail);
    }
}

//! The small configurations, as a part of all tests; `cargo xtask prove` explores the others.

use carnet_model::{
    configurations::{CONFIGURATIONS, Defects},
    explore::{Report, Until},
    protocol::Defect,
};

fn explore(name: &str, defects: Defects) -> Report {
    let found = CONFIGURATIONS.iter().find(|found| found.name == name);
    let configuration = found.expect("there is such a configuration");
    configuration.explore(Until::TheEnd, defects)
}

#[test]
fn every_property_of_the_smallest_protocol_holds() {
    let report = explore("smallest", Defects::default());
    assert!(report.holds(), "{report}");
    assert!(report.states > 1000);
}

#[test]
fn a_policy_is_seen_whole_or_not_at_all() {
    let report = explore("banks", Defects::default());
    assert!(report.holds(), "{report}");
}

#[test]
fn what_breaks_a_property_is_told_step_by_step() {
    let defects = Defects { protocol: Some(Defect::RecordUnseen), ..Defects::default() };
    let report = explore("smallest", defects);
    let broken = report.properties.iter().find(|found| !found.holds && !found.reached).unwrap();
    let steps = &broken.counterexample;
    assert!(steps[0].starts_with("the application of flow 1 connects"), "{steps:?}");
    assert!(steps.iter().any(|step| step.contains("sets on flow 1's socket the record")));
}

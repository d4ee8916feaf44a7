//! The policies of the configurations.

use carnet_core::object::{
    FailurePolicy::{self, Block, Skip},
    FilterAction, Trust,
};

use crate::scene::{Administrator, Intent, NAMES, Scene};

/// Services of both failure policies.
pub(super) const MIXED: [FailurePolicy; 4] = [Block, Skip, Block, Skip];

/// A trust mask that stands for everybody.
pub(super) const ALL: u8 = u8::MAX;

/// The failure policy of each service, by a number: those whose bit is set are skipped.
pub(super) fn failures<const SERVICES: usize>(set: u16) -> [FailurePolicy; SERVICES] {
    std::array::from_fn(|service| if set & 1 << service == 0 { Block } else { Skip })
}

/// Whom each service trusts, by a number with a bit for each of the others of each.
pub(super) fn masks<const SERVICES: usize>(trust: u16) -> [u8; SERVICES] {
    let others = SERVICES - 1;
    std::array::from_fn(|service| {
        spread(trust >> (others * service) & ((1 << others) - 1), service)
    })
}

/// A set of the others as a set of all: a service does not trust itself.
fn spread(others: u16, service: usize) -> u8 {
    let below = others & ((1 << service) - 1);
    (below | (others >> service) << (service + 1)) as u8
}

/// Adds services with these failure policies.
fn add_services(admin: &mut Administrator, names: &[&str], failures: &[FailurePolicy]) {
    for (process, (name, failure)) in names.iter().zip(failures).enumerate() {
        admin.add_service(name, process, *failure);
    }
}

/// Says whom the services trust.
fn add_trust(admin: &mut Administrator, names: &[&str], trusts: &[u8]) {
    for (name, trusts) in names.iter().zip(trusts) {
        let trusted = names.iter().enumerate().filter(|(other, _)| trusts & 1 << other != 0);
        let trusted: Vec<String> = trusted.map(|(_, name)| (*name).to_owned()).collect();
        admin.trust(
            name,
            match *trusts {
                ALL => Trust::All,
                0 => Trust::None,
                _ => Trust::Services(trusted),
            },
        );
    }
}

/// The first of the names, as an intent.
fn inspected_by(count: usize) -> Intent {
    const ORDER: &[&str] = &NAMES;
    Intent::inspect(&ORDER[..count])
}

/// Services that all get every flow to destination 0, the first in the order being that of their names.
/// Filters are in sublayers of different weights, and within them of different weights; made in another
/// order than they count.
pub(super) fn everybody(names: &[&str], failures: &[FailurePolicy], trusts: &[u8]) -> Scene {
    let mut admin = Administrator::new(&[10, 30, 20]);
    add_services(&mut admin, names, failures);
    add_trust(&mut admin, names, trusts);
    redirect_all(admin, names)
}

/// The same with services that are passed over when they are dead; those whose bit is set are
/// unmodified.
pub(super) fn unmodified(names: &[&str], set: u8) -> Scene {
    let mut admin = Administrator::new(&[10, 30, 20]);
    add_services(&mut admin, names, &[Skip; NAMES.len()]);
    mark_unmodified(&mut admin, names, set);
    redirect_all(admin, names)
}

fn mark_unmodified(admin: &mut Administrator, names: &[&str], set: u8) {
    for (service, name) in names.iter().enumerate() {
        if set & 1 << service != 0 {
            admin.unmodified(name);
        }
    }
}

fn redirect_all(mut admin: Administrator, names: &[&str]) -> Scene {
    let places = [(30, 1), (20, 9), (20, 5), (10, 9)];
    for (name, (sublayer, weight)) in names.iter().zip(places).rev() {
        admin.redirect(name, sublayer, weight, 0);
    }
    admin.commit([inspected_by(names.len()), Intent::PASS]);
    admin.finish()
}

/// Four services that get flows to destination 1 in the opposite order of those to destination 0.
pub(super) fn opposite_orders(failures: &[FailurePolicy]) -> Scene {
    let mut admin = Administrator::new(&[10, 30, 20]);
    add_services(&mut admin, &NAMES, failures);
    let places = [(30, 1), (20, 9), (20, 5), (10, 9)];
    for (name, (sublayer, weight)) in NAMES.iter().zip(places) {
        admin.redirect(name, sublayer, weight, 0);
    }
    for (name, (sublayer, weight)) in NAMES.iter().rev().zip(places) {
        admin.redirect(name, sublayer, weight, 1);
    }
    admin.commit([inspected_by(4), Intent::inspect(&["d", "c", "b", "a"])]);
    admin.finish()
}

/// Two services likewise.
pub(super) fn opposite_pair() -> Scene {
    unmodified_pair(0)
}

/// The same; those whose bit is set are unmodified.
pub(super) fn unmodified_pair(set: u8) -> Scene {
    let mut admin = Administrator::new(&[10]);
    add_services(&mut admin, &["a", "b"], &[Block; 2]);
    mark_unmodified(&mut admin, &["a", "b"], set);
    for (name, weight) in [("a", 9), ("b", 8)] {
        admin.redirect(name, 10, weight, 0);
        admin.redirect(name, 10, 17 - weight, 1);
    }
    admin.commit([inspected_by(2), Intent::inspect(&["b", "a"])]);
    admin.finish()
}

/// Five policies: d is added; b and its filter are removed; another b is added, which trusts d; its filter
/// and one for the first service come and go.
pub(super) fn changes() -> Scene {
    let mut admin = Administrator::new(&[10, 20, 30]);
    add_services(&mut admin, &["a", "b", "c"], &[Block; 3]);
    admin.trust("c", Trust::Services(vec!["a".into(), "b".into()]));
    admin.redirect("b", 30, 5, 0);
    admin.redirect("a", 20, 5, 0);
    admin.redirect("c", 10, 5, 0);
    admin.commit([Intent::inspect(&["b", "a", "c"]), Intent::PASS]);

    admin.add_service("d", 3, Block);
    admin.redirect("d", 10, 9, 0);
    admin.commit([Intent::inspect(&["b", "a", "d", "c"]), Intent::PASS]);

    admin.remove_filter("b-0");
    admin.trust("c", Trust::Services(vec!["a".into()]));
    admin.remove_service("b");
    admin.commit([Intent::inspect(&["a", "d", "c"]), Intent::PASS]);

    admin.add_service("b", 1, Skip);
    admin.redirect("b", 20, 1, 0);
    admin.trust("c", Trust::Services(vec!["a".into(), "b".into()]));
    admin.commit([Intent::inspect(&["a", "b", "d", "c"]), Intent::PASS]);

    admin.remove_filter("a-0");
    admin.add_filter("no", 30, 5, 1, FilterAction::BLOCK);
    admin.commit([Intent::inspect(&["b", "d", "c"]), Intent::REFUSE]);
    admin.finish()
}

/// What filters above a redirect can say.
const UPPER: [Option<FilterAction>; 7] = [
    None,
    Some(FilterAction::PERMIT),
    Some(FilterAction::Permit { hard: true }),
    Some(FilterAction::Block { hard: false, veto: false }),
    Some(FilterAction::BLOCK),
    Some(FilterAction::Block { hard: true, veto: true }),
    Some(FilterAction::Block { hard: false, veto: true }),
];

/// What comes of a filter of the heaviest sublayer (the row) and one of the second (the column), above a
/// redirect (contract C44..C47): `I`, inspected; `P`, passes without; `R`, refused at once; `L`, refused
/// when it has been inspected, since a redirect overrides a soft block for the leg that it redirects.
const COMBINED: [&str; 7] = [
    "IIPLRRR", // nothing
    "IIPLRRR", // soft permit
    "PPPPPRR", // hard permit
    "LIPLRRR", // soft block
    "RRRRRRR", // hard block
    "RRRRRRR", // hard block with a veto
    "RRRRRRR", // soft block with a veto, which is hard
];

/// A scene for each combination. Destination 1 has the heaviest filter alone.
pub(super) fn filters() -> Vec<Scene> {
    let intent = |row: usize, column: usize| match COMBINED[row].as_bytes()[column] {
        b'I' => Intent::inspect(&["a"]),
        b'P' => Intent::PASS,
        b'L' => Intent { order: &["a"], refused: true },
        _ => Intent::REFUSE,
    };
    let scene = |row: usize, column: usize| {
        // Made in another order than they count.
        let mut admin = Administrator::new(&[20, 10, 30]);
        admin.add_service("a", 0, Block);
        if let Some(action) = &UPPER[column] {
            admin.add_filter("second", 20, 1, 0, action.clone());
        }
        for destination in 0..2 {
            admin.redirect("a", 10, 1, destination);
            if let Some(action) = &UPPER[row] {
                admin.add_filter(
                    &format!("first-{destination}"),
                    30,
                    2,
                    destination,
                    action.clone(),
                );
                // In one sublayer the heavier filter decides alone.
                let lighter = FilterAction::Block { hard: true, veto: true };
                admin.add_filter(&format!("shadowed-{destination}"), 30, 1, destination, lighter);
            }
        }
        admin.commit([intent(row, column), intent(row, 0)]);
        admin.finish()
    };
    (0..7).flat_map(|row| (0..7).map(move |column| scene(row, column))).collect()
}

/// Policies that differ in all their tables, for [`Banks`].
pub(super) fn bank_policies() -> Scene {
    let mut admin = Administrator::new(&[10, 20]);
    admin.add_service("a", 0, Block);
    admin.redirect("a", 10, 5, 0);
    admin.commit([inspected_by(1), Intent::PASS]);

    // Another service in the first one's slot, and it first in arbitration.
    admin.add_service("b", 1, Block);
    admin.redirect("b", 20, 5, 0);
    admin.redirect("b", 20, 5, 1);
    admin.commit([Intent::inspect(&["b", "a"]), Intent::inspect(&["b"])]);

    admin.remove_filter("a-0");
    admin.remove_service("a");
    admin.add_filter("no", 10, 5, 1, FilterAction::BLOCK);
    admin.commit([Intent::inspect(&["b"]), Intent::REFUSE]);

    // Nobody is concerned.
    admin.remove_filter("b-0");
    admin.commit([Intent::PASS, Intent::REFUSE]);

    admin.add_service("c", 2, Block);
    admin.redirect("c", 10, 1, 0);
    admin.commit([Intent::inspect(&["c"]), Intent::REFUSE]);
    admin.finish()
}

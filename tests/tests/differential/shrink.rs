//! A mismatch with the smallest policy that still has it, and all that is said about it in words.

use std::fmt::Write as _;

use carnet_core::object::Policy;

use crate::{
    case::Case,
    judge::{InWords, Judged, SeenInWords, name_of},
    run::carry_out,
    stage::Stage,
};

/// Describes the mismatch of the case in place `at` of a batch, after leaving out all that is not
/// needed for it.
pub(crate) fn shrink(stage: &mut Stage, batch: &[Case], at: usize, first: &Judged) -> String {
    let whole = stage.policy.clone();
    let mut said = describe(stage, &batch[at], first);
    // Alone, or after those before it, whose flows services may hold.
    let alone = [batch[at].clone()];
    let Some(cases) = [&alone[..], &batch[..=at]].into_iter().find(|c| fails(stage, c).is_some())
    else {
        said.push_str("\nIt did not happen again: see whether anything depends on time.\n");
        return said;
    };
    let mut policy = whole;
    let mut chunk = policy.filters().len().div_ceil(2);
    while chunk > 0 {
        let mut from = 0;
        while from < policy.filters().len() {
            let smaller = without(&policy, from, chunk);
            stage.put_in_force(&smaller);
            if let Some(text) = fails(stage, cases) {
                (policy, said) = (smaller, text);
            } else {
                from += chunk;
            }
        }
        chunk /= 2;
    }
    if cases.len() > 1 {
        let _ = writeln!(said, "\nIt needs the {} cases before it in the batch.", cases.len() - 1);
    }
    said
}

/// Carries out the cases, and describes the last one if its decisions differ.
fn fails(stage: &mut Stage, cases: &[Case]) -> Option<String> {
    let results = carry_out(stage, cases);
    let (last, case) = (results.last()?, cases.last()?);
    (!last.agrees()).then(|| describe(stage, case, last))
}

/// The policy without `count` filters from this place on.
fn without(policy: &Policy, from: usize, count: usize) -> Policy {
    let mut smaller = policy.clone();
    for filter in policy.filters().iter().skip(from).take(count) {
        let _absent = smaller.remove_filter(&filter.id.to_string());
    }
    smaller
}

fn describe(stage: &Stage, case: &Case, judged: &Judged) -> String {
    let policy = &stage.policy;
    let mut text = String::new();
    let mut line = |line: String| text.push_str(&(line + "\n"));
    let call = &case.call;
    let member = &stage.members[case.member];
    let how = match (call.protocol, call.unconnected) {
        (6, _) => "TCP connect",
        (_, false) => "UDP connect",
        (_, true) => "UDP sendto",
    };
    line(format!("MISMATCH: {how} to {} by {}, user {}", call.to, member.name, call.user));
    let names = |handles: &[u64]| {
        handles.iter().map(|handle| name_of(policy, *handle)).collect::<Vec<_>>().join(", ")
    };
    let history = &judged.expected.history;
    line(match case.kept {
        Some(_) => format!("  record: [{}], {} legs", names(&history.handles), history.legs),
        None => format!("  no record, {} legs by the hop guard", history.forgotten_legs),
    });
    line(format!("  {}", judged.problem.as_deref().unwrap_or("nothing is wrong")));
    let kernel = judged.kernel.as_ref().map_or_else(
        || "what was seen contradicts itself".to_owned(),
        |seen| SeenInWords { policy, seen }.to_string(),
    );
    line(format!("  kernel:    {kernel}"));
    line(format!("  core:      {}", InWords { policy, answer: &judged.expected.core }));
    line(format!("  reference: {}", InWords { policy, answer: &judged.expected.reference }));
    for service in &stage.services {
        let listens: Vec<_> = service
            .doors
            .iter()
            .map(|door| {
                let protocol = if door.protocol == 6 { "tcp" } else { "udp" };
                format!("{protocol}{}", if door.ipv6 { 6 } else { 4 })
            })
            .collect();
        let name = name_of(policy, service.handle);
        line(format!("  {name} (#{}) listens on {}", service.handle, listens.join(" ")));
    }
    line(format!("  policy: {}", String::from_utf8_lossy(&policy.to_bytes())));
    text
}

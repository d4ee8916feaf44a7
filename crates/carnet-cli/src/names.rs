//! Names that do not exist: which ones were perhaps meant.

use carnet_core::object::{Kind, Policy, PolicyError};

use crate::failure::Failure;

/// How similar a name has to be to be proposed (Jaro, 0 to 1); clap's own threshold.
const SIMILAR: f64 = 0.7;

/// Makes a failure of a policy's error; for a name that does not exist it says which ones are near.
pub(crate) fn failure(policy: &Policy, error: PolicyError) -> Failure {
    let PolicyError::NotFound { kind, key } = &error else {
        return error.into();
    };
    let (names, add): (Vec<&str>, _) = match kind {
        Kind::Provider => (
            policy.providers().iter().map(|p| p.name.as_str()).collect(),
            format!("carnet provider add {key}"),
        ),
        Kind::Sublayer => (
            policy.sublayers().iter().map(|s| s.name.as_str()).collect(),
            format!("carnet sublayer add {key} --provider PROVIDER"),
        ),
        Kind::Service => (
            policy.services().iter().map(|s| s.name.as_str()).collect(),
            format!("carnet service add {key} --provider PROVIDER --cgroup PATH"),
        ),
        Kind::Filter => (
            policy.filters().iter().filter_map(|f| f.name.as_deref()).collect(),
            "carnet filter ls".to_owned(),
        ),
    };
    let near = near(key, names);
    let hint = match &near[..] {
        [] => add,
        names => format!("did you mean {}?", names.join(" or ")),
    };
    Failure::new(format_args!("there is no {kind} {key:?}")).with_hint(hint)
}

/// The names that are similar to `name`, the most similar first, three at most.
fn near<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut near: Vec<_> = names
        .into_iter()
        .map(|candidate| (strsim::jaro(name, candidate), candidate))
        .filter(|(similarity, _)| *similarity > SIMILAR)
        .collect();
    near.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    near.into_iter().take(3).map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_does_not_exist_leads_to_the_right_one() {
        let mut policy = Policy::new();
        policy.add_provider("acme", "").unwrap();
        let error = policy.provider("acne").unwrap_err();
        assert_eq!(failure(&policy, error).hint(), Some("did you mean acme?"));
        let error = policy.provider("zebra").unwrap_err();
        assert_eq!(failure(&policy, error).hint(), Some("carnet provider add zebra"));
    }

    #[test]
    fn the_most_similar_names_come_first() {
        let names = ["mail-filter", "tls-inspector", "tls-inspect", "tls-inspection", "tls-inspe"];
        assert_eq!(near("tls-inspect", names), ["tls-inspect", "tls-inspector", "tls-inspe"]);
        assert!(near("x", names).is_empty());
    }
}

//! Exploring a model to the end, and what came of it.

use std::{fmt, hash::Hash, time::Instant};

use serde::{Deserialize, Serialize};
use stateright::{Checker as _, Expectation, HasDiscoveries, Model, Path};

/// A model that can say in words what happens.
pub trait Tell: Model {
    /// What happens in the state `before`, and what comes of it.
    fn tell(&self, before: &Self::State, action: Self::Action) -> String;
}

/// What came of exploring a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The configuration's name.
    pub configuration: String,
    /// States that differ.
    pub states: usize,
    /// Steps of the longest way into a state that is not reached sooner.
    pub depth: usize,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// The properties.
    pub properties: Vec<Finding>,
}

/// What came of a property.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The property.
    pub property: String,
    /// Whether it is as it should be: it holds in every state, or in some for what has to be reached.
    pub holds: bool,
    /// Whether it says that something has to be reached.
    pub reached: bool,
    /// The steps into a state that breaks it, in words; none if it holds.
    pub counterexample: Vec<String>,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Every state has been visited.
    TheEnd,
    /// A property is broken, or every state has been visited.
    AFault,
}

/// Explores all states of a model, breadth first.
///
/// With one thread, so that counts, depths and counterexamples are the same each time.
pub fn explore<M>(configuration: &str, model: M, until: Until) -> Report
where
    M: Tell + Clone + Send + Sync + 'static,
    M::State: Clone + PartialEq + Hash + fmt::Debug + Send + Sync + 'static,
    M::Action: Copy + PartialEq + fmt::Debug + Send + Sync,
{
    let began = Instant::now();
    let properties = model.properties();
    let checker = model.clone().checker().finish_when(match until {
        Until::TheEnd => HasDiscoveries::All,
        Until::AFault => HasDiscoveries::AnyFailures,
    });
    let checker = checker.threads(1).spawn_bfs().join();
    let mut discoveries = checker.discoveries();
    let findings = properties.into_iter().map(|property| {
        let path = discoveries.remove(property.name);
        let reached = property.expectation == Expectation::Sometimes;
        let holds = path.is_some() == reached;
        let path = path.filter(|_| !holds).map(|path| shortest(&model, property.name, path));
        let steps = path.map(Path::into_vec).unwrap_or_default().into_iter();
        let told = steps.filter_map(|(state, action)| Some(model.tell(&state, action?)));
        let counterexample = told.collect();
        Finding { property: property.name.to_owned(), holds, reached, counterexample }
    });
    let properties = findings.collect();
    Report {
        configuration: configuration.to_owned(),
        states: checker.unique_state_count(),
        depth: checker.max_depth() - 1,
        took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        properties,
    }
}

/// The shortest way into a state that breaks a property, given one: of those that the checker finds in one
/// go it keeps the last.
fn shortest<M>(
    model: &M,
    property: &'static str,
    mut path: Path<M::State, M::Action>,
) -> Path<M::State, M::Action>
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Clone + PartialEq + Hash + fmt::Debug + Send + Sync + 'static,
    M::Action: Copy + PartialEq + fmt::Debug + Send + Sync,
{
    loop {
        // The bound counts states, of which there is one more than steps: so this is for fewer steps.
        let bound = path.clone().into_actions().len() + 1;
        let checker = model.clone().checker().threads(1).target_max_depth(bound);
        let wanted = HasDiscoveries::AnyOf([property].into());
        match checker.finish_when(wanted).spawn_bfs().join().discovery(property) {
            Some(shorter) => path = shorter,
            None => return path,
        }
    }
}

impl Report {
    /// Whether everything is as it should be.
    pub fn holds(&self) -> bool {
        self.properties.iter().all(|finding| finding.holds)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { configuration, states, depth, took_ms, properties } = self;
        writeln!(f, "{configuration}: {states} states, depth {depth}, {took_ms} ms")?;
        for Finding { property, holds, counterexample, .. } in properties {
            writeln!(f, "    {} {property}", if *holds { "holds " } else { "BROKEN" })?;
            for (number, step) in (1..).zip(counterexample) {
                writeln!(f, "        {number}. {step}")?;
            }
        }
        Ok(())
    }
}

//! The protocol: applications, services, the administrator, and the kernel between them.
//!
//! Here a hook runs, and a policy comes into force, in one step; [`banks`](crate::banks) looks into
//! these.

mod adoption;
mod judge;
mod kernel;
mod legs;
mod properties;
mod records;
mod state;
mod words;

use carnet_core::transaction::{AFTERWARDS, Step, UNTIL_IN_FORCE};
use stateright::{Model, Property};

use self::legs::end;
pub use self::{
    judge::Fault,
    properties::Witness,
    state::{Carried, FLOWS, Flow, Place, Refusal, State},
};
use crate::scene::{DESTINATIONS, Generation, HANDLES, NAMES, PROCESSES, Scene};

/// What takes part, and how freely it may behave.
#[derive(Clone, Debug, Default)]
pub struct Protocol {
    /// The policies: each scene is explored.
    pub scenes: Vec<Scene>,
    /// The destinations of the flows: one for each flow.
    pub flows: Vec<u8>,
    /// Whether processes die and start again, at any time.
    pub deaths: bool,
    /// Whether the processes of removed services start again.
    pub restarts: bool,
    /// Processes that may go on without the record.
    pub forgetful: Vec<usize>,
    /// Processes that may lie.
    pub liars: Vec<usize>,
    /// How many of their lies may be believed.
    pub lies: u8,
    /// Whether an hour may pass.
    pub hours: bool,
    /// How often the key may be rotated.
    pub rotations: u8,
    /// Whether the programs may be replaced.
    pub upgrade: bool,
    /// What this configuration has to reach: else it would show nothing.
    pub witnesses: Vec<Witness>,
    /// What is broken on purpose.
    pub defect: Option<Defect>,
}

/// A part of the model itself that can be broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Defect {
    /// `carnet upgrade` draws new keys.
    UpgradeDrawsKey,
    /// The option takes records without verifying them.
    NothingVerified,
    /// Nobody tells the guard of legs that are delivered.
    GuardUntold,
    /// The connect hook leaves its hop out of the record.
    HopLeftOut,
    /// The connect hook does not see the record that was set.
    RecordUnseen,
    /// A leg goes to the first process that listens, whoever's listener that is.
    AnyListener,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The application connects.
    Begin(usize),
    /// The service that holds the flow sets a record on the socket with which it goes on.
    Set(usize, Given),
    /// The service that holds the flow connects onwards.
    Onwards(usize),
    /// The unmodified service that holds the flow connects onwards; the kernel takes the connection for
    /// one of this flow, or of none that it knows.
    Adopt(usize, Option<usize>),
    /// It connects to the other destination instead.
    Elsewhere(usize),
    /// A process dies.
    Die(usize),
    /// A process starts, or starts again, and registers its listener.
    Listen(usize),
    /// The administrator's command takes the next step of a transaction.
    Transact,
    /// The programs are replaced.
    Upgrade,
    /// The key is rotated.
    Rotate,
    /// An hour passes.
    Hour,
}

/// What a service gives for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// The record of the flow, for which it asks now.
    Own,
    /// The record of the flow, for which it asked when it got it.
    Kept,
    /// The record that the service which holds this other flow got.
    Stolen(usize),
    /// The record that it got itself with this other flow.
    Replayed(usize),
    /// One that says that all had the flow, itself last.
    Forged,
    /// The record that it got with the flow, and a hop more.
    Extended,
    /// The record that it got with the flow, with the first hop's handle exchanged.
    Altered,
    /// The record that it got with the flow, of another instance.
    Foreign,
}

/// The steps of a transaction that make a difference where hooks run in one step.
const STEPS: [Step; UNTIL_IN_FORCE.len() + AFTERWARDS.len()] = {
    let mut steps = [Step::Wait; UNTIL_IN_FORCE.len() + AFTERWARDS.len()];
    let mut at = 0;
    while at < steps.len() {
        let before = UNTIL_IN_FORCE.len();
        steps[at] = if at < before { UNTIL_IN_FORCE[at] } else { AFTERWARDS[at - before] };
        at += 1;
    }
    steps
};

impl Protocol {
    fn scene(&self, state: &State) -> &Scene {
        &self.scenes[usize::from(state.scene)]
    }

    fn generation(&self, state: &State) -> &Generation {
        &self.scene(state).generations[usize::from(state.generation)]
    }

    /// The service in whose cgroup the process is, as `SVC_CGROUPS` says: while a transaction is under
    /// way, what both policies say, the new one first.
    fn service_of(&self, state: &State, process: usize) -> Option<usize> {
        let generations = &self.scene(state).generations;
        let done = &STEPS[..usize::from(state.step)];
        let own = self.generation(state).handle_of(process);
        let neighbour = if !done.contains(&Step::Prepare) || done.contains(&Step::Tidy) {
            None
        } else if done.contains(&Step::Flip) {
            return own.or(generations[usize::from(state.generation) - 1].handle_of(process));
        } else {
            generations[usize::from(state.generation) + 1].handle_of(process)
        };
        neighbour.or(own)
    }

    /// The service that the process is, if its program knows nothing of records.
    fn unmodified(&self, state: &State, process: usize) -> Option<usize> {
        let own = self.service_of(state, process)?;
        let service = self.generation(state).service(own)?;
        service.unmodified.then_some(own)
    }

    /// Whether the guard has anything to do.
    fn guards(&self) -> bool {
        !self.forgetful.is_empty() || !self.liars.is_empty()
    }

    fn may_listen(&self, state: &State, process: usize) -> bool {
        let registered = usize::from(state.listens[process]);
        let own = self.service_of(state, process);
        let anew = own.is_some_and(|handle| registered != handle + 1);
        let starts = if registered == 0 { self.deaths || self.restarts } else { self.restarts };
        starts && anew
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let scenes = (0..).zip(&self.scenes);
        let beginning = |(number, scene): (u16, &Scene)| {
            let mut flows = [Flow::default(); FLOWS];
            for (flow, destination) in flows.iter_mut().zip(&self.flows) {
                flow.destination = *destination;
            }
            for flow in &mut flows[self.flows.len()..] {
                flow.place = Place::Broken;
            }
            let first = &scene.generations[0];
            let mut listens = [0; PROCESSES];
            for service in &first.services {
                listens[service.process] = service.handle as u8 + 1;
            }
            State {
                scene: number,
                generation: 0,
                step: 0,
                listens,
                guard: [[0; DESTINATIONS]; HANDLES],
                flows,
                hour: 0,
                key: 0,
                rotations: 0,
                rotated: 0,
                upgraded: false,
                lies: 0,
                faults: 0,
            }
        };
        scenes.map(beginning).collect()
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.faults != 0 {
            return;
        }
        for (number, flow) in state.flows.iter().enumerate() {
            match flow.place {
                Place::Waiting => actions.push(Action::Begin(number)),
                Place::Held(process) => {
                    let process = usize::from(process);
                    if let Some(own) = self.unmodified(state, process) {
                        let candidates = self.candidates(state, own, flow.destination);
                        let likeliest = candidates.into_iter().map(Some).chain([None]);
                        actions.extend(likeliest.map(|other| Action::Adopt(number, other)));
                        if state.lies < self.lies {
                            actions.push(Action::Elsewhere(number));
                        }
                        continue;
                    }
                    if flow.set.is_some() {
                        actions.push(Action::Onwards(number));
                    } else {
                        actions.push(Action::Set(number, Given::Own));
                        let Carried { hour, key, .. } = flow.record;
                        if (hour, key) != (state.hour, state.key) {
                            actions.push(Action::Set(number, Given::Kept));
                        }
                        if self.forgetful.contains(&process) {
                            actions.push(Action::Onwards(number));
                        }
                        if self.liars.contains(&process) {
                            self.lies_of(state, number, actions);
                        }
                    }
                    if self.liars.contains(&process) && state.lies < self.lies {
                        actions.push(Action::Elsewhere(number));
                    }
                }
                Place::Arrived(_) | Place::Refused(_) | Place::Broken => {}
            }
        }
        for process in 0..PROCESSES {
            if self.deaths && state.listens[process] != 0 {
                actions.push(Action::Die(process));
            }
            if self.may_listen(state, process) {
                actions.push(Action::Listen(process));
            }
        }
        let last = self.scene(state).generations.len() - 1;
        if state.step != 0 || usize::from(state.generation) < last {
            actions.push(Action::Transact);
        }
        if self.upgrade && !state.upgraded {
            actions.push(Action::Upgrade);
        }
        if state.rotations < self.rotations {
            actions.push(Action::Rotate);
        }
        if self.hours && state.hour == 0 {
            actions.push(Action::Hour);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let holder = |number: usize| match last.flows[number].place {
            Place::Held(process) => Some(usize::from(process)),
            _ => None,
        };
        match action {
            Action::Begin(number) => self.connect(&mut state, number, None),
            Action::Set(number, given) => {
                let faults = state.faults;
                let done = self.set(&mut state, number, holder(number)?, given);
                if done.is_none() && state.faults == faults {
                    return None;
                }
            }
            Action::Onwards(number) => {
                let service = self.service_of(last, holder(number)?);
                state.flows[number].forgot |= state.flows[number].set.is_none();
                self.connect(&mut state, number, service);
            }
            Action::Adopt(number, likeliest) => {
                let service = self.unmodified(last, holder(number)?)?;
                self.adopt(&mut state, number, service, likeliest);
                self.connect(&mut state, number, Some(service));
            }
            Action::Elsewhere(number) => {
                let process = holder(number)?;
                let service = self.service_of(last, process);
                state.lies += 1;
                let flow = &mut state.flows[number];
                (flow.lied, flow.legs) = (true, 0);
                flow.destination ^= 1;
                if let Some(own) = self.unmodified(last, process) {
                    let destination = state.flows[number].destination;
                    let likeliest = self.candidates(&state, own, destination).first().copied();
                    self.adopt(&mut state, number, own, likeliest);
                }
                self.connect(&mut state, number, service);
            }
            Action::Die(process) => {
                state.listens[process] = 0;
                let scene = self.scene(last);
                for number in 0..self.flows.len() {
                    let seen = state.flows[number].seen;
                    let through = |handle: usize| seen & 1 << handle != 0;
                    let dies = (0..scene.handles.len())
                        .any(|handle| through(handle) && scene.process_of(handle) == process);
                    if dies {
                        end(&mut state, number, Place::Broken);
                    }
                }
            }
            Action::Listen(process) => {
                state.listens[process] = self.service_of(last, process)? as u8 + 1;
            }
            Action::Transact => {
                // Where hooks run in one step there is nothing to wait for, and no bank.
                let taken = usize::from(state.step);
                let skipped =
                    STEPS[taken..].iter().take_while(|s| matches!(s, Step::Wait | Step::Write));
                let at = taken + skipped.count();
                state.step = at as u8 + 1;
                match STEPS.get(at)? {
                    Step::Flip => state.generation += 1,
                    Step::Tidy => state.step = 0,
                    Step::Prepare | Step::Wait | Step::Write => {}
                }
            }
            Action::Upgrade => {
                state.upgraded = true;
                if self.defect == Some(Defect::UpgradeDrawsKey) {
                    state.key += 2;
                }
            }
            Action::Rotate => {
                state.key += 1;
                state.rotations += 1;
                state.rotated = state.hour;
            }
            Action::Hour => state.hour += 1,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::of(self)
    }
}

/// A name for a service's handle: that of its process, with a number if the process had others before.
pub(crate) fn name_of(scene: &Scene, handle: usize) -> String {
    let process = scene.process_of(handle);
    let earlier = (0..handle).filter(|other| scene.process_of(*other) == process).count();
    let name = NAMES[process];
    if earlier == 0 { name.to_owned() } else { format!("{name}#{}", earlier + 1) }
}

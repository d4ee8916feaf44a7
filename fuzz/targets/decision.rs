//! Arbitrary policies, connections and records: the compiled policy's decision is that of the naive
//! model, and every flow ends.
#![no_main]

use arbitrary::Unstructured;
use carnet_core::{
    chain::Chain,
    classify::{Listeners, Unobserved, classify},
    compile::compile,
    explain::{HostConnection, Process, explain},
    object::{CgroupCondition, CgroupRef, ExecutableCondition, NetnsCondition, NewService, Policy},
    record::{FileId, Hop, Record},
};
use carnet_reference::{
    Answer, History, answer,
    generate::{self, Choices, USERS, World},
};
use libfuzzer_sys::fuzz_target;
use zerocopy::FromZeros as _;

struct Bytes<'a>(Unstructured<'a>);

impl Choices for Bytes<'_> {
    fn below(&mut self, end: u64) -> u64 {
        self.0.int_in_range(0..=end - 1).unwrap_or(0)
    }
}

struct Host {
    alive: u64,
    forgotten_legs: u32,
}

impl Listeners for Host {
    fn is_live(&mut self, handle: u64) -> bool {
        self.alive & 1 << (handle % 64) != 0
    }

    fn forgotten_legs(&mut self) -> u32 {
        self.forgotten_legs
    }
}

fn file(inode: u64) -> FileId {
    FileId { device: 1, inode }
}

fn world() -> World {
    let executable = |inode| ExecutableCondition { path: "/p".into(), file: file(inode) };
    World {
        cgroups: (0..3_u32)
            .map(|level| CgroupCondition { path: "/c".into(), id: 10 + u64::from(level), level })
            .collect(),
        executables: vec![executable(1), executable(2)],
        namespaces: vec![NetnsCondition { name: "n".into(), cookie: 1 }],
    }
}

fn policy(choices: &mut Bytes<'_>) -> Policy {
    let mut policy = Policy::new();
    policy.add_provider("p", "").expect("a provider");
    for n in 0..choices.below(7) {
        let cgroup = CgroupRef { path: format!("/{n}"), id: 100 + n };
        policy.add_service(NewService::new(format!("s{n}"), "p", cgroup)).expect("a service");
    }
    generate::replace(&mut policy, &world(), 24, choices).expect("a policy");
    policy
}

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Bytes(Unstructured::new(bytes));
    let policy = policy(&mut choices);
    let compiled = compile(&policy, 1).expect("a policy of this size compiles");
    while !choices.0.is_empty() {
        let (protocol, to) = generate::destination(&policy, &mut choices);
        let connection = HostConnection {
            protocol: protocol.0,
            destination: to.into(),
            process: Process {
                user: Some(*choices.pick(&USERS)),
                cgroups: Some((0..choices.below(4)).map(|_| 9 + choices.below(4)).collect()),
                executable: Some(file(1 + choices.below(2))),
                network_namespace: Some(1 + choices.below(2)),
            },
            original_executable: Some(file(1 + choices.below(2))),
        };
        let count = policy.services().len() as u64;
        let handles: Vec<u64> = (0..choices.below(6))
            .map(|_| match choices.below(count + 1) {
                n if n < count => policy.services()[n as usize].handle,
                _ => 1 << 40,
            })
            .collect();
        let legs = handles.len() as u32 + choices.below(18) as u32;
        let mut host =
            Host { alive: choices.below(u64::MAX), forgotten_legs: choices.below(18) as u32 };
        let mut record = Record::new_zeroed();
        for handle in &handles {
            record.push(Hop { handle: *handle, filter: 0 });
        }
        record.legs = legs;
        let chain = Chain::of_record(&compiled, &record);
        let alive = host.alive;
        let live = move |handle: u64| alive & 1 << (handle % 64) != 0;
        let history = History { handles, legs, forgotten_legs: host.forgotten_legs };
        let expected = answer(&policy, &connection, &history, &live);
        let decision = classify(&compiled, &connection, &chain, &mut host, &mut Unobserved);
        assert_eq!(Answer::of_core(&policy, &decision), expected);

        let process = connection.process.clone();
        let all =
            explain(&policy, &compiled, &connection, &|h, _| live(h), &|_, _| process.clone());
        assert!(all.len() <= policy.services().len() + 1, "a flow does not end");
    }
});

//! `prove`: explores the configurations of the model and says what came of each. `cargo xtask prove`
//! runs it, also over broken copies of carnet-core.

use std::{
    process::ExitCode,
    sync::{Mutex, mpsc},
    thread,
};

use anyhow::{Context as _, Result};
use carnet_model::{
    banks,
    configurations::{CONFIGURATIONS, Configuration, Defects},
    explore::{Report, Until},
    protocol,
};
use clap::Parser;

/// Explore the model of Carnet's protocol.
#[derive(Parser)]
struct Options {
    /// Only these configurations
    #[arg(long = "configuration", value_name = "NAME")]
    configurations: Vec<String>,
    /// Only those of a short run
    #[arg(long)]
    quick: bool,
    /// End a configuration when a property is broken
    #[arg(long)]
    until_a_fault: bool,
    /// Break the model of the protocol
    #[arg(long)]
    defect: Option<protocol::Defect>,
    /// Break the model of transactions and hooks
    #[arg(long)]
    bank_defect: Option<banks::Defect>,
    /// List the configurations, as JSON, one in a line
    #[arg(long)]
    list: bool,
    /// Print reports as JSON, one in a line
    #[arg(long)]
    json: bool,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let wanted = options.wanted()?;
    if options.list {
        for Configuration { name, about, quick, .. } in wanted {
            println!("{}", serde_json::json!({ "name": name, "about": about, "quick": quick }));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let until = if options.until_a_fault { Until::AFault } else { Until::TheEnd };
    let defects = Defects { protocol: options.defect, banks: options.bank_defect };
    let mut all_hold = true;
    for report in explore_all(wanted, until, defects) {
        all_hold &= report.holds();
        if options.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            println!("{report}");
        }
    }
    Ok(if all_hold { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Options {
    fn wanted(&self) -> Result<Vec<&'static Configuration>> {
        let quick = |configuration: &&Configuration| configuration.quick || !self.quick;
        if self.configurations.is_empty() {
            return Ok(CONFIGURATIONS.iter().filter(quick).collect());
        }
        let find = |name: &String| {
            let found = CONFIGURATIONS.iter().find(|configuration| configuration.name == name);
            found.with_context(|| format!("there is no configuration {name:?}: see --list"))
        };
        self.configurations.iter().map(find).collect()
    }
}

/// Explores configurations, one on each processor; gives their reports as they are done.
fn explore_all(
    wanted: Vec<&'static Configuration>,
    until: Until,
    defects: Defects,
) -> mpsc::IntoIter<Report> {
    let (reports, done) = mpsc::channel();
    thread::spawn(move || {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let next = Mutex::new(wanted.into_iter());
        thread::scope(|scope| {
            for _ in 0..processors {
                let reports = reports.clone();
                let take = || next.lock().ok()?.next();
                scope.spawn(move || {
                    while let Some(configuration) = take() {
                        // Nobody hears it if the program is about to end.
                        let _ended = reports.send(configuration.explore(until, defects));
                    }
                });
            }
        });
    });
    done.into_iter()
}

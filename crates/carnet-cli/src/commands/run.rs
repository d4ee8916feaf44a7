//! `carnet run`: a command with its connections redirected.

use std::{
    env,
    ffi::OsString,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use carnet_core::object::{
    Conditions, FilterAction, NewFilter, NewService, PolicyError, Protocol, Weight,
};
use carnet_engine::{Engine, Error, Location, UpOptions, cgroup};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    child::{self, Runner},
    failure::Failure,
    lookup::{self, Cgroup},
    session::Session,
};

/// Run a command with its connections redirected
///
/// The command runs in a cgroup of its own, which is removed afterwards with whatever still runs in
/// it. If the instance is up, its filters decide. If it is not, an instance is brought up for the
/// command alone, with `carnet inspect` as its only service; what that sees is printed on the
/// standard error. The command's exit status is passed on.
///
/// Where the instance refuses unseen sockets (`carnet up --refuse-unseen`), the command and all that
/// it starts are without CAP_NET_RAW, so that they cannot make packet sockets either.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Make the command's cgroup below this one; by default below the one that is redirected, or
    /// below that of this process
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,

    /// The command
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Prints nothing of its own but the log of the instance that is brought up for the command.
pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let location = session.location()?;
    let parent = arguments.cgroup.as_deref().map(Cgroup::find).transpose()?;
    let command = child::command(&arguments.command);
    let mut runner = Runner::new()?;
    match Engine::open(&location) {
        Ok(engine) => within(&engine, parent, command, &mut runner),
        Err(Error::NotUp { .. }) => alone(parent, command, &mut runner, session),
        Err(error) => Err(error.into()),
    }
}

/// Runs the command below the scope of an instance.
fn within(
    engine: &Engine,
    parent: Option<Cgroup>,
    mut command: Command,
    runner: &mut Runner,
) -> Result<u8, Failure> {
    let scope = engine.scope();
    let parent = parent.map_or_else(|| scope.to_owned(), |cgroup| cgroup.directory);
    if !parent.starts_with(scope) {
        return Err(Failure::new(format_args!(
            "{} lies outside {}, and the connections there are not redirected",
            parent.display(),
            scope.display()
        ))
        .with_hint("leave --cgroup out, or name a cgroup below that"));
    }
    let own = cgroup::Cgroup::create_under(&parent, &unique_name())?;
    if engine.refuses_unseen()? {
        cgroup::without_raw_sockets(&mut command);
    }
    let result =
        own.enter_command(&mut command).map_err(Failure::from).and_then(|()| runner.run(command));
    own.remove()?;
    result
}

/// Runs the command with an instance for it alone.
fn alone(
    parent: Option<Cgroup>,
    mut command: Command,
    runner: &mut Runner,
    session: &Session<'_>,
) -> Result<u8, Failure> {
    let parent = match parent {
        Some(parent) => parent,
        None => lookup::Pid(process::id()).cgroup()?,
    };
    let name = unique_name();
    let scope = cgroup::Cgroup::create_under(&parent.directory, &name)?;
    let result = (|| {
        let for_service = cgroup::Cgroup::create_under(scope.path(), "inspect")?;
        let for_command = cgroup::Cgroup::create_under(scope.path(), "command")?;
        let location = Location::new(session.global.bpffs.clone(), &name)?;
        let mut engine = Engine::up(&location, &UpOptions::new(scope.path()))?;
        let result = (|| {
            set_up(&mut engine, for_service.path(), for_command.path(), session)?;
            let inspector = Inspector::start(&for_service, session.global.json)?;
            for_command.enter_command(&mut command)?;
            let result = runner.run(command);
            // What it left running goes before the service through which it is connected.
            let gone = for_command.remove();
            inspector.end()?;
            gone?;
            result
        })();
        engine.down()?;
        result
    })();
    scope.remove()?;
    result
}

/// What the instance of a single command is told: everything that the command connects goes to the
/// one service.
fn set_up(
    engine: &mut Engine,
    service: &Path,
    command: &Path,
    session: &Session<'_>,
) -> Result<(), Failure> {
    let service = Cgroup::find(service)?.reference();
    let command = Cgroup::find(command)?.condition();
    session.change(engine, |policy| -> Result<(), PolicyError> {
        policy.add_provider("carnet", "")?;
        policy.add_sublayer("run", "carnet", 0)?;
        policy.add_service(NewService::new("inspect", "carnet", service))?;
        policy.add_filter(NewFilter {
            name: Some("command".into()),
            sublayer: "run".into(),
            weight: Weight::Auto,
            conditions: Conditions {
                protocols: vec![Protocol::TCP],
                cgroups: vec![command],
                ..Conditions::default()
            },
            action: FilterAction::Redirect { service: "inspect".into(), context: None },
        })?;
        Ok(())
    })
}

/// A name for a cgroup or an instance of this process.
fn unique_name() -> String {
    format!("run-{}", process::id())
}

/// `carnet inspect` as a child process.
struct Inspector {
    child: Child,
    /// Passes on what it has to say.
    errors: thread::JoinHandle<()>,
    /// It has been told to end: what it says of that is nothing that anybody has to know.
    ending: Arc<AtomicBool>,
}

impl Inspector {
    /// Starts it, and waits until its listeners are registered.
    fn start(cgroup: &cgroup::Cgroup, json: bool) -> Result<Self, Failure> {
        let failed = |error| Failure::because("starting carnet inspect", &error);
        let program = env::current_exe().map_err(failed)?;
        let mut command = Command::new(program);
        command
            .args(["inspect", "--name", "inspect", "--drain-timeout", "5s"])
            .args(json.then_some("--json"))
            .stdin(Stdio::null())
            // The standard output is the command's.
            .stdout(io::stderr())
            .stderr(Stdio::piped())
            // What is typed to end the command must not end it first.
            .process_group(0);
        cgroup.enter_command(&mut command)?;
        let mut child = command.spawn().map_err(failed)?;
        let mut errors = BufReader::new(child.stderr.take().expect("it is a pipe")).lines();
        let mut said = Vec::new();
        for line in errors.by_ref().map_while(Result::ok) {
            if line.starts_with(READY) {
                let ending = Arc::new(AtomicBool::new(false));
                let silent = Arc::clone(&ending);
                let errors = thread::spawn(move || {
                    for line in errors.map_while(Result::ok) {
                        if !silent.load(Ordering::Relaxed) {
                            // If nobody reads it, all goes on.
                            let _ = writeln!(io::stderr(), "{line}");
                        }
                    }
                });
                return Ok(Self { child, errors, ending });
            }
            said.push(line);
        }
        let _ = child.wait();
        Err(Failure::new(format_args!("carnet inspect did not start: {}", said.join("; "))))
    }

    /// Has it end the connections that are left, write its log and end.
    fn end(mut self) -> Result<(), Failure> {
        let failed = |error| Failure::because("ending carnet inspect", &error);
        self.ending.store(true, Ordering::Relaxed);
        kill_process(Pid::from_child(&self.child), Signal::TERM)
            .map_err(|errno| failed(errno.into()))?;
        self.child.wait().map_err(failed)?;
        // It only copies, and what it copied from has ended.
        let _ = self.errors.join();
        Ok(())
    }
}

/// What `carnet inspect` says when it is ready.
const READY: &str = "carnet-inspect: ready ";

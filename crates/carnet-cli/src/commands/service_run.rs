//! `carnet service run`: a command as a redirect service, in a cgroup of its own.

use std::{ffi::OsString, path::Path};

use carnet_core::object::{NewService, Policy, PolicyError, Service, Trust};
use carnet_engine::{Engine, cgroup};

use super::{
    service::{OnFailure, parse_trust},
    service_kind::Kind,
};
use crate::{
    arguments::new_name,
    child::{self, Runner},
    failure::Failure,
    lookup::Cgroup,
    session::Session,
};

/// Run a service: a command in a cgroup of its own
///
/// The cgroup is made below the one that is redirected, and removed when the command ends; whatever
/// the command leaves running in it is killed. The service stays in the policy: while it does not
/// run, its failure policy decides. The command's exit status is passed on.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The service's name; it is added if there is none of that name
    #[arg(value_parser = new_name)]
    name: String,

    /// The provider that brings it, if it is to be added
    #[arg(long, value_name = "NAME|ID")]
    provider: Option<String>,

    /// What happens to its connections while it has no live listener
    #[arg(long, value_enum, value_name = "WHAT")]
    on_failure: Option<OnFailure>,

    /// Do not look at flows that only these services have redirected: none, all, or names
    #[arg(long, value_name = "none|all|NAME,…", value_parser = parse_trust)]
    trust: Option<Trust>,

    #[command(flatten)]
    kind: Kind,

    /// Keep the cgroup, and what still runs in it, when the command has ended
    #[arg(long)]
    keep: bool,

    /// The command
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Prints nothing of its own: the output is the command's.
pub(super) fn run(arguments: Arguments, session: &mut Session<'_>) -> Result<u8, Failure> {
    let mut engine = session.engine()?;
    let mut runner = Runner::new()?;
    let mut command = child::command(&arguments.command);
    let policy = engine.policy()?;
    if let Some(service) = policy.service(&arguments.name).ok()
        && runs(service)?
    {
        return Err(Failure::new(format_args!("service {} is running already", service.name))
            .with_hint(format_args!("its processes: cgroup {}", service.cgroup.path)));
    }
    let name = format!("carnet-{}-{}", session.global.instance, arguments.name);
    let own = cgroup::Cgroup::create_under(engine.scope(), &name)?;
    let result = add(&arguments, own.path(), &mut engine, session)
        .and_then(|()| Ok(own.enter_command(&mut command)?))
        .and_then(|()| runner.run(command));
    if !arguments.keep || result.is_err() {
        own.remove()?;
    }
    result
}

/// Whether processes run in the service's cgroup.
pub(super) fn runs(service: &Service) -> Result<bool, Failure> {
    match Cgroup::find(Path::new(&service.cgroup.path)) {
        Ok(cgroup) if cgroup.id == service.cgroup.id => cgroup.populated(),
        _ => Ok(false),
    }
}

/// Adds the service, or gives the one that there is its new cgroup.
fn add(
    arguments: &Arguments,
    directory: &Path,
    engine: &mut Engine,
    session: &Session<'_>,
) -> Result<(), Failure> {
    let cgroup = Cgroup::find(directory)?.reference();
    let Arguments { name, provider, on_failure, trust, kind, .. } = arguments;
    let known = engine.policy()?.service(name).is_ok();
    if !known && provider.is_none() {
        return Err(Failure::usage(format_args!(
            "there is no service {name}, and to add it takes its provider"
        ))
        .with_hint(format_args!("carnet service run {name} --provider PROVIDER -- …")));
    }
    session.change(engine, |policy: &mut Policy| -> Result<(), PolicyError> {
        if known {
            policy.set_cgroup(name, cgroup)?;
            if let Some(on_failure) = on_failure {
                policy.set_on_failure(name, (*on_failure).into())?;
            }
            if let Some(trust) = trust {
                policy.set_trust(name, trust.clone())?;
            }
            kind.apply(policy, name)?;
        } else {
            let new = NewService::new(name, provider.as_deref().unwrap_or_default(), cgroup);
            policy.add_service(kind.of(NewService {
                on_failure: on_failure.unwrap_or_default().into(),
                trust: trust.clone().unwrap_or_default(),
                ..new
            }))?;
        }
        Ok(())
    })
}

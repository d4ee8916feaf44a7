//! Why a command failed, and what to do about it.

use std::{error::Error, fmt::Display, io};

use carnet_core::object::PolicyError;

/// Why a command failed: one line, and often a second one that says what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

/// What a failure means for the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It could not be done.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// The output leads nowhere any more: not worth a word.
    NobodyReads,
}

impl Failure {
    pub(crate) fn new(message: impl Display) -> Self {
        Self { kind: Kind::Failed, message: message.to_string(), hint: None }
    }

    /// A failure that is a mistake in the command line.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self { kind: Kind::Usage, ..Self::new(message) }
    }

    /// A failure with an error behind it.
    pub(crate) fn because(message: impl Display, error: &dyn Error) -> Self {
        Self::new(format_args!("{message}: {}", chain(error)))
    }

    pub(crate) fn with_hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// An error with what is behind it, on one line; what a message already says is not said twice.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut behind = error.source();
    while let Some(error) = behind {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        behind = error.source();
    }
    text.replace('\n', " ")
}

/// The errors of printing; all others are wrapped where they come from.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => {
                Self { kind: Kind::NobodyReads, ..Self::new("nobody reads the output") }
            }
            _ => Self::because("printing", &error),
        }
    }
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Self {
        Self::new(chain(&error))
    }
}

impl From<carnet_engine::Error> for Failure {
    fn from(error: carnet_engine::Error) -> Self {
        let failure = Self::new(chain(&error));
        match error {
            carnet_engine::Error::BadInstance { .. } => Self { kind: Kind::Usage, ..failure },
            _ => failure,
        }
    }
}

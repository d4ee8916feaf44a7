//! How a process does what a test tells it: orders come in at standard input, which is a socket, and
//! answers go out there, each a line of JSON.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
};

use serde::{Serialize, de::DeserializeOwned};

/// Carries out orders until there are no more.
///
/// # Errors
/// What keeps it from reading an order or from answering.
pub(crate) fn obey<O: DeserializeOwned, A: Serialize>(
    mut carry_out: impl FnMut(O) -> A,
) -> io::Result<()> {
    let strings = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut answers = strings.try_clone()?;
    for line in BufReader::new(strings).lines() {
        let mut line = serde_json::to_string(&carry_out(serde_json::from_str(&line?)?))?;
        line.push('\n');
        answers.write_all(line.as_bytes())?;
    }
    Ok(())
}

//! Where commands print to, and how: streams, colour, JSON.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write},
};

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::arguments::Color;

/// Style of what is good.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// Style of what deserves a look.
pub(crate) const WARNING: Style = AnsiColor::Yellow.on_default();
/// Style of what is wrong.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
/// Style of headings.
pub(crate) const HEADING: Style = Style::new().bold();
/// Style of what matters less.
pub(crate) const FAINT: Style = Style::new().dimmed();

type Stream = Box<dyn Write + Send>;

/// A standard output and a standard error, and what is known of them.
pub struct Console {
    out: Output,
    error: Output,
}

struct Output {
    stream: AutoStream<Stream>,
    /// What `--color auto` means here.
    automatic: ColorChoice,
}

impl Output {
    fn new(stream: Stream, automatic: ColorChoice) -> Self {
        Self { stream: AutoStream::new(stream, automatic), automatic }
    }

    fn set(&mut self, choice: ColorChoice) {
        let stream: Stream = Box::new(io::sink());
        let old = std::mem::replace(&mut self.stream, AutoStream::never(stream));
        self.stream = AutoStream::new(old.into_inner(), choice);
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console")
            .field("out_color", &self.out.automatic)
            .field("error_color", &self.error.automatic)
            .finish_non_exhaustive()
    }
}

impl Console {
    /// The process's own standard output and standard error. They are coloured, unless the user
    /// says otherwise, where they are terminals and the environment (`NO_COLOR`, `TERM`, …) allows.
    pub fn standard() -> Self {
        Self {
            out: Output::new(Box::new(io::stdout()), AutoStream::choice(&io::stdout())),
            error: Output::new(Box::new(io::stderr()), AutoStream::choice(&io::stderr())),
        }
    }

    /// A console over these two streams. `terminal` says whether they stand for a terminal, so
    /// that output is in colour unless the user says otherwise.
    pub fn new(
        out: impl Write + Send + 'static,
        error: impl Write + Send + 'static,
        terminal: bool,
    ) -> Self {
        let automatic = if terminal { ColorChoice::AlwaysAnsi } else { ColorChoice::Never };
        Self {
            out: Output::new(Box::new(out), automatic),
            error: Output::new(Box::new(error), automatic),
        }
    }

    pub(crate) fn set_color(&mut self, color: Color) {
        for output in [&mut self.out, &mut self.error] {
            output.set(match color {
                Color::Auto => output.automatic,
                Color::Always => ColorChoice::AlwaysAnsi,
                Color::Never => ColorChoice::Never,
            });
        }
    }

    pub(crate) fn write_out(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.out.stream.write_fmt(text)?;
        self.out.stream.flush()
    }

    pub(crate) fn write_error(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.error.stream.write_fmt(text)?;
        self.error.stream.flush()
    }

    /// Prints a line on the standard output.
    pub(crate) fn line(&mut self, text: impl fmt::Display) -> io::Result<()> {
        self.write_out(format_args!("{text}\n"))
    }

    /// Prints a line for the operator on the standard error.
    pub(crate) fn note(&mut self, text: impl fmt::Display) -> io::Result<()> {
        self.write_error(format_args!("{text}\n"))
    }

    /// Prints why a command failed.
    pub(crate) fn error(&mut self, text: impl fmt::Display) -> io::Result<()> {
        self.note(format_args!("{} {text}", styled(BAD, "error:")))
    }

    /// Prints what to do about it.
    pub(crate) fn hint(&mut self, text: impl fmt::Display) -> io::Result<()> {
        self.note(format_args!("{} {text}", styled(GOOD, "hint:")))
    }

    /// Prints a JSON document.
    pub(crate) fn json(&mut self, document: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string_pretty(document)?;
        self.line(text)
    }

    /// Prints a JSON document on one line.
    pub(crate) fn json_line(&mut self, document: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(document)?;
        self.line(text)
    }
}

/// Whether a terminal sends its signals to this process by itself.
pub(crate) fn in_foreground() -> bool {
    let stdin = io::stdin();
    stdin.is_terminal()
        && rustix::termios::tcgetpgrp(&stdin).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// `text` in `style`.
pub(crate) fn styled(style: Style, text: impl fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// `text` from outside (a path, a command's name) as it may be shown: a control character in it
/// must not speak to the terminal.
pub(crate) fn plain(text: impl fmt::Display) -> String {
    let text = text.to_string();
    if text.chars().any(char::is_control) { text.escape_debug().to_string() } else { text }
}

/// `text` on lines of at most [`WIDTH`] characters, all but the first of them indented. A word that
/// is longer stays whole.
pub(crate) fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut at = indent;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if at > indent && at + 1 + length > WIDTH {
            lines += &format!("\n{:indent$}", "");
            at = indent;
        } else if at > indent {
            lines.push(' ');
            at += 1;
        }
        lines += word;
        at += length;
    }
    lines
}

/// How wide text is that people read.
const WIDTH: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_with_its_indent() {
        assert_eq!(wrapped("a few  words", 4), "a few words");
        let (long, short) = ("x".repeat(75), "y".repeat(5));
        assert_eq!(wrapped(&format!("{long} {short}"), 4), format!("{long}\n    {short}"));
        assert_eq!(wrapped(&format!("{short} {long} a"), 0), format!("{short}\n{long} a"));
    }

    #[test]
    fn text_from_outside_does_not_speak_to_the_terminal() {
        assert_eq!(plain("caf\u{e9} \u{1b}[31m\n"), "caf\u{e9} \\u{1b}[31m\\n");
    }
}

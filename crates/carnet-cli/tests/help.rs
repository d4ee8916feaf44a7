//! The help texts: complete, and as `tests/help.txt` has them. After a change that is meant, write
//! that file anew: `CARNET_UPDATE_HELP=1 cargo test -p carnet-cli --test help`.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    env, fs,
    io::{self, Write},
    path::Path,
    sync::{Arc, Mutex},
};

use carnet_cli::{Console, definition, run};

/// A stream that can be read afterwards.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a command line in this process: its status, standard output and standard error.
fn carnet(arguments: &[&str], terminal: bool) -> (u8, String, String) {
    let (out, error) = (Written::default(), Written::default());
    let mut console = Console::new(out.clone(), error.clone(), terminal);
    let words = ["carnet"].iter().chain(arguments).map(Into::into);
    let status = run(words, &mut console);
    let text = |written: Written| String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    (status, text(out), text(error))
}

/// Calls `visit` with each command and the words that lead to it.
fn each(
    command: &clap::Command,
    path: &[String],
    visit: &mut impl FnMut(&clap::Command, &[String]),
) {
    visit(command, path);
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        each(sub, &[path, &[sub.get_name().to_owned()]].concat(), visit);
    }
}

fn built() -> clap::Command {
    let mut definition = definition().term_width(80);
    definition.build();
    definition
}

#[test]
fn help_texts_are_as_they_were_agreed() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    let mut text = String::new();
    each(&built(), &[], &mut |command, path| {
        // Once is enough for what all commands have.
        let hidden = !path.is_empty();
        let mut command = command.clone().mut_args(|argument| {
            let global = argument.is_global_set();
            argument.hide(hidden && global)
        });
        text += &format!("{:=<80}\n{}\n", "", command.render_long_help());
    });
    if env::var_os("CARNET_UPDATE_HELP").is_some() {
        fs::write(&file, &text).unwrap();
    }
    let agreed = fs::read_to_string(&file).unwrap();
    for (line, (now, then)) in (1..).zip(text.lines().zip(agreed.lines())) {
        assert_eq!(now, then, "line {line}; if this is meant: CARNET_UPDATE_HELP=1");
    }
    assert_eq!(text.len(), agreed.len(), "if this is meant: CARNET_UPDATE_HELP=1");
}

#[test]
fn help_texts_are_complete() {
    each(&built(), &[], &mut |command, path| {
        assert!(command.get_about().is_some(), "{path:?} is not described");
        for argument in command.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{path:?}: {} is not described",
                argument.get_id()
            );
        }
        for line in command.clone().render_help().to_string().lines() {
            // Usage lines are not wrapped.
            let fits = line.chars().count() <= 80 || line.starts_with("Usage:");
            assert!(fits, "{path:?}: too wide: {line}");
        }
    });
}

#[test]
fn every_command_has_help() {
    let mut commands = Vec::new();
    each(&built(), &[], &mut |_, path| commands.push(path.to_vec()));
    assert!(commands.len() > 20);
    for path in commands {
        let words: Vec<_> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let (status, out, error) = carnet(&words, false);
        assert_eq!((status, error.as_str()), (0, ""), "{path:?}");
        assert!(out.contains(&["Usage: carnet", &path.join(" ")].join(" ").trim_end().to_owned()));
    }
}

#[test]
fn colours_are_for_terminals() {
    for (terminal, option, colored) in [
        (false, "auto", false),
        (true, "auto", true),
        (false, "always", true),
        (true, "never", false),
    ] {
        let (status, _, error) = carnet(&["--color", option, "--instance", "", "status"], terminal);
        assert_eq!(status, 2);
        assert_eq!(error.contains('\u{1b}'), colored, "terminal {terminal}, {option}");
    }
}

#[test]
fn the_version_is_said() {
    let (status, out, _) = carnet(&["--version"], false);
    assert_eq!((status, out), (0, format!("carnet {}\n", env!("CARGO_PKG_VERSION"))));
}

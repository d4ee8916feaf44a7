//! The matrix as a table, with a legend, and what is wrong in words.

use std::{
    collections::BTreeMap,
    env,
    fmt::{self, Write as _},
    io::{self, IsTerminal as _},
};

use crate::{
    cells::{Bind, Cell, Destination, Family, Place, Protocol, User, Will},
    judge::{Check, Outcome},
};

/// How many faults of each kind are told in words.
const TOLD: usize = 12;
/// The width of what stands before the cells.
const HEAD: usize = 45;

pub(crate) struct Table<'a> {
    pub(crate) cells: &'a [Cell],
    pub(crate) results: &'a [Outcome],
}

/// A cell's sign.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    Well,
    Bad,
    /// It cannot be: the number of the reason.
    Impossible(usize),
}

impl Sign {
    fn show(self, colour: bool) -> String {
        let (code, sign) = match self {
            Self::Well => ("32", "✓".to_owned()),
            Self::Bad => ("31;1", "✗".to_owned()),
            Self::Impossible(reason) => ("2", char::from(b'a' + reason as u8).to_string()),
        };
        if colour { format!("\x1b[{code}m{sign}\x1b[0m") } else { sign }
    }
}

impl Table<'_> {
    /// The cells with their outcomes.
    fn all(&self) -> impl Iterator<Item = (&Cell, &Outcome)> {
        self.cells.iter().zip(self.results)
    }

    /// The reasons why cells cannot be, each once.
    fn reasons(&self) -> Vec<&'static str> {
        let mut reasons: Vec<_> = self.cells.iter().filter_map(Cell::impossible).collect();
        reasons.dedup();
        reasons
    }

    /// The sign for all cells that are meant, as far as one will of the policy goes.
    fn sign(&self, will: Will, meant: impl Fn(&Cell) -> bool) -> Sign {
        let mut sign = None;
        for (cell, outcome) in self.all().filter(|(cell, _)| meant(cell)) {
            match cell.impossible() {
                Some(reason) => {
                    let number = self.reasons().iter().position(|other| *other == reason);
                    sign = sign.or(number.map(Sign::Impossible));
                }
                None if outcome.is_well_of(will) => sign = Some(Sign::Well),
                None => return Sign::Bad,
            }
        }
        sign.unwrap_or(Sign::Bad)
    }

    fn redirects(&self, f: &mut String, colour: bool) -> fmt::Result {
        writeln!(f, "redirected, and onwards to the destination\n")?;
        write!(f, "{:HEAD$}", "destination")?;
        for destination in Destination::ALL {
            write!(f, "  {destination:14}")?;
        }
        write!(f, "\n{:HEAD$}", "service on")?;
        for _ in Destination::ALL {
            for place in Place::ALL {
                write!(f, "  {:6}", if place == Place::Loopback { "loop" } else { "local" })?;
            }
        }
        write!(f, "\n{:16}  {:15}  {:10}", "socket", "protocol", "bound to")?;
        for _ in 0..Destination::ALL.len() * Place::ALL.len() {
            write!(f, "  r  u  ")?;
        }
        writeln!(f)?;
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                for bind in Bind::ALL {
                    let bound =
                        if bind == Bind::Nothing { "nothing".into() } else { bind.to_string() };
                    write!(f, "{family:16}  {protocol:15}  {bound:10}")?;
                    for destination in Destination::ALL {
                        for place in Place::ALL {
                            let signs = User::ALL.map(|user| {
                                let meant =
                                    Cell { family, protocol, bind, destination, place, user };
                                self.sign(Will::Redirect, |cell| *cell == meant).show(colour)
                            });
                            write!(f, "  {}  {}  ", signs[0], signs[1])?;
                        }
                    }
                    writeln!(f)?;
                }
            }
        }
        Ok(())
    }

    fn authorisation(&self, f: &mut String, colour: bool) -> fmt::Result {
        writeln!(
            f,
            "\nauthorised: what the policy blocks, whatever the socket is bound to,\n\
                     wherever the service is and whoever asks\n"
        )?;
        write!(f, "{:35}", "destination")?;
        for destination in Destination::ALL {
            write!(f, "  {destination:15}")?;
        }
        write!(f, "\n{:16}  {:17}", "socket", "protocol")?;
        for _ in Destination::ALL {
            write!(f, "  asked  onward  ")?;
        }
        writeln!(f)?;
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                write!(f, "{family:16}  {protocol:17}")?;
                for destination in Destination::ALL {
                    let signs = [Will::BlockAsked, Will::BlockOnward].map(|will| {
                        let meant = |cell: &Cell| {
                            (cell.family, cell.protocol, cell.destination)
                                == (family, protocol, destination)
                        };
                        self.sign(will, meant).show(colour)
                    });
                    write!(f, "  {}      {}       ", signs[0], signs[1])?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }

    fn faults(&self, f: &mut String) -> fmt::Result {
        let mut by_check: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (cell, outcome) in self.all() {
            for (_, check, fault) in &outcome.faults {
                by_check.entry(check.to_string()).or_default().push(format!("{cell}: {fault}"));
            }
        }
        for (check, faults) in by_check {
            writeln!(f, "\nnot as it should be: {check}, {} times", faults.len())?;
            for fault in faults.iter().take(TOLD) {
                writeln!(f, "  {fault}")?;
            }
            if faults.len() > TOLD {
                writeln!(f, "  and {} more", faults.len() - TOLD)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.write(&mut text)?;
        text.lines().try_for_each(|line| writeln!(f, "{}", line.trim_end()))
    }
}

impl Table<'_> {
    fn write(&self, f: &mut String) -> fmt::Result {
        let colour = io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none();
        writeln!(f)?;
        self.redirects(f, colour)?;
        self.authorisation(f, colour)?;
        writeln!(
            f,
            "\n{} as it should be   {} not, see below   r root   u an ordinary user",
            Sign::Well.show(colour),
            Sign::Bad.show(colour)
        )?;
        for (number, reason) in self.reasons().into_iter().enumerate() {
            writeln!(f, "{} cannot be: {reason}", Sign::Impossible(number).show(colour))?;
        }
        let checks = [
            Check::Redirected,
            Check::Context,
            Check::Records,
            Check::OriginalDestination,
            Check::Application,
            Check::PeerName,
            Check::ReplySource,
            Check::Arrival,
        ];
        let names: Vec<String> = checks.iter().map(ToString::to_string).collect();
        writeln!(f, "each cell: {}", names.join(", "))?;
        writeln!(
            f,
            "asked: a block of what the application asks for is EPERM, and nothing arrives"
        )?;
        writeln!(
            f,
            "onward: a block of the service's leg to the destination is EPERM for the service, and \
             nothing arrives"
        )?;
        let possible = self.cells.iter().filter(|cell| cell.impossible().is_none()).count();
        let well = self.all().filter(|(cell, one)| cell.impossible().is_none() && one.is_well());
        let flows: usize = self.results.iter().map(|outcome| outcome.flows).sum();
        writeln!(
            f,
            "\n{} of {possible} cells are as they should be; {} cannot be; {flows} flows",
            well.count(),
            self.cells.len() - possible
        )?;
        self.faults(f)
    }
}

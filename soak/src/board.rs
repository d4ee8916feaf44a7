//! The board: what is demanded of flows at this moment, in a file that all processes of a soak read.
//!
//! Only the orchestrator writes it, and always so that it never demands too much: a service is required
//! from after the change that makes it so until before the one that ends that; it is allowed from before
//! to after. A flow that finds the same demand at its begin and at its arrival had it all the time.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context as _, Result};

/// The services, in the order in which they get flows.
pub(crate) const SERVICES: [&str; 3] = ["alpha", "beta", "gamma"];
/// The place of the filter that refuses what goes to [`REFUSED_PORT`](crate::site::REFUSED_PORT).
pub(crate) const REFUSAL: usize = SERVICES.len();
/// Number of entries.
pub(crate) const ENTRIES: usize = SERVICES.len() + 1;
/// Bytes of all entries.
pub(crate) const BYTES: usize = ENTRIES * 8;
/// Where the board tells what happens: after the entries, which are there twice.
const HAPPENING: u64 = 2 * BYTES as u64;

const REQUIRED: u64 = 1;
const ALLOWED: u64 = 2;
const UP: u64 = 4;
/// Where the counters are in an entry, each of as many bits as [`COUNTED`] has.
const CHANGES: u32 = 4;
const LIVES: u32 = 24;
const ADDITIONS: u32 = 44;
const COUNTED: u64 = (1 << 20) - 1;

/// What holds for a service, or for the refusing filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry(u64);

impl Entry {
    /// Every flow that begins now passes the service; or is refused.
    pub(crate) fn required(self) -> bool {
        self.0 & REQUIRED != 0
    }

    /// Flows that begin now may pass the service; or be refused.
    pub(crate) fn allowed(self) -> bool {
        self.0 & ALLOWED != 0
    }

    /// The service is well: no flow of it is lost.
    pub(crate) fn up(self) -> bool {
        self.0 & UP != 0
    }

    /// Whether what is demanded has been the same from `self` to `later`.
    pub(crate) fn steady(self, later: Self) -> bool {
        let same = REQUIRED | ALLOWED | COUNTED << CHANGES;
        self.0 & same == later.0 & same
    }

    /// Whether the service was well from `self` to `later`.
    pub(crate) fn lived(self, later: Self) -> bool {
        self.up() && later.up() && self.counted(LIVES) == later.counted(LIVES)
    }

    /// How often the service was added to the policy between `self` and `later`. Each time it is another
    /// one, of the same name: it may get flows that the one before has had.
    pub(crate) fn added(self, later: Self) -> u64 {
        later.counted(ADDITIONS).wrapping_sub(self.counted(ADDITIONS)) & COUNTED
    }

    /// With another demand.
    pub(crate) fn demanding(self, required: bool, allowed: bool) -> Self {
        let kept = self.0 & !(REQUIRED | ALLOWED);
        let required = if required { REQUIRED } else { 0 };
        let allowed = if allowed { ALLOWED } else { 0 };
        Self(kept | required | allowed).counting(CHANGES)
    }

    /// As the service is killed, or has come back.
    pub(crate) fn living(self, up: bool) -> Self {
        let up = if up { UP } else { 0 };
        Self((self.0 & !UP) | up).counting(LIVES)
    }

    /// As the service is about to be added.
    pub(crate) fn adding(self) -> Self {
        self.counting(ADDITIONS)
    }

    fn counted(self, at: u32) -> u64 {
        self.0 >> at & COUNTED
    }

    /// With one more counted; after the last number comes 0.
    fn counting(self, at: u32) -> Self {
        let counted = (self.counted(at) + 1) & COUNTED;
        Self(self.0 & !(COUNTED << at) | counted << at)
    }
}

/// All entries at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand(pub(crate) [Entry; ENTRIES]);

impl Demand {
    /// As it is sent along with a flow.
    pub(crate) fn to_bytes(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        for (place, Entry(entry)) in bytes.chunks_exact_mut(8).zip(self.0) {
            place.copy_from_slice(&entry.to_le_bytes());
        }
        bytes
    }

    /// The same read back.
    pub(crate) fn from_bytes(bytes: &[u8; BYTES]) -> Self {
        let mut entries = [Entry::default(); ENTRIES];
        for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *entry = Entry(u64::from_le_bytes(*bytes));
        }
        Self(entries)
    }
}

/// The board. The one who made it removes the file.
#[derive(Debug)]
pub(crate) struct Board {
    file: File,
    made: Option<PathBuf>,
}

impl Board {
    /// Makes a board on which nothing is demanded.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(crate) fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("carnet-soak-{}.board", process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("making {}", path.display()))?;
        let board = Self { file, made: Some(path) };
        board.write(Demand::default())?;
        board.tell(u64::MAX)?;
        Ok(board)
    }

    /// Opens one to read it.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { file, made: None })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.made.as_deref().unwrap_or(Path::new(""))
    }

    /// What is demanded now. Each entry is written twice, so that a reader notices when it reads half of
    /// one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn read(&self) -> Result<Demand> {
        loop {
            let mut both = [[0; BYTES]; 2];
            self.file.read_exact_at(both.as_flattened_mut(), 0).context("reading the board")?;
            if both[0] == both[1] {
                return Ok(Demand::from_bytes(&both[0]));
            }
        }
    }

    /// Changes an entry.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn update(&self, place: usize, change: impl FnOnce(Entry) -> Entry) -> Result<()> {
        let mut demand = self.read()?;
        let entry = demand.0.get_mut(place).context("no such entry")?;
        *entry = change(*entry);
        self.write(demand)
    }

    /// Tells what happens from now on, as a number.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn tell(&self, happening: u64) -> Result<()> {
        let written = self.file.write_all_at(&happening.to_le_bytes(), HAPPENING);
        written.context("writing the board")
    }

    /// What happens now.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn happening(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, HAPPENING).context("reading the board")?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, demand: Demand) -> Result<()> {
        let bytes = demand.to_bytes();
        self.file.write_all_at(&[bytes, bytes].concat(), 0).context("writing the board")
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            // It is in the directory for temporary files, and small.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_tells_what_happened_between_two_looks() {
        let first = Entry::default().demanding(true, true).living(true);
        assert!(first.required() && first.allowed() && first.up());
        assert!(first.steady(first) && first.lived(first));
        let killed = first.living(false);
        assert!(first.steady(killed) && !first.lived(killed));
        assert!(!first.lived(killed.living(true)));
        let removed = first.demanding(false, true).demanding(false, false);
        assert!(!first.steady(removed) && first.lived(removed));
        let back = removed.demanding(false, true).demanding(true, true);
        assert!(back.required() && !first.steady(back));
        assert_eq!(
            (first.added(back), first.added(removed.adding().demanding(true, true))),
            (0, 1)
        );
    }

    #[test]
    fn counters_do_not_run_over_into_each_other() {
        let mut entry = Entry::default();
        for _ in 0..COUNTED {
            entry = entry.living(true);
        }
        let (last, next) = (entry, entry.living(true));
        assert_eq!((last.counted(LIVES), next.counted(LIVES)), (COUNTED, 0));
        assert_eq!((next.added(next), next.counted(CHANGES)), (0, 0));
    }

    #[test]
    fn a_board_is_read_as_it_was_written() {
        let board = Board::create().unwrap();
        board.update(1, |entry| entry.demanding(true, true)).unwrap();
        let seen = Board::open(board.path()).unwrap().read().unwrap();
        assert!(seen.0[1].required() && !seen.0[0].required());
        assert_eq!(Demand::from_bytes(&seen.to_bytes()), seen);
        board.tell(3).unwrap();
        assert_eq!(Board::open(board.path()).unwrap().happening().unwrap(), 3);
        assert_eq!(board.read().unwrap(), seen);
    }
}

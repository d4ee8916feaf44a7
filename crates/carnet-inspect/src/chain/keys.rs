//! The keys under which hosts seal records for each other.
//!
//! A file has one key a line, 32 random bytes in hexadecimal. The first one seals, all of them open: to
//! replace a key, give every host the new one as its second line, then make it the first one
//! everywhere, then take the old one away.

use ring::{digest, hmac};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};

/// Length of a key in bytes.
pub const KEY: usize = 32;
/// Length of the name of a key in bytes.
pub const ID: usize = 8;
/// Most bytes that a file of keys can have: some hundred keys.
const LONGEST: u64 = 1 << 14;

/// The name by which a sealed record says under which key it is; it gives nothing of the key away.
pub type Id = [u8; ID];

/// Keys; the first one seals.
pub struct Keys {
    first: Key,
    others: Vec<Key>,
}

struct Key {
    id: Id,
    key: hmac::Key,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read.
    #[error("reading the chain keys {path:?}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is another file in its place, and this user may not read that one.
    #[error(
        "the chain keys {path:?} are in another file now, which is not for the user that this program \
         has become: write new keys into the file that there is, or start the program again"
    )]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// It is a directory, a device, a pipe.
    #[error("the chain keys {path:?} are no regular file: name one")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Others than its owner may read or write it.
    #[error(
        "the chain keys {path:?} have mode {mode:04o}: nobody but their owner may have any access \
         (chmod 600)"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line is no key.
    #[error(
        "line {line} of the chain keys {path:?} is no key: write 32 random bytes as 64 hexadecimal \
         digits, as `head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \\n'` makes them"
    )]
    BadKey {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
    },
    /// There is not one in it.
    #[error("there is no key in the chain keys {path:?}: write one on a line of its own")]
    NoKey {
        /// The file.
        path: PathBuf,
    },
}

impl Keys {
    /// Opens a file of keys.
    pub(crate) fn open(path: &Path) -> Result<File, KeyError> {
        File::open(path).map_err(|source| KeyError::Unreadable { path: path.to_owned(), source })
    }

    /// Reads an open file of keys as it is now. Empty lines, and those that begin with `#`, count for nothing.
    pub(crate) fn read_from(path: &Path, mut file: &File) -> Result<Self, KeyError> {
        let unreadable = |source| KeyError::Unreadable { path: path.to_owned(), source };
        // Of what was opened, not of what has the name by now.
        let about = file.metadata().map_err(unreadable)?;
        if !about.is_file() {
            return Err(KeyError::NotAFile { path: path.to_owned() });
        }
        if let Some(mode) = mode_for_others(&about) {
            return Err(KeyError::Open { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        file.rewind().map_err(unreadable)?;
        file.take(LONGEST).read_to_string(&mut text).map_err(unreadable)?;
        Self::read(path, &text)
    }

    fn read(path: &Path, text: &str) -> Result<Self, KeyError> {
        let lines = (1..).zip(text.lines().map(str::trim));
        let mut keys = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).map(
            |(line, text)| {
                let bad = || KeyError::BadKey { path: path.to_owned(), line };
                bytes_of(text).map(|bytes| Key::new(&bytes)).ok_or_else(bad)
            },
        );
        let first = keys.next().ok_or_else(|| KeyError::NoKey { path: path.to_owned() })??;
        Ok(Self { first, others: keys.collect::<Result<_, _>>()? })
    }

    /// One key.
    pub fn one(bytes: &[u8; KEY]) -> Self {
        Self { first: Key::new(bytes), others: Vec::new() }
    }

    /// How many there are.
    pub fn number(&self) -> usize {
        1 + self.others.len()
    }

    /// The name of the key that seals.
    pub fn id(&self) -> Id {
        self.first.id
    }

    /// The seal of a message: HMAC-SHA256 under the first key.
    pub(crate) fn seal(&self, message: &[u8]) -> hmac::Tag {
        hmac::sign(&self.first.key, message)
    }

    /// Whether this is the seal of a message under the key of this name, compared in constant time; `None` if
    /// there is no such key.
    pub(crate) fn is_sealed(&self, id: Id, message: &[u8], seal: &[u8]) -> Option<bool> {
        let mut all = std::iter::once(&self.first).chain(&self.others);
        let Key { key, .. } = all.find(|key| key.id == id)?;
        Some(hmac::verify(key, message, seal).is_ok())
    }
}

impl Key {
    fn new(bytes: &[u8; KEY]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        let mut naming = digest::Context::new(&digest::SHA256);
        naming.update(b"carnet chain key\0");
        naming.update(bytes);
        let mut id = Id::default();
        id.iter_mut().zip(naming.finish().as_ref()).for_each(|(to, from)| *to = *from);
        Self { id, key }
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.number())
    }
}

/// The bytes that 64 hexadecimal digits write.
fn bytes_of(text: &str) -> Option<[u8; KEY]> {
    let digits = text.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; KEY];
    if digits.len() != 2 * KEY {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let &[high, low] = pair else { return None };
        *byte = u8::try_from(digit(high)? << 4 | digit(low)?).ok()?;
    }
    Some(bytes)
}

/// The mode of a file to which others than its owner have any access.
#[cfg(unix)]
fn mode_for_others(about: &std::fs::Metadata) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = about.permissions().mode() & 0o7777;
    (mode & 0o077 != 0).then_some(mode)
}

/// What modes say there, lists say here, and nobody reads keys.
#[cfg(not(unix))]
fn mode_for_others(_about: &std::fs::Metadata) -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";
    const TWO: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    fn read(text: &str) -> Result<Keys, KeyError> {
        Keys::read(Path::new("keys"), text)
    }

    #[test]
    fn the_first_key_seals_and_all_of_them_open() {
        let both = read(&format!("# new\n{ONE}\n\n  {TWO}\n")).unwrap();
        let [one, two] = [ONE, TWO].map(|text| read(text).unwrap());
        assert_eq!(both.id(), one.id());
        for sealing in [&one, &two] {
            let seal = sealing.seal(b"message");
            assert_eq!(both.is_sealed(sealing.id(), b"message", seal.as_ref()), Some(true));
            assert_eq!(both.is_sealed(sealing.id(), b"massage", seal.as_ref()), Some(false));
            assert_eq!(both.is_sealed(sealing.id(), b"message", &seal.as_ref()[1..]), Some(false));
        }
        let seal = two.seal(b"message");
        assert_eq!(one.is_sealed(two.id(), b"message", seal.as_ref()), None);
        assert_eq!(both.is_sealed(one.id(), b"message", seal.as_ref()), Some(false));
        assert!(!format!("{both:?}").contains("0001"));
    }

    #[test]
    fn what_is_no_key_is_refused_by_its_line() {
        for (text, line) in [
            (&ONE[1..], 1),
            (&format!("{ONE}\n{TWO}0")[..], 2),
            (&format!("{ONE}\n\n{}", TWO.replacen('f', "g", 1)), 3),
            ("secret", 1),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("line {line} of the chain keys")), "{message}");
            assert!(!message.contains("secret"), "{message}");
        }
        for text in ["", "\n# nothing\n"] {
            assert!(matches!(read(text), Err(KeyError::NoKey { .. })), "{text:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_may_read_is_refused() {
        use std::fs;
        use std::os::unix::fs::PermissionsExt as _;
        let path = std::env::temp_dir().join(format!("carnet-chain-keys-{}", std::process::id()));
        fs::write(&path, ONE).unwrap();
        let load = |path: &Path| Keys::read_from(path, &Keys::open(path)?);
        let with_mode = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            load(&path)
        };
        for mode in [0o640, 0o604, 0o620, 0o601] {
            let message = with_mode(mode).unwrap_err().to_string();
            assert!(message.contains(&format!("mode {mode:04o}")), "{message}");
        }
        assert!(with_mode(0o600).is_ok() && with_mode(0o400).is_ok());
        fs::remove_file(&path).unwrap();
        assert!(matches!(load(&path), Err(KeyError::Unreadable { .. })));
        assert!(matches!(load(&std::env::temp_dir()), Err(KeyError::NotAFile { .. })));
    }
}

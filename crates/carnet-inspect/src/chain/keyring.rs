//! The keys in force, which change with their file while the program runs.

use super::keys::{KeyError, Keys};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// Keys, and the file that they are of.
///
/// The file stays open: a program that has become another user may not open it again, but reads what its owner
/// has written into it since.
#[derive(Debug)]
pub struct Keyring {
    keys: RwLock<Arc<Keys>>,
    source: Option<Source>,
}

#[derive(Debug)]
struct Source {
    path: PathBuf,
    file: File,
}

impl Keyring {
    /// Reads a file of keys.
    ///
    /// # Errors
    /// [`KeyError`], if it cannot be read, is not as it should be, or is not for its owner alone.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let file = Keys::open(path)?;
        let keys = Keys::read_from(path, &file)?;
        let source = Some(Source { path: path.to_owned(), file });
        Ok(Self { keys: RwLock::new(Arc::new(keys)), source })
    }

    /// The keys in force.
    pub fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The file, if there is one.
    pub fn path(&self) -> Option<&Path> {
        self.source.as_ref().map(|source| source.path.as_path())
    }

    /// Reads the file again; gives how many keys there are. Those of no file stay as they are.
    ///
    /// # Errors
    /// [`KeyError`], [`KeyError::Replaced`] among them; the keys that there were stay in force.
    pub fn reload(&self) -> Result<usize, KeyError> {
        let keys = match &self.source {
            Some(source) => Arc::new(source.read()?),
            None => self.keys(),
        };
        let number = keys.number();
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(number)
    }
}

impl From<Keys> for Keyring {
    /// Keys that are of no file.
    fn from(keys: Keys) -> Self {
        Self { keys: RwLock::new(Arc::new(keys)), source: None }
    }
}

impl Source {
    fn read(&self) -> Result<Keys, KeyError> {
        let Self { path, file } = self;
        match Keys::open(path) {
            Ok(file) => Keys::read_from(path, &file),
            Err(KeyError::Unreadable { source, .. })
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                if is_removed(file) {
                    return Err(KeyError::Replaced { path: path.clone() });
                }
                Keys::read_from(path, file)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether an open file has lost its name: another one has been put in its place.
#[cfg(unix)]
fn is_removed(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    file.metadata().is_ok_and(|about| about.nlink() == 0)
}

/// No program becomes another user there: who may not open the file has lost it.
#[cfg(not(unix))]
fn is_removed(_file: &File) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A file of keys of its own, for its owner alone.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("carnet-{name}-{}", std::process::id()));
            Self(path)
        }

        fn write(&self, keys: &[u8]) {
            let line = |byte: &u8| format!("{byte:02x}").repeat(32) + "\n";
            fs::write(&self.0, keys.iter().map(line).collect::<String>()).unwrap();
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt as _;
                fs::set_permissions(&self.0, fs::Permissions::from_mode(0o600)).unwrap();
            }
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _gone = fs::remove_file(&self.0);
        }
    }

    fn id(byte: u8) -> super::super::keys::Id {
        Keys::one(&[byte; 32]).id()
    }

    #[test]
    fn keys_are_read_again_and_bad_ones_change_nothing() {
        let file = Scratch::new("keyring");
        file.write(&[1]);
        let ring = Keyring::open(&file.0).unwrap();
        assert_eq!(ring.keys().id(), id(1));
        file.write(&[2, 1]);
        assert_eq!(ring.keys().id(), id(1));
        assert_eq!(ring.reload().unwrap(), 2);
        assert_eq!(ring.keys().id(), id(2));

        fs::write(&file.0, "no key").unwrap();
        assert!(matches!(ring.reload(), Err(KeyError::BadKey { line: 1, .. })));
        fs::remove_file(&file.0).unwrap();
        let error = ring.reload().unwrap_err();
        // On Windows what is removed stays for as long as it is open.
        assert!(cfg!(windows) || matches!(error, KeyError::Unreadable { .. }), "{error}");
        assert_eq!((ring.keys().id(), ring.keys().number()), (id(2), 2));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_open_is_read_again_from_its_beginning() {
        let file = Scratch::new("keyring-open");
        file.write(&[1]);
        let source = Source { path: file.0.clone(), file: Keys::open(&file.0).unwrap() };
        for keys in [&[1][..], &[2, 1], &[3]] {
            file.write(keys);
            let read = Keys::read_from(&source.path, &source.file).unwrap();
            assert_eq!((read.id(), read.number()), (id(keys[0]), keys.len()));
        }
        assert!(!is_removed(&source.file));
        fs::remove_file(&file.0).unwrap();
        assert!(is_removed(&source.file));
    }

    #[test]
    fn keys_of_no_file_stay() {
        let ring = Keyring::from(Keys::one(&[7; 32]));
        assert_eq!((ring.reload().unwrap(), ring.path()), (1, None));
        assert_eq!(ring.keys().id(), id(7));
    }
}

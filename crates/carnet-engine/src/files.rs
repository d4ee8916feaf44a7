//! Which file an executable is, as the kernel engine sees it.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use carnet_core::record::FileId;
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::{Engine, Error, object, sys};

/// What the program `carnet_files` writes for each open file.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct OpenFile {
    descriptor: u64,
    file: FileId,
}

impl Engine {
    /// Identifies an executable as the connect hooks will see it in a process that runs it.
    ///
    /// On some file systems `stat(2)` shows another device than the kernel itself uses, so the
    /// kernel is asked: an iterator over this thread's open files tells what each of them is.
    ///
    /// # Errors
    /// [`Error::NotExecutable`] if it is not a regular file; [`Error::Io`] if it cannot be opened;
    /// [`Error::NotUp`], [`Error::UnknownLayout`]; [`Error::NotIdentified`].
    pub fn resolve_executable(&self, path: &Path) -> Result<FileId, Error> {
        let failed = || Error::io("open", path.display());
        // Opened as a place only: neither the right to read it is needed nor is anything started.
        let file =
            openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed())?;
        let metadata = fstat(&file).map_err(Error::io("examine", path.display()))?;
        if FileType::from_raw_mode(metadata.st_mode) != FileType::RegularFile {
            return Err(Error::NotExecutable { path: path.to_owned() });
        }
        let descriptor = file.as_raw_fd();
        let bytes = self.reading(|_| {
            let failed = || Error::io("list", "the open files of this thread");
            let program = self.program_path(object::FILES);
            let program = sys::open_pin(&program)
                .map_err(Error::io("open the program", program.display()))?;
            let target = sys::IteratorTarget::own_thread();
            let mut list = File::from(sys::iterate(program.as_fd(), &target).map_err(failed())?);
            let mut bytes = Vec::new();
            list.read_to_end(&mut bytes).map_err(failed())?;
            Ok(bytes)
        })?;
        bytes
            .chunks_exact(size_of::<OpenFile>())
            .filter_map(|bytes| OpenFile::read_from_bytes(bytes).ok())
            .find(|open| i128::from(open.descriptor) == i128::from(descriptor))
            .map(|open| open.file)
            .filter(|file| file.inode != 0)
            .ok_or_else(|| Error::NotIdentified { path: path.to_owned() })
    }
}

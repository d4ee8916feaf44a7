//! Whether a program needs anything of the system that it runs on.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use object::elf::{DT_NEEDED, FileHeader64, PT_INTERP};
use object::read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _};
use object::{Endianness, elf};

use super::cannot;

/// Fails unless the program needs neither a dynamic linker nor a shared library.
pub(super) fn check_static(program: &Path) -> Result<()> {
    let bytes = fs::read(program).with_context(|| cannot("read", program))?;
    match needed(&bytes).with_context(|| cannot("understand", program))? {
        None => Ok(()),
        Some(what) => bail!("{} is not static: it needs {what}", program.display()),
    }
}

/// What the program needs, if it needs anything.
fn needed(bytes: &[u8]) -> Result<Option<&'static str>> {
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, bytes)? {
        if segment.p_type(endian) == PT_INTERP {
            return Ok(Some("a dynamic linker"));
        }
        let entries = segment.dynamic(endian, bytes)?.unwrap_or_default();
        if entries.iter().any(|entry| is_needed(entry, endian)) {
            return Ok(Some("a shared library"));
        }
    }
    Ok(None)
}

fn is_needed(entry: &elf::Dyn64<Endianness>, endian: Endianness) -> bool {
    entry.tag32(endian).map(i64::from) == Some(DT_NEEDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_this_machine_is_not_static() {
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(needed(&own).unwrap(), Some("a dynamic linker"));
        assert!(needed(b"no program").is_err());
    }
}

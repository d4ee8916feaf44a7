//! Reading `/proc/self/mounts`.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt as _, path::PathBuf};

use crate::Error;

const MOUNTS: &str = "/proc/self/mounts";

/// Where file systems of a type are mounted, in the order in which they were.
pub(crate) fn mount_points(file_system: &str) -> Result<Vec<PathBuf>, Error> {
    let table = fs::read(MOUNTS).map_err(Error::io("read", MOUNTS))?;
    Ok(points_of(&table, file_system.as_bytes()))
}

/// Each line is: device, mount point, type, options, and two numbers.
pub(crate) fn points_of(table: &[u8], file_system: &[u8]) -> Vec<PathBuf> {
    let mut points = Vec::new();
    for line in table.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ').skip(1);
        if let (Some(point), Some(kind)) = (fields.next(), fields.next())
            && kind == file_system
        {
            points.push(PathBuf::from(OsString::from_vec(decode(point))));
        }
    }
    points
}

/// Undoes the kernel's encoding of blanks and backslashes: a backslash and three octal digits.
fn decode(field: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(field.len());
    let mut at = 0;
    while let Some(&byte) = field.get(at) {
        let code = (byte == b'\\').then(|| field.get(at + 1..at + 4)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 4;
            }
            None => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_a_type_are_found_with_blanks_in_their_paths() {
        let table = b"cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            bpf /sys/fs/bpf bpf rw 0 0\n\
            none /mnt/a\\040b\\134\\9 bpf rw 0 0\n\
            short\n";
        assert_eq!(points_of(table, b"bpf"), ["/sys/fs/bpf", "/mnt/a b\\\\9"].map(PathBuf::from));
        assert_eq!(points_of(table, b"cgroup"), [PathBuf::from("/sys/fs/cgroup/cpu")]);
        assert!(points_of(table, b"cgroup2").is_empty());
    }
}

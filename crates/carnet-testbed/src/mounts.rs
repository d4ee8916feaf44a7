//! Reading `/proc/self/mounts`.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt, path::PathBuf};

use crate::Error;

const MOUNTS: &str = "/proc/self/mounts";

/// The mount points of a file system type, in mount order.
pub(crate) fn mount_points(file_system: &str) -> Result<Vec<PathBuf>, Error> {
    let table = fs::read(MOUNTS).map_err(Error::io("read", MOUNTS))?;
    Ok(points_in(&table, file_system))
}

fn points_in(table: &[u8], file_system: &str) -> Vec<PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let point = fields.nth(1)?;
            (fields.next()? == file_system.as_bytes()).then(|| unescape(point))
        })
        .collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits (`\040`).
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_every_mount_of_the_type_and_decodes_its_path() {
        let table = b"tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
            cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
            none /mnt/with\\040space\\134 cgroup2 rw 0 0\n";
        assert_eq!(
            points_in(table, "cgroup2"),
            [PathBuf::from("/sys/fs/cgroup/unified"), PathBuf::from("/mnt/with space\\")]
        );
        assert_eq!(points_in(table, "bpf"), [] as [PathBuf; 0]);
        assert_eq!(points_in(b"short line\n\n", "bpf"), [] as [PathBuf; 0]);
    }
}

//! The running kernel: its version, and where the fields that the programs read lie in its
//! structures.
//!
//! C programs have relocations for that, Rust has none. The loader looks the offsets up in the
//! kernel's own type information (BTF) and writes them into the programs' constants, which the
//! verifier knows.

use std::{collections::BTreeSet, fs, path::Path};

use rustix::system::uname;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Error,
    btf::{Btf, Structure},
};

/// Where the kernel shows its types.
pub(crate) const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";
/// The oldest kernel on which Carnet works: the first whose iterators go over one thread's files.
pub(crate) const OLDEST: (u32, u32) = (6, 1);

/// Byte offsets in the kernel's structures, as the programs' `OFFSETS` has them.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes)]
#[repr(transparent)]
pub(crate) struct Offsets([u32; FIELDS.len()]);

/// The fields that the programs read, in the order of `Offsets` in `carnet-bpf`'s `process.rs`: a
/// structure, and the way through its members.
const FIELDS: [(&str, &[&str]); 42] = [
    ("task_struct", &["flags"]),
    ("task_struct", &["group_leader"]),
    ("task_struct", &["start_boottime"]),
    ("task_struct", &["mm"]),
    ("task_struct", &["cred"]),
    ("mm_struct", &["exe_file"]),
    ("file", &["f_path", "mnt"]),
    ("file", &["f_path", "dentry"]),
    ("file", &["f_inode"]),
    ("inode", &["i_ino"]),
    ("inode", &["i_sb"]),
    ("super_block", &["s_dev"]),
    ("dentry", &["d_parent"]),
    ("dentry", &["d_name", "name"]),
    ("dentry", &["d_name", "len"]),
    ("mount", &["mnt"]),
    ("mount", &["mnt_parent"]),
    ("mount", &["mnt_mountpoint"]),
    ("vfsmount", &["mnt_root"]),
    ("cred", &["cap_effective"]),
    ("cred", &["user_ns"]),
    ("user_namespace", &["level"]),
    ("sock", &["__sk_common", "skc_flags"]),
    ("sock", &["sk_bpf_storage"]),
    ("sock", &["__sk_common", "skc_rcv_saddr"]),
    ("sock", &["__sk_common", "skc_v6_rcv_saddr"]),
    ("sock", &["__sk_common", "skc_state"]),
    ("sock", &["__sk_common", "skc_num"]),
    ("sock", &["__sk_common", "skc_cookie"]),
    ("sock", &["sk_socket"]),
    ("bpf_sockopt_kern", &["sk"]),
    ("tcp_sock", &["bpf_sock_ops_cb_flags"]),
    ("task_struct", &["comm"]),
    ("cred", &["uid"]),
    ("cred", &["gid"]),
    ("socket", &["file"]),
    ("tcp_sock", &["fastopen_req"]),
    ("tcp_sock", &["bytes_received"]),
    ("tcp_sock", &["bytes_sent"]),
    ("tcp_sock", &["bytes_retrans"]),
    ("tcp_sock", &["snd_nxt"]),
    ("tcp_sock", &["write_seq"]),
];

/// The types of the running kernel.
pub(crate) struct KernelTypes {
    btf: Btf,
}

impl KernelTypes {
    pub(crate) fn read() -> Result<Self, Error> {
        if !Path::new(BTF_PATH).exists() {
            return Err(Error::NoBtf { path: BTF_PATH });
        }
        let bytes = fs::read(BTF_PATH).map_err(Error::io("read", BTF_PATH))?;
        let btf = Btf::parse(bytes).map_err(|problem| Error::BadBtf { problem })?;
        Ok(Self { btf })
    }

    /// Whether the kernel has a structure of this name, and knows its members.
    pub(crate) fn has_struct(&self, name: &str) -> bool {
        self.btf.structure(name).is_some()
    }

    /// Whether the kernel has a function of this name.
    pub(crate) fn has_function(&self, name: &str) -> bool {
        self.btf.has_function(name)
    }

    pub(crate) fn offsets(&self) -> Result<Offsets, Error> {
        let mut offsets = [0; FIELDS.len()];
        for (offset, (structure, members)) in offsets.iter_mut().zip(FIELDS) {
            *offset = self.offset(structure, members)?;
        }
        Ok(Offsets(offsets))
    }

    /// Where `struct tcp_sock` says that it is a subflow of a Multipath TCP connection, in bytes. 0
    /// where the kernel has no Multipath TCP.
    pub(crate) fn mptcp_mark(&self) -> u32 {
        self.offset("tcp_sock", &["is_mptcp"]).unwrap_or(0)
    }

    fn offset(&self, structure: &'static str, members: &[&'static str]) -> Result<u32, Error> {
        let first = members.first().copied().unwrap_or_default();
        let unknown = |member| Error::UnknownKernel { structure, member };
        let mut within = self.btf.structure(structure);
        let mut bits = 0_u32;
        for member in members {
            let place = within.and_then(|within| self.member(within, member));
            let (offset, below) = place.ok_or_else(|| unknown(member))?;
            bits = offset.checked_add(bits).ok_or_else(|| unknown(member))?;
            within = below;
        }
        // No field here is a bit field: those have no address to read from.
        if bits.is_multiple_of(8) { Ok(bits / 8) } else { Err(unknown(first)) }
    }

    /// A member's offset in bits, and its own structure if it is one. Members of anonymous members
    /// count as the structure's own, as in C.
    fn member(&self, within: Structure, name: &str) -> Option<(u32, Option<Structure>)> {
        let mut places = vec![(within, 0_u32)];
        // In a damaged file a structure may be a member of itself.
        let mut known = BTreeSet::from([within]);
        while let Some((structure, offset)) = places.pop() {
            for member in self.btf.members(structure) {
                let bits = offset.checked_add(member.bits)?;
                if member.name == name.as_bytes() {
                    return Some((bits, member.structure));
                }
                if let Some(below) = member.structure.filter(|_| member.name.is_empty())
                    && known.insert(below)
                {
                    places.push((below, bits));
                }
            }
        }
        None
    }
}

/// The running kernel's version, as it writes it.
pub(crate) fn release() -> String {
    uname().release().to_string_lossy().into_owned()
}

/// Refuses kernels that are too old.
pub(crate) fn check_version() -> Result<(), Error> {
    check_release(release())
}

/// Refuses kernels whose release is too old, or is none.
fn check_release(found: String) -> Result<(), Error> {
    if is_since(&found, OLDEST) {
        Ok(())
    } else {
        Err(Error::KernelTooOld { found, needed: OLDEST })
    }
}

/// Whether a kernel of this release is this version, or newer.
pub(crate) fn is_since(release: &str, needed: (u32, u32)) -> bool {
    version(release).is_some_and(|version| version >= needed)
}

/// Major and minor number of a version such as `6.1.0-56-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    use super::{Btf, FIELDS, KernelTypes};

    /// Looks up everything that is ever looked up.
    pub(crate) fn look_up_all(btf: Btf) {
        let types = KernelTypes { btf };
        let _any = (types.has_function("f"), types.has_struct("s"), types.mptcp_mark());
        for (structure, members) in FIELDS {
            let _any = types.offset(structure, members);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_kernels_write_them() {
        assert_eq!(version("6.1.0-56-amd64"), Some((6, 1)));
        assert_eq!(version("6.18.44-fc-v445"), Some((6, 18)));
        assert_eq!(version("5.10"), Some((5, 10)));
        assert_eq!(version("7"), None);
        assert_eq!(version(""), None);
        assert!((5, 19) < OLDEST && OLDEST <= (6, 1) && OLDEST < (10, 0));
    }

    #[test]
    fn a_kernel_that_is_too_old_is_refused_in_words() {
        assert!(check_release("6.1.0-56-amd64".to_owned()).is_ok());
        let refused = check_release("5.10.0-32-amd64".to_owned()).unwrap_err().to_string();
        assert_eq!(refused, "Linux 5.10.0-32-amd64 is too old: Carnet needs 6.1 or newer");
        assert!(check_release("unknown".to_owned()).is_err());
    }

    #[test]
    fn a_damaged_file_that_leads_in_a_circle_comes_to_an_end() {
        // `struct s`, whose anonymous members are `s` itself, far behind its end.
        let names = b"\0s\0";
        let types = [1, 4 << 24 | 2, 8, 0, 1, u32::MAX, 0, 1, u32::MAX];
        let length = types.len() as u32 * 4;
        let header = [0x0001_eb9f, 24, 0, length, length, names.len() as u32];
        let words = header.iter().chain(&types).flat_map(|word| word.to_ne_bytes());
        let btf = Btf::parse(words.chain(*names).collect()).unwrap();
        let types = KernelTypes { btf };
        assert!(types.has_struct("s"));
        assert!(matches!(types.offset("s", &["m"]), Err(Error::UnknownKernel { .. })));
    }

    #[test]
    fn this_kernels_offsets_are_told_apart_and_whole() {
        let types = KernelTypes::read().unwrap();
        let offsets = types.offsets().unwrap().0;
        // Members of one structure lie at different places.
        let places: BTreeSet<_> = FIELDS
            .iter()
            .zip(offsets)
            .map(|((structure, _), offset)| (*structure, offset))
            .collect();
        assert_eq!(places.len(), FIELDS.len());
        // All but a socket's state, a byte, and port, two bytes, are words.
        assert!(offsets[..26].iter().all(|offset| offset.is_multiple_of(4)));
        let unknown = types.offset("task_struct", &["no_such_member"]);
        assert!(matches!(unknown, Err(Error::UnknownKernel { member: "no_such_member", .. })));
    }
}

//! A reader of the kernel's type information (BTF): just enough to find structures, their members
//! and functions by name.
//!
//! Written here since the crates that read BTF are under the LGPL, which programs that are linked
//! statically cannot keep, or keep the members to themselves (aya-obj). The format is the kernel's
//! `Documentation/bpf/btf.rst`: a header, descriptions of types one after the other, names.

use std::ops::Range;

const MAGIC: u32 = 0xeb9f;

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;
/// The newest kind that this reader knows the length of.
const LAST: u32 = ENUM64;

/// Bytes that every type begins with: name, kind and count, size or type.
const HEAD: usize = 12;
/// Bytes of a member: name, type, offset.
const MEMBER: usize = 12;

/// The types of a kernel.
pub(crate) struct Btf {
    bytes: Vec<u8>,
    names: Range<usize>,
    /// Where each type begins; the first has the id 1.
    types: Vec<usize>,
}

/// A structure or union, by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Structure(u32);

/// A member of a structure.
pub(crate) struct Member<'a> {
    /// Its name, empty for an anonymous one.
    pub(crate) name: &'a [u8],
    /// Where it begins, in bits from the start of the structure.
    pub(crate) bits: u32,
    /// Its structure, if it is one, through names and qualifiers but not through pointers.
    pub(crate) structure: Option<Structure>,
}

impl Btf {
    /// Reads the types from the bytes of a BTF file. The error says what is wrong with them.
    pub(crate) fn parse(bytes: Vec<u8>) -> Result<Self, &'static str> {
        const CUT: &str = "it ends too early";
        let header = |at| word(&bytes, at).ok_or(CUT);
        if header(0)? & 0xffff != MAGIC {
            return Err("it does not begin as one");
        }
        let length = header(4)? as usize;
        let section = |offset: u32, size: u32| {
            let start = length + offset as usize;
            start..start + size as usize
        };
        let all = section(header(8)?, header(12)?);
        let names = section(header(16)?, header(20)?);
        if all.end > bytes.len() || names.end > bytes.len() {
            return Err(CUT);
        }
        let mut types = Vec::new();
        let mut at = all.start;
        while at < all.end {
            types.push(at);
            let info = word(&bytes, at + 4).ok_or(CUT)?;
            let count = (info & 0xffff) as usize;
            at += HEAD
                + match kind(info) {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * count,
                    ENUM | FUNC_PROTO => 8 * count,
                    1..=LAST => 0,
                    _ => return Err("it has a kind of type that this version does not know"),
                };
        }
        Ok(Self { bytes, names, types })
    }

    /// The structure of this name.
    pub(crate) fn structure(&self, name: &str) -> Option<Structure> {
        self.find(STRUCT, name).map(Structure)
    }

    /// Whether there is a function of this name.
    pub(crate) fn has_function(&self, name: &str) -> bool {
        self.find(FUNC, name).is_some()
    }

    /// The members of a structure, in their order.
    pub(crate) fn members(&self, structure: Structure) -> impl Iterator<Item = Member<'_>> {
        let at = self.at(structure.0).unwrap_or(self.bytes.len());
        let info = self.word(at + 4);
        // With the flag, the upper byte of an offset is the width of a bit field.
        let offset = if info >> 31 == 0 { u32::MAX } else { 0x00ff_ffff };
        (0..(info & 0xffff) as usize).map(move |index| {
            let member = at + HEAD + index * MEMBER;
            Member {
                name: self.name(self.word(member)),
                bits: self.word(member + 8) & offset,
                structure: self.structure_of(self.word(member + 4)),
            }
        })
    }

    /// The structure or union behind a type, through names and qualifiers, but not pointers.
    fn structure_of(&self, mut id: u32) -> Option<Structure> {
        // No real chain is longer; a damaged one may be a circle.
        for _ in 0..32 {
            let at = self.at(id)?;
            match kind(self.word(at + 4)) {
                STRUCT | UNION => return Some(Structure(id)),
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => id = self.word(at + 8),
                _ => return None,
            }
        }
        None
    }

    fn find(&self, wanted: u32, name: &str) -> Option<u32> {
        let position = self.types.iter().position(|&at| {
            kind(self.word(at + 4)) == wanted && self.name(self.word(at)) == name.as_bytes()
        })?;
        u32::try_from(position + 1).ok()
    }

    fn at(&self, id: u32) -> Option<usize> {
        self.types.get((id as usize).checked_sub(1)?).copied()
    }

    /// The name at an offset, empty if there is none.
    fn name(&self, offset: u32) -> &[u8] {
        let names = self.bytes.get(self.names.clone()).unwrap_or_default();
        let rest = names.get(offset as usize..).unwrap_or_default();
        rest.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    fn word(&self, at: usize) -> u32 {
        word(&self.bytes, at).unwrap_or(0)
    }
}

fn kind(info: u32) -> u32 {
    (info >> 24) & 0x1f
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BTF with these types and names behind the header.
    fn btf(types: &[u32], names: &[u8]) -> Vec<u8> {
        let length = types.len() as u32 * 4;
        let header = [0x0001_eb9f, 24, 0, length, length, names.len() as u32];
        let words = header.iter().chain(types).flat_map(|word| word.to_ne_bytes());
        words.chain(names.iter().copied()).collect()
    }

    const NAMES: &[u8] = b"\0outer\0first\0second\0work\0";

    /// `struct outer { int first; const union { int second; }; }`, `void work()`.
    fn example() -> Vec<u8> {
        let types = [
            // 1: int
            [0, INT << 24, 4].as_slice(),
            &[32],
            // 2: struct outer; the second member is anonymous
            &[1, STRUCT << 24 | 2, 8],
            &[7, 1, 0],
            &[0, 3, 32],
            // 3: const 4
            &[0, CONST << 24, 4],
            // 4: union, its offsets with widths
            &[0, 1 << 31 | UNION << 24 | 1, 4],
            &[13, 1, 5 << 24 | 3],
            // 5: func
            &[20, FUNC << 24, 0],
        ];
        btf(&types.concat(), NAMES)
    }

    #[test]
    fn structures_members_and_functions_are_found() {
        let btf = Btf::parse(example()).unwrap();
        let outer = btf.structure("outer").unwrap();
        let members: Vec<_> = btf.members(outer).collect();
        assert_eq!(members.len(), 2);
        assert_eq!((members[0].name, members[0].bits), (b"first".as_slice(), 0));
        assert_eq!(members[0].structure, None);
        assert_eq!((members[1].name, members[1].bits), (b"".as_slice(), 32));
        let inner: Vec<_> = btf.members(members[1].structure.unwrap()).collect();
        assert_eq!((inner[0].name, inner[0].bits), (b"second".as_slice(), 3));
        assert!(btf.has_function("work") && !btf.has_function("outer"));
        assert!(btf.structure("work").is_none() && btf.structure("absent").is_none());
    }

    #[test]
    fn damaged_files_are_refused_and_never_panic() {
        let whole = example();
        for length in 0..whole.len() {
            assert!(Btf::parse(whole[..length].to_vec()).is_err(), "{length}");
        }
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if let Ok(btf) = Btf::parse(damaged)
                && let Some(outer) = btf.structure("outer")
            {
                btf.members(outer).for_each(drop);
            }
        }
        let unknown = btf(&[0, (LAST + 1) << 24, 0], b"\0");
        assert!(Btf::parse(unknown).is_err());
    }
}

//! A BPF program that does nothing: what the kernel's statistics say of it is the cost of taking
//! them, and of what interrupts hooks, on this machine at this time.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program};
use object::write::{Object, Symbol, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
};

const NAME: &str = "nothing";
/// `return 1`: go on.
const INSTRUCTIONS: [(u8, i32); 2] = [(MOV_IMMEDIATE_TO_R0, 1), (EXIT, 0)];
const MOV_IMMEDIATE_TO_R0: u8 = 0xb7;
const EXIT: u8 = 0x95;

/// The program, attached to the connect hook of a cgroup until it is dropped.
#[derive(Debug)]
pub(crate) struct Reference(Ebpf);

impl Reference {
    /// Attaches it.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub(crate) fn attach(cgroup: &Path) -> Result<Self> {
        let directory =
            File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        let mut object = Ebpf::load(&built()?).context("reading the reference program")?;
        let program: &mut CgroupSockAddr =
            object.program_mut(NAME).context("there is no reference program")?.try_into()?;
        program.load().context("loading the reference program")?;
        // The mode under which others can be attached beside it, in the terms of links.
        program.attach(directory, CgroupAttachMode::Single).context("attaching it")?;
        Ok(Self(object))
    }

    /// Nanoseconds and number of its runs until now.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn runs(&self) -> Result<(u64, u64)> {
        let info = self.0.program(NAME).map(Program::info).context("no reference program")??;
        Ok((info.run_time().as_nanos() as u64, info.run_count()))
    }
}

/// The program as a compiler would give it.
fn built() -> Result<Vec<u8>> {
    let endian = if cfg!(target_endian = "big") { Endianness::Big } else { Endianness::Little };
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, endian);
    let code: Vec<u8> = INSTRUCTIONS
        .iter()
        .flat_map(|&(code, immediate)| {
            let [a, b, c, d] = immediate.to_ne_bytes();
            [code, 0, 0, 0, a, b, c, d]
        })
        .collect();
    let section = object.add_section(vec![], b"cgroup/connect4".to_vec(), SectionKind::Text);
    let size = code.len() as u64;
    object.append_section_data(section, &code, 8);
    object.add_symbol(Symbol {
        name: NAME.into(),
        value: 0,
        size,
        kind: SymbolKind::Text,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    object.write().context("building the reference program")
}

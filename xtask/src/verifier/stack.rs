//! How much stack each program's call chains take, read from the object as Linux 6.1 counts.
//!
//! A frame is as large as the lowest byte that its function addresses below the frame pointer, rounded
//! up to 32 bytes; what the functions on a chain of calls take together may be 512. Newer kernels
//! round up to 16, so what holds here holds there. Callbacks of loops run on top of their caller's
//! frame; those of timers start a stack of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SymbolKind};

/// Bytes that the frames of one chain of calls may take.
pub(crate) const LIMIT: u32 = 512;
/// What Linux 6.1 rounds a frame up to.
const GRANULE: u32 = 32;
/// Bytes of an instruction.
const INSTRUCTION: u64 = 8;
/// The register that points to the end of a frame.
const FRAME_POINTER: u8 = 10;
/// The helper whose callback the kernel starts later, on a stack of its own.
const TIMER_SET_CALLBACK: i32 = 170;

/// The deepest chain of calls of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Function and size of its frame as the kernel counts it, in bytes, outermost first.
    frames: Vec<(String, u32)>,
}

impl Chain {
    /// Bytes of all frames together.
    pub(crate) fn depth(&self) -> u32 {
        self.frames.iter().map(|(_, frame)| frame).sum()
    }
}

impl fmt::Display for Chain {
    /// `carnet_connect4 192 + bank::body 64`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (function, frame)) in self.frames.iter().enumerate() {
            let separator = if position == 0 { "" } else { " + " };
            write!(f, "{separator}{function} {frame}")?;
        }
        Ok(())
    }
}

/// The deepest chain of every program of the object, by the program's name.
pub(crate) fn chains(object: &[u8]) -> Result<BTreeMap<String, Chain>> {
    let functions = functions(object)?;
    // A section of its own makes a function a program; those of .text are called by programs.
    let programs = functions.values().filter(|function| function.is_program);
    programs
        .map(|program| {
            let mut deepest = Chain::default();
            // Timers' callbacks, and what they start in turn, each on an empty stack.
            let mut roots = vec![program.place];
            let mut known = BTreeSet::from([program.place]);
            while let Some(root) = roots.pop() {
                let chain = deepest_from(root, &functions, &mut Vec::new())?;
                if chain.depth() > deepest.depth() {
                    deepest = chain;
                }
                let started = started_below(root, &functions);
                roots.extend(started.into_iter().filter(|place| known.insert(*place)));
            }
            Ok((program.name.clone(), deepest))
        })
        .collect()
}

/// Where a function begins: its section, and its first byte there.
type Place = (usize, u64);

/// A function, as far as its stack is concerned.
#[derive(Debug)]
struct Function {
    name: String,
    place: Place,
    is_program: bool,
    /// Bytes below the frame pointer that it addresses.
    frame: u32,
    /// What runs on top of its frame.
    called: BTreeSet<Place>,
    /// What runs later, by a timer.
    started: BTreeSet<Place>,
}

/// All functions of the object.
fn functions(object: &[u8]) -> Result<BTreeMap<Place, Function>> {
    let file = object::File::parse(object).context("the kernel engine is no ELF object")?;
    let symbols: Vec<_> = file
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text)
        .filter_map(|symbol| Some((symbol.section_index()?, symbol)))
        .collect();
    let places: BTreeSet<Place> =
        symbols.iter().map(|(section, symbol)| (section.0, symbol.address())).collect();
    ensure!(!places.is_empty(), "the kernel engine has no functions");
    let mut functions = BTreeMap::new();
    for (section, symbol) in symbols {
        let (name, first) = (symbol.name()?, symbol.address());
        let section = file.section_by_index(section)?;
        let referred: BTreeMap<u64, Place> = section
            .relocations()
            .filter_map(|(at, relocation)| match relocation.target() {
                RelocationTarget::Symbol(index) => {
                    let target = file.symbol_by_index(index).ok()?;
                    Some((at, (target.section_index()?.0, target.address())))
                }
                _ => None,
            })
            .collect();
        let data = section.data()?;
        let range = usize::try_from(first)?..usize::try_from(first + symbol.size())?;
        let code = data.get(range).with_context(|| format!("{name} is not in its section"))?;
        let place = (section.index().0, first);
        let mut function = Function {
            name: readable(name),
            place,
            is_program: section.name()? != ".text",
            frame: 0,
            called: BTreeSet::new(),
            started: BTreeSet::new(),
        };
        let references = References { referred: &referred, functions: &places };
        read(code, first, &references, &mut function).with_context(|| format!("in {name}"))?;
        functions.insert(place, function);
    }
    Ok(functions)
}

/// A function's name without what Rust adds to it.
fn readable(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name)).replace("carnet_bpf::", "")
}

/// One instruction.
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

impl From<&[u8; 8]> for Instruction {
    fn from(bytes: &[u8; 8]) -> Self {
        let [code, registers, o0, o1, i0, i1, i2, i3] = *bytes;
        Self {
            code,
            destination: registers & 0xf,
            source: registers >> 4,
            offset: i16::from_le_bytes([o0, o1]),
            immediate: i32::from_le_bytes([i0, i1, i2, i3]),
        }
    }
}

/// What the instructions of a section refer to.
struct References<'a> {
    /// By the instruction's place in the section, the symbol that it names.
    referred: &'a BTreeMap<u64, Place>,
    /// Where functions begin.
    functions: &'a BTreeSet<Place>,
}

impl References<'_> {
    /// The place that the instruction names, with what it adds to that itself.
    fn target(&self, instruction: u64, added: i64) -> Option<Place> {
        let (section, symbol) = self.referred.get(&instruction)?;
        Some((*section, symbol.wrapping_add_signed(added)))
    }
}

/// Goes through a function's instructions: which bytes of the stack it addresses, whom it calls.
fn read(
    code: &[u8],
    first: u64,
    references: &References<'_>,
    function: &mut Function,
) -> Result<()> {
    const LOAD: u8 = 0x18;
    const CALL: u8 = 0x85;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let mut frame = 0;
    // Registers that hold the frame pointer itself, moved there to be subtracted from.
    let mut copies = [false; 16];
    // Callbacks whose address was loaded, until the helper that takes them is called.
    let mut callbacks = Vec::new();
    let mut instructions = code.as_chunks::<8>().0.iter().zip((first..).step_by(8));
    while let Some((bytes, at)) = instructions.next() {
        let instruction = Instruction::from(bytes);
        let Instruction { code, destination, source, offset, immediate } = instruction;
        let mut addresses = |lowest: i32| frame = frame.max(lowest.saturating_neg().max(0));
        match code & 0x07 {
            // Loads and stores: the register that has the address differs.
            0x01 if source == FRAME_POINTER => addresses(offset.into()),
            0x02 | 0x03 if destination == FRAME_POINTER => addresses(offset.into()),
            _ => {}
        }
        match code {
            LOAD => {
                instructions.next();
                // Or the address of a map, or of bytes.
                let loaded = references.target(at, immediate.into());
                callbacks.extend(loaded.filter(|place| references.functions.contains(place)));
            }
            CALL if source == 1 => {
                let added = (i64::from(immediate) + 1) * INSTRUCTION as i64;
                // A call within the section may be resolved already: from the next instruction on.
                let here = (function.place.0, at.wrapping_add_signed(added));
                let called = references.target(at, added).unwrap_or(here);
                ensure!(references.functions.contains(&called), "a call to no function");
                function.called.insert(called);
            }
            CALL => {
                let timer = immediate == TIMER_SET_CALLBACK;
                let to = if timer { &mut function.started } else { &mut function.called };
                to.extend(callbacks.drain(..));
            }
            ADD if copies[usize::from(destination)] => addresses(immediate),
            _ => {}
        }
        if matches!(code & 0x07, 0x00 | 0x01 | 0x04 | 0x07) {
            copies[usize::from(destination)] = code == MOVE && source == FRAME_POINTER;
        }
    }
    function.frame = u32::try_from(frame)?;
    Ok(())
}

/// The deepest chain that begins with the function at this place.
fn deepest_from(
    place: Place,
    functions: &BTreeMap<Place, Function>,
    above: &mut Vec<Place>,
) -> Result<Chain> {
    let function = functions.get(&place).context("a call to no function")?;
    if above.contains(&place) {
        bail!("{} calls itself, which the kernel does not allow", function.name);
    }
    above.push(place);
    let mut deepest = Chain::default();
    for called in &function.called {
        let chain = deepest_from(*called, functions, above)?;
        if chain.depth() > deepest.depth() {
            deepest = chain;
        }
    }
    above.pop();
    let frame = function.frame.max(1).next_multiple_of(GRANULE);
    deepest.frames.insert(0, (function.name.clone(), frame));
    Ok(deepest)
}

/// The callbacks of timers that are set on the chains that begin at this place.
fn started_below(place: Place, functions: &BTreeMap<Place, Function>) -> BTreeSet<Place> {
    let (mut open, mut seen) = (vec![place], BTreeSet::new());
    let mut started = BTreeSet::new();
    while let Some(function) = open.pop().and_then(|place| functions.get(&place)) {
        if seen.insert(function.place) {
            started.extend(&function.started);
            open.extend(&function.called);
        }
    }
    started
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An instruction's bytes.
    fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> [u8; 8] {
        let (o, i) = (offset.to_le_bytes(), immediate.to_le_bytes());
        [code, destination | source << 4, o[0], o[1], i[0], i[1], i[2], i[3]]
    }

    fn function(name: &str, place: Place) -> Function {
        let (called, started) = Default::default();
        Function { name: name.into(), place, is_program: place.0 > 1, frame: 0, called, started }
    }

    /// A function of these instructions at the beginning of its section.
    fn of(code: &[[u8; 8]], referred: &[(u64, Place)]) -> Function {
        let mut function = function("f", (2, 0));
        let referred = &referred.iter().copied().collect();
        let references = References { referred, functions: &[(1, 16), (1, 64)].into() };
        read(code.as_flattened(), 0, &references, &mut function).unwrap();
        function
    }

    #[test]
    fn a_frame_reaches_down_to_the_lowest_byte_that_is_addressed() {
        assert_eq!(of(&[instruction(0x7b, 10, 1, -24, 0)], &[]).frame, 24, "a store");
        assert_eq!(of(&[instruction(0x79, 1, 10, -40, 0)], &[]).frame, 40, "a load");
        assert_eq!(of(&[instruction(0x79, 10, 1, -40, 0)], &[]).frame, 0, "a load from elsewhere");
        let copy = instruction(0xbf, 2, 10, 0, 0);
        assert_eq!(of(&[copy, instruction(0x07, 2, 0, 0, -56)], &[]).frame, 56, "an address");
        let replaced = [copy, instruction(0xb7, 2, 0, 0, 9), instruction(0x07, 2, 0, 0, -56)];
        assert_eq!(of(&replaced, &[]).frame, 0, "of a number");
    }

    #[test]
    fn callbacks_of_loops_are_called_and_those_of_timers_started() {
        let load = [instruction(0x18, 2, 0, 0, 16), [0; 8]];
        let helper = |number| instruction(0x85, 0, 0, 0, number);
        let looping = of(&[load[0], load[1], helper(181)], &[(0, (1, 0))]);
        assert_eq!((looping.called.len(), looping.started.len()), (1, 0));
        assert!(looping.called.contains(&(1, 16)));
        let timer = of(&[load[0], load[1], helper(TIMER_SET_CALLBACK)], &[(0, (1, 0))]);
        assert_eq!((timer.called.len(), timer.started.len()), (0, 1));
        let direct = of(&[instruction(0x85, 0, 1, 0, -1)], &[(0, (1, 64))]);
        assert!(direct.called.contains(&(1, 64)));
    }

    #[test]
    fn the_deepest_chain_counts_each_frame_rounded_up() {
        let mut outer = function("outer", (2, 0));
        (outer.frame, outer.called) = (33, [(1, 0), (1, 8)].into());
        let mut deep = function("deep", (1, 0));
        deep.frame = 100;
        let shallow = function("shallow", (1, 8));
        let functions: BTreeMap<_, _> =
            [outer, deep, shallow].into_iter().map(|f| (f.place, f)).collect();
        let chain = deepest_from((2, 0), &functions, &mut Vec::new()).unwrap();
        assert_eq!(chain.to_string(), "outer 64 + deep 128");
        assert_eq!(chain.depth(), 192);
    }

    #[test]
    fn the_committed_programs_fit() {
        let object = include_bytes!("../../../crates/carnet-engine/prebuilt/carnet.bpfel.o");
        let chains = chains(object).unwrap();
        assert!(chains["carnet_connect4"].frames.len() > 1, "it calls others");
        let deep = chains.iter().find(|(_, chain)| chain.depth() > LIMIT);
        assert_eq!(deep, None);
    }

    #[test]
    fn a_function_that_calls_itself_is_refused() {
        let mut own = function("own", (2, 0));
        own.called.insert(own.place);
        let functions = [(own.place, own)].into();
        let error = deepest_from((2, 0), &functions, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("own calls itself"), "{error}");
    }
}

//! The maps: their layouts, sizes and contents.
//!
//! The layouts are those of `carnet-bpf`'s `maps.rs`. Aya compares their sizes with the maps', so
//! a difference is an error, not garbage.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
    time::Duration,
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapType, PerCpuArray};
use carnet_core::{
    abi::MAX_CONTEXT,
    compile::{CompiledPolicy, max_candidates, max_nodes},
    event::Counter,
    flow::{
        Accepted, Correspondent, CorrespondentKey, DatagramLeg, LegState, ListenerEntry,
        ListenerKey, PeerKey,
    },
    object::Policy,
    place::is_held,
    table::{HeaderRow, MAX_CANDIDATES},
};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes};

use crate::{
    Error, Location, MapStatus,
    keys::draw,
    object::{BuildId, LAYOUT},
    sys::{Wire, count_entries, write_elements},
};

/// The instance's identity towards the programs: an element of `CONFIG`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Config {
    epoch: u64,
    flows: u64,
    datagram_idle_ns: u64,
    swept_ns: u64,
}

/// A key of `SLOTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct SlotKey {
    handle: u64,
    bank: u64,
}

/// A key of `IDENTITIES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct IdentityKey {
    identity: u64,
    bank: u64,
}

/// An element of `CONTEXTS`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Context {
    length: u64,
    bytes: [u8; MAX_CONTEXT],
}

impl Context {
    fn new(bytes: &[u8]) -> Self {
        let mut context = Self { length: bytes.len() as u64, bytes: [0; MAX_CONTEXT] };
        for (to, from) in context.bytes.iter_mut().zip(bytes) {
            *to = *from;
        }
        context
    }
}

/// An element of `DATAGRAM_LEGS`. User mode sees the timer as zeros.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct TimedLeg {
    timer: [u64; 2],
    held: DatagramLeg,
}

/// The maps of what was decided for the flows of unconnected UDP sockets.
const CORRESPONDENTS: [&str; 2] = ["PASSING", "CORRESPONDENTS"];

/// The tables of places: see [`carnet_core::place`].
const CONNECTING: &str = "CONNECTING";
const ACCEPTED: &str = "ACCEPTED";
const WAITING: &str = "WAITING";

/// A page of `DOCUMENT`.
const PAGE: usize = 4096;
/// Bytes of the document for each filter: about twice what one with a few conditions takes.
const DOCUMENT_PER_FILTER: usize = 512;
/// Bytes of the document for everything else.
const DOCUMENT_BASE: usize = 64 * 1024;
/// Conditions for each filter, on the average.
const CONDITIONS_PER_FILTER: usize = 4;

/// The bit of `ACTIVE` beside the bank, which programs do not look at.
const CLOSED: u64 = 2;

/// How much the tables of one bank hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capacities {
    pub(crate) filters: usize,
    pub(crate) conditions: usize,
    pub(crate) nodes: usize,
    pub(crate) leaves: usize,
    pub(crate) candidates: usize,
    pub(crate) document: usize,
    pub(crate) contexts: usize,
}

impl Capacities {
    /// Room for a policy of `max_filters` filters.
    pub(crate) fn for_filters(max_filters: u32) -> Result<Self, Error> {
        if max_filters == 0 || max_filters > MAX_CANDIDATES {
            return Err(Error::BadMaxFilters { given: max_filters, largest: MAX_CANDIDATES });
        }
        let filters = max_filters as usize;
        Ok(Self {
            filters,
            conditions: filters * CONDITIONS_PER_FILTER,
            nodes: max_nodes(filters),
            leaves: max_nodes(filters) + 1,
            candidates: max_candidates(filters),
            document: (filters * DOCUMENT_PER_FILTER + DOCUMENT_BASE).next_multiple_of(PAGE),
            contexts: filters,
        })
    }

    /// The maps' sizes for that: both banks are in one map.
    pub(crate) fn map_entries(&self) -> [(&'static str, u32); 7] {
        [
            ("FILTERS", self.filters),
            ("CONDITIONS", self.conditions),
            ("NODES", self.nodes),
            ("LEAVES", self.leaves),
            ("CANDIDATES", self.candidates),
            ("DOCUMENT", self.document / PAGE),
            // During a transaction, those of before and after are there.
            ("CONTEXTS", self.contexts),
        ]
        .map(|(name, entries)| (name, 2 * entries as u32))
    }

    /// What of a policy takes how much of it.
    pub(crate) fn uses(
        &self,
        compiled: &CompiledPolicy,
        document: usize,
    ) -> [(&'static str, usize, usize); 7] {
        [
            ("filter rows", compiled.filters().len(), self.filters),
            ("conditions", compiled.conditions().len(), self.conditions),
            ("nodes", compiled.nodes().len(), self.nodes),
            ("leaves", compiled.leaves().len(), self.leaves),
            ("candidates", compiled.candidates().len(), self.candidates),
            ("bytes of the document", document, self.document),
            ("redirect contexts", compiled.contexts().len(), self.contexts),
        ]
    }

    /// Refuses a policy that does not fit.
    fn check(&self, compiled: &CompiledPolicy, document: usize) -> Result<(), Error> {
        for (what, needed, capacity) in self.uses(compiled, document) {
            if needed > capacity {
                return Err(Error::TooLarge { what, needed, capacity });
            }
        }
        Ok(())
    }
}

/// Longest path of a scope that is kept, in bytes.
const MAX_SCOPE: usize = 4096;

/// What an instance is: the only element of `INSTANCE`, which no program reads.
///
/// The first field's place is fixed for all times, so that every version can tell whether it knows
/// the rest.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct InstanceRow {
    layout: u32,
    max_filters: u32,
    build: [u8; 32],
    refuse_unseen: u64,
    scope_id: u64,
    scope_length: u64,
    scope: [u8; MAX_SCOPE],
}

/// What an instance is.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    /// How many filters it was made for.
    pub(crate) max_filters: u32,
    /// The build of its programs.
    pub(crate) build: BuildId,
    /// Whether its scope is refused sockets whose flows no hook sees.
    pub(crate) refuse_unseen: bool,
    /// The id of its scope's cgroup.
    pub(crate) scope_id: u64,
    /// The path of its scope below the hierarchy's root, without a slash before it.
    pub(crate) scope: PathBuf,
}

/// The policy that is in force, with what the tables say of it.
#[derive(Debug)]
pub(crate) struct InForce {
    /// Its bank.
    pub(crate) bank: u32,
    /// Number of the transaction that wrote it; 0 if none has.
    pub(crate) generation: u64,
    pub(crate) policy: Policy,
}

/// The maps of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    directory: PathBuf,
}

/// The bank that is not in force.
pub(crate) fn other(bank: u32) -> u32 {
    bank ^ 1
}

/// Where row `index` of a bank is.
fn element(bank: u32, index: usize) -> u32 {
    2 * index as u32 + bank
}

impl Tables {
    pub(crate) fn of(location: &Location) -> Self {
        Self::at(location.path("maps"))
    }

    pub(crate) fn at(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Opens a map.
    pub(crate) fn open(&self, name: &'static str) -> Result<MapData, Error> {
        MapData::from_pin(self.directory.join(name)).map_err(Error::map(name))
    }

    /// How many entries a map has that grows and shrinks; of a table of places, how many have a holder.
    pub(crate) fn entries(&self, name: &'static str) -> Result<usize, Error> {
        let held =
            |cookies: Vec<u64>| cookies.into_iter().filter(|cookie| is_held(*cookie)).count();
        match name {
            CONNECTING => Ok(self.connecting_legs()?.len()),
            ACCEPTED => {
                let places = self.elements::<Accepted>(name)?;
                Ok(held(places.into_iter().map(|accepted| accepted.cookie).collect()))
            }
            WAITING => self.elements(name).map(held),
            _ => count_entries(&self.open(name)?).map_err(Error::map(name)),
        }
    }

    /// The maps that grow and shrink with what goes on: kind of content, name.
    pub(crate) const CHANGING: [(&'static str, &'static str); 13] = [
        ("connections to services and onwards", CONNECTING),
        ("connections under way to a service", WAITING),
        ("those whose place is another's", "HANDOVER"),
        ("copies of legs", "COPIES"),
        ("connections that services accepted", ACCEPTED),
        ("UDP flows of unconnected sockets", "DATAGRAM_LEGS"),
        ("decisions for those", "CORRESPONDENTS"),
        ("decisions for those that pass", "PASSING"),
        ("IPv6 sources of UDP", "LOCAL_SOURCES"),
        ("destinations that services hold", "GUARD"),
        ("those that unmodified services hold", "HELD"),
        ("listeners", "LISTENERS"),
        ("services' cgroups", "SVC_CGROUPS"),
    ];

    /// How full a map is that grows and shrinks.
    pub(crate) fn fill(&self, what: &'static str, name: &'static str) -> Result<MapStatus, Error> {
        let map = self.open(name)?;
        let info = map.info().map_err(Error::map(name))?;
        let kind = info.map_type().map_err(Error::map(name))?;
        Ok(MapStatus {
            name,
            what,
            used: self.entries(name)?,
            capacity: info.max_entries() as usize,
            oldest_give_way: kind == MapType::LruHash,
            bytes: memory_of(&map)?,
        })
    }

    pub(crate) fn array<V: FromBytes + IntoBytes + Immutable + Copy + 'static>(
        &self,
        name: &'static str,
    ) -> Result<Array<MapData, Wire<V>>, Error> {
        Map::Array(self.open(name)?).try_into().map_err(Error::map::<MapError>(name))
    }

    fn hash<K, V>(&self, name: &'static str) -> Result<HashMap<MapData, Wire<K>, Wire<V>>, Error>
    where
        K: FromBytes + IntoBytes + Immutable + Copy + 'static,
        V: FromBytes + IntoBytes + Immutable + Copy + 'static,
    {
        Map::HashMap(self.open(name)?).try_into().map_err(Error::map::<MapError>(name))
    }

    pub(crate) fn first<V: FromBytes + IntoBytes + Immutable + Copy + 'static>(
        &self,
        name: &'static str,
    ) -> Result<V, Error> {
        self.array(name)?.get(&0, 0).map(|Wire(value)| value).map_err(Error::map(name))
    }

    pub(crate) fn set_first<V: FromBytes + IntoBytes + Immutable + Copy + 'static>(
        &self,
        name: &'static str,
        value: V,
    ) -> Result<(), Error> {
        self.array(name)?.set(0, Wire(value), 0).map_err(Error::map(name))
    }

    /// Gives the instance an epoch that no other has, and the time after which a UDP flow of an
    /// unconnected socket ends.
    pub(crate) fn write_config(&self, datagram_idle: Duration) -> Result<(), Error> {
        let mut config = Config::new_zeroed();
        draw(config.epoch.as_mut_bytes(), "an epoch")?;
        config.datagram_idle_ns = u64::try_from(datagram_idle.as_nanos()).unwrap_or(u64::MAX);
        self.set_first("CONFIG", config)
    }

    /// The instance's epoch, how many flows have begun, and how long an idle UDP flow lives.
    pub(crate) fn epoch_flows_and_udp_idle(&self) -> Result<(u64, u64, Duration), Error> {
        let Config { epoch, flows, datagram_idle_ns, .. } = self.first("CONFIG")?;
        Ok((epoch, flows, Duration::from_nanos(datagram_idle_ns)))
    }

    /// The legs of sockets that the kernel keeps apart from them.
    pub(crate) fn connecting_legs(&self) -> Result<Vec<LegState>, Error> {
        let mut legs = self.elements::<LegState>(CONNECTING)?;
        legs.retain(|leg| is_held(leg.cookie));
        Ok(legs)
    }

    /// All elements of an array.
    fn elements<V: FromBytes + IntoBytes + Immutable + Copy + 'static>(
        &self,
        name: &'static str,
    ) -> Result<Vec<V>, Error> {
        let array = self.array::<V>(name)?;
        array
            .iter()
            .map(|element| element.map(|Wire(value)| value).map_err(Error::map(name)))
            .collect()
    }

    /// The UDP flows of unconnected sockets that go to services.
    pub(crate) fn datagram_legs(&self) -> Result<Vec<DatagramLeg>, Error> {
        let legs = self.hash::<PeerKey, TimedLeg>("DATAGRAM_LEGS")?;
        // One that ends while the others are read is missed.
        let held = legs.iter().filter_map(Result::ok).map(|(_, Wire(timed))| timed.held);
        Ok(held.filter(|held| held.leg.kind != 0).collect())
    }

    /// With whom unconnected UDP sockets have flows, be it that they pass or go to services.
    pub(crate) fn correspondents(&self) -> Result<BTreeSet<CorrespondentKey>, Error> {
        let mut keys = BTreeSet::new();
        for name in CORRESPONDENTS {
            // One that goes while the others are read is missed.
            keys.extend(self.decided(name)?.keys().filter_map(Result::ok).map(|Wire(key)| key));
        }
        Ok(keys)
    }

    /// Forgets what was decided for such a flow, so that its next datagram is decided anew; `false`
    /// if it had gone by itself.
    pub(crate) fn forget_correspondent(&self, key: &CorrespondentKey) -> Result<bool, Error> {
        let mut forgotten = false;
        for name in CORRESPONDENTS {
            match self.decided(name)?.remove(&Wire(*key)) {
                Ok(()) => forgotten = true,
                Err(MapError::KeyNotFound) => {}
                Err(MapError::SyscallError(error))
                    if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(Error::map(name)(error)),
            }
        }
        Ok(forgotten)
    }

    fn decided(
        &self,
        name: &'static str,
    ) -> Result<HashMap<MapData, Wire<CorrespondentKey>, Wire<Correspondent>>, Error> {
        Map::LruHashMap(self.open(name)?).try_into().map_err(Error::map::<MapError>(name))
    }

    /// Makes and writes `INSTANCE`.
    pub(crate) fn create_instance(&self, instance: &Instance) -> Result<(), Error> {
        const NAME: &str = "INSTANCE";
        const ARRAY: u32 = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
        let (key, value) = (size_of::<u32>() as u32, size_of::<InstanceRow>() as u32);
        let definition = aya_obj::Map::new_from_params(ARRAY, key, value, 1, 0);
        let map = MapData::create(definition, NAME, None).map_err(Error::map(NAME))?;
        let pin = self.directory.join(NAME);
        let pinned = map.pin(&pin);
        pinned
            .map_err(|source| Error::map(NAME)(MapError::PinError { name: None, error: source }))?;
        self.write_instance(instance)
    }

    /// Writes `INSTANCE`.
    pub(crate) fn write_instance(&self, instance: &Instance) -> Result<(), Error> {
        let path = instance.scope.as_os_str().as_encoded_bytes();
        let mut row = InstanceRow::new_zeroed();
        row.layout = LAYOUT;
        row.max_filters = instance.max_filters;
        row.build = instance.build.0;
        row.refuse_unseen = instance.refuse_unseen.into();
        row.scope_id = instance.scope_id;
        row.scope_length = path.len() as u64;
        row.scope.iter_mut().zip(path).for_each(|(to, from)| *to = *from);
        self.set_first("INSTANCE", row)
    }

    /// Reads `INSTANCE`. The inner error says what is not as this version knows it.
    pub(crate) fn read_instance(&self) -> Result<Result<Instance, String>, Error> {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};
        let map = match self.array::<InstanceRow>("INSTANCE") {
            Ok(map) => map,
            Err(Error::Map { source, .. }) => {
                return Ok(Err(format!("its map INSTANCE is not readable ({source})")));
            }
            Err(error) => return Err(error),
        };
        let Wire(row) = map.get(&0, 0).map_err(Error::map("INSTANCE"))?;
        if row.layout != LAYOUT {
            let InstanceRow { layout, .. } = row;
            return Ok(Err(format!("its maps have layout {layout}, not {LAYOUT}")));
        }
        let path = row.scope.get(..row.scope_length as usize).unwrap_or_default();
        Ok(Ok(Instance {
            max_filters: row.max_filters,
            build: BuildId(row.build),
            refuse_unseen: row.refuse_unseen != 0,
            scope_id: row.scope_id,
            scope: OsStr::from_bytes(path).into(),
        }))
    }

    /// How much one bank holds.
    pub(crate) fn capacities(&self) -> Result<Capacities, Error> {
        let entries = |name| {
            let info = self.open(name)?.info().map_err(Error::map(name))?;
            Ok::<_, Error>(info.max_entries() as usize / 2)
        };
        Ok(Capacities {
            filters: entries("FILTERS")?,
            conditions: entries("CONDITIONS")?,
            nodes: entries("NODES")?,
            leaves: entries("LEAVES")?,
            candidates: entries("CANDIDATES")?,
            document: entries("DOCUMENT")? * PAGE,
            contexts: entries("CONTEXTS")?,
        })
    }

    /// The policy in force. The caller holds the instance's lock.
    pub(crate) fn in_force(&self) -> Result<InForce, Error> {
        let bank = self.first::<u64>("ACTIVE")? as u32 & 1;
        let header: HeaderRow =
            self.array("HEADERS")?.get(&bank, 0).map_err(Error::map("HEADERS"))?.0;
        if header.generation == 0 {
            return Ok(InForce { bank, generation: 0, policy: Policy::new() });
        }
        let pages = self.array::<[u8; PAGE]>("DOCUMENT")?;
        let mut document = Vec::new();
        for index in 0..(header.document_length as usize).div_ceil(PAGE) {
            let Wire(page) = pages.get(&element(bank, index), 0).map_err(Error::map("DOCUMENT"))?;
            document.extend_from_slice(&page);
        }
        document.truncate(header.document_length as usize);
        let policy = Policy::from_bytes(&document)?;
        Ok(InForce { bank, generation: header.generation, policy })
    }

    /// Refuses a policy for which there is no room.
    pub(crate) fn check_room(
        &self,
        compiled: &CompiledPolicy,
        document: &[u8],
    ) -> Result<(), Error> {
        self.capacities()?.check(compiled, document.len())
    }

    /// Writes a bank that is not in force.
    pub(crate) fn write_bank(
        &self,
        bank: u32,
        compiled: &CompiledPolicy,
        document: &[u8],
    ) -> Result<(), Error> {
        self.write_rows("NODES", bank, compiled.nodes())?;
        self.write_rows("LEAVES", bank, compiled.leaves())?;
        self.write_rows("CANDIDATES", bank, compiled.candidates())?;
        self.write_rows("FILTERS", bank, compiled.filters())?;
        self.write_rows("CONDITIONS", bank, compiled.conditions())?;
        self.write_rows("SERVICES", bank, compiled.services())?;
        let pages = document.chunks(PAGE).map(|chunk| {
            let mut page = [0; PAGE];
            page.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            page
        });
        self.write_rows("DOCUMENT", bank, &pages.collect::<Vec<_>>())?;
        self.clear_services(bank)?;
        let mut slots = self.hash::<SlotKey, u32>("SLOTS")?;
        for (slot, service) in (0_u32..).zip(compiled.services()) {
            let key = SlotKey { handle: service.handle, bank: bank.into() };
            slots.insert(Wire(key), Wire(slot), 0).map_err(Error::map("SLOTS"))?;
        }
        let mut identities = self.hash::<IdentityKey, u64>("IDENTITIES")?;
        for service in compiled.services() {
            let key = IdentityKey { identity: service.identity, bank: bank.into() };
            let added = identities.insert(Wire(key), Wire(service.handle), 0);
            added.map_err(Error::map("IDENTITIES"))?;
        }
        let header = HeaderRow { document_length: document.len() as u32, ..*compiled.header() };
        self.array("HEADERS")?.set(bank, Wire(header), 0).map_err(Error::map("HEADERS"))
    }

    fn write_rows<T: IntoBytes + Immutable>(
        &self,
        name: &'static str,
        bank: u32,
        rows: &[T],
    ) -> Result<(), Error> {
        let keys: Vec<u32> = (0..rows.len()).map(|index| element(bank, index)).collect();
        write_elements(&self.open(name)?, &keys, rows).map_err(Error::map(name))
    }

    /// Puts a bank in force, for every connect that begins from now on.
    pub(crate) fn flip(&self, bank: u32) -> Result<(), Error> {
        self.set_first("ACTIVE", u64::from(bank))
    }

    /// Puts a bank in force, and says that it is the last.
    pub(crate) fn close(&self, bank: u32) -> Result<(), Error> {
        self.set_first("ACTIVE", u64::from(bank) | CLOSED)
    }

    /// Whether the last bank is in force: the instance is not up any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.first::<u64>("ACTIVE").is_ok_and(|active| active & CLOSED != 0)
    }

    /// Removes by what services are found in a bank that is not in force.
    pub(crate) fn clear_services(&self, bank: u32) -> Result<(), Error> {
        self.retain::<SlotKey, u32>("SLOTS", |key| key.bank != u64::from(bank))?;
        self.retain::<IdentityKey, u64>("IDENTITIES", |key| key.bank != u64::from(bank))
    }

    /// Writes the contexts that `before` does not have. Those of its own never change: a filter's
    /// id is never given to another one. But one that never came to be in force may have left its
    /// context under the id that another one gets now.
    pub(crate) fn add_contexts(
        &self,
        before: &Policy,
        compiled: &CompiledPolicy,
    ) -> Result<(), Error> {
        let mut contexts = self.hash::<u64, Context>("CONTEXTS")?;
        let is_new = |filter| before.filter_by_id(filter).is_none();
        for (filter, bytes) in compiled.contexts().filter(|(filter, _)| is_new(*filter)) {
            let added = contexts.insert(Wire(filter), Wire(Context::new(bytes)), 0);
            added.map_err(Error::map("CONTEXTS"))?;
        }
        Ok(())
    }

    /// Removes the contexts of filters that `policy` does not have.
    pub(crate) fn retain_contexts(&self, policy: &Policy) -> Result<(), Error> {
        self.retain::<u64, Context>("CONTEXTS", |filter| policy.filter_by_id(*filter).is_some())
    }

    /// Notes which cgroup belongs to which service.
    pub(crate) fn add_cgroups(&self, policy: &Policy) -> Result<(), Error> {
        self.add_cgroups_where(policy, |_| true)
    }

    /// The same, for the cgroups of whose id `wanted` says so.
    pub(crate) fn add_cgroups_where(
        &self,
        policy: &Policy,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<(), Error> {
        let mut cgroups = self.hash::<u64, u64>("SVC_CGROUPS")?;
        for service in policy.services().iter().filter(|service| wanted(service.cgroup.id)) {
            let noted = cgroups.insert(Wire(service.cgroup.id), Wire(service.handle), 0);
            noted.map_err(Error::map("SVC_CGROUPS"))?;
        }
        Ok(())
    }

    /// Forgets the cgroups that belong to no service of `policy`.
    pub(crate) fn retain_cgroups(&self, policy: &Policy) -> Result<(), Error> {
        let kept: BTreeSet<u64> = policy.services().iter().map(|s| s.cgroup.id).collect();
        self.retain::<u64, u64>("SVC_CGROUPS", |id| kept.contains(id))
    }

    /// Forgets the listeners of services that `policy` does not have.
    pub(crate) fn retain_listeners(&self, policy: &Policy) -> Result<(), Error> {
        let kept: BTreeSet<u64> = policy.services().iter().map(|s| s.handle).collect();
        self.retain::<ListenerKey, ListenerEntry>("LISTENERS", |key| kept.contains(&key.handle))
    }

    /// The registered listeners.
    pub(crate) fn listeners(&self) -> Result<Vec<(ListenerKey, ListenerEntry)>, Error> {
        let listeners = self.hash::<ListenerKey, ListenerEntry>("LISTENERS")?;
        let entries = listeners.iter().map(|entry| entry.map(|(Wire(k), Wire(v))| (k, v)));
        entries.collect::<Result<_, _>>().map_err(Error::map("LISTENERS"))
    }

    /// Notes a listener in a slot that is free; with `replace`, in one that is taken. `None` if the
    /// slot was taken meanwhile.
    pub(crate) fn add_listener(
        &self,
        key: ListenerKey,
        entry: ListenerEntry,
        replace: bool,
    ) -> Result<Option<()>, Error> {
        const NOEXIST: u64 = 1;
        let mut listeners = self.hash::<ListenerKey, ListenerEntry>("LISTENERS")?;
        let flags = if replace { 0 } else { NOEXIST };
        match listeners.insert(Wire(key), Wire(entry), flags) {
            Ok(()) => Ok(Some(())),
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EEXIST) =>
            {
                Ok(None)
            }
            Err(error) => Err(Error::map("LISTENERS")(error)),
        }
    }

    /// Forgets the listeners with these keys.
    pub(crate) fn remove_listeners(&self, unwanted: &[ListenerKey]) -> Result<(), Error> {
        self.retain::<ListenerKey, ListenerEntry>("LISTENERS", |key| !unwanted.contains(key))
    }

    /// Removes the entries whose keys are not wanted.
    fn retain<K, V>(&self, name: &'static str, wanted: impl Fn(&K) -> bool) -> Result<(), Error>
    where
        K: FromBytes + IntoBytes + Immutable + Copy + 'static,
        V: FromBytes + IntoBytes + Immutable + Copy + 'static,
    {
        let mut map = self.hash::<K, V>(name)?;
        // Collected first: the kernel starts over when the key that it comes from is gone.
        let unwanted: Vec<_> = map
            .keys()
            .filter(|key| key.as_ref().is_ok_and(|Wire(key)| !wanted(key)))
            .collect::<Result<_, _>>()
            .map_err(Error::map(name))?;
        for key in unwanted {
            map.remove(&key).map_err(Error::map(name))?;
        }
        Ok(())
    }

    /// The counters, summed over the processors.
    pub(crate) fn counters(&self) -> Result<Vec<(Counter, u64)>, Error> {
        const NAME: &str = "COUNTERS";
        let counters: PerCpuArray<_, u64> =
            Map::PerCpuArray(self.open(NAME)?).try_into().map_err(Error::map::<MapError>(NAME))?;
        let sum = |(counter, _): (Counter, _)| {
            let values = counters.get(&(counter as u32), 0).map_err(Error::map(NAME))?;
            Ok((counter, values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value))))
        };
        Counter::ALL.into_iter().map(sum).collect()
    }
}

/// Kernel memory of a map in bytes, as the kernel tells it.
fn memory_of(map: &MapData) -> Result<u64, Error> {
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).map_err(Error::io("read", path))?;
    let told = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(told.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or_default())
}

/// Services' names by their handles, for those who show them.
pub(crate) fn service_names(policy: &Policy) -> BTreeMap<u64, String> {
    policy.services().iter().map(|service| (service.handle, service.name.clone())).collect()
}

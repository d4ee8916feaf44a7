//! The record in the form in which it goes to other hosts.
//!
//! A record names services by redirect handles, numbers of one instance, and is sealed with that
//! instance's key: on another host it says nothing. A *portable record* names them by their
//! [identities](identity), which are the same everywhere. The kernel makes one of the record of a flow
//! ([`Record::export`]), user mode seals it and takes it to the other host, and the kernel there makes a
//! record of its own instance of it ([`Record::import`]).
//!
//! What it says of services is kept whole: one that a host does not have is a *stranger* there, a hop of
//! the handle 0, whose identity goes on to the next host. So a service that the flow has had on the first host
//! is known on the third one, whatever the second one has. Strangers count like services that were removed:
//! who trusts by name does not trust them.
//!
//! Layout: that of a [`Record`], version 1, in which
//!
//! | offset | field |
//! |---|---|
//! | 0 | magic, the bytes `CRNP` |
//! | 4 | version, 1 |
//! | 8, 16, 32 | MAC, epoch and time of issue are zero: to seal it is for whoever carries it |
//! | 24 | the flow's number on the host that it comes from |
//! | 404 | the flags, as they were there |
//! | 408 + 16 n | the identity of hop `n`, 64 bits, 0 where it is not known; then 64 bits that nobody reads, written as 0 |

use zerocopy::{FromBytes as _, IntoBytes as _};

#[cfg(feature = "host")]
use crate::siphash::{Key, hash};
use crate::{
    address::{AF_INET, AF_INET6, Endpoint},
    chain::hop_limit,
    record::{
        AppIdentity, FileId, HEADER_LENGTH, Hop, MAX_HOPS, MAX_PATH, MAX_RECORD, RECORD_ADOPTED,
        RECORD_HOPS_GUESSED, RECORD_IDENTITY_GUESSED, RECORD_IMPORTED, Record, RecordError,
        VERSION, length_with,
    },
    table::{NO_SLOT, Step, Tables},
};

/// The first four bytes of a portable record, `CRNP`, as a little-endian number.
pub const PORTABLE_MAGIC: u32 = u32::from_le_bytes(*b"CRNP");
/// The layout that this crate reads and writes.
pub const PORTABLE_VERSION: u16 = 1;

/// The identity of no service.
pub const NO_IDENTITY: u64 = 0;

/// The flags that a record can have.
const FLAGS: u32 = RECORD_ADOPTED | RECORD_IDENTITY_GUESSED | RECORD_HOPS_GUESSED | RECORD_IMPORTED;

/// The key of the identities: the bytes `carnet-identity1`. It is no secret, since every host has to have
/// it.
#[cfg(feature = "host")]
const IDENTITY_KEY: Key = [u64::from_le_bytes(*b"carnet-i"), u64::from_le_bytes(*b"dentity1")];

/// What a service is on every host: SipHash-2-4, under a key that everybody knows, over the provider's name,
/// a zero byte and the service's name. Services of two hosts are the same one if their names, and
/// those of their providers, are. Never [`NO_IDENTITY`].
#[cfg(feature = "host")]
pub fn identity(provider: &str, service: &str) -> u64 {
    let names = [provider.as_bytes(), &[0], service.as_bytes()].concat();
    match hash(&IDENTITY_KEY, &names) {
        NO_IDENTITY => 1,
        identity => identity,
    }
}

impl Record {
    /// Makes the record portable.
    #[inline(always)]
    pub fn export<T: Tables>(&mut self, tables: &T) {
        T::repeat(MAX_HOPS as u32, &mut Exporting { tables, record: self });
        self.magic = PORTABLE_MAGIC;
        self.version = PORTABLE_VERSION;
        (self.mac, self.epoch, self.issued_ns) = (0, 0, 0);
    }

    /// Whether the fixed fields of a portable record of `given` bytes agree with each other, and are such
    /// as a host gives out.
    #[inline(always)]
    pub const fn is_portable(&self, given: usize) -> bool {
        self.magic == PORTABLE_MAGIC
            && self.version == PORTABLE_VERSION
            && self.hop_count >= 1
            && self.hop_count <= MAX_HOPS as u32
            && self.length == length_with(self.hop_count)
            && self.length as usize == given
            && (self.mac | self.epoch | self.issued_ns) == 0
            && self.legs >= self.hop_count
            && self.legs <= MAX_HOPS as u32
            && self.flags & !FLAGS == 0
            // Shifted by what is less than 32.
            && (self.guessed >> (self.hop_count - 1)) >> 1 == 0
            && self.app.path_length <= MAX_PATH as u32
            && is_destination(&self.destination)
    }

    /// Makes of a portable record of `given` bytes one of this host, but for its epoch, number, time of issue
    /// and MAC, which it has yet to get.
    ///
    /// Each service becomes the one that this host has under its identity, or a stranger. `own`, the service
    /// that takes the flow over, becomes the newest hop, as it had the flow here, unless it is in the record for
    /// certain; 0 adds none. That was one leg. What the other host says of the application is kept as far
    /// as it means something here: its names and the numbers of its process and users, but neither its file,
    /// which no filter of this host can mean, nor other numbers of that host's kernel.
    ///
    /// # Errors
    /// [`RecordError::Malformed`]; [`RecordError::Endless`] if the flow has made as many legs as it may, or
    /// there is no room for another hop. The record is then of no use.
    #[inline(always)]
    pub fn import<T: Tables>(
        &mut self,
        tables: &T,
        given: usize,
        own: u64,
    ) -> Result<(), RecordError> {
        if !self.is_portable(given) {
            return Err(RecordError::Malformed);
        }
        let zero = T::forget(0);
        let mut importing =
            Importing { tables, record: self, own, strangers: zero, is_there: zero };
        T::repeat(MAX_HOPS as u32, &mut importing);
        let Importing { strangers, is_there, .. } = importing;
        let services = tables.header().map_or(0, |header| header.services);
        // As at a connect: one that would end there begins not at all.
        if self.legs >= hop_limit(services.wrapping_add(strangers)) {
            return Err(RecordError::Endless);
        }
        if own != 0 && is_there == 0 && !self.push(Hop { handle: own, filter: 0 }) {
            return Err(RecordError::Endless);
        }
        self.legs += 1;
        self.magic = crate::record::MAGIC;
        self.version = VERSION;
        self.flags |= RECORD_IMPORTED;
        self.app.executable = FileId { device: 0, inode: 0 };
        (self.app.cgroup, self.app.netns, self.app.started_ns) = (0, 0, 0);
        Ok(())
    }
}

/// Whether a destination is one that a connect can ask for, in the form in which it is kept.
#[inline(always)]
const fn is_destination(destination: &Endpoint) -> bool {
    destination.zero == 0
        && (destination.family == AF_INET6
            || (destination.family == AF_INET && destination.is_ipv4()))
}

struct Exporting<'a, T> {
    tables: &'a T,
    record: &'a mut Record,
}

impl<T: Tables> Step for Exporting<'_, T> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let Some(hop) = self.record.hop_mut(index) else {
            return false;
        };
        let identity = if hop.handle == 0 {
            // A stranger's.
            hop.filter
        } else {
            match self.tables.slot_of(hop.handle) {
                NO_SLOT => NO_IDENTITY,
                slot => self.tables.service(slot).map_or(NO_IDENTITY, |service| service.identity),
            }
        };
        *hop = Hop { handle: identity, filter: 0 };
        true
    }
}

struct Importing<'a, T> {
    tables: &'a T,
    record: &'a mut Record,
    own: u64,
    strangers: u32,
    /// Not 0: the own service is in the record for certain.
    is_there: u32,
}

impl<T: Tables> Step for Importing<'_, T> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let is_certain = !self.record.is_guessed(index);
        let Some(hop) = self.record.hop_mut(index) else {
            return false;
        };
        let identity = hop.handle;
        let handle = if identity == NO_IDENTITY { 0 } else { self.tables.handle_of(identity) };
        let is_stranger = handle == 0;
        *hop = Hop { handle, filter: if is_stranger { identity } else { 0 } };
        self.strangers = T::forget(self.strangers.wrapping_add(is_stranger as u32));
        let is_own = handle == self.own && is_certain;
        self.is_there = T::forget(self.is_there | is_own as u32);
        true
    }
}

/// A portable record, for those who read it in user mode. It is not authenticated by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortableRecord(Record);

impl PortableRecord {
    /// Reads one; `None` if these bytes are none.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut whole = [0; MAX_RECORD];
        whole.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let record = Record::read_from_bytes(&whole).ok()?;
        record.is_portable(bytes.len()).then_some(Self(record))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        let bytes = self.0.as_bytes();
        bytes.get(..self.0.length.into()).unwrap_or(bytes)
    }

    /// The flow's number on the host that it comes from.
    pub const fn flow(&self) -> u64 {
        self.0.flow
    }

    /// Redirected legs of the flow so far, on all hosts.
    pub const fn legs(&self) -> u32 {
        self.0.legs
    }

    /// Where the application wanted to go.
    pub const fn destination(&self) -> &Endpoint {
        &self.0.destination
    }

    /// The application, as the host says with which the flow began. Its numbers are that host's.
    pub const fn app(&self) -> &AppIdentity {
        &self.0.app
    }

    /// The identities of the services that the flow has had, oldest first; [`NO_IDENTITY`] where it is not
    /// known.
    pub fn identities(&self) -> impl ExactSizeIterator<Item = u64> {
        let hops = (self.0.length as usize - HEADER_LENGTH) / size_of::<Hop>();
        self.0.hops.into_iter().take(hops).map(|hop| hop.handle)
    }
}

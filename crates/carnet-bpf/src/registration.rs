//! Registering a socket as one on which a service takes flows.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use carnet_core::{
    abi::{LISTENER_SLOTS, errno},
    address::Endpoint,
    event::EventKind,
    flow::{ListenerEntry, ListenerKey, Registration, SAME_NAMESPACE},
    table::{Repeat as _, Step},
};

use crate::{
    bank::{Bank, repeat},
    maps::{LISTENERS, REGISTERED},
    report::event_of_caller,
    socket::Socket,
};

/// Notes a socket that is bound to `local` as the service's that `registration` names. An errno says
/// why it cannot be.
#[inline(always)]
pub(crate) fn register(
    socket: Socket,
    local: &Endpoint,
    protocol: u32,
    registration: Registration,
) -> Result<(), i32> {
    let Registration { handle, netns } = registration;
    let Some(registered) = socket.get_or_create(&REGISTERED) else {
        return Err(errno::ENOMEM);
    };
    let mut search = SlotSearch {
        key: ListenerKey {
            handle,
            netns,
            family: local.family,
            protocol: protocol as u16,
            slot: 0,
        },
        entry: ListenerEntry {
            local: *local,
            missed: 0,
            home: netns,
            home_id: SAME_NAMESPACE,
            zero: 0,
        },
        free: Bank::forget(LISTENER_SLOTS),
        done: false,
    };
    repeat(LISTENER_SLOTS, &mut search);
    if !search.done {
        if search.free >= LISTENER_SLOTS {
            return Err(errno::ENOSPC);
        }
        search.key.slot = search.free;
        if LISTENERS.insert(&search.key, &search.entry, BPF_ANY.into()).is_err() {
            return Err(errno::ENOMEM);
        }
    }
    *registered = Registration { handle, netns };
    event_of_caller(EventKind::ListenerRegistered as u32, |event| {
        event.handle = handle;
        event.requested = *local;
        event.protocol = protocol;
        event.netns = netns;
    });
    Ok(())
}

/// The search for the slot of a listener: the one that it has already, else one that is free, else
/// one whose listener was missed.
struct SlotSearch {
    key: ListenerKey,
    entry: ListenerEntry,
    free: u32,
    done: bool,
}

impl Step for SlotSearch {
    #[inline(always)]
    fn step(&mut self, slot: u32) -> bool {
        self.key.slot = slot;
        match LISTENERS.get_ptr_mut(&self.key) {
            None => {
                // Two processes may take the same free slot at the same time: only one gets it.
                self.done = LISTENERS.insert(&self.key, &self.entry, BPF_NOEXIST.into()).is_ok();
                !self.done
            }
            Some(entry) => {
                // SAFETY: the entry stays allocated until the program ends.
                let entry = unsafe { &mut *entry };
                // One of another network namespace stays until the administrator takes it back.
                if entry.home != self.entry.home {
                    return true;
                }
                if entry.local.is_same(&self.entry.local) {
                    entry.missed = 0;
                    self.done = true;
                    return false;
                }
                if entry.missed != 0 && self.free >= LISTENER_SLOTS {
                    self.free = slot;
                }
                true
            }
        }
    }
}

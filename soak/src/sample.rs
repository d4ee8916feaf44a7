//! What the kernel keeps at one moment.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use carnet_engine::{Account, MapStatus};
use carnet_testbed::NetworkNamespace;

use crate::memory::{Bytes, MemoryGroup};
use crate::site::Site;

/// Descriptors that a process has open.
///
/// # Errors
/// When it is gone.
pub(crate) fn descriptors(process: u32) -> Result<usize> {
    let path = format!("/proc/{process}/fd");
    let entries = fs::read_dir(&path).with_context(|| format!("listing {path}"))?;
    Ok(entries.count())
}

/// Resident memory of a process, in bytes.
///
/// # Errors
/// When it is gone.
pub(crate) fn resident(process: u32) -> Result<Bytes> {
    let path = format!("/proc/{process}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB"));
    let kilobytes: u64 = kilobytes.context("no VmRSS")?.trim().parse()?;
    Ok(kilobytes * 1024)
}

/// Sockets of a network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sockets {
    /// TCP sockets in use, of both families.
    pub(crate) tcp: u64,
    /// UDP sockets in use, of both families.
    pub(crate) udp: u64,
}

impl Sockets {
    /// Those of a namespace.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn of(namespace: &NetworkNamespace) -> Result<Self> {
        let read = |name: &'static str| {
            let text =
                namespace.run(|| fs::read_to_string(format!("/proc/thread-self/net/{name}")))?;
            text.with_context(|| format!("reading {name}"))
        };
        let text = read("sockstat")? + &read("sockstat6")?;
        let value = |protocol: &str| {
            let mut words = text.lines().find_map(|line| line.strip_prefix(protocol))?.split(' ');
            words.find(|word| *word == "inuse")?;
            words.next()?.parse::<u64>().ok()
        };
        let sum = |lines: [&str; 2]| lines.iter().filter_map(|line| value(line)).sum();
        Ok(Self { tcp: sum(["TCP:", "TCP6:"]), udp: sum(["UDP:", "UDP6:"]) })
    }
}

/// What is kept at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// Kernel memory of all of it; `None` where it is not accounted.
    pub(crate) kernel: Option<Bytes>,
    /// The maps, by their names.
    pub(crate) maps: BTreeMap<&'static str, MapStatus>,
    /// Open descriptors: of this process, the server, and each service's process.
    pub(crate) descriptors: BTreeMap<String, usize>,
    /// Sockets of both namespaces.
    pub(crate) sockets: Sockets,
    /// What became of the redirects.
    pub(crate) account: Account,
}

impl Sample {
    /// Takes one.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn take(site: &Site, memory: Option<&MemoryGroup>) -> Result<Self> {
        let status = site.engine.status()?;
        let mut descriptors = BTreeMap::new();
        descriptors.insert("orchestrator".to_owned(), self::descriptors(std::process::id())?);
        descriptors.insert("server".to_owned(), self::descriptors(site.server.id())?);
        for (name, worker) in crate::board::SERVICES.iter().zip(&site.workers) {
            if let Some(worker) = worker {
                descriptors.insert((*name).to_owned(), self::descriptors(worker.id())?);
            }
        }
        let [near, far] = [&site.topology.client, &site.topology.destination].map(Sockets::of);
        let (near, far) = (near?, far?);
        Ok(Self {
            kernel: memory.map(MemoryGroup::kernel).transpose()?,
            maps: status.maps.into_iter().map(|map| (map.name, map)).collect(),
            descriptors,
            sockets: Sockets { tcp: near.tcp + far.tcp, udp: near.udp + far.udp },
            account: status.account,
        })
    }
}

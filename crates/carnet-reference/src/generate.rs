//! Random policies and destinations, from whatever makes choices: a generator of random numbers, or
//! the bytes of a fuzzer.
//!
//! Uniform randomness would hit no boundary. So the addresses come from a few networks, the prefixes
//! nest, and a destination is often the first or last that a filter matches, or the one beside it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use carnet_core::object::{
    CgroupCondition, Conditions, Context, ExecutableCondition, FailurePolicy, FilterAction,
    NetnsCondition, NewFilter, Policy, PolicyError, PortRange, Prefix, Protocol, Trust, UserRange,
    Weight,
};

/// Makes choices.
pub trait Choices {
    /// A number below `end`, which is not 0.
    fn below(&mut self, end: u64) -> u64;

    /// True once in `n` times.
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of these, of which there is one at least.
    fn pick<'a, T>(&mut self, values: &'a [T]) -> &'a T {
        &values[self.below(values.len() as u64) as usize]
    }
}

/// What conditions can name beside destinations.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Cgroups in which, or in whose subtrees, processes connect.
    pub cgroups: Vec<CgroupCondition>,
    /// Programs that connect.
    pub executables: Vec<ExecutableCondition>,
    /// Network namespaces in which processes connect.
    pub namespaces: Vec<NetnsCondition>,
}

/// Users around which ranges begin and end.
pub const USERS: [u32; 7] = [0, 1, 999, 1000, 1001, 1999, 65_534];

const PROTOCOLS: [Protocol; 2] = [Protocol::TCP, Protocol::UDP];
const PORTS: [u16; 12] = [1, 22, 53, 79, 80, 81, 442, 443, 444, 8080, 65_534, 65_535];
const NETWORKS_V4: [[u8; 4]; 4] =
    [[10, 1, 2, 0], [10, 1, 128, 0], [192, 0, 2, 0], [203, 0, 113, 0]];
const NETWORKS_V6: [u128; 3] = [0x2001_0db8 << 96, 0x2001_0db8_0001 << 80, 0xfd00_0001 << 96];
const LENGTHS_V4: [u8; 11] = [0, 1, 8, 15, 16, 17, 23, 24, 30, 31, 32];
const LENGTHS_V6: [u8; 11] = [0, 1, 7, 32, 47, 48, 64, 95, 96, 127, 128];
const GROUPS: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(224, 0, 1, 1)),
    IpAddr::V4(Ipv4Addr::new(239, 255, 255, 255)),
    IpAddr::V4(Ipv4Addr::BROADCAST),
    IpAddr::V6(Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 1)),
];

/// Replaces all sublayers and filters of a policy by random ones, up to `most_filters`, and says
/// anew of every service what happens when it is missing and whom it trusts. The first provider gets
/// the sublayers.
///
/// # Errors
/// [`PolicyError`], never if the policy has a provider.
pub fn replace(
    policy: &mut Policy,
    world: &World,
    most_filters: u64,
    choices: &mut impl Choices,
) -> Result<(), PolicyError> {
    clear(policy)?;
    let services: Vec<String> = policy.services().iter().map(|s| s.name.clone()).collect();
    for name in &services {
        let on_failure = if choices.one_in(2) { FailurePolicy::Skip } else { FailurePolicy::Block };
        policy.set_on_failure(name, on_failure)?;
        policy.set_trust(name, trust(name, &services, choices))?;
    }
    let provider = policy.providers().first().map_or_else(String::new, |p| p.name.clone());
    let layers = 1 + choices.below(5);
    for layer in 0..layers {
        // Few weights, so that some are equal.
        policy.add_sublayer(&format!("layer{layer}"), &provider, choices.below(4) as u16)?;
    }
    // Small policies are as telling as large ones, and a mismatch in them easier to read.
    let most = *choices.pick(&[1, 4, 12, 40, most_filters]);
    for _ in 0..1 + choices.below(most.min(most_filters)) {
        let sublayer = format!("layer{}", choices.below(layers));
        let weight = if choices.one_in(2) { Weight::Auto } else { Weight::Exact(choices.below(4)) };
        let conditions = conditions(world, choices);
        let action = action(&services, choices);
        policy.add_filter(NewFilter { name: None, sublayer, weight, conditions, action })?;
    }
    Ok(())
}

/// Removes all sublayers and filters.
///
/// # Errors
/// None: nothing refers to a filter, and to a sublayer filters alone.
pub fn clear(policy: &mut Policy) -> Result<(), PolicyError> {
    let filters: Vec<u64> = policy.filters().iter().map(|filter| filter.id).collect();
    for filter in filters {
        policy.remove_filter(&filter.to_string())?;
    }
    let sublayers: Vec<u64> = policy.sublayers().iter().map(|sublayer| sublayer.id).collect();
    for sublayer in sublayers {
        policy.remove_sublayer(&sublayer.to_string())?;
    }
    Ok(())
}

fn trust(name: &str, services: &[String], choices: &mut impl Choices) -> Trust {
    match choices.below(5) {
        0..=2 => Trust::None,
        3 => Trust::All,
        _ => {
            let others = services.iter().filter(|other| *other != name);
            Trust::Services(others.filter(|_| !choices.one_in(3)).cloned().collect())
        }
    }
}

fn action(services: &[String], choices: &mut impl Choices) -> FilterAction {
    match choices.below(9) {
        0 | 1 => FilterAction::Permit { hard: choices.one_in(2) },
        2 | 3 => FilterAction::Block { hard: choices.one_in(2), veto: choices.one_in(3) },
        _ if services.is_empty() => FilterAction::BLOCK,
        _ => {
            let service = choices.pick(services).clone();
            let text = || format!("for {service}");
            let context = choices.one_in(3).then(|| Context::new(text())).and_then(Result::ok);
            FilterAction::Redirect { service, context }
        }
    }
}

fn conditions(world: &World, choices: &mut impl Choices) -> Conditions {
    Conditions {
        protocols: some(4, choices, |choices| Some(*choices.pick(&PROTOCOLS))),
        destinations: some(2, choices, |choices| prefix(choices)),
        ports: some(2, choices, ports),
        users: some(5, choices, users),
        cgroups: some(5, choices, |choices| known(&world.cgroups, choices)),
        executables: some(6, choices, |choices| known(&world.executables, choices)),
        original_executables: some(6, choices, |choices| known(&world.executables, choices)),
        network_namespaces: some(8, choices, |choices| known(&world.namespaces, choices)),
    }
}

/// Once in `n` times one to three values, else none.
fn some<C: Choices, T>(n: u64, choices: &mut C, value: impl Fn(&mut C) -> Option<T>) -> Vec<T> {
    if !choices.one_in(n) {
        return Vec::new();
    }
    (0..1 + choices.below(3)).filter_map(|_| value(choices)).collect()
}

fn known<T: Clone>(values: &[T], choices: &mut impl Choices) -> Option<T> {
    if values.is_empty() { None } else { Some(choices.pick(values).clone()) }
}

fn prefix(choices: &mut impl Choices) -> Option<Prefix> {
    let (address, length) = match address(choices) {
        IpAddr::V4(ip) => {
            let length = *choices.pick(&LENGTHS_V4);
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            (IpAddr::V4((ip.to_bits() & mask).into()), length)
        }
        IpAddr::V6(ip) => {
            let length = *choices.pick(&LENGTHS_V6);
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            (IpAddr::V6((ip.to_bits() & mask).into()), length)
        }
    };
    Prefix::new(address, length).ok()
}

fn ports(choices: &mut impl Choices) -> Option<PortRange> {
    let (a, b) = (*choices.pick(&PORTS), *choices.pick(&PORTS));
    if choices.one_in(2) { Some(a.into()) } else { PortRange::new(a.min(b), a.max(b)) }
}

fn users(choices: &mut impl Choices) -> Option<UserRange> {
    let (a, b) = (*choices.pick(&USERS), *choices.pick(&USERS));
    UserRange::new(a.min(b), a.max(b))
}

/// An address in one of the few networks.
fn address(choices: &mut impl Choices) -> IpAddr {
    let host = *choices.pick(&[0, 1, 2, 3, 127, 128, 254, 255]);
    if choices.one_in(3) {
        IpAddr::V6((*choices.pick(&NETWORKS_V6) | host).into())
    } else {
        let [a, b, c, _] = *choices.pick(&NETWORKS_V4);
        IpAddr::V4([a, b, c, host as u8].into())
    }
}

/// A protocol and a destination, often at a boundary of one of the policy's filters. One in IPv4 is in
/// a third of the cases that of an IPv6 socket (`::ffff:a.b.c.d`). Every destination is such that a
/// host which routes everything sends there: no loopback, nothing unspecified, groups for UDP alone.
pub fn destination(policy: &Policy, choices: &mut impl Choices) -> (Protocol, SocketAddr) {
    let protocol = if choices.one_in(3) { Protocol::UDP } else { Protocol::TCP };
    let filters = policy.filters();
    let (mut ip, mut port) = (address(choices), *choices.pick(&PORTS));
    if !filters.is_empty() && !choices.one_in(4) {
        let conditions = &choices.pick(filters).conditions;
        if !conditions.destinations.is_empty() {
            ip = beside(choices.pick(&conditions.destinations), choices).unwrap_or(ip);
        }
        if !conditions.ports.is_empty() {
            let ports = choices.pick(&conditions.ports);
            let (first, last) = (ports.first(), ports.last());
            port = *choices.pick(&[
                first,
                last,
                first.saturating_sub(1).max(1),
                last.saturating_add(1),
            ]);
        }
    }
    if protocol == Protocol::UDP && choices.one_in(16) {
        ip = *choices.pick(&GROUPS);
    }
    if let IpAddr::V4(v4) = ip
        && choices.one_in(3)
        && !v4.is_broadcast()
        && !v4.is_multicast()
    {
        ip = v4.to_ipv6_mapped().into();
    }
    (protocol, SocketAddr::new(ip, port))
}

/// The first or last address of a prefix, or one beside it, if one can be sent there.
fn beside(prefix: &Prefix, choices: &mut impl Choices) -> Option<IpAddr> {
    let which = choices.below(4);
    let of = |first: u128, size: u128| match which {
        0 => first,
        1 => first.wrapping_add(size),
        2 => first.wrapping_sub(1),
        _ => first.wrapping_add(size).wrapping_add(1),
    };
    let length = u32::from(prefix.length());
    let ip = match prefix.address() {
        IpAddr::V4(ip) => {
            let size = u32::MAX.checked_shr(length).unwrap_or(0);
            IpAddr::V4((of(ip.to_bits().into(), size.into()) as u32).into())
        }
        IpAddr::V6(ip) => {
            let size = u128::MAX.checked_shr(length).unwrap_or(0);
            IpAddr::V6(of(ip.to_bits(), size).into())
        }
    };
    is_ordinary(ip).then_some(ip)
}

/// Whether any host can be asked to send there: unicast, neither loopback nor unspecified nor reserved.
fn is_ordinary(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, second, ..] = ip.octets();
            // 198.18.0.0/15 is for the hosts' own addresses.
            !matches!(first, 0 | 127 | 224..) && (first, second & 0xfe) != (198, 18)
        }
        // Global unicast, and the unique local addresses of `NETWORKS_V6`.
        IpAddr::V6(ip) => matches!(ip.segments()[0], 0x2000..=0x3fff | 0xfd00 | 0xfcff),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting(u64);

    impl Choices for Counting {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) % end
        }
    }

    #[test]
    fn every_policy_is_whole_and_every_destination_can_be_sent_to() {
        let mut choices = Counting(1);
        for _ in 0..200 {
            let mut policy = Policy::new();
            policy.add_provider("p", "").unwrap();
            replace(&mut policy, &World::default(), 40, &mut choices).unwrap();
            assert!((1..=40).contains(&policy.filters().len()));
            assert_eq!(Policy::from_bytes(&policy.to_bytes()).unwrap(), policy);
            for _ in 0..40 {
                let (protocol, to) = destination(&policy, &mut choices);
                let ip = to.ip().to_canonical();
                assert!(to.port() != 0 && !ip.is_loopback() && !ip.is_unspecified(), "{to}");
                assert!(protocol == Protocol::UDP || !ip.is_multicast(), "{to}");
            }
        }
    }
}

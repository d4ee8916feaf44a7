//! Who may do what through the control interface.
//!
//! A service is a cgroup: a process is of the service that owns the nearest of its cgroups. What counts
//! is the process that makes the call, at the moment of the call, not who made or passed the socket,
//! and not its user.
//!
//! Questions are answered to whoever holds the accepted socket (contract S30 and Q6 name no error for
//! lack of privilege there), but for the context, which is between a provider and its own service.

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Redirect handle of the service that the calling process is of; 0 for none.
    pub service: u64,
    /// Whether it has `CAP_NET_ADMIN` in the initial user namespace.
    pub privileged: bool,
}

impl Caller {
    /// Whether the caller may set records and register listeners at all.
    #[inline(always)]
    pub const fn may_act(&self) -> bool {
        self.service != 0 || self.privileged
    }

    /// Whether the caller may set a record that was delivered to the service with this handle, that is of
    /// its newest hop (contract S30): a service's process the records of that service, whatever its
    /// privileges; a privileged process of no service any record.
    ///
    /// It may set it as often as it likes, on any socket and for any destination (S55): a service tries
    /// other addresses of the same name, and tries again.
    #[inline(always)]
    pub const fn may_set(&self, delivered_to: u64) -> bool {
        if self.service == 0 { self.privileged } else { self.service == delivered_to }
    }

    /// Whether the caller may take over flows of other hosts, whose records it then makes: as the process of
    /// a service that the policy calls a gateway; or as a privileged one of no service. Whoever may decides
    /// which services a flow passes by.
    #[inline(always)]
    pub const fn may_import(&self, gateway: bool) -> bool {
        if self.service == 0 { self.privileged } else { gateway }
    }

    /// Whether the caller may register a listener for the service with this handle.
    #[inline(always)]
    pub const fn may_register(&self, handle: u64) -> bool {
        handle != 0 && (handle == self.service || self.privileged)
    }

    /// Whether the caller may read the context of a connection that was delivered to the service with
    /// this handle: not if it is of another service (contract S51, S53).
    #[inline(always)]
    pub const fn may_read_context(&self, delivered_to: u64) -> bool {
        self.service == 0 || self.service == delivered_to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_service_to_which_it_was_delivered_sets_a_record() {
        for privileged in [false, true] {
            let may = |service, delivered_to| Caller { service, privileged }.may_set(delivered_to);
            assert!(may(7, 7) && !may(7, 8) && !may(8, 7) && !may(7, 0));
            assert_eq!(may(0, 7), privileged);
        }
    }

    #[test]
    fn only_a_gateway_takes_over_flows_of_other_hosts() {
        for privileged in [false, true] {
            let may = |service, gateway| Caller { service, privileged }.may_import(gateway);
            assert!(may(7, true) && !may(7, false));
            // No service at all is a gateway, whatever is said of it.
            assert_eq!((may(0, false), may(0, true)), (privileged, privileged));
        }
    }

    #[test]
    fn who_registers_for_whom() {
        let may = |service, privileged, handle| Caller { service, privileged }.may_register(handle);
        assert!(may(7, false, 7) && !may(7, false, 8) && may(7, true, 8));
        assert!(!may(0, false, 7) && may(0, true, 7));
        assert!(!may(0, true, 0) && !may(0, false, 0));
        let acts = |service, privileged| Caller { service, privileged }.may_act();
        assert!(acts(7, false) && acts(0, true) && !acts(0, false));
    }

    #[test]
    fn a_context_is_not_for_another_service_however_privileged() {
        for privileged in [false, true] {
            let may = |service| Caller { service, privileged }.may_read_context(7);
            assert!(may(7) && may(0) && !may(8));
        }
    }
}

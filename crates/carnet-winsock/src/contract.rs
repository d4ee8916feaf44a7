//! Numbers and tables of the calling contract. Nothing here calls anything.

/// Control codes.
pub(crate) mod code {
    pub(crate) const QUERY_REDIRECT_RECORDS: u32 = vendor_in(220);
    pub(crate) const QUERY_REDIRECT_CONTEXT: u32 = vendor_in(221);
    pub(crate) const SET_REDIRECT_RECORDS: u32 = vendor_in(222);
    pub(crate) const QUERY_ALE_ENDPOINT_HANDLE: u32 = super::OUT | super::VENDOR | 205;
    pub(crate) const KEEPALIVE_VALS: u32 = vendor_in(4);
    pub(crate) const FLUSH: u32 = 0x2800_0004;
    pub(crate) const GET_EXTENSION_FUNCTION_POINTER: u32 = 0xC800_0006;
    pub(crate) const FIONBIO: u32 = 0x8004_667E;
    pub(crate) const FIONREAD: u32 = 0x4004_667F;

    /// `_WSAIOW(IOC_VENDOR, number)`.
    pub(crate) const fn vendor_in(number: u16) -> u32 {
        super::IN | super::VENDOR | number as u32
    }
}

const IN: u32 = 1 << 31;
const OUT: u32 = 1 << 30;
const VOID: u32 = 1 << 29;
/// The family type of vendors' codes.
const VENDOR: u32 = 3 << 27;

/// The fields of a control code (contract Q1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) input: bool,
    pub(crate) output: bool,
    pub(crate) void: bool,
    /// 0 Unix, 1 Winsock 2, 2 an address family, 3 a vendor.
    pub(crate) family_type: u8,
    /// The vendor or address family.
    pub(crate) family: u16,
    pub(crate) number: u16,
}

/// Takes a control code apart.
pub(crate) const fn fields(code: u32) -> Fields {
    Fields {
        input: code & IN != 0,
        output: code & OUT != 0,
        void: code & VOID != 0,
        family_type: (code >> 27 & 3) as u8,
        family: (code >> 16 & 0x7ff) as u16,
        number: code as u16,
    }
}

/// What a control code asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    QueryRecords,
    QueryContext,
    SetRecords,
    Flush,
    NonBlocking,
    ReadableBytes,
    KeepAlive,
    ExtensionFunction,
    EndpointHandle,
    /// The number of one of the three codes in a code of another direction (S34a).
    Malformed,
    /// None of the above (S37a).
    Unknown,
}

/// Decides on the whole value: the direction of the two queries says input, though they return
/// data (Q1).
pub(crate) const fn control(code: u32) -> Control {
    match code {
        code::QUERY_REDIRECT_RECORDS => Control::QueryRecords,
        code::QUERY_REDIRECT_CONTEXT => Control::QueryContext,
        code::SET_REDIRECT_RECORDS => Control::SetRecords,
        code::FLUSH => Control::Flush,
        code::FIONBIO => Control::NonBlocking,
        code::FIONREAD => Control::ReadableBytes,
        code::KEEPALIVE_VALS => Control::KeepAlive,
        code::GET_EXTENSION_FUNCTION_POINTER => Control::ExtensionFunction,
        code::QUERY_ALE_ENDPOINT_HANDLE => Control::EndpointHandle,
        other => match fields(other) {
            Fields { family_type: 3, family: 0, number: 220..=222, .. } => Control::Malformed,
            _ => Control::Unknown,
        },
    }
}

/// Codes that `WSAGetLastError` returns.
pub(crate) mod wsa {
    pub(crate) const INVALID_HANDLE: i32 = 6;
    pub(crate) const INVALID_PARAMETER: i32 = 87;
    pub(crate) const INSUFFICIENT_BUFFER: i32 = 122;
    pub(crate) const OPERATION_ABORTED: i32 = 995;
    pub(crate) const IO_INCOMPLETE: i32 = 996;
    pub(crate) const IO_PENDING: i32 = 997;
    pub(crate) const NOT_FOUND: i32 = 1168;
    pub(crate) const EINTR: i32 = 10004;
    pub(crate) const EACCES: i32 = 10013;
    pub(crate) const EFAULT: i32 = 10014;
    pub(crate) const EINVAL: i32 = 10022;
    pub(crate) const EMFILE: i32 = 10024;
    pub(crate) const EWOULDBLOCK: i32 = 10035;
    pub(crate) const EINPROGRESS: i32 = 10036;
    pub(crate) const EALREADY: i32 = 10037;
    pub(crate) const ENOTSOCK: i32 = 10038;
    pub(crate) const EDESTADDRREQ: i32 = 10039;
    pub(crate) const EMSGSIZE: i32 = 10040;
    pub(crate) const EPROTOTYPE: i32 = 10041;
    pub(crate) const ENOPROTOOPT: i32 = 10042;
    pub(crate) const EPROTONOSUPPORT: i32 = 10043;
    pub(crate) const ESOCKTNOSUPPORT: i32 = 10044;
    pub(crate) const EOPNOTSUPP: i32 = 10045;
    pub(crate) const EPFNOSUPPORT: i32 = 10046;
    pub(crate) const EAFNOSUPPORT: i32 = 10047;
    pub(crate) const EADDRINUSE: i32 = 10048;
    pub(crate) const EADDRNOTAVAIL: i32 = 10049;
    pub(crate) const ENETDOWN: i32 = 10050;
    pub(crate) const ENETUNREACH: i32 = 10051;
    pub(crate) const ENETRESET: i32 = 10052;
    pub(crate) const ECONNABORTED: i32 = 10053;
    pub(crate) const ECONNRESET: i32 = 10054;
    pub(crate) const ENOBUFS: i32 = 10055;
    pub(crate) const EISCONN: i32 = 10056;
    pub(crate) const ENOTCONN: i32 = 10057;
    pub(crate) const ESHUTDOWN: i32 = 10058;
    pub(crate) const ETOOMANYREFS: i32 = 10059;
    pub(crate) const ETIMEDOUT: i32 = 10060;
    pub(crate) const ECONNREFUSED: i32 = 10061;
    pub(crate) const ELOOP: i32 = 10062;
    pub(crate) const ENAMETOOLONG: i32 = 10063;
    pub(crate) const EHOSTDOWN: i32 = 10064;
    pub(crate) const EHOSTUNREACH: i32 = 10065;
    pub(crate) const VERNOTSUPPORTED: i32 = 10092;
    pub(crate) const NOTINITIALISED: i32 = 10093;
    /// A raw status of the filtering platform: no record, or no context (Q8, X9).
    pub(crate) const FWP_E_NOT_FOUND: i32 = 0x8032_0008_u32 as i32;
}

/// Statuses, as `Internal` of a `WSAOVERLAPPED` holds them.
pub(crate) mod status {
    pub(crate) const SUCCESS: u32 = 0;
    pub(crate) const PENDING: u32 = 0x103;
    pub(crate) const BUFFER_OVERFLOW: u32 = 0x8000_0005;
    pub(crate) const NOT_IMPLEMENTED: u32 = 0xC000_0002;
    pub(crate) const ACCESS_VIOLATION: u32 = 0xC000_0005;
    pub(crate) const PAGEFILE_QUOTA: u32 = 0xC000_0007;
    pub(crate) const INVALID_HANDLE: u32 = 0xC000_0008;
    pub(crate) const INVALID_PARAMETER: u32 = 0xC000_000D;
    pub(crate) const NO_SUCH_DEVICE: u32 = 0xC000_000E;
    pub(crate) const NO_SUCH_FILE: u32 = 0xC000_000F;
    pub(crate) const NO_MEMORY: u32 = 0xC000_0017;
    pub(crate) const ACCESS_DENIED: u32 = 0xC000_0022;
    pub(crate) const BUFFER_TOO_SMALL: u32 = 0xC000_0023;
    pub(crate) const OBJECT_TYPE_MISMATCH: u32 = 0xC000_0024;
    pub(crate) const OBJECT_NAME_NOT_FOUND: u32 = 0xC000_0034;
    pub(crate) const OBJECT_PATH_NOT_FOUND: u32 = 0xC000_003A;
    pub(crate) const QUOTA_EXCEEDED: u32 = 0xC000_0044;
    pub(crate) const TOO_MANY_PAGING_FILES: u32 = 0xC000_0097;
    pub(crate) const INSUFFICIENT_RESOURCES: u32 = 0xC000_009A;
    pub(crate) const WORKING_SET_QUOTA: u32 = 0xC000_00A1;
    pub(crate) const DEVICE_NOT_READY: u32 = 0xC000_00A3;
    pub(crate) const IO_TIMEOUT: u32 = 0xC000_00B5;
    pub(crate) const NOT_SUPPORTED: u32 = 0xC000_00BB;
    pub(crate) const NETWORK_BUSY: u32 = 0xC000_00BF;
    pub(crate) const REQUEST_NOT_ACCEPTED: u32 = 0xC000_00D0;
    pub(crate) const CANCELLED: u32 = 0xC000_0120;
    pub(crate) const PAGEFILE_QUOTA_EXCEEDED: u32 = 0xC000_012C;
    pub(crate) const COMMITMENT_LIMIT: u32 = 0xC000_012D;
    pub(crate) const REMOTE_RESOURCES: u32 = 0xC000_013D;
    pub(crate) const INVALID_CONNECTION: u32 = 0xC000_0140;
    pub(crate) const INVALID_BUFFER_SIZE: u32 = 0xC000_0206;
    pub(crate) const CONNECTION_ACTIVE: u32 = 0xC000_023B;
    pub(crate) const REQUEST_ABORTED: u32 = 0xC000_0240;
    pub(crate) const DATATYPE_MISALIGNMENT_ERROR: u32 = 0xC000_02C5;
    pub(crate) const FWP_NOT_FOUND: u32 = 0xC022_0008;
}

/// The Winsock error that a status is translated into; 0 for a success (W43).
pub(crate) const fn error_of_status(status: u32) -> i32 {
    use status::*;
    match status {
        PENDING => wsa::IO_INCOMPLETE,
        0..0x8000_0000 => 0,
        BUFFER_OVERFLOW | INVALID_BUFFER_SIZE => wsa::EMSGSIZE,
        NOT_IMPLEMENTED | NOT_SUPPORTED => wsa::EOPNOTSUPP,
        ACCESS_VIOLATION | BUFFER_TOO_SMALL | DATATYPE_MISALIGNMENT_ERROR => wsa::EFAULT,
        INVALID_HANDLE | OBJECT_TYPE_MISMATCH => wsa::ENOTSOCK,
        ACCESS_DENIED => wsa::EACCES,
        CANCELLED => wsa::OPERATION_ABORTED,
        NO_SUCH_DEVICE
        | NO_SUCH_FILE
        | OBJECT_NAME_NOT_FOUND
        | OBJECT_PATH_NOT_FOUND
        | NETWORK_BUSY => wsa::ENETDOWN,
        NO_MEMORY
        | INSUFFICIENT_RESOURCES
        | QUOTA_EXCEEDED
        | PAGEFILE_QUOTA
        | PAGEFILE_QUOTA_EXCEEDED
        | WORKING_SET_QUOTA
        | COMMITMENT_LIMIT
        | TOO_MANY_PAGING_FILES
        | REMOTE_RESOURCES => wsa::ENOBUFS,
        DEVICE_NOT_READY | REQUEST_NOT_ACCEPTED => wsa::EWOULDBLOCK,
        INVALID_CONNECTION => wsa::ENOTCONN,
        CONNECTION_ACTIVE => wsa::EISCONN,
        REQUEST_ABORTED => wsa::EINTR,
        IO_TIMEOUT => wsa::ETIMEDOUT,
        _ => wsa::EINVAL,
    }
}

/// The status that says a Winsock error: what `WPUCompleteOverlappedRequest` stores (W46, W47).
pub(crate) const fn status_of_error(error: i32) -> u32 {
    match error {
        0 => status::SUCCESS,
        wsa::IO_INCOMPLETE | wsa::IO_PENDING => status::PENDING,
        wsa::EMSGSIZE => status::BUFFER_OVERFLOW,
        wsa::EOPNOTSUPP => status::NOT_SUPPORTED,
        wsa::EFAULT => status::ACCESS_VIOLATION,
        wsa::INSUFFICIENT_BUFFER => status::BUFFER_TOO_SMALL,
        wsa::ENOTSOCK => status::INVALID_HANDLE,
        wsa::EACCES => status::ACCESS_DENIED,
        wsa::OPERATION_ABORTED => status::CANCELLED,
        wsa::ENETDOWN => status::NO_SUCH_DEVICE,
        wsa::ENOBUFS => status::INSUFFICIENT_RESOURCES,
        wsa::EWOULDBLOCK => status::DEVICE_NOT_READY,
        wsa::ENOTCONN => status::INVALID_CONNECTION,
        wsa::EISCONN => status::CONNECTION_ACTIVE,
        wsa::EINTR => status::REQUEST_ABORTED,
        wsa::ETIMEDOUT => status::IO_TIMEOUT,
        wsa::FWP_E_NOT_FOUND => status::FWP_NOT_FOUND,
        _ => status::INVALID_PARAMETER,
    }
}

/// The Winsock error of a failed call of a socket function.
pub(crate) fn error_of_errno(errno: i32) -> i32 {
    match errno {
        libc::EINTR => wsa::EINTR,
        // Not even a descriptor is not a socket either (S36).
        libc::EBADF | libc::ENOTSOCK => wsa::ENOTSOCK,
        libc::EACCES | libc::EPERM => wsa::EACCES,
        libc::EFAULT => wsa::EFAULT,
        libc::EINVAL => wsa::EINVAL,
        libc::EMFILE | libc::ENFILE => wsa::EMFILE,
        // A connect that has begun says so in this way (Linux has a code of its own for it).
        libc::EAGAIN | libc::EINPROGRESS => wsa::EWOULDBLOCK,
        libc::EALREADY => wsa::EALREADY,
        libc::EDESTADDRREQ => wsa::EDESTADDRREQ,
        libc::EMSGSIZE => wsa::EMSGSIZE,
        libc::EPROTOTYPE => wsa::EPROTOTYPE,
        libc::ENOPROTOOPT => wsa::ENOPROTOOPT,
        libc::EPROTONOSUPPORT => wsa::EPROTONOSUPPORT,
        libc::ESOCKTNOSUPPORT => wsa::ESOCKTNOSUPPORT,
        libc::EOPNOTSUPP => wsa::EOPNOTSUPP,
        libc::EPFNOSUPPORT => wsa::EPFNOSUPPORT,
        libc::EAFNOSUPPORT => wsa::EAFNOSUPPORT,
        libc::EADDRINUSE => wsa::EADDRINUSE,
        libc::EADDRNOTAVAIL => wsa::EADDRNOTAVAIL,
        libc::ENETDOWN => wsa::ENETDOWN,
        libc::ENETUNREACH => wsa::ENETUNREACH,
        libc::ENETRESET => wsa::ENETRESET,
        libc::ECONNABORTED => wsa::ECONNABORTED,
        libc::ECONNRESET => wsa::ECONNRESET,
        libc::ENOBUFS | libc::ENOMEM => wsa::ENOBUFS,
        libc::EISCONN => wsa::EISCONN,
        libc::ENOTCONN => wsa::ENOTCONN,
        libc::EPIPE | libc::ESHUTDOWN => wsa::ESHUTDOWN,
        libc::ETOOMANYREFS => wsa::ETOOMANYREFS,
        libc::ETIMEDOUT => wsa::ETIMEDOUT,
        libc::ECONNREFUSED => wsa::ECONNREFUSED,
        libc::ELOOP => wsa::ELOOP,
        libc::ENAMETOOLONG => wsa::ENAMETOOLONG,
        libc::EHOSTDOWN => wsa::EHOSTDOWN,
        libc::EHOSTUNREACH => wsa::EHOSTUNREACH,
        _ => wsa::EINVAL,
    }
}

/// Why a control code failed: one code for a call that waits for the answer, a status for one that
/// does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The buffer is too small; the answer has so many bytes (Q5, X3).
    BufferTooSmall {
        needed: u32,
    },
    /// No record or no context (X9).
    NotFound,
    AccessDenied,
    Fault,
    Invalid,
    NotSupported,
    NetDown,
    NotConnected,
    NotASocket,
    NoBuffers,
}

impl Failure {
    /// What the engine's errno stands for on a TCP socket (`docs/abi.md`). That the socket is one
    /// was checked: `EOPNOTSUPP` says that no engine answered.
    pub(crate) fn of_option(errno: i32) -> Self {
        match errno {
            libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::ENETDOWN => Self::NetDown,
            libc::ENOTCONN => Self::NotConnected,
            libc::ENODATA => Self::NotFound,
            libc::EACCES | libc::EPERM => Self::AccessDenied,
            libc::EFAULT => Self::Fault,
            libc::EBADF | libc::ENOTSOCK => Self::NotASocket,
            libc::ENOMEM | libc::ENOBUFS => Self::NoBuffers,
            _ => Self::Invalid,
        }
    }

    /// What a call that waited reports.
    pub(crate) const fn code(self) -> i32 {
        match self {
            Self::BufferTooSmall { .. } => wsa::INSUFFICIENT_BUFFER,
            Self::NotFound => wsa::FWP_E_NOT_FOUND,
            Self::AccessDenied => wsa::EACCES,
            Self::Fault => wsa::EFAULT,
            Self::Invalid => wsa::EINVAL,
            Self::NotSupported => wsa::EOPNOTSUPP,
            Self::NetDown => wsa::ENETDOWN,
            Self::NotConnected => wsa::ENOTCONN,
            Self::NotASocket => wsa::ENOTSOCK,
            Self::NoBuffers => wsa::ENOBUFS,
        }
    }

    /// What a completion reports.
    pub(crate) const fn status(self) -> u32 {
        status_of_error(self.code())
    }

    /// What is left in the count of returned bytes by a call that waited.
    pub(crate) const fn returned(self) -> u32 {
        match self {
            Self::BufferTooSmall { needed } => needed,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILURES: [Failure; 10] = [
        Failure::BufferTooSmall { needed: 7 },
        Failure::NotFound,
        Failure::AccessDenied,
        Failure::Fault,
        Failure::Invalid,
        Failure::NotSupported,
        Failure::NetDown,
        Failure::NotConnected,
        Failure::NotASocket,
        Failure::NoBuffers,
    ];

    #[test]
    fn the_three_codes_have_windows_values_and_say_input() {
        let codes = [
            (0x9800_00DC, 220, Control::QueryRecords),
            (0x9800_00DD, 221, Control::QueryContext),
            (0x9800_00DE, 222, Control::SetRecords),
        ];
        for (code, number, expected) in codes {
            assert_eq!(code, code::vendor_in(number));
            assert_eq!(control(code), expected);
            let said = fields(code);
            assert_eq!((said.input, said.output, said.void), (true, false, false));
            assert_eq!((said.family_type, said.family, said.number), (3, 0, number));
        }
        assert_eq!(control(0x5800_00CD), Control::EndpointHandle);
        assert_eq!(control(0x9800_0004), Control::KeepAlive);
    }

    #[test]
    fn neighbours_are_unknown_and_wrong_directions_malformed() {
        for code in [0x9800_00DB, 0x9800_00DF, 0xdead_beef, 0x667e, 0x8004_667D, 0, u32::MAX] {
            assert_eq!(control(code), Control::Unknown, "{code:#x}");
        }
        for number in 220..=222 {
            for direction in 0..8_u32 {
                let code = direction << 29 | VENDOR | number;
                let wrong = direction << 29 != IN;
                assert_eq!(control(code) == Control::Malformed, wrong, "{code:#x}");
                // Another vendor's, or not a vendor's.
                for other in [code | 1 << 16, code & !VENDOR | 1 << 27] {
                    assert_eq!(control(other), Control::Unknown, "{other:#x}");
                }
            }
        }
    }

    /// The ranges in which statuses lie, and every one of W43 by its number.
    #[test]
    #[cfg_attr(miri, ignore = "a third of a million numbers, and no memory")]
    fn the_table_of_statuses_is_exhaustive() {
        let rows: [(i32, &[u32]); 13] = [
            (10040, &[0x8000_0005, 0xC000_0206]),
            (10045, &[0xC000_0002, 0xC000_00BB]),
            (10014, &[0xC000_0005, 0xC000_0023, 0xC000_02C5]),
            (10038, &[0xC000_0008, 0xC000_0024]),
            (10013, &[0xC000_0022]),
            (995, &[0xC000_0120]),
            (10050, &[0xC000_000E, 0xC000_000F, 0xC000_0034, 0xC000_003A, 0xC000_00BF]),
            (
                10055,
                &[
                    0xC000_0007,
                    0xC000_0017,
                    0xC000_0044,
                    0xC000_0097,
                    0xC000_009A,
                    0xC000_00A1,
                    0xC000_012C,
                    0xC000_012D,
                    0xC000_013D,
                ],
            ),
            (10035, &[0xC000_00A3, 0xC000_00D0]),
            (10057, &[0xC000_0140]),
            (10056, &[0xC000_023B]),
            (10004, &[0xC000_0240]),
            (10060, &[0xC000_00B5]),
        ];
        let expected = |status: u32| {
            rows.iter().find(|(_, statuses)| statuses.contains(&status)).map_or(10022, |row| row.0)
        };
        for high in [0x8000_0000_u32, 0xC000_0000, 0xC022_0000, 0xFFFF_0000] {
            for status in high..=high + 0xffff {
                assert_eq!(error_of_status(status), expected(status), "{status:#x}");
            }
        }
        for status in (0..0x1_0000).chain([0x4000_0000, 0x7FFF_FFFF]) {
            let expected = if status == 0x103 { 996 } else { 0 };
            assert_eq!(error_of_status(status), expected, "{status:#x}");
        }
    }

    #[test]
    fn a_completion_reports_what_a_call_would_but_for_two_decisions() {
        for failure in FAILURES {
            let completed = error_of_status(failure.status());
            match failure {
                // X3 and X9: statuses that have no Winsock code of their own.
                Failure::BufferTooSmall { .. } => assert_eq!(completed, 10014),
                Failure::NotFound => assert_eq!(completed, 10022),
                _ => assert_eq!(completed, failure.code()),
            }
        }
        assert_eq!(Failure::NotFound.code(), -2_144_206_840);
        assert_eq!(Failure::BufferTooSmall { needed: 7 }.code(), 122);
    }

    #[test]
    #[cfg_attr(miri, ignore = "every status in turn, and no memory")]
    fn statuses_and_errors_are_inverse() {
        for error in 0..11_000 {
            let back = error_of_status(status_of_error(error));
            match error {
                996 | 997 => assert_eq!(back, 996),
                122 => assert_eq!(back, 10014),
                0 | 995 | 10004 | 10013 | 10014 | 10035 | 10038 | 10040 | 10045 | 10050 | 10055
                | 10056 | 10057 | 10060 => assert_eq!(back, error),
                _ => assert_eq!(back, 10022, "{error}"),
            }
        }
    }

    #[test]
    fn no_errno_makes_set_say_what_only_a_query_says() {
        // S38: the kernel never gives ENOTCONN for a SET, and nothing else becomes 10057 or 10042.
        for errno in (1..=133).filter(|&errno| errno != libc::ENOTCONN) {
            let code = Failure::of_option(errno).code();
            assert!(code != wsa::ENOTCONN && code != wsa::ENOPROTOOPT, "errno {errno}");
        }
    }

    #[test]
    fn every_errno_has_a_winsock_code() {
        for errno in 1..=133 {
            let code = error_of_errno(errno);
            assert!((10004..=10065).contains(&code), "errno {errno}: {code}");
        }
        assert_eq!(error_of_errno(libc::EINPROGRESS), wsa::EWOULDBLOCK);
        assert_eq!(error_of_errno(libc::EBADF), wsa::ENOTSOCK);
    }
}

//! What the error codes of the three Windows control codes mean.
//!
//! Only numbers and rules, so that they are tested on every system; the calls themselves are in
//! `sys/windows.rs`.

use crate::error::{Error, Operation};
use crate::growth::Attempt;
use std::io;

const ERROR_INSUFFICIENT_BUFFER: i32 = 122;
const ERROR_NOT_FOUND: i32 = 1168;
const WSAEACCES: i32 = 10013;
const WSAEFAULT: i32 = 10014;
const WSAEINVAL: i32 = 10022;
const WSAEMSGSIZE: i32 = 10040;
const WSAENOPROTOOPT: i32 = 10042;
const WSAEOPNOTSUPP: i32 = 10045;
const WSAENOBUFS: i32 = 10055;
const WSAENOTCONN: i32 = 10057;
/// Also what the backend says of a request that does not come back (contract C59).
pub(crate) const WSAETIMEDOUT: i32 = 10060;
/// A raw status of the filtering platform, which comes through as it is (contract Q8).
const FWP_E_NOT_FOUND: i32 = 0x8032_0008_u32 as i32;

const STATUS_BUFFER_TOO_SMALL: u32 = 0xC000_0023;
const STATUS_NOT_FOUND: u32 = 0xC000_0225;
const STATUS_FWP_NOT_FOUND: u32 = 0xC022_0008;

/// The error code of an overlapped request: `code` as Winsock translates it, made more exact by the
/// NTSTATUS with which the request came back. Winsock has one code for many (contract W43, X9).
pub(crate) fn refined(code: i32, status: u32) -> i32 {
    match (code, status) {
        (WSAEFAULT, STATUS_BUFFER_TOO_SMALL) => ERROR_INSUFFICIENT_BUFFER,
        (WSAEINVAL, STATUS_NOT_FOUND | STATUS_FWP_NOT_FOUND) => FWP_E_NOT_FOUND,
        (code, _) => code,
    }
}

/// The outcome of a query: `result` is the number of bytes that the call returned or its error
/// code, `returned` what it left in the count of returned bytes, `offered` the buffer's size.
///
/// # Errors
/// All that a larger buffer cannot cure.
pub(crate) fn query_outcome(
    operation: Operation,
    result: Result<(), i32>,
    returned: usize,
    offered: usize,
) -> Result<Attempt, Error> {
    let needed = (returned > offered).then_some(returned);
    match result {
        Ok(()) if returned > offered => Ok(Attempt::TooSmall {
            needed,
            otherwise: Error::InvalidAnswer { operation, length: returned },
        }),
        Ok(()) => Ok(Attempt::Filled(returned)),
        Err(ERROR_INSUFFICIENT_BUFFER | WSAEFAULT | WSAENOBUFS | WSAEMSGSIZE) => {
            Ok(Attempt::TooSmall {
                needed,
                otherwise: Error::InvalidAnswer { operation, length: returned },
            })
        }
        // One page of the documentation says so of a short buffer, and all of them say so of a
        // wrong socket: it is one until the largest buffer has been tried (contract Q5, X3).
        Err(WSAEINVAL) if returned == 0 => {
            Ok(Attempt::TooSmall { needed: None, otherwise: explain(operation, WSAEINVAL) })
        }
        Err(code) => Err(explain(operation, code)),
    }
}

/// The error that `code` stands for.
pub(crate) fn explain(operation: Operation, code: i32) -> Error {
    match code {
        WSAEACCES => Error::AccessDenied { operation },
        WSAEINVAL if operation == Operation::SetRedirectRecords => Error::InvalidRecord,
        // Of an overlapped query for the context, it may mean that there is none (contract X9). A
        // wrong socket is found out by the query for the record, which follows.
        WSAEINVAL if operation == Operation::QueryRedirectContext => {
            Error::NotRedirected { operation }
        }
        WSAEINVAL => Error::WrongSocket { operation },
        WSAENOTCONN => Error::NotConnected { operation },
        FWP_E_NOT_FOUND | ERROR_NOT_FOUND => Error::NotRedirected { operation },
        WSAENOPROTOOPT | WSAEOPNOTSUPP => Error::Unsupported { operation },
        WSAETIMEDOUT => Error::TimedOut { operation },
        code => Error::Os { operation, source: io::Error::from_raw_os_error(code) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::growth::read_growing;

    const QUERY: Operation = Operation::QueryRedirectRecords;

    #[test]
    fn every_way_to_say_too_small_grows_the_buffer() {
        for code in [ERROR_INSUFFICIENT_BUFFER, WSAEFAULT, WSAENOBUFS, WSAEMSGSIZE, WSAEINVAL] {
            let length = 6000;
            let answer = read_growing(QUERY, |buffer| match buffer.get_mut(..length) {
                Some(target) => {
                    target.fill(1);
                    query_outcome(QUERY, Ok(()), length, buffer.len())
                }
                None => query_outcome(QUERY, Err(code), 0, buffer.len()),
            });
            assert_eq!(answer.unwrap(), vec![1; length], "code {code}");
        }
    }

    #[test]
    fn the_needed_length_is_taken_from_an_error_and_from_a_success() {
        for result in [Err(ERROR_INSUFFICIENT_BUFFER), Ok(())] {
            let attempt = query_outcome(QUERY, result, 3000, 2048).unwrap();
            assert!(matches!(attempt, Attempt::TooSmall { needed: Some(3000), .. }));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri clears half a megabyte byte by byte")]
    fn an_invalid_argument_to_the_end_is_a_wrong_socket() {
        let answer = read_growing(QUERY, |b| query_outcome(QUERY, Err(WSAEINVAL), 0, b.len()));
        assert!(matches!(answer, Err(Error::WrongSocket { .. })));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri clears half a megabyte byte by byte")]
    fn an_invalid_argument_to_the_end_may_be_no_context() {
        let context = Operation::QueryRedirectContext;
        let answer = read_growing(context, |b| query_outcome(context, Err(WSAEINVAL), 0, b.len()));
        assert!(matches!(answer, Err(Error::NotRedirected { .. })));
    }

    #[test]
    fn the_status_of_an_overlapped_request_tells_more_than_its_code() {
        const STATUS_INVALID_PARAMETER: u32 = 0xC000_000D;
        const STATUS_ACCESS_VIOLATION: u32 = 0xC000_0005;
        for (code, status, refined_code) in [
            (WSAEFAULT, STATUS_BUFFER_TOO_SMALL, ERROR_INSUFFICIENT_BUFFER),
            (WSAEFAULT, STATUS_ACCESS_VIOLATION, WSAEFAULT),
            (WSAEINVAL, STATUS_NOT_FOUND, FWP_E_NOT_FOUND),
            (WSAEINVAL, STATUS_FWP_NOT_FOUND, FWP_E_NOT_FOUND),
            (WSAEINVAL, STATUS_INVALID_PARAMETER, WSAEINVAL),
            // Where a provider keeps no status, Winsock's own word stands.
            (WSAEACCES, STATUS_NOT_FOUND, WSAEACCES),
        ] {
            assert_eq!(refined(code, status), refined_code, "{code}, {status:#x}");
        }
    }

    #[test]
    fn codes_become_errors() {
        use Operation::{QueryRedirectContext as Context, SetRedirectRecords as Set};
        assert!(matches!(explain(Set, WSAEINVAL), Error::InvalidRecord));
        assert!(matches!(explain(Set, WSAEACCES), Error::AccessDenied { operation: Set }));
        assert!(matches!(explain(QUERY, WSAENOTCONN), Error::NotConnected { .. }));
        assert!(matches!(explain(Context, FWP_E_NOT_FOUND), Error::NotRedirected { .. }));
        assert!(matches!(explain(QUERY, WSAEOPNOTSUPP), Error::Unsupported { .. }));
        assert!(matches!(explain(QUERY, WSAENOPROTOOPT), Error::Unsupported { .. }));
        assert!(matches!(explain(QUERY, WSAETIMEDOUT), Error::TimedOut { operation: QUERY }));
        assert!(matches!(explain(QUERY, 10038), Error::Os { source, .. }
            if source.raw_os_error() == Some(10038)));
        assert_eq!(FWP_E_NOT_FOUND, -2_144_206_840);
    }
}

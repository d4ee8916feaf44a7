//! Which argument gives which error, in which order; and that none of them crashes.

use super::*;
use crate::memory::tests::Pages;
use crate::thread::CompletionRoutine;

const REDIRECTION: [u32; 3] = [QUERY_RECORDS, QUERY_CONTEXT, SET_RECORDS];

#[test]
fn what_reaches_the_kernel_is_answered_by_no_engine() {
    let socket = Owned::overlapped();
    let mut buffer = [7_u8; 2048];
    for code in [QUERY_RECORDS, QUERY_CONTEXT] {
        assert_eq!(Arguments::new(&socket, code).output(&mut buffer).both(), (10050, 0));
        // The input of a query is not looked at (Q2).
        let bad_input =
            Arguments { input: (std::ptr::dangling_mut(), 4), ..Arguments::new(&socket, code) };
        assert_eq!(bad_input.both(), (10050, 0));
    }
    assert_eq!(Arguments::new(&socket, SET_RECORDS).input(&[1; 100]).both(), (10050, 0));
    assert_eq!(buffer, [7; 2048]);
}

#[test]
fn not_a_socket_comes_first() {
    start();
    let file = std::fs::File::open("/dev/null").unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let handles = [
        std::os::fd::AsRawFd::as_raw_fd(&file) as usize,
        std::os::fd::AsRawFd::as_raw_fd(&reader) as usize,
        usize::MAX,
        1 << 40,
        i32::MAX as usize,
    ];
    for handle in handles {
        for code in REDIRECTION.into_iter().chain([FLUSH, UNKNOWN]) {
            let socket = Owned(handle);
            let call = Arguments::new(&socket, code);
            std::mem::forget(socket);
            assert_eq!(call.both(), (10038, UNTOUCHED));
            // SAFETY: nothing is written through null.
            assert_eq!(unsafe { call.application() }, 10038, "W36");
        }
    }
}

#[test]
fn the_count_comes_before_the_code() {
    let socket = Owned::overlapped();
    let pages = Pages::new();
    let operation = Operation::new();
    let bad: [*mut u32; 4] = [null_mut(), pages.at(1, 0), pages.at(2, -2), pages.at(2, 0)];
    for code in REDIRECTION.into_iter().chain([FLUSH, UNKNOWN, 0x8004_667E]) {
        for returned in bad {
            let call = Arguments { returned, ..Arguments::new(&socket, code).input(&[1; 16]) };
            for call in [call, call.overlapped(&operation), call.overlapped(&operation).routine()] {
                // SAFETY: there is no memory that could be written.
                assert_eq!(unsafe { (call.application(), call.provider()) }, (10014, 10014));
            }
        }
    }
    assert!(operation.untouched());
    assert_eq!(SleepEx(0, 1), 0, "W14: no completion");
}

#[test]
fn unknown_and_malformed_codes() {
    let socket = Owned::overlapped();
    for code in [UNKNOWN, 0x8004_667D, 0x667e, 0, u32::MAX, 0x9800_00DB, 0x9800_00DF] {
        assert_eq!(Arguments::new(&socket, code).both(), (10045, 0), "{code:#x}");
    }
    for code in [0x5800_00DE, 0x3800_00DC, 0xD800_00DD, 0x1800_00DE] {
        assert_eq!(Arguments::new(&socket, code).both(), (10022, 0), "S34a {code:#x}");
        let operation = Operation::new();
        let begun = Arguments::new(&socket, code).overlapped(&operation).begin();
        assert_eq!(begun, (10022, UNTOUCHED), "S34a {code:#x}");
        assert!(operation.untouched());
    }
}

#[test]
fn sockets_of_other_kinds() {
    let mut buffer = [0_u8; 64];
    let udp = Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1);
    let udp6 = Owned::of(libc::AF_INET6, libc::SOCK_DGRAM, 1);
    let unix = Owned::of(libc::AF_UNIX, libc::SOCK_STREAM, 1);
    let netlink = Owned::of(libc::AF_NETLINK, libc::SOCK_RAW, 1);
    for (socket, error) in [(&udp, 10022), (&udp6, 10022), (&unix, 10045), (&netlink, 10045)] {
        for code in [QUERY_RECORDS, QUERY_CONTEXT] {
            assert_eq!(Arguments::new(socket, code).output(&mut buffer).both(), (error, 0));
        }
        assert_eq!(Arguments::new(socket, SET_RECORDS).input(&[1; 8]).both(), (error, 0));
    }
}

#[test]
fn the_input_of_set() {
    let socket = Owned::overlapped();
    let pages = Pages::new();
    let set = Arguments::new(&socket, SET_RECORDS);
    // NULL, empty (X12), nowhere, straddling; read-only memory may be read.
    let cases: [(*mut c_void, u32, i32); 8] = [
        (null_mut(), 0, 10014),
        (null_mut(), 100, 10014),
        (pages.at(0, 0), 0, 10014),
        (pages.at(2, 0), 1, 10014),
        (pages.at(2, -99), 100, 10014),
        (pages.at(0, 0), u32::MAX, 10014),
        (pages.at(2, -100), 100, 10050),
        (pages.at(1, 0), 100, 10050),
    ];
    for (place, length, error) in cases {
        let call = Arguments { input: (place, length), ..set };
        assert_eq!(call.both(), (error, 0), "{place:?} {length}");
        if error == 10014 {
            let operation = Operation::new();
            assert_eq!(call.overlapped(&operation).begin(), (10014, UNTOUCHED), "W23");
            assert!(operation.untouched());
        }
    }
}

#[test]
fn the_output_of_set_is_nothing() {
    let socket = Owned::overlapped();
    let pages = Pages::new();
    let set = Arguments::new(&socket, SET_RECORDS).input(&[1; 100]);
    let mut buffer = [7_u8; 4];
    // X6: a size is not acceptable, and no memory is no memory (S31); without a size the pointer is
    // not looked at (S8).
    assert_eq!(set.output(&mut buffer).both(), (10022, 0));
    assert_eq!(buffer, [7; 4]);
    let places: [*mut c_void; 4] = [null_mut(), pages.at(1, 0), pages.at(2, -2), pages.at(2, 0)];
    for place in places {
        assert_eq!(Arguments { output: (place, 4), ..set }.both(), (10014, 0));
        assert_eq!(Arguments { output: (place, 0), ..set }.both(), (10050, 0));
    }
}

#[test]
fn the_output_of_a_query() {
    let [_client, accepted, _listener] = connected();
    let pages = Pages::new();
    let places: [(*mut c_void, u32); 6] = [
        (null_mut(), 4),
        (pages.at(1, 0), 4),
        (pages.at(1, -2), 4),
        (pages.at(2, -2), 4),
        (pages.at(2, 0), 1),
        (pages.at(0, 0), u32::MAX),
    ];
    for code in [QUERY_RECORDS, QUERY_CONTEXT] {
        for output in places {
            let call = Arguments { output, ..Arguments::new(&accepted, code) };
            assert_eq!(call.both(), (10014, 0), "{output:?}");
            let operation = Operation::new();
            assert_eq!(call.overlapped(&operation).begin(), (10014, UNTOUCHED));
            assert!(operation.untouched());
        }
    }
}

#[test]
fn the_state_comes_before_the_pointers() {
    let [client, accepted, listener] = connected();
    let fresh = Owned::overlapped();
    let bad_output = |socket, code| {
        Arguments { output: (null_mut(), 4), ..Arguments::new(socket, code) }.both().0
    };
    for code in [QUERY_RECORDS, QUERY_CONTEXT] {
        assert_eq!(bad_output(&accepted, code), 10014);
        assert_eq!(bad_output(&listener, code), 10057);
        assert_eq!(bad_output(&fresh, code), 10057);
    }
    let bad_input = |socket| {
        Arguments { input: (null_mut(), 4), ..Arguments::new(socket, SET_RECORDS) }.both().0
    };
    assert_eq!(bad_input(&fresh), 10014);
    for socket in [&client, &accepted, &listener] {
        assert_eq!(bad_input(socket), 10022);
    }
}

#[test]
fn the_overlapped_structure_and_the_routine() {
    let socket = Owned::overlapped();
    let pages = Pages::new();
    let operation = Operation::new();
    for code in REDIRECTION.into_iter().chain([UNKNOWN, FLUSH]) {
        let call = Arguments::new(&socket, code).input(&[1; 16]);
        let places: [*mut c_void; 4] =
            [pages.at(1, 0), pages.at(1, -31), pages.at(2, -16), pages.at(2, 0)];
        for overlapped in places {
            assert_eq!(Arguments { overlapped, ..call }.begin(), (10014, UNTOUCHED));
        }
        let nowhere: *mut c_void = pages.at(2, 0);
        // SAFETY: any address that is not null is a valid function pointer, as long as nobody
        // calls it.
        let routine =
            Some(unsafe { std::mem::transmute::<*mut c_void, CompletionRoutine>(nowhere) });
        let call = call.overlapped(&operation);
        assert_eq!(Arguments { routine, ..call }.begin(), (10014, UNTOUCHED));
        assert!(operation.untouched());
    }
    // Ignored without the attribute (S16, S22), whatever they are.
    let plain = Owned::plain();
    let nowhere: *mut c_void = pages.at(2, 0);
    let call = Arguments::new(&plain, SET_RECORDS).input(&[1; 16]);
    assert_eq!(Arguments { overlapped: nowhere, routine: ROUTINE, ..call }.both(), (10050, 0));
}

#[test]
fn a_bad_place_for_the_providers_error_is_no_crash() {
    let socket = Owned::overlapped();
    let pages = Pages::new();
    let places: [*mut i32; 3] = [null_mut(), pages.at(1, 0), pages.at(2, 0)];
    for place in places {
        // SAFETY: there is no memory that could be written.
        let status = unsafe {
            let nothing = null_mut();
            WSPIoctl(
                socket.0,
                UNKNOWN,
                nothing,
                0,
                nothing,
                0,
                null_mut(),
                nothing,
                None,
                nothing,
                place,
            )
        };
        assert_eq!(status, -1);
    }
}

#[test]
fn ordinary_codes() {
    let socket = Owned::overlapped();
    let on = 1_u32.to_ne_bytes();
    let long = [1_u8, 0, 0, 0, 9];
    for input in [&on[..], &long] {
        assert_eq!(Arguments::new(&socket, 0x8004_667E).input(input).both(), (0, 0), "W19, W24");
    }
    // The output of FIONBIO is not looked at (W25).
    let call = Arguments {
        output: (std::ptr::dangling_mut(), 100),
        ..Arguments::new(&socket, 0x8004_667E)
    };
    assert_eq!(call.input(&on).both(), (0, 0));
    for short in [&on[..3], &[]] {
        assert_eq!(Arguments::new(&socket, 0x8004_667E).input(short).both(), (10014, 0), "W22");
    }
    let keepalive = [1_u32, 5000, 1000].map(u32::to_ne_bytes).concat();
    assert_eq!(Arguments::new(&socket, 0x9800_0004).input(&keepalive).both(), (0, 0));
    assert_eq!(Arguments::new(&socket, 0x9800_0004).input(&keepalive[..11]).both(), (10014, 0));
    assert_eq!(crate::sys::get_int(socket.0 as i32, 6, libc::TCP_KEEPIDLE), Ok(5));

    let mut cookie = [0; 8];
    let call = Arguments::new(&socket, 0x5800_00CD).output(&mut cookie);
    assert_eq!(call.both(), (0, 8));
    assert_eq!(u64::from_ne_bytes(cookie), crate::sys::cookie(socket.0 as i32).unwrap());
    let mut count = [9; 4];
    let udp = Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1);
    assert_eq!(Arguments::new(&udp, 0x4004_667F).output(&mut count).both(), (0, 4));
    assert_eq!(count, [0; 4]);

    let mut function = [0; 8];
    let unknown = Arguments::new(&socket, 0xC800_0006).output(&mut function).input(&[3; 16]);
    assert_eq!(unknown.both(), (10022, 0));
    let operation = Operation::new();
    assert_eq!(unknown.overlapped(&operation).begin(), (10022, UNTOUCHED), "W30");
    assert!(operation.untouched());
}

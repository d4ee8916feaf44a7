//! The other functions: sockets, options, messages.

use super::*;

fn error(status: i32) -> i32 {
    assert_eq!(status, -1);
    WSAGetLastError()
}

fn set(socket: &Owned, level: i32, option: i32, value: u32) -> Result<(), i32> {
    let value = value.to_ne_bytes();
    let pointer = value.as_ptr().cast();
    match carnet_winsock_setsockopt(socket.0, level, option, pointer, 4) {
        0 => Ok(()),
        status => Err(error(status)),
    }
}

fn get(socket: &Owned, level: i32, option: i32) -> Result<u32, i32> {
    let (mut value, mut length) = ([0xff; 4], 4);
    let pointer = value.as_mut_ptr().cast();
    // SAFETY: as long as said.
    match unsafe { carnet_winsock_getsockopt(socket.0, level, option, pointer, &raw mut length) } {
        0 => {
            assert_eq!(length, 4);
            Ok(u32::from_ne_bytes(value))
        }
        status => Err(error(status)),
    }
}

#[test]
fn ancillary_data_is_for_udp_and_raw_sockets() {
    let udp = Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1);
    let udp6 = Owned::of(libc::AF_INET6, libc::SOCK_DGRAM, 1);
    let tcp = Owned::overlapped();
    let tcp6 = Owned::of(libc::AF_INET6, libc::SOCK_STREAM, 1);
    for option in [60, 70] {
        for (socket, level) in [(&udp, 0), (&udp6, 0), (&udp6, 41)] {
            assert_eq!(get(socket, level, option), Ok(0), "U2: asked for, not given");
            assert_eq!(set(socket, level, option, 1), Ok(()));
            assert_eq!(get(socket, level, option), Ok(1));
        }
        assert_eq!(set(&udp, 41, option, 1), Err(10042));
        for (socket, level) in [(&tcp, 0), (&tcp6, 0), (&tcp6, 41)] {
            assert_eq!(get(socket, level, option), Err(10022), "U3");
            assert_eq!(set(socket, level, option, 1), Err(10022), "U3");
        }
    }
    assert_eq!(set(&udp6, 41, 70, 0), Ok(()));
    assert_eq!((get(&udp6, 41, 60), get(&udp6, 41, 70)), (Ok(1), Ok(0)));
    assert_eq!(get(&udp, 0, 999), Err(10042), "an unknown one");
}

#[test]
fn options_with_a_meaning_of_their_own() {
    let socket = Owned::overlapped();
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        assert_eq!(set(&socket, libc::SOL_SOCKET, option, 1500), Ok(()));
        assert_eq!(get(&socket, libc::SOL_SOCKET, option), Ok(1500));
    }
    let exclusive = !libc::SO_REUSEADDR;
    assert_eq!(get(&socket, libc::SOL_SOCKET, exclusive), Ok(1));
    assert_eq!(set(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1), Ok(()));
    assert_eq!(get(&socket, libc::SOL_SOCKET, exclusive), Ok(0));
    assert_eq!(set(&socket, libc::SOL_SOCKET, exclusive, 1), Ok(()));
    assert_eq!(get(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR), Ok(0));
    assert_eq!(get(&socket, libc::IPPROTO_TCP, libc::TCP_NODELAY), Ok(0));

    let pages = crate::memory::tests::Pages::new();
    let mut length = 4;
    // SAFETY: there is no memory for the value, and the length is valid.
    let status = unsafe {
        let length = &raw mut length;
        carnet_winsock_getsockopt(
            socket.0,
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            pages.at(2, -2),
            length,
        )
    };
    assert_eq!(error(status), 10014);
}

#[test]
fn the_error_of_a_connect_is_winsocks() {
    let _alone = waiting();
    // Nobody listens on a port that was bound and never listened on.
    let bound = Owned::overlapped();
    let address = bind_to_loopback(&bound);
    let socket = Owned::overlapped();
    let mut on = 1_u32;
    // SAFETY: valid; FIONBIO, as a negative long.
    assert_eq!(unsafe { ioctlsocket(socket.0, -0x7FFB_9982, &raw mut on) }, 0);
    let length = size_of::<libc::sockaddr_in>() as i32;
    // SAFETY: as long as said.
    let status = unsafe { carnet_winsock_connect(socket.0, (&raw const address).cast(), length) };
    // On the loopback the refusal may be there at once.
    if error(status) == 10035 {
        let (mut write, mut except) = ([1, socket.0], [1, socket.0]);
        // SAFETY: sets of one socket; no timeout.
        let count = unsafe {
            let except = except.as_mut_ptr().cast();
            carnet_winsock_select(0, null_mut(), write.as_mut_ptr().cast(), except, null_mut())
        };
        assert_eq!((count, write[0] as u32, except[0] as u32), (2, 1, 1));
        assert_eq!(get(&socket, libc::SOL_SOCKET, libc::SO_ERROR), Ok(10061));
    } else {
        assert_eq!(WSAGetLastError(), 10061);
    }
}

#[test]
fn accepted_sockets_are_like_their_listener() {
    for (flags, nonblocking) in [(0, true), (1, false)] {
        let listener = Owned::of(libc::AF_INET, libc::SOCK_STREAM, flags);
        let address = bind_to_loopback(&listener);
        assert_eq!(carnet_winsock_listen(listener.0, 5), 0);
        let client = Owned::overlapped();
        let length = size_of::<libc::sockaddr_in>() as i32;
        let address = (&raw const address).cast();
        // SAFETY: as long as said.
        assert_eq!(unsafe { carnet_winsock_connect(client.0, address, length) }, 0);
        crate::sys::set_nonblocking(listener.0 as i32, nonblocking).unwrap();
        // SAFETY: no address is asked for.
        let accepted = Owned(unsafe { carnet_winsock_accept(listener.0, null_mut(), null_mut()) });
        assert_eq!(crate::sys::is_nonblocking(accepted.0 as i32), Ok(nonblocking));
        let found = crate::process::process().sockets.find(accepted.0).unwrap();
        assert_eq!(found.attributes.overlapped, flags == 1);
    }
}

#[test]
fn bytes_pass_and_errors_are_winsocks() {
    let [client, accepted, listener] = connected();
    // SAFETY: as long as said, here and below.
    unsafe {
        assert_eq!(carnet_winsock_send(client.0, c"hello".as_ptr(), 5, 0), 5);
        let mut buffer = [0_i8; 8];
        assert_eq!(carnet_winsock_recv(accepted.0, buffer.as_mut_ptr().cast(), 8, 0), 5);
        assert_eq!(buffer[..5], *b"hello".map(|byte| byte as i8).as_slice());
        assert_eq!(carnet_winsock_shutdown(client.0, 1), 0);
        // No signal, but an error.
        assert_eq!(error(carnet_winsock_send(client.0, c"x".as_ptr(), 1, 0)), 10058);
        assert_eq!(carnet_winsock_recv(accepted.0, buffer.as_mut_ptr().cast(), 8, 0), 0);
        assert_eq!(WSAGetLastError(), 0, "W35");
        assert_eq!(error(carnet_winsock_recv(listener.0, buffer.as_mut_ptr().cast(), 8, 0)), 10057);
        assert_eq!(error(carnet_winsock_recv(usize::MAX, buffer.as_mut_ptr().cast(), 8, 0)), 10038);
        let pages = crate::memory::tests::Pages::new();
        assert_eq!(error(carnet_winsock_send(accepted.0, pages.at(2, 0), 8, 0)), 10014);
        assert_eq!(error(carnet_winsock_send(accepted.0, c"x".as_ptr(), -1, 0)), 10014);
        let (mut name, mut length) = ([0_u8; 16], 16);
        let pointer = name.as_mut_ptr().cast();
        assert_eq!(carnet_winsock_getpeername(client.0, pointer, &raw mut length), 0);
        assert_eq!(length, 16);
        let fresh = Owned::overlapped();
        assert_eq!(error(carnet_winsock_getpeername(fresh.0, pointer, &raw mut length)), 10057);
    }
}

#[test]
fn select_needs_sockets_and_leaves_the_ready_ones() {
    let _alone = waiting();
    let [client, accepted, _listener] = connected();
    let udp = Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1);
    // SAFETY: as many sockets as said, here and below.
    unsafe {
        assert_eq!(carnet_winsock_send(client.0, c"x".as_ptr(), 1, 0), 1);
        let mut read = [3, udp.0, accepted.0, client.0];
        let pointer = read.as_mut_ptr().cast();
        assert_eq!(carnet_winsock_select(0, pointer, null_mut(), null_mut(), null_mut()), 1);
        assert_eq!((read[0] as u32, read[1]), (1, accepted.0));
        let timeout = [0_i64, 1000];
        let mut read = [1, client.0];
        let pointer = read.as_mut_ptr().cast();
        let timeout = timeout.as_ptr().cast();
        assert_eq!(carnet_winsock_select(0, pointer, null_mut(), null_mut(), timeout), 0);
        assert_eq!(read[0] as u32, 0);
        let none = carnet_winsock_select(0, pointer, null_mut(), null_mut(), timeout);
        assert_eq!(error(none), 10022);
        let mut bad = [1_usize, 1 << 20];
        let pointer = bad.as_mut_ptr().cast();
        assert_eq!(
            error(carnet_winsock_select(0, pointer, null_mut(), null_mut(), timeout)),
            10038
        );
        let pages = crate::memory::tests::Pages::new();
        let nowhere = pages.at(2, -2);
        assert_eq!(
            error(carnet_winsock_select(0, nowhere, null_mut(), null_mut(), timeout)),
            10014
        );
    }
}

#[repr(C)]
struct Buffer {
    length: u32,
    address: *mut c_void,
}

#[repr(C)]
struct Message {
    name: *mut c_void,
    name_length: i32,
    buffers: *mut Buffer,
    count: u32,
    control: Buffer,
    flags: u32,
}

#[test]
fn messages_with_control_data() {
    let (sender, receiver) = (
        Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1),
        Owned::of(libc::AF_INET, libc::SOCK_DGRAM, 1),
    );
    let mut address = bind_to_loopback(&receiver);
    assert_eq!(set(&receiver, libc::IPPROTO_IP, libc::IP_RECVTTL, 1), Ok(()));
    assert_eq!(set(&receiver, libc::IPPROTO_IP, 60, 1), Ok(()));

    let (mut first, mut second) = (*b"red", *b"irect");
    let mut parts = [
        Buffer { length: 3, address: first.as_mut_ptr().cast() },
        Buffer { length: 5, address: second.as_mut_ptr().cast() },
    ];
    let mut out = Message {
        name: (&raw mut address).cast(),
        name_length: 16,
        buffers: parts.as_mut_ptr(),
        count: 2,
        control: Buffer { length: 0, address: null_mut() },
        flags: 0,
    };
    let send = |out: &mut Message| {
        let mut sent = UNTOUCHED;
        let pointer = std::ptr::from_mut(out).cast();
        // SAFETY: all of the message is valid.
        let status = unsafe { WSASendMsg(sender.0, pointer, 0, &raw mut sent, null_mut(), None) };
        if status == 0 { Ok(sent) } else { Err(error(status)) }
    };
    let receive = |room: u32, control: &mut [u8]| {
        let (mut buffer, mut name, mut received) = ([0_u8; 16], [0_u8; 16], UNTOUCHED);
        let mut part = Buffer { length: room, address: buffer.as_mut_ptr().cast() };
        let mut message = Message {
            name: name.as_mut_ptr().cast(),
            name_length: 16,
            buffers: &raw mut part,
            count: 1,
            control: Buffer { length: control.len() as u32, address: control.as_mut_ptr().cast() },
            flags: 0,
        };
        let pointer = (&raw mut message).cast();
        // SAFETY: all of the message is valid.
        let status =
            unsafe { WSARecvMsg(receiver.0, pointer, &raw mut received, null_mut(), None) };
        let code = if status == 0 { 0 } else { error(status) };
        assert_eq!(name[..2], 2_u16.to_ne_bytes());
        (code, received, message.control.length, message.flags.cast_signed(), buffer)
    };

    assert_eq!(send(&mut out), Ok(8));
    let mut control = [0_u8; 64];
    let (code, received, used, flags, buffer) = receive(16, &mut control);
    // The TTL, and no record: Carnet redirects no UDP yet.
    assert_eq!((code, received, used, flags), (0, 8, 24, 0));
    assert_eq!(&buffer[..8], b"redirect");
    assert_eq!(control[12..16], libc::IP_TTL.to_ne_bytes());

    assert_eq!(send(&mut out), Ok(8));
    let (code, _, used, flags, _) = receive(16, &mut [0; 8]);
    assert_eq!((code, used, flags), (0, 0, libc::MSG_CTRUNC), "U9");
    assert_eq!(send(&mut out), Ok(8));
    let (code, received, _, flags, _) = receive(4, &mut control);
    assert_eq!((code, received, flags), (10040, 4, libc::MSG_TRUNC));

    // A record to be sent goes to the engine, which is not there.
    let mut object = [0_u8; 24];
    object[0] = 20;
    object[12] = 60;
    out.control = Buffer { length: 24, address: object.as_mut_ptr().cast() };
    assert_eq!(send(&mut out), Err(10050));
}

#[test]
fn the_extension_functions_are_the_exported_ones() {
    let socket = Owned::overlapped();
    let recv = [0xf689_d7c8_u32.to_le_bytes(), [0x1f, 0x6f, 0x6b, 0x43]].concat();
    let recv = [&recv[..], &[0x8a, 0x53, 0xe5, 0x4f, 0xe3, 0x51, 0xc3, 0x22]].concat();
    let send = [0xa441_e712_u32.to_le_bytes(), [0x4f, 0x75, 0xca, 0x43]].concat();
    let send = [&send[..], &[0x84, 0xa7, 0x0d, 0xee, 0x44, 0xcf, 0x60, 0x6d]].concat();
    for (guid, function) in
        [(recv, WSARecvMsg as *const () as usize), (send, WSASendMsg as *const () as usize)]
    {
        let mut address = [0; 8];
        let call = Arguments::new(&socket, 0xC800_0006).input(&guid).output(&mut address);
        assert_eq!(call.both(), (0, 8));
        assert_eq!(usize::from_ne_bytes(address), function);
    }
}

//! The questions to the kernel's routing (rtnetlink) that registering a listener for another network
//! namespace takes. Each is about the network namespace of the calling thread.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use socket2::{Domain, Protocol, Socket, Type};

/// `struct nlmsghdr`: length, type, flags, sequence number, port id.
pub(crate) const HEADER: usize = 16;
/// `struct nlattr`: length, type.
pub(crate) const ATTRIBUTE: usize = 4;
/// Any answer to these questions.
const ANSWER: usize = 8192;

/// `NETNSA_NSID`: the number of a network namespace.
const NUMBER: u16 = 1;
/// `NETNSA_FD`: a descriptor of it.
const DESCRIPTOR: u16 = 3;
/// `NETNSA_NSID_NOT_ASSIGNED`; the kernel takes it for "any number", too.
const NO_NUMBER: i32 = -1;

/// `RTA_DST`: the destination of a route.
const DESTINATION: u16 = 1;

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Nowhere but here: it is an address of this network namespace.
    Local,
    /// To another host, or to another network namespace.
    Away,
    /// Nowhere.
    None,
}

/// Where packets to an address go.
pub(crate) fn route_to(address: IpAddr) -> io::Result<Route> {
    let (family, octets) = match address {
        IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
    };
    // `struct rtmsg`: family and length of the destination are its first two bytes, the type of the
    // route its eighth.
    let mut question = [0_u8; 12];
    question[0] = family as u8;
    question[1] = 8 * octets.len() as u8;
    let unreachable = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL];
    match ask(libc::RTM_GETROUTE, &question, DESTINATION, &octets) {
        Ok(answer) => Ok(match answer.get(7) {
            Some(&libc::RTN_LOCAL) => Route::Local,
            Some(&libc::RTN_UNICAST) => Route::Away,
            _ => Route::None,
        }),
        // What "no route" is called depends on the route that says so.
        Err(error) if error.raw_os_error().is_some_and(|errno| unreachable.contains(&errno)) => {
            Ok(Route::None)
        }
        Err(error) => Err(error),
    }
}

/// The number by which this network namespace knows another one; it gets one if it has none. It has
/// it until either of them is gone.
pub(crate) fn number_of(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    if let Some(number) = known_number(namespace)? {
        return Ok(number);
    }
    // `struct rtgenmsg`, padded, and the number: any.
    let mut question = [0_u8; 4 + ATTRIBUTE + 4];
    question[4..6].copy_from_slice(&(ATTRIBUTE as u16 + 4).to_ne_bytes());
    question[6..8].copy_from_slice(&NUMBER.to_ne_bytes());
    question[8..].copy_from_slice(&NO_NUMBER.to_ne_bytes());
    match ask(libc::RTM_NEWNSID, &question, DESCRIPTOR, &namespace.as_raw_fd().to_ne_bytes()) {
        Ok(_) => {}
        // Somebody else was quicker.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(error),
    }
    let none = || io::Error::other("the kernel gave the network namespace no number");
    known_number(namespace)?.ok_or_else(none)
}

fn known_number(namespace: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let descriptor = namespace.as_raw_fd().to_ne_bytes();
    let answer = ask(libc::RTM_GETNSID, &[0; 4], DESCRIPTOR, &descriptor)?;
    Ok(number_in(&answer))
}

/// The number that an answer tells, if the namespace has one.
fn number_in(answer: &[u8]) -> Option<i32> {
    let number = attribute(answer.get(4..).unwrap_or_default(), NUMBER)
        .and_then(|value| Some(i32::from_ne_bytes(value.try_into().ok()?)));
    number.filter(|number| *number != NO_NUMBER)
}

/// Asks for something that is described by a fixed structure and one attribute; gives the answer
/// without its header, nothing for a mere acknowledgement.
fn ask(kind: u16, fixed: &[u8], attribute: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    const FLAGS: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = Vec::new();
    message.extend([0; 4]);
    message.extend(kind.to_ne_bytes());
    message.extend(FLAGS.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(fixed);
    message.extend(((ATTRIBUTE + value.len()) as u16).to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    let length = (message.len() as u32).to_ne_bytes();
    message[..4].copy_from_slice(&length);

    let domain = Domain::from(libc::AF_NETLINK);
    let protocol = Protocol::from(libc::NETLINK_ROUTE);
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    // A netlink socket that is connected to nobody speaks with the kernel.
    socket.send(&message)?;
    let mut buffer = [0_u8; ANSWER];
    let received = io::Read::read(&mut &socket, &mut buffer)?;
    answer_in(buffer.get(..received).unwrap_or_default())
}

/// The first message of what the kernel sent.
fn answer_in(received: &[u8]) -> io::Result<Vec<u8>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a malformed answer of netlink");
    let word = |at: usize| {
        let bytes = received.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(malformed)
    };
    let length = word(0)? as usize;
    let kind = word(4)? as u16;
    let answer = received.get(HEADER..length).ok_or_else(malformed)?;
    if i32::from(kind) != libc::NLMSG_ERROR {
        return Ok(answer.to_vec());
    }
    match word(HEADER)?.cast_signed() {
        0 => Ok(Vec::new()),
        negative => Err(io::Error::from_raw_os_error(negative.wrapping_neg())),
    }
}

/// The value of the attribute of this type.
pub(crate) fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(ATTRIBUTE..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(fuzzing)]
pub(crate) mod fuzzing {
    /// The number of a network namespace in what the kernel has sent.
    pub(crate) fn number_in(received: &[u8]) -> Option<i32> {
        super::answer_in(received).ok().and_then(|answer| super::number_in(&answer))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use carnet_testbed::{NetworkNamespace, Topology, require_root};

    use super::*;

    #[test]
    fn routes_are_told_apart() {
        require_root().unwrap();
        let topology = Topology::client_and_destination().unwrap();
        let route = |address: &str| {
            let address = address.parse().unwrap();
            topology.client.run(|| route_to(address)).unwrap().unwrap()
        };
        for (address, expected) in [
            ("192.0.2.1", Route::Local),
            ("192.0.2.2", Route::Away),
            ("198.51.100.1", Route::None),
            ("2001:db8::1", Route::Local),
            ("2001:db8::2", Route::Away),
            ("2001:db8:1::1", Route::None),
        ] {
            assert_eq!(route(address), expected, "{address}");
        }
    }

    #[test]
    fn a_namespace_gets_one_number_and_keeps_it() {
        require_root().unwrap();
        let here = NetworkNamespace::create("here").unwrap();
        let [one, other] = ["one", "other"].map(|label| NetworkNamespace::create(label).unwrap());
        let number = |of: &NetworkNamespace| here.run(|| number_of(of.as_fd())).unwrap().unwrap();
        assert_eq!(here.run(|| known_number(one.as_fd())).unwrap().unwrap(), None);
        let numbers = [number(&one), number(&other)];
        assert_ne!(numbers[0], numbers[1]);
        assert!(numbers.iter().all(|number| *number >= 0), "{numbers:?}");
        assert_eq!([number(&one), number(&other)], numbers);
    }

    #[test]
    fn answers_are_read_with_care() {
        for bytes in [&[][..], &[1; 3], &[0; 16], &[255; 20]] {
            assert!(answer_in(bytes).is_err(), "{bytes:?}");
        }
        assert_eq!(attribute(&[], 1), None);
        assert_eq!(attribute(&[0; 8], 1), None);
        assert_eq!(attribute(&[255; 8], 1), None);
    }
}

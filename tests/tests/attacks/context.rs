//! Contexts: what a provider's filter says to that provider's service is not for another one.

use carnet_core::abi;
use carnet_tests::{Must as _, puppet::Hand};

use crate::{PROTOCOLS, Service, accepts, fails, lab_of};

/// Checks that a socket has this context for who holds it, or none.
#[track_caller]
fn has_context(socket: &Hand<'_>, context: Option<&str>) {
    let (bytes, length) = match context {
        Some(text) => {
            (Ok(text.as_bytes().to_vec()), Ok((text.len() as u32).to_ne_bytes().to_vec()))
        }
        None => (fails(libc::ENODATA), fails(libc::ENODATA)),
    };
    assert_eq!(socket.query(abi::QUERY_REDIRECT_CONTEXT), bytes);
    assert_eq!(socket.query(abi::REDIRECT_CONTEXT_LENGTH), length);
}

#[test]
fn each_service_of_a_chain_gets_its_own_providers_context() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha", "bravo"]);
        let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
        let [alpha, bravo] = [&one, &two].map(Service::at_work);
        let first = alpha.deliver(&client, lab.v4(), kind);
        has_context(&first.accepted, Some("alpha"));
        let onward = alpha.fresh(kind);
        accepts(&onward, &first.record);
        let second = bravo.accept(onward, lab.v4(), kind);
        has_context(&second.accepted, Some("bravo"));
        has_context(&first.accepted, Some("alpha"));
        // The record that bravo holds has nothing of alpha's context in it.
        let record = second.record;
        assert!(!record.windows(5).any(|bytes| bytes == b"alpha"), "{record:02x?}");
    }
}

#[test]
fn a_context_behind_a_socket_that_another_service_has_got_hold_of() {
    for kind in PROTOCOLS {
        let lab = lab_of(&["alpha", "bravo"]);
        let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
        let alpha = Service::at_work(&one);
        let first = alpha.deliver(&client, lab.v4(), kind);
        // Taken with pidfd_getfd; being passed, it would be the same descriptor.
        let stolen = two.steal(&first.accepted).must("take a socket as root");
        has_context(&stolen, None);
        // All else it may ask, as whoever holds the socket may.
        assert_eq!(stolen.query(abi::QUERY_REDIRECT_RECORDS), Ok(first.record.clone()), "{kind:?}");
        has_context(&first.accepted, Some("alpha"));
        // A process of alpha's that moves to bravo is bravo's.
        lab.cgroup_of("bravo").add_process(one.id()).must("move a process");
        has_context(&first.accepted, None);
    }
}

#[test]
fn a_udp_flow_that_another_service_asks_about_by_its_address() {
    let lab = lab_of(&["alpha", "bravo"]);
    let [one, two, client] = [lab.puppet_of("alpha"), lab.puppet_of("bravo"), lab.puppet()];
    let [alpha, _bravo] = [&one, &two].map(Service::at_work);
    // A connected client is seen at its own address, another one at a token.
    for connected in [true, false] {
        let socket = client.udp(lab.v4());
        if connected {
            socket.connect(lab.v4()).must("connect");
            socket.send(b"hello").must("send");
        } else {
            socket.send_to(lab.v4(), b"hello").must("send");
        }
        let (_, peer) = alpha.udp.receive_from().must("receive a datagram");
        let asking = two.udp(peer);
        // Where the address is a token, the flow that this would be has no way to go.
        let outcome = asking.connect(peer);
        for option in [abi::QUERY_REDIRECT_RECORDS, abi::QUERY_REDIRECT_CONTEXT, abi::FLOW] {
            let answer = asking.query(option);
            assert!(answer.is_err(), "{connected}, {outcome:?}, {option}: {answer:?}");
        }
        let asking = one.udp(peer);
        asking.connect(peer).must("ask about a flow");
        has_context(&asking, Some("alpha"));
    }
}

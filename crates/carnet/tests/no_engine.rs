//! What every function says where no engine answers: on plain sockets of any kind and library.
//! Windows' answers are in `windows.rs`.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use carnet::{Error, Operation, PortableRecord, RedirectRecords};
use socket2::{Domain, Socket, Type};
use std::net::{TcpListener, TcpStream, UdpSocket};

/// Asserts that an expression is an error of the given pattern.
macro_rules! refused {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        let result = $result;
        assert!(matches!(&result, Err($pattern) $(if $guard)?), "{result:?}");
    };
}

fn connected(address: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    (listener, client, accepted)
}

#[test]
fn queries_say_that_there_is_no_engine() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (listener, client, accepted) = connected(address);
        refused!(
            carnet::query_redirect_records(&accepted),
            Error::NoEngine { operation: Operation::QueryRedirectRecords }
        );
        refused!(
            carnet::query_redirect_context(&accepted),
            Error::NoEngine { operation: Operation::QueryRedirectContext }
        );
        refused!(
            carnet::original_destination(&accepted),
            Error::NoEngine { operation: Operation::OriginalDestination }
        );
        refused!(
            carnet::original_app(&client),
            Error::NoEngine { operation: Operation::OriginalApp }
        );
        refused!(carnet::flow(&accepted), Error::NoEngine { operation: Operation::Flow });
        refused!(
            carnet::register_listener(&listener),
            Error::NoEngine { operation: Operation::RegisterListener }
        );
        refused!(
            carnet::export_redirect_records(&accepted),
            Error::NoEngine { operation: Operation::ExportRedirectRecords }
        );
        refused!(carnet::connect_onwards(&accepted), Error::NoEngine { .. });
        let elsewhere = "127.0.0.1:1".parse().unwrap();
        refused!(carnet::connect_onwards_to(&accepted, elsewhere), Error::NoEngine { .. });
    }
}

#[test]
fn a_record_cannot_be_set_and_nothing_is_connected_without_it() {
    let (listener, _client, _accepted) = connected("127.0.0.1:0");
    let records = RedirectRecords::from(vec![1; 400]);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let set = Operation::SetRedirectRecords;
    refused!(
        carnet::set_redirect_records(&socket, &records),
        Error::NoEngine { operation } if *operation == set
    );

    let onwards = carnet::Onwards::new(records, listener.local_addr().unwrap());
    refused!(onwards.connect(), Error::NoEngine { operation } if *operation == set);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_flow_of_another_host_is_not_taken_over_and_nothing_is_connected_without_it() {
    let (listener, _client, _accepted) = connected("127.0.0.1:0");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let import = Operation::ImportRedirectRecords;
    refused!(
        carnet::may_import_redirect_records(&socket),
        Error::NoEngine { operation } if *operation == import
    );
    let record = portable();
    assert_eq!((record.flow(), record.legs(), record.as_bytes().len()), (17, 1, 424));
    let application = record.original_app();
    assert_eq!((application.pid, application.executable), (4321, None));
    assert_eq!(record.original_destination().0, "198.51.100.2:443".parse().unwrap());
    refused!(
        carnet::import_redirect_records(&socket, &record),
        Error::NoEngine { operation } if *operation == import
    );
    let onwards = carnet::Onwards::import(record, listener.local_addr().unwrap());
    refused!(onwards.connect(), Error::NoEngine { operation } if *operation == import);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let bytes = portable().as_bytes().to_vec();
    for bad in [&bytes[1..], &bytes[..423], &[]] {
        refused!(PortableRecord::try_from(bad), Error::InvalidRecord);
    }
}

/// The portable record of a flow to 198.51.100.2:443 that one service has had.
fn portable() -> PortableRecord {
    let mut bytes = vec![0; 424];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"CRNP\x01\0\xa8\x01");
    put(24, &[17]);
    put(40, &[1, 0, 0, 0, 1]);
    put(58, &[0xff, 0xff, 198, 51, 100, 2, 0xbb, 1, 2]);
    put(72, &4321_u32.to_le_bytes());
    put(408, &[1]);
    PortableRecord::try_from(&bytes[..]).unwrap()
}

#[test]
fn sockets_of_other_kinds_are_named() {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    refused!(carnet::query_redirect_records(&udp), Error::NoEngine { .. });
    refused!(carnet::register_listener(&udp), Error::NoEngine { .. });
    let peer = udp.local_addr().unwrap();
    refused!(carnet::DatagramFlow::of(peer), Error::NoEngine { .. });
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    refused!(carnet::original_destination(&unix), Error::WrongSocket { .. });
    refused!(carnet::set_redirect_records(&unix, &vec![1].into()), Error::WrongSocket { .. });
}

#[test]
fn the_message_tells_what_was_asked_and_what_to_do() {
    let (_listener, _client, accepted) = connected("127.0.0.1:0");
    let message = carnet::query_redirect_records(&accepted).unwrap_err().to_string();
    assert!(message.starts_with("querying the redirect records: "), "{message}");
    assert!(message.contains("carnet up"), "{message}");
}

#[cfg(feature = "tokio")]
#[tokio::test]
async fn sockets_of_tokio_are_taken_as_they_are() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    refused!(carnet::register_listener(&listener), Error::NoEngine { .. });
    let address = listener.local_addr().unwrap();
    let _client = tokio::net::TcpStream::connect(address).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    refused!(carnet::tokio::connect_onwards(&accepted).await, Error::NoEngine { .. });
    refused!(carnet::tokio::connect_onwards_to(&accepted, address).await, Error::NoEngine { .. });
}

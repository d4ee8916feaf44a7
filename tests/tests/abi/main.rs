//! `docs/abi.md` against the code: the numbers and layouts as the sources have them, and each errno
//! as the kernel gives it.

use std::{collections::BTreeSet, fs, mem::offset_of, net::SocketAddr, path::Path};

use carnet_core::{
    abi::{self, FlowInfo, OnwardsInfo},
    address::Endpoint,
    object::{Conditions, FilterAction, NewFilter, Weight},
    portable::{PORTABLE_MAGIC, PORTABLE_VERSION},
    record::{AppIdentity, FileId, HEADER_LENGTH, MAX_RECORD, Record},
};
use carnet_testbed::Topology;
use carnet_tests::{
    Lab, Must as _, Plan,
    puppet::{Errno, Family, Hand, Kind},
};

fn document() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
    fs::read_to_string(root.join("docs/abi.md")).must("read docs/abi.md")
}

/// The rows of the table under a heading, cell by cell, without its head.
#[track_caller]
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let after = document.split(heading).nth(1).unwrap_or_else(|| panic!("no {heading:?}"));
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
    };
    let rows = after.lines().skip_while(|line| !line.starts_with('|'));
    let rows: Vec<_> = rows.take_while(|line| line.starts_with('|')).skip(2).map(cells).collect();
    assert!(!rows.is_empty(), "no table after {heading:?}");
    rows
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn the_level_and_the_options() {
    let document = document();
    let level = quoted(&document).next().must_be("the level");
    assert_eq!(level, format!("{:#x}", abi::LEVEL));
    let rows = table(&document, "# The control interface");
    let found: Vec<(&str, &str)> =
        rows.iter().map(|row| (row[0].as_str(), row[1].as_str())).collect();
    let get = [
        abi::QUERY_REDIRECT_RECORDS,
        abi::QUERY_REDIRECT_CONTEXT,
        abi::REDIRECT_RECORDS_LENGTH,
        abi::REDIRECT_CONTEXT_LENGTH,
        abi::ORIGINAL_DESTINATION,
        abi::ORIGINAL_APP,
        abi::FLOW,
        abi::ONWARDS,
        abi::EXPORT_RECORD,
    ];
    let set =
        [abi::SET_REDIRECT_RECORDS, abi::REGISTER_LISTENER, abi::CARRY_ON, abi::IMPORT_RECORD];
    let mut expected: Vec<(String, &str)> = get.map(|option| (option.to_string(), "get")).into();
    expected.extend(set.map(|option| (option.to_string(), "set")));
    expected.sort();
    for level in [abi::SOL_IP, abi::SOL_IPV6] {
        expected.push((format!("{} at level {level}", abi::SO_ORIGINAL_DST), "get"));
    }
    let expected: Vec<(&str, &str)> =
        expected.iter().map(|(option, call)| (option.as_str(), *call)).collect();
    assert_eq!(found, expected);
    for (option, bytes) in [
        (abi::QUERY_REDIRECT_RECORDS, MAX_RECORD),
        (abi::QUERY_REDIRECT_CONTEXT, abi::MAX_CONTEXT),
        (abi::ORIGINAL_DESTINATION, size_of::<Endpoint>()),
        (abi::ORIGINAL_APP, size_of::<AppIdentity>()),
        (abi::FLOW, size_of::<FlowInfo>()),
        (abi::ONWARDS, size_of::<OnwardsInfo>()),
        (abi::EXPORT_RECORD, MAX_RECORD),
    ] {
        let row = rows.iter().find(|row| row[0] == option.to_string()).must_be("the option's row");
        assert!(row[3].contains(&format!("{bytes} bytes")), "{row:?}");
    }
}

/// A value that has to be there.
trait MustBe<T> {
    fn must_be(self, what: &str) -> T;
}

impl<T> MustBe<T> for Option<T> {
    #[track_caller]
    fn must_be(self, what: &str) -> T {
        self.unwrap_or_else(|| panic!("{what} is not there"))
    }
}

/// Offset and size of fields, nested ones included.
macro_rules! fields {
    ($struct:ty: $($field:ident $(. $inner:ident)*),*) => {
        [$({
            let offset = offset_of!($struct, $field $(. $inner)*);
            let size = |value: &$struct| size_of_val(&value.$field $(. $inner)*);
            let zeroed: $struct = zerocopy::FromZeros::new_zeroed();
            (offset, size(&zeroed))
        }),*]
    };
}

#[track_caller]
fn layout(name: &str, size: usize, fields: &[(usize, usize)]) {
    layout_of(name, &size.to_string(), size, fields);
}

/// The same of what has more than its fields: so many bytes, as it is written.
#[track_caller]
fn layout_of(name: &str, bytes: &str, size: usize, fields: &[(usize, usize)]) {
    let rows = table(&document(), &format!("### {name} ({bytes} bytes)"));
    let number = |cell: &str| cell.parse::<usize>().must("read a number");
    let found: Vec<_> = rows.iter().map(|row| (number(&row[0]), number(&row[1]))).collect();
    assert_eq!(found, fields, "{name}");
    let ends: Vec<_> = found.iter().map(|(offset, length)| offset + length).collect();
    let begins = found.iter().map(|(offset, _)| *offset).skip(1).chain([size]);
    assert!(ends.iter().copied().eq(begins), "{name} has holes: {found:?}");
}

#[test]
fn the_layouts() {
    layout("Endpoint", size_of::<Endpoint>(), &fields!(Endpoint: address, port, family, zero));
    layout(
        "Application",
        size_of::<AppIdentity>(),
        &fields!(
            AppIdentity: pid, uid, gid, path_length, cgroup, netns, executable.device,
            executable.inode, started_ns, command, path
        ),
    );
    assert_eq!(size_of::<FileId>(), 16);
    layout(
        "Flow",
        size_of::<FlowInfo>(),
        &fields!(FlowInfo: flow, handle, filter, began_ns, hops, legs),
    );
    layout("Onwards", size_of::<OnwardsInfo>(), &fields!(OnwardsInfo: destination, ticket));
    let portable = fields!(
        Record: magic, version, length, mac, epoch, flow, issued_ns, hop_count, legs, destination,
        app, guessed, flags
    );
    layout_of("Portable record", "408 + 16 × hops", HEADER_LENGTH, &portable);
    let text = document();
    let words = |word: &str| assert!(text.contains(&format!("`{word}`")), "{word}");
    words(str::from_utf8(&PORTABLE_MAGIC.to_le_bytes()).must("read"));
    words("carnet-identity1");
    let mut fields = table(&text, "### Portable record").into_iter();
    assert!(fields.any(|row| row[2] == format!("version, {PORTABLE_VERSION}")));
}

/// The names of the errors that were seen.
#[derive(Default)]
struct Errors(BTreeSet<&'static str>);

impl Errors {
    #[track_caller]
    fn expect<T: std::fmt::Debug>(
        &mut self,
        names: &[&'static str],
        what: &str,
        result: Result<T, Errno>,
    ) {
        let Err(Errno(number)) = result else { panic!("{what}: {result:?}") };
        let found = NAMES.iter().find(|(_, errno)| *errno == number);
        let (name, _) = found.unwrap_or_else(|| panic!("{what}: errno {number}"));
        assert!(names.contains(name), "{what}: {name}, not {names:?}");
        self.0.insert(name);
    }
}

const NAMES: [(&str, i32); 15] = [
    ("ENOPROTOOPT", libc::ENOPROTOOPT),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("EINVAL", libc::EINVAL),
    ("ENOTCONN", libc::ENOTCONN),
    ("ENODATA", libc::ENODATA),
    ("ERANGE", libc::ERANGE),
    ("EACCES", libc::EACCES),
    ("ENOSPC", libc::ENOSPC),
    ("ENOMEM", libc::ENOMEM),
    ("EPERM", libc::EPERM),
    ("ECONNREFUSED", libc::ECONNREFUSED),
    ("ELOOP", libc::ELOOP),
    ("EADDRINUSE", libc::EADDRINUSE),
    ("EADDRNOTAVAIL", libc::EADDRNOTAVAIL),
    ("EHOSTUNREACH", libc::EHOSTUNREACH),
];

/// The errors that a table of the document names.
fn named(heading: &str) -> BTreeSet<String> {
    let rows = table(&document(), heading);
    rows.iter().flat_map(|row| quoted(&row[0])).map(str::to_owned).collect()
}

#[test]
fn the_errors_of_the_options() {
    let lab = Lab::new();
    lab.service("alpha", 2);
    lab.service("bravo", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let loopback: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let listener = service.serve(loopback);
    let connection = client.connect(lab.v4()).must("connect");
    let accepted = listener.accept().must("accept");
    let record = accepted.query(abi::QUERY_REDIRECT_RECORDS).must("query");
    let idle = service.tcp(lab.v4());
    let mut errors = Errors::default();

    let no_engine = &["ENOPROTOOPT", "EOPNOTSUPP"];
    errors.expect(no_engine, "no service's socket", connection.query(abi::FLOW));
    errors.expect(no_engine, "no service's socket", connection.set_record(&record));
    let local = service.open(Family::Unix, Kind::Tcp).must("open");
    errors.expect(&["EOPNOTSUPP"], "a local socket", local.query(abi::FLOW));
    errors.expect(&["EOPNOTSUPP"], "an unknown option", accepted.query(abi::IMPORT_RECORD + 1));
    let udp = service.open(Family::V4, Kind::Udp).must("open");
    errors.expect(&["ENOTCONN"], "a UDP socket that is not connected", udp.query(abi::FLOW));
    errors.expect(&["EINVAL"], "a UDP socket that is not bound", udp.register(&[]));
    errors.expect(&["EINVAL"], "a malformed record", idle.set_record(b"not a record"));
    errors.expect(&["EINVAL"], "a connected socket", accepted.set_record(&record));
    errors.expect(&["EINVAL"], "a listener", listener.set_record(&record));
    errors.expect(&["EINVAL"], "not a listener", service.tcp(loopback).register(&[]));
    let device = service.tcp(loopback);
    device.bind_device("lo").must("bind to a device");
    device.bind(loopback).must("bind");
    device.listen().must("listen");
    errors.expect(&["EINVAL"], "a listener on a device", device.register(&[]));
    errors.expect(&["ENOTCONN"], "an unconnected socket", idle.query(abi::FLOW));
    let no_context = accepted.query(abi::QUERY_REDIRECT_CONTEXT);
    errors.expect(&["ENODATA"], "no context", no_context);
    let no_context = accepted.query(abi::REDIRECT_CONTEXT_LENGTH);
    errors.expect(&["ENODATA"], "no context", no_context);
    let onwards = service.tcp(lab.v4());
    onwards.set_record(&record).must("set the record");
    let stranger = lab.puppet_of("bravo");
    let other = stranger.serve(loopback);
    onwards.connect(lab.v4()).must("connect onwards");
    errors.expect(&["ENODATA"], "not redirected to it", onwards.query(abi::FLOW));
    let small = accepted.get(abi::LEVEL, abi::FLOW, 39);
    errors.expect(&["ERANGE"], "a small buffer", small);
    let theirs = other.accept().must("accept").query(abi::QUERY_REDIRECT_RECORDS).must("query");
    errors.expect(&["EACCES"], "a record of another service", idle.set_record(&theirs));

    let exported = accepted.get(abi::LEVEL, abi::EXPORT_RECORD, MAX_RECORD).must("export");
    let import =
        |socket: &Hand<'_>, record: &[u8]| socket.set(abi::LEVEL, abi::IMPORT_RECORD, record);
    errors.expect(&["EACCES"], "a service that is no gateway", import(&idle, &exported));
    lab.change(|policy| Ok(policy.set_gateway("alpha", true).map(drop)?));
    import(&idle, &[]).must("ask");
    errors.expect(&["EINVAL"], "no portable record", import(&idle, &record));
    errors.expect(&["EINVAL"], "a UDP socket", import(&udp, &exported));
    errors.expect(&["EINVAL"], "a connected socket", import(&accepted, &exported));
    let mut endless = exported;
    endless[offset_of!(Record, legs)] = 32;
    errors.expect(&["ELOOP"], "an endless flow", import(&idle, &endless));

    let more: Vec<_> = (1..abi::LISTENER_SLOTS).map(|_| service.serve(loopback)).collect();
    let ninth = service.listen(loopback);
    errors.expect(&["ENOSPC"], "one listener too many", ninth.register(&[]));
    drop(more);

    let deserter = lab.puppet_of("alpha");
    let socket = deserter.tcp(lab.v4());
    lab.apps().add_process(deserter.id()).must("move a process");
    deserter.become_user(65534);
    errors.expect(&["EACCES"], "a process of no service", socket.set_record(&record));

    let mut named = named("## Errors");
    assert!(named.remove("ENOMEM"), "which no test can have");
    // Which of the two the kernel says where no hook is attached depends on the protocol.
    named.remove("ENOPROTOOPT");
    errors.0.remove("ENOPROTOOPT");
    assert!(named.iter().map(String::as_str).eq(errors.0.iter().copied()), "{named:?}");
}

/// What UDP clients get of which the kernel cannot tell apart whose they are: one that shares the address
/// of another for the same service, and one that sends from a source token.
fn errors_of_dubious_addresses() -> [String; 2] {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let (service, client) = (lab.puppet_of("alpha"), lab.puppet());
    let loopback: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let registered = service.open(Family::V4, Kind::Udp).must("open");
    registered.bind(loopback).must("bind");
    registered.register(&[]).must("register");
    let [first, second, third] = [(); 3].map(|()| client.open(Family::V4, Kind::Udp).must("open"));
    first.share_port().must("set SO_REUSEPORT");
    second.share_port().must("set SO_REUSEPORT");
    first.bind(loopback).must("bind");
    second.bind(first.local().must("ask for the address")).must("share the port");
    third.bind("127.64.0.1:0".parse().expect("an address")).must("bind to a token");
    first.connect(lab.v4()).must("connect");
    let of_token = third.send_to(lab.v4(), b"from a token");
    assert_eq!(third.connect(lab.v4()), of_token);
    [second.connect(lab.v4()), of_token].map(|result| {
        let Err(errno) = result else { panic!("a dubious address is taken") };
        let name = NAMES.iter().find(|(_, number)| *number == errno.0);
        name.expect("an errno of the table").0.to_owned()
    })
}

/// That of a socket which its owner may not unbind from a device.
#[track_caller]
fn error_of_a_bound_device() -> String {
    let lab = Lab::new();
    lab.service("alpha", 1);
    let _alpha = lab.start("alpha");
    let user = lab.puppet();
    user.become_user(65534);
    let bound = user.tcp(lab.v4());
    bound.bind_device(Topology::LINK).must("bind to a device");
    let Err(errno) = bound.connect(lab.v4()) else { panic!("a service is reached") };
    let name = NAMES.iter().find(|(_, number)| *number == errno.0);
    name.expect("an errno of the table").0.to_owned()
}

#[test]
fn the_errors_of_connect() {
    let lab = Lab::new();
    let blocked = lab.network().another_echo();
    lab.service("alpha", 1);
    let mut seen = BTreeSet::new();
    seen.insert(lab.refused(lab.v4()));
    lab.change(|policy| {
        policy.add_sublayer("guard", "alpha", 9)?;
        policy.add_filter(NewFilter {
            name: None,
            sublayer: "guard".into(),
            weight: Weight::Auto,
            conditions: Conditions {
                ports: vec![blocked.address().port().into()],
                ..Conditions::default()
            },
            action: FilterAction::BLOCK,
        })?;
        Ok(())
    });
    seen.insert(lab.refused(blocked.address()));
    // A service that forgets the record meets the guard itself.
    lab.service_with("bravo", Plan { weight: 2, ..Plan::default() });
    let forgetful = lab.start_with(
        "bravo",
        &carnet_tests::service::Behaviour { forget_records: true, ..Default::default() },
    );
    let reports = lab.client(lab.v4()).run().must("run a client");
    assert!(!reports[0].ok, "{reports:#?}");
    lab.settle();
    let ends = forgetful.finish().into_iter().filter_map(|report| report.onward.err());
    let name =
        |errno: i32| NAMES.iter().find(|(_, number)| *number == errno).map(|(name, _)| *name);
    seen.extend(ends.filter_map(name).map(str::to_owned));

    seen.extend(errors_of_dubious_addresses());
    seen.insert(error_of_a_bound_device());

    let mut named = named("`connect()` of an application");
    assert!(named.remove("ENOMEM"), "which no test can have");
    assert_eq!(named, seen);
}

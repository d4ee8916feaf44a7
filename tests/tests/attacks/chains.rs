//! Records on their way to another host: what somebody between the hosts can do with them.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use carnet::PortableRecord;
use carnet_core::event::Counter;
use carnet_inspect::{
    chain::{
        keys::Keys,
        tlv::{Envelope, Letter, NONCE, TYPE, seal},
    },
    proxy_protocol::{Announcement, header_with},
};
use carnet_testbed::Topology;
use carnet_tests::{
    Must as _, PATIENCE, Running,
    hosts::{Hosts, Inspect, export},
    puppet::Kind,
};

use crate::Service;

/// A gateway with the key of bytes 1, services behind it, and a record that may go there.
struct Scene {
    hosts: Hosts,
    gateway: Inspect,
    two: Running,
    record: PortableRecord,
}

impl Scene {
    #[track_caller]
    fn new(more: &[&str]) -> Self {
        let hosts = Hosts::new(&["one"], &["two"]);
        let record = {
            let (puppet, client) = (hosts.here.puppet_of("one"), hosts.here.puppet());
            let delivery = Service::at_work(&puppet).deliver(&client, hosts.here.v4(), Kind::Tcp);
            let bytes = export(&delivery.accepted).must("export the record");
            PortableRecord::try_from(&bytes[..]).must("read the record")
        };
        let gateway = hosts.gateway((Topology::DESTINATION_V4, 0).into(), &hosts.keys(&[1]), more);
        let two = hosts.start_there("two");
        Self { hosts, gateway, two, record }
    }

    /// What an honest host says under the key of such bytes.
    #[track_caller]
    fn header(&self, key: u8) -> Vec<u8> {
        let chain = Some((Arc::new(Keys::one(&[key; 32])), self.record.clone()));
        let (source, destination) = ends(&self.hosts);
        let announcement = Announcement { source, destination, flow: None, chain };
        announcement.header(self.gateway.address).must("make a header")
    }

    /// A header with what was sealed at this time, under the right key, for a gateway at `audience`.
    #[track_caller]
    fn sealed(&self, issued: SystemTime, audience: SocketAddr) -> Vec<u8> {
        let (source, destination) = ends(&self.hosts);
        let issued_ms = issued.duration_since(UNIX_EPOCH).must("tell the time").as_millis() as u64;
        let letter = Letter { issued_ms, nonce: [9; NONCE], record: self.record.clone() };
        let envelope = Envelope { source, destination, audience };
        let value = seal(&Keys::one(&[1; 32]), &envelope, &letter);
        header_with(source, destination, &[(TYPE, &value)]).must("make a header")
    }

    /// Says this to the gateway from the first host; gives whether the connection goes to the destination.
    #[track_caller]
    fn goes_on(&self, header: &[u8]) -> bool {
        let say = || {
            let mut stream = TcpStream::connect(self.gateway.address)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(header)?;
            stream.write_all(b"hello")?;
            let mut answer = [0; 5];
            stream.read_exact(&mut answer)?;
            Ok::<_, std::io::Error>(&answer == b"hello")
        };
        self.hosts.first().run(say).must("enter the namespace").unwrap_or(false)
    }

    /// Ends it; the gateway has taken and refused so many, and two has got what it has taken.
    #[track_caller]
    fn ends_with(self, taken: usize, refused: &str) {
        assert_eq!(self.hosts.there.counter(Counter::RecordsImported), taken as u64);
        let (lines, said) = self.gateway.end();
        let told = format!("records of chains: {taken} taken{refused}\n");
        assert!(said.contains(&told), "{told} {said}");
        let verdicts = lines.iter().filter(|line| line["verdict"] == "refuse");
        let words = verdicts.map(|line| line["ended"].as_str().unwrap_or_default());
        assert!(words.clone().all(|words| words.contains("PROXY header")), "{lines:#?}");
        let gateway = self.hosts.there.handle_of("gateway");
        for report in self.two.finish() {
            let parsed = report.parsed();
            assert!(
                parsed.hops[..parsed.hop_count as usize].iter().any(|hop| hop.handle == gateway)
            );
        }
    }
}

/// Between which addresses flows go.
fn ends(hosts: &Hosts) -> (SocketAddr, SocketAddr) {
    ("127.0.0.1:4660".parse().expect("an address"), hosts.here.v4())
}

#[test]
fn a_header_that_was_captured_is_good_once() {
    let scene = Scene::new(&[]);
    let header = scene.header(1);
    assert!(scene.goes_on(&header));
    for _ in 0..3 {
        assert!(!scene.goes_on(&header));
    }
    scene.ends_with(1, ", 3 refused (replayed)");
}

#[test]
fn a_header_that_was_altered() {
    let scene = Scene::new(&[]);
    let header = scene.header(1);
    // Where it comes from and goes to; then the sealed value: name of the key, time, nonce, audience, record,
    // seal.
    let value = header.len() - 507;
    for at in [16, 23, 24, 27, value + 12, value + 20, value + 45, value + 460, header.len() - 1] {
        let mut altered = header.clone();
        altered[at] ^= 1;
        assert!(!scene.goes_on(&altered), "{at}");
    }
    // It is not used up by that.
    assert!(scene.goes_on(&header));
    scene.ends_with(1, ", 9 refused (forged)");
}

#[test]
fn a_header_of_somebody_without_the_key() {
    let scene = Scene::new(&[]);
    assert!(!scene.goes_on(&scene.header(2)));
    // Under the name of the right one.
    let (right, mut wrong) = (scene.header(1), scene.header(2));
    let name = right.len() - 507 + 1;
    wrong[name..name + 8].copy_from_slice(&right[name..name + 8]);
    assert!(!scene.goes_on(&wrong));
    scene.ends_with(0, ", 1 refused (unknown key), 1 refused (forged)");
}

#[test]
fn a_header_for_another_gateway() {
    let scene = Scene::new(&[]);
    let mut elsewhere = scene.gateway.address;
    elsewhere.set_ip([192, 0, 2, 3].into());
    assert!(!scene.goes_on(&scene.sealed(SystemTime::now(), elsewhere)));
    assert!(scene.goes_on(&scene.sealed(SystemTime::now(), scene.gateway.address)));
    scene.ends_with(1, ", 1 refused (other audience)");
}

#[test]
fn a_header_that_was_kept() {
    let scene = Scene::new(&[]);
    let to = scene.gateway.address;
    let (ago, ahead) = (
        |seconds| SystemTime::now() - Duration::from_secs(seconds),
        |seconds| SystemTime::now() + Duration::from_secs(seconds),
    );
    // From before the gateway was started, which does not know what the one before has taken.
    assert!(!scene.goes_on(&scene.sealed(ago(25), to)));
    for age in [31, 3600] {
        assert!(!scene.goes_on(&scene.sealed(ago(age), to)), "{age}");
        // A moment passes until it is there.
        assert!(!scene.goes_on(&scene.sealed(ahead(age + 120), to)), "{age}");
    }
    scene.ends_with(
        0,
        ", 2 refused (expired), 2 refused (from the future), 1 refused (older than this program)",
    );
}

#[test]
fn a_header_whose_record_was_taken_away() {
    let scene = Scene::new(&[]);
    let (source, destination) = ends(&scene.hosts);
    for tlvs in [&[][..], &[(TYPE + 1, &b"x"[..])]] {
        let bare = header_with(source, destination, tlvs).must("make a header");
        assert!(!scene.goes_on(&bare), "{tlvs:?}");
    }
    scene.ends_with(0, ", 2 refused (missing)");
}

/// Whoever says that it is optional lets flows begin anew; a bad one is refused all the same.
#[test]
fn where_the_record_is_optional_a_flow_without_it_begins_anew() {
    let scene = Scene::new(&["--chain-optional"]);
    let (source, destination) = ends(&scene.hosts);
    let bare = header_with(source, destination, &[]).must("make a header");
    assert!(!scene.goes_on(&scene.header(2)));
    assert!(scene.goes_on(&scene.header(1)));
    scene.two.reports(1);
    // It is the gateway's own connection then, with no record of anybody.
    assert!(scene.goes_on(&bare));
    let reports = scene.two.reports(2);
    assert_eq!((reports[0].hops, reports[1].hops), (3, 1), "{reports:#?}");
    assert_eq!(scene.hosts.there.counter(Counter::RecordsImported), 1);
    let (_, said) = scene.gateway.end();
    assert!(said.contains("records of chains: 1 taken, 1 refused (unknown key)\n"), "{said}");
}

#[test]
fn two_records_in_one_header() {
    let scene = Scene::new(&[]);
    let (source, destination) = ends(&scene.hosts);
    let header = scene.header(1);
    let value = &header[header.len() - 507..];
    let twice = header_with(source, destination, &[(TYPE, value), (TYPE, value)]);
    assert!(!scene.goes_on(&twice.must("make a header")));
    for length in [0, 1, 50, 82, 83, 506] {
        let cut = header_with(source, destination, &[(TYPE, &value[..length])]);
        assert!(!scene.goes_on(&cut.must("make a header")), "{length}");
    }
    // Where there is room for a seal it is one of something else.
    scene.ends_with(0, ", 5 refused (malformed), 2 refused (forged)");
}

#[test]
fn a_host_that_is_not_believed() {
    // Only the second host itself is, and who has the key is nobody by that.
    let hosts = Hosts::new(&["one"], &["two"]);
    let record = {
        let (puppet, client) = (hosts.here.puppet_of("one"), hosts.here.puppet());
        let delivery = Service::at_work(&puppet).deliver(&client, hosts.here.v4(), Kind::Tcp);
        export(&delivery.accepted).must("export the record")
    };
    let keys = hosts.keys(&[1]);
    let gateway = hosts.returning_gateway(&keys);
    let chain = PortableRecord::try_from(&record[..]).must("read the record");
    let chain = Some((Arc::new(Keys::one(&[1; 32])), chain));
    let (source, destination) = ends(&hosts);
    let announcement = Announcement { source, destination, flow: None, chain };
    let header = announcement.header(gateway.address).must("make a header");
    let say = || {
        let mut stream = TcpStream::connect(gateway.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&header)?;
        stream.read_exact(&mut [0])
    };
    assert!(hosts.first().run(say).must("enter the namespace").is_err());
    let (lines, said) = gateway.end();
    assert_eq!(lines[0]["verdict"], "refuse", "{lines:#?}");
    assert!(said.contains("records of chains: 0 taken\n"), "{said}");
}

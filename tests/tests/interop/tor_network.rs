//! A Tor network of its own, on the other side of the cable: three relays, all of them exits, one of them
//! the directory's authority. No host of the true network is ever asked for anything.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use carnet_testbed::{NetworkNamespace, Process, Topology};
use carnet_tests::{Must as _, contract::Scratch, until};

use crate::{far_side::FarSide, product::installed};

/// A path has three relays, and none twice.
const RELAYS: u16 = 3;
/// The first relay's ports for circuits and for the directory; the others' come after it.
const FIRST_PORT: u16 = 5000;
const FIRST_DIRECTORY_PORT: u16 = 7000;

/// What every member says of such a network, relays and clients.
const PRIVATE: &str = "TestingTorNetwork 1\n\
                       PathsNeededToBuildCircuits 0.25\n\
                       ShutdownWaitLength 0\n";
/// How the authority votes: often at first, for everybody, and for long: who has no valid directory builds no
/// circuits.
const AUTHORITY: &str = "AuthoritativeDirectory 1\n\
                         V3AuthoritativeDirectory 1\n\
                         TestingV3AuthInitialVotingInterval 5\n\
                         TestingV3AuthInitialVoteDelay 2\n\
                         TestingV3AuthInitialDistDelay 2\n\
                         V3AuthVotingInterval 10\n\
                         V3AuthNIntervalsValid 60\n\
                         V3AuthVoteDelay 2\n\
                         V3AuthDistDelay 2\n\
                         TestingMinExitFlagThreshold 0\n\
                         TestingDirAuthVoteExit *\n\
                         TestingDirAuthVoteGuard *\n";

/// Starts one. Clients can build circuits on return.
#[track_caller]
pub(crate) fn start(destination: &NetworkNamespace) -> FarSide {
    let scratch = Scratch::new();
    let directory = |number| scratch.path().join(format!("relay-{number}"));
    (0..RELAYS).for_each(|number| fs::create_dir(directory(number)).must("make a directory"));
    let authority = authority(&directory(0));
    let start = |number| {
        let file = directory(number).join("torrc");
        let mut text = relay(number, &directory(number)) + &authority;
        if number == 0 {
            text += AUTHORITY;
        }
        fs::write(&file, text).must("write a relay's configuration");
        let mut command = Command::new(installed("tor"));
        command.arg("--defaults-torrc").arg("/dev/null").arg("-f").arg(file);
        destination.enter_command(&mut command).must("enter the namespace");
        Process::spawn(&mut command).must("start a relay")
    };
    let processes = (0..RELAYS).map(start).collect();
    let consensus = directory(0).join("cached-microdesc-consensus");
    let exits = || {
        let text = fs::read_to_string(&consensus).unwrap_or_default();
        text.lines().filter(|line| line.starts_with("s ") && line.contains(" Exit")).count()
    };
    until("the relays to be in the directory", exits, |exits| *exits == usize::from(RELAYS));
    FarSide {
        _processes: processes,
        _scratch: Some(scratch),
        configuration: PRIVATE.to_owned() + &authority,
    }
}

/// What a relay says of itself. It takes what relays ask of it that it does not know yet: they are in the
/// directory before it has read that.
fn relay(number: u16, directory: &Path) -> String {
    let (address, directory) = (Topology::DESTINATION_V4, directory.display());
    let (circuits, files) = (FIRST_PORT + number, FIRST_DIRECTORY_PORT + number);
    format!(
        "{PRIVATE}\
         DataDirectory {directory}\n\
         Log notice file {directory}/log\n\
         Nickname relay{number}\n\
         ContactInfo nobody\n\
         Address {address}\n\
         ORPort {address}:{circuits}\n\
         DirPort {address}:{files}\n\
         SocksPort 0\n\
         AssumeReachable 1\n\
         ExitRelay 1\n\
         IPv6Exit 1\n\
         RefuseUnknownExits 0\n\
         ExitPolicy accept *:*\n\
         ServerDNSDetectHijacking 0\n\
         ServerDNSResolvConfFile /dev/null\n"
    )
}

/// Makes the authority's keys in its directory, and gives the line by which the others know it.
#[track_caller]
fn authority(directory: &Path) -> String {
    let keys = directory.join("keys");
    fs::create_dir(&keys).must("make a directory");
    let address = format!("{}:{FIRST_DIRECTORY_PORT}", Topology::DESTINATION_V4);
    let mut generator = Command::new(installed("tor-gencert"));
    generator.args(["--create-identity-key", "-m", "12", "--passphrase-fd", "0", "-a", &address]);
    generator.current_dir(&keys).stdin(Stdio::piped()).stderr(Stdio::null());
    let mut generator = generator.spawn().must("start tor-gencert");
    let passphrase = generator.stdin.take().expect("its input");
    writeln!(&passphrase, "of a test").must("say a passphrase");
    drop(passphrase);
    assert!(generator.wait().must("wait for tor-gencert").success());
    let certificate = fs::read_to_string(keys.join("authority_certificate")).must("read it");
    let identity = certificate.lines().find_map(|line| line.strip_prefix("fingerprint "));
    let identity = identity.expect("the fingerprint of the authority's key");

    // An authority has to know itself before it says who it is: here with no fingerprint so far.
    let line = |fingerprint: &str| {
        let circuits = FIRST_PORT;
        format!(
            "DirAuthority authority orport={circuits} v3ident={identity} {address} {fingerprint}\n"
        )
    };
    let file = directory.join("torrc");
    let text = relay(0, directory) + &line(&"0".repeat(40)) + AUTHORITY;
    fs::write(&file, text).must("write the authority's configuration");
    let mut command = Command::new(installed("tor"));
    command
        .args(["--list-fingerprint", "--quiet", "--defaults-torrc", "/dev/null", "-f"])
        .arg(file);
    let output = command.output().must("ask tor for a fingerprint");
    let said = String::from_utf8_lossy(&output.stdout);
    let fingerprint = said.lines().find_map(|line| line.strip_prefix("relay0 "));
    line(&fingerprint.unwrap_or_else(|| panic!("{said}")).replace(' ', ""))
}

//! What makes no sense or cannot be done is refused with words and a status, and changes nothing.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use carnet_testbed::{BpfDirectory, require_root};

fn carnet(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_carnet")).args(arguments).output().unwrap()
}

fn pins(bpffs: &Path) -> Vec<String> {
    let names = fs::read_dir(bpffs).unwrap().map(|entry| entry.unwrap().file_name());
    // Names with a dot are the kernel's own.
    names.map(|name| name.into_string().unwrap()).filter(|name| !name.contains('.')).collect()
}

/// Runs a command line that has to fail with `status`, and to say `words`.
fn refused(arguments: &[&str], status: i32, words: &str) {
    let output = carnet(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {error}");
    assert!(error.starts_with("error: "), "{arguments:?}: {error}");
    assert!(error.contains(words), "{arguments:?}: {error}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    assert!(!error.contains("panicked"), "{arguments:?}: {error}");
}

/// Command lines that are wrong on their face, and a word of the answer.
const NONSENSE: &[(&[&str], &str)] = &[
    (&["redirect"], "unrecognized subcommand"),
    (&["stat"], "similar"),
    (&["--nonsense", "status"], "--nonsense"),
    (&["--color", "sometimes", "status"], "--color"),
    (&["--instance"], "--instance"),
    (&["--bpffs"], "--bpffs"),
    (&["--bpffs", "", "status"], "--bpffs"),
    (&["up", "extra"], "extra"),
    (&["up", "--cgroup"], "--cgroup"),
    (&["up", "--cgroup", ""], "--cgroup"),
    (&["up", "--max-filters", "0", "--cgroup", "/nonexistent"], "--max-filters"),
    (&["up", "--max-filters", "many", "--cgroup", "/nonexistent"], "--max-filters"),
    (&["up", "--max-filters", "1048577", "--cgroup", "/nonexistent"], "--max-filters"),
    (&["down", "extra"], "extra"),
    (&["status", "extra"], "extra"),
    (&["upgrade", "extra"], "extra"),
    (&["provider", "add"], "<NAME>"),
    (&["provider", "add", ""], "cannot be a name"),
    (&["provider", "add", "two words"], "cannot be a name"),
    (&["provider", "add", "12"], "cannot be a name"),
    (&["provider", "add", "é"], "cannot be a name"),
    (&["provider", "add", "../x"], "cannot be a name"),
    (&["provider", "add", "a", "b"], "unexpected argument"),
    (&["provider", "ls", "a"], "unexpected argument"),
    (&["provider", "rm"], "<NAME|ID>"),
    (&["provider", "list"], "unrecognized subcommand"),
    (&["sublayer", "add", "x"], "--provider"),
    (&["sublayer", "add", "x", "--provider", "p", "--weight", "-1"], "-1"),
    (&["sublayer", "add", "x", "--provider", "p", "--weight", "65536"], "--weight"),
    (&["sublayer", "add", "x", "--provider", "p", "--weight", "heavy"], "--weight"),
    (&["sublayer", "rm"], "<NAME|ID>"),
    (&["service", "add", "x", "--provider", "p"], "--cgroup"),
    (&["service", "add", "x", "--cgroup", "/c"], "--provider"),
    (&["service", "add", "x/y", "--provider", "p", "--cgroup", "/c"], "cannot be a name"),
    (
        &["service", "add", "x", "--provider", "p", "--cgroup", "/c", "--on-failure", "pray"],
        "--on-failure",
    ),
    (&["service", "add", "x", "--provider", "p", "--cgroup", "/c", "--trust", ""], "--trust"),
    (&["service", "add", "x", "--provider", "p", "--cgroup", "/c", "--trust", "a,,b"], "--trust"),
    (
        &["service", "add", "x", "--provider", "p", "--cgroup", "/c", "--unit", "x.service"],
        "cannot be used with",
    ),
    (
        &["service", "add", "x", "--provider", "p", "--cgroup", "/c", "--listen-port", "0"],
        "--listen-port",
    ),
    (&["service", "rm"], "<NAME|ID>"),
    (&["service", "run", "x"], "<COMMAND>"),
    (&["service", "run", "x", "--"], "<COMMAND>"),
    (&["service", "run", "x", "true"], "unexpected argument"),
    (&["service", "run", "not good", "--", "true"], "cannot be a name"),
    (&["service", "run", "x", "--trust", ",", "--", "true"], "--trust"),
    (&["service", "register", "x", "--pid", "0"], "--pid"),
    (&["service", "register", "x", "--pid", "init"], "--pid"),
    (&["service", "register", "x", "--pid", "2147483648"], "--pid"),
    (&["service", "register", "x", "--pid", "1", "--udp", "53"], "--udp"),
    (&["service", "register", "x", "--pid", "1", "--netns", "blue"], "/run/netns/blue"),
    (&["service", "register", "x", "--pid", "1", "--home", "pid:1"], "cannot be used with"),
    (&["service", "register", "x", "--pid", "1", "--listen", "192.0.2.1:1"], "cannot be used with"),
    (&["service", "register", "x", "--tcp", "80"], "--tcp"),
    (
        &["service", "register", "x", "--tcp", "1.1.1.1:1", "--listen", "1.1.1.1:1"],
        "cannot be used",
    ),
    (&["service", "register", "x", "--home", "pid:1"], "--listen"),
    (&["service", "wait"], "<NAME|ID>"),
    (&["service", "wait", "x", "--timeout", "soon"], "--timeout"),
    (&["service", "register", "x", "--listen", "192.0.2.1:1"], "--netns"),
    (&["service", "register", "x", "--listen", "192.0.2.1", "--netns", "pid:1"], "--listen"),
    (
        &[
            "service",
            "register",
            "x",
            "--listen",
            "192.0.2.1:1",
            "--netns",
            "pid:1",
            "--udp",
            "192.0.2.1:1",
        ],
        "UDP flows cannot go to a listener in another network namespace",
    ),
    (&["service", "unregister", "x"], "--listen"),
    (&["service", "unregister", "x", "--listen", "everywhere"], "--listen"),
    (&["filter", "add", "--permit"], "--sublayer"),
    (&["filter", "add", "--sublayer", "s"], "--redirect"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--block"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--redirect", "x"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--context", "x"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--hard"], "--permit"),
    (&["filter", "add", "--sublayer", "s", "--block", "--hard"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--soft"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--veto"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--block", "--soft", "--veto"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--end-existing"], "--block"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--end-existing"], "cannot be used with"),
    (
        &["filter", "add", "--sublayer", "s", "--redirect", "x", "--end-existing"],
        "cannot be used with",
    ),
    (&["filter", "add", "--sublayer", "s", "--block", "--end-existing=yes"], "--end-existing"),
    (&["up", "--refuse-unseen=maybe", "--cgroup", "/nonexistent"], "--refuse-unseen"),
    (&["filter", "add", "--sublayer", "s", "--redirect", "x", "--hard"], "cannot be used with"),
    (&["filter", "add", "--sublayer", "s", "--redirect", "x", "--context", ""], "--context"),
    (&["filter", "add", "--sublayer", "s", "--redirect", "x", "--context", "hex:0"], "hexadecimal"),
    (
        &["filter", "add", "--sublayer", "s", "--redirect", "x", "--context", "hex:zz"],
        "hexadecimal",
    ),
    (&["filter", "add", "--sublayer", "s", "--redirect", "x", "--context", "hex:"], "--context"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--name", "9"], "cannot be a name"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--weight", "heavy"], "not a weight"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--protocol", "tcpp"], "not a protocol"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--protocol", "256"], "not a protocol"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--to", "example.org"], "not a destination"),
    (
        &["filter", "add", "--sublayer", "s", "--permit", "--to", "192.0.2.0/33"],
        "not a destination",
    ),
    (&["filter", "add", "--sublayer", "s", "--permit", "--to", "192.0.2.1/24"], "192.0.2.0/24"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--port", "65536"], "not a port"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--port", "9-1"], "not a port"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--port", "https"], "not a port"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--uid", "root"], "not a user id"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--uid", "4294967296"], "not a user id"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--cgroup", ""], "--cgroup"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--exe", ""], "--exe"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--netns", "blue"], "/run/netns/blue"),
    (&["filter", "add", "--sublayer", "s", "--permit", "--netns", "pid:0"], "--netns"),
    (&["filter", "rm"], "<NAME|ID>"),
    (&["flows", "extra"], "extra"),
    (&["trace", "--count", "0"], "--count"),
    (&["trace", "--count", "all"], "--count"),
    (&["trace", "--timeout", "soon"], "--timeout"),
    (&["explain"], "--to"),
    (&["explain", "--to", "192.0.2.1"], "--to"),
    (&["explain", "--to", "192.0.2.1:0"], "--to"),
    (&["explain", "--to", "192.0.2.1:65536"], "--to"),
    (&["explain", "--to", "2001:db8::1:443"], "brackets"),
    (&["explain", "--to", "[192.0.2.1]:443"], "--to"),
    (&["explain", "--to", "192.0.2.1:1", "--uid", "root"], "--uid"),
    (&["explain", "--to", "192.0.2.1:1", "--pid", "0"], "--pid"),
    (&["explain", "--to", "192.0.2.1:1", "--protocol", "http"], "not a protocol"),
    (&["explain", "--to", "192.0.2.1:1", "--netns", "blue"], "--netns"),
    (&["inspect", "--listen", "nowhere"], "--listen"),
    (&["run"], "<COMMAND>"),
    (&["run", "true"], "unexpected argument"),
    (&["run", "--cgroup", "", "--", "true"], "--cgroup"),
    (&["doctor", "extra"], "extra"),
];

#[test]
fn nonsense_is_refused() {
    for (arguments, words) in NONSENSE {
        refused(arguments, 2, words);
    }
    let long = "x".repeat(257);
    refused(&["provider", "add", &long[..65]], 2, "cannot be a name");
    refused(&["filter", "add", "--sublayer", "s", "--redirect", "x", "--context", &long], 2, "257");
}

#[test]
fn a_command_that_is_left_out_is_answered_with_help() {
    for arguments in [&[][..], &["provider"], &["sublayer"], &["service"], &["filter"]] {
        let output = carnet(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains("Usage: carnet"));
        assert!(output.stdout.is_empty());
    }
}

/// Commands that need an instance, and the privilege to look for one.
const ADMINISTRATION: &[&[&str]] = &[
    &["down"],
    &["status"],
    &["upgrade"],
    &["provider", "add", "acme"],
    &["provider", "ls"],
    &["provider", "rm", "acme"],
    &["sublayer", "add", "first", "--provider", "acme"],
    &["sublayer", "ls"],
    &["sublayer", "rm", "first"],
    &["service", "add", "web", "--provider", "acme", "--cgroup", "/nonexistent"],
    &["service", "ls"],
    &["service", "rm", "web"],
    &["service", "run", "web", "--provider", "acme", "--", "true"],
    &["service", "register", "web", "--pid", "1"],
    &["service", "register", "web", "--listen", "192.0.2.1:1", "--netns", "pid:1"],
    &["service", "unregister", "web", "--listen", "192.0.2.1:1"],
    &["filter", "add", "--sublayer", "first", "--block"],
    &["filter", "ls"],
    &["filter", "rm", "1"],
    &["export"],
    &["apply", "-"],
    &["flows"],
    &["trace", "--timeout", "1"],
    &["explain", "--to", "192.0.2.1:443"],
];

#[test]
fn without_an_instance_nothing_is_administered() {
    require_root().unwrap();
    let bpffs = BpfDirectory::create("carnet-cli-not-up").unwrap();
    let place = bpffs.path().to_str().unwrap();
    for command in ADMINISTRATION {
        let arguments = [&["--bpffs", place, "--instance", "none"], *command].concat();
        refused(&arguments, 1, "carnet up");
    }
    assert_eq!(pins(bpffs.path()), [""; 0]);
}

#[test]
fn what_is_named_has_to_be_there() {
    require_root().unwrap();
    let bpffs = BpfDirectory::create("carnet-cli-not-there").unwrap();
    let place = bpffs.path().to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["--bpffs", place, "up", "--cgroup", "/nonexistent/cgroup"], "/nonexistent/cgroup"),
        (&["--bpffs", place, "up", "--cgroup", "/tmp"], "/tmp"),
        (&["--bpffs", place, "run", "--cgroup", "/nonexistent/cgroup", "--", "true"], "no cgroup"),
        (&["--bpffs", "/nonexistent", "status"], "/nonexistent"),
        (&["--bpffs", "/tmp", "status"], "/tmp"),
        (&["doctor", "--cgroup", "/nonexistent/cgroup"], "/nonexistent/cgroup"),
        (&["inspect", "--rules", "/nonexistent/rules.toml"], "/nonexistent/rules.toml"),
    ];
    for (arguments, words) in cases {
        refused(arguments, 1, words);
    }
    for name in ["", "a/b", "..", "two words"] {
        refused(&["--bpffs", place, "--instance", name, "status"], 2, "instance");
    }
    assert_eq!(pins(bpffs.path()), [""; 0]);
}

#[test]
fn missing_privileges_are_named() {
    require_root().unwrap();
    for command in ADMINISTRATION {
        // Root without capabilities: another user might not be able to execute the program where
        // it lies.
        let output = Command::new("setpriv")
            .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
            .arg(env!("CARGO_BIN_EXE_carnet"))
            .args(*command)
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {error}");
        assert!(error.contains("CAP_BPF"), "{command:?}: {error}");
        let hint = format!("hint: sudo carnet {}", command.join(" "));
        assert!(error.contains(&hint), "{command:?}: {error}");
    }
}

//! The pages of the book, pasted as they stand.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use carnet_testbed::{Cgroup, Process, Topology};
use carnet_tests::{Must as _, PATIENCE, contract::Scratch, program, web::WebServer};

use crate::{
    product::{Product, from_pypi},
    products,
};

/// What a page has to paste.
#[track_caller]
fn block_of(page: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
    let text = fs::read_to_string(root.join("docs/interop").join(page)).must("read a page");
    let (_, rest) = text.split_once("```sh\n").expect("a block of commands");
    rest.split_once("```").expect("the block's end").0.to_owned()
}

/// Pastes the block of a product's page into a shell, in which `/apps` is a cgroup of the test's own; the
/// flow has to arrive.
#[track_caller]
fn paste(product: &Product) {
    let page = format!("{}.md", product.name);
    let topology = Topology::client_and_destination().must("make a network");
    let server = WebServer::start(&topology.destination, &[Topology::DESTINATION_V4.into()]);
    let far_side = product.far_side.map(|start| start(&topology.destination));
    let apps = Cgroup::create("carnet-interop-page").must("make a cgroup");
    let root = carnet_engine::cgroup::mount_point().must("find the cgroup2 hierarchy");
    let below = apps.path().strip_prefix(root).must("name a cgroup");
    let scratch = Scratch::new();
    let open = fs::Permissions::from_mode(0o777);
    fs::set_permissions(scratch.path(), open).must("open a directory to all users");
    let block = block_of(&page).replace("/apps", &format!("/{}", below.display()));
    // Tor reads what is not in its own configuration, here which network it is in, from a file beside
    // the system's.
    let defaults = scratch.path().join("torrc-defaults");
    let configuration = far_side.as_ref().map_or("", |far_side| &far_side.configuration);
    fs::write(&defaults, configuration).must("write a configuration");
    // The instance is to be the only one, and to be gone with the shell's mounts.
    let script = format!(
        "mount -t bpf bpf /sys/fs/bpf\nmount --bind {} /etc/tor\n\
         trap 'carnet down >/dev/null; echo 1 > {}/cgroup.kill; wait' EXIT\n{block}",
        scratch.path().display(),
        apps.path().display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-euc", &script]).current_dir(scratch.path());
    let own = [program("carnet"), from_pypi("mitmdump")];
    let own = own.iter().filter_map(|path| path.parent()).map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(own.chain(env::split_paths(&path)).chain(["/usr/sbin".into()]));
    command.env("PATH", path.must("write a path")).env("HOME", scratch.path());
    command.stdin(Stdio::null());
    let said = fs::File::create(scratch.path().join("said")).must("make a file");
    command.stderr(said.try_clone().must("share a file"));
    topology.client.enter_command(&mut command).must("enter the namespace");
    let mut shell = Process::spawn(&mut command).must("start a shell");
    let status = shell.wait(PATIENCE).must("wait for the shell");
    let said = fs::read_to_string(scratch.path().join("said")).unwrap_or_default();
    let lines = shell.lines();
    assert!(status.success(), "{page}: {status}: {lines:#?}\n{said}");
    assert!(lines.iter().any(|line| line.contains("/hello")), "{page}: {lines:#?}\n{said}");
    let paths: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths, ["/hello"], "{page}");
}

#[test]
#[ignore = "needs the products: cargo xtask interop"]
fn each_page_is_pasted() {
    for product in products::ALL {
        paste(product);
        println!("docs/interop/{}.md: pasted, and the flow arrived", product.name);
    }
}

/// The tests that a page names, `module::test`.
fn tests_named_in(page: &str) -> Vec<String> {
    let words = page.split('`').skip(1).step_by(2);
    let is_test = |word: &&str| {
        let part =
            |part: &str| part.chars().all(|c| c.is_ascii_lowercase() || "0123456789_".contains(c));
        word.split_once("::")
            .is_some_and(|(module, test)| part(module) && part(test) && !test.is_empty())
    };
    words.filter(is_test).map(str::to_owned).collect()
}

#[test]
fn the_tests_that_pages_name_are_there() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let suites = ["conformance", "e2e", "evasion", "faults", "interop"];
    for page in ["interop.md", "peers.md"] {
        let page = package.parent().expect("the workspace's root").join("docs").join(page);
        let named = tests_named_in(&fs::read_to_string(&page).must("read a page"));
        assert!(named.len() > 5, "{}: {named:?}", page.display());
        for test in named {
            let (module, function) = test.split_once("::").expect("a module");
            let is_there = suites.iter().any(|suite| {
                let file = package.join("tests").join(suite).join(format!("{module}.rs"));
                let text = fs::read_to_string(file).unwrap_or_default();
                text.contains(&format!("\nfn {function}()"))
            });
            assert!(is_there, "{} names {test}, and there is no such test", page.display());
        }
    }
}

//! The maps, the programs and their pins: not for ordinary users, nor for root of a user namespace.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use aya::maps::MapData;
use carnet_tests::{
    Lab, Must as _,
    puppet::{BpfObject, Puppet},
};

use crate::{NOBODY, fails, lab_of};

/// Everything below a directory, and it itself.
fn tree(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    for entry in fs::read_dir(directory).must("list a directory") {
        let entry = entry.must("list a directory");
        if entry.file_type().must("examine a file").is_dir() {
            found.extend(tree(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

/// All of an instance by the kernel's numbers.
fn numbers(lab: &Lab) -> Vec<BpfObject> {
    let status = lab.engine().status().must("ask for the status");
    let maps = fs::read_dir(lab.location().directory().join("maps")).must("list the maps");
    let map_number = |entry: std::io::Result<fs::DirEntry>| {
        let map = MapData::from_pin(entry.must("list the maps").path()).must("open a map");
        BpfObject::Map(map.info().must("examine a map").id())
    };
    let programs = status.programs.iter().map(|program| BpfObject::Program(program.id));
    let links = status.links.iter().map(|link| BpfObject::Link(link.id));
    maps.map(map_number).chain(programs).chain(links).collect()
}

/// Checks that root gets at all of an instance, and this puppet at none of it.
#[track_caller]
fn gets_at_nothing(lab: &Lab, puppet: &Puppet) {
    let root = lab.puppet();
    let directory = lab.location().directory();
    let pins: Vec<_> = tree(directory).into_iter().filter(|path| !path.is_dir()).collect();
    assert!(pins.len() > 30, "{pins:?}");
    for pin in pins {
        let object = BpfObject::Pin(pin);
        assert_eq!(root.open_bpf(object.clone()), Ok(()), "{object:?}");
        assert_eq!(puppet.open_bpf(object.clone()), fails(libc::EACCES), "{object:?}");
    }
    let numbers = numbers(lab);
    assert!(numbers.len() > 30, "{numbers:?}");
    for object in numbers {
        assert_eq!(root.open_bpf(object.clone()), Ok(()), "{object:?}");
        assert_eq!(puppet.open_bpf(object.clone()), fails(libc::EPERM), "{object:?}");
    }
    let parent = directory.parent().expect("a directory of all instances");
    for path in [parent, directory, &directory.join("maps")] {
        assert_eq!(root.list(path), Ok(()), "{}", path.display());
        assert_eq!(puppet.list(path), fails(libc::EACCES), "{}", path.display());
    }
    let intruder = parent.join("intruder");
    assert_eq!(puppet.make_directory(&intruder), fails(libc::EACCES));
}

#[test]
fn an_ordinary_user_gets_at_no_map_program_or_link() {
    let lab = lab_of(&["alpha"]);
    let user = lab.puppet();
    user.become_user(NOBODY);
    gets_at_nothing(&lab, &user);
    // Nor does a service.
    let service = lab.puppet_of("alpha");
    service.become_user(NOBODY);
    gets_at_nothing(&lab, &service);
}

#[test]
fn root_of_a_user_namespace_gets_at_no_map_program_or_link() {
    let lab = lab_of(&["alpha"]);
    let impostor = Puppet::start(&lab.network().topology.client, lab.apps(), Some(NOBODY));
    impostor.become_namespace_root();
    gets_at_nothing(&lab, &impostor);
}

#[test]
fn pins_are_for_root_alone_whatever_the_mask() {
    // The bpffs of the tests can be entered by all: Carnet does not rely on its mode.
    let lab = lab_of(&["alpha"]);
    let parent = lab.location().directory().parent().expect("a directory of all instances");
    for path in tree(parent) {
        let mode = fs::metadata(&path).must("examine a file").permissions().mode() & 0o777;
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
    }
}

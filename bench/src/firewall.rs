//! Redirection by nftables, which Carnet is compared with.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};
use carnet_testbed::NetworkNamespace;

const TABLE: &str = "carnet_bench";
const COUNTER: &str = "redirected";

/// Succeeds if nftables can be used.
///
/// # Errors
/// When its command is not installed; says how to go on.
pub(crate) fn require() -> Result<()> {
    match Command::new("nft").arg("--version").stdout(Stdio::null()).status() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "the command nft is not installed: install Debian's package nftables, or leave the \
             comparison with it out (--no-nftables)"
        ),
        Err(error) => Err(error).context("the command nft cannot be started"),
    }
}

/// Redirects the connections of a namespace to `destination` to a port of its loopback, except
/// those of one user: the relay's. The rules go with the namespace.
///
/// # Errors
/// When nft refuses the rules, for example on a kernel without NAT.
pub(crate) fn redirect(
    namespace: &NetworkNamespace,
    destination: SocketAddrV4,
    except_user: u32,
    to_port: u16,
) -> Result<()> {
    let (address, port): (&Ipv4Addr, u16) = (destination.ip(), destination.port());
    let rules = format!(
        "table ip {TABLE} {{
            counter {COUNTER} {{ }}
            chain output {{
                type nat hook output priority -100; policy accept;
                meta skuid {except_user} return
                ip daddr {address} tcp dport {port} counter name {COUNTER} redirect to :{to_port}
            }}
        }}"
    );
    nft(namespace, &[&rules]).map(drop)
}

/// How many connections have been redirected in a namespace.
///
/// # Errors
/// When nft fails or its answer cannot be read.
pub(crate) fn redirected(namespace: &NetworkNamespace) -> Result<u64> {
    let output = nft(namespace, &["-j", "list", "counter", "ip", TABLE, COUNTER])?;
    let answer: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("nft's answer is not JSON")?;
    let objects = answer["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    objects
        .iter()
        .find_map(|object| object["counter"]["packets"].as_u64())
        .with_context(|| format!("nft's answer has no counter: {answer}"))
}

fn nft(namespace: &NetworkNamespace, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::null());
    namespace.enter_command(&mut command)?;
    let output = command.output().context("the command nft cannot be started")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft failed ({}): {}", output.status, said.trim());
    }
    Ok(output)
}

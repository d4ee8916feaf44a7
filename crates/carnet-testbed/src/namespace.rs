//! Network namespaces that exist only as long as somebody holds them.

use std::{
    fmt,
    fs::{self, File},
    future::{Future, ready},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    panic::resume_unwind,
    process::Command,
    thread,
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, MulticastGroup, RouteMessageBuilder,
    new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage, State},
        route::{RouteAttribute, RouteType},
    },
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{runtime::Builder as Runtime, time::timeout};

use crate::{Error, sys};

const THREAD_NAMESPACE: &str = "/proc/thread-self/ns/net";
const SYSCTL_ROOT: &str = "/proc/sys/net";

/// How long the kernel may take to answer, and to announce what is awaited.
const DEADLINE: Duration = Duration::from_secs(10);

/// A network namespace without a name in the file system: it is gone, with everything in it, when
/// this value is dropped and the last process and socket in it are gone. Nothing can be left
/// behind.
///
/// `lo` is up from the start, with 127.0.0.1 and ::1.
#[derive(Debug)]
pub struct NetworkNamespace {
    label: String,
    file: File,
    inode: u64,
}

impl NetworkNamespace {
    /// Makes a namespace. The label appears in error messages and thread names only; two namespaces
    /// may have the same one.
    ///
    /// # Errors
    /// [`Error::Io`] (`EPERM` without CAP_SYS_ADMIN; `ENOENT` on a kernel without IPv6).
    pub fn create(label: &str) -> Result<Self, Error> {
        // On a thread of its own: a thread that has left its namespace is of no other use.
        let created = thread::scope(|scope| {
            thread::Builder::new()
                .name(format!("new {label}"))
                .spawn_scoped(scope, || {
                    sys::unshare_network()?;
                    File::open(THREAD_NAMESPACE)
                })?
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        });
        let file = created.map_err(Error::io("create network namespace", label))?;
        let inode = file.metadata().map_err(Error::io("examine network namespace", label))?.ino();
        let namespace = Self { label: label.into(), file, inode };
        namespace.disable_address_generation()?;
        namespace.set_up("lo")?;
        Ok(namespace)
    }

    /// The label it was created with.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Its number: the inode of `/proc/PID/ns/net` of the processes in it.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Its cookie: the number by which BPF programs know it (`SO_NETNS_COOKIE`).
    ///
    /// # Errors
    /// [`Error::Io`] (`ENOPROTOOPT` before Linux 5.14).
    pub fn cookie(&self) -> Result<u64, Error> {
        self.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            sys::network_namespace_cookie(&socket)
        })?
        .map_err(Error::io("read the cookie of network namespace", &self.label))
    }

    /// Runs a closure on a thread inside the namespace and waits for it. Sockets that it makes
    /// belong to the namespace for good, whichever thread uses them later; threads and processes
    /// that it starts are inside as well.
    ///
    /// A panic of the closure is passed on.
    ///
    /// # Errors
    /// [`Error::Io`] if the namespace cannot be entered.
    pub fn run<T: Send>(&self, closure: impl FnOnce() -> T + Send) -> Result<T, Error> {
        thread::scope(|scope| {
            thread::Builder::new()
                .name(format!("in {}", self.label))
                .spawn_scoped(scope, || {
                    move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
                    Ok(closure())
                })?
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        })
        .map_err(Error::io("enter network namespace", &self.label))
    }

    /// Makes the process of `command` start inside the namespace.
    ///
    /// # Errors
    /// [`Error::Io`] if the descriptor cannot be duplicated. A failure to enter is an error of
    /// `Command::spawn`.
    pub fn enter_command(&self, command: &mut Command) -> Result<(), Error> {
        let descriptor: OwnedFd = self
            .file
            .try_clone()
            .map_err(Error::io("duplicate the descriptor of network namespace", &self.label))?
            .into();
        sys::enter_network_namespace_before_exec(command, descriptor);
        Ok(())
    }

    /// Gives a link that is up an address, usable on return (IPv6 without duplicate address
    /// detection).
    ///
    /// # Errors
    /// [`Error::Argument`] unless `address` reads `ADDRESS/PREFIX-LENGTH`; [`Error::Io`] if there
    /// is no such link (`ENODEV`) or it has the address already (`EEXIST`).
    pub fn add_address(&self, address: &str, link: &str) -> Result<(), Error> {
        let (ip, prefix_length) = parse_prefix(address)?;
        let subject = format!("{address} to link {link}");
        let groups = [MulticastGroup::Ipv6Route];
        self.netlink("add address", subject, &groups, |handle, mut news| async move {
            let index = link_index(&handle, link).await?;
            let mut request = handle.address().add(index, ip, prefix_length);
            if ip.is_ipv6() {
                let no_detection = AddressAttribute::Flags(AddressFlags::Nodad);
                request.message_mut().attributes.push(no_detection);
            }
            request.execute().await.map_err(netlink_error)?;
            // The kernel joins the address's neighbour discovery group, and then begins to receive
            // for it, in the background: a neighbour who asks before is not answered.
            while ip.is_ipv6() && !receives_for(&news.next().await?, ip) {}
            Ok(())
        })
    }

    /// Routes a prefix ("0.0.0.0/0" and "::/0" are the default routes) through a gateway.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `prefix` reads `ADDRESS/PREFIX-LENGTH`, of the gateway's family;
    /// [`Error::Io`] if the gateway is on no link's prefix (`ENETUNREACH`, `EHOSTUNREACH`).
    pub fn add_route(&self, prefix: &str, gateway: IpAddr) -> Result<(), Error> {
        let (ip, prefix_length) = parse_prefix(prefix)?;
        let wrong_family = || Error::argument(prefix, "a prefix of the gateway's address family");
        if ip.is_ipv4() != gateway.is_ipv4() {
            return Err(wrong_family());
        }
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(ip, prefix_length)
            .and_then(|route| route.gateway(gateway))
            .map_err(|_| wrong_family())?
            .build();
        let subject = format!("{prefix} via {gateway}");
        self.netlink("add route", subject, &[], |handle, _| async move {
            handle.route().add(route).execute().await.map_err(netlink_error)
        })
    }

    /// Routes all of IPv4 and IPv6, groups included, to a link that is up and on which it asks nobody
    /// for neighbours: whatever is sent leaves by it at once, whether somebody is there or not.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such link (`ENODEV`), or if there are such routes (`EEXIST`).
    pub fn route_all_to(&self, link: &str) -> Result<(), Error> {
        let silent = LinkUnspec::new_with_name(link).arp(false).build();
        self.netlink("route all to link", link, &[], |handle, _| async move {
            handle.link().set(silent).execute().await.map_err(netlink_error)?;
            let index = link_index(&handle, link).await?;
            let v4 = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).build();
            let v6 = RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index).build();
            for route in [v4, v6] {
                handle.route().add(route).execute().await.map_err(netlink_error)?;
            }
            Ok(())
        })
    }

    /// Writes a value to `/proc/sys/net/NAME` as it is seen from inside the namespace, for example
    /// `("ipv4/ip_forward", "1")`.
    ///
    /// # Errors
    /// [`Error::Argument`] if `name` leads out of `/proc/sys/net`; [`Error::Io`] if there is no
    /// such setting or it refuses the value.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<(), Error> {
        if name.starts_with('/') || name.split('/').any(|component| component == "..") {
            return Err(Error::argument(name, "the name of a setting below /proc/sys/net"));
        }
        let path = format!("{SYSCTL_ROOT}/{name}");
        self.run(|| fs::write(&path, value))?.map_err(Error::io("write", &path))
    }

    /// Keeps the kernel from giving links a link-local address of its own: it does so, and detects
    /// duplicates, in the background. [`connect_veth`] gives them one instead.
    fn disable_address_generation(&self) -> Result<(), Error> {
        self.set_sysctl("ipv6/conf/default/addr_gen_mode", "1")
    }

    fn set_up(&self, link: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_name(link).up().build();
        self.netlink("set up link", link, &[], |handle, _| async move {
            handle.link().set(message).execute().await.map_err(netlink_error)
        })
    }

    /// Makes netlink requests inside the namespace, subscribed to the announcements of `groups`.
    fn netlink<F>(
        &self,
        operation: &'static str,
        subject: impl fmt::Display,
        groups: &[MulticastGroup],
        request: impl FnOnce(Handle, Announcements) -> F + Send,
    ) -> Result<(), Error>
    where
        F: Future<Output = io::Result<()>>,
    {
        let describe = Error::io(operation, format!("{subject} in namespace {}", self.label));
        self.run(|| {
            let runtime = Runtime::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (connection, handle, messages) = new_multicast_connection(groups)?;
                let connection = tokio::spawn(connection);
                let news = messages.filter_map(|(message, _sender)| {
                    ready(match message.payload {
                        NetlinkPayload::InnerMessage(message) => Some(message),
                        _ => None,
                    })
                });
                let result = timeout(DEADLINE, request(handle, Announcements(news.boxed()))).await;
                connection.abort();
                result.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
            })
        })?
        .map_err(describe)
    }

    /// Waits until a link carries traffic. A cable is plugged at once, but the kernel starts the
    /// queues of its ends a moment later and drops what is sent before.
    fn wait_for_carrier(&self, link: &str) -> Result<(), Error> {
        let groups = [MulticastGroup::Link];
        self.netlink("see the carrier of link", link, &groups, |handle, mut news| async move {
            // Subscribed first, looked second: whatever changes after the look is announced.
            while !carries_traffic(&get_link(&handle, link).await?) {
                news.next().await?;
            }
            Ok(())
        })
    }
}

/// What the kernel announces to a netlink connection.
struct Announcements(BoxStream<'static, RouteNetlinkMessage>);

impl Announcements {
    async fn next(&mut self) -> io::Result<RouteNetlinkMessage> {
        let ended = || io::Error::other("the netlink connection ended");
        self.0.next().await.ok_or_else(ended)
    }
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Joins two namespaces by a cable: a pair of veth links, one in each, both up and carrying traffic
/// on return, with the link-local addresses fe80::1 and fe80::2. Link names are at most 15 bytes,
/// and may be the same in both.
///
/// # Errors
/// [`Error::Io`], for example if a name is taken (`EEXIST`) or too long (`ERANGE`).
pub fn connect_veth(
    a: &NetworkNamespace,
    a_link: &str,
    b: &NetworkNamespace,
    b_link: &str,
) -> Result<(), Error> {
    let far_end = LinkUnspec::new_with_name(b_link).setns_by_fd(b.as_fd().as_raw_fd()).build();
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(a_link)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
        .build();
    let subject = format!("{a_link} to {b_link} of namespace {}", b.label);
    a.netlink("connect veth", subject, &[], |handle, _| async move {
        handle.link().add(pair).execute().await.map_err(netlink_error)
    })?;
    // Only now: an end cannot come up before it knows the other one.
    a.set_up(a_link)?;
    b.set_up(b_link)?;
    a.wait_for_carrier(a_link)?;
    b.wait_for_carrier(b_link)?;
    a.add_address("fe80::1/64", a_link)?;
    b.add_address("fe80::2/64", b_link)
}

async fn get_link(handle: &Handle, name: &str) -> io::Result<LinkMessage> {
    let mut links = handle.link().get().match_name(name).execute();
    let link = links.try_next().await.map_err(netlink_error)?;
    link.ok_or_else(|| io::Error::other("no answer from netlink"))
}

async fn link_index(handle: &Handle, name: &str) -> io::Result<u32> {
    Ok(get_link(handle, name).await?.header.index)
}

fn carries_traffic(link: &LinkMessage) -> bool {
    link.attributes.contains(&LinkAttribute::OperState(State::Up))
}

/// Whether this announces that the kernel receives packets for an address.
fn receives_for(message: &RouteNetlinkMessage, address: IpAddr) -> bool {
    let RouteNetlinkMessage::NewRoute(route) = message else { return false };
    let destination = RouteAttribute::Destination(address.into());
    route.header.kind == RouteType::Local && route.attributes.contains(&destination)
}

/// The errno that the kernel answered, where it did.
fn netlink_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// Reads `ADDRESS/PREFIX-LENGTH`.
fn parse_prefix(text: &str) -> Result<(IpAddr, u8), Error> {
    let parsed = || {
        let (ip, length) = text.split_once('/')?;
        let ip: IpAddr = ip.parse().ok()?;
        let length: u8 = length.parse().ok()?;
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        (length <= longest).then_some((ip, length))
    };
    parsed().ok_or_else(|| Error::argument(text, "ADDRESS/PREFIX-LENGTH, such as 192.0.2.1/24"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_checked() {
        assert_eq!(parse_prefix("192.0.2.10/24").unwrap(), (IpAddr::from([192, 0, 2, 10]), 24));
        assert_eq!(parse_prefix("::/0").unwrap(), (IpAddr::from(Ipv6Addr::UNSPECIFIED), 0));
        for wrong in ["", "192.0.2.10", "192.0.2.10/33", "2001:db8::1/129", "host/24", "::1/-1"] {
            assert!(matches!(parse_prefix(wrong), Err(Error::Argument { .. })), "{wrong}");
        }
    }
}

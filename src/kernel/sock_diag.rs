//! Netlink `sock_diag` (sock_diag(7)): what the kernel knows about the sockets of a network namespace, including
//! what no descriptor tells: pending connections, peers, and sockets not accepted yet. Also `SOCK_DESTROY`
//! (Linux 4.5, `CONFIG_INET_DIAG_DESTROY`), which aborts a connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use super::socket::in_network_namespace;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_HEADER: usize = 16;

/// `UDIAG_SHOW_NAME | _VFS | _PEER | _ICONS | _RQLEN` of `linux/unix_diag.h`.
const UNIX_SHOW: u32 = 0x01 | 0x02 | 0x04 | 0x08 | 0x10;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_VFS: u16 = 1;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// Of `linux/inet_diag.h`.
const INET_DIAG_SHUTDOWN: u16 = 8;

/// Connection states of `net/tcp_states.h`, which unix sockets use as well.
pub(crate) mod state {
    pub(crate) const ESTABLISHED: u8 = 1;
    pub(crate) const SYN_SENT: u8 = 2;
    pub(crate) const FIN_WAIT1: u8 = 4;
    pub(crate) const FIN_WAIT2: u8 = 5;
    pub(crate) const TIME_WAIT: u8 = 6;
    pub(crate) const CLOSE: u8 = 7;
    pub(crate) const CLOSE_WAIT: u8 = 8;
    pub(crate) const LAST_ACK: u8 = 9;
    pub(crate) const LISTEN: u8 = 10;
    pub(crate) const CLOSING: u8 = 11;
}

/// A unix socket as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub(crate) kind: u8,
    /// One of [`state`].
    pub(crate) state: u8,
    /// Inode of the socket on `sockfs`; 0 while it waits to be accepted.
    pub(crate) inode: u32,
    /// As `SO_COOKIE`.
    pub(crate) cookie: u64,
    /// The bound name without the address family; abstract names begin with a zero byte.
    pub(crate) name: Option<Vec<u8>>,
    /// Inode and device of the file it is bound to.
    pub(crate) file: Option<(u32, u32)>,
    /// Inode of the connected peer; `Some(0)` if the peer is gone or waits to be accepted.
    pub(crate) peer: Option<u32>,
    /// For a listener, the inodes of the client ends of connections that wait to be accepted.
    pub(crate) pending: Vec<u32>,
    /// Bytes to be read (of a datagram socket: of the first message); for a listener the number of connections
    /// that wait.
    pub(crate) receive_queue: u32,
    /// Bytes sent and not read yet; for a listener the greatest number that may wait.
    pub(crate) send_queue: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub(crate) shutdown: u8,
}

/// An internet socket as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InetSocket {
    /// `IPPROTO_TCP` or `IPPROTO_UDP`.
    pub(crate) protocol: u8,
    /// One of [`state`], or another of the kernel's TCP states.
    pub(crate) state: u8,
    /// Inode on `sockfs`; 0 while it waits to be accepted.
    pub(crate) inode: u32,
    /// As `SO_COOKIE`.
    pub(crate) cookie: u64,
    /// Local address.
    pub(crate) local: SocketAddr,
    /// Address of the peer, unspecified without one.
    pub(crate) remote: SocketAddr,
    /// Index of the interface it is bound to, 0 for any.
    pub(crate) interface: u32,
    /// Bytes to be read; for a listener the number of connections that wait.
    pub(crate) receive_queue: u32,
    /// Bytes not acknowledged by the peer; for a listener the greatest number that may wait.
    pub(crate) send_queue: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub(crate) shutdown: u8,
}

/// A netlink socket that asks about the network namespace of the thread that opened it, from whatever thread it
/// is used later.
#[derive(Debug)]
pub(crate) struct SockDiag {
    socket: OwnedFd,
    sequence: u32,
}

impl SockDiag {
    /// Opens the client. `EPROTONOSUPPORT` where the kernel has no `CONFIG_NETLINK_DIAG`.
    pub(crate) fn open() -> nix::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Opens the client in the network namespace of process `pid`.
    ///
    /// # Errors
    /// As [`open`](Self::open); the error of open(2) or setns(2) if the namespace can't be entered.
    pub(crate) fn open_of(pid: i32) -> nix::Result<Self> {
        let namespace = |of: &str| format!("/proc/{of}/ns/net");
        let failed =
            |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let theirs = std::fs::File::open(namespace(&pid.to_string())).map_err(failed)?;
        let own = std::fs::metadata(namespace("thread-self")).map_err(failed)?;
        let same = theirs.metadata().map_err(failed)?.ino() == own.ino();
        if same {
            Self::open()
        } else {
            in_network_namespace(theirs.as_fd(), Self::open)?
        }
    }

    /// All unix sockets of the namespace.
    pub(crate) fn unix(&mut self) -> nix::Result<Vec<UnixSocket>> {
        self.dump(&unix_request(0), parse_unix)
    }

    /// The unix socket of this inode; `ENOENT` if there is none in the namespace.
    pub(crate) fn unix_socket(&mut self, inode: u32) -> nix::Result<UnixSocket> {
        let mut found = Err(Errno::ENOENT);
        self.send(
            SOCK_DIAG_BY_FAMILY,
            (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
            &unix_request(inode),
        )?;
        self.receive(|message| {
            found = parse_unix(message).ok_or(Errno::EPROTO);
            Ok(())
        })?;
        found
    }

    /// All sockets of `family` (`AF_INET`, `AF_INET6`) and `protocol` (`IPPROTO_TCP`, `IPPROTO_UDP`); of TCP also those that
    /// wait to be accepted and those that have no descriptor any more.
    pub(crate) fn inet(&mut self, family: i32, protocol: i32) -> nix::Result<Vec<InetSocket>> {
        let mut request = vec![family as u8, protocol as u8, 0, 0];
        request.extend(u32::MAX.to_ne_bytes());
        request.extend([0; 48]);
        self.dump(&request, |message| parse_inet(message, protocol as u8))
    }

    /// Aborts a connection: its owner sees `ECONNABORTED`, the peer gets a reset (sock_diag(7), `SOCK_DESTROY`).
    /// `EOPNOTSUPP` without `CONFIG_INET_DIAG_DESTROY`, `ENOENT` if it is gone.
    pub(crate) fn destroy(&mut self, target: &InetSocket) -> nix::Result<()> {
        let family = if target.local.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let mut request = vec![family as u8, target.protocol, 0, 0];
        request.extend(u32::MAX.to_ne_bytes());
        request.extend(target.local.port().to_be_bytes());
        request.extend(target.remote.port().to_be_bytes());
        request.extend(address_bytes(target.local.ip()));
        request.extend(address_bytes(target.remote.ip()));
        request.extend(target.interface.to_ne_bytes());
        request.extend(target.cookie.to_ne_bytes());
        self.send(
            SOCK_DESTROY,
            (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
            &request,
        )?;
        self.receive(|_| Ok(()))
    }

    /// Asks for a dump and parses each answer; asks again if the kernel says that the table changed meanwhile.
    fn dump<T>(
        &mut self,
        request: &[u8],
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> nix::Result<Vec<T>> {
        const TRIES: usize = 8;
        for _ in 0..TRIES {
            let mut found = Vec::new();
            self.send(
                SOCK_DIAG_BY_FAMILY,
                (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16,
                request,
            )?;
            match self.receive(|message| {
                found.push(parse(message).ok_or(Errno::EPROTO)?);
                Ok(())
            }) {
                Err(Errno::EINTR) => continue,
                other => return other.map(|()| found),
            }
        }
        Err(Errno::EINTR)
    }

    fn send(&mut self, kind: u16, flags: u16, payload: &[u8]) -> nix::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = Vec::with_capacity(NLMSG_HEADER + payload.len());
        message.extend(((NLMSG_HEADER + payload.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(payload);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty()).map(drop)
    }

    /// Reads messages up to the end of the answer. `EINTR` stands for a dump the kernel marked inconsistent.
    fn receive(&mut self, mut each: impl FnMut(&[u8]) -> nix::Result<()>) -> nix::Result<()> {
        let mut buffer = vec![0u8; 64 * 1024];
        let mut inconsistent = false;
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while rest.len() >= NLMSG_HEADER {
                let size = u32_at(rest, 0).ok_or(Errno::EPROTO)? as usize;
                let message = rest
                    .get(..size)
                    .filter(|m| m.len() >= NLMSG_HEADER)
                    .ok_or(Errno::EPROTO)?;
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or(&[]);
                if u32_at(message, 8) != Some(self.sequence) {
                    continue;
                }
                let flags = u16_at(message, 6).ok_or(Errno::EPROTO)?;
                inconsistent |= i32::from(flags) & libc::NLM_F_DUMP_INTR != 0;
                match i32::from(u16_at(message, 4).ok_or(Errno::EPROTO)?) {
                    libc::NLMSG_DONE => {
                        return if inconsistent {
                            Err(Errno::EINTR)
                        } else {
                            Ok(())
                        };
                    }
                    libc::NLMSG_ERROR => {
                        return match u32_at(message, NLMSG_HEADER).ok_or(Errno::EPROTO)? as i32 {
                            0 => Ok(()),
                            error => Err(Errno::from_raw(-error)),
                        };
                    }
                    _ => each(&message[NLMSG_HEADER..])?,
                }
            }
        }
    }
}

/// `struct unix_diag_req` for one inode, or for all with 0.
fn unix_request(inode: u32) -> Vec<u8> {
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(inode.to_ne_bytes());
    request.extend(UNIX_SHOW.to_ne_bytes());
    request.extend([0xff; 8]);
    request
}

/// Parses `struct unix_diag_msg` and its attributes.
fn parse_unix(message: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        kind: *message.get(1)?,
        state: *message.get(2)?,
        inode: u32_at(message, 4)?,
        cookie: u64_at(message, 8)?,
        ..UnixSocket::default()
    };
    for (kind, value) in attributes(message.get(16..)?) {
        match kind {
            UNIX_DIAG_NAME => socket.name = Some(name(value).to_vec()),
            UNIX_DIAG_VFS => socket.file = Some((u32_at(value, 0)?, u32_at(value, 4)?)),
            UNIX_DIAG_PEER => socket.peer = Some(u32_at(value, 0)?),
            UNIX_DIAG_ICONS => {
                socket.pending = value
                    .chunks_exact(4)
                    .filter_map(|ino| u32_at(ino, 0))
                    .collect()
            }
            UNIX_DIAG_RQLEN => {
                socket.receive_queue = u32_at(value, 0)?;
                socket.send_queue = u32_at(value, 4)?;
            }
            UNIX_DIAG_SHUTDOWN => socket.shutdown = *value.first()?,
            _ => {}
        }
    }
    Some(socket)
}

/// A name without the zero byte that ends a path.
fn name(value: &[u8]) -> &[u8] {
    match value {
        [first, .., 0] if *first != 0 => &value[..value.len() - 1],
        _ => value,
    }
}

/// Parses `struct inet_diag_msg` and its attributes.
fn parse_inet(message: &[u8], protocol: u8) -> Option<InetSocket> {
    let family = i32::from(*message.first()?);
    let port = |at: usize| {
        Some(u16::from_be_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
        Some(if family == libc::AF_INET {
            IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
        } else {
            IpAddr::V6(Ipv6Addr::from(bytes))
        })
    };
    let mut socket = InetSocket {
        protocol,
        state: *message.get(1)?,
        local: SocketAddr::new(address(8)?, port(4)?),
        remote: SocketAddr::new(address(24)?, port(6)?),
        interface: u32_at(message, 40)?,
        cookie: u64_at(message, 44)?,
        receive_queue: u32_at(message, 56)?,
        send_queue: u32_at(message, 60)?,
        inode: u32_at(message, 68)?,
        shutdown: 0,
    };
    for (kind, value) in attributes(message.get(72..)?) {
        if kind == INET_DIAG_SHUTDOWN {
            socket.shutdown = *value.first()?;
        }
    }
    Some(socket)
}

/// Walks netlink attributes (`struct nlattr`).
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let size = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & 0x3fff;
        let value = rest.get(4..size)?;
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// An address as `inet_diag_sockid` holds it.
fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(v6) => v6.octets(),
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
#[path = "sock_diag_tests.rs"]
mod tests;

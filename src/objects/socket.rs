//! Sockets of any family: what they have in common, and the choice of the family's file.
//!
//! A socket is the same socket if it has the same `SO_COOKIE`. What can't be judged from one socket alone (is its peer
//! in the tree as well?) is decided over all of them, in [`super::socket_plan`].

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::live::Live;
use super::socket_extra::{self, Extra};
use super::socket_options::{Options, Sort};
use super::socket_queue::{self, Shape};
use super::{Error, tcp, udp, unix};
use crate::kernel::socket::{
    Address, Credentials, Message, SO_COOKIE, SO_NETNS_COOKIE, int_option, local_address, option,
    peer_address, u64_option,
};
use crate::record::Kind;

pub use super::socket_apply::Change;
pub use super::socket_make::make;

/// A recorded socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// `SO_COOKIE`: names this socket and no other until the next boot.
    pub cookie: u64,
    /// `SO_NETNS_COOKIE`: its network namespace.
    pub namespace: u64,
    /// Its inode on `sockfs`, by which unix sockets name their peers.
    pub inode: u64,
    /// Family, type and protocol.
    pub sort: Sort,
    /// The address it is bound to.
    pub local: Address,
    /// The address of its peer; empty if it is not connected.
    pub peer: Address,
    /// Options.
    pub options: Options,
    /// What it has besides.
    pub extra: Extra,
    /// The file a unix socket is bound to.
    pub file: Option<unix::BoundFile>,
    /// What it is used for.
    pub role: Role,
    /// What waits to be read; of TCP only once both ends are known to be in the tree.
    pub queue: Vec<Message>,
    /// What it has that can't be recorded: it may be kept, but not made again.
    pub irreplaceable: Option<String>,
    /// Its peer is in the tree, of a connection.
    pub inner: bool,
    /// Who its peer was when they were connected (`SO_PEERCRED`), of unix sockets.
    pub credentials: Option<Credentials>,
}

/// What a socket is used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Neither listens nor has a connection.
    Plain {
        /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
        ended: u8,
    },
    /// Waits for connections.
    Listening {
        /// The greatest number that may wait.
        backlog: u32,
        /// Those that wait: of unix the inodes of their clients, of TCP their own cookies.
        waiting: Vec<u64>,
    },
    /// A unix socket with a peer (or, of a datagram socket, a destination).
    Unix {
        /// Inode of the peer; 0 if it is gone or waits to be accepted.
        peer: u64,
        /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
        ended: u8,
    },
    /// A TCP connection.
    Tcp(tcp::Connection),
    /// A connection to the outside that a rollback had to reset: what became of it does not matter any more.
    Reset,
}

impl State {
    /// Stream or messages.
    pub(super) fn shape(&self) -> Shape {
        if self.sort.kind == libc::SOCK_STREAM {
            Shape::Stream
        } else {
            Shape::Messages
        }
    }

    /// Whether it is a UDP socket.
    pub(super) fn is_udp(&self) -> bool {
        self.sort.kind == libc::SOCK_DGRAM && self.sort.protocol == libc::IPPROTO_UDP
    }

    /// Whether it listens.
    pub(super) fn listens(&self) -> bool {
        matches!(self.role, Role::Listening { .. })
    }

    /// The backlog of a unix listener.
    pub fn unix_backlog(&self) -> Option<u32> {
        match self.role {
            Role::Listening { backlog, .. } if self.sort.family == libc::AF_UNIX => Some(backlog),
            _ => None,
        }
    }

    /// What it is, as refusals call it: `unix stream socket (/run/x)`.
    pub fn describe(&self) -> String {
        let kind = match (self.sort.family, self.sort.kind, self.sort.protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW, _) => "raw IP socket",
            (_, _, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6) => "ICMP socket",
            (libc::AF_UNIX, libc::SOCK_STREAM, _) => "unix stream socket",
            (libc::AF_UNIX, libc::SOCK_DGRAM, _) => "unix datagram socket",
            (libc::AF_UNIX, ..) => "unix seqpacket socket",
            (libc::AF_NETLINK, ..) => "netlink socket",
            (_, _, libc::IPPROTO_TCP) => "TCP socket",
            _ => "UDP socket",
        };
        let name = |address: &Address| match (address.inet(), address.unix_name()) {
            (Some(inet), _) => Some(inet.to_string()),
            (None, Some(name)) => Some(String::from_utf8_lossy(name).replace('\0', "@")),
            (None, None) => None,
        };
        match (name(&self.local), name(&self.peer)) {
            (Some(local), Some(peer)) => format!("{kind} ({local} to {peer})"),
            (Some(local), None) => format!("{kind} ({local})"),
            (None, Some(peer)) => format!("{kind} (to {peer})"),
            (None, None) => kind.to_owned(),
        }
    }
}

/// Family, type and protocol of a live socket.
fn sort_of(fd: BorrowedFd<'_>) -> nix::Result<Sort> {
    Ok(Sort {
        family: int_option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?,
        kind: int_option(fd, libc::SOL_SOCKET, libc::SO_TYPE)?,
        protocol: int_option(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)?,
    })
}

/// Whether an error waits to be reported (`SO_ERROR`), which only poll(2) tells without taking it.
fn has_error(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    let events = fds[0].revents().unwrap_or(PollFlags::empty());
    Ok(events.contains(PollFlags::POLLERR))
}

/// Records a socket.
pub fn capture(live: &Live<'_>) -> Result<State, Error> {
    let duplicate = live.duplicate()?;
    let fd = duplicate.as_fd();
    let sort = sort_of(fd).map_err(live.failed("getsockopt"))?;
    let inet = matches!(sort.family, libc::AF_INET | libc::AF_INET6);
    match (sort.kind, sort.protocol) {
        _ if sort.family == libc::AF_UNIX => {}
        (libc::SOCK_STREAM, libc::IPPROTO_TCP) if inet => {}
        (libc::SOCK_DGRAM, libc::IPPROTO_UDP | libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6)
        | (libc::SOCK_RAW, _)
            if inet => {}
        _ if sort.family == libc::AF_NETLINK => {}
        _ => {
            return Err(live
                .refuse(&unsupported(sort), "close it before the checkpoint")
                .into());
        }
    }
    if has_error(fd).map_err(live.failed("poll"))? {
        // Looking at the queue would take it.
        let remedy = "take the checkpoint when the program has seen it";
        return Err(live
            .refuse("socket with an error that waits to be reported", remedy)
            .into());
    }
    let state = capture_common(live, fd, sort)?;
    match (sort.family, sort.protocol) {
        (libc::AF_UNIX, _) => unix::capture(live, fd, state),
        (libc::AF_NETLINK, _) => idle_netlink(live, fd, state),
        (_, libc::IPPROTO_TCP) => tcp::capture(live, fd, state),
        _ => udp::capture(live, fd, state),
    }
}

/// How refusals call a socket of a sort that is not supported.
fn unsupported(sort: Sort) -> String {
    let family = match sort.family {
        libc::AF_PACKET => "packet socket".to_owned(),
        libc::AF_VSOCK => "vsock socket".to_owned(),
        libc::AF_ALG => "kernel crypto socket".to_owned(),
        libc::AF_BLUETOOTH => "bluetooth socket".to_owned(),
        libc::AF_XDP => "XDP socket".to_owned(),
        libc::AF_CAN => "CAN socket".to_owned(),
        libc::AF_INET | libc::AF_INET6 => match (sort.kind, sort.protocol) {
            (_, libc::IPPROTO_MPTCP) => "MPTCP socket".to_owned(),
            (_, libc::IPPROTO_SCTP) => "SCTP socket".to_owned(),
            (_, protocol) => format!("IP socket of protocol {protocol}"),
        },
        family => format!("socket of address family {family}"),
    };
    format!("{family}, which can't be recorded")
}

/// What all families have.
fn capture_common(live: &Live<'_>, fd: BorrowedFd<'_>, sort: Sort) -> Result<State, Error> {
    let number =
        |name: i32| u64_option(fd, libc::SOL_SOCKET, name).map_err(live.failed("getsockopt"));
    let extra = socket_extra::capture(live, fd, sort)?;
    Ok(State {
        cookie: number(SO_COOKIE)?,
        // Linux before 5.14 can't tell: all are then taken to be of one namespace.
        namespace: u64_option(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE).unwrap_or(0),
        inode: live.common.ino,
        sort,
        local: local_address(fd).map_err(live.failed("getsockname"))?,
        peer: match sort.family {
            libc::AF_NETLINK => Address::default(),
            _ => peer_address(fd)
                .map_err(live.failed("getpeername"))?
                .unwrap_or_default(),
        },
        options: Options::read(fd, sort).map_err(live.failed("getsockopt"))?,
        irreplaceable: extra.irreplaceable().or_else(|| irreplaceable(fd)),
        extra,
        file: None,
        role: Role::Plain { ended: 0 },
        queue: Vec::new(),
        inner: false,
        credentials: None,
    })
}

/// An upper-layer protocol (tcp(7), `TCP_ULP`: TLS in the kernel).
fn irreplaceable(fd: BorrowedFd<'_>) -> Option<String> {
    let mut name = [0; 16];
    match option(fd, libc::IPPROTO_TCP, libc::TCP_ULP, &mut name) {
        Ok(length @ 1..) => {
            let name = String::from_utf8_lossy(&name[..length.min(16)]).replace('\0', "");
            Some(format!("it has the upper-layer protocol {name}"))
        }
        _ => None,
    }
}

/// A netlink socket may stay if nothing waits in it.
fn idle_netlink(live: &Live<'_>, fd: BorrowedFd<'_>, state: State) -> Result<State, Error> {
    if crate::kernel::socket::readable(fd).map_err(live.failed("poll"))? {
        return Err(live
            .refuse(
                "netlink socket with messages that wait to be read",
                "take the checkpoint later",
            )
            .into());
    }
    Ok(state)
}

/// The queue of a socket.
pub(super) fn capture_queue(
    live: &Live<'_>,
    fd: BorrowedFd<'_>,
    shape: Shape,
) -> Result<Vec<Message>, Error> {
    socket_queue::peek(fd, shape).map_err(live.failed("recvmsg"))
}

impl State {
    /// The socket's state now, in the shape of the record.
    ///
    /// # Errors
    /// If the kernel refuses to tell.
    pub fn observe(&self, live: &Live<'_>) -> Result<Self, Error> {
        let duplicate = live.duplicate()?;
        let fd = duplicate.as_fd();
        let cookie =
            u64_option(fd, libc::SOL_SOCKET, SO_COOKIE).map_err(live.failed("getsockopt"))?;
        if cookie != self.cookie {
            // Another socket under a number that was used again: not the recorded one.
            return Ok(Self {
                cookie,
                ..self.clone()
            });
        }
        let options = match self.role {
            Role::Tcp(_) => self.options.read_again(fd, self.sort),
            _ => Options::read(fd, self.sort),
        };
        let options = options.map_err(live.failed("getsockopt"))?;
        let state = Self {
            options,
            extra: socket_extra::read(live, fd, self.sort)?,
            queue: Vec::new(),
            ..self.clone()
        };
        match (self.sort.family, self.sort.protocol) {
            (libc::AF_UNIX, _) => unix::observe(live, fd, state),
            (libc::AF_NETLINK, _) => {
                let local = local_address(fd).map_err(live.failed("getsockname"))?;
                let ended =
                    u8::from(crate::kernel::socket::readable(fd).map_err(live.failed("poll"))?);
                Ok(Self {
                    local,
                    role: Role::Plain { ended },
                    ..state
                })
            }
            (_, libc::IPPROTO_TCP) => tcp::observe(live, fd, state),
            _ => udp::observe(live, fd, state),
        }
    }

    /// The kind of its record.
    pub fn record_kind(&self) -> Kind {
        match (self.sort.family, self.sort.protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_TCP) => Kind::TcpSocket,
            (libc::AF_INET | libc::AF_INET6, _) => Kind::UdpSocket,
            _ => Kind::UnixSocket,
        }
    }

    /// What differs between the record and the live socket, in words.
    ///
    /// # Errors
    /// If the kernel refuses to tell.
    pub fn verify(&self, live: &Live<'_>) -> Result<Vec<String>, Error> {
        super::socket_verify::verify(self, live)
    }
}

/// An error of a call of our own.
pub(super) fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

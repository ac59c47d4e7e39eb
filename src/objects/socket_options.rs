//! Socket options: which there are, reading all of a socket at once, putting back those that changed.
//!
//! Options are kept as the bytes getsockopt(2) gives. Left out is what the kernel changes by itself (`SO_INCOMING_CPU`,
//! `TCP_QUICKACK`, `TCP_WINDOW_CLAMP`, `TCP_MAXSEG`) and what can only be read once (`SO_ERROR`).

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::kernel::socket::{int_option, option, set_option};

/// `SO_BUF_LOCK` (Linux 5.14): which buffer sizes a program has set, so that the kernel does not tune them.
const SO_BUF_LOCK: i32 = 72;
const SNDBUF_LOCKED: i32 = 1;
const RCVBUF_LOCKED: i32 = 2;
/// Longest option value kept: `struct icmp6_filter`.
const LONGEST: usize = 32;

/// Which sockets have an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    Unix,
    Inet6,
    AnyInet,
    Tcp,
    Udp,
    Datagram,
    Raw,
    Netlink,
}

/// An option: level, name, most bytes of its value, who has it, how messages call it.
struct Known(i32, i32, usize, Of, &'static str);

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
/// `SOL_RAW`.
const RAW: i32 = libc::IPPROTO_RAW;
const ICMPV6: i32 = libc::IPPROTO_ICMPV6;
const NETLINK: i32 = libc::SOL_NETLINK;

/// Options that count only until a TCP connection is established: of one they are recorded, and not looked at again.
const OF_SETUP: &[(i32, i32)] = &[
    (SOCKET, libc::SO_REUSEADDR),
    (SOCKET, libc::SO_REUSEPORT),
    (SOCKET, libc::SO_BROADCAST),
    (SOCKET, libc::SO_DONTROUTE),
    (SOCKET, libc::SO_BINDTODEVICE),
    (SOCKET, libc::SO_BUSY_POLL),
    (IP, libc::IP_FREEBIND),
    (IP, libc::IP_TRANSPARENT),
    (IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IPV6, libc::IPV6_V6ONLY),
    (TCP, libc::TCP_SYNCNT),
    (TCP, libc::TCP_DEFER_ACCEPT),
    (TCP, libc::TCP_FASTOPEN),
];

/// Every option that is recorded. The numbers without a name in libc are those of `asm-generic/socket.h`,
/// `linux/in.h`, `linux/in6.h`, `linux/tcp.h` and `linux/udp.h`.
const KNOWN: &[Known] = &[
    Known(SOCKET, libc::SO_KEEPALIVE, 4, Of::All, "SO_KEEPALIVE"),
    Known(SOCKET, libc::SO_REUSEADDR, 4, Of::All, "SO_REUSEADDR"),
    Known(SOCKET, libc::SO_REUSEPORT, 4, Of::AnyInet, "SO_REUSEPORT"),
    Known(SOCKET, libc::SO_LINGER, 8, Of::All, "SO_LINGER"),
    Known(SOCKET, libc::SO_RCVTIMEO, 16, Of::All, "SO_RCVTIMEO"),
    Known(SOCKET, libc::SO_SNDTIMEO, 16, Of::All, "SO_SNDTIMEO"),
    Known(SOCKET, libc::SO_RCVLOWAT, 4, Of::All, "SO_RCVLOWAT"),
    Known(SOCKET, libc::SO_OOBINLINE, 4, Of::All, "SO_OOBINLINE"),
    Known(SOCKET, libc::SO_BROADCAST, 4, Of::All, "SO_BROADCAST"),
    Known(SOCKET, libc::SO_DONTROUTE, 4, Of::AnyInet, "SO_DONTROUTE"),
    Known(SOCKET, libc::SO_PRIORITY, 4, Of::All, "SO_PRIORITY"),
    Known(SOCKET, libc::SO_MARK, 4, Of::All, "SO_MARK"),
    Known(
        SOCKET,
        libc::SO_BINDTODEVICE,
        16,
        Of::AnyInet,
        "SO_BINDTODEVICE",
    ),
    Known(SOCKET, libc::SO_TIMESTAMP, 4, Of::All, "SO_TIMESTAMP"),
    Known(SOCKET, libc::SO_TIMESTAMPNS, 4, Of::All, "SO_TIMESTAMPNS"),
    Known(
        SOCKET,
        libc::SO_TIMESTAMPING,
        4,
        Of::AnyInet,
        "SO_TIMESTAMPING",
    ),
    Known(SOCKET, libc::SO_RXQ_OVFL, 4, Of::All, "SO_RXQ_OVFL"),
    Known(SOCKET, libc::SO_PEEK_OFF, 4, Of::All, "SO_PEEK_OFF"),
    Known(SOCKET, libc::SO_BUSY_POLL, 4, Of::AnyInet, "SO_BUSY_POLL"),
    Known(
        SOCKET,
        libc::SO_MAX_PACING_RATE,
        8,
        Of::AnyInet,
        "SO_MAX_PACING_RATE",
    ),
    Known(SOCKET, libc::SO_ZEROCOPY, 4, Of::Tcp, "SO_ZEROCOPY"),
    Known(SOCKET, libc::SO_PASSCRED, 4, Of::Unix, "SO_PASSCRED"),
    Known(SOCKET, libc::SO_PASSSEC, 4, Of::Unix, "SO_PASSSEC"),
    Known(SOCKET, 76, 4, Of::Unix, "SO_PASSPIDFD"),
    Known(IP, libc::IP_TOS, 4, Of::AnyInet, "IP_TOS"),
    Known(IP, libc::IP_TTL, 4, Of::AnyInet, "IP_TTL"),
    Known(IP, libc::IP_MTU_DISCOVER, 4, Of::AnyInet, "IP_MTU_DISCOVER"),
    Known(IP, libc::IP_RECVERR, 4, Of::AnyInet, "IP_RECVERR"),
    Known(IP, libc::IP_FREEBIND, 4, Of::AnyInet, "IP_FREEBIND"),
    Known(IP, libc::IP_TRANSPARENT, 4, Of::AnyInet, "IP_TRANSPARENT"),
    Known(
        IP,
        libc::IP_BIND_ADDRESS_NO_PORT,
        4,
        Of::AnyInet,
        "IP_BIND_ADDRESS_NO_PORT",
    ),
    Known(IP, libc::IP_PKTINFO, 4, Of::Datagram, "IP_PKTINFO"),
    Known(IP, libc::IP_RECVTOS, 4, Of::Datagram, "IP_RECVTOS"),
    Known(IP, libc::IP_RECVTTL, 4, Of::Datagram, "IP_RECVTTL"),
    Known(
        IP,
        libc::IP_RECVORIGDSTADDR,
        4,
        Of::Datagram,
        "IP_RECVORIGDSTADDR",
    ),
    Known(
        IP,
        libc::IP_MULTICAST_TTL,
        4,
        Of::Datagram,
        "IP_MULTICAST_TTL",
    ),
    Known(
        IP,
        libc::IP_MULTICAST_LOOP,
        4,
        Of::Datagram,
        "IP_MULTICAST_LOOP",
    ),
    Known(IPV6, libc::IPV6_V6ONLY, 4, Of::Inet6, "IPV6_V6ONLY"),
    Known(IPV6, libc::IPV6_TCLASS, 4, Of::Inet6, "IPV6_TCLASS"),
    Known(
        IPV6,
        libc::IPV6_MTU_DISCOVER,
        4,
        Of::Inet6,
        "IPV6_MTU_DISCOVER",
    ),
    Known(IPV6, libc::IPV6_RECVERR, 4, Of::Inet6, "IPV6_RECVERR"),
    Known(
        IPV6,
        libc::IPV6_RECVPKTINFO,
        4,
        Of::Inet6,
        "IPV6_RECVPKTINFO",
    ),
    Known(
        IPV6,
        libc::IPV6_MULTICAST_LOOP,
        4,
        Of::Inet6,
        "IPV6_MULTICAST_LOOP",
    ),
    Known(TCP, libc::TCP_NODELAY, 4, Of::Tcp, "TCP_NODELAY"),
    Known(TCP, libc::TCP_CORK, 4, Of::Tcp, "TCP_CORK"),
    Known(TCP, libc::TCP_KEEPIDLE, 4, Of::Tcp, "TCP_KEEPIDLE"),
    Known(TCP, libc::TCP_KEEPINTVL, 4, Of::Tcp, "TCP_KEEPINTVL"),
    Known(TCP, libc::TCP_KEEPCNT, 4, Of::Tcp, "TCP_KEEPCNT"),
    Known(TCP, libc::TCP_SYNCNT, 4, Of::Tcp, "TCP_SYNCNT"),
    Known(TCP, libc::TCP_LINGER2, 4, Of::Tcp, "TCP_LINGER2"),
    Known(TCP, libc::TCP_DEFER_ACCEPT, 4, Of::Tcp, "TCP_DEFER_ACCEPT"),
    Known(TCP, libc::TCP_CONGESTION, 16, Of::Tcp, "TCP_CONGESTION"),
    Known(TCP, libc::TCP_USER_TIMEOUT, 4, Of::Tcp, "TCP_USER_TIMEOUT"),
    Known(TCP, libc::TCP_FASTOPEN, 4, Of::Tcp, "TCP_FASTOPEN"),
    Known(
        TCP,
        libc::TCP_NOTSENT_LOWAT,
        4,
        Of::Tcp,
        "TCP_NOTSENT_LOWAT",
    ),
    Known(TCP, 36, 4, Of::Tcp, "TCP_INQ"),
    Known(UDP, libc::UDP_CORK, 4, Of::Udp, "UDP_CORK"),
    Known(IP, libc::IP_HDRINCL, 4, Of::Raw, "IP_HDRINCL"),
    Known(RAW, 1, 4, Of::Raw, "ICMP_FILTER"),
    Known(RAW, 7, 4, Of::Raw, "IPV6_CHECKSUM"),
    Known(ICMPV6, 1, 32, Of::Raw, "ICMPV6_FILTER"),
    Known(NETLINK, 3, 4, Of::Netlink, "NETLINK_PKTINFO"),
    Known(NETLINK, 4, 4, Of::Netlink, "NETLINK_BROADCAST_ERROR"),
    Known(NETLINK, 5, 4, Of::Netlink, "NETLINK_NO_ENOBUFS"),
    Known(NETLINK, 8, 4, Of::Netlink, "NETLINK_LISTEN_ALL_NSID"),
    Known(NETLINK, 10, 4, Of::Netlink, "NETLINK_CAP_ACK"),
    Known(NETLINK, 11, 4, Of::Netlink, "NETLINK_EXT_ACK"),
    Known(NETLINK, 12, 4, Of::Netlink, "NETLINK_GET_STRICT_CHK"),
    Known(UDP, 103, 4, Of::Udp, "UDP_SEGMENT"),
    Known(UDP, 104, 4, Of::Udp, "UDP_GRO"),
];

/// The options of one socket.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Options {
    /// For each option its socket has, in the order of the table: length (`MISSING` if the kernel refuses it), value.
    values: Vec<u8>,
    /// `SO_SNDBUF` and `SO_RCVBUF`; equal sizes matter only where the lock says that a program set them.
    buffers: [i32; 2],
    /// `SO_BUF_LOCK`.
    locks: i32,
}

const MISSING: u8 = 0xff;

/// What decides which options a socket has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sort {
    /// `AF_*`.
    pub family: i32,
    /// `SOCK_*`.
    pub kind: i32,
    /// `IPPROTO_*`.
    pub protocol: i32,
}

impl Sort {
    fn has(self, of: Of) -> bool {
        let inet = matches!(self.family, libc::AF_INET | libc::AF_INET6);
        match of {
            Of::All => true,
            Of::Unix => self.family == libc::AF_UNIX,
            Of::Inet6 => self.family == libc::AF_INET6,
            Of::AnyInet => inet,
            Of::Tcp => inet && self.protocol == libc::IPPROTO_TCP,
            Of::Udp => inet && self.protocol == libc::IPPROTO_UDP,
            Of::Datagram => inet && self.kind != libc::SOCK_STREAM,
            Of::Raw => inet && self.kind == libc::SOCK_RAW,
            Of::Netlink => self.family == libc::AF_NETLINK,
        }
    }

    fn options(self) -> impl Iterator<Item = &'static Known> {
        KNOWN.iter().filter(move |known| self.has(known.3))
    }
}

impl Options {
    /// Reads all options of a socket.
    pub(super) fn read(fd: BorrowedFd<'_>, sort: Sort) -> nix::Result<Self> {
        Self::read_some(fd, sort, None)
    }

    /// Reads the options of a TCP connection that can matter still; the others as in `self`.
    pub(super) fn read_again(&self, fd: BorrowedFd<'_>, sort: Sort) -> nix::Result<Self> {
        Self::read_some(fd, sort, Some(self))
    }

    fn read_some(fd: BorrowedFd<'_>, sort: Sort, known: Option<&Self>) -> nix::Result<Self> {
        let mut values = Vec::with_capacity(256);
        for &Known(level, name, most, ..) in sort.options() {
            if let Some(known) = known
                && OF_SETUP.contains(&(level, name))
            {
                // The values are in the same order, and so far of the same lengths.
                let rest = known.values.get(values.len()..).unwrap_or_default();
                let length = match rest.first() {
                    Some(&MISSING) | None => 0,
                    Some(&length) => usize::from(length),
                };
                values.extend(rest.iter().take(1 + length));
                continue;
            }
            let mut value = [0; LONGEST];
            match option(fd, level, name, &mut value[..most]) {
                Ok(length) => {
                    let length = length.min(most);
                    values.push(length as u8);
                    values.extend(&value[..length]);
                }
                Err(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTCONN) => {
                    values.push(MISSING);
                }
                Err(error) => return Err(error),
            }
        }
        // Before Linux 5.14 there is no way to know: then sizes are taken as tuned by the kernel.
        let locks = int_option(fd, SOCKET, SO_BUF_LOCK).unwrap_or(0);
        let size = |index: usize, name: i32| match known {
            Some(known) if locks == 0 && known.locks == 0 => Ok(known.buffers[index]),
            _ => int_option(fd, SOCKET, name),
        };
        let buffers = [size(0, libc::SO_SNDBUF)?, size(1, libc::SO_RCVBUF)?];
        Ok(Self {
            values,
            buffers,
            locks,
        })
    }

    /// Whether the program has set `SO_RCVBUF`, so that the kernel does not make it larger.
    pub(super) fn sets_receive_buffer(&self) -> bool {
        self.locks & RCVBUF_LOCKED != 0
    }

    /// Whether nothing a program can have set differs.
    pub(super) fn same(&self, other: &Self) -> bool {
        self.values == other.values
            && self.locks == other.locks
            && (self.locks & SNDBUF_LOCKED == 0 || self.buffers[0] == other.buffers[0])
            && (self.locks & RCVBUF_LOCKED == 0 || self.buffers[1] == other.buffers[1])
    }

    /// Without what means nothing on a connection: `IPV6_V6ONLY`, which bind(2) to an address switches on.
    pub(super) fn of_connection(mut self, sort: Sort) -> Self {
        let mut at = 0;
        for known in sort.options() {
            let length = match self.values.get(at) {
                Some(&MISSING) | None => 0,
                Some(&length) => usize::from(length),
            };
            if (known.0, known.1) == (IPV6, libc::IPV6_V6ONLY) {
                self.values[at + 1..=at + length].fill(0);
            }
            at += 1 + length;
        }
        self
    }

    fn entries(&self, sort: Sort) -> impl Iterator<Item = (&'static Known, Option<&[u8]>)> {
        let mut rest = self.values.as_slice();
        sort.options().map_while(move |known| {
            let (&length, after) = rest.split_first()?;
            if length == MISSING {
                rest = after;
                return Some((known, None));
            }
            let value = after.get(..usize::from(length))?;
            rest = &after[usize::from(length)..];
            Some((known, Some(value)))
        })
    }

    /// The names of those that differ.
    pub(super) fn differences(&self, other: &Self, sort: Sort) -> Vec<&'static str> {
        let mut names: Vec<_> = self
            .entries(sort)
            .zip(other.entries(sort))
            .filter(|((_, one), (_, two))| one != two)
            .map(|((known, _), _)| known.4)
            .collect();
        if !(Self {
            values: Vec::new(),
            ..*self
        })
        .same(&Self {
            values: Vec::new(),
            ..*other
        }) {
            names.push("SO_SNDBUF or SO_RCVBUF");
        }
        names
    }

    /// Sets on the socket what differs from `self`; fails with the name of an option that can't be set.
    pub(super) fn restore(
        &self,
        fd: BorrowedFd<'_>,
        sort: Sort,
    ) -> Result<(), (&'static str, Errno)> {
        let now = Self::read(fd, sort).map_err(|error| ("getsockopt", error))?;
        let differing: Vec<_> = self
            .entries(sort)
            .zip(now.entries(sort))
            .filter(|((_, recorded), (_, now))| recorded != now)
            .filter_map(|((known, recorded), _)| recorded.map(|recorded| (known, recorded)))
            .collect();
        // Off before on: switching SO_TIMESTAMPNS off switches SO_TIMESTAMP off as well.
        let is_off = |value: &[u8]| value.iter().all(|&byte| byte == 0);
        let (off, on): (Vec<_>, Vec<_>) =
            differing.into_iter().partition(|(_, value)| is_off(value));
        for (&Known(level, name, _, _, text), value) in off.into_iter().chain(on) {
            match set_option(fd, level, name, value) {
                // Fixed once there is an address, and of no effect then on a connection.
                Err(Errno::EINVAL) if (level, name) == (IPV6, libc::IPV6_V6ONLY) => {}
                other => other.map_err(|error| (text, error))?,
            }
        }
        self.restore_buffers(fd, &now)
    }

    /// The sizes that a program set. The kernel doubles what it is told (socket(7)), hence the halves.
    fn restore_buffers(&self, fd: BorrowedFd<'_>, now: &Self) -> Result<(), (&'static str, Errno)> {
        let wrong = |index: usize, lock: i32| {
            (self.locks ^ now.locks) & lock != 0
                || self.locks & lock != 0 && self.buffers[index] != now.buffers[index]
        };
        let set = |name: i32, value: i32, text| {
            set_option(fd, SOCKET, name, &value.to_ne_bytes()).map_err(|error| (text, error))
        };
        if wrong(0, SNDBUF_LOCKED) {
            set(libc::SO_SNDBUFFORCE, self.buffers[0] / 2, "SO_SNDBUF")?;
        }
        if wrong(1, RCVBUF_LOCKED) {
            set(libc::SO_RCVBUFFORCE, self.buffers[1] / 2, "SO_RCVBUF")?;
        }
        if wrong(0, SNDBUF_LOCKED) || wrong(1, RCVBUF_LOCKED) {
            set(SO_BUF_LOCK, self.locks, "SO_BUF_LOCK")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const TCP_SORT: Sort = Sort {
        family: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        protocol: libc::IPPROTO_TCP,
    };
    const UNIX_SORT: Sort = Sort {
        family: libc::AF_UNIX,
        kind: libc::SOCK_DGRAM,
        protocol: 0,
    };

    fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) {
        set_option(fd, level, name, value).expect("option");
    }

    #[test]
    fn changed_options_go_back() {
        let socket = TcpListener::bind("127.0.0.1:0").expect("bind");
        let fd = socket.as_fd();
        set(fd, SOCKET, libc::SO_TIMESTAMP, &1i32.to_ne_bytes());
        set(
            fd,
            SOCKET,
            libc::SO_RCVTIMEO,
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        );
        let recorded = Options::read(fd, TCP_SORT).expect("read");
        set(fd, TCP, libc::TCP_NODELAY, &1i32.to_ne_bytes());
        set(fd, TCP, libc::TCP_CONGESTION, b"reno");
        set(fd, SOCKET, libc::SO_TIMESTAMPNS, &1i32.to_ne_bytes());
        set(fd, SOCKET, libc::SO_RCVTIMEO, &[0; 16]);
        set(fd, SOCKET, libc::SO_RCVBUF, &5000i32.to_ne_bytes());
        let now = Options::read(fd, TCP_SORT).expect("read");
        assert!(!recorded.same(&now));
        let names = recorded.differences(&now, TCP_SORT);
        for name in [
            "TCP_NODELAY",
            "SO_TIMESTAMPNS",
            "SO_RCVTIMEO",
            "SO_SNDBUF or SO_RCVBUF",
        ] {
            assert!(names.contains(&name), "{name} missing in {names:?}");
        }
        recorded.restore(fd, TCP_SORT).expect("restore");
        let now = Options::read(fd, TCP_SORT).expect("read");
        assert_eq!(recorded.differences(&now, TCP_SORT), Vec::<&str>::new());
        assert!(recorded.same(&now));
    }

    #[test]
    fn a_size_that_was_set_goes_back() {
        let (one, _other) = UnixDatagram::pair().expect("pair");
        set(
            one.as_fd(),
            SOCKET,
            libc::SO_SNDBUF,
            &20_000i32.to_ne_bytes(),
        );
        let recorded = Options::read(one.as_fd(), UNIX_SORT).expect("read");
        set(
            one.as_fd(),
            SOCKET,
            libc::SO_SNDBUF,
            &50_000i32.to_ne_bytes(),
        );
        recorded.restore(one.as_fd(), UNIX_SORT).expect("restore");
        assert!(recorded.same(&Options::read(one.as_fd(), UNIX_SORT).expect("read")));
        assert_eq!(int_option(one.as_fd(), SOCKET, libc::SO_SNDBUF), Ok(40_000));
    }
}

//! Sockets through a descriptor: options as raw bytes, addresses as the kernel's own, messages with what comes
//! beside their data. What nix offers as types per option is not used, so that options can be kept and put back
//! without knowing each.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chroot, fchdir};
use serde::{Deserialize, Serialize};

/// `SO_COOKIE` (Linux 4.6): a number that means this socket until the machine restarts.
pub const SO_COOKIE: i32 = 57;
/// `SO_NETNS_COOKIE` (Linux 5.14): the same for the network namespace it belongs to.
pub const SO_NETNS_COOKIE: i32 = 71;

/// A socket address as the kernel writes it: `struct sockaddr` of the family's own length.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Address(pub Vec<u8>);

impl Address {
    /// The address family, `AF_UNSPEC` of an empty address.
    pub fn family(&self) -> i32 {
        match self.0.get(..2) {
            Some(family) => i32::from(u16::from_ne_bytes([family[0], family[1]])),
            None => libc::AF_UNSPEC,
        }
    }

    /// The name of a unix address: a path (without its terminating zero), or a zero byte and an abstract name.
    /// `None` for a socket without a name.
    pub fn unix_name(&self) -> Option<&[u8]> {
        let name = self
            .0
            .get(2..)
            .filter(|name| self.family() == libc::AF_UNIX && !name.is_empty())?;
        match name[0] {
            0 => (name.len() > 1).then_some(name),
            _ => name.split(|&byte| byte == 0).next(),
        }
    }

    /// The path of a unix address bound to a file.
    pub fn unix_path(&self) -> Option<&[u8]> {
        self.unix_name().filter(|name| name[0] != 0)
    }

    /// The unix address of a name as [`Self::unix_name`] gives it.
    pub fn unix(name: &[u8]) -> Self {
        let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        bytes.extend(name);
        if name.first().is_some_and(|&byte| byte != 0) {
            bytes.push(0);
        }
        Self(bytes)
    }

    /// The internet address, with its port.
    pub fn inet(&self) -> Option<SocketAddr> {
        let port = u16::from_be_bytes(self.0.get(2..4)?.try_into().ok()?);
        let address = match self.family() {
            libc::AF_INET => IpAddr::from(<[u8; 4]>::try_from(self.0.get(4..8)?).ok()?),
            libc::AF_INET6 => IpAddr::from(<[u8; 16]>::try_from(self.0.get(8..24)?).ok()?),
            _ => return None,
        };
        Some(SocketAddr::new(address, port))
    }

    /// An address that connects a socket to nothing (`AF_UNSPEC`): dissolves the association of a datagram socket,
    /// and aborts a TCP connection.
    pub fn unspecified() -> Self {
        Self(vec![0; 16])
    }
}

/// Who sent a message (`SCM_CREDENTIALS`), in the caller's PID and user namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Credentials {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// One message: a datagram, or a stretch of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Message {
    /// The bytes.
    pub data: Vec<u8>,
    /// Where it came from; empty without a name.
    pub source: Address,
    /// Of a socket with `SO_PASSCRED`.
    pub credentials: Option<Credentials>,
    /// Device and inode of each descriptor that it carries (`SCM_RIGHTS`).
    pub rights: Vec<(u64, u64)>,
    /// The last bytes of it did not fit.
    pub truncated: bool,
}

/// Reads an option into `value` and returns its length.
///
/// # Errors
/// As getsockopt(2).
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> nix::Result<usize> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the pointer and length describe `value`, which the kernel writes within.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result).map(|_| length as usize)
}

/// Reads an option that is an `int`.
///
/// # Errors
/// As getsockopt(2).
pub fn int_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> nix::Result<i32> {
    let mut value = [0; 4];
    option(fd, level, name, &mut value).map(|_| i32::from_ne_bytes(value))
}

/// Reads an option that is a 64-bit number, as [`SO_COOKIE`].
///
/// # Errors
/// As getsockopt(2).
pub fn u64_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> nix::Result<u64> {
    let mut value = [0; 8];
    option(fd, level, name, &mut value).map(|_| u64::from_ne_bytes(value))
}

/// Sets an option.
///
/// # Errors
/// As setsockopt(2).
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
    // SAFETY: the pointer and length describe `value`, which the kernel reads.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Bytes to be read (`SIOCINQ`); of a datagram socket those of the first message.
///
/// # Errors
/// `EINVAL` for a listener.
pub fn unread(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    queue(fd, libc::FIONREAD)
}

/// Bytes sent and not yet taken (`SIOCOUTQ`): by the peer's acknowledgement of TCP, by the reader of a unix socket.
///
/// # Errors
/// `EINVAL` for a listener.
pub fn unsent(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    queue(fd, libc::TIOCOUTQ)
}

fn queue(fd: BorrowedFd<'_>, request: libc::Ioctl) -> nix::Result<u32> {
    let mut length: libc::c_int = 0;
    // SAFETY: both requests write one int.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut length) };
    Errno::result(result).map(|_| length as u32)
}

type NameCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn name(fd: BorrowedFd<'_>, call: NameCall) -> nix::Result<Address> {
    let mut bytes = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: the pointer and length describe `bytes`, which the kernel writes within.
    Errno::result(unsafe { call(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut length) })?;
    bytes.truncate(length as usize);
    Ok(Address(bytes))
}

/// The address it is bound to: getsockname(2).
///
/// # Errors
/// As getsockname(2).
pub fn local_address(fd: BorrowedFd<'_>) -> nix::Result<Address> {
    name(fd, libc::getsockname)
}

/// The address of its peer: getpeername(2); `None` if it is not connected.
///
/// # Errors
/// As getpeername(2), but `ENOTCONN`.
pub fn peer_address(fd: BorrowedFd<'_>) -> nix::Result<Option<Address>> {
    match name(fd, libc::getpeername) {
        Err(Errno::ENOTCONN) => Ok(None),
        other => other.map(Some),
    }
}

/// Makes a socket, close-on-exec and non-blocking.
///
/// # Errors
/// As socket(2).
pub fn create(domain: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes integers.
    let fd = unsafe {
        libc::socket(
            domain,
            kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            protocol,
        )
    };
    Errno::result(fd)?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes two connected unix sockets, close-on-exec and non-blocking: socketpair(2).
///
/// # Errors
/// As socketpair(2).
pub fn pair(kind: i32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two descriptors.
    let result = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
            ends.as_mut_ptr(),
        )
    };
    Errno::result(result)?;
    // SAFETY: the kernel has just returned these descriptors; nobody else knows them.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Binds to an address: bind(2).
///
/// # Errors
/// As bind(2).
pub fn bind(fd: BorrowedFd<'_>, address: &Address) -> nix::Result<()> {
    // SAFETY: the pointer and length describe the address, which the kernel reads.
    let result = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            address.0.as_ptr().cast(),
            address.0.len() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Connects to an address: connect(2).
///
/// # Errors
/// As connect(2).
pub fn connect(fd: BorrowedFd<'_>, address: &Address) -> nix::Result<()> {
    // SAFETY: the pointer and length describe the address, which the kernel reads.
    let result = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            address.0.as_ptr().cast(),
            address.0.len() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Listens: listen(2). Of a socket that listens already it only sets the backlog.
///
/// # Errors
/// As listen(2).
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> nix::Result<()> {
    // SAFETY: takes two integers.
    Errno::result(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// Takes one waiting connection: accept4(2). `None` if none waits, whether or not the socket blocks.
///
/// # Errors
/// As accept4(2).
pub fn accept(fd: BorrowedFd<'_>) -> nix::Result<Option<OwnedFd>> {
    if !readable(fd)? {
        return Ok(None);
    }
    // SAFETY: null pointers mean that no address is wanted.
    let accepted = unsafe {
        libc::accept4(
            fd.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    };
    match Errno::result(accepted) {
        Ok(accepted) => {
            // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(accepted) }))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a read (of a listener: an accept) would not block now.
///
/// # Errors
/// As poll(2).
pub fn readable(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    Ok(poll(fd)?.0)
}

/// Whether it is readable, and whether its peer has shut down or closed (`POLLRDHUP`).
///
/// # Errors
/// As poll(2).
pub fn poll(fd: BorrowedFd<'_>) -> nix::Result<(bool, bool)> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN | libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, and no time to wait.
    Errno::result(unsafe { libc::poll(&raw mut entry, 1, 0) })?;
    Ok((
        entry.revents & libc::POLLIN != 0,
        entry.revents & (libc::POLLRDHUP | libc::POLLHUP) != 0,
    ))
}

/// Shuts down: shutdown(2), `how` as there.
///
/// # Errors
/// As shutdown(2).
pub fn shutdown(fd: BorrowedFd<'_>, how: i32) -> nix::Result<()> {
    // SAFETY: takes two integers.
    Errno::result(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// Room for `SCM_CREDENTIALS` and as many descriptors as one message may carry (`SCM_MAX_FD`, 253).
const CONTROL_ROOM: usize = 1152;

#[repr(C, align(8))]
struct Control([u8; CONTROL_ROOM]);

/// Receives one message without waiting, with room for `room` bytes. `None` if there is none. Descriptors that come
/// with it are closed at once. `flags` as recvmsg(2), `MSG_PEEK` above all.
///
/// # Errors
/// As recvmsg(2), but `EAGAIN`.
pub fn receive(fd: BorrowedFd<'_>, room: usize, flags: i32) -> nix::Result<Option<Message>> {
    let mut data = vec![0u8; room];
    let mut source = vec![0u8; size_of::<libc::sockaddr_storage>()];
    let mut control = Control([0; CONTROL_ROOM]);
    let mut part = libc::iovec {
        iov_base: data.as_mut_ptr().cast(),
        iov_len: data.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_name = source.as_mut_ptr().cast();
    header.msg_namelen = source.len() as libc::socklen_t;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_ROOM;
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every pointer in the header is of a buffer above, with its length.
    let length =
        match Errno::result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) }) {
            Ok(length) => length as usize,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(error) => return Err(error),
        };
    data.truncate(length);
    source.truncate(header.msg_namelen as usize);
    let mut message = Message {
        data,
        source: Address(source),
        ..Message::default()
    };
    message.truncated = header.msg_flags & libc::MSG_TRUNC != 0;
    // Control data that did not fit can only be descriptors: the buffer has room for everything else.
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        message.rights.push((0, 0));
    }
    // SAFETY: the header is the one the kernel filled in; CMSG_FIRSTHDR and CMSG_NXTHDR stay within it.
    let mut entry = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !entry.is_null() {
        // SAFETY: not null, so within the control buffer, which is aligned for it.
        let (level, kind, length) =
            unsafe { ((*entry).cmsg_level, (*entry).cmsg_type, (*entry).cmsg_len) };
        // SAFETY: as above.
        let payload = unsafe { libc::CMSG_DATA(entry) };
        // SAFETY: takes an integer.
        let length = length.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for index in 0..length / size_of::<RawFd>() {
                    // SAFETY: within the payload of this entry; the descriptor is new and ours.
                    let carried = unsafe {
                        OwnedFd::from_raw_fd(payload.cast::<RawFd>().add(index).read_unaligned())
                    };
                    let at = nix::sys::stat::fstat(carried.as_raw_fd())?;
                    message.rights.push((at.st_dev, at.st_ino));
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                // SAFETY: the payload of this kind is a ucred, and it is complete.
                let sender = unsafe { payload.cast::<libc::ucred>().read_unaligned() };
                message.credentials = Some(Credentials {
                    pid: sender.pid,
                    uid: sender.uid,
                    gid: sender.gid,
                });
            }
            _ => {}
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        entry = unsafe { libc::CMSG_NXTHDR(&raw const header, entry) };
    }
    Ok(Some(message))
}

/// Sends one message without waiting, to `address` unless that is empty, on behalf of `credentials` if there are any
/// (which needs the privilege, unix(7)), with `descriptors` (unix sockets only).
///
/// # Errors
/// As sendmsg(2).
pub fn send(
    fd: BorrowedFd<'_>,
    data: &[u8],
    address: &Address,
    credentials: Option<Credentials>,
    descriptors: &[BorrowedFd<'_>],
) -> nix::Result<usize> {
    let mut control = Control([0; CONTROL_ROOM]);
    let mut used = 0;
    let mut add = |kind: i32, payload: &[u8]| {
        // SAFETY: both take an integer.
        let (space, length) = unsafe {
            (
                libc::CMSG_SPACE(payload.len() as u32) as usize,
                libc::CMSG_LEN(payload.len() as u32) as usize,
            )
        };
        let head = size_of::<libc::cmsghdr>();
        let Some(entry) = control.0.get_mut(used..used + space) else {
            return Err(Errno::EINVAL);
        };
        entry[..8].copy_from_slice(&length.to_ne_bytes());
        entry[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
        entry[12..16].copy_from_slice(&kind.to_ne_bytes());
        entry[head..head + payload.len()].copy_from_slice(payload);
        used += space;
        Ok(())
    };
    if let Some(sender) = credentials {
        let mut payload = sender.pid.to_ne_bytes().to_vec();
        payload.extend(sender.uid.to_ne_bytes());
        payload.extend(sender.gid.to_ne_bytes());
        add(libc::SCM_CREDENTIALS, &payload)?;
    }
    if !descriptors.is_empty() {
        let payload: Vec<u8> = descriptors
            .iter()
            .flat_map(|fd| fd.as_raw_fd().to_ne_bytes())
            .collect();
        add(libc::SCM_RIGHTS, &payload)?;
    }
    let mut part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    if !address.0.is_empty() {
        header.msg_name = address.0.as_ptr().cast_mut().cast();
        header.msg_namelen = address.0.len() as libc::socklen_t;
    }
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if used > 0 {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = used;
    }
    // SAFETY: every pointer in the header is of a buffer above, with its length; the kernel only reads them.
    let sent = unsafe {
        libc::sendmsg(
            fd.as_raw_fd(),
            &raw const header,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    Errno::result(sent).map(|sent| sent as usize)
}

/// Runs `work` on a thread of its own that has entered the network namespace `namespace`.
///
/// # Errors
/// As setns(2).
pub fn in_network_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> nix::Result<T> {
    std::thread::scope(|scope| {
        let thread =
            scope.spawn(move || setns(namespace, CloneFlags::CLONE_NEWNET).map(|()| work()));
        thread.join().unwrap_or(Err(Errno::ECANCELED))
    })
}

/// Runs `work` on a thread of its own that sees what process `pid` sees: its network namespace, root and working
/// directory. Files it makes have just the permissions that are asked for.
///
/// # Errors
/// As open(2), setns(2), unshare(2), chroot(2) and fchdir(2).
pub fn as_seen_by<T: Send>(pid: i32, work: impl FnOnce() -> T + Send) -> nix::Result<T> {
    let open = |what: &str| {
        std::fs::File::open(format!("/proc/{pid}/{what}"))
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    };
    let (namespace, root, directory) = (open("ns/net")?, open("root")?, open("cwd")?);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            unshare(CloneFlags::CLONE_FS)?;
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            fchdir(root.as_raw_fd())?;
            chroot(".")?;
            fchdir(directory.as_raw_fd())?;
            umask(Mode::empty());
            Ok(work())
        });
        thread.join().unwrap_or(Err(Errno::ECANCELED))
    })
}

/// Whether two descriptors are the same socket.
///
/// # Errors
/// As getsockopt(2) of [`SO_COOKIE`].
pub fn same(one: impl AsFd, other: impl AsFd) -> nix::Result<bool> {
    Ok(u64_option(one.as_fd(), libc::SOL_SOCKET, SO_COOKIE)?
        == u64_option(other.as_fd(), libc::SOL_SOCKET, SO_COOKIE)?)
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;

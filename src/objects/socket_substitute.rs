//! Sends datagrams again whose sender is not in the tree (any more).

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::Error;
use super::socket::{State, own};
use crate::kernel::socket::{Message, as_seen_by, bind, create, set_option};

/// `linux/in6.h`.
const IPV6_TRANSPARENT: i32 = 75;

/// A socket that sends `message` to `receiver` as its sender would: with the same address, if that is free. It need not be an
/// address of this host (`IP_TRANSPARENT`). `None` if there can't be one. `home` is a process in the receiver's namespaces.
///
/// # Errors
/// If the kernel refuses, but for an address that is taken.
pub(super) fn substitute(
    receiver: &State,
    message: &Message,
    home: i32,
) -> Result<Option<OwnedFd>, Error> {
    let source = &message.source;
    let family = receiver.sort.family;
    let reachable = family != libc::AF_UNIX || receiver.local.unix_name().is_some();
    if receiver.sort.kind != libc::SOCK_DGRAM || !reachable || source.unix_path().is_some() {
        return Ok(None);
    }
    let made = as_seen_by(home, || {
        let socket = create(family, libc::SOCK_DGRAM, receiver.sort.protocol)?;
        let fd = socket.as_fd();
        let on = |level, name| set_option(fd, level, name, &1i32.to_ne_bytes());
        match family {
            libc::AF_UNIX if source.unix_name().is_none() => return Ok(socket),
            libc::AF_UNIX => {}
            libc::AF_INET6 => on(libc::IPPROTO_IPV6, IPV6_TRANSPARENT)?,
            _ => on(libc::IPPROTO_IP, libc::IP_TRANSPARENT)?,
        }
        bind(fd, source)?;
        Ok(socket)
    });
    match made.map_err(own("entering the process's namespaces"))? {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL | Errno::EPERM) => Ok(None),
        Err(errno) => Err(Error::Own {
            call: "making a socket for a lost sender",
            errno,
        }),
    }
}

//! Sends datagrams again whose sender is not in the tree (any more).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use super::Error;
use super::model::ObjectId;
use super::socket::{State, own};
use super::socket_apply::{Change, Step};
use super::socket_plan::Plan;
use crate::kernel::socket::{Message, as_seen_by, bind, create, set_option};

/// `linux/in6.h`.
const IPV6_TRANSPARENT: i32 = 75;

/// Looks, before anything is touched, whether everybody in whose name messages must be sent again (`SCM_CREDENTIALS`) is
/// still there: the kernel takes no other. Those of `born` will not be.
///
/// # Errors
/// The socket, and why.
pub(super) fn check_senders(
    plan: &Plan,
    recorded: &BTreeMap<ObjectId, &State>,
    born: &BTreeSet<i32>,
) -> Result<(), (ObjectId, String)> {
    let is_gone = |pid: i32| born.contains(&pid) || !Path::new(&format!("/proc/{pid}")).exists();
    let refilled = |id: &ObjectId| {
        let has_queue = |change: &Change| {
            let mut steps = change.steps.iter();
            steps.any(|step| matches!(step, Step::Queue(_)))
        };
        plan.changes.get(id).is_some_and(has_queue) || plan.make.contains_key(id)
    };
    for (&id, record) in recorded.iter().filter(|(id, _)| refilled(id)) {
        let mut senders = record
            .queue
            .iter()
            .filter_map(|message| message.credentials);
        if let Some(gone) = senders.find(|sender| is_gone(sender.pid)) {
            return Err((
                id,
                format!(
                    "what waits there was sent by pid {}, which has ended, with its credentials (SO_PASSCRED), and can't be \
                     sent again; take the checkpoint when it has been read",
                    gone.pid
                ),
            ));
        }
    }
    Ok(())
}

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
    let takes_datagrams = family == libc::AF_UNIX && receiver.sort.kind == libc::SOCK_DGRAM;
    if !(takes_datagrams || receiver.is_udp()) || !reachable || source.unix_path().is_some() {
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

//! Puts live sockets back: step by step, each step on all sockets before the next.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use super::Error;
use super::execute::{Effects, Reach};
use super::model::ObjectId;
use super::socket::{Role, State, own};
use super::socket_extra::Extra;
use super::socket_options::Options;
use super::socket_queue::{drain, fill};
use super::socket_substitute::substitute;
use super::tcp_queue::{drain_tcp, fill_tcp};
use super::udp;
use crate::kernel::sock_diag::SockDiag;
use crate::kernel::socket::{
    Address, Message, SO_COOKIE, accept, bind, connect, int_option, listen, local_address,
    set_option, shutdown, u64_option,
};

/// Linux 6.5, `asm-generic/socket.h`.
const SO_PASSPIDFD: i32 = 76;

/// What must be done to a socket that is there, or there again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The socket as it shall be.
    pub record: Box<State>,
    /// What to do.
    pub steps: Vec<Step>,
}

/// One step of a [`Change`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Break off a connection to the outside that can't be had back.
    Abort,
    /// Take and reset the connections that wait to be accepted.
    DrainBacklog,
    /// Set how many connections may wait.
    Backlog(u32),
    /// Connect a datagram socket as it was, or to nothing.
    Connect,
    /// Put back what waits to be read, through these senders; what has none is lost.
    Queue(Vec<Option<ObjectId>>),
    /// Shut down `RCV_SHUTDOWN` (1), `SEND_SHUTDOWN` (2).
    Shutdown(u8),
    /// Take a filter away, so that what is put back comes through.
    Unfilter,
    /// Put back options.
    Options,
    /// Put back filter and memberships.
    Extra,
}

impl Step {
    /// When its turn is. Options come last, as filling a queue changes some.
    pub(super) fn order(&self) -> usize {
        match self {
            Self::Abort => 0,
            Self::DrainBacklog => 1,
            Self::Backlog(_) => 2,
            Self::Connect => 3,
            Self::Unfilter => 4,
            Self::Queue(_) => 5,
            Self::Shutdown(_) => 6,
            Self::Options => 7,
            Self::Extra => 8,
        }
    }
}

/// Carries out all changes. Every socket they name must be in place.
///
/// # Errors
/// If the kernel refuses a step; the tree is then half-way.
pub fn apply(
    changes: &BTreeMap<ObjectId, Change>,
    reach: &Reach<'_>,
    effects: &mut Effects,
) -> Result<(), Error> {
    let mut todo: Vec<_> = changes
        .iter()
        .flat_map(|(&id, change)| {
            change
                .steps
                .iter()
                .map(move |step| (step, id, &*change.record))
        })
        .collect();
    todo.sort_by_key(|(step, ..)| step.order());
    for (step, id, record) in todo {
        let socket = reach.duplicate(id)?;
        let fd = socket.as_fd();
        match step {
            Step::Abort => {
                abort(fd, record, reach, id)?;
                effects.reset_connections += 1;
            }
            Step::DrainBacklog => effects.reset_connections += drain_backlog(fd)?,
            Step::Backlog(backlog) => listen(fd, *backlog as i32).map_err(own("listen"))?,
            Step::Connect => connect_again(fd, record, reach, id)?,
            Step::Queue(senders) => refill(fd, id, record, senders, reach, effects)?,
            Step::Shutdown(ended) => {
                for (bit, how) in [(1, libc::SHUT_RD), (2, libc::SHUT_WR)] {
                    if ended & bit != 0 {
                        shutdown(fd, how).map_err(own("shutdown"))?;
                    }
                }
            }
            Step::Options => restore_options(&record.options, fd, record)?,
            Step::Unfilter => Extra::unfilter(fd)?,
            Step::Extra => {
                let pid = reach.place(id).map_or(0, |place| place.pid);
                record.extra.apply(fd, record.sort, pid)?;
            }
        }
    }
    Ok(())
}

/// Puts options back, or says which one the kernel did not take.
fn restore_options(options: &Options, fd: BorrowedFd<'_>, record: &State) -> Result<(), Error> {
    options
        .restore(fd, record.sort)
        .map_err(|(call, errno)| Error::Own { call, errno })
}

/// Breaks off a connection so that its program sees an error, and its peer too.
fn abort(fd: BorrowedFd<'_>, record: &State, reach: &Reach<'_>, id: ObjectId) -> Result<(), Error> {
    if record.sort.family == libc::AF_UNIX {
        return match shutdown(fd, libc::SHUT_RDWR) {
            Ok(()) | Err(Errno::ENOTCONN) => {
                drain(fd, record.shape()).map(drop).map_err(own("recvmsg"))
            }
            Err(errno) => Err(Error::Own {
                call: "shutdown",
                errno,
            }),
        };
    }
    drain(fd, record.shape()).or_else(|errno| match errno {
        // The peer's reset or a refused connection: it is over already.
        Errno::ECONNRESET
        | Errno::ETIMEDOUT
        | Errno::EPIPE
        | Errno::ENOTCONN
        | Errno::ECONNREFUSED => Ok(0),
        other => Err(Error::Own {
            call: "recvmsg",
            errno: other,
        }),
    })?;
    let destroyed = reach
        .place(id)
        .ok_or(Errno::EBADF)
        .and_then(|place| destroy(fd, place.pid));
    if destroyed.is_err() {
        // A kernel without SOCK_DESTROY: connecting to nothing resets as well (connect(2)).
        match connect(fd, &Address::unspecified()) {
            Ok(()) | Err(Errno::ENOTCONN | Errno::EINVAL) => {}
            Err(errno) => {
                return Err(Error::Own {
                    call: "connect",
                    errno,
                });
            }
        }
    }
    Ok(())
}

fn destroy(fd: BorrowedFd<'_>, pid: i32) -> nix::Result<()> {
    let cookie = u64_option(fd, libc::SOL_SOCKET, SO_COOKIE)?;
    let family = int_option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    let mut diag = SockDiag::open_of(pid)?;
    // An IPv6 socket with an IPv4 connection is listed as IPv6.
    let all = diag.inet(family, libc::IPPROTO_TCP)?;
    match all.iter().find(|socket| socket.cookie == cookie) {
        Some(found) => diag.destroy(found),
        // Closed already.
        None => Ok(()),
    }
}

/// Accepts whatever waits and drops it; a TCP client sees a reset, a unix client the end.
pub(super) fn drain_backlog(listener: BorrowedFd<'_>) -> Result<usize, Error> {
    let mut taken = 0;
    while let Some(connection) = accept(listener).map_err(own("accept4"))? {
        reset_at_close(connection.as_fd())?;
        taken += 1;
    }
    Ok(taken)
}

/// Has a close(2) of a TCP connection reset it: `SO_LINGER` with no time (socket(7)).
pub(super) fn reset_at_close(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let linger: Vec<u8> = [1i32, 0]
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect();
    set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger).map_err(own("setsockopt"))
}

/// Connects a datagram socket to the recorded peer, or to none.
fn connect_again(
    fd: BorrowedFd<'_>,
    record: &State,
    reach: &Reach<'_>,
    id: ObjectId,
) -> Result<(), Error> {
    let to = if record.peer.0.is_empty() {
        Address::unspecified()
    } else {
        record.peer.clone()
    };
    let (_pin, to) = address_for_us(&to, reach.place(id).map(|place| place.pid))?;
    connect(fd, &to).map_err(|errno| Error::Descriptor {
        what: record.describe(),
        pid: reach.place(id).map_or(0, |place| place.pid),
        call: "connect",
        errno,
    })?;
    // A port that the kernel chose is lost with the connection (udp_disconnect of the kernel).
    let now = local_address(fd).map_err(own("getsockname"))?;
    match now == record.local {
        true => Ok(()),
        false => bind(fd, &record.local).map_err(own("bind")),
    }
}

/// An address that means the same to the keeper: a path in the process's root becomes one through a pin of the file,
/// because the kernel looks paths up where the caller lives. The pin must outlive the use.
fn address_for_us(address: &Address, pid: Option<i32>) -> Result<(Option<File>, Address), Error> {
    let (Some(path), Some(pid)) = (address.unix_path(), pid) else {
        return Ok((None, address.clone()));
    };
    let path = super::unix::path_for_us(pid, path);
    let pin = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&path)
        .map_err(|error| {
            own("open of a unix socket's file")(Errno::from_raw(
                error.raw_os_error().unwrap_or(libc::EIO),
            ))
        })?;
    let through = format!("/proc/self/fd/{}", pin.as_raw_fd());
    Ok((Some(pin), Address::unix(through.as_bytes())))
}

fn is_inet(record: &State) -> bool {
    matches!(record.sort.family, libc::AF_INET | libc::AF_INET6)
}

/// Empties the queue and fills it as recorded.
fn refill(
    fd: BorrowedFd<'_>,
    id: ObjectId,
    record: &State,
    senders: &[Option<ObjectId>],
    reach: &Reach<'_>,
    effects: &mut Effects,
) -> Result<(), Error> {
    match (&record.role, senders) {
        (Role::Tcp(_), [Some(sender)]) => {
            let sender = reach.duplicate(*sender)?;
            drain_tcp(fd, sender.as_fd()).map_err(own("taking queued TCP data"))?;
        }
        _ => drain(fd, record.shape())
            .map(drop)
            .map_err(own("recvmsg"))?,
    }
    let udp = is_inet(record) && record.sort.kind == libc::SOCK_DGRAM && !record.queue.is_empty();
    // A connected socket takes only what comes from its peer; what came before it was connected waits all the same.
    let strangers = udp
        && !record.peer.0.is_empty()
        && record
            .queue
            .iter()
            .any(|message| message.source != record.peer);
    if udp {
        udp::make_room(fd).map_err(own("setsockopt"))?;
    }
    if strangers {
        let alone = State {
            peer: Address::default(),
            ..record.clone()
        };
        connect_again(fd, &alone, reach, id)?;
    }
    let pid = |id: ObjectId| reach.place(id).map(|place| place.pid);
    let mut lost = 0;
    for (index, (message, sender)) in record.queue.iter().zip(senders).enumerate() {
        let (sender, sender_pid) = match sender {
            Some(sender) => (Some(reach.duplicate(*sender)?), pid(*sender)),
            None => match pid(id) {
                Some(home) => (substitute(record, message, home)?, Some(home)),
                None => (None, None),
            },
        };
        match sender {
            Some(sender) => put_back(fd, record, message, sender.as_fd(), sender_pid)?,
            None => {
                effects.lost.push((id, index - lost));
                lost += 1;
            }
        }
    }
    if strangers {
        connect_again(fd, record, reach, id)?;
    }
    if udp {
        restore_options(&record.options, fd, record)?;
    }
    if lost > 0 {
        effects.kept.push(format!(
            "{}: {lost} datagrams that waited to be read came from outside and are lost",
            record.describe()
        ));
    }
    Ok(())
}

fn put_back(
    reader: BorrowedFd<'_>,
    record: &State,
    message: &Message,
    sender: BorrowedFd<'_>,
    sender_pid: Option<i32>,
) -> Result<(), Error> {
    let mut sort = record.sort;
    sort.family =
        int_option(sender, libc::SOL_SOCKET, libc::SO_DOMAIN).map_err(own("getsockopt"))?;
    let before = Options::read(sender, sort).map_err(own("getsockopt"))?;
    if sort.family == libc::AF_UNIX {
        // With one of these a socket without a name is given one when it sends (unix(7)).
        for name in [libc::SO_PASSCRED, SO_PASSPIDFD] {
            match set_option(sender, libc::SOL_SOCKET, name, &0i32.to_ne_bytes()) {
                Ok(()) | Err(Errno::ENOPROTOOPT) => {}
                Err(errno) => return Err(own("setsockopt")(errno)),
            }
        }
    }
    match (record.sort.family, record.sort.kind) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM) => {
            fill_tcp(sender, reader, &message.data).map_err(own("putting queued TCP data back"))?;
        }
        (_, libc::SOCK_DGRAM) => {
            let to = destination(record, message);
            let (_pin, to) = address_for_us(&to, sender_pid)?;
            let fill = || fill(sender, std::slice::from_ref(message), &to);
            match is_inet(record) {
                true => udp::deliver(reader, fill),
                false => fill(),
            }
            .map_err(own("putting a datagram back"))?;
        }
        _ => fill(sender, std::slice::from_ref(message), &Address::default())
            .map_err(own("putting queued data back"))?,
    }
    let after = State {
        sort,
        ..record.clone()
    };
    restore_options(&before, sender, &after)
}

/// Where a datagram must go so that it arrives at this socket. A socket bound to every address is reached at the
/// address the datagram came from, which is local: its sender is in the tree.
fn destination(receiver: &State, message: &Message) -> Address {
    let Some(local) = receiver.local.inet() else {
        return match receiver.local.unix_name() {
            Some(_) => receiver.local.clone(),
            None => Address::default(),
        };
    };
    let mut to = receiver.local.clone();
    if local.ip().is_unspecified() && message.source.0.len() == to.0.len() {
        let ip = if local.is_ipv4() { 4..8 } else { 8..24 };
        to.0[ip.clone()].copy_from_slice(&message.source.0[ip]);
    }
    to
}

//! What is under way in a TCP connection that has both ends in the tree.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Error;
use super::model::ObjectId;
use super::socket::{Role, State, own};
use super::socket_queue::{Shape, drain, fill, peek};
use super::tcp::{self, Connection};
use crate::kernel::socket::{Address, Message, int_option, receive, set_option, unread, unsent};

/// How long queued bytes may take over the loopback interface.
const DEADLINE: Duration = Duration::from_secs(2);
/// Queues of `TCP_REPAIR_QUEUE` in `linux/tcp.h`.
const TCP_RECV_QUEUE: i32 = 1;
const TCP_SEND_QUEUE: i32 = 2;
/// Leaves repair mode without a window probe, which would be a packet more than the program sent.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;

/// Looks again at the TCP connections that have both ends in the tree: what each reader would still get, in its receive
/// queue or on the way to it. `ends` gives the other end of each; `recorded`, if there is any, what it was then: where
/// nothing was read or written since, it is the same.
///
/// # Errors
/// If the kernel refuses to tell.
pub(super) fn complete(
    states: &mut BTreeMap<ObjectId, State>,
    ends: &BTreeMap<ObjectId, ObjectId>,
    recorded: &BTreeMap<ObjectId, &State>,
    duplicate: impl Fn(ObjectId) -> Result<OwnedFd, Error>,
) -> Result<(), Error> {
    for (&reader, &writer) in ends {
        let connection =
            |states: &BTreeMap<ObjectId, State>, id: ObjectId| match states.get(&id)?.role {
                Role::Tcp(connection) => Some(connection),
                _ => None,
            };
        let (Some(one), Some(other)) = (connection(states, reader), connection(states, writer))
        else {
            continue;
        };
        if one.unread == 0 && other.unsent == 0 {
            continue;
        }
        let was = |id: ObjectId, now: Connection| match recorded.get(&id).map(|state| &state.role) {
            Some(Role::Tcp(then)) => now.is_where(then),
            _ => false,
        };
        let queue = match recorded.get(&reader) {
            Some(then) if was(reader, one) && was(writer, other) => then.queue.clone(),
            _ => {
                let (reader_fd, writer_fd) = (duplicate(reader)?, duplicate(writer)?);
                between(reader_fd.as_fd(), writer_fd.as_fd())
                    .map_err(own("looking at queued TCP data"))?
            }
        };
        if let Some(state) = states.get_mut(&reader) {
            state.queue = queue;
        }
    }
    Ok(())
}

/// What `reader` will still get from `writer`, both being ends of one connection inside: its receive queue, and what
/// does not fit into its window and waits at the writer.
fn between(reader: BorrowedFd<'_>, writer: BorrowedFd<'_>) -> nix::Result<Vec<Message>> {
    let started = Instant::now();
    loop {
        acknowledge(reader)?;
        let waiting = unread(reader)?;
        let mut data: Vec<u8> = peek(reader, Shape::Stream)?
            .into_iter()
            .flat_map(|message| message.data)
            .collect();
        if unsent(writer)? > 0 {
            data.extend(not_received(reader, writer)?);
        }
        // What arrived meanwhile would count twice.
        if unread(reader)? == waiting {
            let message = Message {
                data,
                ..Message::default()
            };
            return Ok(if message.data.is_empty() {
                Vec::new()
            } else {
                vec![message]
            });
        }
        if started.elapsed() > DEADLINE {
            return Err(Errno::ETIMEDOUT);
        }
    }
}

/// The bytes of the send queue that the reader does not have. Only `TCP_REPAIR` shows the queue (Linux 3.5); where it
/// begins is what was acknowledged last, so the end of it counts.
fn not_received(reader: BorrowedFd<'_>, writer: BorrowedFd<'_>) -> nix::Result<Vec<u8>> {
    let received = repairing(reader, || sequence(reader, TCP_RECV_QUEUE))?;
    repairing(writer, || {
        let written = sequence(writer, TCP_SEND_QUEUE)?;
        let queued = unsent(writer)? as usize;
        let mut bytes = receive(writer, queued, libc::MSG_PEEK)?
            .unwrap_or_default()
            .data;
        let mut missing = written.wrapping_sub(received) as usize;
        // The end of the stream has a number of its own.
        if queued > bytes.len() {
            missing = missing.saturating_sub(queued - bytes.len());
        }
        bytes.drain(..bytes.len().saturating_sub(missing));
        Ok(bytes)
    })
}

/// Looks into a socket in repair mode, which leaves `SO_REUSEADDR` switched off.
fn repairing<T>(fd: BorrowedFd<'_>, look: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
    let set = |level: i32, name: i32, value: i32| set_option(fd, level, name, &value.to_ne_bytes());
    let reuse = int_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    set(libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    let seen = look();
    set(libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)?;
    set(libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
    seen
}

/// The next sequence number of a queue of a socket in repair mode.
fn sequence(fd: BorrowedFd<'_>, queue: i32) -> nix::Result<u32> {
    set_option(
        fd,
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR_QUEUE,
        &queue.to_ne_bytes(),
    )?;
    int_option(fd, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ).map(|sequence| sequence as u32)
}

/// Sends `data` over a TCP connection whose other end is `reader`, and waits until all of it is there or the reader's
/// window is full. Changes `TCP_NODELAY` and `TCP_CORK` of the sender; the caller puts its options back.
///
/// # Errors
/// As sendmsg(2); `ETIMEDOUT` if it does not arrive.
pub(super) fn fill_tcp(
    sender: BorrowedFd<'_>,
    reader: BorrowedFd<'_>,
    data: &[u8],
) -> nix::Result<()> {
    set_option(
        sender,
        libc::IPPROTO_TCP,
        libc::TCP_CORK,
        &0i32.to_ne_bytes(),
    )?;
    set_option(
        sender,
        libc::IPPROTO_TCP,
        libc::TCP_NODELAY,
        &1i32.to_ne_bytes(),
    )?;
    let before = unread(reader)? as usize;
    let message = Message {
        data: data.to_vec(),
        ..Message::default()
    };
    fill(sender, std::slice::from_ref(&message), &Address::default())?;
    let started = Instant::now();
    loop {
        acknowledge(reader)?;
        let arrived = unread(reader)? as usize - before;
        if arrived == data.len() || arrived + tcp_not_sent(sender)? == data.len() {
            return Ok(());
        }
        if started.elapsed() > DEADLINE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::yield_now();
    }
}

/// Takes everything that waits at `reader`, and what its peer `writer` sends as room comes free.
///
/// # Errors
/// As recvmsg(2); `ETIMEDOUT` if what is on the way does not arrive.
pub(super) fn drain_tcp(reader: BorrowedFd<'_>, writer: BorrowedFd<'_>) -> nix::Result<()> {
    let started = Instant::now();
    loop {
        drain(reader, Shape::Stream)?;
        acknowledge(reader)?;
        if unsent(writer)? == 0 && unread(reader)? == 0 {
            return Ok(());
        }
        if started.elapsed() > DEADLINE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::yield_now();
    }
}

/// Has a delayed acknowledgement sent now (tcp(7), `TCP_QUICKACK`), so that the other end's [`unsent`] tells what the
/// reader does not have. An even value does not switch to quick acknowledgements.
pub(super) fn acknowledge(reader: BorrowedFd<'_>) -> nix::Result<()> {
    match set_option(
        reader,
        libc::IPPROTO_TCP,
        libc::TCP_QUICKACK,
        &2i32.to_ne_bytes(),
    ) {
        Err(Errno::ENOPROTOOPT) => Ok(()),
        other => other,
    }
}

/// Bytes that wait because the reader's window is full.
pub(super) fn tcp_not_sent(sender: BorrowedFd<'_>) -> nix::Result<usize> {
    Ok(tcp::info(sender)?.not_sent.min(unsent(sender)?) as usize)
}

//! What waits to be read from a socket: looking at it without taking it, taking it all, putting it back.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use crate::kernel::socket::{
    Address, Message, int_option, poll, receive, send, set_option, unread,
};

/// Room for one message; grows if one does not fit.
const MESSAGE_ROOM: usize = 256 << 10;
const LARGEST_ROOM: usize = 64 << 20;

/// Whether data has boundaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_DGRAM`, `SOCK_SEQPACKET`.
    Messages,
}

/// Everything that waits to be read, which stays where it is.
///
/// `SO_PEEK_OFF` walks the queue where one look does not show all of it (socket(7)); it is set back before this returns.
/// A message without bytes is seen only the first time, as the kernel marks what was looked at.
///
/// # Errors
/// As recvmsg(2); `EMSGSIZE` for a message beyond 64 MiB.
pub(super) fn peek(fd: BorrowedFd<'_>, shape: Shape) -> nix::Result<Vec<Message>> {
    match look(fd, shape) {
        // An error that waited, as after the peer has gone, is reported once and hides the queue. A socket that has come to
        // one since the checkpoint is replaced anyway; one that has one at the checkpoint refuses it.
        Err(Errno::ECONNRESET | Errno::ECONNREFUSED | Errno::ETIMEDOUT | Errno::EPIPE) => {
            look(fd, shape)
        }
        other => other,
    }
}

fn look(fd: BorrowedFd<'_>, shape: Shape) -> nix::Result<Vec<Message>> {
    if !poll(fd)?.0 {
        return Ok(Vec::new());
    }
    if shape == Shape::Stream {
        let length = unread(fd)? as usize;
        if length == 0 {
            return Ok(Vec::new());
        }
        let Some(all) = receive(fd, length, libc::MSG_PEEK)? else {
            return Ok(Vec::new());
        };
        if all.data.len() == length && all.credentials.is_none() {
            return Ok(vec![Message {
                truncated: false,
                ..all
            }]);
        }
    }
    let before = int_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    let set = |offset: i32| {
        set_option(
            fd,
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            &offset.to_ne_bytes(),
        )
    };
    let mut room = MESSAGE_ROOM;
    let found = loop {
        set(0)?;
        match walk(fd, shape, room) {
            Err(Errno::EMSGSIZE) if room < LARGEST_ROOM => room *= 4,
            other => break other,
        }
    };
    set(before)?;
    found
}

fn walk(fd: BorrowedFd<'_>, shape: Shape, room: usize) -> nix::Result<Vec<Message>> {
    let mut found = Vec::new();
    while let Some(message) = receive(fd, room, libc::MSG_PEEK)? {
        if message.truncated && shape == Shape::Messages {
            return Err(Errno::EMSGSIZE);
        }
        if message.data.is_empty() && shape == Shape::Stream {
            break;
        }
        // At the end of a seqpacket connection every look says "nothing", for ever.
        if message.data.is_empty() && poll(fd)?.1 {
            break;
        }
        found.push(message);
    }
    Ok(found)
}

/// Whether two queues hold the same. Of a stream only the bytes and who sent them matter, not how they were cut.
pub(super) fn same(one: &[Message], other: &[Message], shape: Shape) -> bool {
    match shape {
        Shape::Messages => one == other,
        Shape::Stream => {
            let flat = |queue: &[Message]| -> Vec<u8> {
                queue
                    .iter()
                    .flat_map(|message| message.data.iter().copied())
                    .collect()
            };
            let senders = |queue: &[Message]| {
                let mut senders: Vec<_> = queue.iter().map(|message| message.credentials).collect();
                senders.dedup();
                senders
            };
            // Where in the stream they are, they stay; what was read before them shows in the bytes.
            let rights = |queue: &[Message]| -> Vec<_> {
                queue
                    .iter()
                    .flat_map(|message| message.rights.iter().copied())
                    .collect()
            };
            senders(one) == senders(other)
                && flat(one) == flat(other)
                && rights(one) == rights(other)
        }
    }
}

/// Takes everything that waits to be read; the number of messages (of a stream: of stretches).
///
/// # Errors
/// As recvmsg(2).
pub(super) fn drain(fd: BorrowedFd<'_>, shape: Shape) -> nix::Result<usize> {
    let mut taken = 0;
    while poll(fd)?.0 {
        match receive(fd, MESSAGE_ROOM, 0)? {
            None => break,
            Some(message) if message.data.is_empty() && (shape == Shape::Stream || poll(fd)?.1) => {
                break;
            }
            Some(_) => taken += 1,
        }
    }
    Ok(taken)
}

/// Sends messages through the socket of their sender, to `address` unless that is empty. The sender's buffer is made
/// larger if they do not fit; the caller puts its options back.
///
/// # Errors
/// As sendmsg(2).
pub(super) fn fill(
    sender: BorrowedFd<'_>,
    messages: &[Message],
    address: &Address,
) -> nix::Result<()> {
    for message in messages {
        let mut rest = message.data.as_slice();
        loop {
            match send(sender, rest, address, message.credentials, &[]) {
                Ok(sent) if sent >= rest.len() => break,
                Ok(sent) => rest = &rest[sent..],
                // EMSGSIZE: a message larger than the buffer is by now (unix(7)).
                Err(error @ (Errno::EAGAIN | Errno::EMSGSIZE)) => enlarge(sender, error)?,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Doubles the send buffer, up to 64 MiB; then `full` is the error.
fn enlarge(sender: BorrowedFd<'_>, full: Errno) -> nix::Result<()> {
    // The kernel doubles what it is told (socket(7)), so this asks for twice the size there is.
    let size = int_option(sender, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    if size as usize > LARGEST_ROOM {
        return Err(full);
    }
    set_option(
        sender,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        &size.to_ne_bytes(),
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn a_stream_goes_back_byte_for_byte() {
        let (mut one, mut other) = UnixStream::pair().expect("pair");
        let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        one.write_all(&text).expect("write");
        let recorded = peek(other.as_fd(), Shape::Stream).expect("peek");
        assert_eq!(
            recorded.iter().map(|m| m.data.len()).sum::<usize>(),
            text.len()
        );
        let mut some = [0; 1000];
        other.read_exact(&mut some).expect("read");
        one.write_all(b"later").expect("write");
        assert!(!same(
            &recorded,
            &peek(other.as_fd(), Shape::Stream).expect("peek"),
            Shape::Stream
        ));
        drain(other.as_fd(), Shape::Stream).expect("drain");
        fill(one.as_fd(), &recorded, &Address::default()).expect("fill");
        assert!(same(
            &recorded,
            &peek(other.as_fd(), Shape::Stream).expect("peek"),
            Shape::Stream
        ));
        let mut back = vec![0; text.len()];
        other.read_exact(&mut back).expect("read");
        assert_eq!(back, text);
    }

    #[test]
    fn messages_keep_their_boundaries_and_the_look_leaves_no_trace() {
        let (one, other) = UnixDatagram::pair().expect("pair");
        for text in [&b"one"[..], b"twenty-two", b"x"] {
            one.send(text).expect("send");
        }
        for _ in 0..2 {
            let found = peek(other.as_fd(), Shape::Messages).expect("peek");
            let texts: Vec<_> = found
                .iter()
                .map(|message| message.data.as_slice())
                .collect();
            assert_eq!(texts, [&b"one"[..], b"twenty-two", b"x"]);
        }
        assert_eq!(
            int_option(other.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF),
            Ok(-1)
        );
        assert_eq!(drain(other.as_fd(), Shape::Messages), Ok(3));
        assert_eq!(peek(other.as_fd(), Shape::Messages), Ok(vec![]));
    }

    #[test]
    fn the_end_of_a_connection_is_no_message() {
        let (one, other) = UnixStream::pair().expect("pair");
        drop(one);
        assert_eq!(peek(other.as_fd(), Shape::Stream), Ok(vec![]));
        assert_eq!(drain(other.as_fd(), Shape::Stream), Ok(0));
    }

    #[test]
    fn a_full_buffer_is_made_larger() {
        let (one, other) = UnixStream::pair().expect("pair");
        set_option(
            one.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            &4096i32.to_ne_bytes(),
        )
        .expect("option");
        let message = Message {
            data: vec![7; 300_000],
            ..Message::default()
        };
        fill(
            one.as_fd(),
            std::slice::from_ref(&message),
            &Address::default(),
        )
        .expect("fill");
        let found = peek(other.as_fd(), Shape::Stream).expect("peek");
        assert!(same(&found, &[message], Shape::Stream));
    }
}
